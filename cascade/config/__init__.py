"""The settings of a stage and of a training run. What each builds is one hop away, in `cascade.build`."""
