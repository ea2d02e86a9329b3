"""The command line; `program` is where to begin reading."""
