"""The Gaussian posterior of the usual VAE, with a standard normal prior.

Tokens lie anywhere in ℝ^d. The paper's ablation compares the sphere with it. See `docs/method.md`,
"Other posteriors".

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

# A dimension is dead where the means spread by less than this. It is the threshold on the variance,
# 0.01, of Burda et al. 2016 (arXiv 1509.00519).
DEAD = 0.1
# The range of the log-variances, as in DiagonalGaussianDistribution of LDM's public code.
LEAST_LOG_VARIANCE = -30.0
MOST_LOG_VARIANCE = 20.0


def spreads(mean: jax.Array) -> jax.Array:
    """Standard deviation of each dimension of means (B, L, d) over images and tokens, (d,)."""
    return jnp.std(mean.reshape(-1, mean.shape[-1]), axis=0)


def standard_draws(keys: jax.Array, mean: jax.Array) -> jax.Array:
    """Standard normal numbers for means (B, L, d), from one PRNG key for each image, (B,)."""

    def draw(key: jax.Array, one: jax.Array) -> jax.Array:
        return jax.random.normal(key, one.shape, one.dtype)

    return jax.vmap(draw)(keys, mean)


class GaussianTokens(NamedTuple):
    """A Gaussian distribution q(z | image) = N(mean, diag std²) of every token.

    Attributes:
      mean: (B, L, d) float32.
      log_variance: log std², (B, L, d) float32, from −30 to 20.
    """

    mean: jax.Array
    log_variance: jax.Array

    def draws(self, keys: jax.Array) -> jax.Array:
        """Makes standard normal numbers ε (B, L, d) from one PRNG key for each image, (B,)."""
        return standard_draws(keys, self.mean)

    def sample(self, draws: jax.Array) -> jax.Array:
        """Makes tokens z = mean + std · ε, (B, L, d), differentiable in mean and log_variance."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * draws

    def mode(self) -> jax.Array:
        """Gives the most probable tokens: the mean, (B, L, d)."""
        return self.mean

    def kl(self) -> jax.Array:
        """Computes the KL divergence from N(0, I), summed over d, (B, L), in nats."""
        each = jnp.square(self.mean) + jnp.expm1(self.log_variance) - self.log_variance
        return 0.5 * jnp.sum(each, axis=-1)

    def statistics(self) -> dict[str, jax.Array]:
        """Computes how much of the latent space the tokens of a batch use.

        The spread of a dimension is the standard deviation of its means over batch and tokens.

        Returns:
          Scalars () float32:
            kl: mean of the divergence, nats per token.
            std: mean of std.
            spread_min: smallest spread of a dimension.
            spread_mean: mean spread of the dimensions.
            dead_share: share of the dimensions with a spread below `DEAD`.
            mean_norm: mean of ‖mean‖ over tokens. That of the prior's tokens is about √d.
        """
        spread = spreads(self.mean)
        return {
            'kl': jnp.mean(self.kl()),
            'std': jnp.mean(jnp.exp(0.5 * self.log_variance)),
            'spread_min': jnp.min(spread),
            'spread_mean': jnp.mean(spread),
            'dead_share': jnp.mean((spread < DEAD).astype(jnp.float32)),
            'mean_norm': jnp.mean(jnp.linalg.norm(self.mean, axis=-1)),
        }


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and variance of every dimension, with the prior N(0, I)."""

    shown: ClassVar[dict[str, str]] = {
        'kl': 'KL of the posterior to N(0, I), nats per token',
        'std': 'mean standard deviation of the posterior',
    }
    labels: ClassVar[dict[str, str]] = {'kl': 'KL, nats per token', 'std': 'mean σ'}
    logarithmic: ClassVar[frozenset[str]] = frozenset({'std'})

    def outputs(self, d: int) -> int:
        """Returns 2d: d numbers for the mean and d for the log-variance."""
        return 2 * d

    def __call__(self, x: jax.Array) -> GaussianTokens:
        """Makes mean = first d numbers and log_variance = last d numbers, clipped to [−30, 20]."""
        mean, log_variance = jnp.split(x, 2, axis=-1)
        return GaussianTokens(mean, jnp.clip(log_variance, LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE))

    def project(self, z: jax.Array) -> jax.Array:
        """Returns z (..., d) itself: every point of ℝ^d is allowed."""
        return z

    def faults(self, scalars: dict[str, float]) -> str | None:
        """Says what is wrong with a tokenizer's latents.

        Faults are KL < 0.1 nats per token and any dead dimension. In the first few hundred steps of
        a training these are normal.

        Args:
          scalars: the `statistics`, as floats.

        Returns:
          One sentence, or None where nothing is wrong.
        """
        kl = scalars['kl']
        dead = scalars['dead_share']
        if not all(math.isfinite(value) for value in (kl, dead, scalars['std'])):
            return 'the latents are not finite'
        wrong = []
        if kl < 0.1:
            wrong.append(f'KL is {kl:.3f} nats, below 0.1: tokens carry next to nothing')
        if dead > 0:
            spread = f'means spread there by less than {DEAD}, the prior by 1'
            wrong.append(f'{dead:.0%} of the dimensions are dead: {spread}')
        return '; '.join(wrong) or None
