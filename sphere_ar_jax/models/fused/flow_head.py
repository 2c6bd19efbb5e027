"""A flow head's evaluations in the sampler, made of few kernels.

There are two for a block, one for the input and one for the last layer.

The parameters are those of a `heads.flow.FlowHead` with scan=False. Their kernels have the dtype of
the products (`transformer.cast_kernels`).

Dimensions:
  E  times                   M  width of the head                  d  latent dimension
  R  rows of the sampler     Q  parts of a modulation: scale, shift and gate of each adaLN group,
                                and scale and shift of the last layer
"""

from typing import Any

import jax
import jax.numpy as jnp

from sphere_ar_jax.models.fused.blocks import last_layer, residual_block
from sphere_ar_jax.models.fused.products import Modulations, added_product

Params = dict[str, Any]


def _numbered(params: Params, name: str) -> list[Params]:
    """The parameters `name`_0, `name`_1, …, in their order."""
    count = sum(key.startswith(f'{name}_') for key in params)
    return [params[f'{name}_{i}'] for i in range(count)]


def join(params: Params) -> tuple[jax.Array, jax.Array]:
    """Joins the linear maps that make all modulations, so that they are one product.

    Args:
      params: of the head.

    Returns:
      A kernel (M, Q·M) and a bias (Q·M,).
    """
    maps = [group['ada'] for group in _numbered(params, 'res_groups')] + [params['final_ada']]
    M = maps[0]['kernel'].shape[0]
    kernel = jnp.concatenate([one['kernel'].reshape(M, -1) for one in maps], axis=-1)
    bias = jnp.concatenate([one['bias'].reshape(-1) for one in maps])
    return kernel, bias


def modulation_table(
    joined: tuple[jax.Array, jax.Array], t_emb: jax.Array, c_emb: jax.Array
) -> jax.Array:
    """Computes the modulations of every pair of a time and a condition.

    Args:
      joined: what `join` returned.
      t_emb: (E, M) embeddings of times.
      c_emb: (R, M) embeddings of conditions.

    Returns:
      (E, R, Q, M) in the dtype of `joined`.
    """
    kernel, bias = joined
    y = jax.nn.silu(t_emb[:, None] + c_emb[None])
    E, R, M = y.shape
    table = y.reshape(E * R, M).astype(kernel.dtype) @ kernel + bias[None]
    return table.reshape(E, R, -1, M)


def velocity(params: Params, x: jax.Array, modulations: Modulations) -> jax.Array:
    """Computes the velocity of the first rows under given modulations.

    Args:
      params: of the head.
      x: (R', d) float32 with R' ≤ R.
      modulations: of R rows.

    Returns:
      (R', d) float32.
    """
    first = params['input_proj']
    x = added_product(x, first['kernel'], first['bias'], dtype=first['kernel'].dtype)
    part = 0
    for group in _numbered(params, 'res_groups'):
        for block in _numbered(group, 'blocks'):
            x = residual_block(block, x, modulations, part)
        part += 3
    return last_layer(params['final_linear'], x, modulations, part).astype(jnp.float32)
