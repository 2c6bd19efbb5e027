"""Discriminators for the tokenizer's adversarial loss: PatchGAN, and the one of StyleGAN2 as
MaskGIT has it.

Dimensions:
  B  images of the batch     H, W  pixels     c  image channels
Images are (B, H, W, c), float in [−1, 1]. Logits are float32, the higher the more an image is taken
for real.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.models.convolutions import torch_init
from sphere_ar_jax.runtime.console import UserError, pick

EPS = 1e-5  # of PyTorch's BatchNorm
SLOPE = 0.2


leaky = functools.partial(nn.leaky_relu, negative_slope=SLOPE)


def _bias_init(fan_in):
    return lambda key, shape, dtype: jax.random.uniform(
        key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5
    )


def _conv(x, channels, kernel, stride, dtype, name, **options):
    """A layer k×k, padded by 1 (a 1×1 by 0), with PyTorch's default initialisation unless told
    otherwise, on x.
    """
    options = (
        dict(kernel_init=torch_init(), bias_init=_bias_init(kernel**2 * x.shape[-1])) | options
    )
    return nn.Conv(
        channels, (kernel, kernel), stride, int(kernel > 1), dtype=dtype, name=name, **options
    )(x)


def _dense(x, features, dtype, name):
    options = dict(kernel_init=torch_init(), bias_init=_bias_init(x.shape[-1]))
    return nn.Dense(features, dtype=dtype, name=name, **options)(x)


class BatchNorm(nn.Module):
    """(x − mean)·scale/√(var + 1e-5) + bias over B, H and W, computed in float32. (B, H, W, c) →
    the same in `dtype`.

    Mean and variance (biased) are those of the whole batch, also of one that is split over devices.
    There are no running statistics: a discriminator judges in training alone.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def scale_init(key, shape):
            return 1 + 0.02 * jax.random.normal(key, shape)

        shape = x.shape[-1:]
        scale = self.param('scale', scale_init, shape)[None, None, None]
        bias = self.param('bias', nn.initializers.zeros, shape)[None, None, None]
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        var = jnp.mean(jnp.square(centred), axis=(0, 1, 2), keepdims=True)
        return (centred * (scale * jax.lax.rsqrt(var + EPS)) + bias).astype(self.dtype)


class PatchGAN(nn.Module):
    """Judges every patch of an image (70×70 pixels at the defaults) by itself. 2,765,633 parameters
    for c = 3.

    conv4×4 stride 2, leaky ReLU; then `layers` times [conv4×4 without bias, BatchNorm, leaky ReLU],
    the last of stride 1, the others of 2; then conv4×4 to one logit. Channels double from layer to
    layer up to 8 times `width`. Weights start as N(0, 0.02), scales of BatchNorm as N(1, 0.02),
    biases of convolutions as PyTorch's.

    Attributes:
      width: channels of the first layer. layers: with BatchNorm. dtype: of the convolutions;
        parameters and all
      statistics are float32.
    Source: Isola et al. 2017 (arXiv 1611.07004), as in the public SphereAR code.
    """

    width: int = 64
    layers: int = 3
    dtype: Any = jnp.float32

    def check(self, image_shape):
        """Raises UserError where images (H, W, c) are too small for one logit."""
        least = 3 * 2**self.layers
        if min(image_shape[:2]) < least:
            H, W, _ = image_shape
            raise UserError(
                f'PatchGAN needs images of at least {least}×{least} pixels, not {H}×{W}'
            )

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (B, H, W, c) → logits (B, H/8 − 2, W/8 − 2) at the defaults."""

        conv = lambda *args, **options: _conv(
            *args, kernel_init=nn.initializers.normal(0.02), **options
        )
        x = leaky(conv(images, self.width, 4, 2, self.dtype, 'conv0'))
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            x = conv(
                x, self.width * min(2**i, 8), 4, stride, self.dtype, f'conv{i}', use_bias=False
            )
            x = leaky(BatchNorm(self.dtype, name=f'norm{i}')(x))
        return conv(x, 1, 4, 1, self.dtype, 'conv_out')[..., 0].astype(jnp.float32)


def _blur(x):
    """Means of 3×3 pixels with weights (1, 2, 1)/4 along each axis; images are mirrored at their
    outermost pixels.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='reflect')
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


class Halving(nn.Module):
    """Halves the resolution: (conv1×1 stride 2 + [twice conv3×3 and leaky ReLU, then blur, conv3×3
    stride 2])/√2.
    """

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = lambda x, kernel, stride, name: _conv(
            x, self.channels, kernel, stride, self.dtype, name
        )
        h = leaky(conv(x, 3, 1, 'conv1'))
        h = leaky(conv(h, 3, 1, 'conv2'))
        return (conv(x, 1, 2, 'shortcut') + conv(_blur(h), 3, 2, 'conv3')) * 0.5**0.5


class StyleGAN(nn.Module):
    """Judges an image as a whole. 36,500,225 parameters for 256×256 pixels.

    conv3×3, leaky ReLU; `Halving` down to 4×4 pixels; conv3×3, leaky ReLU, linear, leaky ReLU,
    linear. As published without a minibatch-deviation layer and without equalised learning rates.
    Initialisation: PyTorch's.

    Attributes:
      dtype: of convolutions and products; parameters are float32.
    Source: the residual discriminator of Karras et al. 2020 (arXiv 1912.04958), as in the public
    SphereAR code.
    """

    dtype: Any = jnp.float32

    def check(self, image_shape):
        """Raises UserError for images (H, W, c) that are no squares of a power of two from 8 to
        1024.
        """
        H, W, _ = image_shape
        if H != W or H not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise UserError(f'stylegan judges squares of 8, 16, 32, … 1024 pixels, not {H}×{W}')

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (B, H, H, c) → logits (B,)."""
        channels = lambda side: min(512, 16384 // side)
        side = images.shape[1]
        x = leaky(_conv(images, channels(side), 3, 1, self.dtype, 'conv_in'))
        while side > 4:
            side //= 2
            x = Halving(channels(side), self.dtype, name=f'down{side}')(x)
        x = leaky(_conv(x, 512, 3, 1, self.dtype, 'conv_out')).reshape(len(x), -1)
        x = leaky(_dense(x, 512, self.dtype, 'dense1'))
        return _dense(x, 1, self.dtype, 'dense2')[:, 0].astype(jnp.float32)


KINDS = {'patchgan': PatchGAN, 'stylegan': StyleGAN}


def build(name, image_shape, dtype=jnp.float32):
    """The published discriminator of that name for images (H, W, c).

    Raises UserError, one line, for another name than those of `KINDS` and for images it cannot
    judge.
    """
    discriminator = pick(KINDS, 'discriminator', name)(dtype=dtype)
    discriminator.check(image_shape)
    return discriminator


def hinge_loss(real, fake):
    """A discriminator's ½ mean max(0, 1 − real) + ½ mean max(0, 1 + fake), of its logits, any
    shapes. () float32.
    """
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def logistic_loss(real, fake):
    """A discriminator's −½ mean log σ(real) − ½ mean log(1 − σ(fake)), of its logits, any shapes.
    () float32.
    """
    return (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))) / 2


# Name: the discriminator's loss of its logits of (real, fake) images, and the generator's of those
# of its own images. The public code's non-saturating losses have logits and targets swapped. Set
# right, its discriminator's is the vanilla one; with that and with hinge its generator raises the
# logits themselves.
ADVERSARIAL = {
    'hinge': (hinge_loss, lambda fake: -jnp.mean(fake)),
    'vanilla': (logistic_loss, lambda fake: -jnp.mean(fake)),
    'non_saturating': (logistic_loss, lambda fake: jnp.mean(jax.nn.softplus(-fake))),
}
