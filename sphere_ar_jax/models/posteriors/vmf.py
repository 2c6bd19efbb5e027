"""The von Mises–Fisher posterior of the hyperspherical VAE (Davidson et al. 2018).

Tokens lie on a sphere of radius R, as those of the power-spherical one. See
`docs/method.md`, "Other posteriors".

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

import dataclasses
import functools
from typing import ClassVar

import jax

from sphere_ar_jax.models.posteriors import power_spherical
from sphere_ar_jax.sphere import geometry, von_mises_fisher


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['mu', 'kappa'], meta_fields=['radius']
)
@dataclasses.dataclass(frozen=True)
class VonMisesFisherTokens:
    """A von Mises–Fisher distribution q(x | image) of every token, on the unit sphere.

    Attributes:
      mu: directions, unit vectors (B, L, d) float32.
      kappa: concentrations (B, L) float32, at least 1.
      radius: R of the sphere of the tokens; None stands for √d. It is no leaf of the tree: a
        program is compiled for it.
    """

    mu: jax.Array
    kappa: jax.Array
    radius: float | None = None

    def draws(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Makes the random draws for `sample`.

        Args:
          keys: one PRNG key for each image, (B,).

        Returns:
          Haversines of the angles to mu (B, L) and standard normal numbers (B, L, d−1).
        """
        d = self.mu.shape[-1]

        def draw(key: jax.Array, kappa: jax.Array) -> tuple[jax.Array, jax.Array]:
            return von_mises_fisher.draw(key, kappa, d)

        return jax.vmap(draw)(keys, self.kappa)

    def sample(self, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Makes tokens z = R · x, (B, L, d), differentiable in mu and kappa."""
        x = von_mises_fisher.sample_from_draws(self.mu, self.kappa, *draws)
        return geometry.radius(self.mu.shape[-1], self.radius) * x

    def mode(self) -> jax.Array:
        """Gives the most probable tokens: R · mu, (B, L, d)."""
        return geometry.radius(self.mu.shape[-1], self.radius) * self.mu

    def kl(self) -> jax.Array:
        """Computes the KL divergence from the uniform distribution, (B, L), in nats."""
        return von_mises_fisher.kl_to_uniform(self.kappa, self.mu.shape[-1])

    def statistics(self) -> dict[str, jax.Array]:
        """Computes the scalars of `power_spherical.statistics`."""
        return power_spherical.statistics(self.mu, self.kappa, self.kl())


@dataclasses.dataclass(frozen=True)
class VonMisesFisher:
    """Direction mu and concentration kappa, with a uniform prior.

    Attributes:
      radius: R of the sphere of the tokens; None stands for √d.
      kappa_scale: see `power_spherical.direction_and_concentration`.

    Raises:
      ValueError: radius or kappa_scale is not a finite number above 0.
    """

    radius: float | None = None
    kappa_scale: float = 1.0

    shown: ClassVar[dict[str, str]] = power_spherical.PowerSpherical.shown
    labels: ClassVar[dict[str, str]] = power_spherical.PowerSpherical.labels
    logarithmic: ClassVar[frozenset[str]] = power_spherical.PowerSpherical.logarithmic

    def __post_init__(self) -> None:
        geometry.check_radius(self.radius)
        power_spherical.check_kappa_scale(self.kappa_scale)

    def outputs(self, d: int) -> int:
        """Returns d + 1: d numbers for the direction and one for the concentration."""
        return d + 1

    def __call__(self, x: jax.Array) -> VonMisesFisherTokens:
        """Makes mu and kappa as `power_spherical.direction_and_concentration` does."""
        mu, kappa = power_spherical.direction_and_concentration(x, self.kappa_scale)
        return VonMisesFisherTokens(mu, kappa, self.radius)

    def project(self, z: jax.Array) -> jax.Array:
        """Returns N_R(z) (..., d), the nearest point of the sphere of radius R."""
        return geometry.project(z, self.radius)

    def faults(self, scalars: dict[str, float]) -> str | None:
        """Says what is wrong with a tokenizer's latents, as `power_spherical.faults` does."""
        return power_spherical.faults(scalars)
