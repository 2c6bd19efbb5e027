"""Sampling as one program: prefill, a scan over tokens with a static cache, in it the head's
sampler (paper §3.4).

Dimensions:
  B  images      R  rows: B, or 2B with guidance (conditional rows, then null rows) L  tokens      d
  latent dimension m  standard normal draws per token: x₀, and for a stochastic solver one for each
  of its noisy steps
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sphere_ar_jax.flow.guidance import Guidance, guidance_scales
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.conditions import Labels
from sphere_ar_jax.sphere import geometry


def sample_tokens(
    ar: AR,
    params: Any,
    labels: Labels,
    keys: jax.Array | None,
    options: Options,
    guidance_scale: jax.Array | float | None = None,
    temperature: jax.Array | float = 1.0,
    noise: tuple[jax.Array, jax.Array] | None = None,
    project: Callable[[jax.Array], jax.Array] = geometry.project,
) -> jax.Array:
    """Draw the tokens of B images.

    Args:
      ar: the model. params: its parameters; stacked ones are copied apart first, see
        `ar.unstacked`.
      labels: of B images, see `conditions`. options: what the sampler does.
      keys: (B,) PRNG keys, one per image (fold them by global index), or None if noise is given.
      guidance_scale: () s, needed with guidance and refused without. temperature: () factor of x₀'s
        noise.
      noise: explicit draws instead of keys: (first (m, R, d), rest (L − 1, m, B, d)); with
        guidance, the null rows of `first` are used only where token 0 goes apart.
      project: the tokenizer's `Posterior.project`; every token goes through it before it is fed
        back.
    Returns:
      z (B, L, d) float32. Raises ValueError for an option without use or misshapen noise.
    """
    guided = options.guidance is not None
    if guided != (guidance_scale is not None):
        raise ValueError('give guidance_scale with a guidance schedule, and only then')
    if (keys is None) == (noise is None):
        raise ValueError('give either keys or noise')
    ar, params = unstacked(ar, params)
    variables = {'params': params}
    B = len(jax.tree.leaves(labels)[0])
    L = ar.num_tokens
    d = ar.latent_dim
    m = options.num_draws(L)
    expected = (m, 2 * B if guided else B, d), (L - 1, m, B, d)
    if noise is not None and tuple(n.shape for n in noise) != expected:
        raise ValueError(
            f'noise has the shapes {tuple(n.shape for n in noise)}, but these options need {expected}'
        )

    def draw(keys, k):
        """Standard normals (m, B, d) of token k, one key per image."""

        def one(key):
            return jax.random.normal(jax.random.fold_in(key, k), (m, d))

        return jax.vmap(one, out_axes=1)(keys)

    def double(x, axis=0):
        return jnp.concatenate([x, x], axis=axis) if guided else x

    scales = guidance_scales(guidance_scale, L, options.guidance) if guided else jnp.ones(L)
    plan = options.plan(L)
    prepared = ar.head.prepare(params['head'], plan)

    rows = labels
    if guided:  # all null rows begin alike: one is computed
        rows = jax.tree.map(
            lambda a, null: jnp.concatenate([a, null[:1]]), labels, ar.condition.null(labels)
        )
    c, cache = ar.apply(variables, rows, method='prefill')
    if guided:
        copies = jnp.minimum(jnp.arange(2 * B), B)
        c, cache = jax.tree.map(lambda a: jnp.take(a, copies, axis=0), (c, cache))
    # Token 0 goes apart, or not, by its scale, its null rows' noise, and this.
    first_apart = options.guidance == 'linear' and options.first_token_apart is not False
    apart = (scales == 1).at[0].set((scales[0] == 1) & (options.first_token_apart is not False))
    if noise is not None:
        first, rest = noise
        if guided:
            first = jnp.where(apart[0], first, double(first[:, :B], 1))
        noise = jnp.concatenate([first[None], double(rest, 2)])

    def step(carry, inputs):
        c, cache = carry
        k, which, scale, apart, draws = inputs
        if noise is None:
            draws = draw(keys, k)
            if guided:
                null = (
                    jax.lax.cond(k == 0, lambda: draw(keys, L), lambda: draws)
                    if first_apart
                    else draws
                )
                draws = jnp.concatenate([draws, null], axis=1)
        draws = jnp.concatenate([temperature * draws[:1], draws[1:]])
        solver = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, which, keepdims=False), prepared
        )
        guidance = Guidance(scale, apart, options.guidance_interval) if guided else None
        z = project(ar.head.draw_token(params['head'], c, draws, solver, guidance))
        # Runs once more after the last token, so that token 0 shares the program
        return ar.apply(variables, z, k + 1, cache, method='decode_step'), z[:B]

    _, z = jax.lax.scan(
        step, (c, cache), (jnp.arange(L), jnp.asarray(plan.which), scales, apart, noise)
    )
    return z.swapaxes(0, 1)
