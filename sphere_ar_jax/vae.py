"""S-VAE: the hybrid CNN–ViT tokenizer with a power-spherical posterior (spec §3).

Dimensions:
  B    images               H, W   token grid, L = H·W tokens in raster order
  c    image channels       d      latent dimension; tokens lie on the sphere of radius √d
  D    width of both ViTs = last entry of `channels`
Images are float (B, H·p, W·p, c) in [−1, 1], p = 2^(len(channels) − 1) the patch size.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax import distributions, geometry, transformer
from sphere_ar_jax.convolutions import Conv, ConvTranspose, torch_init

NUM_REGISTERS = 4


class Posterior(NamedTuple):
    """q(x|image) of every token, as a power-spherical distribution: mu (B, L, d) unit, kappa (B, L) > 1, float32."""

    mu: jax.Array
    kappa: jax.Array

    def kl(self):
        """KL to the uniform distribution on the sphere, (B, L) nats."""
        return distributions.kl_to_uniform(self.kappa, self.mu.shape[-1])

    def draw(self, key):
        """The random draws (s, normal) that `sample` takes, shapes (B, L) and (B, L, d−1)."""
        return distributions.draw(key, self.kappa, self.mu.shape[-1])

    def sample(self, draws):
        """Tokens z = √d · x, (B, L, d), differentiable in mu and kappa."""
        return self.mu.shape[-1] ** 0.5 * distributions.sample_from_draws(self.mu, self.kappa, *draws)


class NormSiLU(nn.Module):
    """GroupNorm over min(32, channels//4) groups, in float32, then SiLU. (B, H, W, c) → the same in `dtype`.

    As one affine map per image and channel, a·(x − mean) + bias, after the two passes that mean and variance need.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (channels,))
        bias = self.param('bias', nn.initializers.zeros, (channels,))
        groups = min(32, channels // 4)
        x = x.astype(jnp.float32)

        def mean(x):
            """Over pixels and the channels of a group, given to each of its channels: (B, H, W, c) → (B, 1, 1, c)."""
            per_channel = jnp.mean(x, axis=(1, 2)).reshape(len(x), groups, -1)
            return jnp.repeat(jnp.mean(per_channel, axis=-1), channels // groups, axis=-1)[:, None, None]

        center = mean(x)
        a = scale[None, None, None] * jax.lax.rsqrt(mean(jnp.square(x - center)) + transformer.EPS)
        return nn.silu(a * (x - center) + bias[None, None, None]).astype(self.dtype)


class ResDown(nn.Module):
    """Halves the resolution: conv2×2 stride 2 + [GN, SiLU, conv3×3 stride 2, GN, SiLU, conv3×3]."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = NormSiLU(self.dtype, name='norm1')(x)
        h = Conv(self.channels, stride=2, dtype=self.dtype, name='conv1')(h)
        h = Conv(self.channels, dtype=self.dtype, name='conv2')(NormSiLU(self.dtype, name='norm2')(h))
        return Conv(self.channels, kernel=2, dtype=self.dtype, name='shortcut')(x) + h


class ResUp(nn.Module):
    """Doubles the resolution: transposed conv2×2 + [GN, SiLU, transposed conv4×4, GN, SiLU, conv3×3], then
    x + [GN, SiLU, conv3×3, GN, SiLU, conv3×3](x)."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = ConvTranspose(self.channels, 4, self.dtype, name='conv1')(NormSiLU(self.dtype, name='norm1')(x))
        h = Conv(self.channels, dtype=self.dtype, name='conv2')(NormSiLU(self.dtype, name='norm2')(h))
        x = ConvTranspose(self.channels, 2, self.dtype, name='shortcut')(x) + h
        h = Conv(self.channels, dtype=self.dtype, name='conv3')(NormSiLU(self.dtype, name='norm3')(x))
        h = Conv(self.channels, dtype=self.dtype, name='conv4')(NormSiLU(self.dtype, name='norm4')(h))
        return x + h


class ViT(nn.Module):
    """Bidirectional transformer over the grid with 4 learned register tokens in front. (B, H, W, D) → same, float32."""

    depth: int
    heads: int
    remat: bool
    unroll: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        B, H, W, D = x.shape
        registers = self.param('registers', transformer.INIT, (NUM_REGISTERS, D))
        x = x.reshape(B, H * W, D).astype(jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(registers, (B, NUM_REGISTERS, D)), x], axis=1)
        angles = transformer.rope_table(H, W, NUM_REGISTERS, transformer.head_dim(D, self.heads))
        x, _ = transformer.Stack(self.depth, self.heads, False, self.remat, self.unroll, self.dtype, name='stack')(
            x, angles
        )
        return x[:, NUM_REGISTERS:].reshape(B, H, W, D)


class Encoder(nn.Module):
    """Images (B, H·p, W·p, c) → hidden states (B, L, D)."""

    channels: tuple
    stem: int
    depth: int
    heads: int
    remat: bool
    unroll: int
    dtype: Any

    @nn.compact
    def __call__(self, images):
        x = Conv(self.stem, dtype=self.dtype, name='conv_in')(images.astype(self.dtype))
        for i, channels in enumerate(self.channels[1:]):
            x = ResDown(channels, self.dtype, name=f'down{i}')(x)
        x = ViT(self.depth, self.heads, self.remat, self.unroll, self.dtype, name='vit')(x)
        x = transformer.RMSNorm(self.dtype, name='norm')(x.reshape(x.shape[0], -1, x.shape[-1]))
        return nn.Dense(x.shape[-1], use_bias=False, kernel_init=torch_init(), dtype=self.dtype, name='output')(x)


class Decoder(nn.Module):
    """Hidden states on the grid (B, H, W, D) → images (B, H·p, W·p, c), float32, unclipped."""

    channels: tuple
    image_channels: int
    depth: int
    heads: int
    remat: bool
    unroll: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = Conv(x.shape[-1], dtype=self.dtype, name='conv_in')(x)
        x = ViT(self.depth, self.heads, self.remat, self.unroll, self.dtype, name='vit')(x)
        for i, channels in enumerate(self.channels[-2::-1]):
            x = ResUp(channels, self.dtype, name=f'up{i}')(x)
        x = NormSiLU(self.dtype, name='norm_out')(x)
        return Conv(self.image_channels, dtype=self.dtype, name='conv_out')(x).astype(jnp.float32)


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
        self.encoder = Encoder(channels, self.stem, self.encoder_depth, **vit)
        self.decoder = Decoder(channels, self.image_channels, self.decoder_depth, **vit)
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
        return Posterior(geometry.l2_normalize(x[..., :-1]), nn.softplus(x[..., -1]) + 1)

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
