"""Heads of the AR model: how one token is drawn given its condition.

A head is a Flax module, the field `head` of `ar.AR`. The config chooses it by a word. It has a loss
and the steps of its sampler. See `docs/extending.md` for one of your own.

Dimensions:
  B  images
  L  tokens of an image
  m  noisy copies of every token while training
  R  rows of the sampler
  d  latent dimension
  D  width of the AR model
"""

from typing import Any, Protocol, TypeAlias

import jax

from sphere_ar_jax.flow import paths
from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.flow.plan import Plan
from sphere_ar_jax.models.heads.direction_magnitude import DirectionMagnitude
from sphere_ar_jax.models.heads.flow import FlowHead
from sphere_ar_jax.models.heads.mean_velocity import GeodesicMeanVelocity, MeanVelocity
from sphere_ar_jax.models.heads.riemannian import Riemannian
from sphere_ar_jax.runtime.types import PyTree

# What the loss of a head needs besides conditions and tokens: a tree of arrays.
Draws: TypeAlias = PyTree


class Head(Protocol):
    """A distribution of the next token.

    `loss` reads parameters through Flax. `prepare` and `draw_token` get them as an argument. A head
    whose paths are not straight names them in a class variable PATH, see `paths.Path`.
    """

    def draws(self, keys: jax.Array, shape: tuple[int, int, int]) -> Draws:
        """The random draws of `loss`.

        Args:
          keys: (B,) PRNG keys, one for each image.
          shape: (m, L, d).
        """

    def example(self, shape: tuple[int, int, int]) -> Draws:
        """What `loss` takes as draws for one image, in the right shapes; values do not matter.

        Args:
          shape: (m, L, d).
        """

    def loss(
        self, c: jax.Array, z: jax.Array, draws: Draws
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of the tokens given their conditions.

        Args:
          c: (B, L, D) conditions.
          z: (B, L, d) tokens.
          draws: see `example`.

        Returns:
          (loss, scalars): the loss () float32, and scalars () for the log by name.
        """

    def prepare(self, params: PyTree, plan: Plan) -> PyTree:
        """What `draw_token` needs of a plan and computes once for all tokens.

        Args:
          params: parameters of the head.
          plan: what every token's solver does.

        Returns:
          A tree of arrays with a leading axis of the plan's tables.
        """

    def draw_token(
        self,
        params: PyTree,
        c: jax.Array,
        noise: jax.Array,
        solver: PyTree,
        guidance: Guidance | None,
    ) -> jax.Array:
        """One token of every row, (R, d), which the sampler then projects.

        Args:
          params: parameters of the head.
          c: (R, D) conditions; with guidance, conditional rows come first, then null rows.
          noise: (n, R, d) standard normal.
          solver: one element of what `prepare` returned.
          guidance: how the two kinds of rows act together; None where all rows are alike.
        """

    def clone(self, **updates: Any) -> 'Head':
        """Copies the module with other values for some fields, as every Flax module does.

        The sampler asks for scan=False, so a head has a field `scan`.
        """


# The words of `ar.head` and `distillation_training.head` in the config, and their modules.
HEADS: dict[str, type[Head]] = {
    'direction_magnitude': DirectionMagnitude,
    'flow': FlowHead,
    'geodesic_mean_velocity': GeodesicMeanVelocity,
    'mean_velocity': MeanVelocity,
    'riemannian': Riemannian,
}


def check_solver(head: Any, solver: str) -> None:
    """Checks that the sampler of a head has a solver.

    Args:
      head: a `Head`, or its class.
      solver: one of `solvers.SOLVERS`.

    Raises:
      ValueError: the head has other solvers.
    """
    known = getattr(head, 'PATH', paths.Straight).SOLVERS
    if solver not in known:
        raise ValueError(f'this head has no solver {solver!r}: use {", ".join(known)}')
