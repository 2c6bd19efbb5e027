"""Attention of a whole sequence to itself, by the kernel that suits the platform.

Dimensions:
  B    batch                       N    heads, K the head dimension
  T    positions                   S    T, rounded up to a multiple of the TPU's 128 lanes
The platform is the one that a program is lowered for: ahead of time, a machine without a TPU
compiles what a TPU runs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from sphere_ar_jax.models import kernels

LANES = 128
HEADS = 'tensor'  # axis of the mesh over which heads are split; all others split rows of the batch
LONG = 512  # positions from which on a TPU's kernel pays: BUILD_NOTES.md, "Attention"


def attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """softmax(q·kᵀ/√K)·v, softmax in float32; causal: over a position itself and those before it.

    In bfloat16 GPUs run cuDNN's flash attention where K is a multiple of 8 up to 128 and, unless
    causal, T is even. TPUs run splash attention where T ≥ 512, K = 64 and the program names its
    mesh (`jax.sharding.use_abstract_mesh`), on which rows and heads are then split evenly: each
    device gets its own part, no other. All else is `jax.nn.dot_product_attention`. The backward
    pass of a bfloat16 call keeps q, k and v only, and computes the weights again: no array
    (B, N, T, T) outlives it. Tangents in forward mode come from the plain attention everywhere.

    Args:
      q, k, v: (B, T, N, K), of one dtype.
      causal: whether a position sees those before it and itself alone.
    Returns:
      (B, T, N, K) in that dtype.
    """
    if q.dtype == jnp.bfloat16:
        return _by_platform(causal)(q, k, v)
    return _plain(q, k, v, causal)


def _plain(q, k, v, causal):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def _cudnn(q, k, v, causal):
    T = q.shape[1]

    def even(x):
        """x with an even number of positions: JAX differentiates no other lengths."""
        return jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0)))

    attention = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
    try:
        out = attention(even(q), even(k), even(v), is_causal=causal)
    except NotImplementedError:  # a RuntimeError too
        raise
    except RuntimeError:
        return _plain(q, k, v, causal)  # where this is traced there is no cuDNN
    return out[:, :T]


def _splash(q, k, v, causal, interpret=False):
    """K must be a power of four, so that q/√K rounds nothing."""
    T, N, K = q.shape[1:]
    S = -(-T // LANES) * LANES
    block = max(b for b in range(LANES, LONG + 1, LANES) if S % b == 0)
    names = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
    layouts = ('q_layout', 'k_layout', 'v_layout')
    options = {f'block_{name}': block for name in names}
    options |= dict.fromkeys(layouts, splash_attention.QKVLayout.SEQ_MINOR)
    if causal:  # which hides what T is filled up with
        mask = splash_attention.CausalMask((S, S))
    else:
        mask = splash_attention.NumpyMask(np.broadcast_to(np.arange(S) < T, (S, S)))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * N),
        block_sizes=splash_attention.BlockSizes(**options),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def fill(x):
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, S - T), (0, 0)))

    out = jax.vmap(kernel)(fill(q * np.asarray(K**-0.5, q.dtype)), fill(k), fill(v))
    return out[:, :, :T].swapaxes(1, 2)


def _forward(kernel):
    """(q, k, v) → out, by the call that `_backward` makes again: under remat XLA merges the two."""
    return lambda q, k, v: jax.vjp(kernel, q, k, v)[0]


def _backward(kernel):
    """(q, k, v, gradient of out) → their gradients."""
    return lambda q, k, v, g: jax.vjp(kernel, q, k, v)[1](g)


def _own_part(B, N):
    """How the program's mesh splits arrays (B, T, N, K); None without a mesh or an even split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    rows = tuple(axis for axis in mesh.axis_names if axis != HEADS)
    if B % math.prod(mesh.shape[axis] for axis in rows) or N % mesh.shape.get(HEADS, 1):
        return None
    return PartitionSpec(rows, None, HEADS if HEADS in mesh.axis_names else None, None)


def _choose(direction, causal, *arrays):
    """direction(kernel) of the arrays, by the kernel of the platform."""

    def of(kernel):
        return direction(functools.partial(kernel, causal=causal))

    B, T, N, K = arrays[0].shape
    chosen = {}
    part = _own_part(B, N)
    if K % 8 == 0 and K <= 128 and (causal or T % 2 == 0):
        chosen['cuda'] = of(_cudnn)  # XLA can split this one itself
    if T >= LONG and K == 64 and part is not None:
        chosen['tpu'] = of(_splash)
    if part is not None:
        each = functools.partial(jax.shard_map, in_specs=part, out_specs=part, check_vma=False)
        chosen = {platform: each(kernel) for platform, kernel in chosen.items()}
    return jax.lax.platform_dependent(*arrays, **chosen, default=of(_plain))


@functools.cache
def _by_platform(causal):
    """`_plain` by the platform's kernel, as a function of q, k and v.

    Lowering comes after differentiation, which must therefore be the same on all platforms: it
    keeps q, k and v.
    """
    return kernels.fast(
        plain=functools.partial(_plain, causal=causal),
        forward=lambda q, k, v: _choose(_forward, causal, q, k, v),
        backward=lambda arrays, g: _choose(_backward, causal, *arrays, g),
    )
