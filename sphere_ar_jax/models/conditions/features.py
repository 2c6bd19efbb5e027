"""Features of a text as a condition: vectors that another model has computed, such as T5 or CLIP.

A text is T vectors of F features (`data.captions.features`). A linear layer turns each into a
token, and each place has a learned position. A place whose features are all 0 holds nothing: it has
a learned token of its own. The condition that stands for none is T such places.

Dimensions:
  B  images     T  places of a text     F  features of a place     D  width of the AR model
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.conditions.classes import dropped
from sphere_ar_jax.runtime.console import UserError


class Features(nn.Module):
    """The tokens of features.

    Attributes:
      length: T.
      features: F.
      width: D.
    """

    length: int
    features: int
    width: int

    def example(self) -> jax.Array:
        """Returns the features of one text, (1, T, F) float32."""
        return jnp.ones((1, self.length, self.features))

    @nn.compact
    def embed(self, labels: jax.Array) -> jax.Array:
        """Turns features (B, T, F) into tokens (B, T, D) float32."""
        labels = jnp.asarray(labels, jnp.float32)
        # Encoders differ in the size of their features, which says nothing.
        largest = jnp.max(jnp.abs(labels), axis=-1, keepdims=True)
        is_empty = largest == 0
        scaled = labels / jnp.where(is_empty, 1, largest)  # Squares of small ones would be 0.
        size = jnp.sqrt(jnp.mean(jnp.square(scaled), axis=-1, keepdims=True))
        unit = scaled / jnp.where(is_empty, 1, size)
        x = nn.Dense(self.width, kernel_init=transformer.INIT, name='features_proj')(unit)
        empty = self.param('features_empty', transformer.INIT, (self.width,))
        positions = self.param('features_positions', transformer.INIT, (self.length, self.width))
        return jnp.where(is_empty, empty[None, None], x) + positions[None]

    def null(self, labels: jax.Array) -> jax.Array:
        """Returns the features that stand for no text, (B, T, F) of zeros."""
        return jnp.zeros_like(labels)

    def drop(self, keys: jax.Array, labels: jax.Array, probability: float) -> jax.Array:
        """Replaces each image's features by zeros with a probability, see `dropped`."""
        return dropped(keys, labels, self.null(labels), probability)

    def check(self, labels: Any) -> None:
        """Checks that labels are features of texts, (B, T, F) floats.

        Raises:
          UserError: they are not, they are not finite or all 0, or there are none.
        """
        shape = np.shape(labels)
        expected = (self.length, self.features)
        is_float = hasattr(labels, 'dtype') and jnp.issubdtype(labels.dtype, jnp.floating)
        if shape[1:] != expected or not shape[0] or not is_float:
            raise UserError(
                f'this model draws for features of texts: give floats (n, {self.length}, '
                f'{self.features}), or texts that ar.features has, not {shape}'
            )
        if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
            return
        values = np.asarray(labels)
        if not np.isfinite(values).all() or not values.any((1, 2)).all():
            raise UserError('features of a text are all 0 or not finite, which stands for no text')
