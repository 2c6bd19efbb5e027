"""Texts for images, and how likely texts are, on all devices of a mesh.

Dimensions:
  n  images in all
  b  images of a batch on one device
  T  numbers of a caption
  images are float32 (…, H, W, c)
"""

import functools
import numbers
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.joint import Joint
from sphere_ar_jax.models.vae import VAE, draw_batch_tokens
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import autoencoding, batching, on_mesh
from sphere_ar_jax.sampling.interleaved import (
    LIKELIEST,
    NONE,
    Segment,
    Writing,
    folded,
    interleave,
)


def writer(ar: AR) -> Joint:
    """The model itself, if it writes texts.

    Raises:
      UserError: it does not.
    """
    if not isinstance(ar, Joint):
        raise UserError(
            'this model writes no texts: a model that is trained with ar.text_weight does '
            '(docs/text.md, "Both directions")'
        )
    return ar


# The least number above 0 that float32 has with all its digits, and the largest one.
_COLDEST = float(np.finfo(np.float32).tiny)
_HOTTEST = float(np.finfo(np.float32).max)


def _is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_writing(top_p: float | None, temperature: float) -> Writing:
    """How numbers are chosen, from values that a caller gives.

    Raises:
      UserError: they are not possible.
    """
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise UserError(f'top_p is {top_p!r}, but must be a number in (0, 1]')
    if not (_is_number(temperature) and _COLDEST <= temperature <= _HOTTEST):
        raise UserError(
            f'temperature is {temperature!r}, but must be a number of at least {_COLDEST:.2g} and '
            f'at most {_HOTTEST:.2g}'
        )
    if top_p is None and temperature != 1:
        raise UserError('temperature is for texts that are drawn: give top_p, as 1.0, too')
    return Writing(top_p, temperature)


def _tokens(vae: VAE, params: PyTree, images: jax.Array, keys: jax.Array, drawn: bool) -> jax.Array:
    """The tokens (b, L, d) of images: the most probable ones, or those drawn by keys (b,).

    The keys are folded by 0, as those of the first segment of a sequence.
    """
    if not drawn:
        return autoencoding.encoder(vae)(params, images)
    return draw_batch_tokens(vae, params, {'image': images}, folded(keys, 0))


# Callers may ask for many values of top_p.
@functools.lru_cache(maxsize=on_mesh.KEPT_PROGRAMS)
def captioner(ar: Joint, vae: VAE, writing: Writing, drawn: bool) -> Callable[..., jax.Array]:
    """The compiled program that writes a caption for each image, for one device.

    Args:
      ar: the AR model.
      vae: the tokenizer.
      writing: how the numbers are chosen.
      drawn: see `write`.

    Returns:
      function of ((vae_params, ar_params), (images (b, H, W, c), key data (b, 2) of each image)) →
        captions (b, T) int32.
    """

    def run(params, rows):
        vae_params, ar_params = params
        images, key_data = rows
        keys = jax.random.wrap_key_data(key_data)
        z = _tokens(vae, vae_params, images, keys, drawn)
        segments = [Segment('image', z), Segment('text')]
        return interleave(ar, ar_params, segments, keys, writing=writing)[1]

    return jax.jit(run)


@functools.cache
def reader(ar: Joint, vae: VAE, drawn: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The compiled program of `joint.Joint.nats` for images, for one device.

    Args:
      ar: the AR model.
      vae: the tokenizer.
      drawn: see `write`.

    Returns:
      function of ((vae_params, ar_params), (images (b, H, W, c), captions (b, T), key data (b, 2)
        of each image)) → −log p(text | image) and −log p(text), both (b,).
    """

    def run(params, rows):
        vae_params, ar_params = params
        images, labels, key_data = rows
        z = _tokens(vae, vae_params, images, jax.random.wrap_key_data(key_data), drawn)
        return ar.apply({'params': ar_params}, labels, z, method='nats')

    return jax.jit(run)


def _key_data(seed: int | np.ndarray, count: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(autoencoding.reading_keys(seed, count)))


def write(
    models: on_mesh.Models,
    images: np.ndarray,
    *,
    seed: int | np.ndarray,
    writing: Writing = LIKELIEST,
    drawn: bool = False,
    batch_size: int,
    mesh: Mesh,
) -> np.ndarray:
    """Writes a caption for each image. Every device holds the whole model.

    Args:
      models: both models and their parameters.
      images: (n, H, W, c) in [−1, 1].
      seed: one for all images, of which image i has the key folded by i, or (n,), of which each
        image has its own folded by 0.
      writing: how the numbers are chosen.
      drawn: whether the images' tokens are drawn from the posterior, as in training. Otherwise they
        are the most probable ones, whose norms are smaller where tokens lie on no sphere.
      batch_size: images at once.
      mesh: the devices.

    Returns:
      (n, T) int32, see `vocabulary`.

    Raises:
      UserError: the model writes no texts, or gives logits that are not finite.
    """
    ar, ar_params = unstacked(writer(models.ar), models.ar_params)
    program = captioner(ar, models.vae, writing, drawn)
    data = _key_data(seed, len(images))
    params = (models.vae_params, ar_params)
    found = batching.in_batches(program, params, (images, data), batch_size, mesh)
    wrong = np.flatnonzero((found == NONE).any(1))
    if len(wrong):
        raise UserError(
            f'there are no finite logits for the texts of {len(wrong)} of {len(found)} images, '
            f'number {wrong[0]} the first: the weights may be too large, or dtype too small'
        )
    return found


def nats(
    models: on_mesh.Models,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int | np.ndarray = 0,
    drawn: bool = False,
    batch_size: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes −log p(text | image) and −log p(text) of a caption for each image.

    Args:
      models: both models and their parameters.
      images: (n, H, W, c) in [−1, 1].
      labels: (n, T) int32.
      seed: see `write`.
      drawn: see `write`.
      batch_size: images at once.
      mesh: the devices.

    Returns:
      Both (n,) float32, in nats; see `Joint.nats`.

    Raises:
      UserError: the model writes no texts.
    """
    program = reader(writer(models.ar), models.vae, drawn)
    params = (models.vae_params, models.ar_params)
    rows = (images, labels, _key_data(seed, len(images)))
    return batching.in_batches(program, params, rows, batch_size, mesh)
