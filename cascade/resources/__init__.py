"""Resources of a stage, counted or measured before it is used: weights, memory, arithmetic, number format."""
