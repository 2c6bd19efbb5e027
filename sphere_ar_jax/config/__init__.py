"""The configuration: every key, its checks, and the objects that it describes.

A config file starts from `default()`, changes values and returns it.
"""

from sphere_ar_jax.config.schema import default

__all__ = ['default']
