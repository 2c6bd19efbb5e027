"""SphereAR in JAX: autoregressive generation of images with tokens on a hypersphere.

The method is that of arXiv 2509.24335; `docs/method.md` says what the package computes. `load`
opens a trained run from Python (`docs/python.md`).
"""

import importlib

# Type checkers take it as true. That of `typing` would cost an import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sphere_ar_jax.loading import load as load
    from sphere_ar_jax.sampling.model import Model as Model

__version__ = '0.2.0.dev0'
__all__ = ['Model', 'load']

# What the package shows and imports when it is asked for.
_LAZY = {'load': 'sphere_ar_jax.loading', 'Model': 'sphere_ar_jax.sampling.model'}


def __getattr__(name: str) -> object:
    """Finds `load` and `Model`, and `recipes`, which config files of version 0.1 import from here.

    Raises:
      AttributeError: `name` is any other name.
    """
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == 'recipes':
        return importlib.import_module('sphere_ar_jax.config.recipes')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    """The names of the package, those that are not imported yet among them."""
    return sorted({*globals(), *_LAZY})
