"""Rectified flow between noise (t = 0) and data (t = 1): path and target (paper §3.3).

Dimensions:
  N    rows, i.e. tokens that are integrated at once
  d    latent dimension
"""


def interpolate(noise, z, t):
    """x_t = (1 − t)·noise + t·z, the straight path. noise, z: (..., d); t: (...) in [0, 1]. → (...,
    d).
    """
    t = t[..., None]
    return (1 - t) * noise + t * z


def target_velocity(noise, z):
    """The velocity of `interpolate`, v = z − noise, (..., d)."""
    return z - noise
