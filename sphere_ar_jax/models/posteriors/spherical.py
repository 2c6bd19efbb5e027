"""What all posteriors on a sphere share: a direction mu and a concentration kappa of each token.

Tokens lie on a sphere of radius R, which is √d or another one (`docs/method.md`, "Radius"). A
family adds its density: see `Density`.

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

import dataclasses
import functools
import math
from typing import ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.sphere import geometry

# A dimension is dead where the tokens' directions spread by less than this, measured as in
# `SphericalTokens.statistics`: uniform directions have a spread of 1.
DEAD = 0.1


def direction_and_concentration(x: jax.Array, kappa_scale: float) -> tuple[jax.Array, jax.Array]:
    """Makes mu = l2_normalize(first d numbers) and kappa = softplus(kappa_scale · last number) + 1.

    Args:
      x: the encoder's output (B, L, d + 1).
      kappa_scale: how much faster than the published kappa this one grows (`docs/method.md`,
        "Posterior").

    Returns:
      mu, unit vectors (B, L, d), and kappa (B, L), at least 1.
    """
    return geometry.l2_normalize(x[..., :-1]), nn.softplus(kappa_scale * x[..., -1]) + 1


class Density(Protocol):
    """A density on the unit sphere around mu, as the modules `sphere_ar_jax.sphere` have it."""

    def draw(self, key: jax.Array, kappa: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
        """Makes the random draws for a sample: one number (...), and normal ones (..., d−1)."""

    def sample_from_draws(
        self, mu: jax.Array, kappa: jax.Array, along: jax.Array, normal: jax.Array, /
    ) -> jax.Array:
        """Turns the draws into points (..., d), differentiable in mu and kappa."""

    def kl_to_uniform(self, kappa: jax.Array, d: int) -> jax.Array:
        """Computes the KL divergence from the uniform distribution, (...), in nats."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['mu', 'kappa'],
    meta_fields=['density', 'radius'],
)
@dataclasses.dataclass(frozen=True)
class SphericalTokens:
    """A distribution q(x | image) of every token, on the unit sphere.

    Attributes:
      mu: directions, unit vectors (B, L, d) float32.
      kappa: concentrations (B, L) float32, at least 1.
      density: what is drawn around mu. It is no leaf of the tree, and neither is the radius: a
        program is compiled for both.
      radius: R of the sphere of the tokens; None stands for √d.
    """

    mu: jax.Array
    kappa: jax.Array
    density: Density
    radius: float | None = None

    def draws(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Makes the random draws for `sample`.

        Args:
          keys: one PRNG key for each image, (B,).

        Returns:
          The draws of the density: (B, L) and standard normal numbers (B, L, d−1).
        """
        d = self.mu.shape[-1]

        def draw(key: jax.Array, kappa: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.density.draw(key, kappa, d)

        return jax.vmap(draw)(keys, self.kappa)

    def sample(self, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Makes tokens z = R · x, (B, L, d), differentiable in mu and kappa."""
        x = self.density.sample_from_draws(self.mu, self.kappa, *draws)
        return geometry.radius(self.mu.shape[-1], self.radius) * x

    def mode(self) -> jax.Array:
        """Gives the most probable tokens: R · mu, (B, L, d)."""
        return geometry.radius(self.mu.shape[-1], self.radius) * self.mu

    def kl(self) -> jax.Array:
        """Computes the KL divergence from the uniform distribution, (B, L), in nats."""
        return self.density.kl_to_uniform(self.kappa, self.mu.shape[-1])

    def statistics(self) -> dict[str, jax.Array]:
        """Computes how much of the sphere the tokens of a batch use.

        The spread of a dimension is √d · std of mu's coordinate over batch and tokens. It is 1 for
        uniform directions and 0 for equal ones, whatever the radius of the tokens is.

        Returns:
          Scalars () float32:
            kappa: mean of kappa.
            kl: mean of the divergence from the uniform distribution, nats per token.
            spread_min: smallest spread of a dimension.
            spread_mean: mean spread of the dimensions.
            dead_share: share of the dimensions with a spread below `DEAD`.
            mean_direction: norm of the mean of mu, 0 for uniform directions and 1 for equal ones.
        """
        mu = self.mu.reshape(-1, self.mu.shape[-1])
        spread = geometry.radius(mu.shape[-1]) * jnp.std(mu, axis=0)
        return {
            'kappa': jnp.mean(self.kappa),
            'kl': jnp.mean(self.kl()),
            'spread_min': jnp.min(spread),
            'spread_mean': jnp.mean(spread),
            'dead_share': jnp.mean((spread < DEAD).astype(jnp.float32)),
            'mean_direction': jnp.linalg.norm(jnp.mean(mu, axis=0)),
        }


@dataclasses.dataclass(frozen=True)
class Spherical:
    """A family on the sphere: direction mu and concentration kappa, with a uniform prior.

    Attributes:
      radius: R of the sphere of the tokens; None stands for √d, the published one.
      kappa_scale: see `direction_and_concentration`; 1 is the published one.
      DENSITY: the density of the family.

    Raises:
      ValueError: radius or kappa_scale is not a finite number above 0.
    """

    radius: float | None = None
    kappa_scale: float = 1.0

    DENSITY: ClassVar[Density]
    shown: ClassVar[dict[str, str]] = {
        'kl': 'KL of the posterior to the uniform distribution, nats per token',
        'kappa': 'mean concentration of the posterior',
    }
    labels: ClassVar[dict[str, str]] = {'kl': 'KL, nats per token', 'kappa': 'mean κ'}
    logarithmic: ClassVar[frozenset[str]] = frozenset({'kappa'})

    def __post_init__(self) -> None:
        geometry.check_radius(self.radius)
        geometry.check_above_zero('kappa_scale', self.kappa_scale)

    def outputs(self, d: int) -> int:
        """Returns d + 1: d numbers for the direction and one for the concentration."""
        return d + 1

    def __call__(self, x: jax.Array) -> SphericalTokens:
        """Makes the distributions of mu and kappa, see `direction_and_concentration`."""
        mu, kappa = direction_and_concentration(x, self.kappa_scale)
        return SphericalTokens(mu, kappa, self.DENSITY, self.radius)

    def project(self, z: jax.Array) -> jax.Array:
        """Returns N_R(z) (..., d), the nearest point of the sphere of radius R."""
        return geometry.project(z, self.radius)

    def faults(self, scalars: dict[str, float]) -> str | None:
        """Says what is wrong with a tokenizer's latents.

        Faults are kappa < 1.1 (its floor is 1), KL < 0.1 nats per token, mean_direction > 0.9, and
        any dead dimension. In the first few hundred steps of a training these are normal.

        Args:
          scalars: those of `SphericalTokens.statistics`, as floats.

        Returns:
          One sentence, or None where nothing is wrong.
        """
        kappa = scalars['kappa']
        kl = scalars['kl']
        direction = scalars['mean_direction']
        dead = scalars['dead_share']
        if not all(math.isfinite(value) for value in (kappa, kl, direction, dead)):
            return 'the latents are not finite'
        wrong = []
        if kappa < 1.1:
            floor = f'kappa is {kappa:.2f}, at its floor of 1'
            wrong.append(f'{floor}: the posterior ignores the image')
        if kl < 0.1:
            wrong.append(f'KL is {kl:.3f} nats, below 0.1: tokens carry next to nothing')
        if direction > 0.9:
            norm = f'their mean direction has norm {direction:.2f}'
            wrong.append(f'all tokens point the same way: {norm}')
        if dead > 0:
            spread = f'directions spread there by less than {DEAD} of uniform ones'
            wrong.append(f'{dead:.0%} of the dimensions are dead: {spread}')
        return '; '.join(wrong) or None
