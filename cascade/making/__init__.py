"""From a folder of pictures to a cascade: what `cascade make` does, step by step."""
