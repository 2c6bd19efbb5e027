"""The S-VAE (paper §3): a backbone between images and tokens, and the posterior of the tokens.

Dimensions:
  B    images               H, W   token grid, L = H·W tokens in raster order
  c    image channels       d      latent dimension
  D    width of the backbone
Images are float (B, H·p, W·p, c) in [−1, 1]; p, the patch size, is the backbone's.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.models.backbones import Backbone, Hybrid
from sphere_ar_jax.models.convolutions import torch_init
from sphere_ar_jax.models.posteriors import Distribution, Draws, Posterior, PowerSpherical


class VAE(nn.Module):
    """The tokenizer. The defaults are the published 256×256 S-VAE (75,393,297 parameters).

    Attributes:
      grid: (H, W) tokens. latent_dim: d. backbone: see `backbones`; it computes in a dtype of its
        own. posterior: see
      `posteriors`. dtype: of the two projections; parameters are float32. `computing_in` sets both
        dtypes.
    """

    grid: tuple[int, int] = (16, 16)
    latent_dim: int = 16
    backbone: Backbone = Hybrid()
    posterior: Posterior = PowerSpherical()
    dtype: Any = jnp.float32

    def setup(self):
        nn.share_scope(self, self.backbone)  # its parameters stand beside the projections
        width = self.backbone.width
        bound = width**-0.5  # fan_in = D also bounds the bias, as in PyTorch

        def bias_init(key, shape, dtype):
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

    def computing_in(self, dtype: Any) -> 'VAE':
        """The same model, computing in another dtype."""
        return self.clone(dtype=dtype, backbone=self.backbone.clone(dtype=dtype))

    def encode(self, images: jax.Array) -> Distribution:
        """Images (B, H·p, W·p, c) in [−1, 1] → the posterior of their tokens, float32."""
        return self.posterior(self.quant_proj(self.backbone.encode(images)).astype(jnp.float32))

    def decode(self, z: jax.Array) -> jax.Array:
        """Tokens z (B, L, d) → images (B, H·p, W·p, c), float32, not clipped."""
        x = self.post_quant_proj(z.astype(self.dtype))
        return self.backbone.decode(x.reshape(x.shape[0], *self.grid, x.shape[-1]))

    def __call__(self, images: jax.Array, z: jax.Array) -> tuple[jax.Array, Distribution]:
        """The decoded tokens z and the posterior of the images: every parameter is read."""
        q = self.encode(images)
        return self.decode(z), q

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters from a PRNG key."""
        images = jnp.zeros((1, *self.image_shape))
        z = jnp.zeros((1, self.grid[0] * self.grid[1], self.latent_dim))
        return self.init(key, images, z)['params']


def s_vae(
    grid: tuple[int, int] = (16, 16),
    latent_dim: int = 16,
    dtype: Any = jnp.float32,
    **backbone: Any,
) -> VAE:
    """The published composition, a hybrid CNN–ViT with a power-spherical posterior, from flat
    sizes.

    Args:
      grid, latent_dim, dtype: of `VAE`. backbone: the fields of `Hybrid`.
    """
    return VAE(tuple(grid), latent_dim, Hybrid(**backbone, dtype=dtype), PowerSpherical(), dtype)


def draw_tokens(
    vae: VAE, params: Any, images: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Distribution]:
    """Draw tokens from the posterior of images (B, H, W, c), one key per image: (z (B, L, d), the
    posterior).
    """
    q = vae.apply({'params': params}, images, method='encode')
    return q.sample(q.draws(keys)), q


def autoencode(
    vae: VAE, params: Any, images: jax.Array, draws: Callable[[Distribution], Draws]
) -> tuple[jax.Array, jax.Array, Distribution]:
    """Images (B, H, W, c) through the S-VAE: (reconstructions, tokens z (B, L, d), the posterior).

    Args:
      draws: a function of the posterior that gives the draws for its samples.
    """
    q = vae.apply({'params': params}, images, method='encode')
    z = q.sample(draws(q))
    return vae.apply({'params': params}, z, method='decode'), z, q
