"""Attention of a whole sequence to itself, by the kernel that suits the platform.

Dimensions:
  B    batch                       N    heads, K the head dimension
  T    positions                   S    T, rounded up to a multiple of the TPU's 128 lanes
The platform is the one that a program is lowered for. So a machine without a TPU can compile, ahead
of time, what a TPU runs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from sphere_ar_jax.models import kernels

LANES = 128
# Axis of the mesh over which heads are split. All other axes split rows of the batch.
HEADS = 'tensor'
# Number of positions from which a TPU's kernel pays: BUILD_NOTES.md, "Attention".
LONG = 512


def attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Computes softmax(q·kᵀ/√K)·v, with the softmax in float32.

    In bfloat16 GPUs run cuDNN's flash attention where K is a multiple of 8 up to 128 and, unless
    causal, T is even. TPUs run splash attention where T ≥ 512, K = 64, and the program names a mesh
    (`jax.sharding.use_abstract_mesh`) that splits rows and heads evenly. Each device then computes
    its own part. All other calls run `jax.nn.dot_product_attention`.

    A bfloat16 call keeps only q, k and v for its backward pass, which computes the weights again:
    no array (B, N, T, T) outlives the call. Tangents in forward mode come from the plain attention
    everywhere.

    Args:
      q: queries (B, T, N, K).
      k: keys (B, T, N, K), of q's dtype.
      v: values (B, T, N, K), of q's dtype.
      causal: whether a position sees only itself and the positions before it.

    Returns:
      (B, T, N, K) in q's dtype.
    """
    if q.dtype == jnp.bfloat16:
        return _by_platform(causal)(q, k, v)
    return _plain(q, k, v, causal)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    T = q.shape[1]

    def even(x: jax.Array) -> jax.Array:
        """Pads x to an even number of positions: JAX differentiates no other lengths."""
        return jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0)))

    attention = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
    try:
        out = attention(even(q), even(k), even(v), is_causal=causal)
    except NotImplementedError:  # a subclass of RuntimeError
        raise
    except RuntimeError:
        return _plain(q, k, v, causal)  # the machine that traces this has no cuDNN
    return out[:, :T]


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, interpret: bool = False
) -> jax.Array:
    """Runs splash attention. K must be a power of four, so that q/√K rounds nothing."""
    # Imported here, because it takes a while, and other platforms do without.
    from jax.experimental.pallas.ops.tpu import splash_attention

    T, N, K = q.shape[1:]
    S = -(-T // LANES) * LANES
    block = max(b for b in range(LANES, LONG + 1, LANES) if S % b == 0)
    layout = splash_attention.QKVLayout.SEQ_MINOR
    block_sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    mask: splash_attention.Mask
    if causal:  # This also hides the positions that T is padded with.
        mask = splash_attention.CausalMask((S, S))
    else:
        mask = splash_attention.NumpyMask(np.broadcast_to(np.arange(S) < T, (S, S)))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * N),
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def pad(x: jax.Array) -> jax.Array:
        """Turns (B, T, N, K) into (B, N, S, K)."""
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, S - T), (0, 0)))

    scaled = q * np.asarray(K**-0.5, q.dtype)
    out = jax.vmap(kernel)(pad(scaled), pad(k), pad(v))
    return out[:, :, :T].swapaxes(1, 2)


def _forward(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes (q, k, v) → out.

    It calls `jax.vjp` as `_backward` does, so that under remat XLA merges the two calls.
    """

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, _ = jax.vjp(kernel, q, k, v)
        return out

    return forward


def _backward(kernel: Callable[..., jax.Array]) -> Callable[..., kernels.Arrays]:
    """Makes (q, k, v, gradient of out) → gradients of q, k and v."""

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> kernels.Arrays:
        _, transposed = jax.vjp(kernel, q, k, v)
        return transposed(g)

    return backward


class _Split(NamedTuple):
    """How `jax.shard_map` gives each device its own rows and heads of arrays (B, T, N, K).

    Attributes:
      axes: the axes of the mesh that no enclosing `jax.shard_map` has made manual.
      spec: how they split rows and heads.
    """

    axes: frozenset[str]
    spec: PartitionSpec


def _automatic_split(B: int, N: int) -> _Split | None:
    """How to split arrays (B, T, N, K) along the axes of the mesh that are not manual yet.

    None where there are no such axes, and where they do not split rows or heads evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = [axis for axis, kind in kinds if kind != AxisType.Manual]
    if not axes:
        return None
    rows = tuple(axis for axis in axes if axis != HEADS)
    heads = tuple(axis for axis in axes if axis == HEADS)
    for size, split in ((B, rows), (N, heads)):
        if size % math.prod(mesh.shape[axis] for axis in split):
            return None
    spec = PartitionSpec(rows or None, None, heads or None, None)
    return _Split(frozenset(axes), spec)


def _choose(
    direction: Callable[[Callable[..., jax.Array]], Callable[..., Any]],
    causal: bool,
    *arrays: jax.Array,
) -> Any:
    """Calls `direction(kernel)` with the arrays, for the kernel of the platform."""

    def directed(kernel: Callable[..., jax.Array]) -> Callable[..., Any]:
        return direction(functools.partial(kernel, causal=causal))

    B, T, N, K = arrays[0].shape
    chosen = {}
    part = _automatic_split(B, N)
    if K % 8 == 0 and K <= 128 and (causal or T % 2 == 0):
        chosen['cuda'] = directed(_cudnn)  # without a mesh XLA splits it by itself
    if T >= LONG and K == 64 and part is not None:
        chosen['tpu'] = directed(_splash)
    if part is not None:
        each = functools.partial(
            jax.shard_map,
            in_specs=part.spec,
            out_specs=part.spec,
            axis_names=part.axes,
            check_vma=False,
        )
        chosen = {platform: each(kernel) for platform, kernel in chosen.items()}
    return jax.lax.platform_dependent(*arrays, **chosen, default=directed(_plain))


@functools.cache
def _by_platform(causal: bool) -> Callable[..., jax.Array]:
    """Makes a function of q, k and v that runs the platform's kernel in the place of `_plain`.

    The platform is known only when the program is lowered, after differentiation. So the same
    arrays, q, k and v, are kept for the backward pass on all platforms.
    """

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _choose(_forward, causal, q, k, v)

    def backward(arrays: kernels.Arrays, g: jax.Array) -> kernels.Arrays:
        return _choose(_backward, causal, *arrays, g)

    return kernels.fast(functools.partial(_plain, causal=causal), backward, forward)


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the channel pairs (0, 1), (2, 3), … of each head, in float32.

    Args:
      x: (B, T, N, K).
      angles: (T, K/2), in radians.

    Returns:
      (B, T, N, K) in x's dtype.
    """
    cos = jnp.cos(angles)[None, :, None, :]
    sin = jnp.sin(angles)[None, :, None, :]
    even = x[..., 0::2].astype(jnp.float32)
    odd = x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
