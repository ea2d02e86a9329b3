"""Prompts to embeddings: a frozen T5, and a cache of its output."""
