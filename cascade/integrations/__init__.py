"""Adapters to other projects' engines, each behind an optional extra of the package."""
