"""Blocks in the sampler, made of few kernels: 2 for one of a head, 5 for one of a transformer.

Each function computes what the Flax module of its name computes, from the module's parameters,
whose kernels have the dtype of the products (`transformer.cast_kernels`).

Dimensions:
  R  rows                    D  width                      K  numbers of a head
  B  images                  N  heads                      S  length of the cache
"""

from typing import Any

import jax
import jax.numpy as jnp

from sphere_ar_jax.models.cache import HeadsFirst
from sphere_ar_jax.models.fused.cached_attention import attend_cached
from sphere_ar_jax.models.fused.products import Modulations, Norm, added_product, normed_product


def residual_block(
    params: dict[str, Any],
    x: jax.Array,
    modulations: Modulations,
    part: int,
) -> jax.Array:
    """Computes x + gate · SwiGLU(LayerNorm(x)·(1 + scale) + shift), the block of a flow head.

    Args:
      params: of `heads.flow.ResBlock`.
      x: (R, D).
      modulations: of D features.
      part: index of the scale among the Q parts; shift and gate are the next two.

    Returns:
      (R, D) in the kernels' dtype.
    """
    norm = Norm(params['norm']['scale'], params['norm']['bias'])
    first = params['w1']
    second = params['w2']
    h = normed_product(
        x, norm, modulations, first['kernel'], first['bias'], centred=True, first=part
    )
    return added_product(
        h, second['kernel'], second['bias'], modulations, x, dtype=h.dtype, gate=part + 2
    )


def last_layer(
    params: dict[str, Any],
    x: jax.Array,
    modulations: Modulations,
    part: int,
) -> jax.Array:
    """Computes linear(LayerNorm(x)·(1 + scale) + shift), the last layer of a flow head.

    Args:
      params: of the linear layer D → d.
      x: (R, D).
      modulations: of D features.
      part: index of the scale among the Q parts; the shift is the next.

    Returns:
      (R, d) in the kernel's dtype.
    """
    kernel = params['kernel'][:, None]
    bias = params['bias'][None]
    return normed_product(x, Norm(), modulations, kernel, bias, centred=True, first=part)


def transformer_block(
    params: dict[str, Any],
    x: jax.Array,
    angles: jax.Array,
    cache: HeadsFirst,
    start: jax.Array,
) -> tuple[jax.Array, HeadsFirst]:
    """Runs `transformer.Block` for one position, over a cache.

    Args:
      params: of the block.
      x: (B, D) float32.
      angles: (K/2,), in radians.
      cache: keys and values, of which the entries before `start` are filled.
      start: () int32, see `attend_cached`.

    Returns:
      (B, D) float32, and the cache with the position's entries at `start`.
    """
    B, D = x.shape
    keys, values = cache
    _, N, _, K = keys.shape
    qkv_kernel = params['attention']['qkv']['kernel'].reshape(D, 1, 3 * D)
    out_kernel = params['attention']['out']['kernel'].reshape(D, D)
    first = params['mlp']['w1']['kernel']
    second = params['mlp']['w2']['kernel']

    norm = Norm(params['attention_norm']['scale'])
    qkv = normed_product(x, norm, None, qkv_kernel, centred=False).reshape(B, 3, N, K)
    attended, keys, values = attend_cached(qkv, keys, values, angles, start)
    x = added_product(attended.reshape(B, D), out_kernel, x=x, dtype=jnp.float32)
    norm = Norm(params['mlp_norm']['scale'])
    h = normed_product(x, norm, None, first, centred=False)
    return added_product(h, second, x=x, dtype=jnp.float32), HeadsFirst(keys, values)
