"""Kernels for GPUs that do the work of several of XLA's: `products` and `cached_attention`."""
