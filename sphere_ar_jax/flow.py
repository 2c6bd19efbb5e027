"""Rectified flow between noise (t = 0) and data (t = 1): path, target, score, guidance (spec §6–§7).

Dimensions:
  N    rows, i.e. tokens that are integrated at once
  d    latent dimension
"""

import jax.numpy as jnp

SCHEDULES = ('linear', 'constant')


def interpolate(noise, z, t):
    """x_t = (1 − t)·noise + t·z, the straight path of spec §6. noise, z: (..., d); t: (...) in [0, 1]. → (..., d)."""
    t = t[..., None]
    return (1 - t) * noise + t * z


def target_velocity(noise, z):
    """The velocity of `interpolate`, v = z − noise, (..., d). Spec §6."""
    return z - noise


def score(v, x, t):
    """∇log p_t(x) = (t·v − x)/(1 − t), since t(1−t) + (1−t)² = 1 − t. v, x: (..., d); t scalar < 1. Spec §7."""
    return (t * v - x) / (1 - t)


def guide(v_cond, v_null, scale):
    """Classifier-free guidance on the velocity: v_null + scale·(v_cond − v_null), (..., d). Spec §7."""
    return v_null + scale * (v_cond - v_null)


def guidance_scales(scale, num_tokens, schedule):
    """The scale s_k of every token k of L: 'linear' 1 + (scale − 1)·k/L, 'constant' scale.

    Args:
      scale: float or scalar array, ≥ 1 in normal use. num_tokens: L. schedule: one of `SCHEDULES`.
    Returns:
      (L,) float32. Source: spec §7.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'guidance schedule {schedule!r} is not one of {", ".join(SCHEDULES)}')
    scale = jnp.asarray(scale, jnp.float32)
    if schedule == 'constant':
        return jnp.broadcast_to(scale, (num_tokens,))
    return 1 + (scale - 1) * jnp.arange(num_tokens, dtype=jnp.float32) / num_tokens
