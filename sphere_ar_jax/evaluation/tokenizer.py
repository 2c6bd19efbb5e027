"""Scores of a tokenizer's reconstructions."""

import collections

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.data import pixels
from sphere_ar_jax.evaluation.fidelity import protocol, statistics
from sphere_ar_jax.models.lpips import LPIPS
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import on_mesh


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [−1, 1] (peak 2), over all pixels together."""
    return float(10 * np.log10(4 / np.mean((np.asarray(a) - np.asarray(b)) ** 2)))


@jax.jit
def likeness(a, b):
    """(PSNR in dB, SSIM) of each pair of uint8 images (b, H, W, c), H and W ≥ 11; float32 (b,).

    Papers that score image by image, as scikit-image does, report the mean of this PSNR. `psnr`, of
    all pixels together, is never more than that (− log is convex).

    SSIM: windows of 11×11 pixels inside the image, weighted by a Gaussian with σ = 1.5; C1 = 0.01²
    and C2 = 0.03² for pixels in [0, 1]. Source: Wang et al. 2004; scikit-image's
    `structural_similarity` with gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    averaged over channels, gives the same to 1e-4.
    """
    a, b = (x.astype(jnp.float32) / 255 for x in (a, b))
    with jax.numpy_dtype_promotion('standard'):  # dm-pix mixes types
        return dm_pix.psnr(a, b), dm_pix.ssim(a, b)


@jax.jit
def _lpips(params, a, b):
    return LPIPS().apply({'params': params}, a, b)


def score_tokenizer(run, batches, *, network=None, lpips=None, seed=0, progress=lambda done: None):
    """What a tokenizer loses: scores of reconstructions of real images, decoded from posterior
    samples.

    Args:
      run: `Run`. batches: iterable of uint8 (b, H, W, c), one of which is in memory at a time.
        network: `inception` parameters, for rFID, or None. lpips: `lpips` parameters or None. seed:
        of the posterior samples.
      progress: called with the number of images done.
    Returns:
      dict: psnr (all pixels together), image_psnr and ssim (means over images), lpips, rfid, and
        what the posterior
      shows. Reconstructions are rounded to bytes as samples are, but for psnr.
    Raises UserError for images of another size.
    """
    mesh, size, key = (
        sharding.make_mesh(**run.config.mesh),
        run.vae.image_shape,
        jax.random.key(seed),
    )
    vae_params = jax.device_put(run.vae_params, sharding.whole(mesh))  # once for all batches
    count, totals, features = 0, collections.Counter(), ([], [])
    for images in batches:
        if images.shape[1:] != size:
            raise UserError(f'images of {images.shape[1:]}, but the tokenizer takes {size}')
        real = images.astype(np.float32) / 127.5 - 1
        decoded, found = on_mesh.reconstruct(
            run.vae, vae_params, real, key, len(images), mesh, count
        )
        rounded = np.asarray(pixels.to_uint8(decoded))
        pairs = dict(zip(('image_psnr', 'ssim'), likeness(rounded, images), strict=True))
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
