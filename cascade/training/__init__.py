"""Training of one stage; start reading at `trainer`."""
