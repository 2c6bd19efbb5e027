"""TODO evaluation.fidelity.protocol"""

import functools
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from sphere_ar_jax.evaluation.fidelity import image_sets, inception, precision_recall, statistics
from sphere_ar_jax.runtime import hosts, sharding
from sphere_ar_jax.runtime.console import UserError


class Summary(NamedTuple):
    """What the scores need of a set: `inception.Features`, or None without images, and `Statistics` of both kinds."""

    features: Any
    pool: statistics.Statistics
    spatial: statistics.Statistics


def extract(batches, params, *, batch_size=64, mesh=None, progress=lambda n: None):
    """`inception.Features` of a set of images, NumPy float32: 4 · (2048 + 2023 + 1008) bytes an image.

    Args:
      batches: iterable of uint8 (b, H, W, 3), any b, one H × W. params: of `inception_weights.load`.
      batch_size: images at a time, rounded up to a multiple of the mesh's devices, among which they are split.
      mesh: of `sharding.make_mesh`, all devices if None; of several processes all call it, with the same images.
      progress: called with the number of images just done.
    Raises UserError for anything but such images, and for none at all.
    """
    mesh = mesh or sharding.make_mesh()
    params = jax.device_put(params, sharding.whole(mesh))
    size = sharding.whole_rows(mesh, batch_size)
    parts = []
    running = None
    mine = sharding.local_rows(mesh, size, sharding.ROWS)

    def fetch(results, count):
        parts.append([hosts.gather(a)[:count] for a in results])
        progress(count)

    for images, count in image_sets.whole_batches(batches, size):
        results = inception.features(params, sharding.place_batch(mesh, images[mine], sharding.ROWS))
        if running:
            fetch(*running)  # the one before, while the devices work on this one
        running = results, count
    if running is None:
        raise UserError('there are no images to score')
    fetch(*running)
    return inception.Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))


# ---- all of it


def _read_statistics(path, archive):
    """The two `Statistics` of an npz that has `mu`."""
    widths = {'mu': inception.POOL, 'sigma': inception.POOL, 'mu_s': inception.SPATIAL, 'sigma_s': inception.SPATIAL}
    arrays = []
    for name, width in widths.items():
        if name not in image_sets.array_names(archive):
            raise UserError(f'{path} has mu but no {name}; it needs mu, sigma, mu_s and sigma_s')
        with archive.open(f'{name}.npy') as f:
            shape, _, dtype = image_sets.read_header(
                path, name, f
            )  # covariances are the same in C and in Fortran order
            expected = (width,) if name.startswith('mu') else (width, width)
            if shape != expected or dtype.kind != 'f':
                raise UserError(f'{path}: {name} must be floats {expected}, but is {dtype} {shape}')
            arrays.append(image_sets.read_numbers(path, name, f, shape, dtype).astype(np.float64))
    return statistics.Statistics(*arrays[:2]), statistics.Statistics(*arrays[2:])


def summarize(source, params, *, batch_size=64, mesh=None, progress=lambda done, total: None):
    """The `Summary` of a set of images.

    Args:
      source: path of an npz with `arr_0`, uint8 images, or `mu`, `sigma`, `mu_s`, `sigma_s`, or both (as ADM's
        VIRTUAL_imagenet256_labeled.npz: then the statistics are taken from the file, although its images are fewer);
        or batches as `extract` takes them.
      params, batch_size, mesh: see `extract`. progress: called with the images done and their number, None if unknown.
    Raises OSError, UserError.
    """
    found, total = None, None
    if isinstance(source, str | os.PathLike):
        path = source
        with image_sets.reading(path) as archive:
            names = image_sets.array_names(archive)
            found = _read_statistics(path, archive) if 'mu' in names else None
        if image_sets.IMAGES not in names:
            if found is None:
                raise UserError(
                    f'{path} has neither images ({image_sets.IMAGES}) nor statistics (mu, sigma, mu_s, sigma_s)'
                )
            return Summary(None, *found)
        with image_sets.open_images(path) as (_, shape):
            total = shape[0]
        source = image_sets.read_images(path, batch_size)
    count = 0

    def advance(n):
        nonlocal count
        count += n
        progress(count, total)

    features = extract(source, params, batch_size=batch_size, mesh=mesh, progress=advance)
    return Summary(
        features, *(found or (statistics.statistics(features.pool), statistics.statistics(features.spatial)))
    )


def evaluate(samples, reference, params, *, batch_size=64, mesh=None, progress=lambda part, done, total: None):
    """The ADM scores of `samples` against `reference`.

    Args:
      samples, reference: each a `Summary`, or what `summarize` takes. Published ImageNet numbers are those of 50,000
        samples against VIRTUAL_imagenet256_labeled.npz. params, batch_size, mesh: see `extract`.
      progress: called with the part ('samples', 'reference', 'precision_recall'), how much of it is done and of how
        much (None if unknown): images, or blocks of distances.
    Returns:
      dict of floats `fid`, `sfid`, `inception_score`, `precision`, `recall` (the last three only where there are images
      to take them from) and `seconds`, a dict of the parts' times. Raises OSError, UserError.
    """
    seconds, scores = {}, {}
    for source in (reference, samples):
        if isinstance(source, str | os.PathLike):
            open(source, 'rb').close()  # not there: said before hours of work, not after

    def timed(name, run, *args, **kwargs):
        started = time.perf_counter()
        result = run(*args, **kwargs)
        seconds[name] = time.perf_counter() - started
        return result

    def summary(name, source):
        if isinstance(source, Summary):
            return source
        report = functools.partial(progress, name)
        return timed(name, summarize, source, params, batch_size=batch_size, mesh=mesh, progress=report)

    reference, samples = summary('reference', reference), summary('samples', samples)
    scores['fid'] = timed('fid', statistics.frechet_distance, *samples.pool, *reference.pool)
    scores['sfid'] = timed('sfid', statistics.frechet_distance, *samples.spatial, *reference.spatial)
    if samples.features is not None:
        scores['inception_score'] = timed('inception_score', statistics.inception_score, samples.features.logits)
        if reference.features is not None:
            report = functools.partial(progress, 'precision_recall')
            scores['precision'], scores['recall'] = timed(
                'precision_recall',
                precision_recall.precision_recall,
                reference.features.pool,
                samples.features.pool,
                progress=report,
            )
    return scores | {'seconds': seconds}
