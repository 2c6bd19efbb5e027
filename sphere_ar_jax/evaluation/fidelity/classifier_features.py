"""Scores of samples by a classifier of the data set's own, and by the nearest training images.

No weights from elsewhere are needed: the classifier is trained on real images of the data set. The
Fréchet distance in its features is not FID, and it compares runs on the same images by the same
classifier alone. See `docs/evaluation.md`, "Image files without Inception weights".

Dimensions:
  n  images     S  side of an image in pixels     s  side that the classifier sees     c  channels
  f  features of an image
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from sphere_ar_jax.data import augment, imagenet
from sphere_ar_jax.data.captions.captioned import Encode
from sphere_ar_jax.data.sources import Images, spread
from sphere_ar_jax.evaluation import classifiers, small_images
from sphere_ar_jax.evaluation.fidelity import statistics
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import Progress

# Real images that the classifier is trained on, and is judged on, at most.
_MOST = 10_000
# The classifier sees images of so many pixels a side at most.
_SIDE = 64
# Where a run holds no images out, every image of so many is kept from the classifier.
_EVERY = 5
# A class is compared by itself where so many of its samples and of its real images can be.
_LEAST = 20
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
      captions: the first caption of each image, () where images have no captions.
    """

    pixels: np.ndarray
    labels: np.ndarray
    num_classes: int
    captions: tuple[str, ...] = ()

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

    @property
    def labels(self) -> np.ndarray:
        """The classes of all images, those of `train` first."""
        return np.concatenate([self.train.labels, self.heldout.labels])

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions of all images, those of `train` first; () where there are none."""
        return self.train.captions + self.heldout.captions

    def trained_on(self) -> np.ndarray:
        """The pixels (·, s, s, c) that the run was trained on, those of `train` first."""
        if self.of_run:
            return self.train.pixels
        return np.concatenate([self.train.pixels, self.heldout.pixels])


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


def _read(
    source: Images, numbers: Sequence[int], size: int, channels: int, encode: Encode | None
) -> Sample:
    """Reads images, cropped at the centre and shrunk, without those that cannot be trained on.

    These are images that cannot be decoded and, among images with captions, those without one and
    those whose first caption `encode` refuses.
    """
    as_stored = imagenet.are_synsets(source.class_names)

    def read(i: int) -> tuple[np.ndarray, int, Sequence[str]] | None:
        try:
            record = source[i]
            captions = record.get('captions')
            if captions == ():
                return None
            if captions and encode is not None:
                encode(captions[0])
            crop = augment.central(record['image'], size, channels, as_stored)
        except (augment.BrokenImageError, UserError, MemoryError):
            return None
        return shrunk(crop), record['label'], (captions or ())[:1]

    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = [image for image in pool.map(read, numbers) if image is not None]
    if len(found) < 2:
        raise UserError('too few images can be decoded to compare samples with')
    return Sample(
        pixels=np.stack([pixels for pixels, _, _ in found]),
        labels=np.array([label for _, label, _ in found], np.int32),
        num_classes=source.num_classes,
        captions=tuple(text for _, _, texts in found for text in texts),
    )


def read(
    source: Images,
    heldout: Images | None,
    size: int,
    channels: int,
    encode: Encode | None = None,
) -> Real:
    """Reads the real images of a data set, at most 10,000 of each part, spread evenly.

    Args:
      source: the images that the run is trained on.
      heldout: the images that the run holds out. If it is None, every fifth image of `source` is
        kept from the classifier, which the run was trained on all the same.
      size: S, of the crops.
      channels: c, of the model.
      encode: turns a caption into a label of the model; None for a model that reads classes.

    Raises:
      UserError: there are fewer than two classes, or too few images.
    """
    if source.num_classes < 2:
        raise UserError(
            'the images have one class alone, but a classifier needs two: give --samples, '
            '--reference and --inception'
        )
    if heldout is not None:
        judged = _read(heldout, spread(len(heldout), _MOST), size, channels, encode)
        train = _read(source, spread(len(source), _MOST), size, channels, encode)
        return Real(train, judged, True)
    if len(source) < 2 * _EVERY:
        raise UserError(f'{len(source)} images are too few to train a classifier and to judge it')
    kept = range(0, len(source), _EVERY)
    others = [i for i in range(len(source)) if i % _EVERY]
    kept_ones = [kept[i] for i in spread(len(kept), _MOST)]
    other_ones = [others[i] for i in spread(len(others), _MOST)]
    judged = _read(source, kept_ones, size, channels, encode)
    train = _read(source, other_ones, size, channels, encode)
    return Real(train, judged, False)


def _flat(pixels: np.ndarray) -> np.ndarray:
    """Images (n, s, s, c) → features (n, s·s·c)."""
    return pixels.reshape(len(pixels), -1)


class Asked(NamedTuple):
    """What samples are drawn for: classes, or captions of real images.

    Attributes:
      labels: the class of each sample, (n,) int.
      images: the real image that has the class and the caption of each sample, (n,) int: its number
        in `Real.train`, or len(train) plus its number in `Real.heldout`.
      captions: the caption of each sample, () where images have no captions.
    """

    labels: np.ndarray
    images: np.ndarray
    captions: tuple[str, ...]


def asked(real: Real, n: int) -> Asked:
    """Chooses what n samples are drawn for, class by class, in the proportions of real images."""
    by_class = np.argsort(real.labels, kind='stable')
    images = by_class[np.linspace(0, len(by_class) - 1, n).round().astype(int)]
    texts = real.captions
    captions = tuple(texts[i] for i in images) if texts else ()
    return Asked(real.labels[images], images, captions)


def _of_classes(
    titles: Sequence[str],
    real: np.ndarray,
    real_labels: np.ndarray,
    drawn: np.ndarray,
    drawn_labels: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Compares the samples of each class that has enough images with a half of its real images.

    The real images of a class are halved at random, always in the same way. Samples and the first
    half are compared with the second half, as many of the one as of the other.

    Args:
      titles: the name of each class.
      real: features of real images (·, f).
      real_labels: their classes.
      drawn: features of samples (n, f).
      drawn_labels: the classes that they were drawn for.

    Returns:
      {title: {'images': how many samples, and images of the first half, were compared; 'frechet':
      the Fréchet distance of the samples; 'floor': that of the first half}}.
    """
    rng = np.random.default_rng(0)
    found = {}
    for label, title in enumerate(titles):
        own = rng.permutation(real[real_labels == label])
        samples = drawn[drawn_labels == label]
        half = len(own) // 2
        count = min(half, len(samples))
        if count < _LEAST:
            continue
        second = statistics.statistics(own[half:])
        of_first = statistics.statistics(own[:count])
        of_samples = statistics.statistics(samples[spread(len(samples), count)])
        found[title] = {
            'images': count,
            'frechet': statistics.frechet_distance(*of_samples, *second),
            'floor': statistics.frechet_distance(*of_first, *second),
        }
    return found


def _balanced(right: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes there are of the share of right answers within each.

    Args:
      right: bool (n,).
      labels: the classes (n,).
    """
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def score(
    batches: Iterable[np.ndarray],
    wanted: Asked,
    real: Real,
    titles: Sequence[str],
    steps: int,
    keep_in: str | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Compares samples with real images.

    Args:
      batches: the samples, uint8 (b, S, S, c).
      wanted: what they were drawn for.
      real: from `read`.
      titles: the name of each class.
      steps: the training steps of the classifier.
      keep_in: the directory that keeps its weights, see `classifiers.conv_net`.
      progress: called with the classifier's steps done and their number.

    Returns:
      (scores, the number in `Real.trained_on` of the image nearest to each sample, (n,)). Scores:
      `classifier_frechet`, the distance to all real images; `classifier_frechet_heldout`, that to
      the held-out ones; `classifier_frechet_floor`, that between the two parts of the real ones;
      `classes`, what `_of_classes` gives; the classifier's accuracy on held-out images and on
      samples, and the mean of it over classes; what was compared; and a note. Where the run holds
      images out, also what `small_images.compare` gives of pixels. Where images have captions, also
      `memorisation/own_nearest`, the share of samples for captions of training images whose nearest
      training image has that caption.
    """
    judge = classifiers.conv_net(real.train, classifiers.Recipe(steps), keep_in, progress)
    trained = _flat(real.trained_on())
    features = []
    read_as = []
    near = []
    for batch in batches:
        small = shrunk(batch)
        features.append(judge.features(small))
        read_as.append(judge.predict(small))
        near.append(small_images.nearest(_flat(small), trained))
    samples = np.concatenate(features)
    numbers, distances = (np.concatenate(part) for part in zip(*near, strict=True))
    drawn = statistics.statistics(samples)
    parts = [judge.features(part.pixels) for part in (real.train, real.heldout)]
    of_train, of_heldout = (statistics.statistics(part) for part in parts)
    every = np.concatenate(parts)
    of_all = statistics.statistics(every)
    real_right = judge.predict(real.heldout.pixels) == real.heldout.labels
    right = np.concatenate(read_as) == wanted.labels
    found = {
        'classifier_frechet': statistics.frechet_distance(*drawn, *of_all),
        'classifier_frechet_heldout': statistics.frechet_distance(*drawn, *of_heldout),
        'classifier_frechet_floor': statistics.frechet_distance(*of_train, *of_heldout),
        'classifier/accuracy': float(np.mean(real_right)),
        'classifier/balanced_accuracy': _balanced(real_right, real.heldout.labels),
        'samples/accuracy': float(np.mean(right)),
        'samples/balanced_accuracy': _balanced(right, wanted.labels),
    }
    if real.of_run:
        _, of_new = small_images.nearest(_flat(real.heldout.pixels), trained)
        found |= small_images.compare(distances, of_new)
    if wanted.captions:
        texts = real.captions
        pairs = zip(wanted.images, wanted.captions, numbers, strict=True)
        is_own = [texts[n] == caption for i, caption, n in pairs if i < len(trained)]
        if is_own:
            found['memorisation/own_nearest'] = float(np.mean(is_own))
    scores = {
        **found,
        'classes': _of_classes(titles, every, real.labels, samples, wanted.labels),
        'compared': {
            'samples': len(wanted.labels),
            'train': len(real.train),
            'heldout': len(real.heldout),
            'heldout_from': 'the run' if real.of_run else 'the classifier alone',
            'side': real.train.pixels.shape[1],
            'classifier_steps': steps,
        },
        'note': NOTE,
    }
    return scores, numbers
