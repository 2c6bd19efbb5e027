"""A flow head whose paths are geodesics of the sphere.

See `docs/method.md`, "Riemannian head". The network is that of the flow head.

Dimensions:
  B  images
  L  tokens of an image
  m  noisy copies of every token while training
  R  rows of the sampler
  d  latent dimension
  D  width of the condition
"""

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from sphere_ar_jax.flow import solvers
from sphere_ar_jax.models.heads.flow import FlowHead
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sphere import geodesics, geometry


def geodesic_step(
    row: tuple[jax.Array, jax.Array],
    x: jax.Array,
    memory: jax.Array,
    v: jax.Array,
    noise: jax.Array | None = None,
    radius: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of a table of `solvers.GEODESIC` on the sphere of radius R.

    Without noise x goes to exp_x(w_m m + w_v v), and the memory is v, transported there. With
    noise it is the step of `solvers.mixing`.

    Args:
      row: (t, W) of the table, () and (2, 4).
      x: (R, d) points.
      memory: (R, d) tangent vectors at x.
      v: (R, d) velocities, of which the tangent parts at x count.
      noise: (R, d) standard normal, or None.
      radius: R > 0 of the sphere; None stands for √d.

    Returns:
      The next (x, memory).
    """
    t, w = row
    if noise is None:
        following = geodesics.exp(x, w[0, 1] * memory + w[0, 2] * v, radius)
        return following, w[1, 2] * geodesics.transport(x, following, v)
    h = w[0, 2]
    eta = w[0, 3]
    end = geodesics.exp(x, (1 - t) * v, radius)
    start = geodesics.exp(x, -t * v, radius)
    mixed = geometry.project((1 - eta) * start + eta * geometry.project(noise, radius), radius)
    following, _ = geodesics.interpolate(mixed, end, t + h, radius)
    return following, memory


class Riemannian(FlowHead):
    """A flow head along geodesics: x₀ is uniform on the sphere, and x_t never leaves it.

    The velocity is the network's output, projected to the tangent space at x_t. Tokens must lie on
    the sphere of the head's radius.

    Raises:
      ValueError: as `FlowHead`, or prior_scale is not 1.
    """

    SOLVERS: ClassVar[tuple[str, ...]] = solvers.GEODESIC

    def __post_init__(self) -> None:
        if self.prior_scale != 1:
            raise ValueError(
                f'prior_scale is {self.prior_scale}, but the start of a geodesic has no length to '
                'change: leave it at 1'
            )
        super().__post_init__()

    def weighted(self, error: jax.Array) -> jax.Array:
        """Gives a squared error of velocities the weight d/R².

        The velocities are R·θ long, so that the radius does not change the scale of the loss. At
        R = √d the weight is 1, and nothing is multiplied.
        """
        if self.radius is None:
            return error
        return self.latent_dim / self.radius**2 * error

    def loss(
        self, c: jax.Array, z: jax.Array, draws: PyTree
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Riemannian flow-matching loss of every token: `weighted` mean (v(x_t, t, c) − u_t)².

        Here x_t and u_t are point and velocity of the geodesic from x₀ = N_R(ε) to z at the time
        t = sigmoid(t_normal). Source: arXiv 2302.03660, eq. 7, with the geodesic distance.

        Args:
          c: (B, L, D) conditions.
          z: (B, L, d) tokens; no gradient flows into them.
          draws: (t_normal, ε) of the method `draws`.

        Returns:
          (loss, scalars): the loss () float32. The scalar angle is the mean angle, in radians,
            between z and the predicted end exp((1 − t)·v) of the geodesic.
        """
        t_normal, noise = draws
        z = jax.lax.stop_gradient(z)
        t = jax.nn.sigmoid(t_normal)
        copies = jnp.broadcast_to(z, noise.shape)
        start = geometry.project(noise, self.radius)
        x_t, u_t = geodesics.interpolate(start, copies, t[..., None], self.radius)
        v = geodesics.tangent(x_t, self.velocities(x_t, c, t))
        end = geodesics.exp(x_t, (1 - t[..., None]) * v, self.radius)
        angle = geodesics.distance(end, copies, radius=1.0)
        return self.weighted(jnp.mean(jnp.square(v - u_t))), {'angle': jnp.mean(angle)}

    def _way(
        self, noise: jax.Array, t: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, PyTree, Callable[..., tuple[jax.Array, jax.Array]]]:
        """A uniform start, the times beside the weights, and `geodesic_step`."""
        step = functools.partial(geodesic_step, radius=self.radius)
        return geometry.project(noise, self.radius), (t, weights), step
