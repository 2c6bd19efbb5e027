"""Sampling as one program: prefill, a scan over tokens with a static cache, in it a scan over solver steps (spec §7).

Dimensions:
  B  images      R  rows: B, or 2B with guidance (conditional rows, then null rows)
  L  tokens      d  latent dimension      M  width of the flow head
  m  standard normal draws per token: x₀, then one for each stochastic step
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from sphere_ar_jax import flow, geometry


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled into a sampler. The defaults are the published sampler. An option without use is an error.

    Attributes:
      solver: 'euler_maruyama' or 'euler'. num_steps: its steps.
      last_step: width of the plain Euler step that ends Euler–Maruyama (0.04 if None); not for 'euler'.
      guidance: schedule of the guidance scale over tokens, 'linear' or 'constant'; None samples without null rows.
      first_token_apart: the published quirk, True if None. Where token 0's scale is exactly 1 (always so in the
        linear schedule) guidance is off: conditional and null rows then draw their own noise, and feed their own,
        different, first tokens back. False: both continue from the conditional token. Only with the linear schedule.
    """

    solver: str = 'euler_maruyama'
    num_steps: int = 100
    last_step: float | None = None
    guidance: str | None = 'linear'
    first_token_apart: bool | None = None

    def __post_init__(self):
        self.times  # noqa: B018, refuses what the solver cannot do
        if self.solver == 'euler' and self.last_step is not None:
            raise ValueError('last_step is only used by the solver euler_maruyama: leave it out')
        if self.guidance is not None:
            flow.guidance_scales(1.0, 1, self.guidance)
        if self.guidance != 'linear' and self.first_token_apart is not None:
            raise ValueError('first_token_apart is only used with linear guidance: leave it out')

    @property
    def times(self):
        """(t, dt) of the solver's evaluations."""
        last_step = {} if self.last_step is None else {'last_step': self.last_step}
        return flow.solver_times(self.solver, self.num_steps, **last_step)


def _token(ar, variables, options, t_emb, scale, temperature, c, noise, apart):
    """Draws one token for every row: conditions c (R, D), noise (m, R, d) → z (R, d) on the sphere.

    `apart`: () bool, whether conditional and null rows go their own ways (each with its own noise and velocity).
    """
    c_emb = ar.apply(variables, c, method='embed_condition')

    def velocity(x, t, t_emb):
        v = ar.apply(variables, x, t_emb, c_emb, method='velocity')
        if options.guidance is None:
            return v
        guided = flow.guide(*jnp.split(v, 2), scale)
        return jnp.where(apart, v, jnp.concatenate([guided, guided]))

    x = flow.integrate(velocity, temperature * noise[0], noise[1:], options.times, t_emb)
    return geometry.project(x)


def sample_tokens(ar, params, class_id, keys, options, guidance_scale=None, temperature=1.0, noise=None):
    """Draws the tokens of B images.

    Args:
      ar: `ar.AR`. params: its parameters. class_id: (B,) int32. options: `Options`.
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
    variables = {'params': params}
    B, L, d, m = len(class_id), ar.num_tokens, ar.latent_dim, flow.num_draws(options.solver, options.num_steps)
    expected = (m, 2 * B if guided else B, d), (L - 1, m, B, d)
    if noise is not None and tuple(n.shape for n in noise) != expected:
        raise ValueError(f'noise has the shapes {tuple(n.shape for n in noise)}, but these options need {expected}')
    draw = jax.vmap(lambda key, k: jax.random.normal(jax.random.fold_in(key, k), (m, d)), (0, None), 1)
    double = lambda x, axis=0: jnp.concatenate([x, x], axis=axis) if guided else x
    scales = flow.guidance_scales(guidance_scale, L, options.guidance) if guided else jnp.ones(L)
    # Once for all tokens and rows: the embeddings of the solver's times.
    t_emb = ar.apply(variables, options.times[0], method='embed_time')
    token = partial(_token, ar, variables, options, t_emb)

    c, cache = ar.apply(variables, jnp.append(class_id, ar.num_classes) if guided else class_id, method='prefill')
    if guided:  # all null rows begin alike: one was computed
        rows = jnp.minimum(jnp.arange(2 * B), B)
        c, cache = jnp.take(c, rows, axis=0), tuple(jnp.take(a, rows, axis=1) for a in cache)
    apart = scales == 1
    first_apart = jnp.logical_and(apart[0], options.first_token_apart is not False)
    if noise is not None:
        first = noise[0]
    elif guided and options.guidance == 'linear' and options.first_token_apart is not False:
        first = jnp.concatenate([draw(keys, 0), draw(keys, L)], axis=1)
    else:
        first = double(draw(keys, 0), 1)
    if guided:
        first = jnp.where(first_apart, first, double(first[:, :B], 1))
    z = token(scales[0], temperature, c, first, first_apart)

    def step(carry, inputs):
        z, cache = carry
        k, scale, apart, noise = inputs
        c, cache = ar.apply(variables, z, k, cache, method='decode_step')
        draws = draw(keys, k) if noise is None else noise
        z = token(scale, temperature, c, double(draws, 1), apart)
        return (z, cache), z[:B]

    inputs = (jnp.arange(1, L), scales[1:], apart[1:], None if noise is None else noise[1])
    _, rest = jax.lax.scan(step, (z, cache), inputs)
    return jnp.concatenate([z[None, :B], rest]).swapaxes(0, 1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _images(ar, vae, options, ar_params, vae_params, class_id, index, key, guidance_scale, temperature):
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
    return _images(
        ar, vae, options, ar_params, vae_params, class_id, index, key, scale, jnp.asarray(temperature, jnp.float32)
    )


def to_uint8(images):
    """Images in [−1, 1] → uint8: clip(127.5·x + 128, 0, 255), truncated. Spec §7."""
    return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)
