"""The hybrid CNN–ViT of the published tokenizer (`docs/method.md`, "Backbone" and "Decoder").

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     c  image channels
  p  pixels per token along each axis
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.backbones import cnn
from sphere_ar_jax.models.backbones.vit import ViT
from sphere_ar_jax.models.convolutions import Conv, torch_init


class Encoder(nn.Module):
    """The network from images to hidden states.

    Attributes:
      channels: see `Hybrid`.
      stem: see `Hybrid`.
      vit: the transformer on the token grid.
      dtype: dtype of the computation; parameters are float32.
    """

    channels: tuple[int, ...]
    stem: int
    vit: ViT
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Turns images (B, H·p, W·p, c) into hidden states (B, L, D) in `dtype`."""
        x = Conv(self.stem, dtype=self.dtype, name='conv_in')(images.astype(self.dtype))
        for i, channels in enumerate(self.channels[1:]):
            x = cnn.ResDown(channels, self.dtype, name=f'down{i}')(x)
        x = self.vit(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = transformer.RMSNorm(self.dtype, name='norm')(x)
        output = nn.Dense(
            x.shape[-1], use_bias=False, kernel_init=torch_init(), dtype=self.dtype, name='output'
        )
        return output(x)


class Decoder(nn.Module):
    """The network from hidden states on the grid to images.

    Attributes:
      channels: see `Hybrid`.
      image_channels: c.
      vit: the transformer on the token grid.
      dtype: dtype of the computation; parameters are float32.
    """

    channels: tuple[int, ...]
    image_channels: int
    vit: ViT
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Turns hidden states (B, H, W, D) into images (B, H·p, W·p, c), float32, not clipped."""
        x = Conv(x.shape[-1], dtype=self.dtype, name='conv_in')(x)
        x = self.vit(x)
        for i, channels in enumerate(self.channels[-2::-1]):
            x = cnn.ResUp(channels, self.dtype, name=f'up{i}')(x)
        x = cnn.NormSiLU(self.dtype, name='norm_out')(x)
        return Conv(self.image_channels, dtype=self.dtype, name='conv_out')(x).astype(jnp.float32)


class Hybrid(nn.Module):
    """The published backbone: convolutions down to the token grid, and a ViT there.

    The decoder is another ViT, and convolutions up to the pixels. The defaults are those of the
    published model.

    Attributes:
      image_channels: c.
      stem: output channels of the encoder's first convolution, channels[0] in the published model.
      channels: channels of the CNN, stage by stage. The last number is the width D of both ViTs.
      encoder_depth: blocks of the encoder's ViT.
      decoder_depth: blocks of the decoder's ViT.
      heads: heads of both ViTs; D/heads must be a multiple of 4 for the 2-D RoPE.
      remat: see `transformer.Stack`.
      unroll: see `transformer.Stack`.
      dtype: dtype of the computation; parameters are float32.
    """

    image_channels: int = 3
    stem: int = 64
    channels: tuple[int, ...] = (64, 64, 128, 256, 512)
    encoder_depth: int = 6
    decoder_depth: int = 12
    heads: int = 8
    remat: bool = False
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        channels = tuple(self.channels)
        self.encoder = Encoder(channels, self.stem, self._vit(self.encoder_depth), self.dtype)
        self.decoder = Decoder(
            channels, self.image_channels, self._vit(self.decoder_depth), self.dtype
        )

    def _vit(self, depth: int) -> ViT:
        """Makes a ViT without a parent: it becomes a part of the module to which it is given."""
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
        """Turns images (B, H·p, W·p, c) in [−1, 1] into hidden states (B, L, D) in `dtype`."""
        return self.encoder(images)

    def decode(self, x: jax.Array) -> jax.Array:
        """Turns hidden states (B, H, W, D) into images (B, H·p, W·p, c), float32, not clipped."""
        return self.decoder(x)
