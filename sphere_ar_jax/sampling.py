"""Sampling as one program: prefill, a scan over tokens with a static cache, in it the solver's loop (spec §7).

Dimensions:
  B  images      R  rows: B, or 2B with guidance (conditional rows, then null rows)
  L  tokens      d  latent dimension      M  width of the flow head
  E  evaluations of the flow head for a token, at most     U  different solver tables among the tokens
  m  standard normal draws per token: x₀, and for a stochastic solver one for each of its noisy steps
"""

import dataclasses
import functools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax import ar as ar_model
from sphere_ar_jax import flow, geometry, solvers

ANNEALING = ('linear', 'cosine', 'two_stage')
# Rows that one product of the flow head should have at least: below, it waits for its weights rather than computes.
PRODUCT_ROWS = 256


def annealed_steps(first, last, num_tokens, shape):
    """Solver steps of every token, from `first` (token 0) down or up to `last` (token L − 1), (L,) int.

    'linear' in k; 'cosine', last + (first − last)·(1 + cos πu)/2 with u = k/(L − 1); 'two_stage', `first` for the first
    half of the tokens and `last` for the others. Source: DiSA (arXiv 2505.20297), where these anneal MAR's steps.
    """
    u = np.arange(num_tokens) / max(num_tokens - 1, 1)
    weight = {'linear': 1 - u, 'cosine': (1 + np.cos(np.pi * u)) / 2, 'two_stage': u < 0.5}[shape]
    return np.rint(last + (first - last) * weight).astype(int)


class Plan(NamedTuple):
    """What every token's solver does: tables (U, E, …), count (U,) of their evaluations, which (L,) of them it is."""

    tables: solvers.Table
    count: Any
    which: Any

    @property
    def evaluations(self):
        """Mean number of evaluations per token."""
        return float(self.count[self.which].mean())


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled into a sampler. The defaults are the published sampler. An option without use is an error.

    Attributes:
      solver: one of `solvers.SOLVERS`. num_steps: its steps (Heun makes two evaluations in each).
      last_step, noise_scale: of 'euler_maruyama' alone (0.04 and 1 if None): see `solvers.euler_maruyama`.
      shift: warp of the time grid, see `solvers.grid` (1 if None: equal steps).
      final_steps, annealing: steps of the last token, and how they go there from num_steps at the first; see
        `annealed_steps`. None: as many for every token.
      guidance: schedule of the guidance scale over tokens, 'linear' or 'constant'; None samples without null rows.
      guidance_interval: (low, high): guidance only at evaluations with low ≤ t < high (≤ 1 if high is 1); elsewhere
        the null rows' head is not evaluated (arXiv 2404.07724). None: everywhere.
      first_token_apart: the published quirk, True if None. Where token 0's scale is exactly 1 (always so in the
        linear schedule) guidance is off: conditional and null rows then draw their own noise, and feed their own,
        different, first tokens back. False: both continue from the conditional token. Only with the linear schedule.
    """

    solver: str = 'euler_maruyama'
    num_steps: int = 100
    last_step: float | None = None
    guidance: str | None = 'linear'
    first_token_apart: bool | None = None
    noise_scale: float | None = None
    shift: float | None = None
    final_steps: int | None = None
    annealing: str | None = None
    guidance_interval: tuple | None = None

    def __post_init__(self):
        if (self.final_steps is None) != (self.annealing is None):
            raise ValueError('final_steps and annealing are given together or not at all')
        if self.annealing not in (None, *ANNEALING):
            raise ValueError(f'annealing {self.annealing!r} is not one of {", ".join(ANNEALING)}')
        for steps in {self.num_steps, self.num_steps if self.final_steps is None else self.final_steps}:
            self._table(steps)  # refuses what the solver cannot do
        if self.guidance is not None:
            flow.guidance_scales(1.0, 1, self.guidance)
        if self.guidance != 'linear' and self.first_token_apart is not None:
            raise ValueError('first_token_apart is only used with linear guidance: leave it out')
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if self.guidance is None:
                raise ValueError('guidance_interval is only used with guidance: leave it out')
            if not 0 <= low < high <= 1:
                raise ValueError(f'guidance_interval is {self.guidance_interval}, but must be 0 ≤ low < high ≤ 1')

    def _table(self, steps):
        arguments = {'noise_scale': self.noise_scale, 'last_step': self.last_step}
        given = {name: value for name, value in arguments.items() if value is not None}
        return solvers.table(self.solver, steps, 1.0 if self.shift is None else self.shift, **given)

    @functools.cache  # noqa: B019, a handful of frozen objects
    def plan(self, num_tokens):
        """The `Plan` of L tokens, in NumPy arrays."""
        last = self.num_steps if self.final_steps is None else self.final_steps
        steps = annealed_steps(self.num_steps, last, num_tokens, self.annealing or 'linear')
        different, which = np.unique(steps, return_inverse=True)
        return Plan(*solvers.pad([self._table(int(n)) for n in different]), which)

    def num_draws(self, num_tokens):
        """m, the standard normal draws per token."""
        plan = self.plan(num_tokens)
        if not solvers.is_stochastic(plan.tables):
            return 1
        return 2 + int(np.nonzero(plan.tables.weights[..., 3])[1].max())


def chunk_size(evaluations, rows):
    """Evaluations of a token whose modulations are one product, for so many rows of the sampler on a device."""
    products = -(-evaluations // max(1, PRODUCT_ROWS // rows))
    return -(-evaluations // products)


def _token(ar, variables, options, k, t_emb, scale, temperature, c, noise, apart):
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
            guided = flow.guide(*jnp.split(v, 2), scale)
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
    ar, params = ar_model.unstacked(ar, params)
    variables = {'params': params}
    B, L, d, m = len(class_id), ar.num_tokens, ar.latent_dim, options.num_draws(ar.num_tokens)
    expected = (m, 2 * B if guided else B, d), (L - 1, m, B, d)
    if noise is not None and tuple(n.shape for n in noise) != expected:
        raise ValueError(f'noise has the shapes {tuple(n.shape for n in noise)}, but these options need {expected}')
    draw = jax.vmap(lambda key, k: jax.random.normal(jax.random.fold_in(key, k), (m, d)), (0, None), 1)
    double = lambda x, axis=0: jnp.concatenate([x, x], axis=axis) if guided else x
    scales = flow.guidance_scales(guidance_scale, L, options.guidance) if guided else jnp.ones(L)
    # Once for all tokens and rows: the embeddings of the solvers' times.
    times = options.plan(L).tables
    t_emb = ar.apply(variables, *map(jnp.asarray, (times.t, times.h)[: 1 + ar.average]), method='embed_time')
    token = partial(_token, ar, variables, options)

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
