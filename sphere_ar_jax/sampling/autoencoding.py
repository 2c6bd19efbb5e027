"""The tokenizer alone: images to tokens and back, on all devices of a mesh.

Dimensions:
  n  images in all
  B  images of a batch
  b  images of a batch on one device
  L  tokens of an image
  d  latent dimension
  images are float32 (…, H, W, c)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sphere_ar_jax.models.vae import VAE, draw_batch_tokens, draw_latents, image_keys
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import batching


def reading_keys(seed: int | np.ndarray, count: int) -> jax.Array:
    """Makes the keys (n,) of n images that are read, see `model.Model.encode`.

    Args:
      seed: one for all images, of which image i has the key folded by i, or (n,), of which each
        image has its own folded by 0.
      count: n.
    """
    if isinstance(seed, int):
        return image_keys(jax.random.key(seed), jnp.arange(count))
    return image_keys(jax.vmap(jax.random.key)(seed), jnp.zeros(count, jnp.int32))


@functools.cache
def autoencoder(vae: VAE) -> Callable[..., tuple[jax.Array, PyTree]]:
    """The compiled program of `reconstruct` for one device.

    Returns:
      function of ((params, key's data), (images (b, H, W, c), index (b,))) → (reconstructions
        (b, H, W, c), the posterior).
    """

    def run(frozen, rows):
        params, key = frozen
        images, index = rows
        keys = image_keys(jax.random.wrap_key_data(key), index)
        z, q = draw_latents(vae, params, images, keys)
        return vae.apply({'params': params}, z, method='decode'), q

    return jax.jit(run)


def reconstruct(
    vae: VAE,
    params: PyTree,
    images: np.ndarray,
    key: jax.Array,
    batch_size: int,
    mesh: Mesh,
    first: int = 0,
) -> tuple[np.ndarray, dict[str, float]]:
    """Autoencodes images by samples of the posterior; image i has the key folded by first + i.

    Every device takes its own rows in a program of its own, since libtpu 0.0.52 aborts on the
    decoder with rows split by `sharding.BATCH`. All processes call it with the same images.

    Args:
      vae: the tokenizer.
      params: its parameters.
      images: (n, H, W, c), in [−1, 1].
      key: PRNG key of all images.
      batch_size: B, rounded up to a multiple of the mesh's devices.
      mesh: devices to use.
      first: number of the first image.

    Returns:
      (reconstructions (n, H, W, c), the posterior's statistics over all images). Every process gets
        all of them.

    Raises:
      NonFiniteSamples: a reconstruction is not finite.
    """
    # The key goes as numbers, since keys cannot be put on other processes' devices.
    key_data = np.asarray(jax.random.key_data(key))
    index = first + np.arange(len(images))
    size = sharding.whole_rows(mesh, batch_size)
    recon, q = batching.in_batches_of(
        autoencoder(vae), (params, key_data), (images, index), size, mesh
    )
    batching.require_finite(np.isfinite(recon).all((1, 2, 3)), first)
    return recon, {name: float(value) for name, value in q.statistics().items()}


@functools.cache
def encoder(vae: VAE) -> Callable[..., jax.Array]:
    """The compiled program that turns images into the most probable tokens, for one device.

    Returns:
      function of (params, images (b, H, W, c)) → tokens (b, L, d), as the AR model reads them.
    """

    def run(params, images):
        q = vae.apply({'params': params}, images, method='encode')
        return vae.apply({'params': params}, q.mode(), method='to_tokens')

    return jax.jit(run)


@functools.cache
def drawing_encoder(vae: VAE) -> Callable[..., jax.Array]:
    """The compiled program that draws tokens from the posterior of images, for one device.

    Returns:
      function of (params, (images (b, H, W, c), key data (b, 2) of each image)) → tokens (b, L, d),
        as the AR model reads them.
    """

    def run(params, rows):
        images, key_data = rows
        keys = jax.random.wrap_key_data(key_data)
        return draw_batch_tokens(vae, params, {'image': images}, keys)

    return jax.jit(run)


@functools.cache
def decoder(vae: VAE) -> jax.stages.Wrapped:
    """The jitted program that decodes tokens, for one device.

    Returns:
      function of (params, tokens (b, L, d)) → images (b, H, W, c).
    """

    def decode(params, tokens):
        return vae.apply({'params': params}, tokens, method='decode_tokens')

    return jax.jit(decode)
