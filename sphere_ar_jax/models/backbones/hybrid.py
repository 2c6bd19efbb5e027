"""The hybrid CNN–ViT of the published tokenizer.

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     p  pixels per token     c  image channels
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.backbones import cnn
from sphere_ar_jax.models.backbones.vit import ViT
from sphere_ar_jax.models.convolutions import Conv, torch_init


class Encoder(nn.Module):
    """Images (B, H·p, W·p, c) → hidden states (B, L, D)."""

    channels: tuple
    stem: int
    vit: ViT
    dtype: Any

    @nn.compact
    def __call__(self, images):
        x = Conv(self.stem, dtype=self.dtype, name='conv_in')(images.astype(self.dtype))
        for i, channels in enumerate(self.channels[1:]):
            x = cnn.ResDown(channels, self.dtype, name=f'down{i}')(x)
        x = self.vit(x)
        x = transformer.RMSNorm(self.dtype, name='norm')(x.reshape(x.shape[0], -1, x.shape[-1]))
        return nn.Dense(
            x.shape[-1], use_bias=False, kernel_init=torch_init(), dtype=self.dtype, name='output'
        )(x)


class Decoder(nn.Module):
    """Hidden states on the grid (B, H, W, D) → images (B, H·p, W·p, c), float32, unclipped."""

    channels: tuple
    image_channels: int
    vit: ViT
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = Conv(x.shape[-1], dtype=self.dtype, name='conv_in')(x)
        x = self.vit(x)
        for i, channels in enumerate(self.channels[-2::-1]):
            x = cnn.ResUp(channels, self.dtype, name=f'up{i}')(x)
        x = cnn.NormSiLU(self.dtype, name='norm_out')(x)
        return Conv(self.image_channels, dtype=self.dtype, name='conv_out')(x).astype(jnp.float32)


class Hybrid(nn.Module):
    """The published backbone: convolutions down to the token grid, a ViT there; in the decoder the
    same, backwards.

    Attributes:
      image_channels: c. stem: output channels of the encoder's first convolution (channels[0] in
        the published model).
      channels: of the CNN, stage by stage; the last one is the width D of both ViTs. encoder_depth,
        decoder_depth:
      blocks of the ViTs. heads: of both ViTs; D/heads must be a multiple of 4 for the 2-D RoPE.
        remat, unroll: see
      `transformer.Stack`. dtype: of the computation; parameters are float32.
    """

    image_channels: int = 3
    stem: int = 64
    channels: tuple = (64, 64, 128, 256, 512)
    encoder_depth: int = 6
    decoder_depth: int = 12
    heads: int = 8
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32

    def setup(self):
        channels = tuple(self.channels)
        self.encoder = Encoder(channels, self.stem, self._vit(self.encoder_depth), self.dtype)
        self.decoder = Decoder(
            channels, self.image_channels, self._vit(self.decoder_depth), self.dtype
        )

    def _vit(self, depth):
        """A ViT that becomes a part of the module which is given it."""
        return ViT(depth, self.heads, self.remat, self.unroll, self.dtype, parent=None)

    @property
    def patch_size(self) -> int:
        """Pixels per token along each axis, p."""
        return 2 ** (len(self.channels) - 1)

    @property
    def width(self) -> int:
        """Width D of the hidden states."""
        return self.channels[-1]

    def encode(self, images: jax.Array) -> jax.Array:
        """Images (B, H·p, W·p, c) in [−1, 1] → hidden states (B, L, D) in `dtype`."""
        return self.encoder(images)

    def decode(self, x: jax.Array) -> jax.Array:
        """Hidden states (B, H, W, D) → images (B, H·p, W·p, c), float32, not clipped."""
        return self.decoder(x)
