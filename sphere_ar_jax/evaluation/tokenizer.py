"""Scores of a tokenizer's reconstructions."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sphere_ar_jax.data import pixels
from sphere_ar_jax.evaluation.fidelity import protocol, statistics
from sphere_ar_jax.models.judges.lpips import LPIPS
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import autoencoding
from sphere_ar_jax.training.run import Run


def _decibels(error: float | np.floating) -> float:
    """The PSNR in dB of a mean squared error between images in [−1, 1] (peak 2)."""
    return float(10 * np.log10(4 / error))


def psnr(a: ArrayLike, b: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB of images in [−1, 1] (peak 2), over all pixels together."""
    return _decibels(np.mean((np.asarray(a) - np.asarray(b)) ** 2))


# Side of the windows of SSIM, in pixels.
_WINDOW = 11


@jax.jit
def likeness(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """PSNR and SSIM of each pair of images.

    Papers that score image by image, as scikit-image does, report the mean of this PSNR. `psnr`,
    which takes all pixels together, is never above that mean, because −log is convex. The PSNR of
    equal images would be infinite, and with it the mean. They count as if one value of H·W·c were
    off by 1 of 255 levels, which is the largest PSNR that other images can have.

    SSIM takes windows of 11×11 pixels inside the image, weighted by a Gaussian with σ = 1.5, and
    C1 = 0.01² and C2 = 0.03² for pixels in [0, 1] (Wang et al. 2004). scikit-image's
    `structural_similarity` with gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    averaged over channels, gives the same to 1e-4.

    Args:
      a: (b, H, W, c) uint8, with H and W at least 11.
      b: (b, H, W, c) uint8.

    Returns:
      (PSNR in dB (b,), SSIM (b,)), both float32.
    """
    a = a.astype(jnp.float32) / 255
    b = b.astype(jnp.float32) / 255
    with jax.numpy_dtype_promotion('standard'):  # dm-pix mixes types
        largest = 10 * np.log10(255**2 * a[0].size)
        return jnp.minimum(dm_pix.psnr(a, b), largest), dm_pix.ssim(a, b)


@jax.jit
def _lpips(params: PyTree, a: jax.Array, b: jax.Array) -> jax.Array:
    return LPIPS().apply({'params': params}, a, b)


def _compare(
    images: np.ndarray, real: np.ndarray, rounded: np.ndarray, lpips: PyTree | None
) -> dict[str, float]:
    """Means over a batch of the scores that every image has by itself.

    `images` and `rounded`, the reconstructions, are (b, H, W, c) uint8; `real` has the images
    again, float32 in [−1, 1]. Without `lpips`, the parameters of `LPIPS`, that score is left out,
    and so is SSIM where its windows are larger than the images.
    """
    image_psnr, ssim = likeness(rounded, images)
    pairs = {'image_psnr': image_psnr}
    if min(images.shape[1:3]) >= _WINDOW:
        pairs['ssim'] = ssim
    if lpips is not None:
        pairs['lpips'] = _lpips(lpips, pixels.to_float(rounded), real)
    return {name: float(np.mean(value)) for name, value in pairs.items()}


def score_tokenizer(
    run: Run,
    batches: Iterable[np.ndarray],
    *,
    network: PyTree | None = None,
    lpips: PyTree | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Scores the reconstructions of real images, decoded from posterior samples.

    All scores but `psnr` take reconstructions that are rounded to bytes, as samples are. See
    `docs/evaluation.md`, "The tokenizer".

    Args:
      run: the run that has the tokenizer.
      batches: uint8 images (b, H, W, c). One batch is in memory at a time.
      network: parameters of `inception.Inception` for rFID, or None to leave rFID out.
      lpips: parameters of `LPIPS`, or None to leave LPIPS out.
      seed: seed of the posterior samples.
      progress: called with the number of images done.

    Returns:
      Scores by name: `psnr` (all pixels together), `image_psnr` and `ssim` (means over images),
      `lpips`, `rfid`, and what the posterior shows, a mean over the batches. `images` is the
      number of images and `seed` that of the posterior samples. With rFID, `note` is a line where
      there are too few images for an FID that can be compared.

    Raises:
      UserError: there are no images, or their size is not the tokenizer's.
    """
    mesh = sharding.make_mesh(**run.config.mesh)
    size = run.vae.image_shape
    key = jax.random.key(seed)
    vae_params = jax.device_put(run.vae_params, sharding.whole(mesh))  # once for all batches
    count = 0
    totals: dict[str, float] = collections.defaultdict(float)
    features_of_real: list[np.ndarray] = []
    features_of_decoded: list[np.ndarray] = []
    for images in batches:
        if images.shape[1:] != size:
            raise UserError(f'images of {images.shape[1:]}, but the tokenizer takes {size}')
        real = pixels.to_float(images)
        decoded, found = autoencoding.reconstruct(
            run.vae, vae_params, real, key, len(images), mesh, count
        )
        rounded = np.asarray(pixels.to_uint8(decoded))
        means = _compare(images, real, rounded, lpips)
        for name in run.vae.posterior.shown:
            means[name] = found[name]
        means['error'] = float(np.mean((decoded - real) ** 2))
        for name, value in means.items():
            totals[name] += value * len(images)
        if network is not None:
            for kept, x in ((features_of_real, images), (features_of_decoded, rounded)):
                kept.append(protocol.extract([x], network, batch_size=len(images), mesh=mesh).pool)
        count += len(images)
        progress(count)
    if not count:
        raise UserError('there are no images to score')
    scores: dict[str, Any] = {name: value / count for name, value in totals.items()}
    scores['psnr'] = _decibels(scores.pop('error'))
    if network is not None:
        of_real = statistics.statistics(np.concatenate(features_of_real))
        of_decoded = statistics.statistics(np.concatenate(features_of_decoded))
        scores['rfid'] = statistics.frechet_distance(*of_decoded, *of_real)
        note = statistics.note(count)
        if note is not None:
            scores['note'] = note
    scores |= {'images': count, 'seed': seed}
    return scores
