"""How the emoji data set is made from public sources; `scripts/prepare_art.py` is the command."""
