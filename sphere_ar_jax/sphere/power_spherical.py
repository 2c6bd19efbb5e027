"""The power-spherical distribution on S^{d-1} and its reparameterised samples.

p(x) ∝ (1 + ⟨mu, x⟩)^kappa, De Cao & Aziz 2020 (arXiv 2006.04437). With b = (d−1)/2, alpha = kappa +
b, beta = b.

Dimensions:
  d    ambient dimension, last axis of mu and x
  ...  any batch shape, the whole shape of kappa
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlog1py

from sphere_ar_jax.sphere import geometry

_SHIFT = 8  # the asymptotic series below are used from alpha + 8 on
# Bernoulli terms B_2k / (2k (2k−1)) of Stirling's series for log Γ.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 5 / 5940)


def _log_gamma_ratio(alpha, beta):
    """log Γ(alpha + beta) − log Γ(alpha), without the cancellation of the two (each ~ alpha log
    alpha).
    """
    shifts = sum(jnp.log1p(beta / (alpha + k)) for k in range(_SHIFT))
    a = alpha + _SHIFT
    c = a + beta
    series = sum(b * (c ** -(2 * k + 1) - a ** -(2 * k + 1)) for k, b in enumerate(_STIRLING))
    return (a - 0.5) * jnp.log1p(beta / a) + beta * jnp.log(c) - beta + series - shifts


def _digamma_difference(alpha, beta):
    """ψ(alpha + beta) − ψ(alpha) = d/d alpha of `_log_gamma_ratio`, likewise without cancellation."""
    shifts = sum(beta / ((alpha + k) * (alpha + beta + k)) for k in range(_SHIFT))
    a = alpha + _SHIFT
    c = a + beta
    series = sum(
        b * (2 * k + 1) * (a ** -(2 * k + 2) - c ** -(2 * k + 2)) for k, b in enumerate(_STIRLING)
    )
    return jnp.log1p(beta / a) + 0.5 * beta / (a * c) + series + shifts


def log_surface(d):
    """log|S^{d-1}| = log 2 + (d/2) log π − log Γ(d/2), the log of the unit sphere's area (a Python
    float).
    """
    return math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)


def _log_peak(kappa, d):
    """log p(mu) = log N + kappa log 2, in which the two large terms have been cancelled by hand."""
    b = (d - 1) / 2
    return _log_gamma_ratio(kappa + b, b) - 2 * b * math.log(2) - b * math.log(math.pi)


def log_prob(x, mu, kappa):
    """Log-density `log N + kappa·log(1 + ⟨mu,x⟩)`, ⟨mu,x⟩ clamped to [−1, 1].

    Args:
      x, mu: (..., d) unit vectors. kappa: (...) concentration ≥ 0; all float32 (or all float64).
    Returns:
      (...) of their dtype, nats, with respect to the sphere's area. Source: De Cao & Aziz 2020.
    """
    cosine = jnp.clip(jnp.sum(mu * x, axis=-1), -1, 1)
    return _log_peak(kappa, x.shape[-1]) + xlog1py(kappa, (cosine - 1) / 2)


def entropy(kappa, d):
    """Differential entropy `H = −[log N + kappa (log 2 + ψ(alpha) − ψ(alpha+beta))]`.

    Args:
      kappa: (...) ≥ 0, float32 or float64. d: ambient dimension, a Python int ≥ 2.
    Returns:
      (...) of kappa's dtype, nats. Source: De Cao & Aziz 2020.
    """
    b = (d - 1) / 2
    return kappa * _digamma_difference(kappa + b, b) - _log_peak(kappa, d)


def kl_to_uniform(kappa, d):
    """KL(q ‖ uniform on S^{d-1}) = −H(q) + log|S^{d-1}|, (...) in nats, ≥ 0 up to rounding."""
    return log_surface(d) - entropy(kappa, d)


# Double-exponential (tanh-sinh) nodes on (0, 1): log y, 1 − y and log(dy/dt · h), made in float64.
_H = 1 / 16
_T = np.arange(-53, 51) * _H
_LOG_Y = -np.logaddexp(0, -np.pi * np.sinh(_T))
_ONE_MINUS_Y = np.exp(-np.logaddexp(0, np.pi * np.sinh(_T)))
_LOG_DY = np.log(np.pi * np.cosh(_T) * _H) + _LOG_Y + np.log(_ONE_MINUS_Y)


@jax.custom_jvp
def _beta_quantile_slope(s, alpha, beta):
    """ds/d alpha at a fixed quantile of Beta(alpha, beta): −(∂F/∂alpha)(s) / p(s).

    ∂F/∂alpha = ∫₀ˢ (log x − E log X) p(x) dx, of which the tail that does not cross E log X is
    integrated, so that nothing cancels; p enters only as p(x)/p(s), so that no normaliser is
    needed.
    """
    dtype = s.dtype
    info = jnp.finfo(dtype)
    s = jnp.clip(s, info.tiny, 1 - info.epsneg)
    mean_log = -_digamma_difference(alpha, beta)  # E log X
    lower = jnp.log(s) < mean_log
    # Tail of width w next to s: x = w·y on the lower side, 1 − x = w·y on the upper.
    w = jnp.where(lower, s, 1 - s)[..., None]
    p = jnp.where(lower, alpha, beta)[..., None]
    q = jnp.where(lower, beta, alpha)[..., None]
    nodes = (
        jnp.asarray(a, dtype).reshape(*(1,) * s.ndim, -1) for a in (_LOG_Y, _ONE_MINUS_Y, _LOG_DY)
    )
    log_y, one_minus_y, log_dy = nodes
    log_x = jnp.where(lower[..., None], jnp.log(w) + log_y, jnp.log1p(-w * jnp.exp(log_y)))
    log_ratio = (p - 1) * log_y + (q - 1) * jnp.log1p(w * one_minus_y / (1 - w)) + log_dy
    return w[..., 0] * jnp.sum(jnp.abs(mean_log[..., None] - log_x) * jnp.exp(log_ratio), axis=-1)


@_beta_quantile_slope.defjvp
def _no_second_derivative(*_):
    raise TypeError('implicit_beta has no second derivative')


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def implicit_beta(s, alpha, beta):
    """A given draw s ~ Beta(alpha, beta), made differentiable in alpha (implicit
    reparameterisation).

    The value is s; the tangent is the movement of the draw at a fixed quantile, `ds/d alpha =
    −(∂F/∂alpha)/p(s)` (Figurnov et al. 2018, arXiv 1805.08498), by a 104-node tanh-sinh rule (to
    1e-5 in float64).

    Args:
      s: (...) draws in [0, 1]. alpha: (...) > 0 of the same dtype, the differentiable parameter.
        beta: a Python
      float > 0.
    Returns:
      (...), s itself. Raises TypeError where a second derivative is asked for.
    """
    del alpha, beta
    return s


@implicit_beta.defjvp
def _implicit_beta_jvp(beta, primals, tangents):
    (s, alpha), (s_dot, alpha_dot) = primals, tangents
    return s, s_dot + _beta_quantile_slope(s, alpha, jnp.full_like(s, beta)) * alpha_dot


def sample_from_draws(mu, kappa, s, normal):
    """The sample that the draws (s, normal) stand for, differentiable in mu and kappa.

    c = 2s − 1, v = l2_normalize(normal), y = (c, √(1−c²) v), and x is y reflected so that e₁ goes
    to mu.

    Args:
      mu: (..., d) unit vectors. kappa: (...) ≥ 0. s: (...) draws of Beta(kappa + b, b). normal:
        (..., d−1)
      standard normal draws, all float32 (or all float64).
    Returns:
      (..., d) unit vectors. Source: De Cao & Aziz 2020.
    """
    b = (mu.shape[-1] - 1) / 2
    s = implicit_beta(s, kappa + b, b)
    sine_squared = 4 * s * (1 - s)
    positive = sine_squared > 0
    sine = jnp.where(
        positive, jnp.sqrt(jnp.where(positive, sine_squared, 1)), 0
    )  # √ has no slope at 0
    y = jnp.concatenate(
        [2 * s[..., None] - 1, sine[..., None] * geometry.l2_normalize(normal)], axis=-1
    )
    return geometry.householder(y, mu)


def draw(key, kappa, d):
    """The draws of `sample_from_draws`: s ~ Beta(kappa + b, b), (...), and standard normals (...,
    d−1).

    No gradient flows through the draws themselves; `sample_from_draws` restores it.
    """
    key_s, key_v = jax.random.split(key)
    b = (d - 1) / 2
    kappa = jax.lax.stop_gradient(kappa)
    s = jax.random.beta(key_s, kappa + b, jnp.asarray(b, kappa.dtype), dtype=kappa.dtype)
    return s, jax.random.normal(key_v, (*kappa.shape, d - 1), kappa.dtype)


def sample(key, mu, kappa):
    """Reparameterised samples x ~ PowerSpherical(mu, kappa); gradients reach mu and kappa.

    Args:
      key: PRNG key. mu: (..., d) unit vectors. kappa: (...) ≥ 0 of the same dtype, float32 or
        float64.
    Returns:
      (..., d) unit vectors of that dtype. Source: De Cao & Aziz 2020.
    """
    return sample_from_draws(mu, kappa, *draw(key, kappa, mu.shape[-1]))
