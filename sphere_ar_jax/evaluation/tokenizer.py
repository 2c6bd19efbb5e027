"""Scores of a tokenizer's reconstructions."""

import collections

import jax
import numpy as np

from sphere_ar_jax.data import pixels
from sphere_ar_jax.evaluation import similarity
from sphere_ar_jax.evaluation.fidelity import protocol, statistics
from sphere_ar_jax.models.lpips import LPIPS
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import on_mesh


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [−1, 1] (peak 2), over all pixels together."""
    return float(10 * np.log10(4 / np.mean((np.asarray(a) - np.asarray(b)) ** 2)))


@jax.jit
def _likeness(a, b):
    """(PSNR, SSIM) of pairs of uint8 images, each (b,)."""
    return similarity.image_psnr(a, b, (0, 255)), similarity.ssim(a, b, (0, 255))


@jax.jit
def _lpips(params, a, b):
    return LPIPS().apply({'params': params}, a, b)


def score_tokenizer(run, batches, *, network=None, lpips=None, seed=0, progress=lambda done: None):
    """What a tokenizer loses: scores of reconstructions of real images, decoded from posterior samples.

    Args:
      run: `Run`. batches: iterable of uint8 (b, H, W, c), one of which is in memory at a time. network: `inception`
        parameters, for rFID, or None. lpips: `lpips` parameters or None. seed: of the posterior samples.
      progress: called with the number of images done.
    Returns:
      dict: psnr (all pixels together), image_psnr and ssim (means over images), lpips, rfid, and what the posterior
      shows. Reconstructions are rounded to bytes as samples are, but for psnr.
    Raises UserError for images of another size.
    """
    mesh, size, key = sharding.make_mesh(**run.config.mesh), run.vae.image_shape, jax.random.key(seed)
    vae_params = jax.device_put(run.vae_params, sharding.whole(mesh))  # once for all batches
    count, totals, features = 0, collections.Counter(), ([], [])
    for images in batches:
        if images.shape[1:] != size:
            raise UserError(f'images of {images.shape[1:]}, but the tokenizer takes {size}')
        real = images.astype(np.float32) / 127.5 - 1
        decoded, found = on_mesh.reconstruct(run.vae, vae_params, real, key, len(images), mesh, count)
        rounded = np.asarray(pixels.to_uint8(decoded))
        pairs = dict(zip(('image_psnr', 'ssim'), _likeness(rounded, images), strict=True))
        if lpips is not None:
            pairs['lpips'] = _lpips(lpips, rounded.astype(np.float32) / 127.5 - 1, real)
        means = {name: float(np.mean(value)) for name, value in pairs.items()}
        means |= {name: found[name] for name in run.vae.posterior.shown}
        means |= {'error': float(np.mean((decoded - real) ** 2))}
        for name, value in means.items():
            totals[name] += value * len(images)
        if network is not None:
            for kept, x in zip(features, (images, rounded), strict=True):
                kept.append(protocol.extract([x], network, batch_size=len(images), mesh=mesh).pool)
        count += len(images)
        progress(count)
    if not count:
        raise UserError('there are no images to score')
    scores = {name: value / count for name, value in totals.items()}
    scores['psnr'] = float(10 * np.log10(4 / scores.pop('error')))
    if network is not None:
        of_real, of_decoded = (statistics.statistics(np.concatenate(found)) for found in features)
        scores['rfid'] = statistics.frechet_distance(*of_decoded, *of_real)
    return scores
