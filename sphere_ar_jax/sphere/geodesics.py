"""Geodesics of the sphere of radius R: great circles, and how vectors move along them.

See `docs/method.md`, "Geodesics". Points are projected onto the sphere before anything else, and of
vectors the tangent part at their point is taken, so that errors of rounding do not add up over many
steps. All functions have finite derivatives, where points coincide or lie opposite each other too.
Squares of vectors longer than 1e18 overflow. Half precision is computed in float32 and rounded
once.

In float32, results are accurate to 2e-6 of R up to an angle of 2.9, and `transport` to 2e-6 of ‖v‖.
Next to angle 0 they are accurate to 2e-7 of R, as the points themselves are. Closer to the opposite
point, `log`, `interpolate` and `transport` lose as much as the problem does: an error of 1e-7 of a
point turns the direction by 1e-7/(π − θ).

Dimensions:
  d  ambient dimension; points lie on S^{d-1} of radius R in ℝ^d, always the last axis
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sphere_ar_jax.sphere import geometry


def _wide(x: ArrayLike) -> jax.Array:
    """The array in float32 at least."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def _unit(x: ArrayLike) -> jax.Array:
    """The direction of x, in float32 at least."""
    return geometry.l2_normalize(_wide(x))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """⟨a, b⟩ over the last axis, which is kept."""
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _across(u: jax.Array, v: jax.Array) -> jax.Array:
    """The part of v across u, for unit vectors; its length is sin θ.

    It begins with v − u or v + u, whichever is short, because ⟨u, v⟩ u would cancel most of v.
    """
    rest = jnp.where(_dot(u, v) > 0, v - u, v + u)
    return rest - _dot(u, rest) * u


def _cosine_and_sinc(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes cos φ and sin φ/φ of φ², smoothly at 0 too."""
    small = square < 1e-2
    angle = jnp.sqrt(jnp.where(small, 1, square))
    square = jnp.where(small, square, 0)  # the series of a large number would overflow
    cosine = 1 - square / 2 * (1 - square / 12 * (1 - square / 30))
    sinc = 1 - square / 6 * (1 - square / 20 * (1 - square / 42))
    cosine = jnp.where(small, cosine, jnp.cos(angle))
    return cosine, jnp.where(small, sinc, jnp.sin(angle) / angle)


def _tangent(u: jax.Array, v: jax.Array) -> jax.Array:
    """`tangent` at a unit vector u."""
    return v - _dot(u, v) * u


def _log(u: jax.Array, v: jax.Array) -> jax.Array:
    """`log` on the unit sphere."""
    across = _across(u, v)
    square = _dot(across, across)
    near = (_dot(u, v) > 0) & (square < 1e-3)
    # arcsin(s)/s in powers of s²; unlike an angle and a direction it is smooth at s = 0.
    ratio = 1 + square / 6 * (1 + square * 9 / 20 * (1 + square * 25 / 42))
    return jnp.where(near, ratio * across, geometry.angle(u, v) * geometry.l2_normalize(across))


def _geodesic(u: jax.Array, w: jax.Array, t: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """`geodesic` on the unit sphere, for a tangent w."""
    t = jnp.asarray(t, u.dtype)
    square = _dot(w, w)
    cosine, sinc = _cosine_and_sinc(t * t * square)
    point = geometry.l2_normalize(cosine * u + t * sinc * w)
    return point, _tangent(point, cosine * w - t * square * sinc * u)


def tangent(x: ArrayLike, v: ArrayLike) -> jax.Array:
    """The tangent part of v at the point x, v − ⟨x, v⟩ x/‖x‖².

    Args:
      x: (..., d) points.
      v: (..., d) vectors of the same dtype.

    Returns:
      (..., d) of the same dtype.
    """
    return _tangent(_unit(x), _wide(v)).astype(jnp.asarray(x).dtype)


def distance(x: ArrayLike, y: ArrayLike, radius: float | None = None) -> jax.Array:
    """The length R θ of the shortest way from x to y along the sphere.

    Its derivative is 0 where x = y and where x = −y, where it has none.

    Args:
      x: (..., d) points.
      y: (..., d) points of the same dtype.
      radius: R > 0; None stands for √d.

    Returns:
      (...) in [0, π R], of the same dtype.
    """
    x = jnp.asarray(x)
    theta = geometry.angle(_unit(x), _unit(y))[..., 0]
    return (geometry.radius(x.shape[-1], radius) * theta).astype(x.dtype)


def geodesic(
    x: ArrayLike, v: ArrayLike, t: ArrayLike, radius: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Follows the geodesic that leaves x with velocity v for the time t.

    With φ = ‖v‖/R the point is cos(tφ) x + sin(tφ)/φ v, and its velocity −φ sin(tφ) x + cos(tφ) v.

    Args:
      x: (..., d) points.
      v: (..., d) velocities of the same dtype.
      t: any numbers, of a shape that broadcasts with x, as (..., 1) or ().
      radius: R > 0; None stands for √d.

    Returns:
      (point, velocity), (..., d) each of the same dtype. The point has norm R; the velocity is
      tangent there and as long as v.
    """
    x = jnp.asarray(x)
    R = geometry.radius(x.shape[-1], radius)
    u = _unit(x)
    point, velocity = _geodesic(u, _tangent(u, _wide(v)) / R, t)
    return (R * point).astype(x.dtype), (R * velocity).astype(x.dtype)


def exp(x: ArrayLike, v: ArrayLike, radius: float | None = None) -> jax.Array:
    """The exponential map: the point that the geodesic from x with velocity v reaches at t = 1.

    Args:
      x: (..., d) points.
      v: (..., d) tangent vectors of the same dtype.
      radius: R > 0; None stands for √d.

    Returns:
      (..., d) of norm R and of the same dtype.
    """
    return geodesic(x, v, 1.0, radius)[0]


def log(x: ArrayLike, y: ArrayLike, radius: float | None = None) -> jax.Array:
    """The tangent vector at x whose geodesic reaches y at t = 1, the inverse of `exp`.

    Its length is R θ ≤ π R. At the opposite point −x every direction is as short as another; 0 is
    returned there.

    Args:
      x: (..., d) points.
      y: (..., d) points of the same dtype.
      radius: R > 0; None stands for √d.

    Returns:
      (..., d) of the same dtype.
    """
    x = jnp.asarray(x)
    return (geometry.radius(x.shape[-1], radius) * _log(_unit(x), _unit(y))).astype(x.dtype)


def transport(x: ArrayLike, y: ArrayLike, v: ArrayLike) -> jax.Array:
    """Parallel transport of the tangent vector v at x along the shortest geodesic to y.

    It is v − 2⟨m, v⟩ m with m the unit vector halfway between x and y. For any m this keeps
    lengths and angles. To the opposite point v goes unchanged.

    Args:
      x: (..., d) points.
      y: (..., d) points of the same dtype.
      v: (..., d) tangent vectors at x of the same dtype.

    Returns:
      (..., d) tangent at y, of the same dtype.
    """
    u = _unit(x)
    halfway = geometry.l2_normalize(u + _unit(y))
    w = _tangent(u, _wide(v))
    return (w - 2 * _dot(halfway, w) * halfway).astype(jnp.asarray(x).dtype)


def interpolate(
    x0: ArrayLike, x1: ArrayLike, t: ArrayLike, radius: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """The point x_t of the geodesic from x0 to x1 at time t, and its velocity u_t.

    With the angle θ between x0 and x1:

      x_t = [sin((1 − t)θ) x0 + sin(tθ) x1]/sin θ
      u_t = θ/sin θ · [−cos((1 − t)θ) x0 + cos(tθ) x1]

    Between opposite points, x_t stays at x0 and u_t is 0.

    Args:
      x0: (..., d) points.
      x1: (..., d) points of the same dtype.
      t: numbers in [0, 1] of a shape that broadcasts with x0, as (..., 1) or ().
      radius: R > 0; None stands for √d.

    Returns:
      (x_t, u_t), (..., d) each of the same dtype; x_t has norm R, and u_t is tangent there.
    """
    x0 = jnp.asarray(x0)
    R = geometry.radius(x0.shape[-1], radius)
    u = _unit(x0)
    point, velocity = _geodesic(u, _log(u, _unit(x1)), t)
    return (R * point).astype(x0.dtype), (R * velocity).astype(x0.dtype)
