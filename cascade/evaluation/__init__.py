"""Is the picture what the prompt said? Is it like the data? Offline, repeatable measures of a cascade."""
