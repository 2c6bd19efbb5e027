"""Rectified flow between noise (t = 0) and data (t = 1): path and target (paper §3.3).

See `docs/method.md`, "Flow loss".

Dimensions:
  d  latent dimension
"""

import jax


def interpolate(noise: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """The point x_t = (1 − t)·noise + t·z of the straight path.

    Args:
      noise: (..., d), the start of the path.
      z: (..., d), its end.
      t: (...) times in [0, 1].

    Returns:
      (..., d).
    """
    t = t[..., None]
    return (1 - t) * noise + t * z


def target_velocity(noise: jax.Array, z: jax.Array) -> jax.Array:
    """The velocity v = z − noise of the path of `interpolate`, (..., d)."""
    return z - noise
