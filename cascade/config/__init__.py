"""The settings of a stage and of a training run. `cascade.stage` makes objects from them."""
