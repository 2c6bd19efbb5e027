"""The power-spherical posterior of the S-VAE (paper §3.2): tokens on the sphere of radius R = √d.

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.sphere import geometry, power_spherical

# A dimension is dead where the tokens' directions spread less than this share of uniform ones'
# spread.
DEAD = 0.1


class PowerSphericalTokens(NamedTuple):
    """q(x | image) of every token, a power-spherical distribution on the unit sphere.

    Attributes:
      mu: (B, L, d) float32 unit vectors, the directions. kappa: (B, L) float32 > 1, the
        concentrations.
    """

    mu: jax.Array
    kappa: jax.Array

    def draws(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws (s (B, L), normal (B, L, d−1)) for `sample`, one key for each image: keys (B,)."""
        d = self.mu.shape[-1]

        def draw(key, kappa):
            return power_spherical.draw(key, kappa, d)

        return jax.vmap(draw)(keys, self.kappa)

    def sample(self, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Tokens z = R · x, (B, L, d), differentiable in mu and kappa."""
        return geometry.radius(self.mu.shape[-1]) * power_spherical.sample_from_draws(
            self.mu, self.kappa, *draws
        )

    def kl(self) -> jax.Array:
        """KL divergence from the uniform distribution on the sphere, (B, L), in nats."""
        return power_spherical.kl_to_uniform(self.kappa, self.mu.shape[-1])

    def statistics(self) -> dict[str, jax.Array]:
        """How much of the sphere the tokens of a batch use; `PowerSpherical.faults` judges it.

        Returns:
          Scalars () float32. kappa: mean. kl: mean, nats per token. spread_min and spread_mean:
            over the dimensions, of
          √d · std of mu's coordinate over batch and tokens (1 for uniform directions, 0 for equal
            ones). dead_share:
          share of the dimensions with a spread below `DEAD`. mean_direction: norm of the mean of mu
            (0 for uniform
          directions, 1 for equal ones).
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
class PowerSpherical:
    """The published family: direction mu and concentration kappa on the sphere, the uniform
    distribution as prior.
    """

    shown: ClassVar = {
        'kl': 'KL of the posterior to the uniform distribution, nats per token',
        'kappa': 'mean concentration of the posterior',
    }
    labels: ClassVar = {'kl': 'KL, nats per token', 'kappa': 'mean κ'}
    logarithmic: ClassVar = frozenset({'kappa'})

    def outputs(self, d: int) -> int:
        """d numbers for the direction and one for the concentration."""
        return d + 1

    def __call__(self, x: jax.Array) -> PowerSphericalTokens:
        """mu = l2_normalize(first d numbers), kappa = softplus(last number) + 1."""
        return PowerSphericalTokens(geometry.l2_normalize(x[..., :-1]), nn.softplus(x[..., -1]) + 1)

    def project(self, z: jax.Array) -> jax.Array:
        """N_R(z), the nearest point of the sphere of radius R = √d. (..., d) → (..., d)."""
        return geometry.project(z)

    def faults(self, scalars: dict[str, float]) -> str | None:
        """What is wrong with a tokenizer's latents, in one sentence, or None.

        Wrong are: kappa < 1.1 (its floor is 1), KL < 0.1 nats per token, mean_direction > 0.9, any
        dead dimension. The tokens of an untrained encoder look collapsed too, for the first some
        hundred steps.

        Args:
          scalars: the `statistics`, as floats.
        """
        kappa = scalars['kappa']
        kl = scalars['kl']
        direction = scalars['mean_direction']
        dead = scalars['dead_share']
        if not all(math.isfinite(value) for value in (kappa, kl, direction, dead)):
            return 'the latents are no numbers'
        wrong = []
        if kappa < 1.1:
            wrong.append(
                f'kappa is {kappa:.2f}, at its floor of 1: the posterior ignores the image'
            )
        if kl < 0.1:
            wrong.append(f'KL is {kl:.3f} nats, below 0.1: tokens carry next to nothing')
        if direction > 0.9:
            wrong.append(
                f'all tokens point the same way: their mean direction has norm {direction:.2f}'
            )
        if dead > 0:
            wrong.append(
                f'{dead:.0%} of the dimensions are dead: directions spread there by less than {DEAD} of uniform ones'
            )
        return '; '.join(wrong) or None
