"""The power-spherical posterior of the S-VAE's tokens.

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sphere_ar_jax.sphere import power_spherical


def posterior_draws(keys, posterior):
    """The draws of `Posterior.sample`, one key per image: (s (B, L), normal (B, L, d−1))."""
    d = posterior.mu.shape[-1]
    return jax.vmap(lambda key, kappa: power_spherical.draw(key, kappa, d))(keys, posterior.kappa)


# A dimension is dead where the tokens' directions spread less than this share of uniform ones' spread.
DEAD = 0.1


def latent_statistics(posterior):
    """How much of the sphere the tokens of a batch use: what `collapse` looks at.

    Args:
      posterior: `Posterior` of (B, L) tokens in d dimensions.
    Returns:
      dict of scalars () float32: kappa (mean); kl (mean, nats per token); spread_min and spread_mean over dimensions
      of √d·std of mu's coordinate over batch and tokens (1 for uniform directions, 0 for equal ones); dead_share, of
      the dimensions with a spread below `DEAD`; mean_direction, the norm of the mean of mu (0 for uniform directions,
      1 for equal ones).
    """
    mu = posterior.mu.reshape(-1, posterior.mu.shape[-1])
    spread = mu.shape[-1] ** 0.5 * jnp.std(mu, axis=0)
    return dict(
        kappa=jnp.mean(posterior.kappa), kl=jnp.mean(posterior.kl()), spread_min=jnp.min(spread),
        spread_mean=jnp.mean(spread), dead_share=jnp.mean((spread < DEAD).astype(jnp.float32)),
        mean_direction=jnp.linalg.norm(jnp.mean(mu, axis=0)),
    )  # fmt: skip


def collapse(scalars):
    """What is wrong with a tokenizer's latents, in one sentence, or None; scalars: of `latent_statistics`, as floats.

    Wrong are: kappa < 1.1 (its floor is 1), KL < 0.1 nats per token, mean_direction > 0.9, any dead dimension. Before
    the first some hundred steps an untrained encoder's tokens look collapsed too.
    """
    kappa, kl, direction, dead = (scalars[name] for name in ('kappa', 'kl', 'mean_direction', 'dead_share'))
    if not all(math.isfinite(value) for value in (kappa, kl, direction, dead)):
        return 'the latents are no numbers'
    wrong = []
    if kappa < 1.1:
        wrong.append(f'kappa is {kappa:.2f}, at its floor of 1: the posterior ignores the image')
    if kl < 0.1:
        wrong.append(f'KL is {kl:.3f} nats, below 0.1: tokens carry next to nothing')
    if direction > 0.9:
        wrong.append(f'all tokens point the same way: their mean direction has norm {direction:.2f}')
    if dead > 0:
        wrong.append(
            f'{dead:.0%} of the dimensions are dead: directions spread there by less than {DEAD} of uniform ones'
        )
    return '; '.join(wrong) or None


class Posterior(NamedTuple):
    """q(x|image) of every token, as a power-spherical distribution: mu (B, L, d) unit, kappa (B, L) > 1, float32."""

    mu: jax.Array
    kappa: jax.Array

    def kl(self):
        """KL to the uniform distribution on the sphere, (B, L) nats."""
        return power_spherical.kl_to_uniform(self.kappa, self.mu.shape[-1])

    def draw(self, key):
        """The random draws (s, normal) that `sample` takes, shapes (B, L) and (B, L, d−1)."""
        return power_spherical.draw(key, self.kappa, self.mu.shape[-1])

    def sample(self, draws):
        """Tokens z = √d · x, (B, L, d), differentiable in mu and kappa."""
        return self.mu.shape[-1] ** 0.5 * power_spherical.sample_from_draws(self.mu, self.kappa, *draws)
