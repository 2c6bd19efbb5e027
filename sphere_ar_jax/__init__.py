"""SphereAR in JAX: continuous-token autoregressive image generation on a hypersphere (arXiv 2509.24335)."""

__version__ = '0.1.0'
