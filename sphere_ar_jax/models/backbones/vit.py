"""A backbone of transformers alone (`docs/method.md`, "Backbone").

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     c  image channels
  p  pixels per token along each axis
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.backbones.grid_transformer import GridTransformer
from sphere_ar_jax.models.convolutions import torch_init


def patchify(images: jax.Array, p: int) -> jax.Array:
    """Turns images (B, H·p, W·p, c) into patches (B, H, W, p·p·c).

    A patch has its pixels in raster order, and the channels of a pixel beside each other.
    """
    B, height, width, c = images.shape
    H = height // p
    W = width // p
    patches = images.reshape(B, H, p, W, p, c).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(B, H, W, p * p * c)


def unpatchify(patches: jax.Array, p: int) -> jax.Array:
    """Turns patches (B, H, W, p·p·c) into images (B, H·p, W·p, c). It inverts `patchify`."""
    B, H, W, features = patches.shape
    c = features // p**2
    images = patches.reshape(B, H, W, p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return images.reshape(B, H * p, W * p, c)


class Encoder(nn.Module):
    """The network from images to hidden states.

    Attributes:
      patch_size: p.
      width: D.
      vit: the transformer on the token grid.
      dtype: dtype of the computation; parameters are float32.
    """

    patch_size: int
    width: int
    vit: GridTransformer
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Turns images (B, H·p, W·p, c) into hidden states (B, L, D) in `dtype`."""

        def linear(name: str, x: jax.Array) -> jax.Array:
            dense = nn.Dense(
                self.width, use_bias=False, kernel_init=torch_init(), dtype=self.dtype, name=name
            )
            return dense(x)

        x = linear('embed', patchify(images, self.patch_size))
        x = self.vit(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = transformer.RMSNorm(self.dtype, name='norm')(x)
        return linear('output', x)


class Decoder(nn.Module):
    """The network from hidden states on the grid to images.

    Attributes:
      patch_size: p.
      image_channels: c.
      vit: the transformer on the token grid.
      dtype: dtype of the computation; parameters are float32.
    """

    patch_size: int
    image_channels: int
    vit: GridTransformer
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Turns hidden states (B, H, W, D) into images (B, H·p, W·p, c), float32, not clipped."""
        x = self.vit(x)
        x = transformer.RMSNorm(self.dtype, name='norm')(x)
        features = self.patch_size**2 * self.image_channels
        pixels = nn.Dense(
            features, use_bias=False, kernel_init=torch_init(), dtype=self.dtype, name='pixels'
        )
        return unpatchify(pixels(x), self.patch_size).astype(jnp.float32)


class ViT(nn.Module):
    """A ViT on linear embeddings of patches, and another one from which patches are linear.

    The defaults have about as many parameters as the published hybrid.

    Attributes:
      image_channels: c.
      patch_size: p.
      width: D.
      encoder_depth: blocks of the encoder.
      decoder_depth: blocks of the decoder.
      heads: heads of both; D/heads must be a multiple of 4 for the 2-D RoPE.
      remat: see `transformer.Stack`.
      unroll: see `transformer.Stack`.
      dtype: dtype of the computation; parameters are float32.
    """

    image_channels: int = 3
    patch_size: int = 16
    width: int = 512
    encoder_depth: int = 7
    decoder_depth: int = 15
    heads: int = 8
    remat: bool = False
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        encoder_vit = self._vit(self.encoder_depth)
        decoder_vit = self._vit(self.decoder_depth)
        self.encoder = Encoder(self.patch_size, self.width, encoder_vit, self.dtype)
        self.decoder = Decoder(self.patch_size, self.image_channels, decoder_vit, self.dtype)

    def _vit(self, depth: int) -> GridTransformer:
        """Makes a transformer without a parent: it becomes a part of the module that gets it."""
        return GridTransformer(depth, self.heads, self.remat, self.unroll, self.dtype, parent=None)

    def encode(self, images: jax.Array) -> jax.Array:
        """Turns images (B, H·p, W·p, c) in [−1, 1] into hidden states (B, L, D) in `dtype`."""
        return self.encoder(images)

    def decode(self, x: jax.Array) -> jax.Array:
        """Turns hidden states (B, H, W, D) into images (B, H·p, W·p, c), float32, not clipped."""
        return self.decoder(x)
