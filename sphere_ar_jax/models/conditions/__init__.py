"""Conditions of the AR model: what an image is drawn for.

A condition is a Flax module, a field of `ar.AR`. Its parameters stand at the top level of the AR
model's. The config chooses the condition by a word. Labels are a tree of arrays with a leading axis
of images. Only the condition knows which labels stand for "no condition".

Dimensions:
  B  images     C  tokens of the condition     D  width of the AR model
"""

from typing import Any, Protocol, TypeAlias

import jax

from sphere_ar_jax.models.conditions.classes import Classes, check_labels
from sphere_ar_jax.models.conditions.features import Features
from sphere_ar_jax.models.conditions.text import Text

__all__ = ['CONDITIONS', 'Classes', 'Condition', 'Features', 'Labels', 'Text', 'check_labels']

Labels: TypeAlias = Any  # a tree of arrays (B, …)


class Condition(Protocol):
    """The tokens in front of an image's own, and the null labels of classifier-free guidance."""

    @property
    def length(self) -> int:
        """Number C of the condition's tokens, the same for all labels."""

    def example(self) -> Labels:
        """Returns labels of one image, of the right shapes; their values do not matter."""

    def embed(self, labels: Labels) -> jax.Array:
        """Turns labels into the condition's tokens (B, C, D) float32. It reads parameters."""

    def null(self, labels: Labels) -> Labels:
        """Returns labels of the same shapes that stand for no condition."""

    def drop(self, keys: jax.Array, labels: Labels, probability: float) -> Labels:
        """Replaces each image's labels by the null labels with a probability.

        Args:
          keys: one PRNG key for each image, (B,).
          labels: labels of B images.
          probability: a number in [0, 1].

        Returns:
          The labels, some of them replaced.
        """

    def check(self, labels: Labels) -> None:
        """Checks that the model knows labels, which are not traced and must not be null labels.

        Raises:
          ValueError: it does not. The message is one line.
        """


# The config's word `ar.condition` → the module.
CONDITIONS: dict[str, type[Condition]] = {
    'classes': Classes,
    'text': Text,
    'features': Features,
}
