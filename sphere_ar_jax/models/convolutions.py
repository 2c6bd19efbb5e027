"""The S-VAE's convolutions, with backward passes that XLA compiles well.

XLA's own gradients are right but slow on CPUs: those of a kernel take 3 to 60 times as long as the
forward pass (BUILD_NOTES.md, "Speed").

Dimensions:
  B  images    H, W  pixels    k  size of a kernel (k, k, in, out)    s  stride
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models import kernels

NHWC = ('NHWC', 'HWIO', 'NHWC')
# Number of pixels below which XLA's own gradient of a kernel is as fast.
_LARGE = 1024
# Numbers in one piece of the patches of `_kernel_gradient`: 5 MB, which fit a CPU's cache.
_PATCHES = 1_250_000


def torch_init(transposed: bool = False) -> Callable[..., jax.Array]:
    """Makes PyTorch's default initializer of linear layers and convolutions: uniform ±1/√fan_in.

    Args:
      transposed: whether the layer is a transposed convolution, whose fan-in PyTorch counts on its
        output channels.

    Returns:
      An initializer (key, shape, dtype) → array, as Flax takes it.
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        channels = shape[-1] if transposed else shape[-2]
        bound = (math.prod(shape[:-2]) * channels) ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """Makes PyTorch's default initializer of biases: uniform ±1/√fan_in.

    Args:
      fan_in: inputs of each output, those of a kernel's pixels together.

    Returns:
      An initializer (key, shape, dtype) → array, as Flax takes it.
    """
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def conv3(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves with a kernel of 3 × 3 and a padding of 1.

    Args:
      x: (B, H, W, in).
      kernel: (3, 3, in, out).
      stride: s, 1 or 2.

    Returns:
      (B, H/s, W/s, out).
    """
    return _conv3(stride)(x, kernel)


def _plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    padding = ((1, 1), (1, 1))
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


@functools.cache
def _conv3(stride: int) -> Callable[..., jax.Array]:
    """Makes `conv3` of one stride, as a function of x and the kernel."""
    plain = functools.partial(_plain, stride=stride)

    def xla(x: jax.Array, g: jax.Array) -> jax.Array:
        """Computes XLA's gradient of the kernel, in which `plain` is linear."""
        shape = (3, 3, x.shape[-1], g.shape[-1])
        example = jax.ShapeDtypeStruct(shape, x.dtype)
        (gradient,) = jax.linear_transpose(functools.partial(plain, x), example)(g)
        return gradient

    def patches(x: jax.Array, g: jax.Array) -> jax.Array:
        return _kernel_gradient(x, g, stride).astype(x.dtype)

    def backward(arrays: kernels.Arrays, g: jax.Array) -> kernels.Arrays:
        x, kernel = arrays
        if g.shape[1] * g.shape[2] < _LARGE:
            dkernel = xla(x, g)
        else:
            dkernel = jax.lax.platform_dependent(x, g, cpu=patches, default=xla)
        (dx,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(g)
        return dx, dkernel

    return kernels.fast(plain, backward)


def _kernel_gradient(x: jax.Array, g: jax.Array, stride: int) -> jax.Array:
    """Computes the gradient (3, 3, in, out) float32 of the kernel of `conv3`.

    It is a sum of products with patches of the input x, or with patches of the result's gradient g
    where that has fewer channels. Patches are made for a few rows of pixels at a time.
    """
    if stride == 1 and g.shape[-1] < x.shape[-1]:
        return _kernel_gradient(g, x, 1)[::-1, ::-1].swapaxes(2, 3)
    B, _, _, features = x.shape
    _, h, w, channels = g.shape
    divisors = [r for r in range(1, h + 1) if h % r == 0]
    rows = max(r for r in divisors if r == 1 or B * r * w * 9 * features <= _PATCHES)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def tap(part: jax.Array, i: int, j: int) -> jax.Array:
        """Takes the pixels of x that entry (i, j) of the kernel meets."""
        return part[:, i : i + stride * rows : stride, j : j + stride * w : stride]

    def add(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        part = jax.lax.dynamic_slice_in_dim(padded, stride * row, stride * rows + 2, axis=1)
        taps = [tap(part, i, j) for i in range(3) for j in range(3)]
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, 9 * features)
        part = jax.lax.dynamic_slice_in_dim(g, row, rows, axis=1).reshape(-1, channels)
        return total + jnp.matmul(part.T, patches, preferred_element_type=jnp.float32), None

    total = jnp.zeros((channels, 9 * features))
    total, _ = jax.lax.scan(add, total, jnp.arange(0, h, rows))
    return total.reshape(channels, 3, 3, features).transpose(1, 2, 3, 0)


def conv2(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with a kernel of 2 × 2 and a stride of 2, as one product.

    Args:
      x: (B, H, W, in).
      kernel: (2, 2, in, out).

    Returns:
      (B, H/2, W/2, out).
    """
    B, H, W, features = x.shape
    patches = x.reshape(B, H // 2, 2, W // 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    y = patches.reshape(-1, 4 * features) @ kernel.reshape(4 * features, -1)
    return y.reshape(B, H // 2, W // 2, -1)


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes a transposed convolution of stride 2, PyTorch's with padding k/2 − 1.

    A plain convolution computes the 2 × 2 output pixels of each input pixel, which are then
    interleaved. So nothing is multiplied by the zeros of a dilated input.

    Args:
      x: (B, H, W, in).
      kernel: (k, k, in, out), k = 2 or 4, PyTorch's flipped in space.

    Returns:
      (B, 2H, 2W, out).
    """
    return _conv_transpose(x, kernel)


def _interleaved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes `conv_transpose`, with the gradients that JAX makes of it."""
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

    def part(a: int, b: int) -> jax.Array:
        """Takes phase (a, b) of every pixel, (B, H, W, out)."""
        phase = 2 * a + b
        return phases[:, a : a + H, b : b + W, phase * channels : (phase + 1) * channels]

    if k == 4:  # the four phases of a pixel lie at neighbours of each other
        phases = jnp.concatenate([part(a, b) for a in range(2) for b in range(2)], axis=-1)
    phases = phases.reshape(B, H, W, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return phases.reshape(B, 2 * H, 2 * W, channels)


def _conv_transpose_backward(arrays: kernels.Arrays, g: jax.Array) -> kernels.Arrays:
    """Computes the gradients of `conv_transpose`.

    The gradient of x is a convolution. The kernel's is one large product for each of its entries.
    """
    x, kernel = arrays
    B, H, W, _ = x.shape
    k = len(kernel)
    half = k // 2
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    padding = ((half - 1, half - 1),) * 2
    dx = jax.lax.conv_general_dilated(g, turned, (2, 2), padding, dimension_numbers=NHWC)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    g = g.reshape(B, H, 2, W, 2, -1)

    def place(i: int) -> tuple[int, int]:
        """Returns what entry i of a kernel's axis meets: phase of g, first pixel of padded x."""
        if k == 2:
            return 1 - i, 0
        tap, phase = divmod(i, 2)
        return phase, phase + tap

    def product(i: int, j: int) -> jax.Array:
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
    """Convolution with its kernel as a parameter: `conv2` for a kernel of 2, else `conv3`.

    Attributes:
      channels: output channels.
      kernel: size of the kernel, 2 or 3.
      stride: stride of a kernel of 3. That of a kernel of 2 is 2.
      dtype: dtype of the computation; the kernel is float32.
    """

    channels: int
    kernel: int = 3
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x (B, H, W, in) → (B, H/s, W/s, out)."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param('kernel', torch_init(), shape)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return conv2(x, kernel) if self.kernel == 2 else conv3(x, kernel, self.stride)


class ConvTranspose(nn.Module):
    """`conv_transpose` with its kernel as a parameter.

    Attributes:
      channels: output channels.
      kernel: size of the kernel, 2 or 4.
      dtype: dtype of the computation; the kernel is float32.
    """

    channels: int
    kernel: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x (B, H, W, in) → (B, 2H, 2W, out)."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param('kernel', torch_init(transposed=True), shape)
        return conv_transpose(*nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype))
