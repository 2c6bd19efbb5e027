"""The σ-VAE's posterior: a Gaussian whose standard deviation is the same number everywhere.

The encoder cannot make the noise small, so that a decoder and an autoregressive model learn to
stand it (LatentLM, Sun et al. 2024, arXiv 2412.08635). See `docs/method.md`, "Other posteriors".

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from sphere_ar_jax.models.posteriors.gaussian import spreads, standard_draws
from sphere_ar_jax.sphere import geometry

# A dimension is dead where the means spread by less than this share of sigma.
DEAD = 0.1


@functools.partial(jax.tree_util.register_dataclass, data_fields=['mu'], meta_fields=['sigma'])
@dataclasses.dataclass(frozen=True)
class SigmaTokens:
    """A Gaussian distribution q(z | image) = N(mu, sigma² I) of every token.

    Attributes:
      mu: (B, L, d) float32.
      sigma: the standard deviation. It is no leaf of the tree: a program is compiled for it.
    """

    mu: jax.Array
    sigma: float

    def draws(self, keys: jax.Array) -> jax.Array:
        """Makes standard normal numbers ε (B, L, d) from one PRNG key for each image, (B,)."""
        return standard_draws(keys, self.mu)

    def sample(self, draws: jax.Array) -> jax.Array:
        """Makes tokens z = mu + sigma · ε, (B, L, d), differentiable in mu."""
        return self.mu + self.sigma * draws

    def mode(self) -> jax.Array:
        """Gives the most probable tokens: mu, (B, L, d)."""
        return self.mu

    def kl(self) -> jax.Array:
        """Computes ½‖mu‖², (B, L), in nats: the part of the KL from N(0, I) that depends on mu.

        The rest, d/2 · (sigma² − 1 − log sigma²), is a constant. It is left out, as in the public
        code of the LatentLM authors' tokenizers (VibeVoice, `modular_vibevoice_tokenizer.py`).
        That code takes mu² without the factor ½, and the mean over dimensions.
        """
        return 0.5 * jnp.sum(jnp.square(self.mu), axis=-1)

    def statistics(self) -> dict[str, jax.Array]:
        """Computes how the spread of the means compares with sigma.

        The spread of a dimension is the standard deviation of its mu over batch and tokens.

        Returns:
          Scalars () float32:
            kl: mean of ½‖mu‖², nats per token.
            sigma_to_spread: sigma / spread_mean.
            spread_min: smallest spread of a dimension.
            spread_mean: mean spread of the dimensions.
            dead_share: share of the dimensions with a spread below `DEAD` · sigma.
            mean_norm: mean of ‖mu‖ over tokens.
        """
        spread = spreads(self.mu)
        mean = jnp.mean(spread)
        return {
            'kl': jnp.mean(self.kl()),
            'sigma_to_spread': self.sigma / jnp.maximum(mean, jnp.finfo(mean.dtype).tiny),
            'spread_min': jnp.min(spread),
            'spread_mean': mean,
            'dead_share': jnp.mean((spread < DEAD * self.sigma).astype(jnp.float32)),
            'mean_norm': jnp.mean(jnp.linalg.norm(self.mu, axis=-1)),
        }


@dataclasses.dataclass(frozen=True)
class SigmaVAE:
    """A mean of every dimension, a fixed sigma, and the prior N(0, I) for the means.

    LatentLM draws a sigma for each image from N(0, C²); here it is one number.

    Attributes:
      sigma: the standard deviation, above 0.

    Raises:
      ValueError: sigma is not a finite number above 0.
    """

    sigma: float = 0.5

    shown: ClassVar[dict[str, str]] = {
        'kl': 'KL of the posterior to N(0, I) without its constant, nats per token',
        'sigma_to_spread': 'σ over the mean spread of μ',
    }
    labels: ClassVar[dict[str, str]] = {
        'kl': 'KL, nats per token',
        'sigma_to_spread': 'σ / spread of μ',
    }
    logarithmic: ClassVar[frozenset[str]] = frozenset({'sigma_to_spread'})

    def __post_init__(self) -> None:
        geometry.check_above_zero('sigma', self.sigma)

    def outputs(self, d: int) -> int:
        """Returns d, the numbers of the mean."""
        return d

    def __call__(self, x: jax.Array) -> SigmaTokens:
        """Makes mu = x."""
        return SigmaTokens(x, self.sigma)

    def project(self, z: jax.Array) -> jax.Array:
        """Returns z (..., d) itself: every point of ℝ^d is allowed."""
        return z

    def faults(self, scalars: dict[str, float]) -> str | None:
        """Says what is wrong with a tokenizer's latents.

        Faults are sigma_to_spread > 2, where the noise drowns the means, and any dead dimension. In
        the first few hundred steps of a training these are normal.

        Args:
          scalars: the `statistics`, as floats.

        Returns:
          One sentence, or None where nothing is wrong.
        """
        ratio = scalars['sigma_to_spread']
        dead = scalars['dead_share']
        if not all(math.isfinite(value) for value in (scalars['kl'], ratio, dead)):
            return 'the latents are not finite'
        wrong = []
        if ratio > 2:
            wrong.append(f'sigma is {ratio:.3g} times the spread of the means: noise drowns them')
        if dead > 0:
            spread = f'means spread there by less than {DEAD} sigma'
            wrong.append(f'{dead:.0%} of the dimensions are dead: {spread}')
        return '; '.join(wrong) or None
