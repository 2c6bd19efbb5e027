"""Class labels as a condition (paper §4): C learned tokens for each class; one more class stands
for no label.

Dimensions:
  B  images     C  class tokens     D  width of the AR model
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.models import transformer


class Classes(nn.Module):
    """A table of class tokens. Class ids run from 0 to num_classes − 1; num_classes itself is the
    null class.

    Attributes:
      num_classes: as the data has. length: C. width: D.
    """

    num_classes: int
    length: int
    width: int

    def example(self) -> jax.Array:
        """The class of one image, (1,) int32."""
        return jnp.zeros(1, jnp.int32)

    @nn.compact
    def embed(self, labels: jax.Array) -> jax.Array:
        """labels (B,) int32 → tokens (B, C, D) float32."""
        shape = (self.num_classes + 1, self.length, self.width)
        table = self.param('cls_embedding', transformer.INIT, shape)
        return jnp.take(table, labels, axis=0)

    def null(self, labels: jax.Array) -> jax.Array:
        """The null class for every image, (B,) of the labels' dtype."""
        return jnp.full_like(labels, self.num_classes)

    def drop(self, keys: jax.Array, labels: jax.Array, probability: float) -> jax.Array:
        """labels (B,), each replaced by the null class with the given probability in [0, 1]; keys
        (B,).
        """

        def draw(key):
            return jax.random.bernoulli(key, probability)

        return jnp.where(jax.vmap(draw)(keys), self.num_classes, labels)

    def check(self, labels: np.ndarray) -> None:
        """Raise ValueError for labels that are not whole numbers from 0 to num_classes − 1."""
        labels = np.asarray(labels)
        if labels.dtype.kind not in 'iu':
            raise ValueError(f'labels are {labels.dtype}, but must be whole numbers')
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f'labels go from {labels.min()} to {labels.max()}, '
                f'but the classes of this model from 0 to {self.num_classes - 1}'
            )
