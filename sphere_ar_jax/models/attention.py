"""Attention of a whole sequence to itself, by the kernel that suits the platform (spec §4).

Dimensions:
  B    batch                       N    heads, K the head dimension
  T    positions                   S    T, rounded up to a multiple of the TPU's 128 lanes
The platform is that which a program is lowered for: ahead of time, a machine without a TPU compiles what a TPU runs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

LANES = 128
HEADS = 'tensor'  # axis of the mesh over which heads are split; rows of the batch are split over all others
LONG = 512  # positions from which on a TPU's kernel pays: BUILD_NOTES.md, "Attention"


def attend(q, k, v, causal):
    """softmax(q·kᵀ/√K)·v, softmax in float32; causal: over a position itself and those before it only.

    In bfloat16 GPUs run cuDNN's flash attention where K is a multiple of 8 up to 128 and, unless causal, T is even.
    TPUs run splash attention where T ≥ 512, K = 64 and the program names its mesh (`jax.sharding.use_abstract_mesh`),
    on which rows and heads are then split evenly: each device gets its own part, no other. All else is
    `jax.nn.dot_product_attention`. Of a bfloat16 call the backward pass keeps q, k and v only, and computes the weights
    again: no array (B, N, T, T) outlives it.

    Args:
      q, k, v: (B, T, N, K), of one dtype. causal: bool.
    Returns:
      (B, T, N, K) in that dtype. Differentiable once, in reverse.
    """
    return (_by_platform if q.dtype == jnp.bfloat16 else _plain)(q, k, v, causal)


def _plain(q, k, v, causal):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def _cudnn(q, k, v, causal):
    T = q.shape[1]
    even = lambda x: jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0)))  # JAX differentiates no other lengths
    try:
        out = jax.nn.dot_product_attention(even(q), even(k), even(v), is_causal=causal, implementation='cudnn')
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
    minor = dict.fromkeys(('q_layout', 'k_layout', 'v_layout'), splash_attention.QKVLayout.SEQ_MINOR)
    sizes = splash_attention.BlockSizes(**{f'block_{name}': block for name in names}, **minor)
    if causal:  # which hides what T is filled up with
        mask = splash_attention.CausalMask((S, S))
    else:
        mask = splash_attention.NumpyMask(np.broadcast_to(np.arange(S) < T, (S, S)))
    heads = splash_attention.MultiHeadMask([mask] * N)
    kernel = splash_attention.make_splash_mha(
        heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    fill = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, S - T), (0, 0)))
    out = jax.vmap(kernel)(fill(q * np.asarray(K**-0.5, q.dtype)), fill(k), fill(v))
    return out[:, :, :T].swapaxes(1, 2)


def _forward(kernel):
    """(q, k, v) → out, by the very call that `_backward` makes again: under remat XLA merges the two."""
    return lambda q, k, v: jax.vjp(kernel, q, k, v)[0]


def _backward(kernel):
    """(q, k, v, gradient of out) → their gradients."""
    return lambda q, k, v, g: jax.vjp(kernel, q, k, v)[1](g)


def _own_part(B, N):
    """How the mesh of the program, if it names one, splits arrays (B, T, N, K); None where there is no even split."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in mesh.axis_names if axis != HEADS)
    split = not mesh.empty and B % math.prod(mesh.shape[axis] for axis in rows) == N % mesh.shape.get(HEADS, 1) == 0
    return PartitionSpec(rows, None, HEADS if HEADS in mesh.axis_names else None, None) if split else None


def _choose(direction, causal, *arrays):
    """direction(kernel) of the arrays, by the kernel of the platform."""
    of = lambda kernel: direction(functools.partial(kernel, causal=causal))
    B, T, N, K = arrays[0].shape
    kernels, part = {}, _own_part(B, N)
    if K % 8 == 0 and K <= 128 and (causal or T % 2 == 0):
        kernels['cuda'] = of(_cudnn)  # XLA can split this one itself
    if T >= LONG and K == 64 and part is not None:
        kernels['tpu'] = of(_splash)
    if part is not None:
        each = functools.partial(jax.shard_map, in_specs=part, out_specs=part, check_vma=False)
        kernels = {platform: each(kernel) for platform, kernel in kernels.items()}
    return jax.lax.platform_dependent(*arrays, **kernels, default=of(_plain))


# Lowering comes after differentiation, which must therefore be the same on all platforms: it keeps q, k and v.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_platform(q, k, v, causal):
    return _choose(_forward, causal, q, k, v)


_by_platform.defvjp(
    lambda q, k, v, causal: (_by_platform(q, k, v, causal), (q, k, v)),
    lambda causal, qkv, g: _choose(_backward, causal, *qkv, g),
)
