"""Drawing: the only way from tasks to pictures. `engine` is where to begin reading."""
