"""Classifier-free guidance of a velocity, and its scale over the tokens (paper §4.1).

See `docs/method.md`, "Guidance".

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

SCHEDULES = ('linear', 'constant')
_CLOSE = 1e-5  # A solver's time this near to an end of an interval is that end.


def guide(v_cond: jax.Array, v_null: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Classifier-free guidance of the velocity: v_null + scale·(v_cond − v_null), (..., d)."""
    return v_null + scale * (v_cond - v_null)


def _beside_rows(values: ArrayLike) -> jax.Array:
    """Values () or (B,) in a shape that broadcasts with rows (B, d): () or (B, 1)."""
    values = jnp.asarray(values)
    return values[:, None] if values.ndim else values


class Guidance(NamedTuple):
    """How the velocities of conditional rows and null rows of one token become one.

    Attributes:
      scale: s_k, () for all images or (B,) for each.
      apart: bool of the scale's shape, whether each conditional row and each null row follows its
        own velocity, without guidance.
      interval: (low, high); only times low ≤ t < high are guided, t ≤ 1 if high is 1. None guides
        at all times.
    """

    scale: jax.Array
    apart: jax.Array
    interval: tuple[float, float] | None = None

    def guides_at(self, t: jax.Array) -> jax.Array:
        """Tells which times t are guided, bool of the shape of t.

        A solver's times are running float32 sums. Up to 1,000 steps they leave its grid by less
        than `_CLOSE`.
        """
        if self.interval is None:
            return jnp.ones_like(t, bool)
        low, high = self.interval
        # An interval up to 1 includes Heun's last evaluation, which is at t = 1.
        end = high if high < 1 else math.inf
        return (low - _CLOSE <= t) & (t < end - _CLOSE)

    def combine(self, v: jax.Array) -> jax.Array:
        """Returns the velocities (2B, d) that the rows follow at a guided time.

        Args:
          v: (2B, d), the velocities of the conditional rows, then those of the null rows.
        """
        pairs = v.reshape(2, -1, *v.shape[1:])
        guided = guide(pairs[0], pairs[1], _beside_rows(self.scale))
        return jnp.where(_beside_rows(self.apart), pairs, guided).reshape(v.shape)


def guidance_scales(scale: ArrayLike, num_tokens: int, schedule: str) -> jax.Array:
    """The guidance scale s_k of every token k.

    The schedule 'linear' gives 1 + (scale − 1)·k/L, and 'constant' gives the scale itself.

    Args:
      scale: s, () for all images or (B,) for each; at least 1 in normal use.
      num_tokens: L.
      schedule: one of `SCHEDULES`.

    Returns:
      (L,) float32, or (L, B) for a scale (B,).

    Raises:
      ValueError: there is no such schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'guidance schedule {schedule!r} is not one of {", ".join(SCHEDULES)}')
    scale = jnp.asarray(scale, jnp.float32)
    if schedule == 'constant':
        return jnp.broadcast_to(scale, (num_tokens, *scale.shape))
    k = jnp.arange(num_tokens, dtype=jnp.float32)
    if scale.ndim:
        k = k[:, None]
        scale = scale[None]
    return 1 + (scale - 1) * k / num_tokens
