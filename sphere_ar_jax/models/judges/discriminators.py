"""Discriminators for the tokenizer's adversarial loss, and that loss.

The discriminators are PatchGAN, and that of StyleGAN2 as MaskGIT has it. See `docs/method.md`,
"Adversarial training".

Dimensions:
  B  images of the batch     H, W  pixels     c  image channels
Images are (B, H, W, c), float in [−1, 1]. Logits are float32. The higher a logit, the more an image
is taken for real.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models.convolutions import torch_bias_init, torch_init
from sphere_ar_jax.runtime.console import UserError, pick

EPS = 1e-5  # PyTorch's default for BatchNorm
SLOPE = 0.2
_TORCH_INIT = torch_init()
_NORMAL_INIT = nn.initializers.normal(0.02)


def leaky(x: jax.Array) -> jax.Array:
    """Applies the leaky ReLU of slope 0.2."""
    return nn.leaky_relu(x, negative_slope=SLOPE)


def _conv(
    x: jax.Array,
    channels: int,
    kernel: int,
    stride: int,
    dtype: DTypeLike,
    name: str,
    kernel_init: Callable[..., jax.Array] = _TORCH_INIT,
    use_bias: bool = True,
) -> jax.Array:
    """Applies a convolution k × k to x, padded by 1 (a 1×1 by 0).

    Its initialisation is PyTorch's default unless `kernel_init` says otherwise.
    """
    layer = nn.Conv(
        channels,
        (kernel, kernel),
        strides=stride,
        padding=int(kernel > 1),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        bias_init=torch_bias_init(kernel**2 * x.shape[-1]),
        name=name,
    )
    return layer(x)


def _dense(x: jax.Array, features: int, dtype: DTypeLike, name: str) -> jax.Array:
    """Applies a linear layer to x, initialised by PyTorch's default."""
    layer = nn.Dense(
        features,
        dtype=dtype,
        kernel_init=_TORCH_INIT,
        bias_init=torch_bias_init(x.shape[-1]),
        name=name,
    )
    return layer(x)


class BatchNorm(nn.Module):
    """Computes (x − mean)·scale/√(var + 1e-5) + bias over B, H and W, in float32.

    Mean and (biased) variance are those of the whole batch, also where it is split over devices.
    There are no running statistics, since a discriminator is used in training only.

    Attributes:
      dtype: dtype of the result.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x (B, H, W, c) → (B, H, W, c) in `dtype`."""

        def scale_init(key: jax.Array, shape: Sequence[int]) -> jax.Array:
            return 1 + 0.02 * jax.random.normal(key, shape)

        shape = x.shape[-1:]
        scale = self.param('scale', scale_init, shape)[None, None, None]
        bias = self.param('bias', nn.initializers.zeros, shape)[None, None, None]
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        var = jnp.mean(jnp.square(centred), axis=(0, 1, 2), keepdims=True)
        return (centred * (scale * jax.lax.rsqrt(var + EPS)) + bias).astype(self.dtype)


class PatchGAN(nn.Module):
    """Judges every patch of an image by itself. At the defaults a patch has 70×70 pixels.

    It is a conv4×4 of stride 2 with leaky ReLU, then `layers` times [conv4×4 without bias,
    BatchNorm, leaky ReLU], then a conv4×4 to one logit. The last of the `layers` has stride 1, the
    others stride 2. Channels double from layer to layer, up to 8 times `width`. Weights start as
    N(0, 0.02), scales of BatchNorm as N(1, 0.02), biases of convolutions as PyTorch's.

    The defaults have 2,765,633 parameters for c = 3. The source is Isola et al. 2017 (arXiv
    1611.07004), as in the public SphereAR code.

    Attributes:
      width: channels of the first layer.
      layers: number of layers with BatchNorm.
      dtype: dtype of the convolutions; parameters and all statistics are float32.
    """

    width: int = 64
    layers: int = 3
    dtype: DTypeLike = jnp.float32

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Checks that images (H, W, c) are large enough for one logit.

        Raises:
          UserError: they are not.
        """
        least = 3 * 2**self.layers
        H, W, _ = image_shape
        if min(H, W) < least:
            needed = f'images of at least {least}×{least} pixels'
            raise UserError(f'PatchGAN needs {needed}, not {H}×{W}')

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Judges images (B, H, W, c) → logits, (B, H/8 − 2, W/8 − 2) at the defaults."""
        x = _conv(images, self.width, 4, 2, self.dtype, 'conv0', _NORMAL_INIT)
        x = leaky(x)
        for i in range(1, self.layers + 1):
            channels = self.width * min(2**i, 8)
            stride = 2 if i < self.layers else 1
            x = _conv(x, channels, 4, stride, self.dtype, f'conv{i}', _NORMAL_INIT, use_bias=False)
            x = leaky(BatchNorm(self.dtype, name=f'norm{i}')(x))
        x = _conv(x, 1, 4, 1, self.dtype, 'conv_out', _NORMAL_INIT)
        return x[..., 0].astype(jnp.float32)


def _blur(x: jax.Array) -> jax.Array:
    """Averages 3×3 pixels with weights (1, 2, 1)/4 along each axis.

    Images are mirrored at their outermost pixels.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='reflect')
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


class Halving(nn.Module):
    """Halves the resolution by a residual block.

    It computes (conv1×1 stride 2 + [twice conv3×3 and leaky ReLU, then blur, conv3×3 stride 2])/√2.

    Attributes:
      channels: output channels.
      dtype: dtype of the convolutions; parameters are float32.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, in) → (B, H/2, W/2, channels)."""
        h = leaky(_conv(x, self.channels, 3, 1, self.dtype, 'conv1'))
        h = leaky(_conv(h, self.channels, 3, 1, self.dtype, 'conv2'))
        shortcut = _conv(x, self.channels, 1, 2, self.dtype, 'shortcut')
        h = _conv(_blur(h), self.channels, 3, 2, self.dtype, 'conv3')
        return (shortcut + h) * 0.5**0.5


def _stylegan_channels(side: int) -> int:
    """Returns the channels of `StyleGAN` where it has side × side pixels."""
    return min(512, 16384 // side)


class StyleGAN(nn.Module):
    """Judges an image as a whole.

    It is a conv3×3 with leaky ReLU, `Halving` down to 4×4 pixels, and then conv3×3, leaky ReLU,
    linear, leaky ReLU, linear. As published, it has no minibatch-deviation layer and no equalised
    learning rates. Its initialisation is PyTorch's.

    It has 36,500,225 parameters for 256×256 pixels. The source is the residual discriminator of
    Karras et al. 2020 (arXiv 1912.04958), as in the public SphereAR code.

    Attributes:
      dtype: dtype of convolutions and products; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Checks that images (H, W, c) are squares of a power of two from 8 to 1024.

        Raises:
          UserError: they are not.
        """
        H, W, _ = image_shape
        if H != W or H not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise UserError(f'stylegan judges squares of 8, 16, 32, … 1024 pixels, not {H}×{W}')

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Judges images (B, H, H, c) → logits (B,)."""
        side = images.shape[1]
        x = leaky(_conv(images, _stylegan_channels(side), 3, 1, self.dtype, 'conv_in'))
        while side > 4:
            side //= 2
            x = Halving(_stylegan_channels(side), self.dtype, name=f'down{side}')(x)
        x = leaky(_conv(x, 512, 3, 1, self.dtype, 'conv_out'))
        x = x.reshape(len(x), -1)
        x = leaky(_dense(x, 512, self.dtype, 'dense1'))
        return _dense(x, 1, self.dtype, 'dense2')[:, 0].astype(jnp.float32)


KINDS = {'patchgan': PatchGAN, 'stylegan': StyleGAN}


def build(
    name: str, image_shape: tuple[int, int, int], dtype: DTypeLike = jnp.float32
) -> PatchGAN | StyleGAN:
    """Makes a published discriminator.

    Args:
      name: a key of `KINDS`.
      image_shape: (H, W, c) of the images.
      dtype: dtype of the computation.

    Returns:
      The Flax module.

    Raises:
      UserError: no discriminator has that name, or it cannot judge such images. The message is one
        line.
    """
    discriminator = pick(KINDS, 'discriminator', name)(dtype=dtype)
    discriminator.check(image_shape)
    return discriminator


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Computes a discriminator's ½ mean max(0, 1 − real) + ½ mean max(0, 1 + fake).

    Args:
      real: logits of real images, of any shape.
      fake: logits of generated images, of any shape.

    Returns:
      () float32.
    """
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def logistic_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Computes a discriminator's −½ mean log σ(real) − ½ mean log(1 − σ(fake)).

    Args:
      real: logits of real images, of any shape.
      fake: logits of generated images, of any shape.

    Returns:
      () float32.
    """
    return (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))) / 2


def _linear_generator_loss(fake: jax.Array) -> jax.Array:
    """Computes a generator's −mean fake."""
    return -jnp.mean(fake)


def _logistic_generator_loss(fake: jax.Array) -> jax.Array:
    """Computes a generator's −mean log σ(fake)."""
    return jnp.mean(jax.nn.softplus(-fake))


DiscriminatorLoss = Callable[[jax.Array, jax.Array], jax.Array]
GeneratorLoss = Callable[[jax.Array], jax.Array]
# Name → (the discriminator's loss from its logits of real and of generated images, the generator's
# loss from the logits of its images). The public code's non-saturating losses have logits and
# targets swapped. Set right, its discriminator's loss is the vanilla one. In the vanilla and the
# hinge losses of the public code the generator raises the logits themselves.
ADVERSARIAL: dict[str, tuple[DiscriminatorLoss, GeneratorLoss]] = {
    'hinge': (hinge_loss, _linear_generator_loss),
    'vanilla': (logistic_loss, _linear_generator_loss),
    'non_saturating': (logistic_loss, _logistic_generator_loss),
}
