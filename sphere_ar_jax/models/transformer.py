"""The transformer block shared by the S-VAE and the AR model, and a scanned stack of it.

Dimensions:
  B    batch                       T    positions (extra tokens first, then the grid)
  D    width                       N    heads, K = D/N the head dimension
  F    hidden width of the SwiGLU  n    blocks in the stack (leading axis of stacked parameters)
  S    length of the static key/value cache
Parameters come in two layouts. Stacked (`scan=True`), for training and checkpoints: one block's
program, compiled once and scanned. Apart (`scan=False`, made by `unstack`), for sampling: no
product waits for its weights to be sliced out of a stack, and every block's cache is an array of
its own, updated in place.

The architecture is that of SphereAR (arXiv 2509.24335): pre-norm blocks, SwiGLU, 2-D RoPE.
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

from sphere_ar_jax.models import kernels
from sphere_ar_jax.models.attention import attend

INIT = nn.initializers.normal(0.02)
EPS = 1e-6
Cache = tuple[jax.Array, jax.Array]  # keys and values of one block


def swiglu_width(width: int) -> int:
    """Hidden width of the SwiGLU: int(2·4D/3), rounded up to a multiple of 256."""
    return -(-int(2 * 4 * width / 3) // 256) * 256


def head_dim(width: int, heads: int) -> int:
    """K = D/N.

    Raises ValueError where N does not divide D, or K is no multiple of 4 as the 2-D RoPE needs.
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
    dimensions: tuple,
    precision: None = None,
    preferred_element_type: None = None,
) -> jax.Array:
    """Product of x (..., *in) and a kernel (*in, *out) → (..., *out), for Flax's `dot_general`.

    Its numbers are those of `lax.dot_general`. But the kernel's gradient comes in the kernel's own
    order, where CPUs would turn it round after the product (BUILD_NOTES.md, "Speed"). Only rows
    are merged, since heads and features may be split over devices.

    Args:
      x, kernel: as above, of one dtype.
      dimensions: those of `lax.dot_general`; no others than these.
      precision, preferred_element_type: None; Flax gives them.
    """
    n = len(dimensions[0][0])
    contracted = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    assert dimensions == (contracted, ((), ())), dimensions
    assert precision is None and preferred_element_type is None
    rows = x.shape[: x.ndim - n]
    y = _product(n)(x.reshape(math.prod(rows), *x.shape[x.ndim - n :]), kernel)
    return y.reshape(*rows, *y.shape[1:])


@functools.cache
def _product(n):
    """The product of x (rows, *in) and a kernel (*in, *out), where *in are n axes."""

    def plain(x, kernel):
        contracted = (tuple(range(1, n + 1)), tuple(range(n)))
        return jax.lax.dot_general(x, kernel, (contracted, ((), ())))

    def backward(arrays, g):
        x, kernel = arrays
        outputs = (tuple(range(1, g.ndim)), tuple(range(n, kernel.ndim)))
        dx = jax.lax.dot_general(g, kernel, (outputs, ((), ())))
        return dx, jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())))

    return kernels.fast(plain, backward)


def rope_table(
    height: int,
    width: int,
    extra: int,
    head_dim: int,
    theta: float = 10000.0,
) -> np.ndarray:
    """2-D rotary angles, in raster order after `extra` tokens at position 0 (identity rotation).

    Token (row, col) sits at (x, y) = (col + 1½, row + 1½); its angles are [x·freqs, y·freqs] with
    freqs_i = theta^(−2i/half), half = head_dim/2.

    Returns:
      (extra + height·width, head_dim/2) float32, radians.
    """
    half = head_dim // 2
    freqs = theta ** (-2 * np.arange(half // 2) / half)
    y, x = np.meshgrid(np.arange(height) + 1.5, np.arange(width) + 1.5, indexing='ij')
    grid = np.stack([x.ravel(), y.ravel()], axis=-1)  # x first
    positions = np.concatenate([np.zeros((extra, 2)), grid])
    angles = positions[:, :, None] * freqs
    return angles.reshape(len(positions), half).astype(np.float32)


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate the channel pairs (0,1), (2,3), … of x (B, T, N, K) by angles (T, K/2), in float32.

    The result has x's dtype.
    """
    cos = jnp.cos(angles)[None, :, None, :]
    sin = jnp.sin(angles)[None, :, None, :]
    even = x[..., 0::2].astype(jnp.float32)
    odd = x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, eps 1e-6, computed in float32.

    (..., D) → (..., D) in `dtype`.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS)
        return (x * jnp.broadcast_to(scale, x.shape)).astype(self.dtype)


def _attend(q, keys, values, start):
    """softmax(q·kᵀ/√K)·v of T positions from `start` on over a cache filled to start + T entries.

    q (B, T, N, K), keys and values (B, N, S, K) → (B, T, N, K). With heads before positions each
    product streams its cache as it lies in memory.
    """
    T = q.shape[1]
    S = keys.shape[2]
    logits = jnp.einsum('btnk,bnsk->bnts', q, keys, preferred_element_type=jnp.float32)
    visible = jnp.arange(S)[None] <= start + jnp.arange(T)[:, None]
    logits = jnp.where(visible[None, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum('bnts,bnsk->btnk', weights.astype(values.dtype), values)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q·kᵀ/√K)·v, with 2-D RoPE on q and k and no biases.

    Without a cache all T positions attend to each other (`causal`: to themselves and what is
    before). With one, the keys and values of the T positions are written to it from position
    `start` on, and position i attends to the first start + i + 1 entries. `prefill` says that the
    cache is empty (start = 0): the T positions then attend to themselves only, whatever the cache's
    length. The softmax is float32.

    Args of the call:
      x: (B, T, D).
      angles: (T, K/2) radians.
      cache: None, or (keys, values), each (B, N, S, K).
      start: int or () int with start + T ≤ S; it is clamped, not checked.
    Returns:
      (B, T, D) in `dtype`, and the cache.
    Raises ValueError where heads do not divide D.
    """

    heads: int
    causal: bool
    prefill: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        cache: Cache | None = None,
        start: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        width = x.shape[-1]
        dense = dict(use_bias=False, kernel_init=INIT, dtype=self.dtype, dot_general=product)
        features = (3, self.heads, head_dim(width, self.heads))
        qkv = nn.DenseGeneral(features, name='qkv', **dense)(x)
        q, k, v = (part.squeeze(-3) for part in jnp.split(qkv, 3, axis=-3))
        q = apply_rope(q, angles)
        k = apply_rope(k, angles)
        if cache is not None:
            cache = (_write(cache[0], k, start), _write(cache[1], v, start))
        whole = cache is None or self.prefill
        out = attend(q, k, v, self.causal) if whole else _attend(q, *cache, start)
        return nn.DenseGeneral(width, axis=(-2, -1), name='out', **dense)(out), cache


def _write(cached, new, start):
    """A cache (B, N, S, K) with new entries (B, T, N, K) from `start` on."""
    new = new.swapaxes(1, 2).astype(cached.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cached, new, start, axis=2)


class SwiGLU(nn.Module):
    """w2(silu(gate)·up), gate and up from one fused matrix (gate first), no biases.

    (B, T, D) → (B, T, D).
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = dict(use_bias=False, kernel_init=INIT, dtype=self.dtype, dot_general=product)
        hidden = nn.DenseGeneral((2, swiglu_width(x.shape[-1])), name='w1', **dense)(x)
        gate, up = (part.squeeze(-2) for part in jnp.split(hidden, 2, axis=-2))
        return nn.Dense(x.shape[-1], name='w2', **dense)(nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm block: x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)).

    (B, T, D) → (B, T, D), and the cache. x is float32 whatever `dtype` is: a sum over many blocks
    must not be rounded at each.
    """

    heads: int
    causal: bool
    prefill: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        cache: Cache | None = None,
        start: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        attention = Attention(self.heads, self.causal, self.prefill, self.dtype, name='attention')
        y = RMSNorm(self.dtype, name='attention_norm')(x)
        y, cache = attention(y, angles, cache, start)
        x = x + y.astype(x.dtype)
        y = RMSNorm(self.dtype, name='mlp_norm')(x)
        y = SwiGLU(self.dtype, name='mlp')(y)
        return x + y.astype(x.dtype), cache


def scanned(module: type[nn.Module], length: int, unroll: int, axis: str) -> Callable:
    """A module `length` times, one after the other, compiled once.

    It is called as (carry, *inputs) → (carry, outputs); every repetition gets the same inputs.
    Parameters have a leading axis `length`, by the name of `axis`. `unroll` repetitions, up to
    `length`, form one iteration of the loop.
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
    """n blocks, one after the other.

    Attributes:
      remat: recompute each block's activations in the backward pass instead of keeping them.
      unroll: blocks per iteration of the scan, up to n. It changes speed alone: parameters and
        results are the same.
      scan: whether parameters are stacked on a leading axis n, and compile time does not grow with
        n; a cache needs them apart (scan=False).
    """

    depth: int
    heads: int
    causal: bool
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32
    scan: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array | np.ndarray,
        cache: tuple[Cache, ...] | None = None,
        start: jax.Array | int | None = None,
        prefill: bool = False,
    ) -> tuple[jax.Array, tuple[Cache, ...] | None]:
        """x (B, T, D) → (B, T, D) float32, and the updated cache, n pairs as in `Attention`.

        The cache is None where none is given. Raises ValueError for a cache with scan=True.
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

    def _apart(self, x, angles, cache, start, prefill):
        """`__call__` where each block has parameters of its own."""
        caches = []
        for i in range(self.depth):
            block = Block(self.heads, self.causal, prefill, self.dtype, name=f'blocks_{i}')
            x, updated = block(x, angles, None if cache is None else cache[i], start)
            caches.append(updated)
        return x, None if cache is None else tuple(caches)


def unstack(params: dict) -> dict:
    """Parameters of scan=True in the layout of scan=False.

    `blocks/…` (n, …) becomes `blocks_0/…` to `blocks_{n−1}/…`, and `res_groups` likewise; all else
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


def empty_cache(
    depth: int,
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    dtype: Any = jnp.float32,
) -> tuple[Cache, ...]:
    """A zeroed key/value cache for `Stack`: n pairs (keys, values), each (B, N, S, K)."""

    def zeros():
        return jnp.zeros((batch, heads, length, head_dim), dtype)

    return tuple((zeros(), zeros()) for _ in range(depth))
