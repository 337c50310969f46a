"""Weights of other libraries: PyTorch, Equinox, Flax NNX."""
