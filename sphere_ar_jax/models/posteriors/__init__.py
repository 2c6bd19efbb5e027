"""Posteriors q(z | image) of the tokenizer: families of distributions.

A family is a small frozen object, a field of `vae.VAE`. The config chooses it by a word. Called
with the encoder's output, it returns a distribution: a tree of arrays whose leading axes are images
and tokens. The family also says which statistics logs, pictures and pages show.

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

from typing import Any, Protocol, TypeAlias

import jax

from sphere_ar_jax.models.posteriors.gaussian import Gaussian
from sphere_ar_jax.models.posteriors.power_spherical import PowerSpherical
from sphere_ar_jax.models.posteriors.sigma_vae import SigmaVAE
from sphere_ar_jax.models.posteriors.vmf import VonMisesFisher

Draws: TypeAlias = Any  # a tree of arrays, whatever a distribution's samples are made from


class Distribution(Protocol):
    """The posterior of every token of a batch of images."""

    def draws(self, keys: jax.Array) -> Draws:
        """Makes the random draws for `sample`, from one PRNG key for each image: keys (B,)."""

    def sample(self, draws: Draws) -> jax.Array:
        """Makes tokens z (B, L, d), differentiable in the distribution's parameters."""

    def mode(self) -> jax.Array:
        """Gives the most probable tokens z (B, L, d)."""

    def kl(self) -> jax.Array:
        """Computes the KL divergence from the prior, (B, L), in nats."""

    def statistics(self) -> dict[str, jax.Array]:
        """Computes scalars that tell how the batch uses the latent space.

        Returns:
          Scalars () float32 by their names, `kl` among them.
        """


class Posterior(Protocol):
    """A family of posteriors."""

    @property
    def shown(self) -> dict[str, str]:
        """The statistics that the console and the page show, in order, each with its meaning."""

    @property
    def labels(self) -> dict[str, str]:
        """The same names with short labels for the axes of plots."""

    @property
    def logarithmic(self) -> frozenset[str]:
        """The names of the statistics that are plotted on a logarithmic axis."""

    def outputs(self, d: int) -> int:
        """Returns how many numbers the encoder gives for a token of d dimensions."""

    def __call__(self, x: jax.Array) -> Distribution:
        """Makes the distribution of the encoder's output x (B, L, outputs(d)) float32."""

    def project(self, z: jax.Array) -> jax.Array:
        """Returns the point of the latent space that stands for z (..., d).

        It is N_R(z) where the latent space is a sphere, and z itself where it is all of ℝ^d.
        """

    def faults(self, scalars: dict[str, float]) -> str | None:
        """Says what is wrong with a tokenizer's latents.

        Args:
          scalars: the `Distribution.statistics`, as floats.

        Returns:
          One sentence, or None where nothing is wrong.
        """


# The config's word `vae.posterior` → the family. Its fields are keys of the config's section `vae`.
POSTERIORS: dict[str, type[Posterior]] = {
    'gaussian': Gaussian,
    'power_spherical': PowerSpherical,
    'sigma_vae': SigmaVAE,
    'vmf': VonMisesFisher,
}
