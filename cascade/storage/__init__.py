"""Models and runs as folders: found, read into stages, pipelines and training runs, written and converted."""
