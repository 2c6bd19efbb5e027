"""Heads of the AR model: how one token is drawn given its condition, chosen by a word of the
config.

A head is a Flax module, the field `head` of `ar.AR`. It owns its loss and the steps of its sampler.

Dimensions:
  B  images     L  tokens of an image     m  noisy copies of every token while training     R  rows
  of the sampler d  latent dimension     D  width of the AR model
"""

from typing import Any, Protocol

import jax

from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.flow.plan import Plan
from sphere_ar_jax.models.heads.flow import FlowHead
from sphere_ar_jax.models.heads.mean_velocity import MeanVelocity

Draws = Any  # a tree of arrays


class Head(Protocol):
    """A distribution of the next token. `loss` reads parameters through Flax; `draw_token` is given
    them.
    """

    def draws(self, keys: jax.Array, shape: tuple[int, int, int]) -> Draws:
        """The random draws of `loss`, one key for each image: keys (B,), shape (m, L, d)."""

    def example(self, shape: tuple[int, int, int]) -> Draws:
        """Draws of one image, of the right shapes; their values do not matter."""

    def loss(
        self, c: jax.Array, z: jax.Array, draws: Draws
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss () float32, scalars ()) of tokens z (B, L, d) given their conditions c (B, L, D)."""

    def prepare(self, params: Any, plan: Plan) -> Any:
        """What `draw_token` needs of a plan and computes once for all tokens: a tree with a leading
        axis of tables.
        """

    def draw_token(
        self, params: Any, c: jax.Array, noise: jax.Array, solver: Any, guidance: Guidance | None
    ) -> jax.Array:
        """One token of every row, (R, d), which the sampler then projects.

        Args:
          params: of the head. c: (R, D) conditions; with guidance conditional rows, then null rows.
          noise: (n, R, d) standard normal. solver: one element of `prepare`.
        """


# The config's words `ar.head` and `distillation_training.head` → the module.
HEADS = {'flow': FlowHead, 'mean_velocity': MeanVelocity}
