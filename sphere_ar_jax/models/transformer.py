"""The transformer block shared by the S-VAE and the AR model, and a scanned stack of it.

Dimensions:
  B    batch                       T    positions (extra tokens first, then the grid)
  D    width                       N    heads, K = D/N the head dimension
  F    hidden width of the SwiGLU  n    blocks in the stack (leading axis of stacked parameters)
  S    length of the static key/value cache

Parameters come in two layouts. Training and checkpoints use the stacked one (`scan=True`): one
block's program is compiled once and scanned. Sampling has the blocks' parameters apart
(`scan=False`, made by `unstack`): no product waits for its weights to be sliced out of a stack, and
every block's cache is an array of its own, updated in place.

The architecture is that of SphereAR (arXiv 2509.24335): pre-norm blocks, SwiGLU, 2-D RoPE. See
`docs/method.md`, "Transformer block".
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sphere_ar_jax.models import kernels
from sphere_ar_jax.models.attention import apply_rope, attend
from sphere_ar_jax.models.cache import Cache, HeadsFirst
from sphere_ar_jax.models.fused.blocks import transformer_block
from sphere_ar_jax.models.sizes import EPS

INIT = nn.initializers.normal(0.02)


def swiglu_width(width: int) -> int:
    """Returns the hidden width of the SwiGLU: int(2·4D/3), rounded up to a multiple of 256."""
    return -(-int(2 * 4 * width / 3) // 256) * 256


def head_dim(width: int, heads: int) -> int:
    """Returns the head dimension K = D/N.

    Raises:
      ValueError: N does not divide D, or K is not a multiple of 4 as the 2-D RoPE needs.
    """
    if width % heads:
        raise ValueError(f'{heads} heads do not divide the width {width}')
    K = width // heads
    if K % 4:
        message = f'the head dimension {width}/{heads} = {K} must be a multiple of 4'
        raise ValueError(f'{message} for the 2-D RoPE')
    return K


def product(
    x: jax.Array,
    kernel: jax.Array,
    dimensions: jax.lax.DotDimensionNumbers,
    precision: None = None,
    preferred_element_type: None = None,
) -> jax.Array:
    """Multiplies x (..., *in) by a kernel (*in, *out) → (..., *out), for Flax's `dot_general`.

    The numbers are those of `lax.dot_general`. But the kernel's gradient comes in the kernel's own
    order, where CPUs would transpose it after the product (BUILD_NOTES.md, "Speed"). Only rows are
    merged, since heads and features may be split over devices.

    Args:
      x: (..., *in).
      kernel: (*in, *out), of x's dtype.
      dimensions: dimension numbers of `lax.dot_general`, which must be those of this product.
      precision: None, which Flax passes.
      preferred_element_type: None, which Flax passes.

    Returns:
      (..., *out).
    """
    n = len(dimensions[0][0])
    contracted = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    assert dimensions == (contracted, ((), ())), dimensions
    assert precision is None
    assert preferred_element_type is None
    rows = x.shape[: x.ndim - n]
    y = _product(n)(x.reshape(math.prod(rows), *x.shape[x.ndim - n :]), kernel)
    return y.reshape(*rows, *y.shape[1:])


@functools.cache
def _product(n: int) -> Callable[..., jax.Array]:
    """Makes the product of x (rows, *in) and a kernel (*in, *out), where *in are n axes."""

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        contracted = (tuple(range(1, n + 1)), tuple(range(n)))
        return jax.lax.dot_general(x, kernel, (contracted, ((), ())))

    def backward(arrays: kernels.Arrays, g: jax.Array) -> kernels.Arrays:
        x, kernel = arrays
        outputs = (tuple(range(1, g.ndim)), tuple(range(n, kernel.ndim)))
        dx = jax.lax.dot_general(g, kernel, (outputs, ((), ())))
        dkernel = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())))
        return dx, dkernel

    return kernels.fast(plain, backward)


def rotary_angles(positions: np.ndarray, head_dim: int, theta: float = 10000.0) -> np.ndarray:
    """Computes the rotary angles of points of the plane (`docs/method.md`, "RoPE").

    The angles of (x, y) are [x·freqs, y·freqs] with freqs_i = theta^(−2i/half), half = head_dim/2.
    The rotation of (0, 0) is the identity.

    Args:
      positions: (n, 2), each (x, y).
      head_dim: K, a multiple of 4.
      theta: base of the frequencies.

    Returns:
      (n, head_dim/2) float32, in radians.
    """
    half = head_dim // 2
    freqs = theta ** (-2 * np.arange(half // 2) / half)
    angles = positions[:, :, None] * freqs
    return angles.reshape(len(positions), half).astype(np.float32)


def rope_table(
    height: int,
    width: int,
    extra: int,
    head_dim: int,
    theta: float = 10000.0,
) -> np.ndarray:
    """Computes the rotary angles of a grid of tokens and of extra tokens in front of it.

    Token (row, col) sits at (x, y) = (col + 1½, row + 1½), and extra tokens sit at (0, 0); see
    `rotary_angles`.

    Args:
      height: rows of the grid.
      width: columns of the grid.
      extra: tokens in front of the grid.
      head_dim: K, a multiple of 4.
      theta: base of the frequencies.

    Returns:
      (extra + height·width, head_dim/2) float32, in radians. The grid is in raster order.
    """
    y, x = np.meshgrid(np.arange(height) + 1.5, np.arange(width) + 1.5, indexing='ij')
    grid = np.stack([x.ravel(), y.ravel()], axis=-1)  # x first
    positions = np.concatenate([np.zeros((extra, 2)), grid])
    return rotary_angles(positions, head_dim, theta)


class RMSNorm(nn.Module):
    """Computes x / rms(x) · scale over the last axis in float32, with eps 1e-6.

    Attributes:
      dtype: dtype of the result.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x (..., D) → (..., D) in `dtype`."""
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS)
        return (x * jnp.broadcast_to(scale, x.shape)).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q·kᵀ/√K)·v, with 2-D RoPE on q and k and no biases.

    Without a cache all T positions attend to each other. With one, the keys and values of the T
    positions are written to it from position `start` on, and position i attends to the first
    start + i + 1 entries. The softmax is float32.

    Attributes:
      heads: N, which must divide D.
      causal: whether, without a cache, a position attends only to itself and those before it.
      prefill: whether the cache is empty (start = 0). The T positions then attend to themselves
        only, whatever the cache's length.
      dtype: dtype of the computation; parameters are float32.
    """

    heads: int
    causal: bool
    prefill: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        cache: Cache | None = None,
        start: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Computes the attention, and writes to the cache.

        Args:
          x: (B, T, D).
          angles: (T, K/2), in radians.
          cache: the block's cache, or None.
          start: () int with start + T ≤ S, needed with a cache; it is clamped, not checked.

        Returns:
          (B, T, D) in `dtype`, and the updated cache, None without one.

        Raises:
          ValueError: `head_dim` refuses the sizes.
        """
        width = x.shape[-1]
        dense = dict(use_bias=False, kernel_init=INIT, dtype=self.dtype, dot_general=product)
        features = (3, self.heads, head_dim(width, self.heads))
        qkv = nn.DenseGeneral(features, name='qkv', **dense)(x)
        q, k, v = (part.squeeze(-3) for part in jnp.split(qkv, 3, axis=-3))
        q = apply_rope(q, angles)
        k = apply_rope(k, angles)
        if cache is None:
            out = attend(q, k, v, self.causal)
        else:
            assert start is not None, 'a cache needs a start'
            cache = cache.written(k, v, start)
            out = attend(q, k, v, self.causal) if self.prefill else cache.attended(q, start)
        return nn.DenseGeneral(width, axis=(-2, -1), name='out', **dense)(out), cache


class SwiGLU(nn.Module):
    """Computes w2(silu(gate)·up), without biases.

    One fused matrix makes gate and up, gate first.

    Attributes:
      dtype: dtype of the computation; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, T, D) → (B, T, D)."""
        dense = dict(use_bias=False, kernel_init=INIT, dtype=self.dtype, dot_general=product)
        hidden = nn.DenseGeneral((2, swiglu_width(x.shape[-1])), name='w1', **dense)(x)
        gate, up = (part.squeeze(-2) for part in jnp.split(hidden, 2, axis=-2))
        return nn.Dense(x.shape[-1], name='w2', **dense)(nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm block: x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)).

    Attributes:
      heads: N.
      causal: see `Attention`.
      prefill: see `Attention`.
      dtype: dtype of the attention and the SwiGLU; parameters and x are float32, since a sum over
        many blocks must not be rounded at each.
    """

    heads: int
    causal: bool
    prefill: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        cache: Cache | None = None,
        start: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Maps x (B, T, D) float32 → (B, T, D) float32, and updates the cache, as `Attention`."""
        attention = Attention(self.heads, self.causal, self.prefill, self.dtype, name='attention')
        y = RMSNorm(self.dtype, name='attention_norm')(x)
        y, cache = attention(y, angles, cache, start)
        x = x + y.astype(x.dtype)
        y = RMSNorm(self.dtype, name='mlp_norm')(x)
        y = SwiGLU(self.dtype, name='mlp')(y)
        return x + y.astype(x.dtype), cache


def scanned(
    module: Callable[..., nn.Module], length: int, unroll: int, axis: str
) -> Callable[..., nn.Module]:
    """Repeats a module `length` times, one after the other, compiled once.

    The result is called as (carry, *inputs) → (carry, outputs), and every repetition gets the same
    inputs.

    Args:
      module: the module's class.
      length: number of repetitions. Parameters have a leading axis of this length.
      unroll: repetitions in one iteration of the loop, up to `length`.
      axis: name of the parameters' leading axis.

    Returns:
      The class of the repeated module.
    """
    return nn.scan(
        module,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=length,
        unroll=min(unroll, length),
        metadata_params={nn.PARTITION_NAME: axis},
    )


class Stack(nn.Module):
    """Runs n blocks, one after the other.

    Attributes:
      depth: n.
      heads: N.
      causal: see `Attention`.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      unroll: blocks per iteration of the scan, up to n. It changes speed alone: parameters and
        results are the same.
      dtype: see `Block`.
      scan: whether parameters are stacked on a leading axis n, so that compile time does not grow
        with n. A cache needs them apart (scan=False).
      fused: whether a single position runs over a cache by the kernels of `models.fused` (speed
        only).
    """

    depth: int
    heads: int
    causal: bool
    remat: bool = False
    unroll: int = 1
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    fused: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array | np.ndarray,
        cache: tuple[Cache, ...] | None = None,
        start: jax.Array | int | None = None,
        prefill: bool = False,
    ) -> tuple[jax.Array, tuple[Cache, ...] | None]:
        """Runs all blocks.

        Args:
          x: (B, T, D).
          angles: (T, K/2), in radians.
          cache: n caches as in `Attention`, or None.
          start: see `Attention`.
          prefill: see `Attention`.

        Returns:
          (B, T, D) float32, and the updated cache, None without one.

        Raises:
          ValueError: a cache is given, but scan is True.
        """
        x = x.astype(jnp.float32)
        angles = jnp.asarray(angles)
        if not self.scan:
            return self._apart(x, angles, cache, start, prefill)
        if cache is not None:
            message = 'a cache needs the parameters of the blocks apart'
            raise ValueError(f'{message}: unstack them, and use scan=False')
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        blocks = scanned(block, self.depth, self.unroll, 'layers')
        return blocks(self.heads, self.causal, dtype=self.dtype, name='blocks')(x, angles)

    def _apart(
        self,
        x: jax.Array,
        angles: jax.Array,
        cache: tuple[Cache, ...] | None,
        start: jax.Array | int | None,
        prefill: bool,
    ) -> tuple[jax.Array, tuple[Cache, ...] | None]:
        """Runs all blocks where each has parameters of its own; see `__call__`."""
        if self.fused and cache is not None and not prefill and x.shape[1] == 1:
            assert start is not None, 'a cache needs a start'
            return self._fused(x, angles, cache, jnp.asarray(start, jnp.int32))
        caches = []
        for i in range(self.depth):
            block = Block(self.heads, self.causal, prefill, self.dtype, name=f'blocks_{i}')
            x, updated = block(x, angles, None if cache is None else cache[i], start)
            caches.append(updated)
        return x, None if cache is None else tuple(caches)

    def _fused(
        self, x: jax.Array, angles: jax.Array, cache: tuple[Cache, ...], start: jax.Array
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Runs all blocks for one position (B, 1, D) by the kernels of `models.fused`."""
        params = cast_kernels(self.variables['params'], self.dtype)
        caches = []
        x = x[:, 0]
        for i, block_cache in enumerate(cache):
            assert isinstance(block_cache, HeadsFirst), 'the kernels know no other layout'
            x, updated = transformer_block(params[f'blocks_{i}'], x, angles[0], block_cache, start)
            caches.append(updated)
        return x[:, None], tuple(caches)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Turns parameters of scan=True into the layout of scan=False.

    `blocks/…` (n, …) becomes `blocks_0/…` to `blocks_{n−1}/…`, and `res_groups` likewise. All else
    stays.
    """
    out = {}
    for name, value in params.items():
        if name in ('blocks', 'res_groups'):
            n = len(jax.tree.leaves(value)[0])
            for i in range(n):
                one = jax.tree.map(operator.itemgetter(i), value)
                out[f'{name}_{i}'] = unstack(one)
        else:
            out[name] = unstack(value) if isinstance(value, dict) else value
    return out


def cast_kernels(params: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Casts the kernels of dense layers, and the biases beside them, to a dtype.

    Layers of that dtype cast them so at each call, so that no result changes.

    Args:
      params: of a module. All its dense layers must have the dtype.
      dtype: of the layers.
    """
    out = {}
    for name, value in params.items():
        if isinstance(value, dict):
            out[name] = cast_kernels(value, dtype)
        else:
            out[name] = value.astype(dtype) if 'kernel' in params else value
    return out
