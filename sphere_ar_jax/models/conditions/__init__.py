"""Conditions of the AR model: what an image is drawn for, chosen by a word of the config.

A condition is a Flax module, a field of `ar.AR`, whose parameters stand at the top of the AR
model's. Labels are a tree of arrays with a leading axis of images; what stands for "no condition"
is known here alone.

Dimensions:
  B  images     C  tokens of the condition     D  width of the AR model
"""

from typing import Any, Protocol

import jax

from sphere_ar_jax.models.conditions.classes import Classes

Labels = Any  # a tree of arrays (B, …)


class Condition(Protocol):
    """The tokens in front of an image's own, and how they are left out for classifier-free
    guidance.

    Attributes:
      length: C, the same for all labels.
    """

    length: int

    def example(self) -> Labels:
        """Labels of one image, of the right shapes; their values do not matter."""

    def embed(self, labels: Labels) -> jax.Array:
        """The condition's tokens (B, C, D) float32. Reads parameters."""

    def null(self, labels: Labels) -> Labels:
        """Labels of the same shapes that stand for no condition."""

    def drop(self, keys: jax.Array, labels: Labels, probability: float) -> Labels:
        """Labels of which each image's is replaced by the null label with a probability; keys (B,)."""

    def check(self, labels: Labels) -> None:
        """Raise ValueError, one line, for labels that the model does not know."""


# The config's word `ar.condition` → the module.
CONDITIONS = {'classes': Classes}
