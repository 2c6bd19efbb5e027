"""A backbone of convolutions with one attention on the grid (`docs/method.md`, "Backbone").

It has the hybrid's stages. In the place of its transformers stands what the autoencoder of latent
diffusion has at its lowest resolution: a residual block, attention, a residual block (Rombach et
al. 2022, arXiv 2112.10752).

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     c  image channels
  p  pixels per token along each axis
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models.attention import attend
from sphere_ar_jax.models.backbones.convolutional import Decoder, Encoder, GroupNorm, ResBlock
from sphere_ar_jax.models.convolutions import torch_init


class GridAttention(nn.Module):
    """Computes x + W·softmax(q·kᵀ/√D)·v over all positions of the grid, with one head.

    q, k and v are linear in GroupNorm(x). No linear map has a bias, and positions are not encoded:
    the convolutions around tell them apart at the edges.

    Attributes:
      dtype: dtype of the computation; parameters and the softmax are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, D) → (B, H, W, D) in `dtype`."""
        B, H, W, D = x.shape

        def linear(name: str, x: jax.Array) -> jax.Array:
            dense = nn.Dense(
                D, use_bias=False, kernel_init=torch_init(), dtype=self.dtype, name=name
            )
            return dense(x)

        normal = GroupNorm(self.dtype, name='norm')(x).reshape(B, H * W, D)
        q = linear('q', normal)[:, :, None]
        k = linear('k', normal)[:, :, None]
        v = linear('v', normal)[:, :, None]
        out = attend(q, k, v, causal=False)[:, :, 0]
        return x + linear('proj', out).reshape(B, H, W, D)


class Middle(nn.Module):
    """The network on the grid: a residual block, attention, a residual block.

    Attributes:
      dtype: dtype of the computation; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, D) → (B, H, W, D) in `dtype`."""
        x = ResBlock(self.dtype, name='block1')(x)
        x = GridAttention(self.dtype, name='attention')(x)
        return ResBlock(self.dtype, name='block2')(x)


class CNN(nn.Module):
    """The hybrid's convolutions without its transformers, and `Middle` in their place.

    The defaults have about as many parameters as the published hybrid.

    Attributes:
      image_channels: c.
      stem: output channels of the encoder's first convolution.
      channels: channels stage by stage. The last number is the width D.
      dtype: dtype of the computation; parameters are float32.
    """

    image_channels: int = 3
    stem: int = 64
    channels: tuple[int, ...] = (64, 64, 128, 384, 768)
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        channels = tuple(self.channels)
        middle = functools.partial(Middle, self.dtype, name='middle')
        self.encoder = Encoder(channels, self.stem, middle, self.dtype)
        self.decoder = Decoder(channels, self.image_channels, middle, self.dtype)

    @property
    def patch_size(self) -> int:
        """Pixels per token along each axis, p."""
        return 2 ** (len(self.channels) - 1)

    @property
    def width(self) -> int:
        """Width D of the hidden states."""
        return self.channels[-1]

    def encode(self, images: jax.Array) -> jax.Array:
        """Turns images (B, H·p, W·p, c) in [−1, 1] into hidden states (B, L, D) in `dtype`."""
        return self.encoder(images)

    def decode(self, x: jax.Array) -> jax.Array:
        """Turns hidden states (B, H, W, D) into images (B, H·p, W·p, c), float32, not clipped."""
        return self.decoder(x)
