"""Whole models from PyTorch directories to checkpoints and back, tensor by tensor, and the comparison of any two."""
