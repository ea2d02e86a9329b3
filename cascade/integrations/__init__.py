"""Adapters to engines of others, each behind an optional extra of the package."""
