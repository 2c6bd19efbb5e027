"""The sphere on which every token lives; its radius R is √d (paper §3) or another one.

See `docs/method.md`, "Sphere and projection" and "Radius". `householder` belongs to "Power
spherical distribution" there.

Dimensions:
  d  ambient (latent) dimension; points lie on S^{d-1} ⊂ ℝ^d, always the last axis
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

EPS = 1e-7  # The smallest norm that is divided by.


def root(square: jax.Array) -> jax.Array:
    """The square root of numbers ≥ 0. Its derivative at 0, which is infinite, is taken as 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _unit_scale(z: jax.Array) -> jax.Array:
    """A power of two s with max|s·z| in [½, 1), so that squares neither overflow nor vanish."""
    limit = -jnp.finfo(z.dtype).minexp
    _, exponent = jnp.frexp(jnp.max(jnp.abs(z), axis=-1, keepdims=True))
    scale = jnp.ldexp(jnp.ones((), z.dtype), -jnp.clip(exponent, -limit, limit))
    return jax.lax.stop_gradient(scale)


def _shrunk_norm(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of two h ≤ 1 and h·‖z‖ over the last axis (kept).

    h·‖z‖ is finite for every finite z, also where ‖z‖ is not. Where all |z| are below 1, h is 1.
    Scaling by h is exact. The derivative of the norm at 0 is 0.
    """
    s = _unit_scale(z)
    h = jnp.minimum(s, 1)
    square = jnp.sum(jnp.square(z * s), axis=-1, keepdims=True)
    return h, root(square) / (s / h)


@jax.custom_jvp
def _normalize(z: jax.Array) -> jax.Array:
    """`l2_normalize` in the dtype of z."""
    h, norm = _shrunk_norm(z)
    return (h * z) / jnp.maximum(norm, h * jnp.asarray(EPS, z.dtype))


@_normalize.defjvp
def _normalize_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The tangent projection (I − uuᵀ) ż / max(‖z‖, EPS), u = z/‖z‖.

    Both ż and ‖z‖ are scaled by h, which cancels, so that neither overflows.
    """
    (z,) = primals
    h, norm = _shrunk_norm(z)
    z_dot = h * tangents[0]
    w = z * _unit_scale(z)
    # Below EPS the value is linear in z. There the slope of the direction, which reaches 1e37, must
    # not enter higher derivatives.
    w = jnp.where(norm < h * EPS, jax.lax.stop_gradient(w), w)
    # First a multiple of w is subtracted from ż, so that ż becomes 0 where |w| is largest. This
    # does not change the projection. But it makes a radial ż exactly 0, in whatever order the sums
    # below are added up.
    largest = jnp.argmax(jnp.abs(w), axis=-1, keepdims=True)
    pivot = jnp.take_along_axis(w, largest, axis=-1)
    multiple = jnp.take_along_axis(z_dot, largest, axis=-1) / jnp.where(pivot == 0, 1, pivot)
    rest = z_dot - multiple * w
    square = jnp.sum(w * w, axis=-1, keepdims=True)
    radial = jnp.sum(w * rest, axis=-1, keepdims=True) / jnp.where(square > 0, square, 1)
    tangent = (rest - radial * w) / jnp.maximum(norm, h * jnp.asarray(EPS, z.dtype))
    return _normalize(z), tangent


def l2_normalize(z: ArrayLike) -> jax.Array:
    """Unit vectors, `z / max(‖z‖, 1e-7)` over the last axis (paper §3).

    The derivative is the exact tangent projection `(I − uuᵀ) ż / max(‖z‖, 1e-7)`, u = z/‖z‖. A
    radial tangent gives exactly 0. This holds below 1e-7 too, where the derivative of the clamped
    quotient would let it through. The value is finite for every finite z, 0 and 3e38 included, and
    so are its forward, reverse and higher derivatives. See `docs/method.md`, "Sphere and
    projection".

    Args:
      z: (..., d), any float type. Half precision is computed in float32 and rounded once.

    Returns:
      (..., d) of z's dtype.
    """
    return project(z, 1.0)


def radius(d: int, chosen: float | None = None) -> float:
    """R, the radius of the sphere that tokens of d dimensions live on: √d where none is chosen."""
    return d**0.5 if chosen is None else chosen


def check_above_zero(name: str, value: float) -> None:
    """Checks a number of that name.

    Raises:
      ValueError: it is not a finite number above 0; one line.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f'{name} must be a number above 0, not {value}')


def check_radius(radius: float | None) -> None:
    """Checks the radius of a sphere; None stands for √d.

    Raises:
      ValueError: it is not a finite number above 0.
    """
    if radius is not None:
        check_above_zero('radius', radius)


def project(z: ArrayLike, radius: float | None = None) -> jax.Array:
    """The projection N_R(z) = R · l2_normalize(z) onto the sphere of radius R (paper §3).

    Its derivatives are R times those of `l2_normalize`. See `docs/method.md`, "Sphere and
    projection".

    Args:
      z: (..., d), any float type.
      radius: R > 0; None stands for √d, as in the paper.

    Returns:
      (..., d) of z's dtype, rounded once. Its norm is R where ‖z‖ ≥ 1e-7.
    """
    z = jnp.asarray(z)
    R = z.shape[-1] ** 0.5 if radius is None else radius
    compute = jnp.float32 if jnp.finfo(z.dtype).bits < 32 else z.dtype
    return (jnp.asarray(R, compute) * _normalize(z.astype(compute))).astype(z.dtype)


def log_norm(z: jax.Array) -> jax.Array:
    """The logarithm of max(‖z‖, 1e-7) over the last axis (kept).

    The value, and its derivative z/‖z‖², are finite for every finite z. Below 1e-7 the derivative
    is 0.

    Args:
      z: (..., d) float32 or float64.

    Returns:
      (..., 1).
    """
    h, norm = _shrunk_norm(z)
    return jnp.log(jnp.maximum(norm, h * jnp.asarray(EPS, z.dtype))) - jnp.log(h)


def angle(u: jax.Array, v: jax.Array) -> jax.Array:
    """The angle between unit vectors.

    Unlike the arc cosine of ⟨u, v⟩ it is exact near 0 and near π. Its derivative at both is 0.

    Args:
      u: (..., d).
      v: (..., d) of the same dtype.

    Returns:
      (..., 1) in [0, π].
    """
    return 2 * jnp.arctan2(_norm(u - v), _norm(u + v))


def _norm(z: jax.Array) -> jax.Array:
    """‖z‖ over the last axis (kept). Its derivative at 0 is 0."""
    return root(jnp.sum(z * z, axis=-1, keepdims=True))


def slerp(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    """Points on the great circle from a to b, at constant speed in t.

    With the angle θ between a and b this is sin((1 − t)θ)/sin θ · a + sin(tθ)/sin θ · b. It is a
    for t = 0 and b for t = 1, exactly. The norm goes along where those of a and b differ. Where
    sin θ is next to 0 the points lie on the straight line; between opposite points that line goes
    through 0, and no great circle is nearer than another.

    Args:
      a: (..., d).
      b: (..., d) of the same dtype.
      t: numbers in [0, 1] of a shape that broadcasts with a and b, as (..., 1).

    Returns:
      (..., d).
    """
    u = l2_normalize(a)
    v = l2_normalize(b)
    theta = angle(u, v)
    sine = jnp.sin(theta)
    straight = jnp.abs(sine) < 1e-4
    divisor = jnp.where(straight, 1, sine)
    of_a = jnp.where(straight, 1 - t, jnp.sin((1 - t) * theta) / divisor)
    of_b = jnp.where(straight, t, jnp.sin(t * theta) / divisor)
    way = of_a * a + of_b * b
    return jnp.where(t == 0, a, jnp.where(t == 1, b, way))


def householder(y: jax.Array, mu: jax.Array) -> jax.Array:
    """Reflects y by the Householder reflection that takes e₁ to mu.

    The reflection is `y − 2⟨y,u⟩u` with u = l2_normalize(e₁ − mu). It is undefined where mu ≈ e₁
    (L1 distance below 1e-6); y is returned there. Source: De Cao & Aziz 2020 (arXiv 2006.04437),
    algorithm 1.

    Args:
      y: (..., d) points.
      mu: (..., d) unit vectors of the same dtype.

    Returns:
      (..., d).
    """
    difference = jax.nn.one_hot(jnp.zeros(mu.shape[:-1], int), mu.shape[-1], dtype=mu.dtype) - mu
    u = l2_normalize(difference)
    reflected = y - 2 * jnp.sum(y * u, axis=-1, keepdims=True) * u
    at_pole = jnp.sum(jnp.abs(difference), axis=-1, keepdims=True) < 1e-6
    return jnp.where(at_pole, y, reflected)


def around(
    mu: jax.Array, cosine: jax.Array, sine_squared: jax.Array, normal: jax.Array
) -> jax.Array:
    """Unit vectors at given angles to mu, in random directions around it.

    With v = l2_normalize(normal) and y = (cosine, sine·v), the vector is y reflected so that e₁
    goes to mu.

    Args:
      mu: (..., d) unit vectors.
      cosine: (...) of the angle.
      sine_squared: (...) 1 − cosine², as exact as the caller has it.
      normal: (..., d−1) standard normal draws.

    Returns:
      (..., d) unit vectors.
    """
    sine = root(sine_squared)[..., None]
    y = jnp.concatenate([cosine[..., None], sine * l2_normalize(normal)], axis=-1)
    return householder(y, mu)
