"""Classifier-free guidance of a velocity, and its scale over the tokens."""

import jax.numpy as jnp

SCHEDULES = ('linear', 'constant')


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
