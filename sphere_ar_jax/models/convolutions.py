"""The S-VAE's convolutions, with backward passes that XLA is quick at.

XLA's own gradients are right but slow on CPUs: those of a kernel take 3 to 60 times as long as the
forward pass (BUILD_NOTES.md, "Speed").

Dimensions:
  B  images    H, W  pixels    k  size of a kernel (k, k, in, out)    s  stride
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.models import kernels

NHWC = ('NHWC', 'HWIO', 'NHWC')
_LARGE = 1024  # pixels; below, XLA's own gradient of a kernel is as quick
_PATCHES = 1_250_000  # numbers in a piece of `_kernel_gradient`'s patches: 5 MB, for a CPU's cache


def torch_init(transposed: bool = False) -> Callable:
    """PyTorch's default for linear layers and convolutions: uniform ±1/√fan_in.

    PyTorch counts the fan-in of a transposed convolution on its output channels, and so does this.
    """

    def init(key, shape, dtype=jnp.float32):
        channels = shape[-1] if transposed else shape[-2]
        bound = (math.prod(shape[:-2]) * channels) ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def conv3(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolve with a kernel of 3 × 3 and a padding of 1.

    (B, H, W, in) → (B, H/s, W/s, out), s = 1 or 2.
    """
    return _conv3(stride)(x, kernel)


def _plain(x, kernel, stride):
    padding = ((1, 1), (1, 1))
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


@functools.cache
def _conv3(stride):
    """`conv3` of one stride, as a function of x and the kernel."""
    plain = functools.partial(_plain, stride=stride)

    def xla(x, g):
        """XLA's gradient of the kernel, which `plain` is linear in."""
        shape = (3, 3, x.shape[-1], g.shape[-1])
        example = jax.ShapeDtypeStruct(shape, x.dtype)
        (gradient,) = jax.linear_transpose(functools.partial(plain, x), example)(g)
        return gradient

    def patches(x, g):
        return _kernel_gradient(x, g, stride).astype(x.dtype)

    by_platform = functools.partial(jax.lax.platform_dependent, cpu=patches, default=xla)

    def backward(arrays, g):
        x, kernel = arrays
        of_kernel = xla if g.shape[1] * g.shape[2] < _LARGE else by_platform
        dkernel = of_kernel(x, g)
        (dx,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(g)
        return dx, dkernel

    return kernels.fast(plain, backward)


def _kernel_gradient(x, g, stride):
    """The gradient (3, 3, in, out), float32, of `conv3`'s kernel for a gradient g of its result.

    It is a sum of products with patches of x, or of g where that has fewer channels, made for a few
    rows of pixels at a time.
    """
    if stride == 1 and g.shape[-1] < x.shape[-1]:
        return _kernel_gradient(g, x, 1)[::-1, ::-1].swapaxes(2, 3)
    B, _, _, features = x.shape
    _, h, w, channels = g.shape
    divisors = [r for r in range(1, h + 1) if h % r == 0]
    rows = max(r for r in divisors if r == 1 or B * r * w * 9 * features <= _PATCHES)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def tap(part, i, j):
        """The pixels of x that entry (i, j) of the kernel meets."""
        return part[:, i : i + stride * rows : stride, j : j + stride * w : stride]

    def add(total, row):
        part = jax.lax.dynamic_slice_in_dim(padded, stride * row, stride * rows + 2, axis=1)
        taps = [tap(part, i, j) for i in range(3) for j in range(3)]
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, 9 * features)
        part = jax.lax.dynamic_slice_in_dim(g, row, rows, axis=1).reshape(-1, channels)
        return total + jnp.matmul(part.T, patches, preferred_element_type=jnp.float32), None

    total = jnp.zeros((channels, 9 * features))
    total, _ = jax.lax.scan(add, total, jnp.arange(0, h, rows))
    return total.reshape(channels, 3, 3, features).transpose(1, 2, 3, 0)


def patchify(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve with a kernel of 2 × 2 and a stride of 2, as one product.

    (B, H, W, in) → (B, H/2, W/2, out).
    """
    B, H, W, features = x.shape
    patches = x.reshape(B, H // 2, 2, W // 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    y = patches.reshape(-1, 4 * features) @ kernel.reshape(4 * features, -1)
    return y.reshape(B, H // 2, W // 2, -1)


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution of stride 2, PyTorch's with padding k/2 − 1.

    It is computed as a plain convolution to the 2 × 2 pixels at each input pixel, and interleaved:
    no zeros of a dilated input are multiplied.

    Args:
      x: (B, H, W, in).
      kernel: (k, k, in, out), k = 2 or 4, PyTorch's flipped in space.
    Returns:
      (B, 2H, 2W, out).
    """
    return _conv_transpose(x, kernel)


def _interleaved(x, kernel):
    """`conv_transpose`, with the gradients that JAX makes of it."""
    B, H, W, features = x.shape
    k, _, _, channels = kernel.shape
    half = k // 2
    if k == 2:
        kernel = kernel[::-1, ::-1]  # kernel axis = phase
    # An axis of a kernel of 4 is 2·tap + phase: output pixel 2i + phase sees input pixels
    # i + phase − 1 + tap.
    taps = kernel.reshape(half, 2, half, 2, features, channels).transpose(0, 2, 4, 1, 3, 5)
    taps = taps.reshape(half, half, features, -1)
    padding = ((half - 1, half - 1),) * 2
    phases = jax.lax.conv_general_dilated(x, taps, (1, 1), padding, dimension_numbers=NHWC)

    def part(a, b):
        """Phase (a, b) of every pixel, (B, H, W, out)."""
        phase = 2 * a + b
        return phases[:, a : a + H, b : b + W, phase * channels : (phase + 1) * channels]

    if k == 4:  # the four phases of a pixel lie at neighbours of each other
        phases = jnp.concatenate([part(a, b) for a in range(2) for b in range(2)], axis=-1)
    phases = phases.reshape(B, H, W, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return phases.reshape(B, 2 * H, 2 * W, channels)


def _conv_transpose_backward(arrays, g):
    """Gradients of x, by a convolution, and of the kernel, by a large product for each entry."""
    x, kernel = arrays
    B, H, W, _ = x.shape
    k = len(kernel)
    half = k // 2
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    padding = ((half - 1, half - 1),) * 2
    dx = jax.lax.conv_general_dilated(g, turned, (2, 2), padding, dimension_numbers=NHWC)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    g = g.reshape(B, H, 2, W, 2, -1)

    def place(i):
        """Where entry i of a kernel's axis takes from: phase of g, first pixel of the padded x."""
        if k == 2:
            return 1 - i, 0
        tap, phase = divmod(i, 2)
        return phase, phase + tap

    def product(i, j):
        a, top = place(i)
        b, left = place(j)
        shifted = padded[:, top : top + H, left : left + W]
        pixels = (0, 1, 2)
        dimensions = ((pixels, pixels), ((), ()))
        phase = g[:, :, a, :, b]
        return jax.lax.dot_general(shifted, phase, dimensions, preferred_element_type=jnp.float32)

    dkernel = jnp.stack([jnp.stack([product(i, j) for j in range(k)]) for i in range(k)])
    return dx, dkernel.astype(kernel.dtype)


_conv_transpose = kernels.fast(_interleaved, _conv_transpose_backward)


class Conv(nn.Module):
    """`conv3`, or `patchify` for a kernel of 2, with the kernel as a parameter."""

    channels: int
    kernel: int = 3
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param('kernel', torch_init(), shape)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return patchify(x, kernel) if self.kernel == 2 else conv3(x, kernel, self.stride)


class ConvTranspose(nn.Module):
    """`conv_transpose` with its kernel, of size 4 or 2, as a parameter.

    (B, H, W, in) → (B, 2H, 2W, out).
    """

    channels: int
    kernel: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param('kernel', torch_init(transposed=True), shape)
        return conv_transpose(*nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype))
