"""The convolutional networks between pixels and the token grid, shared by `Hybrid` and `CNN`.

Stages halve or double the resolution. On the grid stands a network that the backbone gives. See
`docs/method.md`, "Backbone" and "Decoder".

Dimensions:
  B  images     H, W  token grid, L = H·W     D  width     c  image channels
  p  pixels per token along each axis
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.convolutions import Conv, ConvTranspose, torch_init
from sphere_ar_jax.models.sizes import EPS


def norm_groups(channels: int) -> int:
    """Returns the number of groups that channels are normalised in, min(32, channels//4).

    Raises:
      ValueError: the channels cannot be divided so.
    """
    groups = min(32, channels // 4)
    if groups < 1 or channels % groups:
        raise ValueError(
            f'{channels} channels cannot be normalised in {groups} groups: '
            'use a multiple of 4 up to 128 or of 32'
        )
    return groups


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalises x in `norm_groups` groups of channels, in float32.

    The statistics take two passes over x. The norm is then the affine map a·(x − mean) + bias, with
    one a and one mean for each image and channel.

    Args:
      x: (B, H, W, channels).
      scale: (channels,).
      bias: (channels,).

    Returns:
      (B, H, W, channels) float32.
    """
    channels = x.shape[-1]
    groups = norm_groups(channels)
    x = x.astype(jnp.float32)

    def mean(x: jax.Array) -> jax.Array:
        """Averages over pixels and the channels of a group: (B, H, W, c) → (B, 1, 1, c)."""
        per_channel = jnp.mean(x, axis=(1, 2)).reshape(len(x), groups, -1)
        per_group = jnp.mean(per_channel, axis=-1)
        return jnp.repeat(per_group, channels // groups, axis=-1)[:, None, None]

    center = mean(x)
    gain = scale[None, None, None]
    variance = mean(jnp.square(x - center))
    a = gain * jax.lax.rsqrt(variance + EPS)
    return a * (x - center) + bias[None, None, None]


class GroupNorm(nn.Module):
    """`group_norm` with its scale and bias as parameters, and SiLU after it if asked for.

    Attributes:
      dtype: dtype of the result.
      silu: whether SiLU follows, in float32.
    """

    dtype: DTypeLike = jnp.float32
    silu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, c) → (B, H, W, c) in `dtype`."""
        channels = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (channels,))
        bias = self.param('bias', nn.initializers.zeros, (channels,))
        y = group_norm(x, scale, bias)
        return (nn.silu(y) if self.silu else y).astype(self.dtype)


class NormSiLU(GroupNorm):
    """GroupNorm, then SiLU."""

    silu: bool = True


class ResBlock(nn.Module):
    """Computes x + [GN, SiLU, conv3×3, GN, SiLU, conv3×3] (x), as the second half of `ResUp` does.

    Attributes:
      dtype: dtype of the convolutions; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, c) → (B, H, W, c)."""
        channels = x.shape[-1]
        h = NormSiLU(self.dtype, name='norm1')(x)
        h = Conv(channels, dtype=self.dtype, name='conv1')(h)
        h = NormSiLU(self.dtype, name='norm2')(h)
        h = Conv(channels, dtype=self.dtype, name='conv2')(h)
        return x + h


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


class Encoder(nn.Module):
    """The network from images to hidden states.

    Attributes:
      channels: channels stage by stage. The first number is not read, and the last one is D.
      stem: output channels of the first convolution.
      on_grid: makes the network on the token grid, (B, H, W, D) → (B, H, W, D), with its name.
      dtype: dtype of the computation; parameters are float32.
    """

    channels: tuple[int, ...]
    stem: int
    on_grid: Callable[[], nn.Module]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Turns images (B, H·p, W·p, c) into hidden states (B, L, D) in `dtype`."""
        x = Conv(self.stem, dtype=self.dtype, name='conv_in')(images.astype(self.dtype))
        for i, channels in enumerate(self.channels[1:]):
            x = ResDown(channels, self.dtype, name=f'down{i}')(x)
        x = self.on_grid()(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = transformer.RMSNorm(self.dtype, name='norm')(x)
        output = nn.Dense(
            x.shape[-1], use_bias=False, kernel_init=torch_init(), dtype=self.dtype, name='output'
        )
        return output(x)


class Decoder(nn.Module):
    """The network from hidden states on the grid to images.

    Attributes:
      channels: channels stage by stage, in the order of the encoder. The last number is D.
      image_channels: c.
      on_grid: makes the network on the token grid, (B, H, W, D) → (B, H, W, D), with its name.
      dtype: dtype of the computation; parameters are float32.
    """

    channels: tuple[int, ...]
    image_channels: int
    on_grid: Callable[[], nn.Module]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Turns hidden states (B, H, W, D) into images (B, H·p, W·p, c), float32, not clipped."""
        x = Conv(x.shape[-1], dtype=self.dtype, name='conv_in')(x)
        x = self.on_grid()(x)
        for i, channels in enumerate(self.channels[-2::-1]):
            x = ResUp(channels, self.dtype, name=f'up{i}')(x)
        x = NormSiLU(self.dtype, name='norm_out')(x)
        return Conv(self.image_channels, dtype=self.dtype, name='conv_out')(x).astype(jnp.float32)
