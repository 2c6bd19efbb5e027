"""Attention of one new position to a cache, with RoPE and the cache's new entry, as one GPU kernel.

The kernel rotates queries and keys, writes the new entries to the cache, and reads only the part of
the cache that is filled. It is written in Pallas for Triton. Other platforms compute the same in
plain JAX.

Dimensions:
  B  images                  N  heads of K numbers                  S  length of the cache
"""

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sphere_ar_jax.models import kernels
from sphere_ar_jax.models.attention import apply_rope
from sphere_ar_jax.models.cache import HeadsFirst
from sphere_ar_jax.models.fused.products import Refs

# Entries of the cache that are read at a time.
ENTRIES = 64
WARPS = 4

# The output, and the keys and values with the new entry.
Result: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


class _Softmax(NamedTuple):
    """A softmax over the entries read so far, which `_kernel` divides by `total` at the end.

    Attributes:
      largest: () the largest logit.
      total: () Σ exp(logit − largest).
      weighted: (K,) Σ exp(logit − largest)·v.
    """

    largest: jax.Array
    total: jax.Array
    weighted: jax.Array


def attend_cached(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    angles: jax.Array,
    start: jax.Array,
    *,
    interpret: bool = False,
) -> Result:
    """Computes softmax(q·kᵀ/√K)·v of position `start` over the entries 0 to `start`.

    q and k are rotated first, in float32, as `apply_rope` does it. The softmax is
    float32.

    Args:
      qkv: (B, 3, N, K), queries, keys and values of the position, not rotated.
      keys: (B, N, S, K), of which the entries before `start` are filled.
      values: (B, N, S, K).
      angles: (K/2,), in radians.
      start: () int32; from S on it is taken as S − 1, as XLA's updates of slices do it.
      interpret: whether to interpret the kernel, on any platform, which is slow.

    Returns:
      (B, N, K) in qkv's dtype, and keys and values with the position's entries at `start`.
    """
    start = jnp.minimum(start, keys.shape[2] - 1)
    arrays = (qkv, keys, values, angles, start)
    if interpret:
        return _run(*arrays, interpret=True)
    K = qkv.shape[-1]
    if K & (K - 1):
        return _plain(*arrays)  # Triton's tiles have sides that are powers of two.
    return kernels.on_gpus(_run, _plain)(*arrays)


def _plain(
    qkv: jax.Array, keys: jax.Array, values: jax.Array, angles: jax.Array, start: jax.Array
) -> Result:
    """`attend_cached` in plain JAX."""
    q, k, v = (qkv[:, None, i] for i in range(3))
    cache = HeadsFirst(keys, values).written(apply_rope(k, angles[None]), v, start)
    out = cache.attended(apply_rope(q, angles[None]), start)
    return out[:, 0], cache.keys, cache.values


def _run(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    angles: jax.Array,
    start: jax.Array,
    interpret: bool = False,
) -> Result:
    """`attend_cached` by the kernel."""
    # Imported here, because it takes a while, and few runs have this kernel.
    from jax.experimental.pallas import triton

    B, N, _, K = keys.shape
    cos = jnp.repeat(jnp.cos(angles), 2)
    sin = jnp.repeat(jnp.sin(angles), 2) * jnp.where(jnp.arange(K) % 2 == 1, 1.0, -1.0)
    # On average over a sequence half of the cache is filled.
    cache_bytes = keys.size * keys.dtype.itemsize
    accessed = cache_bytes + 4 * B * N * K * qkv.dtype.itemsize
    fused = pl.pallas_call(
        _kernel,
        grid=(B, N),
        out_shape=(
            jax.ShapeDtypeStruct((B, N, K), qkv.dtype),
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ),
        input_output_aliases={1: 1, 2: 2},
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        metadata={kernels.BYTES_ACCESSED: str(accessed)},
    )
    return fused(qkv, keys, values, cos, sin, start.reshape(1))


def _rotated(x: jax.Array, partner: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel pairs in float32.

    Args:
      x: the channels (K,).
      partner: the other channel of each one's pair, (K,).
      cos: (K,).
      sin: (K,), negative for the first channel of each pair.
    """
    y = x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin
    return y.astype(x.dtype)


def _kernel(
    qkv: Refs,
    old_keys: Refs,
    old_values: Refs,
    cos: Refs,
    sin: Refs,
    start: Refs,
    out: Refs,
    keys: Refs,
    values: Refs,
) -> None:
    """Computes one head of one image.

    The old entries and the new ones are the same memory. The position's own entry is not read from
    it, since other threads of the kernel may not have written it yet.
    """
    from jax.experimental.pallas import triton

    b = pl.program_id(0)
    n = pl.program_id(1)
    K = qkv.shape[-1]
    partner = jnp.arange(K) ^ 1
    position = start[0]

    def rotated(i: int) -> jax.Array:
        return _rotated(qkv[b, i, n, :], qkv[b, i, n, partner], cos[...], sin[...])

    q = rotated(0).astype(jnp.float32)
    k = rotated(1).astype(keys.dtype)
    v = qkv[b, 2, n, :].astype(values.dtype)
    keys[b, n, position, :] = k
    values[b, n, position, :] = v

    def add(j: jax.Array, before: _Softmax) -> _Softmax:
        """Adds some entries."""
        entries = j * ENTRIES + jnp.arange(ENTRIES)
        filled = entries < position
        part = (b, n, pl.ds(j * ENTRIES, ENTRIES), slice(None))
        read = functools.partial(triton.load, mask=filled[:, None], other=0.0)
        some_keys = read(old_keys.at[part]).astype(jnp.float32)
        some_values = read(old_values.at[part]).astype(jnp.float32)
        logits = jnp.sum(some_keys * q[None], axis=-1) * K**-0.5
        logits = jnp.where(filled, logits, -jnp.inf)
        largest = jnp.maximum(before.largest, jnp.max(logits))
        weights = jnp.exp(logits - largest)
        shrunk = jnp.exp(before.largest - largest)
        total = before.total * shrunk + jnp.sum(weights)
        weighted = before.weighted * shrunk + jnp.sum(weights[:, None] * some_values, axis=0)
        return _Softmax(largest, total, weighted)

    first = jnp.sum(q * k.astype(jnp.float32)) * K**-0.5
    alone = _Softmax(first, jnp.float32(1), v.astype(jnp.float32))
    steps = (position + ENTRIES - 1) // ENTRIES
    whole = jax.lax.fori_loop(0, steps, add, alone)
    out[b, n, :] = (whole.weighted / whole.total).astype(out.dtype)
