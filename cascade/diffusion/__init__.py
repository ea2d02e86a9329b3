"""The mathematics of diffusion as functions on tensors. It imports torch alone."""
