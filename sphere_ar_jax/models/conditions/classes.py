"""Class labels as a condition (paper §4; `docs/method.md`, "Condition").

Each class is C learned tokens. One more class stands for no label.

Dimensions:
  B  images     C  class tokens     D  width of the AR model
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sphere_ar_jax.models import transformer
from sphere_ar_jax.runtime.console import UserError


def check_labels(labels: Any, count: int) -> None:
    """Checks that labels are whole numbers from 0 to count − 1.

    No label is rounded or cast, so that truth values and fractions are refused too. A traced array
    shows only its dtype, and an array that other processes share only to all of them; the numbers
    of both are not checked.

    Args:
      labels: a NumPy or JAX array, a list or a number.
      count: number of classes.

    Raises:
      UserError: they are not.
    """
    if not hasattr(labels, 'dtype'):
        labels = np.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f'labels must be whole numbers between 0 and {count - 1}, but are {labels.dtype}'
        )
    hidden = isinstance(labels, jax.core.Tracer) or not getattr(
        labels, 'is_fully_addressable', True
    )
    if hidden or not labels.size:
        return
    numbers = np.asarray(labels)
    least = numbers.min()
    largest = numbers.max()
    if least < 0 or largest >= count:
        raise UserError(
            f'labels must lie between 0 and {count - 1}, but go from {least} to {largest}'
        )


def dropped(keys: jax.Array, labels: jax.Array, null: jax.Array, probability: float) -> jax.Array:
    """Replaces each image's labels by its null labels with a probability.

    Args:
      keys: one PRNG key for each image, (B,).
      labels: (B, …).
      null: the labels that stand for no condition, (B, …).
      probability: a number in [0, 1].

    Returns:
      (B, …), of the dtype of `null`.
    """

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, probability)

    are_dropped = jax.vmap(draw)(keys).reshape(-1, *[1] * (labels.ndim - 1))
    return jnp.where(are_dropped, null, labels.astype(null.dtype))


class Classes(nn.Module):
    """A table of class tokens.

    Classes have the numbers 0 to num_classes − 1; num_classes itself is the null class.

    Attributes:
      num_classes: number of the data's classes.
      length: C.
      width: D.
    """

    num_classes: int
    length: int
    width: int

    def example(self) -> jax.Array:
        """Returns the class of one image, (1,) int32."""
        return jnp.zeros(1, jnp.int32)

    @nn.compact
    def embed(self, labels: jax.Array) -> jax.Array:
        """Turns labels (B,) int32 into tokens (B, C, D) float32.

        Raises:
          UserError: a label is neither a class nor the null class; see `check_labels`.
        """
        check_labels(labels, self.num_classes + 1)
        shape = (self.num_classes + 1, self.length, self.width)
        table = self.param('cls_embedding', transformer.INIT, shape)
        return jnp.take(table, labels, axis=0)

    def null(self, labels: jax.Array) -> jax.Array:
        """Returns the null class for every image, (B,) int32."""
        # The labels' own dtype might be too narrow for it, as uint8 is for 1000.
        return jnp.full(labels.shape, self.num_classes, jnp.int32)

    def drop(self, keys: jax.Array, labels: jax.Array, probability: float) -> jax.Array:
        """Replaces each image's class by the null class with a probability, see `dropped`."""
        return dropped(keys, labels, self.null(labels), probability)

    def check(self, labels: ArrayLike) -> None:
        """Checks that labels are a list of whole numbers from 0 to num_classes − 1.

        Raises:
          UserError: they are not, see `check_labels`; or there are none.
        """
        check_labels(labels, self.num_classes)
        if np.ndim(labels) != 1 or not np.size(labels):
            raise UserError(
                f'labels must be a list of numbers, one for each image, but are {np.shape(labels)}'
            )
