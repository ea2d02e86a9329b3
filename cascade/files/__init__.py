"""Reading the user's files: how they are named, found, opened and decoded, the same way everywhere."""
