"""Pictures: files of every kind read and written, conversions, resizing, and the format of a cascade's pictures."""
