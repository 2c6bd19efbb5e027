"""Convolutional stages of the tokenizer, which halve and double the resolution.

See `docs/method.md`, "Backbone" and "Decoder".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.convolutions import Conv, ConvTranspose


class NormSiLU(nn.Module):
    """GroupNorm over min(32, channels//4) groups, then SiLU, in float32.

    The statistics take two passes over x. The norm is then the affine map a·(x − mean) + bias, with
    one a and one mean for each image and channel.

    Attributes:
      dtype: dtype of the result.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, c) → (B, H, W, c) in `dtype`."""
        channels = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (channels,))
        bias = self.param('bias', nn.initializers.zeros, (channels,))
        groups = min(32, channels // 4)
        x = x.astype(jnp.float32)

        def mean(x: jax.Array) -> jax.Array:
            """Averages over pixels and the channels of a group: (B, H, W, c) → (B, 1, 1, c)."""
            per_channel = jnp.mean(x, axis=(1, 2)).reshape(len(x), groups, -1)
            per_group = jnp.mean(per_channel, axis=-1)
            return jnp.repeat(per_group, channels // groups, axis=-1)[:, None, None]

        center = mean(x)
        gain = scale[None, None, None]
        variance = mean(jnp.square(x - center))
        a = gain * jax.lax.rsqrt(variance + transformer.EPS)
        return nn.silu(a * (x - center) + bias[None, None, None]).astype(self.dtype)


class ResDown(nn.Module):
    """Halves the resolution by a residual block.

    It computes conv2×2 stride 2 (x) + [GN, SiLU, conv3×3 stride 2, GN, SiLU, conv3×3] (x).

    Attributes:
      channels: output channels.
      dtype: dtype of the convolutions; parameters are float32.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, in) → (B, H/2, W/2, channels)."""
        h = NormSiLU(self.dtype, name='norm1')(x)
        h = Conv(self.channels, stride=2, dtype=self.dtype, name='conv1')(h)
        h = NormSiLU(self.dtype, name='norm2')(h)
        h = Conv(self.channels, dtype=self.dtype, name='conv2')(h)
        return Conv(self.channels, kernel=2, dtype=self.dtype, name='shortcut')(x) + h


class ResUp(nn.Module):
    """Doubles the resolution by a residual block, followed by another one.

    The first computes x ← tconv2×2 (x) + [GN, SiLU, tconv4×4, GN, SiLU, conv3×3] (x), where "tconv"
    is a transposed convolution of stride 2. The second computes
    x ← x + [GN, SiLU, conv3×3, GN, SiLU, conv3×3] (x).

    Attributes:
      channels: output channels.
      dtype: dtype of the convolutions; parameters are float32.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, in) → (B, 2H, 2W, channels)."""
        h = NormSiLU(self.dtype, name='norm1')(x)
        h = ConvTranspose(self.channels, 4, self.dtype, name='conv1')(h)
        h = NormSiLU(self.dtype, name='norm2')(h)
        h = Conv(self.channels, dtype=self.dtype, name='conv2')(h)
        x = ConvTranspose(self.channels, 2, self.dtype, name='shortcut')(x) + h
        h = NormSiLU(self.dtype, name='norm3')(x)
        h = Conv(self.channels, dtype=self.dtype, name='conv3')(h)
        h = NormSiLU(self.dtype, name='norm4')(h)
        h = Conv(self.channels, dtype=self.dtype, name='conv4')(h)
        return x + h
