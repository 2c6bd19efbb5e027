"""Convolutional stages of the tokenizer: halving and doubling the resolution."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.convolutions import Conv, ConvTranspose


class NormSiLU(nn.Module):
    """GroupNorm over min(32, channels//4) groups, in float32, then SiLU. (B, H, W, c) → the same in
    `dtype`.

    As one affine map per image and channel, a·(x − mean) + bias, after the two passes that mean and
    variance need.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (channels,))
        bias = self.param('bias', nn.initializers.zeros, (channels,))
        groups = min(32, channels // 4)
        x = x.astype(jnp.float32)

        def mean(x):
            """Over pixels and the channels of a group, given to each of its channels: (B, H, W, c)
            → (B, 1, 1, c).
            """
            per_channel = jnp.mean(x, axis=(1, 2)).reshape(len(x), groups, -1)
            return jnp.repeat(jnp.mean(per_channel, axis=-1), channels // groups, axis=-1)[
                :, None, None
            ]

        center = mean(x)
        a = scale[None, None, None] * jax.lax.rsqrt(mean(jnp.square(x - center)) + transformer.EPS)
        return nn.silu(a * (x - center) + bias[None, None, None]).astype(self.dtype)


class ResDown(nn.Module):
    """Halves the resolution: conv2×2 stride 2 + [GN, SiLU, conv3×3 stride 2, GN, SiLU, conv3×3]."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = NormSiLU(self.dtype, name='norm1')(x)
        h = Conv(self.channels, stride=2, dtype=self.dtype, name='conv1')(h)
        h = Conv(self.channels, dtype=self.dtype, name='conv2')(
            NormSiLU(self.dtype, name='norm2')(h)
        )
        return Conv(self.channels, kernel=2, dtype=self.dtype, name='shortcut')(x) + h


class ResUp(nn.Module):
    """Doubles the resolution: transposed conv2×2 + [GN, SiLU, transposed conv4×4, GN, SiLU,
    conv3×3], then x + [GN, SiLU, conv3×3, GN, SiLU, conv3×3](x).
    """

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = ConvTranspose(self.channels, 4, self.dtype, name='conv1')(
            NormSiLU(self.dtype, name='norm1')(x)
        )
        h = Conv(self.channels, dtype=self.dtype, name='conv2')(
            NormSiLU(self.dtype, name='norm2')(h)
        )
        x = ConvTranspose(self.channels, 2, self.dtype, name='shortcut')(x) + h
        h = Conv(self.channels, dtype=self.dtype, name='conv3')(
            NormSiLU(self.dtype, name='norm3')(x)
        )
        h = Conv(self.channels, dtype=self.dtype, name='conv4')(
            NormSiLU(self.dtype, name='norm4')(h)
        )
        return x + h
