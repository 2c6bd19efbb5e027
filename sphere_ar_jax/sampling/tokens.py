"""Sampling as one program: prefill, a scan over tokens with a static cache, in it the solver's loop (spec §7).

Dimensions:
  B  images      R  rows: B, or 2B with guidance (conditional rows, then null rows)
  L  tokens      d  latent dimension      M  width of the flow head
  E  evaluations of the flow head for a token, at most     U  different solver tables among the tokens
  m  standard normal draws per token: x₀, and for a stochastic solver one for each of its noisy steps
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from sphere_ar_jax.flow import guidance, solvers
from sphere_ar_jax.models.ar import unstacked
from sphere_ar_jax.sphere import geometry

# Rows that one product of the flow head should have at least: below, it waits for its weights rather than computes.
PRODUCT_ROWS = 256


def chunk_size(evaluations, rows):
    """Evaluations of a token whose modulations are one product, for so many rows of the sampler on a device."""
    products = -(-evaluations // max(1, PRODUCT_ROWS // rows))
    return -(-evaluations // products)


def draw_token(ar, variables, options, k, t_emb, scale, temperature, c, noise, apart):
    """Draws token k for every row: conditions c (R, D), noise (m, R, d) → z (R, d) on the sphere.

    t_emb (U, E, M): embeddings of all tables' times. `apart`: () bool, whether conditional and null rows go their own
    ways (each with its own noise and velocity).
    """
    plan = options.plan(ar.num_tokens)
    R, E = len(c), t_emb.shape[1]
    u = jnp.asarray(plan.which)[k]
    select = lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), u, keepdims=False)
    c_emb = ar.apply(variables, c, method='embed_condition')
    t, embedded = select(plan.tables.t), select(t_emb)
    low, high = options.guidance_interval or (0.0, 1.0)
    high = high if high < 1 else math.inf  # Heun's last evaluation is at t = 1

    def prepare(index):
        index = jnp.minimum(index, E - 1)
        modulation = ar.apply(variables, embedded[index], c_emb, method='modulation')
        return modulation, (low <= t[index]) & (t[index] < high) | apart

    def velocity(x, prepared):
        modulation, everywhere = prepared
        evaluate = lambda x, modulation: ar.apply(variables, x, modulation, method='velocity')
        if options.guidance is None:
            return evaluate(x, modulation)

        def guided(x, modulation):
            v = evaluate(x, modulation)
            guided = guidance.guide(*jnp.split(v, 2), scale)
            return jnp.where(apart, v, jnp.concatenate([guided, guided]))

        def unguided(x, modulation):
            v = evaluate(*jax.tree.map(lambda a: a[: R // 2], (x, modulation)))
            return jnp.concatenate([v, v])

        if options.guidance_interval is None:
            return guided(x, modulation)
        return jax.lax.cond(everywhere, guided, unguided, x, modulation)

    z = solvers.integrate(
        velocity, temperature * noise[0], select(plan.tables.weights), noise[1:] if len(noise) > 1 else None,
        count=jnp.asarray(plan.count)[u], prepare=prepare, chunk=chunk_size(E, R),
    )  # fmt: skip
    return geometry.project(z)


def sample_tokens(ar, params, class_id, keys, options, guidance_scale=None, temperature=1.0, noise=None):
    """Draws the tokens of B images.

    Args:
      ar: `ar.AR`. params: its parameters; stacked ones are copied apart first, see `ar.unstacked`.
      class_id: (B,) int32. options: `Options`.
      keys: (B,) PRNG keys, one per image (fold them by global index), or None if noise is given.
      guidance_scale: () s, needed with guidance and refused without. temperature: () factor of x₀'s noise.
      noise: explicit draws instead of keys: (first (m, R, d), rest (L − 1, m, B, d)); with guidance, the null rows
        of `first` are used only where token 0 goes apart.
    Returns:
      z (B, L, d) float32, ‖z‖ = √d. Source: spec §7. Raises ValueError for an option without use or misshapen noise.
    """
    guided = options.guidance is not None
    if guided != (guidance_scale is not None):
        raise ValueError('give guidance_scale with a guidance schedule, and only then')
    if (keys is None) == (noise is None):
        raise ValueError('give either keys or noise')
    ar, params = unstacked(ar, params)
    variables = {'params': params}
    B, L, d, m = len(class_id), ar.num_tokens, ar.latent_dim, options.num_draws(ar.num_tokens)
    expected = (m, 2 * B if guided else B, d), (L - 1, m, B, d)
    if noise is not None and tuple(n.shape for n in noise) != expected:
        raise ValueError(f'noise has the shapes {tuple(n.shape for n in noise)}, but these options need {expected}')
    draw = jax.vmap(lambda key, k: jax.random.normal(jax.random.fold_in(key, k), (m, d)), (0, None), 1)
    double = lambda x, axis=0: jnp.concatenate([x, x], axis=axis) if guided else x
    scales = guidance.guidance_scales(guidance_scale, L, options.guidance) if guided else jnp.ones(L)
    # Once for all tokens and rows: the embeddings of the solvers' times.
    times = options.plan(L).tables
    t_emb = ar.apply(variables, *map(jnp.asarray, (times.t, times.h)[: 1 + ar.average]), method='embed_time')
    token = partial(draw_token, ar, variables, options)

    c, cache = ar.apply(variables, jnp.append(class_id, ar.num_classes) if guided else class_id, method='prefill')
    if guided:  # all null rows begin alike: one was computed
        rows = jnp.minimum(jnp.arange(2 * B), B)
        c, cache = jax.tree.map(lambda a: jnp.take(a, rows, axis=0), (c, cache))
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
        k, scale, apart, draws = inputs
        if noise is None:
            draws = draw(keys, k)
            if guided:
                null = jax.lax.cond(k == 0, lambda: draw(keys, L), lambda: draws) if first_apart else draws
                draws = jnp.concatenate([draws, null], axis=1)
        z = token(k, t_emb, scale, temperature, c, draws, apart)
        # After the last token once too often: so that token 0 needs no program of its own
        return ar.apply(variables, z, k + 1, cache, method='decode_step'), z[:B]

    _, z = jax.lax.scan(step, (c, cache), (jnp.arange(L), scales, apart, noise))
    return z.swapaxes(0, 1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def draw_images(ar, vae, options, ar_params, vae_params, class_id, index, key, guidance_scale, temperature):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    z = sample_tokens(ar, ar_params, class_id, keys, options, guidance_scale, temperature)
    return vae.apply({'params': vae_params}, z, method='decode'), z


def sample_images(ar, vae, options, ar_params, vae_params, class_id, index, key, guidance_scale=None, temperature=1.0):
    """Draws B images: `sample_tokens`, then the S-VAE decoder, in one compiled program.

    One compilation for given models, options and B, whatever the labels, key, scale or temperature.

    Args:
      class_id, index: (B,) int, the class and the global number of each image. key: one PRNG key; image i draws
        from key folded by i, in whatever batch it is. The others: see `sample_tokens`.
    Returns:
      (images (B, H, W, c) float32 about [−1, 1], tokens (B, L, d)).
    """
    scale = None if guidance_scale is None else jnp.asarray(guidance_scale, jnp.float32)
    class_id, index = jnp.asarray(class_id, jnp.int32), jnp.asarray(index, jnp.int32)
    return draw_images(
        ar, vae, options, ar_params, vae_params, class_id, index, key, scale, jnp.asarray(temperature, jnp.float32)
    )
