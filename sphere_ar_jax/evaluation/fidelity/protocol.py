"""The ADM protocol: images → features → statistics → scores."""

import functools
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from sphere_ar_jax.evaluation.fidelity import (
    image_sets,
    inception,
    inception_weights,
    precision_recall,
    statistics,
)
from sphere_ar_jax.interop import npz
from sphere_ar_jax.runtime import console, files, hosts, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import Progress, PyTree

_Path: TypeAlias = str | os.PathLike[str]


class Summary(NamedTuple):
    """What the scores need of a set of images.

    Attributes:
      features: the features of its images, or None where there are no images.
      pool: the statistics of `inception.Features.pool`.
      spatial: the statistics of `inception.Features.spatial`.
      about: what else is known of the set: 'file', and for samples of `generation.generate` their
        'seed', 'dtype', 'sampling' and 'parameters', a checksum of the weights.
      given: whether the statistics come from the file, not from the images in it.
      given_images: the number of images that given statistics come from, None where not known.
    """

    features: inception.Features[np.ndarray] | None
    pool: statistics.Statistics
    spatial: statistics.Statistics
    about: Mapping[str, Any] = {}
    given: bool = False
    given_images: int | None = None

    @property
    def images(self) -> int | None:
        """The number of images that the statistics come from, or None where it is not known."""
        return self.given_images if self.features is None or self.given else len(self.features.pool)

    def describe(self) -> dict[str, Any]:
        """What a result says of the set, for JSON."""
        found: dict[str, Any] = {'images': self.images, **self.about}
        if self.given:
            found['statistics'] = 'of the file'
            if self.features is not None:
                found['images_for_precision_and_recall'] = len(self.features.pool)
        return found


def extract(
    batches: Iterable[np.ndarray],
    params: PyTree,
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> inception.Features[np.ndarray]:
    """Features of a set of images, NumPy float32: 4 · (2048 + 2023 + 1008) bytes an image.

    Where there are several processes, all call it with the same images.

    Args:
      batches: uint8 arrays (b, H, W, 3) with any b and one H × W.
      params: from `inception_weights.load`.
      batch_size: images at a time, rounded up to a multiple of the mesh's devices, among which they
        are split.
      mesh: from `sharding.make_mesh`; all devices if None.
      progress: called with the number of images done.

    Raises:
      UserError: there are no images, or a batch is anything else.
    """
    mesh = mesh or sharding.make_mesh()
    params = jax.device_put(params, sharding.whole(mesh))
    size = sharding.whole_rows(mesh, batch_size)
    mine = sharding.local_rows(mesh, size, sharding.ROWS)
    parts: list[list[np.ndarray]] = []
    running = None

    def fetch(results: inception.Features[jax.Array], count: int) -> None:
        parts.append([hosts.gather(a)[:count] for a in results])
        progress(sum(len(part[0]) for part in parts))

    for images, count in image_sets.whole_batches(batches, size):
        placed = sharding.place_batch(mesh, images[mine], sharding.ROWS)
        results = inception.features(params, placed)
        if running:
            # Fetch the batch before, while the devices work on this one.
            fetch(*running)
        running = (results, count)
    if running is None:
        raise UserError('there are no images to score')
    fetch(*running)
    return inception.Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))


# The arrays of statistics in an npz, and the features that each is of.
_MOMENTS = {
    'mu': inception.POOL,
    'sigma': inception.POOL,
    'mu_s': inception.SPATIAL,
    'sigma_s': inception.SPATIAL,
}
# The array that says how many images the statistics come from. ADM's files have none.
COUNT = 'n'


def _read_moment(archive: zipfile.ZipFile, path: _Path, name: str) -> np.ndarray:
    """One of `_MOMENTS` from an open npz, as float64."""
    width = _MOMENTS[name]
    expected = (width,) if name.startswith('mu') else (width, width)
    with archive.open(f'{name}.npy') as file:
        header = npz.read_header(file)
        if header.shape != expected or header.dtype.kind != 'f':
            raise UserError(f'{path}: {name} must be floats {expected}, but is {header}')
        return npz.read_numbers(file, header).astype(np.float64)


def _read_count(archive: zipfile.ZipFile, path: _Path) -> int:
    """The number of images that the statistics of an open npz come from."""
    with archive.open(f'{COUNT}.npy') as file:
        header = npz.read_header(file)
        if header.shape != () or header.dtype.kind not in 'iu':
            raise UserError(f'{path}: {COUNT} must be a whole number, but is {header}')
        return int(npz.read_numbers(file, header))


def _read_statistics(
    path: _Path,
) -> tuple[statistics.Statistics, statistics.Statistics, int | None]:
    """The statistics of `pool` and `spatial` in an npz that has `mu`, and their images' number."""
    arrays = {}
    with npz.open_archive(path) as archive:
        names = npz.array_names(archive)
        for name in _MOMENTS:
            if name not in names:
                raise UserError(
                    f'{path} has mu but no {name}; it needs mu, sigma, mu_s and sigma_s'
                )
            arrays[name] = _read_moment(archive, path, name)
        count = _read_count(archive, path) if COUNT in names else None
    pool = statistics.Statistics(arrays['mu'], arrays['sigma'])
    spatial = statistics.Statistics(arrays['mu_s'], arrays['sigma_s'])
    return pool, spatial, count


def _about(path: _Path, images: int | None) -> dict[str, Any]:
    """What is known of a set of images: its file, and what PATH.json says of how it was drawn."""
    found: dict[str, Any] = {'file': str(path)}
    beside = f'{path}.json'
    if images is None or not os.path.exists(beside):
        return found
    try:
        said = files.read_json(beside)
    except UserError as error:
        print(f'{error}; it is left out', file=sys.stderr, flush=True)
        return found
    settings = said.get('sampling') if isinstance(said, dict) else None
    # Another file may have been put in the place of the one that the JSON belongs to.
    if isinstance(settings, dict) and settings.get('num_images') == images:
        names = ('seed', 'dtype', 'sampling', 'parameters')
        found |= {name: said[name] for name in names if name in said}
    return found


def summarize(
    path: _Path,
    params: PyTree,
    *,
    batch_size: int = 64,
    progress: Progress = lambda done, total: None,
) -> Summary:
    """Reads what the scores need of a set of images.

    An npz has images (`arr_0`, uint8), statistics (`mu`, `sigma`, `mu_s`, `sigma_s`), or both.
    Where it has both, as ADM's VIRTUAL_imagenet256_labeled.npz does, the statistics are taken from
    the file, although its images are fewer. `n` says how many images they come from.

    Args:
      path: the npz, or a directory of image files.
      params: see `extract`.
      batch_size: see `extract`.
      progress: called with the number of images done and of all images.

    Raises:
      OSError: there is no file.
      UserError: the file is damaged, or has neither images nor statistics of these shapes; see
        `image_sets.read_images`.
    """
    names = [image_sets.IMAGES]
    if not os.path.isdir(path):
        with npz.open_archive(path) as archive:
            names = npz.array_names(archive)
    found = _read_statistics(path) if 'mu' in names else None
    if image_sets.IMAGES not in names:
        if found is None:
            raise UserError(
                f'{path} has neither images ({image_sets.IMAGES}) '
                'nor statistics (mu, sigma, mu_s, sigma_s)'
            )
        pool, spatial, count = found
        return Summary(None, pool, spatial, _about(path, None), given=True, given_images=count)
    total = image_sets.count_images(path)

    def report(done: int) -> None:
        progress(done, total)

    images = image_sets.read_images(path, batch_size)
    features = extract(images, params, batch_size=batch_size, progress=report)
    about = _about(path, total)
    if found is not None:
        pool, spatial, count = found
        return Summary(features, pool, spatial, about, given=True, given_images=count)
    pool = statistics.statistics(features.pool)
    spatial = statistics.statistics(features.spatial)
    return Summary(features, pool, spatial, about)


def evaluate(
    samples: Summary | _Path,
    reference: Summary | _Path,
    params: PyTree,
    *,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> dict[str, Any]:
    """The ADM scores of `samples` against `reference`.

    Published ImageNet numbers are those of 50,000 samples against VIRTUAL_imagenet256_labeled.npz.
    See `docs/evaluation.md`, "FID, sFID, Inception Score, precision and recall".

    Args:
      samples: a summary, or an npz or a directory that `summarize` takes.
      reference: a summary, or an npz or a directory that `summarize` takes.
      params: see `extract`.
      batch_size: see `extract`.
      progress: called with the part ('samples', 'reference' or 'precision_recall'), how much of it
        is done, and of how much. The unit is images, or pairs of blocks of points.

    Returns:
      The floats `fid`, `sfid`, `inception_score`, `precision` and `recall`, the last three only
      where there are images to take them from; `samples` and `reference`, which say the number of
      images, the file and, where known, the seed and the settings of sampling; `settings` of the
      protocol, the fingerprint of the weights among them; `note`, a line, only where a set has too
      few images for numbers that can be compared; and `seconds`, a dict of the parts' times.

    Raises:
      OSError: a file is not there.
      UserError: see `summarize`.
    """
    seconds: dict[str, float] = {}
    scores: dict[str, Any] = {}
    for source in (reference, samples):
        if not isinstance(source, Summary):
            os.stat(source)  # A missing file is noticed before hours of work.

    def summary(name: str, source: Summary | _Path) -> Summary:
        if isinstance(source, Summary):
            return source
        report = functools.partial(progress, name)
        with console.timed(seconds, name):
            return summarize(source, params, batch_size=batch_size, progress=report)

    real = summary('reference', reference)
    fake = summary('samples', samples)
    with console.timed(seconds, 'fid'):
        scores['fid'] = statistics.frechet_distance(*fake.pool, *real.pool)
    with console.timed(seconds, 'sfid'):
        scores['sfid'] = statistics.frechet_distance(*fake.spatial, *real.spatial)
    if fake.features is not None:
        with console.timed(seconds, 'inception_score'):
            scores['inception_score'] = statistics.inception_score(fake.features.logits)
        if real.features is not None:
            with console.timed(seconds, 'precision_recall'):
                scores['precision'], scores['recall'] = precision_recall.precision_recall(
                    real.features.pool,
                    fake.features.pool,
                    progress=functools.partial(progress, 'precision_recall'),
                )
    scores['samples'] = fake.describe()
    scores['reference'] = real.describe()
    scores['settings'] = {
        'protocol': "that of OpenAI's guided-diffusion (ADM)",
        'batch_size': batch_size,
        'neighbours': 3,
        'precision_and_recall_in': 'float16',
    }
    if params is not None:  # summaries have their features already
        scores['settings']['inception'] = inception_weights.fingerprint(params)
    note = statistics.note(fake.images, real.images)
    if note is not None:
        scores['note'] = note
    return scores | {'seconds': seconds}


def warn(scores: Mapping[str, Any]) -> None:
    """Prints the `note` of scores on stderr, where they have one."""
    if scores.get('note') and hosts.is_first():
        print(scores['note'], file=sys.stderr, flush=True)
