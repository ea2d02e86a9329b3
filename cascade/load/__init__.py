"""From files to objects: a folder or hub id becomes a stage, a pipeline, a text encoder or a training run."""
