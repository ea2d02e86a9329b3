"""Building the emoji data set from public sources; `scripts/prepare_art.py` is the command."""
