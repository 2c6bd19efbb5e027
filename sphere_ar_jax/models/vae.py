"""S-VAE: the hybrid CNN–ViT tokenizer with a power-spherical posterior (spec §3).

Dimensions:
  B    images               H, W   token grid, L = H·W tokens in raster order
  c    image channels       d      latent dimension; tokens lie on the sphere of radius √d
  D    width of both ViTs = last entry of `channels`
Images are float (B, H·p, W·p, c) in [−1, 1], p = 2^(len(channels) − 1) the patch size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.models.backbones import hybrid
from sphere_ar_jax.models.convolutions import torch_init
from sphere_ar_jax.models.posteriors import power_spherical
from sphere_ar_jax.sphere import geometry


class VAE(nn.Module):
    """The S-VAE. The defaults are the published 256×256 tokenizer (75,393,297 parameters).

    Attributes:
      grid: (H, W) tokens. latent_dim: d. channels: of the CNN, stage by stage, the last one is the ViTs' width D.
      stem: output channels of the encoder's first convolution (= channels[0] in the published model).
      heads: of both ViTs; D/heads must be a multiple of 4 (2-D RoPE).
      remat, unroll: see `transformer.Stack`. dtype: of the computation; parameters are float32.
    """

    grid: tuple = (16, 16)
    latent_dim: int = 16
    image_channels: int = 3
    stem: int = 64
    channels: tuple = (64, 64, 128, 256, 512)
    encoder_depth: int = 6
    decoder_depth: int = 12
    heads: int = 8
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32

    def setup(self):
        channels = tuple(self.channels)
        vit = dict(heads=self.heads, remat=self.remat, unroll=self.unroll, dtype=self.dtype)
        self.encoder = hybrid.Encoder(channels, self.stem, self.encoder_depth, **vit)
        self.decoder = hybrid.Decoder(channels, self.image_channels, self.decoder_depth, **vit)
        dense = dict(kernel_init=torch_init(), dtype=self.dtype)
        # fan_in = D also bounds the bias, as in PyTorch
        bias = lambda key, shape, dtype: jax.random.uniform(
            key, shape, dtype, -(channels[-1] ** -0.5), channels[-1] ** -0.5
        )
        self.quant_proj = nn.Dense(self.latent_dim + 1, bias_init=bias, **dense)
        self.post_quant_proj = nn.Dense(channels[-1], use_bias=False, **dense)

    @property
    def patch_size(self):
        """Pixels per token along each axis, p."""
        return 2 ** (len(self.channels) - 1)

    @property
    def image_shape(self):
        """(height, width, channels) of the images."""
        return (self.grid[0] * self.patch_size, self.grid[1] * self.patch_size, self.image_channels)

    def encode(self, images):
        """Images (B, H·p, W·p, c) in [−1, 1] → the `Posterior` of their tokens: mu = l2_normalize(first d),
        kappa = softplus(last) + 1, both in float32."""
        x = self.quant_proj(self.encoder(images)).astype(jnp.float32)
        return power_spherical.Posterior(geometry.l2_normalize(x[..., :-1]), nn.softplus(x[..., -1]) + 1)

    def decode(self, z):
        """Tokens z (B, L, d) on the sphere of radius √d → images (B, H·p, W·p, c), float32, not clipped."""
        x = self.post_quant_proj(z.astype(self.dtype))
        return self.decoder(x.reshape(x.shape[0], *self.grid, x.shape[-1]))

    def __call__(self, images, draws):
        """Autoencodes: (reconstruction, posterior), with the draws of `Posterior.draw`."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(draws)), posterior

    def init_params(self, key):
        """Fresh parameters from a PRNG key."""
        L = self.grid[0] * self.grid[1]
        draws = (jnp.full((1, L), 0.5), jnp.ones((1, L, self.latent_dim - 1)))
        return self.init(key, jnp.zeros((1, *self.image_shape)), draws)['params']


def draw_tokens(vae, params, images, keys):
    """Draw tokens from the posterior of images (B, H, W, c), one key per image: (z (B, L, d), the posterior)."""
    posterior = vae.apply({'params': params}, images, method='encode')
    return posterior.sample(power_spherical.posterior_draws(keys, posterior)), posterior


def autoencode(vae, params, images, draws):
    """Images (B, H, W, c) through the S-VAE: (reconstructions, tokens z (B, L, d), the `power_spherical.Posterior`).

    draws: of `power_spherical.Posterior.draw` for (B, L) tokens, or a function posterior → draws.
    """
    posterior = vae.apply({'params': params}, images, method='encode')
    z = posterior.sample(draws(posterior) if callable(draws) else draws)
    return vae.apply({'params': params}, z, method='decode'), z, posterior
