"""A Fréchet distance in the features of a classifier of the data set's own.

It needs no weights from elsewhere: the classifier is trained on real images of the data set. It is
not FID, and it compares runs on the same images by the same classifier alone. See
`docs/evaluation.md`, "Image files without Inception weights".

Dimensions:
  n  images     S  side of an image in pixels     s  side that the classifier sees     c  channels
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from sphere_ar_jax.data import augment, imagenet
from sphere_ar_jax.data.sources import Images
from sphere_ar_jax.evaluation import classifiers
from sphere_ar_jax.evaluation.fidelity import statistics
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import Progress

# Real images that the classifier is trained on, and is judged on, at most.
_MOST = 10_000
# The classifier sees images of so many pixels a side at most.
_SIDE = 64
# Where a run holds no images out, every image of so many is kept from the classifier.
_EVERY = 5
NOTE = (
    "classifier_frechet is a distance in the features of this data set's own classifier: it is not "
    'FID, and it compares runs on the same images alone'
)


@dataclasses.dataclass
class Sample:
    """Labelled images in memory.

    Attributes:
      pixels: (n, s, s, c) float32 in [0, 1].
      labels: (n,) int.
      num_classes: the number of classes.
    """

    pixels: np.ndarray
    labels: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)


class Real(NamedTuple):
    """The real images that samples are compared with.

    Attributes:
      train: those that the classifier is trained on.
      heldout: those that it never sees.
      of_run: whether the run has held `heldout` out, too.
    """

    train: Sample
    heldout: Sample
    of_run: bool


def shrunk(images: np.ndarray) -> np.ndarray:
    """Averages square blocks of pixels, so that a side has 64 at most.

    Args:
      images: (…, S, S, c) uint8.

    Returns:
      (…, s, s, c) float32 in [0, 1].
    """
    *before, side, _, channels = images.shape
    least = -(-side // _SIDE)
    block = next(size for size in range(least, side + 1) if side % size == 0)
    small = side // block
    blocks = images.reshape(*before, small, block, small, block, channels)
    return blocks.mean((-4, -2), dtype=np.float32) / np.float32(255)


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most `most` of some numbers, spread evenly."""
    chosen = np.linspace(0, len(numbers) - 1, min(len(numbers), most)).round().astype(int)
    return [numbers[i] for i in np.unique(chosen)]


def _read(source: Images, numbers: Sequence[int], size: int, channels: int) -> Sample:
    """Reads images, cropped at the centre and shrunk, without those that cannot be decoded."""
    as_stored = imagenet.are_synsets(source.class_names)

    def read(i: int) -> tuple[np.ndarray, int] | None:
        try:
            record = source[i]
            image = augment.decode(record['image'], as_stored=as_stored)
            crop = augment.with_channels(augment.center_crop(image, size), channels)
        except (augment.BrokenImageError, UserError, MemoryError):
            return None
        return shrunk(crop), record['label']

    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = [pair for pair in pool.map(read, numbers) if pair is not None]
    if len(found) < 2:
        raise UserError('too few images can be decoded to compare samples with')
    labels = np.array([label for _, label in found], np.int32)
    return Sample(np.stack([pixels for pixels, _ in found]), labels, source.num_classes)


def read(source: Images, heldout: Images | None, size: int, channels: int) -> Real:
    """Reads the real images of a data set, at most 10,000 of each part, spread evenly.

    Args:
      source: the images that the run is trained on.
      heldout: the images that the run holds out. If it is None, every fifth image of `source` is
        kept from the classifier, which the run was trained on all the same.
      size: S, of the crops.
      channels: c, of the model.

    Raises:
      UserError: there are fewer than two classes, or too few images.
    """
    if source.num_classes < 2:
        raise UserError(
            'the images have one class alone, but a classifier needs two: give --samples, '
            '--reference and --inception'
        )
    numbers = range(len(source))
    if heldout is not None:
        judged = _read(heldout, _spread(range(len(heldout)), _MOST), size, channels)
        return Real(_read(source, _spread(numbers, _MOST), size, channels), judged, True)
    if len(source) < 2 * _EVERY:
        raise UserError(f'{len(source)} images are too few to train a classifier and to judge it')
    kept = numbers[::_EVERY]
    others = [i for i in numbers if i % _EVERY]
    judged = _read(source, _spread(kept, _MOST), size, channels)
    return Real(_read(source, _spread(others, _MOST), size, channels), judged, False)


def labels(real: Real, n: int) -> np.ndarray:
    """Labels (n,) for samples, in the proportions that the real images have."""
    known = np.sort(np.concatenate([real.train.labels, real.heldout.labels]))
    return known[np.linspace(0, len(known) - 1, n).round().astype(int)]


def score(
    batches: Iterable[np.ndarray],
    wanted: np.ndarray,
    real: Real,
    steps: int,
    keep_in: str | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Compares samples with real images.

    Args:
      batches: the samples, uint8 (b, S, S, c).
      wanted: their labels (n,).
      real: from `read`.
      steps: the training steps of the classifier.
      keep_in: the directory that keeps its weights, see `classifiers.conv_net`.
      progress: called with the classifier's steps done and their number.

    Returns:
      `classifier_frechet`, the distance to all real images; `classifier_frechet_heldout`, that to
      the held-out ones; `classifier_frechet_floor`, that between the two parts of the real ones;
      the classifier's accuracy on held-out images and on samples; what was compared; and a note.
    """
    judge = classifiers.conv_net(real.train, classifiers.Recipe(steps), keep_in, progress)
    features = []
    read_as = []
    for batch in batches:
        small = shrunk(batch)
        features.append(judge.features(small))
        read_as.append(judge.predict(small))
    drawn = statistics.statistics(np.concatenate(features))
    parts = [judge.features(part.pixels) for part in (real.train, real.heldout)]
    of_train, of_heldout = (statistics.statistics(part) for part in parts)
    of_all = statistics.statistics(np.concatenate(parts))
    read_right = judge.predict(real.heldout.pixels) == real.heldout.labels
    return {
        'classifier_frechet': statistics.frechet_distance(*drawn, *of_all),
        'classifier_frechet_heldout': statistics.frechet_distance(*drawn, *of_heldout),
        'classifier_frechet_floor': statistics.frechet_distance(*of_train, *of_heldout),
        'classifier/accuracy': float(np.mean(read_right)),
        'samples/accuracy': float(np.mean(np.concatenate(read_as) == wanted)),
        'compared': {
            'samples': len(wanted),
            'train': len(real.train),
            'heldout': len(real.heldout),
            'heldout_from': 'the run' if real.of_run else 'the classifier alone',
            'side': real.train.pixels.shape[1],
            'classifier_steps': steps,
        },
        'note': NOTE,
    }
