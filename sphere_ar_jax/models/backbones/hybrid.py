"""The hybrid CNN–ViT of the published tokenizer.

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     p  pixels per token     c  image channels
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.backbones import cnn, vit
from sphere_ar_jax.models.convolutions import Conv, torch_init


class Encoder(nn.Module):
    """Images (B, H·p, W·p, c) → hidden states (B, L, D)."""

    channels: tuple
    stem: int
    depth: int
    heads: int
    remat: bool
    unroll: int
    dtype: Any

    @nn.compact
    def __call__(self, images):
        x = Conv(self.stem, dtype=self.dtype, name='conv_in')(images.astype(self.dtype))
        for i, channels in enumerate(self.channels[1:]):
            x = cnn.ResDown(channels, self.dtype, name=f'down{i}')(x)
        x = vit.ViT(self.depth, self.heads, self.remat, self.unroll, self.dtype, name='vit')(x)
        x = transformer.RMSNorm(self.dtype, name='norm')(x.reshape(x.shape[0], -1, x.shape[-1]))
        return nn.Dense(x.shape[-1], use_bias=False, kernel_init=torch_init(), dtype=self.dtype, name='output')(x)


class Decoder(nn.Module):
    """Hidden states on the grid (B, H, W, D) → images (B, H·p, W·p, c), float32, unclipped."""

    channels: tuple
    image_channels: int
    depth: int
    heads: int
    remat: bool
    unroll: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = Conv(x.shape[-1], dtype=self.dtype, name='conv_in')(x)
        x = vit.ViT(self.depth, self.heads, self.remat, self.unroll, self.dtype, name='vit')(x)
        for i, channels in enumerate(self.channels[-2::-1]):
            x = cnn.ResUp(channels, self.dtype, name=f'up{i}')(x)
        x = cnn.NormSiLU(self.dtype, name='norm_out')(x)
        return Conv(self.image_channels, dtype=self.dtype, name='conv_out')(x).astype(jnp.float32)
