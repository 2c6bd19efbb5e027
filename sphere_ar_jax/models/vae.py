"""The S-VAE: a backbone between images and tokens, and the posterior of the tokens.

It is the tokenizer of paper §3. See `docs/method.md`, "Tokenizer".

Dimensions:
  B    images               H, W   token grid, L = H·W tokens in raster order
  c    image channels       d      latent dimension
  D    width of the backbone
  p    pixels per token along each axis, the patch size of the backbone
Images are float (B, H·p, W·p, c) in [−1, 1].
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models.backbones import Backbone, Hybrid
from sphere_ar_jax.models.convolutions import torch_init
from sphere_ar_jax.models.posteriors import Distribution, Draws, Posterior, PowerSpherical
from sphere_ar_jax.runtime.types import PyTree


class VAE(nn.Module):
    """The tokenizer.

    The defaults are the published S-VAE for 256×256 pixels, with 75,393,297 parameters.

    Attributes:
      grid: (H, W) tokens.
      latent_dim: d.
      backbone: see `backbones`. It computes in a dtype of its own.
      posterior: see `posteriors`.
      dtype: dtype of the two projections; parameters are float32. `computing_in` sets it and the
        backbone's dtype.
    """

    grid: tuple[int, int] = (16, 16)
    latent_dim: int = 16
    backbone: Backbone = Hybrid()
    posterior: Posterior = PowerSpherical()
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)  # its parameters stand beside the projections
        width = self.backbone.width
        bound = width**-0.5  # fan_in = D also bounds the bias, as in PyTorch

        def bias_init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        outputs = self.posterior.outputs(self.latent_dim)
        self.quant_proj = nn.Dense(
            outputs, kernel_init=torch_init(), bias_init=bias_init, dtype=self.dtype
        )
        self.post_quant_proj = nn.Dense(
            width, use_bias=False, kernel_init=torch_init(), dtype=self.dtype
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images."""
        p = self.backbone.patch_size
        return (self.grid[0] * p, self.grid[1] * p, self.backbone.image_channels)

    def computing_in(self, dtype: DTypeLike) -> 'VAE':
        """Returns the same model, computing in another dtype."""
        return self.clone(dtype=dtype, backbone=self.backbone.clone(dtype=dtype))

    def encode(self, images: jax.Array) -> Distribution:
        """Turns images (B, H·p, W·p, c) in [−1, 1] into the posterior of their tokens, float32."""
        hidden = self.backbone.encode(images)
        return self.posterior(self.quant_proj(hidden).astype(jnp.float32))

    def decode(self, z: jax.Array) -> jax.Array:
        """Turns tokens z (B, L, d) into images (B, H·p, W·p, c), float32, not clipped."""
        x = self.post_quant_proj(z.astype(self.dtype))
        return self.backbone.decode(x.reshape(x.shape[0], *self.grid, x.shape[-1]))

    def __call__(self, images: jax.Array, z: jax.Array) -> tuple[jax.Array, Distribution]:
        """Decodes tokens and encodes images, independently of each other.

        It reads every parameter, so that initialisation can go through it.

        Args:
          images: (B, H·p, W·p, c) in [−1, 1].
          z: (B, L, d).

        Returns:
          The decoded tokens (B, H·p, W·p, c), and the posterior of the images.
        """
        q = self.encode(images)
        return self.decode(z), q

    def init_params(self, key: jax.Array) -> PyTree:
        """Makes fresh parameters from a PRNG key."""
        images = jnp.zeros((1, *self.image_shape))
        z = jnp.zeros((1, self.grid[0] * self.grid[1], self.latent_dim))
        return self.init(key, images, z)['params']


def s_vae(
    grid: tuple[int, int] = (16, 16),
    latent_dim: int = 16,
    dtype: DTypeLike = jnp.float32,
    **backbone: Any,
) -> VAE:
    """Makes the published S-VAE, a hybrid CNN–ViT with a power-spherical posterior.

    Args:
      grid: see `VAE`.
      latent_dim: see `VAE`.
      dtype: dtype of the backbone and the projections.
      **backbone: fields of `Hybrid`.

    Returns:
      The Flax module.
    """
    return VAE(tuple(grid), latent_dim, Hybrid(**backbone, dtype=dtype), PowerSpherical(), dtype)


def draw_tokens(
    vae: VAE, params: PyTree, images: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Distribution]:
    """Draws tokens from the posterior of images.

    Args:
      vae: the tokenizer.
      params: its parameters.
      images: (B, H·p, W·p, c) in [−1, 1].
      keys: one PRNG key for each image, (B,).

    Returns:
      The tokens z (B, L, d), and the posterior.
    """
    q = vae.apply({'params': params}, images, method='encode')
    return q.sample(q.draws(keys)), q


def autoencode(
    vae: VAE, params: PyTree, images: jax.Array, draws: Callable[[Distribution], Draws]
) -> tuple[jax.Array, jax.Array, Distribution]:
    """Encodes images, draws tokens and decodes them.

    Args:
      vae: the tokenizer.
      params: its parameters.
      images: (B, H·p, W·p, c) in [−1, 1].
      draws: called with the posterior, returns the random draws of its samples.

    Returns:
      The reconstructions (B, H·p, W·p, c), the tokens z (B, L, d), and the posterior.
    """
    q = vae.apply({'params': params}, images, method='encode')
    z = q.sample(draws(q))
    return vae.apply({'params': params}, z, method='decode'), z, q
