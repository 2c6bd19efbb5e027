"""The S-VAE: a backbone between images and tokens, and the posterior of the tokens.

It is the tokenizer of paper §3. See `docs/method.md`, "Tokenizer".

Dimensions:
  B    images               H, W   token grid, L = H·W tokens in raster order
  c    image channels       d      latent dimension
  D    width of the backbone
  p    pixels per token along each axis, the patch size of the backbone
  R    the radius of the sphere, √d or another one
Images are float (B, H·p, W·p, c) in [−1, 1].
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from sphere_ar_jax.models.backbones import Backbone, Hybrid
from sphere_ar_jax.models.convolutions import torch_bias_init, torch_init
from sphere_ar_jax.models.posteriors import (
    Distribution,
    Draws,
    Posterior,
    PowerSpherical,
    from_parameters,
)
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sphere import geometry

# What the decoder reads: latents z as they are, or N_R(z).
DECODER_INPUTS = ('latents', 'projected')
# What the AR model reads and draws, see `VAE.to_tokens`.
TOKEN_SPACES = ('latents', 'projected', 'standardised', 'polar')


class Statistics(nn.Module):
    """Mean and standard deviation of n numbers of the training images' latents.

    They are not trained. `VAE.with_statistics` puts them in.

    Attributes:
      size: n, see `VAE.num_statistics`.
    """

    size: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns (mean, std), each (1, 1, n), as they stand beside latents (B, L, d)."""
        mean = self.param('mean', nn.initializers.zeros, (self.size,))
        std = self.param('std', nn.initializers.ones, (self.size,))
        return mean[None, None], std[None, None]


class VAE(nn.Module):
    """The tokenizer.

    The defaults are the published S-VAE for 256×256 pixels, with 75,393,297 parameters.

    Attributes:
      grid: (H, W) tokens.
      latent_dim: d.
      backbone: see `backbones`. It computes in a dtype of its own.
      posterior: see `posteriors`.
      decoder_input: one of `DECODER_INPUTS`.
      token_space: one of `TOKEN_SPACES`, see `to_tokens`.
      radius: R of the sphere of all tokens and projections; None stands for √d. A posterior on a
        sphere has the same. The directions of the token space 'polar' have √d in any case.
      dtype: dtype of the two projections; parameters are float32. `computing_in` sets it and the
        backbone's dtype.

    Raises:
      ValueError: the radius is not a finite number above 0, or is not the posterior's.
    """

    grid: tuple[int, int] = (16, 16)
    latent_dim: int = 16
    backbone: Backbone = Hybrid()
    posterior: Posterior = PowerSpherical()
    dtype: DTypeLike = jnp.float32
    decoder_input: str = 'latents'
    token_space: str = 'latents'
    radius: float | None = None

    def __post_init__(self) -> None:
        geometry.check_radius(self.radius)
        theirs = getattr(self.posterior, 'radius', self.radius)
        if theirs != self.radius:
            raise ValueError(
                f'the posterior has the radius {theirs} and the tokenizer {self.radius}: '
                'give both the same'
            )
        super().__post_init__()

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)  # its parameters stand beside the projections
        width = self.backbone.width
        outputs = self.posterior.outputs(self.latent_dim)
        self.quant_proj = nn.Dense(
            outputs,
            kernel_init=torch_init(),
            bias_init=torch_bias_init(width),
            dtype=self.dtype,
        )
        self.post_quant_proj = nn.Dense(
            width, use_bias=False, kernel_init=torch_init(), dtype=self.dtype
        )
        self.statistics = Statistics(self.num_statistics)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images."""
        p = self.backbone.patch_size
        return (self.grid[0] * p, self.grid[1] * p, self.backbone.image_channels)

    @property
    def token_dim(self) -> int:
        """How many numbers a token of the AR model has: d, and d + 1 with 'polar'."""
        if self.token_space == 'polar':
            return self.latent_dim + 1
        return self.latent_dim

    @property
    def num_statistics(self) -> int:
        """How many numbers `measured` gives for a latent; 0 where nothing is standardised."""
        return {'standardised': self.latent_dim, 'polar': 1}.get(self.token_space, 0)

    def computing_in(self, dtype: DTypeLike) -> 'VAE':
        """Returns the same model, computing in another dtype."""
        return self.clone(dtype=dtype, backbone=self.backbone.clone(dtype=dtype))

    def encode(self, images: jax.Array) -> Distribution:
        """Turns images (B, H·p, W·p, c) in [−1, 1] into the posterior of their tokens, float32."""
        hidden = self.backbone.encode(images)
        return self.posterior(self.quant_proj(hidden).astype(jnp.float32))

    def decode(self, z: jax.Array) -> jax.Array:
        """Turns latents z (B, L, d) into images (B, H·p, W·p, c), float32, not clipped."""
        if self.decoder_input == 'projected':
            z = geometry.project(z, self.radius)
        x = self.post_quant_proj(z.astype(self.dtype))
        return self.backbone.decode(x.reshape(x.shape[0], *self.grid, x.shape[-1]))

    def measured(self, z: jax.Array) -> jax.Array:
        """Gives the numbers of latents z (..., d) that `to_tokens` standardises.

        They are z itself with the token space 'standardised', and log ‖z‖ (..., 1) with 'polar'.
        """
        return geometry.log_norm(z) if self.token_space == 'polar' else z

    def to_tokens(self, z: jax.Array) -> jax.Array:
        """Turns latents z (B, L, d) into the tokens that the AR model reads.

        With the token space 'latents' these are z itself, with 'projected' N_R(z), and with
        'standardised' (z − mean)/std, by the `Statistics` of the training images. With 'polar' they
        have d + 1 numbers: N_R(z), and (log ‖z‖ − mean)/std.
        """
        if self.token_space == 'projected':
            return geometry.project(z, self.radius)
        if not self.num_statistics:
            return z
        mean, std = self.statistics()
        standardised = (self.measured(z) - mean) / std
        if self.token_space == 'polar':
            return jnp.concatenate([geometry.project(z), standardised], axis=-1)
        return standardised

    def from_tokens(self, tokens: jax.Array) -> jax.Array:
        """Turns tokens (B, L, `token_dim`) of the AR model into latents z (B, L, d).

        It inverts `to_tokens`, but for the norm that 'projected' drops.
        """
        if not self.num_statistics:
            return tokens
        mean, std = self.statistics()
        if self.token_space == 'polar':
            direction = geometry.l2_normalize(tokens[..., :-1])
            return jnp.exp(mean + std * tokens[..., -1:]) * direction
        return mean + std * tokens

    def decode_tokens(self, tokens: jax.Array) -> jax.Array:
        """Turns tokens (B, L, `token_dim`) into images, as `decode` does for latents."""
        return self.decode(self.from_tokens(tokens))

    def project(self, tokens: jax.Array) -> jax.Array:
        """Returns what the sampler feeds back for drawn tokens (..., `token_dim`).

        It is `Posterior.project` with the token space 'latents', N_R with 'projected', and the
        drawn tokens themselves with 'standardised'. With 'polar' it is N_R of the first d numbers,
        and the last one as it was drawn. It needs no parameters.
        """
        if self.token_space == 'projected':
            return geometry.project(tokens, self.radius)
        if self.token_space == 'standardised':
            return tokens
        if self.token_space == 'polar':
            direction = geometry.project(tokens[..., :-1])
            return jnp.concatenate([direction, tokens[..., -1:]], axis=-1)
        return self.posterior.project(tokens)

    def with_statistics(
        self, params: PyTree, mean: ArrayLike | None = None, std: ArrayLike | None = None
    ) -> PyTree:
        """Adds the statistics that the token space needs to the parameters.

        Args:
          params: the trained parameters.
          mean: (n,) of what `measured` gives, 0 if not given.
          std: (n,), 1 if not given.

        Returns:
          The parameters with the statistics, or the same parameters where nothing is standardised.
        """
        if not self.num_statistics:
            return params
        # NumPy's arrays belong to no device, so that they go with parameters anywhere.
        zeros = np.zeros(self.num_statistics, np.float32)
        mean = zeros if mean is None else np.asarray(mean, np.float32)
        std = zeros + 1 if std is None else np.asarray(std, np.float32)
        return params | {'statistics': {'mean': mean, 'std': std}}

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
        """Makes fresh parameters from a PRNG key, without `Statistics`."""
        return _fresh(self, key)


# A run needs the shapes and the values of parameters in several places; JAX keeps what it traced.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _fresh(model: VAE, key: jax.Array) -> PyTree:
    """The parameters of `VAE.init_params`."""
    images = jnp.zeros((1, *model.image_shape))
    z = jnp.zeros((1, model.grid[0] * model.grid[1], model.latent_dim))
    return model.init(key, images, z)['params']


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


def image_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """Makes the key of each image, `fold_in(key, index)` (`docs/method.md`, "Random numbers").

    Args:
      key: one PRNG key for all images, (), or one for each, (B,).
      index: the images' numbers, (B,).

    Returns:
      PRNG keys (B,).
    """
    return jax.vmap(jax.random.fold_in, (0 if key.ndim else None, 0))(key, index)


def draw_latents(
    vae: VAE, params: PyTree, images: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Distribution]:
    """Draws latents from the posterior of images.

    Args:
      vae: the tokenizer.
      params: its parameters.
      images: (B, H·p, W·p, c) in [−1, 1].
      keys: one PRNG key for each image, (B,).

    Returns:
      The latents z (B, L, d), and the posterior.
    """
    q = vae.apply({'params': params}, images, method='encode')
    return q.sample(q.draws(keys)), q


def batch_posterior(vae: VAE, params: PyTree, batch: Mapping[str, jax.Array]) -> Distribution:
    """The posterior of the tokens of a batch, from its images or from their latents.

    Args:
      vae: the tokenizer.
      params: its parameters; not read where the batch has latents.
      batch: `image` (B, H·p, W·p, c) in [−1, 1], or in its place the posterior's parameters, see
        `posteriors.parameters`; besides them anything.
    """
    if 'image' in batch:
        return vae.apply({'params': params}, batch['image'], method='encode')
    return from_parameters(vae.posterior, vae.latent_dim, batch)


def draw_batch_tokens(
    vae: VAE, params: PyTree, batch: Mapping[str, jax.Array], keys: jax.Array
) -> jax.Array:
    """Draws the tokens that the AR model learns from, (B, L, `VAE.token_dim`).

    They are drawn from the posterior, and brought into the token space.

    Args:
      vae: the tokenizer.
      params: its parameters, see `VAE.with_statistics`.
      batch: see `batch_posterior`.
      keys: one PRNG key for each image, (B,).
    """
    q = batch_posterior(vae, params, batch)
    return vae.apply({'params': params}, q.sample(q.draws(keys)), method='to_tokens')


def autoencode(
    vae: VAE, params: PyTree, images: jax.Array, draws: Callable[[Distribution], Draws]
) -> tuple[jax.Array, jax.Array, Distribution]:
    """Encodes images, draws latents and decodes them.

    Args:
      vae: the tokenizer.
      params: its parameters.
      images: (B, H·p, W·p, c) in [−1, 1].
      draws: called with the posterior, returns the random draws of its samples.

    Returns:
      The reconstructions (B, H·p, W·p, c), the latents z (B, L, d), and the posterior.
    """
    q = vae.apply({'params': params}, images, method='encode')
    z = q.sample(draws(q))
    return vae.apply({'params': params}, z, method='decode'), z, q
