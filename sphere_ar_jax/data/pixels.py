"""Pixels between bytes and the models' range [−1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np


def to_float(pixels: np.ndarray) -> np.ndarray:
    """Maps uint8 in [0, 255] to float32 in [−1, 1].

    The value is (x/255 − 0.5)·2, rounded to float32 after each step as in the public code
    (`docs/method.md`, "Data augmentation").
    """
    x = pixels.astype(np.float32)
    x /= np.float32(255)
    x -= np.float32(0.5)
    x *= np.float32(2)
    return x


def to_uint8(images: jax.typing.ArrayLike) -> jax.Array:
    """Maps images in [−1, 1] to uint8 (`docs/method.md`, "Pixels").

    The value is clip(127.5·x + 128, 0, 255), truncated as in the public code.
    """
    return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)
