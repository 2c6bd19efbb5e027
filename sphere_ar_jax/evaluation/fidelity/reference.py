"""References for the ADM protocol, made from any source of images.

A reference is an npz as ADM's VIRTUAL_imagenet256_labeled.npz: statistics of all images of a data
set, and some of the images, from which precision and recall are taken.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from sphere_ar_jax.data import augment, imagenet
from sphere_ar_jax.data.sources import Images, spread
from sphere_ar_jax.evaluation.fidelity import image_sets, protocol, statistics
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.runtime.types import Progress, PyTree

# Features of so many batches are in memory at once.
_BATCHES = 64
_BATCH = 64
# ADM's files hold as many images, from which precision and recall are taken.
KEPT = 10_000


class Crops:
    """The images of a source, resized and cropped to the middle as ADM does.

    Images that cannot be decoded are left out. They are read as a training reads them: where all
    classes are synsets of ILSVRC2012, alpha and EXIF are ignored.

    Attributes:
      size: S.
      broken: {index of an image that could not be decoded: why}.
    """

    def __init__(self, source: Images, size: int) -> None:
        self.size = size
        self.broken: dict[int, str] = {}
        self._source = source
        self._as_stored = imagenet.are_synsets(source.class_names)

    def __len__(self) -> int:
        return len(self._source)

    def _crop(self, i: int) -> np.ndarray | None:
        """The crop (S, S, 3) of an image, None where it cannot be decoded."""
        try:
            encoded = self._source[i]['image']
            return augment.central(encoded, self.size, as_stored=self._as_stored)
        except augment.BrokenImageError as error:
            self.broken[i] = f'{self._source.name(i)}: {first_line(error)}'
            return None

    def read(self, chosen: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the crops of chosen images as uint8 (b, S, S, 3), b at most 64."""
        with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(chosen), _BATCH):
                found = pool.map(self._crop, chosen[start : start + _BATCH])
                crops = [crop for crop in found if crop is not None]
                if crops:
                    yield np.stack(crops)


class Moments(NamedTuple):
    """The statistics of a set of images.

    Attributes:
      n: the number of images.
      pool: the statistics of `inception.Features.pool`.
      spatial: the statistics of `inception.Features.spatial`.
    """

    n: int
    pool: statistics.Statistics
    spatial: statistics.Statistics


def _moments(x: np.ndarray) -> statistics.Statistics:
    """The statistics of features (n, f), those of a single image with covariance 0."""
    if len(x) > 1:
        return statistics.statistics(x)
    return statistics.Statistics(x[0].astype(np.float64), np.zeros(2 * x.shape[1:]))


def measure(
    batches: Iterable[np.ndarray],
    params: PyTree,
    progress: Callable[[int], None] = lambda done: None,
) -> Moments:
    """The statistics of images, of which some thousand are in memory at a time.

    Args:
      batches: see `protocol.extract`.
      params: Inception's parameters, see `inception_weights.load`.
      progress: called with the number of images that are done.

    Raises:
      UserError: there are fewer than two images.
    """
    waiting = iter(batches)
    total: Moments | None = None
    for first in waiting:
        done = 0 if total is None else total.n

        def report(count: int, before: int = done) -> None:
            progress(before + count)

        part = itertools.chain([first], itertools.islice(waiting, _BATCHES - 1))
        found = protocol.extract(part, params, batch_size=_BATCH, progress=report)
        n = len(found.pool)
        pool = _moments(found.pool)
        spatial = _moments(found.spatial)
        if total is not None:
            pool = statistics.merged(total.pool, total.n, pool, n)
            spatial = statistics.merged(total.spatial, total.n, spatial, n)
        total = Moments(done + n, pool, spatial)
    if total is None or total.n < 2:
        raise UserError('a reference needs at least 2 images that can be decoded')
    return total


def write(
    path: str | os.PathLike[str],
    crops: Crops,
    params: PyTree | None,
    *,
    kept: int = KEPT,
    progress: Progress = lambda done, total: None,
) -> dict[str, int]:
    """Writes a reference.

    Args:
      path: the npz.
      crops: the images.
      params: Inception's parameters; None writes images without statistics.
      kept: how many images the file holds, spread evenly over the source.
      progress: called with the number of images that statistics were taken from, and of all.

    Returns:
      How many images are `kept`, and how many the statistics are from (`images`, 0 without).

    Raises:
      UserError: no image can be decoded, or the file cannot be written.
    """
    count = len(crops)
    arrays: dict[str, Any] = {}
    images = 0
    if params is not None:
        found = measure(crops.read(range(count)), params, lambda done: progress(done, count))
        images = found.n
        arrays |= {'mu': found.pool.mu, 'sigma': found.pool.sigma}
        arrays |= {'mu_s': found.spatial.mu, 'sigma_s': found.spatial.sigma}
        arrays[protocol.COUNT] = np.asarray(found.n)
    parts = list(crops.read(spread(count, kept)))
    if not parts:
        raise UserError(f'no image can be decoded; the first: {min(crops.broken.items())[1]}')
    arrays[image_sets.IMAGES] = np.concatenate(parts)
    with files.whole(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)
    return {'kept': len(arrays[image_sets.IMAGES]), 'images': images}
