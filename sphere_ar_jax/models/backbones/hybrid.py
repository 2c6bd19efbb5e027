"""The hybrid CNN–ViT of the published tokenizer (`docs/method.md`, "Backbone" and "Decoder").

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     c  image channels
  p  pixels per token along each axis
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models.backbones.convolutional import Decoder, Encoder
from sphere_ar_jax.models.backbones.grid_transformer import GridTransformer


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
        encoder_vit = self._vit(self.encoder_depth)
        decoder_vit = self._vit(self.decoder_depth)
        self.encoder = Encoder(channels, self.stem, encoder_vit, self.dtype)
        self.decoder = Decoder(channels, self.image_channels, decoder_vit, self.dtype)

    def _vit(self, depth: int) -> Callable[[], GridTransformer]:
        """Returns what makes a ViT inside of the module that calls it."""
        return functools.partial(
            GridTransformer, depth, self.heads, self.remat, self.unroll, self.dtype, name='vit'
        )

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
