"""Conditions in addition to text: settings, and values."""
