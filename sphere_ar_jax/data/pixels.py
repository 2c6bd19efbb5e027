"""Pixels between bytes and the models' range [−1, 1]."""

import jax.numpy as jnp
import numpy as np


def to_float(pixels):
    """uint8 in [0, 255] → float32 in [−1, 1]: (x/255 − 0.5)·2, rounded after each step as
    published.
    """
    x = pixels.astype(np.float32)
    x /= np.float32(255)
    x -= np.float32(0.5)
    x *= np.float32(2)
    return x


def to_uint8(images):
    """Images in [−1, 1] → uint8: clip(127.5·x + 128, 0, 255), truncated, as published."""
    return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)
