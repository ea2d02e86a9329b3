"""The command line; start reading at `program`."""
