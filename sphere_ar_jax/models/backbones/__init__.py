"""Backbones of the tokenizer: the networks between images and tokens.

A backbone is a Flax module, a field of `vae.VAE`. Its parameters stand at the top level of the
tokenizer's. The config chooses the backbone by a word.

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     c  image channels
  p  pixels per token along each axis
"""

from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from sphere_ar_jax.models.backbones.cnn import CNN
from sphere_ar_jax.models.backbones.hybrid import Hybrid
from sphere_ar_jax.models.backbones.vit import ViT


class Backbone(Protocol):
    """The networks of a tokenizer: an encoder and a decoder."""

    @property
    def patch_size(self) -> int:
        """Pixels per token along each axis, p."""

    @property
    def width(self) -> int:
        """Width D of the hidden states."""

    @property
    def image_channels(self) -> int:
        """Channels c of the images."""

    @property
    def dtype(self) -> DTypeLike:
        """Dtype of the computation; parameters are float32."""

    def encode(self, images: jax.Array) -> jax.Array:
        """Turns images (B, H·p, W·p, c) in [−1, 1] into hidden states (B, L, D)."""

    def decode(self, x: jax.Array) -> jax.Array:
        """Turns hidden states (B, H, W, D) into images (B, H·p, W·p, c), float32, not clipped."""

    def clone(self, **updates: Any) -> 'Backbone':
        """Copies the module with other values for some fields, as every Flax module does."""


# The config's word `vae.backbone` → the module.
BACKBONES: dict[str, type[Backbone]] = {'hybrid': Hybrid, 'cnn': CNN, 'vit': ViT}
