"""Sampling as one program: a prefill, then a scan over tokens with a static cache (paper §3.4).

The head's sampler runs inside the scan. See `docs/method.md`, "Sampling".

Dimensions:
  B  images
  R  rows: B, or 2B with guidance (conditional rows, then null rows)
  L  tokens of an image
  d  latent dimension
  D  width of the AR model
  m  standard normal draws per token: x₀, and for a stochastic solver one for each noisy step
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sphere_ar_jax.flow.guidance import Guidance, guidance_scales
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.conditions import Labels
from sphere_ar_jax.models.heads import check_solver
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sphere import geometry


class Prefix(NamedTuple):
    """Tokens that are given, so that the sampler goes on from them.

    Attributes:
      tokens: (B, L, d), of which the first `length` are read.
      length: () int, 0 ≤ length ≤ L.
    """

    tokens: jax.Array | np.ndarray
    length: ArrayLike


class Carry(NamedTuple):
    """What the sampler takes from one token to the next.

    Attributes:
      c: condition of the next token, (R, D).
      cache: keys and values of the condition's tokens and of the tokens before.
    """

    c: jax.Array
    cache: PyTree


class Drawn(NamedTuple):
    """What the sampler draws. Its arrays are NumPy's where `on_mesh.draw_images` gathered them.

    Attributes:
      z: tokens (B, L, d), projected; those of a prefix are as they were given.
      raw: the same tokens as the head drew them, before projection. Those in the place of a prefix
        are what the head would have drawn there.
    """

    z: jax.Array
    raw: jax.Array


def draw(
    ar: AR,
    params: PyTree,
    labels: Labels,
    keys: jax.Array | None,
    options: Options,
    guidance_scale: jax.Array | float | None = None,
    temperature: jax.Array | float = 1.0,
    noise: tuple[jax.Array, jax.Array] | None = None,
    project: Callable[[jax.Array], jax.Array] = geometry.project,
    prefix: Prefix | None = None,
    rows_last: bool = False,
) -> Drawn:
    """Draws the tokens of B images, projected and as the head draws them.

    Args:
      ar: the model.
      params: its parameters; stacked ones are copied apart first, see `ar.unstacked`.
      labels: labels of B images, see `conditions`.
      keys: (B,) PRNG keys, one per image, or None if noise is given. If each is folded by the
        image's global index, an image does not depend on its batch.
      options: what the sampler does.
      guidance_scale: s, () for all images or (B,) for each. It is needed with guidance and refused
        without.
      temperature: () factor of x₀'s noise.
      noise: explicit draws in place of keys: (first (m, R, d), rest (L − 1, m, B, d)). With
        guidance, the null rows of `first` are used only where token 0 goes apart.
      project: the tokenizer's `VAE.project`; every token goes through it before it is fed back.
      prefix: the first tokens, if they are given. They are fed back as they are. The noise of the
        other tokens is the same as without a prefix.
      rows_last: whether keys and values lie as `cache.RowsLast` (speed only).

    Returns:
      The tokens, float32.

    Raises:
      ValueError: an argument has no use or is missing, the head has another solver, the noise has
        other shapes, or the model does not know the labels, where these are not traced.
    """
    if not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(labels)):
        ar.condition.check(labels)
    _check_options(ar, options, guidance_scale)
    if (keys is None) == (noise is None):
        raise ValueError('give either keys or noise')
    ar, params = unstacked(ar, params)
    params = ar.cast(params)
    guided = options.guidance is not None
    B = len(jax.tree.leaves(labels)[0])
    L = ar.num_tokens
    d = ar.latent_dim
    m = options.num_draws(L)
    if prefix is not None and prefix.tokens.shape != (B, L, d):
        raise ValueError(f'the prefix has the shape {prefix.tokens.shape}, not {(B, L, d)}')
    if noise is not None:
        _check_noise(noise, ((m, 2 * B if guided else B, d), (L - 1, m, B, d)))

    tokens = _tokens(options, guidance_scale, L)
    if noise is not None:
        tokens = tokens._replace(draws=_join_noise(noise, tokens.apart[0], guided))
    length: ArrayLike | None = None
    if prefix is not None:
        tokens = tokens._replace(given=jnp.asarray(prefix.tokens).swapaxes(0, 1))
        length = prefix.length
    carry = _prefill(ar, params, labels, guided)
    if rows_last:
        carry = carry._replace(cache=tuple(cache.rows_last() for cache in carry.cache))
    step = _step(ar, params, keys, options, temperature, project, length)
    _, drawn = jax.lax.scan(step, carry, tokens)
    return jax.tree.map(lambda a: a.swapaxes(0, 1), drawn)


def begin(ar: AR, params: PyTree, labels: Labels, options: Options) -> Carry:
    """Begins the sequences of B images, which `go_on` draws part by part.

    Args:
      ar: the model with scan=False, see `ar.unstacked`.
      params: its parameters.
      labels: labels of B images, see `conditions`. They are not checked.
      options: what the sampler does.

    Returns:
      What token 0 is drawn from.
    """
    return _prefill(ar, ar.cast(params), labels, options.guidance is not None)


def go_on(
    ar: AR,
    params: PyTree,
    carry: Carry,
    first: jax.Array | int,
    count: int,
    keys: jax.Array,
    options: Options,
    guidance_scale: jax.Array | float | None = None,
    temperature: jax.Array | float = 1.0,
    project: Callable[[jax.Array], jax.Array] = geometry.project,
) -> tuple[Carry, Drawn]:
    """Draws the next tokens of B images, by the same steps as `draw`.

    Args:
      ar: the model with scan=False, see `ar.unstacked`.
      params: its parameters.
      carry: what the part before returned, or `begin`.
      first: () number of the first token to draw.
      count: number of tokens to draw.
      keys: see `draw`.
      options: what the sampler does.
      guidance_scale: see `draw`.
      temperature: see `draw`.
      project: see `draw`.

    Returns:
      What the next part goes on from, and the tokens (B, count, d).

    Raises:
      ValueError: guidance_scale is missing or has no use, or the head has another solver.
    """
    _check_options(ar, options, guidance_scale)
    tokens = jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, first, count),
        _tokens(options, guidance_scale, ar.num_tokens),
    )
    step = _step(ar, ar.cast(params), keys, options, temperature, project, None)
    carry, drawn = jax.lax.scan(step, carry, tokens)
    return carry, jax.tree.map(lambda a: a.swapaxes(0, 1), drawn)


class _PerToken(NamedTuple):
    """What differs from token to token; every array has a leading axis of tokens.

    Attributes:
      k: numbers of the tokens.
      which: index of each token's solver table.
      scale: guidance scales, () or (B,) each.
      apart: whether conditional and null rows go apart, of the scale's shape.
      draws: explicit draws (m, R, d) each, None where keys make them.
      given: tokens (B, d) of a prefix, None without one.
    """

    k: jax.Array
    which: jax.Array
    scale: jax.Array
    apart: jax.Array
    draws: jax.Array | None = None
    given: jax.Array | None = None


def _tokens(options: Options, guidance_scale: jax.Array | float | None, L: int) -> _PerToken:
    """All tokens of images, without explicit draws and without a prefix."""
    scales = _scales(options, guidance_scale, L)
    which = jnp.asarray(options.plan(L).which)
    return _PerToken(jnp.arange(L), which, scales, _apart(options, scales))


def _step(
    ar: AR,
    params: PyTree,
    keys: jax.Array | None,
    options: Options,
    temperature: jax.Array | float,
    project: Callable[[jax.Array], jax.Array],
    length: ArrayLike | None,
) -> Callable[[Carry, _PerToken], tuple[Carry, Drawn]]:
    """Makes the function that draws one token of every image, for a scan over the tokens.

    The arguments are those of `draw`, and `length` is that of the prefix.
    """
    L = ar.num_tokens
    shape = (options.num_draws(L), ar.latent_dim)
    guided = options.guidance is not None
    prepared = ar.head.prepare(params['head'], options.plan(L))

    def step(carry: Carry, token: _PerToken) -> tuple[Carry, Drawn]:
        """Draws token k and feeds it: the carry of token k → that of token k + 1."""
        draws = token.draws
        if draws is None:
            assert keys is not None  # `draw` has seen that one of the two is given
            draws = _draw_rows(options, keys, token.k, L, shape)
        draws = jnp.concatenate([temperature * draws[:1], draws[1:]])
        solver = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, token.which, keepdims=False), prepared
        )
        guidance = None
        if guided:
            guidance = Guidance(token.scale, token.apart, options.guidance_interval)
        raw = ar.head.draw_token(params['head'], carry.c, draws, solver, guidance)
        z = project(raw)
        if length is not None and token.given is not None:
            given = jnp.concatenate([token.given, token.given]) if guided else token.given
            z = jnp.where(token.k < length, given, z)
        # Nothing reads the condition and the cache after the last token. They are computed all the
        # same, so that every token, 0 included, is one step of one program.
        following = ar.apply({'params': params}, z, token.k + 1, carry.cache, method='decode_step')
        B = len(z) // 2 if guided else len(z)
        return Carry(*following), Drawn(z[:B], raw[:B])

    return step


def sample_tokens(
    ar: AR,
    params: PyTree,
    labels: Labels,
    keys: jax.Array | None,
    options: Options,
    guidance_scale: jax.Array | float | None = None,
    temperature: jax.Array | float = 1.0,
    noise: tuple[jax.Array, jax.Array] | None = None,
    project: Callable[[jax.Array], jax.Array] = geometry.project,
    prefix: Prefix | None = None,
) -> jax.Array:
    """Draws the tokens of B images by `draw`, which explains the arguments.

    Returns:
      z (B, L, d) float32, projected.

    Raises:
      ValueError: see `draw`.
    """
    drawn = draw(
        ar, params, labels, keys, options, guidance_scale, temperature, noise, project, prefix
    )
    return drawn.z


def _check_options(ar: AR, options: Options, guidance_scale: jax.Array | float | None) -> None:
    """Raises ValueError for another head's solver, or a guidance scale too many or too few."""
    check_solver(ar.head, options.solver)
    if (options.guidance is not None) != (guidance_scale is not None):
        raise ValueError('give guidance_scale with a guidance schedule, and only then')


def _check_noise(
    noise: tuple[jax.Array, jax.Array], expected: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """Raises ValueError for explicit draws of other shapes than expected."""
    shapes = tuple(a.shape for a in noise)
    if shapes != expected:
        raise ValueError(f'noise has the shapes {shapes}, but these options need {expected}')


def _scales(options: Options, scale: jax.Array | float | None, num_tokens: int) -> jax.Array:
    """The guidance scale s_k of every token, (L,) or (L, B); 1 without guidance."""
    if options.guidance is None or scale is None:
        return jnp.ones(num_tokens)
    return guidance_scales(scale, num_tokens, options.guidance)


def _apart(options: Options, scales: jax.Array) -> jax.Array:
    """Whether the conditional and null rows of each token go apart, bool of the scales' shape.

    See `Guidance.apart`. They do where the scale is 1, but not at token 0 if
    `Options.first_token_apart` is False.
    """
    allowed = options.first_token_apart is not False
    return (scales == 1).at[0].set((scales[0] == 1) & allowed)


def _prefill(ar: AR, params: PyTree, labels: Labels, guided: bool) -> Carry:
    """Condition (R, D) of token 0 and the filled cache of all rows."""
    if not guided:
        return Carry(*ar.apply({'params': params}, labels, method='prefill'))
    # All null rows begin alike, so one of them is computed and then copied.
    null = ar.condition.null(labels)

    def with_null(labels: jax.Array, null: jax.Array) -> jax.Array:
        return jnp.concatenate([labels.astype(null.dtype), null[:1]])

    rows = jax.tree.map(with_null, labels, null)
    c, cache = ar.apply({'params': params}, rows, method='prefill')
    B = len(c) - 1  # row B is the null row
    copies = jnp.concatenate([jnp.arange(B), jnp.full(B, B)])
    return jax.tree.map(lambda a: jnp.take(a, copies, axis=0), Carry(c, cache))


def _join_noise(
    noise: tuple[jax.Array, jax.Array], first_apart: jax.Array, guided: bool
) -> jax.Array:
    """Joins explicit draws (first (m, R, d), rest (L − 1, m, B, d)) to one array (L, m, R, d).

    Null rows get the noise of the conditional rows. Those of token 0 keep their own if it goes
    apart, which `first_apart` () or (B,) says.
    """
    first, rest = noise
    if not guided:
        return jnp.concatenate([first[None], rest])
    B = rest.shape[2]
    if first_apart.ndim:
        first_apart = jnp.concatenate([first_apart, first_apart])[None, :, None]
    shared = first[:, :B]
    first = jnp.where(first_apart, first, jnp.concatenate([shared, shared], axis=1))
    return jnp.concatenate([first[None], jnp.concatenate([rest, rest], axis=2)])


def _draw_rows(
    options: Options, keys: jax.Array, k: jax.Array, num_tokens: int, shape: tuple[int, int]
) -> jax.Array:
    """Standard normals (m, R, d) of token k; the shape is (m, d).

    Null rows share those of the conditional rows. At token 0 they have draws of their own, from the
    keys folded by L, if the options let them go apart.
    """
    draws = _draw(keys, k, shape)
    if options.guidance is None:
        return draws
    null = draws
    if options.splits_first_token:
        null = jax.lax.cond(k == 0, lambda: _draw(keys, num_tokens, shape), lambda: draws)
    return jnp.concatenate([draws, null], axis=1)


def _draw(keys: jax.Array, number: jax.Array | int, shape: tuple[int, int]) -> jax.Array:
    """Standard normals (m, B, d) from the keys (B,) folded by a number; the shape is (m, d)."""

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, number), shape)

    return jax.vmap(one, out_axes=1)(keys)
