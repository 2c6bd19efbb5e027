"""Classifier-free guidance of a velocity, and its scale over the tokens (paper §4.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SCHEDULES = ('linear', 'constant')


def guide(v_cond: jax.Array, v_null: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Classifier-free guidance on the velocity: v_null + scale·(v_cond − v_null), (..., d)."""
    return v_null + scale * (v_cond - v_null)


class Guidance(NamedTuple):
    """How the velocities of conditional rows and null rows of one token become one.

    Attributes:
      scale: () s_k. apart: () bool, whether conditional and null rows go their own ways, each with
        its own velocity.
      interval: (low, high), the times t with low ≤ t < high that are guided; None guides at all
        times.
    """

    scale: jax.Array
    apart: jax.Array
    interval: tuple[float, float] | None = None

    def combine(self, v: jax.Array) -> jax.Array:
        """v (2B, d), conditional rows first → the velocities (2B, d) that the rows follow."""
        guided = guide(*jnp.split(v, 2), self.scale)
        return jnp.where(self.apart, v, jnp.concatenate([guided, guided]))


def guidance_scales(scale: jax.Array | float, num_tokens: int, schedule: str) -> jax.Array:
    """The scale s_k of every token k of L: 'linear' 1 + (scale − 1)·k/L, 'constant' scale.

    Args:
      scale: float or scalar array, ≥ 1 in normal use. num_tokens: L. schedule: one of `SCHEDULES`.
    Returns:
      (L,) float32.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'guidance schedule {schedule!r} is not one of {", ".join(SCHEDULES)}')
    scale = jnp.asarray(scale, jnp.float32)
    if schedule == 'constant':
        return jnp.broadcast_to(scale, (num_tokens,))
    return 1 + (scale - 1) * jnp.arange(num_tokens, dtype=jnp.float32) / num_tokens
