"""Captions as a condition: the transformer reads a text's tokens in place of class tokens.

A caption is a row of T numbers of a vocabulary, filled up with one that ends captions (see
`docs/text.md`). Each number is a learned token, and each place in the caption has a learned
position. The caption that stands for no condition is one more number, T times. An optional
encoder in front of the AR model lets each token see the whole caption.

Dimensions:
  B  images     T  numbers of a caption     V  size of the vocabulary     D  width of the AR model
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.conditions.classes import check_labels, dropped
from sphere_ar_jax.runtime.console import UserError


class Text(nn.Module):
    """The tokens of captions.

    Captions have the numbers 0 to vocabulary_size − 1; vocabulary_size itself, in all places,
    stands for no caption.

    Attributes:
      vocabulary_size: V.
      length: T.
      width: D.
      encoder_depth: blocks of a transformer in front, in which all places of a caption see each
        other; 0 leaves it out.
      heads: attention heads of these blocks.
      dtype: dtype of their computation; parameters are float32.
    """

    vocabulary_size: int
    length: int
    width: int
    encoder_depth: int = 0
    heads: int = 1
    dtype: DTypeLike = jnp.float32

    def example(self) -> jax.Array:
        """Returns the caption of one image, (1, T) int32."""
        return jnp.zeros((1, self.length), jnp.int32)

    def setup(self) -> None:
        shape = (self.vocabulary_size + 1, self.width)
        self.text_embedding = self.param('text_embedding', transformer.INIT, shape)
        shape = (self.length, self.width)
        self.text_positions = self.param('text_positions', transformer.INIT, shape)
        if self.encoder_depth:
            self.text_encoder = transformer.Stack(
                self.encoder_depth, self.heads, causal=False, dtype=self.dtype, scan=False
            )

    def embed(self, labels: jax.Array) -> jax.Array:
        """Turns captions (B, T) int32 into tokens (B, T, D) float32.

        Raises:
          UserError: a number is beyond the vocabulary.
        """
        check_labels(labels, self.vocabulary_size + 1)
        x = jnp.take(self.text_embedding, labels, axis=0) + self.text_positions[None]
        if not self.encoder_depth:
            return x
        # Places are told apart by their learned positions alone.
        at_rest = jnp.zeros((self.length, transformer.head_dim(self.width, self.heads) // 2))
        return self.text_encoder(x, at_rest)[0]

    def embed_at(self, numbers: jax.Array, k: jax.Array | int) -> jax.Array:
        """Turns number k of captions, (B,) int32, into tokens (B, D) float32; 0 ≤ k < T.

        It is for captions that are written number by number, which have no encoder.
        """
        position = jax.lax.dynamic_slice_in_dim(self.text_positions, k, 1)
        return jnp.take(self.text_embedding, numbers, axis=0) + position

    def null(self, labels: jax.Array) -> jax.Array:
        """Returns the caption that stands for none, (B, T) int32."""
        # As for classes, the labels' own dtype might be too narrow for it.
        return jnp.full(labels.shape, self.vocabulary_size, jnp.int32)

    def drop(self, keys: jax.Array, labels: jax.Array, probability: float) -> jax.Array:
        """Replaces each caption by the one that stands for none, see `dropped`."""
        return dropped(keys, labels, self.null(labels), probability)

    def check(self, labels: Any) -> None:
        """Checks that labels are captions (B, T) of the vocabulary's numbers.

        Raises:
          UserError: they are not; or there are none.
        """
        if not hasattr(labels, 'dtype'):
            labels = np.asarray(labels)
        is_kind = labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.number)
        if not is_kind or labels.shape[1] != self.length or not labels.size:
            raise UserError(
                f'this model draws for texts: give texts, or (n, {self.length}) numbers of them, '
                f'not {labels.shape}'
            )
        check_labels(labels, self.vocabulary_size)
