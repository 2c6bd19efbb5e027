"""Posteriors q(z | image) of the tokenizer: families of distributions, chosen by a word of the
config.

A family is a small frozen object, a field of `vae.VAE`. Called with the encoder's output it gives a
distribution, a tree of arrays whose leading axes are images and tokens. Logs, pictures and pages
ask the family what there is to show.

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

from typing import Any, Protocol

import jax

from sphere_ar_jax.models.posteriors.power_spherical import PowerSpherical

Draws = Any  # a tree of arrays, whatever a distribution's samples are made from


class Distribution(Protocol):
    """The posterior of every token of a batch of images."""

    def draws(self, keys: jax.Array) -> Draws:
        """Random draws for `sample`, one key for each image: keys (B,)."""

    def sample(self, draws: Draws) -> jax.Array:
        """Tokens z (B, L, d), differentiable in the distribution's parameters."""

    def kl(self) -> jax.Array:
        """KL divergence from the prior, (B, L), in nats."""

    def statistics(self) -> dict[str, jax.Array]:
        """Scalars () float32 that tell how the batch uses the latent space; `kl` is among them."""


class Posterior(Protocol):
    """A family of posteriors.

    Attributes:
      shown: the statistics that the console and the page show, in order, each with its meaning.
      labels: the same names with short labels for the axes of plots.
      logarithmic: those of them that are plotted on a logarithmic axis.
    """

    shown: dict[str, str]
    labels: dict[str, str]
    logarithmic: frozenset[str]

    def outputs(self, d: int) -> int:
        """How many numbers the encoder gives for a token of d dimensions."""

    def __call__(self, x: jax.Array) -> Distribution:
        """The distribution that the encoder's output x (B, L, outputs(d)) float32 stands for."""

    def project(self, z: jax.Array) -> jax.Array:
        """The point of the latent space that stands for z (..., d): N_R(z) on a sphere, z itself in
        a plane.
        """

    def faults(self, scalars: dict[str, float]) -> str | None:
        """What is wrong with a tokenizer's latents by their `statistics`, in one sentence, or None."""


# The config's word `vae.posterior` → the family.
POSTERIORS = {'power_spherical': PowerSpherical}
