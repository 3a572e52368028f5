"""Kernels of our own for CUDA, where MLX launches many small ones. Called by `models.arithmetic` only.

Each result depends on its own row alone, and a product with an expert not on the slot that holds it. What
these kernels do not take, MLX's own operations do.
"""
