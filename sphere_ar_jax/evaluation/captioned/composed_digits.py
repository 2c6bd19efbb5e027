"""Reads composed digits back, and scores samples by what was asked for.

A network reads each digit of an image by itself: which of the ten it is, and whether it is small.
It is trained on real images. What it reads right of real images that it has not seen stands beside
the scores of samples. See `docs/text.md`, "Composed digits".

Dimensions:
  n  images of 32×32 pixels     m  digits of all images     24×24 pixels that show one digit
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from sphere_ar_jax.config import build
from sphere_ar_jax.data import small
from sphere_ar_jax.data.captions.composed import CELL, SIDE, Composed, Composition
from sphere_ar_jax.evaluation import classifiers
from sphere_ar_jax.runtime.types import Progress
from sphere_ar_jax.sampling import captioning
from sphere_ar_jax.sampling.generation import Run

WINDOW = 24  # pixels along each side that show one digit
# Images whose digits the network learns from, and real images that it is tried on.
_LEARNT = 20_000
_TRIED = 1_000


def windows(pixels: np.ndarray, composition: Composition) -> np.ndarray:
    """Cuts the digits of an image out, each in the middle of a window.

    The window of one of two digits shows the middle of its half of the image, and that of one of
    four its quarter. Pixels of other digits are black.

    Args:
      pixels: (32, 32) in [0, 1].
      composition: what the image shows, or should show.

    Returns:
      (2 or 4, 24, 24).
    """
    margin = (WINDOW - CELL) // 2
    found = []
    for y, x in composition.corners():
        window = np.zeros((WINDOW, WINDOW), pixels.dtype)
        rows = slice(margin, margin + CELL)
        columns = slice(margin, margin + CELL)
        top, left = y, x
        if len(composition.things) == 2 and composition.upright:
            columns = slice(0, WINDOW)
            left = (SIDE - WINDOW) // 2
        elif len(composition.things) == 2:
            rows = slice(0, WINDOW)
            top = (SIDE - WINDOW) // 2
        part = window[rows, columns]
        height, width = part.shape
        part[:] = pixels[top : top + height, left : left + width]
        found.append(window)
    return np.stack(found)


def _labels(composition: Composition) -> list[int]:
    """What the network should read: the digit, and 10 more where it is small."""
    return [thing.digit + 10 * thing.small for thing in composition.things]


@dataclasses.dataclass
class _Windows:
    """Digits to learn from; see `classifiers.Labelled`."""

    pixels: np.ndarray
    labels: np.ndarray
    num_classes: int = 20

    def __len__(self) -> int:
        return len(self.labels)


def _to_learn(images: Composed, count: int) -> _Windows:
    """The digits of the first images of a split."""
    pixels = []
    labels = []
    for i in range(min(count, len(images))):
        composition, image = images.drawn(i)
        pixels.append(windows(image, composition).astype(np.float32))
        labels += _labels(composition)
    return _Windows(np.concatenate(pixels), np.asarray(labels, np.int32))


class Read(NamedTuple):
    """What was read right of n images.

    Attributes:
      digits: (n,) bool, whether all digits are those asked for, each in its place.
      sizes: (n,) bool, whether all sizes are.
    """

    digits: np.ndarray
    sizes: np.ndarray

    @property
    def all(self) -> np.ndarray:
        """(n,) bool, whether digits and sizes are."""
        return self.digits & self.sizes


class Reader:
    """A network that reads the digits of images."""

    def __init__(
        self,
        data: small.DataSet,
        steps: int,
        keep_in: str | None = None,
        progress: Progress = lambda done, total: None,
    ):
        """Trains the network on real images.

        Args:
          data: composed digits.
          steps: its training steps.
          keep_in: the directory that keeps its weights for the next time, or None.
          progress: called with the steps done and their number.
        """
        assert isinstance(data.train, Composed)  # by the caller
        learnt = _to_learn(data.train, _LEARNT)
        recipe = classifiers.Recipe(steps)
        self._network = classifiers.conv_net(learnt, recipe, keep_in, progress)

    def read(self, pixels: np.ndarray, compositions: Sequence[Composition]) -> Read:
        """Reads images.

        Args:
          pixels: (n, 32, 32) in [0, 1].
          compositions: what each image should show.
        """
        pairs = list(zip(pixels, compositions, strict=True))
        parts = [windows(image, composition) for image, composition in pairs]
        found = self._network.predict(np.concatenate(parts))
        wanted = np.concatenate([_labels(composition) for composition in compositions])
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        digits = np.logical_and.reduceat(found % 10 == wanted % 10, starts)
        sizes = np.logical_and.reduceat(found // 10 == wanted // 10, starts)
        return Read(digits, sizes)


class Asked(NamedTuple):
    """Compositions that samples are drawn for.

    Attributes:
      group: 'seen' of two digits that training images have in this order, 'held_out' of two that
        none has, 'rows' of four digits.
      composition: what to draw.
    """

    group: str
    composition: Composition

    @property
    def caption(self) -> str:
        """The prompt."""
        return self.composition.caption()


GROUPS = ('seen', 'held_out', 'rows')


def asked(data: small.DataSet, count: int) -> list[Asked]:
    """Chooses compositions to draw: the groups in turn, each in the order of its images.

    Args:
      data: composed digits.
      count: how many. A group that has fewer begins anew.
    """
    found: dict[str, list[Composition]] = {group: [] for group in GROUPS}
    each = -(-count // len(GROUPS))
    for images, with_pairs in ((data.train, 'seen'), (data.heldout, 'held_out')):
        assert isinstance(images, Composed)  # by the caller
        groups = {with_pairs, 'rows'} if images is data.train else {with_pairs}
        for i in range(len(images)):
            if all(len(found[group]) >= each for group in groups):
                break
            composition = images.composition(i)
            group = 'rows' if len(composition.things) == 4 else with_pairs
            if len(found[group]) < each:
                found[group].append(composition)
    wishes = []
    for i in range(count):
        group = GROUPS[i % len(GROUPS)]
        compositions = found[group]
        wishes.append(Asked(group, compositions[i // len(GROUPS) % len(compositions)]))
    return wishes


class Real(NamedTuple):
    """Real images that nothing was trained on.

    Attributes:
      pixels: (n, 32, 32) in [0, 1].
      wishes: what each image shows.
    """

    pixels: np.ndarray
    wishes: list[Asked]


def real_images(data: small.DataSet) -> Real:
    """Draws 1,000 images from held-out scans, for the compositions of `asked`."""
    images = data.heldout
    assert isinstance(images, Composed)  # by the caller
    wishes = asked(data, _TRIED)
    rng = np.random.default_rng(0)
    pixels = np.stack([images.draw(wish.composition, rng) for wish in wishes])
    return Real(pixels.astype(np.float32), wishes)


def floor(reader: Reader, real: Real) -> dict[str, float]:
    """What the reader reads right of `real_images`.

    Returns:
      {'real/…': share} as `scores` has them for samples.
    """
    return _shares('real', reader, real.pixels, real.wishes)


def scores(
    reader: Reader, data: small.DataSet, images: np.ndarray, wishes: Sequence[Asked]
) -> dict[str, float]:
    """Scores samples.

    Args:
      reader: the reader of these data.
      data: composed digits.
      images: (n, 32, 32, 1) in [−1, 1], drawn for `wishes`.
      wishes: what each image should show.

    Returns:
      For each of GROUPS that was asked for: the share of images of which all digits and sizes read
      back right (`samples/seen`, …), and of which all digits do (`samples/seen_digits`, …).
    """
    return _shares('samples', reader, data.train.to_pixels(images), wishes)


def _shares(
    name: str, reader: Reader, pixels: np.ndarray, wishes: Sequence[Asked]
) -> dict[str, float]:
    """The shares of `scores`, under a name."""
    read = reader.read(pixels, [wish.composition for wish in wishes])
    groups = np.asarray([wish.group for wish in wishes])
    found = {}
    for group in GROUPS:
        of_group = groups == group
        if of_group.any():
            found[f'{name}/{group}'] = float(read.all[of_group].mean())
            found[f'{name}/{group}_digits'] = float(read.digits[of_group].mean())
    return found


def caption_scores(captions: Sequence[str], wishes: Sequence[Asked]) -> dict[str, float]:
    """Scores captions that were written for real images.

    Args:
      captions: n texts.
      wishes: what each image shows.

    Returns:
      `captions/seen`, … of GROUPS: the share of captions that the grammar has for the image, word
      by word.
    """
    right = [
        caption in wish.composition.captions()
        for caption, wish in zip(captions, wishes, strict=True)
    ]
    groups = np.asarray([wish.group for wish in wishes])
    return {f'captions/{group}': float(np.mean(right, where=groups == group)) for group in GROUPS}


def score_captions(run: Run, real: Real, mesh: Mesh) -> dict[str, float]:
    """Scores the captions that a model writes for real images, the likeliest word each time.

    It reads tokens that are drawn from the posterior, as in training.

    Args:
      run: both models, of which the AR model writes texts.
      real: the images, see `real_images`.
      mesh: the devices.

    Returns:
      The scores of `caption_scores`, and the means of −log p of the images' own captions in nats,
        given the image (`captions/nats`, and `captions/nats_held_out` of held-out pairs) and, if
        the model has learned texts without an image, without it (`captions/nats_alone`).
    """
    images = 2 * real.pixels[..., None] - 1
    how: dict[str, Any] = {
        'seed': run.config.seed,
        'drawn': True,
        'batch_size': run.config.sampling.batch_size,
        'mesh': mesh,
    }
    numbers = captioning.write(run, images, **how)
    words = build.open_vocabulary(run.config)
    found = caption_scores([words.decode(caption) for caption in numbers], real.wishes)
    labels = build.encode_captions(run.config, [wish.caption for wish in real.wishes])
    given, alone = captioning.nats(run, images, labels, **how)
    is_held_out = np.asarray([wish.group == 'held_out' for wish in real.wishes])
    found['captions/nats'] = float(given.mean())
    found['captions/nats_held_out'] = float(np.mean(given, where=is_held_out))
    if run.config.ar.alone_weight:
        found['captions/nats_alone'] = float(alone.mean())
    return found


def summary(count: int, found: dict[str, float]) -> str:
    """The scores of samples, in a few sentences.

    Args:
      count: the number of samples.
      found: what `floor` and `scores` give.
    """
    text = (
        f'{count} images of composed digits, drawn for captions, none selected. A network reads '
        f'both digits, their order and their sizes back right in {found["samples/seen"]:.1%} of '
        f'the images for pairs of digits that were trained on, and in '
        f'{found["samples/held_out"]:.1%} of those for pairs that were held out. Of real images '
        f'it reads {found["real/seen"]:.1%} and {found["real/held_out"]:.1%}. All four digits of '
        f'two rows: {found["samples/rows"]:.1%}, of real images {found["real/rows"]:.1%}.'
    )
    if 'captions/seen' in found:
        text += (
            ' The model writes the right caption, word by word, for '
            f'{found["captions/seen"]:.1%} of real images of the first kind, '
            f'{found["captions/held_out"]:.1%} of the second and {found["captions/rows"]:.1%} of '
            'those with two rows.'
        )
    return text
