"""Backbones of the tokenizer: the networks between images and tokens, chosen by a word of the
config.

A backbone is a Flax module, a field of `vae.VAE`, whose parameters stand at the top of the
tokenizer's.

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     p  pixels per token along each axis     c
  image channels
"""

from typing import Any, Protocol

import jax

from sphere_ar_jax.models.backbones.hybrid import Hybrid


class Backbone(Protocol):
    """The networks of a tokenizer.

    Attributes:
      patch_size: p. width: D. image_channels: c. dtype: of the computation; parameters are float32.
    """

    patch_size: int
    width: int
    image_channels: int
    dtype: Any

    def encode(self, images: jax.Array) -> jax.Array:
        """Images (B, H·p, W·p, c) in [−1, 1] → hidden states (B, L, D)."""

    def decode(self, x: jax.Array) -> jax.Array:
        """Hidden states (B, H, W, D) → images (B, H·p, W·p, c), float32, not clipped."""


# The config's word `vae.backbone` → the module.
BACKBONES = {'hybrid': Hybrid}
