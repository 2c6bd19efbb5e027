"""The transformer block shared by the S-VAE and the AR model, and a scanned stack of it (spec §4).

Dimensions:
  B    batch                       T    positions of the sequence (extra tokens first, then the grid)
  D    width                       N    heads, K = D/N the head dimension
  F    hidden width of the SwiGLU  n    blocks in the stack (leading axis of every stacked parameter)
  S    length of the static key/value cache
Parameters come in two layouts. Stacked (`scan=True`), for training and checkpoints: one block's program, compiled once
and scanned. Apart (`scan=False`, made by `unstack`), for sampling: no product waits for its weights to be sliced out of
a stack, and every block's cache is an array of its own, updated in place.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.models.attention import attend

INIT = nn.initializers.normal(0.02)
EPS = 1e-6


def swiglu_width(width):
    """Hidden width of the SwiGLU: int(2·4D/3), rounded up to a multiple of 256."""
    return -(-int(2 * 4 * width / 3) // 256) * 256


def head_dim(width, heads):
    """K = D/N. Raises ValueError where N does not divide D, or K is no multiple of 4 as the 2-D RoPE needs."""
    if width % heads:
        raise ValueError(f'{heads} heads do not divide the width {width}')
    if width // heads % 4:
        raise ValueError(
            f'the head dimension {width}/{heads} = {width // heads} must be a multiple of 4 for the 2-D RoPE'
        )
    return width // heads


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, n):
    return jax.lax.dot_general(x, kernel, ((tuple(range(1, n + 1)), tuple(range(n))), ((), ())))


def _product_backward(n, inputs, g):
    x, kernel = inputs
    outputs = tuple(range(1, g.ndim)), tuple(range(n, kernel.ndim))
    return jax.lax.dot_general(g, kernel, (outputs, ((), ()))), jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())))


_product.defvjp(lambda x, kernel, n: (_product(x, kernel, n), (x, kernel)), _product_backward)


def product(x, kernel, dimensions, precision=None, preferred_element_type=None):
    """`lax.dot_general` of x (..., *in) and a kernel (*in, *out) → (..., *out), differentiable once, in reverse.

    The same numbers; but the kernel's gradient comes in the kernel's own order, which on CPUs is otherwise turned round
    after the product (BUILD_NOTES.md, "Speed"). Only rows are merged: heads and features may be split over devices.
    For Flax's `dot_general`.
    """
    n = len(dimensions[0][0])
    assert dimensions == ((tuple(range(x.ndim - n, x.ndim)), tuple(range(n))), ((), ())), dimensions
    assert precision is None and preferred_element_type is None
    rows = x.shape[: x.ndim - n]
    y = _product(x.reshape(math.prod(rows), *x.shape[x.ndim - n :]), kernel, n)
    return y.reshape(*rows, *y.shape[1:])


def rope_table(height, width, extra, head_dim, theta=10000.0):
    """2-D rotary angles, in raster order after `extra` tokens at position 0 (identity rotation).

    Token (row, col) sits at (x, y) = (col + 1½, row + 1½); its angles are [x·freqs, y·freqs] with
    freqs_i = theta^(−2i/half), half = head_dim/2.

    Returns:
      (extra + height·width, head_dim/2) float32, radians. Source: spec §4.
    """
    half = head_dim // 2
    freqs = theta ** (-2 * np.arange(half // 2) / half)
    y, x = np.meshgrid(np.arange(height) + 1.5, np.arange(width) + 1.5, indexing='ij')
    grid = np.stack([x.ravel(), y.ravel()], axis=-1)  # x first
    positions = np.concatenate([np.zeros((extra, 2)), grid])
    return (positions[:, :, None] * freqs).reshape(len(positions), half).astype(np.float32)


def apply_rope(x, angles):
    """Rotates the channel pairs (0,1), (2,3), … of x (B, T, N, K) by angles (T, K/2), in float32; x's dtype out."""
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, eps 1e-6, computed in float32. (..., D) → (..., D) in `dtype`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS)
        return (x * jnp.broadcast_to(scale, x.shape)).astype(self.dtype)


def _attend(q, keys, values, start):
    """softmax(q·kᵀ/√K)·v of T positions from `start` on over a cache of which start + T entries are filled.

    Of a cache filled to an eighth or a quarter no more is read; else all of it, since a part is copied out first, which
    pays only while it is small. q (B, T, N, K), keys and values (B, N, S, K) → (B, T, N, K). With heads before
    positions each product streams its cache as it lies in memory.
    """
    T, S = q.shape[1], keys.shape[2]
    lengths = sorted({min(S, max(64, -(-S // 8))), min(S, max(128, -(-S // 4))), S})

    def over(length):
        def attend(q, keys, values, start):
            keys, values = keys[:, :, :length], values[:, :, :length]
            logits = jnp.einsum('btnk,bnsk->bnts', q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            visible = jnp.arange(length)[None] <= start + jnp.arange(T)[:, None]
            weights = jax.nn.softmax(jnp.where(visible[None, None], logits, -jnp.inf), axis=-1)
            return jnp.einsum('bnts,bnsk->btnk', weights.astype(values.dtype), values)

        return attend

    branch = jnp.sum(jnp.asarray(start + T) > jnp.asarray(lengths[:-1], jnp.int32), dtype=jnp.int32)
    return jax.lax.switch(branch, [over(length) for length in lengths], q, keys, values, start)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q·kᵀ/√K)·v with 2-D RoPE on q and k, no biases; softmax in float32.

    Without a cache all T positions attend to each other (`causal`: to themselves and what is before). With one, the
    keys and values of the T positions are written to it from position `start` on, and position i attends to the first
    start + i + 1 entries. `prefill` says that the cache is empty (start = 0): the T positions then attend to
    themselves only, whatever the cache's length.

    Args of the call:
      x: (B, T, D). angles: (T, K/2) radians. cache: None, or (keys, values), each (B, N, S, K).
      start: int or () int with start + T ≤ S; it is clamped, not checked.
    Returns:
      (B, T, D) in `dtype`, and the cache. Raises ValueError where heads do not divide D. Source: spec §4.
    """

    heads: int
    causal: bool
    prefill: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, angles, cache=None, start=None):
        width = x.shape[-1]
        dense = dict(use_bias=False, kernel_init=INIT, dtype=self.dtype, dot_general=product)
        qkv = nn.DenseGeneral((3, self.heads, head_dim(width, self.heads)), name='qkv', **dense)(x)
        q, k, v = (part.squeeze(-3) for part in jnp.split(qkv, 3, axis=-3))
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        if cache is not None:
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(c, new.swapaxes(1, 2).astype(c.dtype), start, axis=2)
                for c, new in zip(cache, (k, v), strict=True)
            )
        out = attend(q, k, v, self.causal) if cache is None or self.prefill else _attend(q, *cache, start)
        return nn.DenseGeneral(width, axis=(-2, -1), name='out', **dense)(out), cache


class SwiGLU(nn.Module):
    """w2(silu(gate)·up), gate and up from one fused matrix (gate first), no biases. (B, T, D) → (B, T, D)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = dict(use_bias=False, kernel_init=INIT, dtype=self.dtype, dot_general=product)
        hidden = nn.DenseGeneral((2, swiglu_width(x.shape[-1])), name='w1', **dense)(x)
        gate, up = (part.squeeze(-2) for part in jnp.split(hidden, 2, axis=-2))
        return nn.Dense(x.shape[-1], name='w2', **dense)(nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm block: x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)). (B, T, D) → (B, T, D), and the cache.

    x is float32 whatever `dtype` is: a sum over many blocks must not be rounded at each.
    """

    heads: int
    causal: bool
    prefill: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, angles, cache=None, start=None):
        attention = Attention(self.heads, self.causal, self.prefill, self.dtype, name='attention')
        y, cache = attention(RMSNorm(self.dtype, name='attention_norm')(x), angles, cache, start)
        x = x + y.astype(x.dtype)
        y = SwiGLU(self.dtype, name='mlp')(RMSNorm(self.dtype, name='mlp_norm')(x))
        return x + y.astype(x.dtype), cache


class Stack(nn.Module):
    """n blocks, one after the other.

    Attributes:
      remat: recompute each block's activations in the backward pass instead of keeping them.
      unroll: blocks per iteration of the scan, up to n. Speed only: parameters and results are the same.
      scan: whether parameters are stacked on a leading axis n, and compile time does not grow with n; a cache needs
        them apart (scan=False).
    """

    depth: int
    heads: int
    causal: bool
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32
    scan: bool = True

    @nn.compact
    def __call__(self, x, angles, cache=None, start=None, prefill=False):
        """x (B, T, D) → (B, T, D) float32, and the updated cache (None without one), n pairs as in `Attention`."""
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        x, angles = x.astype(jnp.float32), jnp.asarray(angles)
        if not self.scan:
            caches = []
            for i in range(self.depth):
                layer = Block(self.heads, self.causal, prefill, self.dtype, name=f'blocks_{i}')
                x, updated = layer(x, angles, None if cache is None else cache[i], start)
                caches.append(updated)
            return x, None if cache is None else tuple(caches)
        if cache is not None:
            raise ValueError('a cache needs the parameters of the blocks apart: unstack them, and use scan=False')
        scanned = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=min(self.unroll, self.depth),
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        return scanned(self.heads, self.causal, dtype=self.dtype, name='blocks')(x, angles)


def unstack(params):
    """Parameters of scan=True, with leading axes for blocks and groups of blocks, in the layout of scan=False.

    `blocks/…` (n, …) becomes `blocks_0/…` to `blocks_{n−1}/…`, the same for `res_groups`; all else stays.
    """
    out = {}
    for name, value in params.items():
        if name in ('blocks', 'res_groups'):
            n = len(jax.tree.leaves(value)[0])
            out |= {f'{name}_{i}': unstack(jax.tree.map(lambda a, i=i: a[i], value)) for i in range(n)}
        else:
            out[name] = unstack(value) if isinstance(value, dict) else value
    return out


def empty_cache(depth, batch, length, heads, head_dim, dtype=jnp.float32):
    """A zeroed key/value cache for `Stack`: n pairs (keys, values), each (B, N, S, K)."""
    return tuple(tuple(jnp.zeros((batch, heads, length, head_dim), dtype) for _ in range(2)) for _ in range(depth))
