"""Posteriors q(z | image) of the tokenizer: families of distributions.

A family is a small frozen object, a field of `vae.VAE`. The config chooses it by a word. Called
with the encoder's output, it returns a distribution: a tree of arrays whose leading axes are images
and tokens. The family also says which statistics logs, pictures and pages show.

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp

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


def _names(q: Distribution) -> tuple[list[str], list[Any], Any]:
    """The names of a distribution's parameters, the parameters, and the structure of its tree."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(q)
    names = [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in leaves]
    return names, [leaf for _, leaf in leaves], structure


def parameters(q: Distribution) -> dict[str, jax.Array]:
    """Names the parameters of a distribution, which are the leaves of its tree.

    Returns:
      Arrays (B, L, …) by name, as mu (B, L, d) and kappa (B, L) of `SphericalTokens`.
    """
    names, leaves, _ = _names(q)
    return dict(zip(names, leaves, strict=True))


def from_parameters(posterior: Posterior, d: int, values: Mapping[str, jax.Array]) -> Distribution:
    """Makes the distribution again whose `parameters` are given.

    Args:
      posterior: the family.
      d: the latent dimension.
      values: the parameters by name; others in it are not read.

    Raises:
      KeyError: a parameter is missing.
    """
    output = jax.ShapeDtypeStruct((1, 1, posterior.outputs(d)), jnp.float32)
    names, _, structure = _names(jax.eval_shape(posterior, output))
    return jax.tree.unflatten(structure, [values[name] for name in names])


# The config's word `vae.posterior` → the family. Its fields are keys of the config's section `vae`.
POSTERIORS: dict[str, type[Posterior]] = {
    'gaussian': Gaussian,
    'power_spherical': PowerSpherical,
    'sigma_vae': SigmaVAE,
    'vmf': VonMisesFisher,
}
