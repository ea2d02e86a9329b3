"""Drawing: the only way from tasks to pictures. Start reading at `engine`."""
