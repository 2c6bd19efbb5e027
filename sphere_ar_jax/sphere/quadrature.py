"""Tanh-sinh quadrature on (0, 1), for integrands that may be singular at both ends.

∫₀¹ f(y) dy is Σ f(y_i)·w_i with y(t) = 1/(1 + exp(−π sinh t)) at equal steps of t. Source:
Takahasi & Mori 1974, "Double exponential formulas for numerical integration".

Dimensions:
  m  nodes
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Nodes(NamedTuple):
    """The nodes of a rule, m each.

    Attributes:
      log_y: log y, exact next to 0.
      one_minus_y: 1 − y, exact next to 1.
      log_weight: log w, the logarithm of dy/dt times the step.
    """

    log_y: np.ndarray | jax.Array
    one_minus_y: np.ndarray | jax.Array
    log_weight: np.ndarray | jax.Array

    def beside(self, x: jax.Array) -> 'Nodes':
        """The same nodes in the dtype of x, of a shape (1, …, 1, m) that broadcasts with (…, 1)."""

        def shaped(values: np.ndarray | jax.Array) -> jax.Array:
            return jnp.asarray(values, x.dtype).reshape(*(1,) * x.ndim, -1)

        return Nodes(*map(shaped, self))


def tanh_sinh(step: float, first: int, stop: int) -> Nodes:
    """The rule whose nodes lie at t = first·step, …, (stop − 1)·step, in float64."""
    t = np.arange(first, stop) * step
    log_y = -np.logaddexp(0, -np.pi * np.sinh(t))
    one_minus_y = np.exp(-np.logaddexp(0, np.pi * np.sinh(t)))
    log_weight = np.log(np.pi * np.cosh(t) * step) + log_y + np.log(one_minus_y)
    return Nodes(log_y, one_minus_y, log_weight)
