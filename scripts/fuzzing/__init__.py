"""Files as nobody would write them, for each reader of the package; the command is scripts/fuzz.py."""
