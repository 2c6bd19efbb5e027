"""SphereAR in JAX: autoregressive generation of images with tokens on a hypersphere.

The method is that of arXiv 2509.24335; `docs/method.md` says what the package computes.
"""

import importlib
from types import ModuleType

__version__ = '0.1.0'


def __getattr__(name: str) -> ModuleType:
    """Finds `recipes`, which config files of version 0.1 import from here.

    Raises:
      AttributeError: `name` is any other name.
    """
    if name == 'recipes':
        return importlib.import_module('sphere_ar_jax.config.recipes')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
