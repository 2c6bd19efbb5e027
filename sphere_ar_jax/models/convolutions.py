"""The S-VAE's convolutions, with backward passes that XLA is quick at (spec §3).

XLA's own gradients are right but slow on CPUs: 3 to 60 times the forward pass for a kernel (BUILD_NOTES.md, "Speed").

Dimensions:
  B  images    H, W  pixels    k  size of a kernel (k, k, in, out)    s  stride
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NHWC = ('NHWC', 'HWIO', 'NHWC')
_LARGE = 1024  # pixels; below, XLA's own gradient of a kernel is as quick
_PATCHES = 1_250_000  # numbers in a piece of `_kernel_gradient`'s patches: 5 MB, for a CPU's cache


def torch_init(transposed=False):
    """PyTorch's default for linear layers and convolutions: uniform ±1/√fan_in.

    The fan-in of a transposed convolution is counted, as PyTorch does, on its output channels.
    """

    def init(key, shape, dtype=jnp.float32):
        fan_in = 1
        for size in shape[:-2]:
            fan_in *= size
        fan_in *= shape[-1] if transposed else shape[-2]
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def _plain(x, kernel, stride):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=NHWC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv3(x, kernel, stride=1):
    """Convolution with a kernel of 3 × 3 and a padding of 1: (B, H, W, in) → (B, H/s, W/s, out), s = 1 or 2."""
    return _plain(x, kernel, stride)


def _conv3_backward(stride, residuals, g):
    x, kernel = residuals
    default = lambda x, g: jax.linear_transpose(lambda kernel: _plain(x, kernel, stride), kernel)(g)[0]
    patches = lambda x, g: _kernel_gradient(x, g, stride).astype(kernel.dtype)
    if g.shape[1] * g.shape[2] < _LARGE:
        dkernel = default(x, g)
    else:
        dkernel = jax.lax.platform_dependent(x, g, cpu=patches, default=default)
    return jax.linear_transpose(lambda x: _plain(x, kernel, stride), x)(g)[0], dkernel


conv3.defvjp(lambda x, kernel, stride: (_plain(x, kernel, stride), (x, kernel)), _conv3_backward)


def _kernel_gradient(x, g, stride):
    """Gradient (3, 3, in, out), float32, of `conv3`'s kernel for a cotangent g of its result.

    As products with patches of x, or of g where that has fewer channels, made for a few rows of pixels at a time.
    """
    if stride == 1 and g.shape[-1] < x.shape[-1]:
        return _kernel_gradient(g, x, 1)[::-1, ::-1].swapaxes(2, 3)
    (B, *_, features), (_, h, w, channels) = x.shape, g.shape
    rows = next(r for r in range(h, 0, -1) if h % r == 0 and (r == 1 or B * r * w * 9 * features <= _PATCHES))
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def add(total, row):
        part = jax.lax.dynamic_slice_in_dim(padded, stride * row, stride * rows + 2, axis=1)
        taps = [
            part[:, i : i + stride * rows : stride, j : j + stride * w : stride] for i in range(3) for j in range(3)
        ]
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, 9 * features)
        part = jax.lax.dynamic_slice_in_dim(g, row, rows, axis=1).reshape(-1, channels)
        return total + jnp.matmul(part.T, patches, preferred_element_type=jnp.float32), None

    total, _ = jax.lax.scan(add, jnp.zeros((channels, 9 * features)), jnp.arange(0, h, rows))
    return total.reshape(channels, 3, 3, features).transpose(1, 2, 3, 0)


def patchify(x, kernel):
    """Convolution with a kernel of 2 × 2 and a stride of 2, as one product: (B, H, W, in) → (B, H/2, W/2, out)."""
    B, H, W, features = x.shape
    patches = x.reshape(B, H // 2, 2, W // 2, 2, features).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4 * features)
    return (patches @ kernel.reshape(4 * features, -1)).reshape(B, H // 2, W // 2, -1)


@jax.custom_vjp
def conv_transpose(x, kernel):
    """Transposed convolution of stride 2, PyTorch's with padding k/2 − 1: (B, H, W, in) → (B, 2H, 2W, out).

    kernel: (k, k, in, out), k = 2 or 4, PyTorch's flipped in space. Computed as a plain convolution to the 2 × 2 pixels
    at each input pixel, and interleaved: no zeros of a dilated input are multiplied. Its backward pass is
    written out: XLA's own for the kernel takes up to 60 times as long on CPUs.
    """
    (B, H, W, features), (k, _, _, channels) = x.shape, kernel.shape
    if k == 2:
        kernel = kernel[::-1, ::-1]  # kernel axis = phase
    # axis of a kernel of 4 = 2·tap + phase: output pixel 2i + a sees input pixels i + a − 1 + tap
    taps = kernel.reshape(k // 2, 2, k // 2, 2, features, channels).transpose(0, 2, 4, 1, 3, 5)
    pad = ((k // 2 - 1,) * 2,) * 2
    taps = taps.reshape(k // 2, k // 2, features, -1)
    phases = jax.lax.conv_general_dilated(x, taps, (1, 1), pad, dimension_numbers=NHWC)
    if k == 4:  # the four phases of a pixel lie at neighbours of each other
        part = lambda a, b: phases[:, a : a + H, b : b + W, (2 * a + b) * channels : (2 * a + b + 1) * channels]
        phases = jnp.concatenate([part(a, b) for a in range(2) for b in range(2)], axis=-1)
    return phases.reshape(B, H, W, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, channels)


def _conv_transpose_forward(x, kernel):
    return conv_transpose(x, kernel), (x, kernel)


def _conv_transpose_backward(residuals, g):
    x, kernel = residuals
    (B, H, W, _), k, half = x.shape, len(kernel), len(kernel) // 2
    # of x: a convolution of stride 2 with the kernel turned round
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = jax.lax.conv_general_dilated(g, turned, (2, 2), ((half - 1,) * 2,) * 2, dimension_numbers=NHWC)
    # of the kernel: every phase of g against x shifted by each of its taps, as one product of large matrices each
    padded = jnp.pad(x, ((0, 0), (half - 1,) * 2, (half - 1,) * 2, (0, 0)))
    g = g.reshape(B, H, 2, W, 2, -1)

    def product(i, j):
        (u, a), (v, b) = (divmod(n, 2) if k == 4 else (0, 1 - n) for n in (i, j))
        shift = lambda phase, tap: phase + tap if k == 4 else 0
        shifted = padded[:, shift(a, u) : shift(a, u) + H, shift(b, v) : shift(b, v) + W]
        return jax.lax.dot_general(
            shifted, g[:, :, a, :, b], (((0, 1, 2), (0, 1, 2)), ((), ())), preferred_element_type=jnp.float32
        )

    dkernel = jnp.stack([jnp.stack([product(i, j) for j in range(k)]) for i in range(k)])
    return dx, dkernel.astype(kernel.dtype)


conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


class Conv(nn.Module):
    """`conv3`, or `patchify` for a kernel of 2, with the kernel as a parameter."""

    channels: int
    kernel: int = 3
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', torch_init(), (self.kernel, self.kernel, x.shape[-1], self.channels))
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return patchify(x, kernel) if self.kernel == 2 else conv3(x, kernel, self.stride)


class ConvTranspose(nn.Module):
    """`conv_transpose` with its kernel, of size 4 or 2, as a parameter. (B, H, W, in) → (B, 2H, 2W, out)."""

    channels: int
    kernel: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param('kernel', torch_init(transposed=True), shape)
        return conv_transpose(*nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype))
