"""The power-spherical distribution on S^{d-1} and its reparameterised samples.

The density is p(x) ∝ (1 + ⟨mu, x⟩)^kappa (De Cao & Aziz 2020, arXiv 2006.04437). Below,
b = (d−1)/2, alpha = kappa + b and beta = b. See `docs/method.md`, "Power spherical distribution".

Dimensions:
  d    ambient dimension, last axis of mu and x
  ...  any batch shape, the whole shape of kappa
"""

import functools
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.scipy.special import xlog1py

from sphere_ar_jax.sphere import geometry, quadrature

_SHIFT = 8  # The asymptotic series below are used from alpha + 8 on.
# Bernoulli terms B_2k / (2k (2k−1)) of Stirling's series for log Γ.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 5 / 5940)


def _log_gamma_ratio(alpha: jax.Array, beta: float) -> jax.Array:
    """Computes log Γ(alpha + beta) − log Γ(alpha) without cancellation.

    Each of the two terms grows as alpha log alpha, much faster than their difference.
    """
    shifts = sum(jnp.log1p(beta / (alpha + k)) for k in range(_SHIFT))
    a = alpha + _SHIFT
    c = a + beta
    series = sum(b * (c ** -(2 * k + 1) - a ** -(2 * k + 1)) for k, b in enumerate(_STIRLING))
    return (a - 0.5) * jnp.log1p(beta / a) + beta * jnp.log(c) - beta + series - shifts


def _digamma_difference(alpha: jax.Array, beta: jax.Array | float) -> jax.Array:
    """ψ(alpha + beta) − ψ(alpha), the derivative of `_log_gamma_ratio`, without cancellation."""
    shifts = sum(beta / ((alpha + k) * (alpha + beta + k)) for k in range(_SHIFT))
    a = alpha + _SHIFT
    c = a + beta
    series = sum(
        b * (2 * k + 1) * (a ** -(2 * k + 2) - c ** -(2 * k + 2)) for k, b in enumerate(_STIRLING)
    )
    return jnp.log1p(beta / a) + 0.5 * beta / (a * c) + series + shifts


def log_surface(d: int) -> float:
    """log|S^{d-1}| = log 2 + (d/2) log π − log Γ(d/2), the log of the unit sphere's area."""
    return math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)


def _log_peak(kappa: jax.Array, d: int) -> jax.Array:
    """The log-density at mu, log N + kappa log 2, with its two large terms cancelled by hand."""
    b = (d - 1) / 2
    return _log_gamma_ratio(kappa + b, b) - 2 * b * math.log(2) - b * math.log(math.pi)


def log_prob(x: jax.Array, mu: jax.Array, kappa: jax.Array) -> jax.Array:
    """Log-density `log N + kappa·log(1 + ⟨mu,x⟩)`, with ⟨mu,x⟩ clamped to [−1, 1].

    All arguments are float32, or all are float64. Source: De Cao & Aziz 2020.

    Args:
      x: (..., d) unit vectors.
      mu: (..., d) unit vectors, the directions.
      kappa: (...) concentrations ≥ 0.

    Returns:
      (...) of their dtype, in nats, with respect to the sphere's area.
    """
    cosine = jnp.clip(jnp.sum(mu * x, axis=-1), -1, 1)
    return _log_peak(kappa, x.shape[-1]) + xlog1py(kappa, (cosine - 1) / 2)


def entropy(kappa: jax.Array, d: int) -> jax.Array:
    """Differential entropy `H = −[log N + kappa (log 2 + ψ(alpha) − ψ(alpha+beta))]`.

    Source: De Cao & Aziz 2020.

    Args:
      kappa: (...) ≥ 0, float32 or float64.
      d: ambient dimension, at least 2.

    Returns:
      (...) of kappa's dtype, in nats.
    """
    b = (d - 1) / 2
    return kappa * _digamma_difference(kappa + b, b) - _log_peak(kappa, d)


def kl_to_uniform(kappa: jax.Array, d: int) -> jax.Array:
    """KL(q ‖ uniform on S^{d-1}) = −H(q) + log|S^{d-1}|, in nats.

    Args:
      kappa: (...) ≥ 0, float32 or float64.
      d: ambient dimension, at least 2.

    Returns:
      (...) of kappa's dtype, ≥ 0 up to rounding.
    """
    return log_surface(d) - entropy(kappa, d)


_NODES = quadrature.tanh_sinh(1 / 16, -53, 51)


@jax.custom_jvp
def _beta_quantile_slope(s: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """ds/d alpha at a fixed quantile of Beta(alpha, beta): −(∂F/∂alpha)(s) / p(s).

    The numerator is ∂F/∂alpha = ∫₀ˢ (log x − E log X) p(x) dx. Over the whole range of x the
    integrand adds up to 0, so the tail on either side of s may be integrated. The tail that does
    not cross E log X is chosen, so that nothing cancels. The density enters only as p(x)/p(s), so
    that no normaliser is needed.
    """
    dtype = s.dtype
    info = jnp.finfo(dtype)
    s = jnp.clip(s, info.tiny, 1 - info.epsneg)
    mean_log = -_digamma_difference(alpha, beta)  # E log X
    lower = jnp.log(s) < mean_log
    # The tail next to s has the width w: x = w·y on the lower side, 1 − x = w·y on the upper one.
    w = jnp.where(lower, s, 1 - s)[..., None]
    p = jnp.where(lower, alpha, beta)[..., None]
    q = jnp.where(lower, beta, alpha)[..., None]
    log_y, one_minus_y, log_weight = _NODES.beside(s)
    log_x = jnp.where(lower[..., None], jnp.log(w) + log_y, jnp.log1p(-w * jnp.exp(log_y)))
    log_ratio = (p - 1) * log_y + (q - 1) * jnp.log1p(w * one_minus_y / (1 - w)) + log_weight
    return w[..., 0] * jnp.sum(jnp.abs(mean_log[..., None] - log_x) * jnp.exp(log_ratio), axis=-1)


@_beta_quantile_slope.defjvp
def _no_second_derivative(*_: Any) -> NoReturn:
    raise TypeError('implicit_beta has no second derivative')


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def implicit_beta(s: jax.Array, alpha: jax.Array, beta: float) -> jax.Array:
    """A given draw s ~ Beta(alpha, beta), made differentiable in alpha.

    The value is s. The tangent says how the draw moves at a fixed quantile, `ds/d alpha =
    −(∂F/∂alpha)/p(s)`, the implicit reparameterisation of Figurnov et al. 2018 (arXiv 1805.08498).
    A tanh-sinh rule of 104 nodes computes it, to 1e-5 in float64.

    Args:
      s: (...) draws in [0, 1].
      alpha: (...) > 0 of the same dtype, the differentiable parameter.
      beta: a Python float > 0.

    Returns:
      (...), s itself.

    Raises:
      TypeError: a second derivative is asked for.
    """
    del alpha, beta
    return s


@implicit_beta.defjvp
def _implicit_beta_jvp(
    beta: float, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The draw, and its tangent along that of alpha."""
    s, alpha = primals
    s_dot, alpha_dot = tangents
    return s, s_dot + _beta_quantile_slope(s, alpha, jnp.full_like(s, beta)) * alpha_dot


def sample_from_draws(
    mu: jax.Array, kappa: jax.Array, s: jax.Array, normal: jax.Array
) -> jax.Array:
    """Turns the draws (s, normal) into a sample, differentiable in mu and kappa.

    With c = 2s − 1, v = l2_normalize(normal) and y = (c, √(1−c²) v), the sample is y reflected so
    that e₁ goes to mu. All arguments are float32, or all are float64. Source: De Cao & Aziz 2020.

    Args:
      mu: (..., d) unit vectors.
      kappa: (...) ≥ 0.
      s: (...) draws of Beta(kappa + b, b).
      normal: (..., d−1) standard normal draws.

    Returns:
      (..., d) unit vectors.
    """
    b = (mu.shape[-1] - 1) / 2
    s = implicit_beta(s, kappa + b, b)
    return geometry.around(mu, 2 * s - 1, 4 * s * (1 - s), normal)


def draw(key: jax.Array, kappa: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """The random draws of `sample_from_draws`.

    No gradient flows through the draws. `sample_from_draws` makes the sample differentiable.

    Args:
      key: PRNG key.
      kappa: (...) ≥ 0, float32 or float64.
      d: ambient dimension.

    Returns:
      (s (...), normal (..., d−1)): s ~ Beta(kappa + b, b), and standard normal numbers.
    """
    key_s, key_v = jax.random.split(key)
    b = (d - 1) / 2
    kappa = jax.lax.stop_gradient(kappa)
    s = jax.random.beta(key_s, kappa + b, jnp.asarray(b, kappa.dtype), dtype=kappa.dtype)
    return s, jax.random.normal(key_v, (*kappa.shape, d - 1), kappa.dtype)


def sample(key: jax.Array, mu: jax.Array, kappa: jax.Array) -> jax.Array:
    """Reparameterised samples x ~ PowerSpherical(mu, kappa); gradients reach mu and kappa.

    Source: De Cao & Aziz 2020.

    Args:
      key: PRNG key.
      mu: (..., d) unit vectors, float32 or float64.
      kappa: (...) ≥ 0 of the same dtype.

    Returns:
      (..., d) unit vectors of that dtype.
    """
    return sample_from_draws(mu, kappa, *draw(key, kappa, mu.shape[-1]))
