"""Files: the user's, read the same way everywhere; and cascade's own, written whole or not at all."""
