"""The sphere of radius R = √d on which every token lives (paper §3).

Dimensions:
  d  ambient (latent) dimension; points lie on S^{d-1} ⊂ ℝ^d, always the last axis
"""

import jax
import jax.numpy as jnp

EPS = 1e-7  # smallest norm that is divided by


def _unit_scale(z):
    """A power of two s with max|s·z| in [½, 1), so that squares neither overflow nor vanish."""
    limit = -jnp.finfo(z.dtype).minexp
    _, exponent = jnp.frexp(jnp.max(jnp.abs(z), axis=-1, keepdims=True))
    return jax.lax.stop_gradient(
        jnp.ldexp(jnp.ones((), z.dtype), -jnp.clip(exponent, -limit, limit))
    )


def _norm(z):
    """‖z‖ over the last axis (kept), without overflow; its derivative at 0 is 0."""
    s = _unit_scale(z)
    square = jnp.sum(jnp.square(z * s), axis=-1, keepdims=True)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0) / s


@jax.custom_jvp
def _normalize(z):
    return z / jnp.maximum(_norm(z), jnp.asarray(EPS, z.dtype))


@_normalize.defjvp
def _normalize_jvp(primals, tangents):
    (z,), (z_dot,) = primals, tangents
    norm, w = _norm(z), z * _unit_scale(z)
    # Below EPS the value is linear in z: the slope of the direction, up to 1e37, must not enter
    # higher derivatives.
    w = jnp.where(norm < EPS, jax.lax.stop_gradient(w), w)
    # First that multiple of w is taken off that makes the largest coordinate 0: of a radial ż it
    # leaves exactly 0, in whatever order the sums below are added up. The projection of what is
    # left is that of ż.
    largest = jnp.argmax(jnp.abs(w), axis=-1, keepdims=True)
    pivot = jnp.take_along_axis(w, largest, axis=-1)
    rest = (
        z_dot - jnp.take_along_axis(z_dot, largest, axis=-1) / jnp.where(pivot == 0, 1, pivot) * w
    )
    square = jnp.sum(w * w, axis=-1, keepdims=True)
    radial = jnp.sum(w * rest, axis=-1, keepdims=True) / jnp.where(square > 0, square, 1)
    tangent = (rest - radial * w) / jnp.maximum(norm, jnp.asarray(EPS, z.dtype))
    return _normalize(z), tangent


def l2_normalize(z):
    """Unit vectors: `z / max(‖z‖, 1e-7)` over the last axis.

    The derivative is the exact tangent projection `(I − uuᵀ) ż / max(‖z‖, 1e-7)`, u = z/‖z‖: a
    radial tangent gives exactly 0 (also below 1e-7, where the clamped quotient itself would let it
    through). Finite for every finite z, 0 and 1e30 included; forward, reverse and higher
    derivatives.

    Args:
      z: (..., d), any float type; half precision is computed in float32 and rounded once.
    Returns:
      (..., d) of z's dtype. Source: paper §3.
    """
    return project(z, 1.0)


def radius(d: int) -> float:
    """R = √d, the radius of the sphere that tokens of d dimensions live on."""
    return d**0.5


def project(z, radius=None):
    """The projection N_R(z) = R · l2_normalize(z) onto the sphere of radius R.

    Args:
      z: (..., d), any float type.
      radius: R > 0; √d if not given, as in the paper.
    Returns:
      (..., d) of z's dtype with ‖·‖ = R where ‖z‖ ≥ 1e-7; rounded once. Derivatives: see
        `l2_normalize`.
    Source: paper §3.
    """
    z = jnp.asarray(z)
    R = z.shape[-1] ** 0.5 if radius is None else radius
    compute = jnp.float32 if jnp.finfo(z.dtype).bits < 32 else z.dtype
    return (jnp.asarray(R, compute) * _normalize(z.astype(compute))).astype(z.dtype)


def householder(y, mu):
    """Reflects y by the Householder reflection that takes e₁ to mu: `y − 2⟨y,u⟩u`, u =
    l2_normalize(e₁ − mu).

    Where mu ≈ e₁ (L1 distance below 1e-6) the reflection is undefined and y is returned.

    Args:
      y: (..., d) points. mu: (..., d) unit vectors of the same dtype.
    Returns:
      (..., d). Source: De Cao & Aziz 2020 (arXiv 2006.04437), alg. 1.
    """
    difference = jax.nn.one_hot(jnp.zeros(mu.shape[:-1], int), mu.shape[-1], dtype=mu.dtype) - mu
    u = l2_normalize(difference)
    reflected = y - 2 * jnp.sum(y * u, axis=-1, keepdims=True) * u
    at_pole = jnp.sum(jnp.abs(difference), axis=-1, keepdims=True) < 1e-6
    return jnp.where(at_pole, y, reflected)
