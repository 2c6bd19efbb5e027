"""Class labels as a condition (paper §4; `docs/method.md`, "Condition").

Each class is C learned tokens. One more class stands for no label.

Dimensions:
  B  images     C  class tokens     D  width of the AR model
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sphere_ar_jax.models import transformer


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
        """Turns labels (B,) int32 into tokens (B, C, D) float32."""
        shape = (self.num_classes + 1, self.length, self.width)
        table = self.param('cls_embedding', transformer.INIT, shape)
        return jnp.take(table, labels, axis=0)

    def null(self, labels: jax.Array) -> jax.Array:
        """Returns the null class for every image, (B,) of the labels' dtype."""
        return jnp.full_like(labels, self.num_classes)

    def drop(self, keys: jax.Array, labels: jax.Array, probability: float) -> jax.Array:
        """Replaces each label by the null class with a probability.

        Args:
          keys: one PRNG key for each image, (B,).
          labels: (B,) int32.
          probability: a number in [0, 1].

        Returns:
          (B,) int32.
        """

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(key, probability)

        return jnp.where(jax.vmap(draw)(keys), self.num_classes, labels)

    def check(self, labels: ArrayLike) -> None:
        """Checks that labels are whole numbers from 0 to num_classes − 1.

        Raises:
          ValueError: they are not.
        """
        labels = np.asarray(labels)
        if labels.dtype.kind not in 'iu':
            raise ValueError(f'labels are {labels.dtype}, but must be whole numbers')
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f'labels go from {labels.min()} to {labels.max()}, '
                f'but the classes of this model from 0 to {self.num_classes - 1}'
            )
