"""The settings of a stage and of a training run. `cascade.build` makes objects from them."""
