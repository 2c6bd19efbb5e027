"""The ADM protocol: images → features → statistics → scores."""

import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from sphere_ar_jax.evaluation.fidelity import image_sets, inception, precision_recall, statistics
from sphere_ar_jax.runtime import hosts, sharding
from sphere_ar_jax.runtime.console import UserError


class Summary(NamedTuple):
    """What the scores need of a set: `inception.Features`, or None without images, and `Statistics`
    of both kinds.
    """

    features: Any
    pool: statistics.Statistics
    spatial: statistics.Statistics


def extract(batches, params, *, batch_size=64, mesh=None, progress=lambda done: None):
    """`inception.Features` of a set of images, NumPy float32: 4 · (2048 + 2023 + 1008) bytes an
    image.

    Args:
      batches: iterable of uint8 (b, H, W, 3), any b, one H × W. params: of
        `inception_weights.load`.
      batch_size: images at a time, rounded up to a multiple of the mesh's devices, among which they
        are split.
      mesh: of `sharding.make_mesh`, all devices if None; of several processes all call it, with the
        same images.
      progress: called with the number of images done.
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
        progress(sum(len(part[0]) for part in parts))

    for images, count in image_sets.whole_batches(batches, size):
        results = inception.features(
            params, sharding.place_batch(mesh, images[mine], sharding.ROWS)
        )
        if running:
            fetch(*running)  # the one before, while the devices work on this one
        running = results, count
    if running is None:
        raise UserError('there are no images to score')
    fetch(*running)
    return inception.Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _read_statistics(path):
    """The two `Statistics` of an npz that has `mu`."""
    widths = {
        'mu': inception.POOL,
        'sigma': inception.POOL,
        'mu_s': inception.SPATIAL,
        'sigma_s': inception.SPATIAL,
    }
    arrays = []
    with image_sets.reading(path), np.load(path) as archive:
        for name, width in widths.items():
            if name not in archive:
                raise UserError(
                    f'{path} has mu but no {name}; it needs mu, sigma, mu_s and sigma_s'
                )
            array = archive[name]
            expected = (width,) if name.startswith('mu') else (width, width)
            if array.shape != expected or array.dtype.kind != 'f':
                raise UserError(
                    f'{path}: {name} must be floats {expected}, but is {array.dtype} {array.shape}'
                )
            arrays.append(array.astype(np.float64))
    return statistics.Statistics(*arrays[:2]), statistics.Statistics(*arrays[2:])


def summarize(path, params, *, batch_size=64, progress=lambda done, total: None):
    """The `Summary` of an npz with `arr_0`, uint8 images, or `mu`, `sigma`, `mu_s`, `sigma_s`, or
    both.

    Where it has both, as ADM's VIRTUAL_imagenet256_labeled.npz, the statistics are taken from the
    file, although its images are fewer.

    Args:
      params, batch_size: see `extract`. progress: called with the images done and their number.
    Raises OSError, UserError.
    """
    with image_sets.reading(path) as archive:
        names = image_sets.array_names(archive)
    found = _read_statistics(path) if 'mu' in names else None
    if image_sets.IMAGES not in names:
        if found is None:
            raise UserError(
                f'{path} has neither images ({image_sets.IMAGES}) nor statistics (mu, sigma, mu_s, sigma_s)'
            )
        return Summary(None, *found)
    with image_sets.open_images(path) as (_, shape):
        total = shape[0]

    def report(done):
        progress(done, total)

    features = extract(
        image_sets.read_images(path, batch_size), params, batch_size=batch_size, progress=report
    )
    return Summary(
        features,
        *(found or (statistics.statistics(features.pool), statistics.statistics(features.spatial))),
    )


def evaluate(samples, reference, params, *, batch_size=64, progress=lambda part, done, total: None):
    """The ADM scores of `samples` against `reference`.

    Args:
      samples, reference: each a `Summary`, or an npz that `summarize` takes. Published ImageNet
        numbers are those of 50,000 samples against VIRTUAL_imagenet256_labeled.npz. params,
        batch_size: see `extract`.
      progress: called with the part ('samples', 'reference', 'precision_recall'), how much of it is
        done and of how much: images, or blocks of distances.
    Returns:
      dict of floats `fid`, `sfid`, `inception_score`, `precision`, `recall` (the last three only
        where there are images
      to take them from) and `seconds`, a dict of the parts' times. Raises OSError, UserError.
    """
    seconds, scores = {}, {}
    for source in (reference, samples):
        if not isinstance(source, Summary):
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
        return timed(name, summarize, source, params, batch_size=batch_size, progress=report)

    reference, samples = summary('reference', reference), summary('samples', samples)
    scores['fid'] = timed('fid', statistics.frechet_distance, *samples.pool, *reference.pool)
    scores['sfid'] = timed(
        'sfid', statistics.frechet_distance, *samples.spatial, *reference.spatial
    )
    if samples.features is not None:
        scores['inception_score'] = timed(
            'inception_score', statistics.inception_score, samples.features.logits
        )
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
