"""Other people's files: how they are named, found, opened and read, the same way everywhere."""
