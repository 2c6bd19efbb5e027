"""Paths of a flow from noise (t = 0) to a token (t = 1): straight lines, and geodesics of a sphere.

A path says where a token starts, which velocities a head learns, and how a solver moves along them.
So heads and solvers are the same for both. See `docs/method.md`, "Flow loss" and "Riemannian head".

Dimensions:
  d  latent dimension
"""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from sphere_ar_jax.flow import solvers
from sphere_ar_jax.sphere import geodesics, geometry

# The time t () of an evaluation, and the weights (2, 4) of its step, see `solvers.Table`.
Row = tuple[jax.Array, jax.Array]


class Path(Protocol):
    """A family of paths, one for each start and end.

    Points and velocities are (..., d). A velocity that a path takes may have any direction: the
    path takes the part that it can follow.

    Attributes:
      SOLVERS: the solvers whose tables `step` can read, keys of `solvers.SOLVERS`.
    """

    SOLVERS: ClassVar[tuple[str, ...]]

    def start(self, noise: jax.Array) -> jax.Array:
        """The start x₀ of a path, for standard normal noise (..., d)."""

    def interpolate(
        self, start: jax.Array, z: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The point x_t and the velocity u_t of the path from start to z at the times t (...)."""

    def along(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """The part of the velocities v at x that the path can follow."""

    def move(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """Where the points x arrive by the velocities v in a time of 1."""

    def between(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The velocities by which the points x arrive at y in a time of 1."""

    def weighted(self, error: jax.Array) -> jax.Array:
        """Weighs a squared error of velocities, so that its scale does not depend on the radius."""

    def scalars(self, end: jax.Array, z: jax.Array) -> dict[str, jax.Array]:
        """Scalars () for the log, of predicted ends and true tokens, each (..., d)."""

    def step(
        self, row: Row, x: jax.Array, memory: jax.Array, v: jax.Array, *noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One step of a solver's table.

        Args:
          row: time and weights of the step.
          x: (N, d) points.
          memory: (N, d), what the last step remembered.
          v: (N, d) velocities at x.
          *noise: standard normal (N, d), for a table that takes noise.

        Returns:
          The next (x, memory).
        """


@dataclasses.dataclass(frozen=True)
class Straight:
    """The straight lines of a rectified flow, x_t = (1 − t)·x₀ + t·z (paper §3.3).

    Attributes:
      latent_dim: d.
      radius: R of the sphere of the tokens, of which the loss's weight is made; None stands for √d,
        and for tokens on no sphere.
      prior_scale: s, the standard deviation of x₀ and of all noise of a solver.

    Raises:
      ValueError: radius or prior_scale is not a finite number above 0.
    """

    SOLVERS: ClassVar[tuple[str, ...]] = solvers.STRAIGHT

    latent_dim: int
    radius: float | None = None
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        geometry.check_radius(self.radius)
        geometry.check_above_zero('prior_scale', self.prior_scale)

    def start(self, noise: jax.Array) -> jax.Array:
        """Gives s·ε."""
        return noise if self.prior_scale == 1 else self.prior_scale * noise

    def interpolate(
        self, start: jax.Array, z: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Gives x_t = (1 − t)·x₀ + t·z and u_t = z − x₀."""
        t = t[..., None]
        return (1 - t) * start + t * z, z - start

    def along(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """Gives v itself."""
        del x
        return v

    def move(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """Gives x + v."""
        return x + v

    def between(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Gives y − x."""
        return y - x

    def weighted(self, error: jax.Array) -> jax.Array:
        """Gives the error the weight 2d/(R² + s²d).

        The velocities z − x₀ have a mean square of (R² + s²d)/d, so that neither R nor s changes
        the scale of the loss. At R = √d and s = 1 the weight is 1, and nothing is multiplied. See
        `docs/method.md`, "Radius".
        """
        if self.radius is None and self.prior_scale == 1:
            return error
        d = self.latent_dim
        square = geometry.radius(d, self.radius) ** 2 + self.prior_scale**2 * d
        return 2 * d / square * error

    def scalars(self, end: jax.Array, z: jax.Array) -> dict[str, jax.Array]:
        """token_norm, the mean norm of the predicted ends.

        A predicted end is a mean over possible tokens, so it lies within the sphere.
        """
        del z
        return {'token_norm': jnp.mean(jnp.linalg.norm(end, axis=-1))}

    def step(
        self, row: Row, x: jax.Array, memory: jax.Array, v: jax.Array, *noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`solvers.step`; the noise is scaled as x₀ is."""
        _, weights = row
        return solvers.step(weights, x, memory, v, *map(self.start, noise))


@dataclasses.dataclass(frozen=True)
class Geodesic:
    """Great circles of the sphere of radius R, from a uniform x₀ (arXiv 2302.03660).

    The tangent part of a velocity counts alone. Tokens must lie on the sphere.

    Attributes:
      latent_dim: d.
      radius: R; None stands for √d.
      prior_scale: 1, since the start has no length to change.

    Raises:
      ValueError: radius is not a finite number above 0, or prior_scale is not 1.
    """

    SOLVERS: ClassVar[tuple[str, ...]] = solvers.GEODESIC

    latent_dim: int
    radius: float | None = None
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        geometry.check_radius(self.radius)
        if self.prior_scale != 1:
            raise ValueError(
                f'prior_scale is {self.prior_scale}, but the start of a geodesic has no length to '
                'change: leave it at 1'
            )

    def start(self, noise: jax.Array) -> jax.Array:
        """N_R(ε), uniform on the sphere."""
        return geometry.project(noise, self.radius)

    def interpolate(
        self, start: jax.Array, z: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Point and velocity of the geodesic, see `geodesics.interpolate`."""
        return geodesics.interpolate(start, z, t[..., None], self.radius)

    def along(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """The tangent part of v at x."""
        return geodesics.tangent(x, v)

    def move(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """Gives exp_x(v)."""
        return geodesics.exp(x, v, self.radius)

    def between(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Gives log_x(y)."""
        return geodesics.log(x, y, self.radius)

    def weighted(self, error: jax.Array) -> jax.Array:
        """Gives the error the weight d/R².

        The velocities are R·θ long, so that the radius does not change the scale of the loss. At
        R = √d the weight is 1, and nothing is multiplied.
        """
        if self.radius is None:
            return error
        return self.latent_dim / self.radius**2 * error

    def scalars(self, end: jax.Array, z: jax.Array) -> dict[str, jax.Array]:
        """Gives `angle`, the mean angle between predicted ends and tokens, in radians."""
        return {'angle': jnp.mean(geodesics.distance(end, z, radius=1.0))}

    def step(
        self, row: Row, x: jax.Array, memory: jax.Array, v: jax.Array, *noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One step of a table of `solvers.GEODESIC`.

        Without noise x goes to exp_x(w_m m + w_v v), and the memory is v, transported there. With
        noise it is the step of `solvers.mixing`.
        """
        t, w = row
        if not noise:
            following = self.move(x, w[0, 1] * memory + w[0, 2] * v)
            return following, w[1, 2] * geodesics.transport(x, following, v)
        h = w[0, 2]
        eta = w[0, 3]
        end = self.move(x, (1 - t) * v)
        start = self.move(x, -t * v)
        mixed = geometry.project((1 - eta) * start + eta * self.start(*noise), self.radius)
        following, _ = geodesics.interpolate(mixed, end, t + h, self.radius)
        return following, memory
