"""The von Mises–Fisher distribution on S^{d-1} and its reparameterised samples.

The density is p(x) ∝ exp(kappa ⟨mu, x⟩). Below, nu = d/2 − 1, I is the modified Bessel function of
the first kind, and A = I_{nu+1}(kappa) / I_nu(kappa) = E⟨mu, x⟩. See `docs/method.md`, "Von
Mises–Fisher distribution".

All functions are meant for kappa from 0 to 1e6. For d = 2, 3, 8, 16 and 64 and kappa from 0 to 1e4,
the tests hold log-densities, entropies and KL divergences to 1e-10 of their size in float64, and to
2e-6 of their size plus 5e-6 in float32.

Dimensions:
  d    ambient dimension, at least 2, last axis of mu and x
  ...  any batch shape, the whole shape of kappa
"""

import functools
import math
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Polynomial

from sphere_ar_jax.sphere import geometry, quadrature
from sphere_ar_jax.sphere.power_spherical import log_surface

_ORDER = 12  # The asymptotic series below are used from this order of the Bessel function on.
_TERMS = 9  # Terms of these series; the first one left out is below 1e-11.
_ROUNDS = 64  # The most proposals for a sample.


def _debye(terms: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The polynomials of the expansions of I and of I' for large orders, by falling powers of p.

    With U_0 = 1, U_{k+1} = ½p²(1 − p²) U_k' + ⅛ ∫₀ᵖ (1 − 5t²) U_k(t) dt, and W_k = ½U_k + p U_k'.
    Source: https://dlmf.nist.gov/10.41, where V_{k+1} = U_{k+1} − p(1 − p²) W_k.

    Args:
      terms: their number.

    Returns:
      The coefficients of U_0 … U_{terms−1} and those of W_0 … W_{terms−1}.
    """
    p = Polynomial([0, 1])
    U = [Polynomial([1])]
    for _ in range(terms - 1):
        last = U[-1]
        U.append(0.5 * p**2 * (1 - p**2) * last.deriv() + 0.125 * ((1 - 5 * p**2) * last).integ())
    W = [0.5 * u + p * u.deriv() for u in U]
    return [u.coef[::-1] for u in U], [w.coef[::-1] for w in W]


_U, _W = _debye(_TERMS)


def _series(polynomials: list[np.ndarray], p: jax.Array, order: float) -> jax.Array:
    """Σ_k polynomial_k(p) / order^k, over k = 0, 1, ….

    Its powers of p are gathered first, so that it is one polynomial.
    """
    total = np.zeros(3 * len(polynomials))
    for k, coefficients in enumerate(polynomials):
        total[len(total) - len(coefficients) :] += coefficients / order**k
    return jnp.polyval(jnp.asarray(total, p.dtype), p, unroll=1)


class _Bessel(NamedTuple):
    """What the functions below need of I_nu(kappa).

    M = E exp(kappa ⟨mu, x⟩) over uniform x, which is Γ(nu + 1) (2/kappa)^nu I_nu(kappa).

    Attributes:
      log_m: log M (...), at least 0, accurate next to kappa = 0.
      log_m_scaled: log M − kappa (...), at most 0, accurate at large kappa.
      a: A (...), accurate relative to itself.
      lack: 1 − A (...), accurate relative to itself.
    """

    log_m: jax.Array
    log_m_scaled: jax.Array
    a: jax.Array
    lack: jax.Array


def _bessel(kappa: jax.Array, d: int) -> _Bessel:
    """Computes `_Bessel` without overflow and without large terms that cancel.

    The uniform expansions of I and I' for large orders (https://dlmf.nist.gov/10.41) hold for
    every kappa ≥ 0. They give the values at an order of at least `_ORDER`. The recurrence
    I_{n−1} = I_{n+1} + (2n/kappa) I_n leads from there down to nu. In this direction it is stable.
    All steps are smooth in kappa, at 0 too, so that derivatives may go through them.
    """
    nu = d / 2 - 1
    steps = max(0, math.ceil(_ORDER - nu))
    order = nu + steps
    z = kappa / order
    s = jnp.sqrt(1 + z * z)
    p = 1 / s
    # log Γ(order + 1) without its leading terms, which those of the expansion cancel
    constant = (
        math.lgamma(order + 1)
        - (order + 0.5) * math.log(order)
        + order
        - 0.5 * math.log(2 * math.pi)
    )
    excess = z * z / (1 + s)  # s − 1
    sum_u = _series(_U, p, order)
    rest = constant + jnp.log(sum_u) - 0.5 * jnp.log(s) - order * jnp.log1p(excess / 2)
    correction = z * p * p * _series(_W, p, order) / (order * sum_u)
    a = z / (1 + s) - correction
    lack = (1 + 1 / (s + z)) / (1 + s) + correction

    def down(
        state: tuple[jax.Array, jax.Array, jax.Array], twice: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        """One order less; `twice` is 2n."""
        rest, a, lack = state
        product = kappa * a
        below = kappa / (twice + product)
        lack = (twice - kappa * lack) / (twice + product)
        return (rest + jnp.log1p(product / twice), below, lack), None

    orders = jnp.asarray(2 * (nu + np.arange(steps, 0, -1)), kappa.dtype)
    (rest, a, lack), _ = jax.lax.scan(down, (rest, a, lack), orders)
    return _Bessel(rest + order * excess, rest + order * (1 / (s + z) - 1), a, lack)


def mean_cosine(kappa: jax.Array, d: int) -> jax.Array:
    """The mean resultant length A = I_{d/2}(kappa) / I_{d/2−1}(kappa) = E⟨mu, x⟩.

    Args:
      kappa: (...) ≥ 0, float32 or float64.
      d: ambient dimension, at least 2.

    Returns:
      (...) of kappa's dtype, in [0, 1), accurate relative to itself.
    """
    return _bessel(kappa, d).a


def log_prob(x: jax.Array, mu: jax.Array, kappa: jax.Array) -> jax.Array:
    """Log-density `kappa ⟨mu, x⟩ − log ∫ exp(kappa ⟨mu, y⟩) dy`, with ⟨mu, x⟩ clamped to [−1, 1].

    All arguments are float32, or all are float64. Source: Davidson et al. 2018 (arXiv 1804.00891).

    Args:
      x: (..., d) unit vectors.
      mu: (..., d) unit vectors, the directions.
      kappa: (...) concentrations ≥ 0.

    Returns:
      (...) of their dtype, in nats, with respect to the sphere's area.
    """
    d = x.shape[-1]
    cosine = jnp.clip(jnp.sum(mu * x, axis=-1), -1, 1)
    return kappa * (cosine - 1) - _bessel(kappa, d).log_m_scaled - log_surface(d)


def kl_to_uniform(kappa: jax.Array, d: int) -> jax.Array:
    """KL(q ‖ uniform on S^{d-1}) = kappa A − log M, in nats, with M from `_Bessel`.

    Its derivative is kappa · dA/dkappa. Both are smooth at kappa = 0. At large kappa the two terms
    lose kappa each, so that they do not cancel. Source: Davidson et al. 2018 (arXiv 1804.00891).

    Args:
      kappa: (...) ≥ 0, float32 or float64.
      d: ambient dimension, at least 2.

    Returns:
      (...) of kappa's dtype, ≥ 0 up to rounding.
    """
    found = _bessel(kappa, d)
    near_uniform = kappa * found.a - found.log_m
    concentrated = -kappa * found.lack - found.log_m_scaled
    return jnp.where(kappa < d / 2, near_uniform, concentrated)


def entropy(kappa: jax.Array, d: int) -> jax.Array:
    """Differential entropy, log|S^{d-1}| − KL(q ‖ uniform).

    Args:
      kappa: (...) ≥ 0, float32 or float64.
      d: ambient dimension, at least 2.

    Returns:
      (...) of kappa's dtype, in nats.
    """
    return log_surface(d) - kl_to_uniform(kappa, d)


_NODES = quadrature.tanh_sinh(1 / 24, -80, 77)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _haversine_slope(h: jax.Array, kappa: jax.Array, d: int) -> jax.Array:
    """dh/dkappa at a fixed quantile of the haversine: −(∂F/∂kappa)(h) / p(h).

    The density is p(x) ∝ (x(1 − x))^(b−1) exp(−2 kappa x) with b = (d − 1)/2. The numerator is
    ∂F/∂kappa = 2 ∫₀ʰ (E h − x) p(x) dx. Over the whole range of x the integrand adds up to 0, so
    the tail on either side of h may be integrated. The tail that does not cross E h is chosen, so
    that nothing cancels. The density enters only as p(x)/p(h), so that no normaliser is needed.
    """
    dtype = h.dtype
    info = jnp.finfo(dtype)
    h = jnp.clip(h, info.tiny, 1 - info.epsneg)
    mean = _bessel(kappa, d).lack / 2
    lower = h < mean
    # The tail next to h has the width w: x = w·y on the lower side, 1 − x = w·y on the upper one.
    w = jnp.where(lower, h, 1 - h)[..., None]
    sign = jnp.where(lower, 1, -1).astype(dtype)[..., None]
    log_y, one_minus_y, log_weight = _NODES.beside(h)
    step = w * one_minus_y  # |x − h|
    log_density = (d - 3) / 2 * (log_y + jnp.log1p(step / (1 - w)))
    log_density += sign * 2 * kappa[..., None] * step
    distance = jnp.abs(mean - h)[..., None] + step  # |x − E h|
    terms = distance * jnp.exp(log_density + log_weight)
    return -2 * w[..., 0] * jnp.sum(terms, axis=-1)


@_haversine_slope.defjvp
def _no_second_derivative(*_: Any) -> NoReturn:
    raise TypeError('implicit_haversine has no second derivative')


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def implicit_haversine(h: jax.Array, kappa: jax.Array, d: int) -> jax.Array:
    """A given draw of the haversine h = (1 − ⟨mu, x⟩)/2, made differentiable in kappa.

    The value is h. The tangent says how the draw moves at a fixed quantile, `dh/dkappa =
    −(∂F/∂kappa)/p(h)`, the implicit reparameterisation of Figurnov et al. 2018 (arXiv 1805.08498).
    A tanh-sinh rule of 157 nodes computes it, to 1e-7 in float64.

    Args:
      h: (...) draws in [0, 1].
      kappa: (...) ≥ 0 of the same dtype, the differentiable parameter.
      d: ambient dimension, at least 2.

    Returns:
      (...), h itself.

    Raises:
      TypeError: a second derivative is asked for.
    """
    del kappa, d
    return h


@implicit_haversine.defjvp
def _implicit_haversine_jvp(
    d: int, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The draw, and its tangent along that of kappa."""
    h, kappa = primals
    h_dot, kappa_dot = tangents
    return h, h_dot + _haversine_slope(h, kappa, d) * kappa_dot


def sample_from_draws(
    mu: jax.Array, kappa: jax.Array, h: jax.Array, normal: jax.Array
) -> jax.Array:
    """Turns the draws (h, normal) into a sample, differentiable in mu and kappa.

    With v = l2_normalize(normal) and y = (1 − 2h, 2√(h(1−h)) v), the sample is y reflected so that
    e₁ goes to mu. All arguments are float32, or all are float64. Source: Davidson et al. 2018
    (arXiv 1804.00891), algorithm 1.

    Args:
      mu: (..., d) unit vectors.
      kappa: (...) ≥ 0.
      h: (...) draws of the haversine (1 − ⟨mu, x⟩)/2, in [0, 1].
      normal: (..., d−1) standard normal draws.

    Returns:
      (..., d) unit vectors.
    """
    h = implicit_haversine(h, kappa, mu.shape[-1])
    return geometry.around(mu, 1 - 2 * h, 4 * h * (1 - h), normal)


def _symmetric_beta(
    key: jax.Array, shape: tuple[int, ...], d: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Draws z ~ Beta((d−1)/2, (d−1)/2); returns z and 1 − z, both accurate next to 0.

    A coordinate of a uniform point on the unit sphere is distributed as 2z − 1.
    """
    normal = jax.random.normal(key, (*shape, d), dtype)
    first = normal[..., 0]
    across = jnp.sum(jnp.square(normal[..., 1:]), axis=-1)
    norm = jnp.sqrt(jnp.square(first) + across)
    smaller = across / (2 * norm * (norm + jnp.abs(first)))
    z = jnp.where(first < 0, smaller, 1 - smaller)
    return z, jnp.where(first < 0, 1 - smaller, smaller)


def _propose(key: jax.Array, kappa: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """Draws haversines from the envelope of Wood 1994, and says which of them he accepts.

    With m = d − 1 and Wood's b = (√(4 kappa² + m²) − 2 kappa)/m, which is computed without that
    difference, and z ~ Beta(m/2, m/2), a proposal is h = bz/(1 − (1−b)z). Wood accepts it with the
    probability exp(kappa w + m log(1 − x₀w) − c). Put in z, this is exp(m (log(1 + e) − e)) with
    e = (1−b)(2z − 1)/(2 (1 − (1−b)z)): at large kappa nothing cancels.
    """
    key_z, key_accept = jax.random.split(key)
    m = d - 1
    b = m / (2 * kappa + jnp.sqrt(4 * jnp.square(kappa) + m * m))
    z, rest = _symmetric_beta(key_z, kappa.shape, d, kappa.dtype)
    denominator = rest + b * z
    e = (1 - b) * (z - rest) / (2 * denominator)
    threshold = -jax.random.exponential(key_accept, kappa.shape, kappa.dtype)
    return b * z / denominator, threshold <= m * (jnp.log1p(e) - e)


def draw(key: jax.Array, kappa: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """The random draws of `sample_from_draws`, by the rejection sampler of Wood 1994.

    No gradient flows through the draws. `sample_from_draws` makes the sample differentiable. Round
    r has the key folded by r, and an element keeps its first accepted proposal. So it depends on
    neither the other elements' kappa nor the number of rounds that they need. At least 65% of the
    proposals are accepted, whatever kappa and d are. After 64 rounds, which one draw in 1e29 needs,
    the last proposal is kept.

    Args:
      key: PRNG key.
      kappa: (...) ≥ 0, float32 or float64.
      d: ambient dimension, at least 2.

    Returns:
      (h (...), normal (..., d−1)): haversines (1 − ⟨mu, x⟩)/2, and standard normal numbers.
    """
    key_h, key_v = jax.random.split(key)
    kappa = jax.lax.stop_gradient(kappa)

    def go_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, _, open_ = state
        return (count < _ROUNDS) & jnp.any(open_)

    def propose(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        count, h, open_ = state
        proposal, accepted = _propose(jax.random.fold_in(key_h, count), kappa, d)
        return count + 1, jnp.where(open_, proposal, h), open_ & ~accepted

    start = (jnp.int32(0), jnp.zeros_like(kappa), jnp.ones(kappa.shape, bool))
    _, h, _ = jax.lax.while_loop(go_on, propose, start)
    return h, jax.random.normal(key_v, (*kappa.shape, d - 1), kappa.dtype)


def sample(key: jax.Array, mu: jax.Array, kappa: jax.Array) -> jax.Array:
    """Reparameterised samples x ~ vMF(mu, kappa); gradients reach mu and kappa.

    Source: Davidson et al. 2018 (arXiv 1804.00891).

    Args:
      key: PRNG key.
      mu: (..., d) unit vectors, float32 or float64.
      kappa: (...) ≥ 0 of the same dtype.

    Returns:
      (..., d) unit vectors of that dtype.
    """
    return sample_from_draws(mu, kappa, *draw(key, kappa, mu.shape[-1]))
