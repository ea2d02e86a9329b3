"""Offline, repeatable measures of a cascade: agreement of pictures with prompts, similarity to the data."""
