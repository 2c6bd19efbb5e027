r"""Composed digits: two or four of scikit-learn's scans in an image, and a caption that says which.

The captions follow a grammar:

  caption   THING RELATION THING        'a thick three left of a small seven'
          | two rows: D D / D D         'two rows: 4 1 / 8 8'
  RELATION  left of | right of | above | below
  THING     a [thick] [small] WORD      WORD is zero … nine, D is 0 … 9; 'an' before eight

A digit that is not called small is large, and one that is not called thick is as it was scanned.
Digits in two rows are large. A composition is what the digits of an image are, in reading
order. For some ordered pairs of digits, no training image has the second beside or below the
first.

Dimensions:
  n  images of 32×32 pixels     16×16 pixels of a digit's cell     8×8 pixels of a scan
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from sphere_ar_jax.data.digits import Digits
from sphere_ar_jax.runtime.console import UserError

WORDS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
RELATIONS = ('left of', 'right of', 'above', 'below')
SIDE = 32  # pixels of an image along each axis
CELL = 16  # pixels of a digit's cell
LARGE = 14  # pixels of a large digit
SMALL = 10  # pixels of a small one

# Shares of the images that have two rows, and of the digits that are small or thick.
_ROWS = 0.2
_SMALL = 0.5
_THICK = 0.3
# Numbers of training and of held-out images.
_COUNTS = (20_000, 2_000)


@dataclasses.dataclass(frozen=True)
class Thing:
    """A digit of an image.

    Attributes:
      digit: 0 … 9.
      small: whether it has 10×10 pixels in place of 14×14.
      thick: whether its strokes are thickened.
    """

    digit: int
    small: bool = False
    thick: bool = False

    def caption(self) -> str:
        """The words for it, as 'a thick small three'."""
        words = [WORDS[self.digit]]
        if self.small:
            words.insert(0, 'small')
        if self.thick:
            words.insert(0, 'thick')
        article = 'an' if words[0] == 'eight' else 'a'
        return ' '.join([article, *words])


@dataclasses.dataclass(frozen=True)
class Composition:
    """What an image shows.

    Attributes:
      things: two digits in reading order, or four, row by row.
      upright: whether the second of two digits is below the first, and not beside it.
      backwards: whether the caption of two digits begins with the second.
    """

    things: tuple[Thing, ...]
    upright: bool = False
    backwards: bool = False

    def caption(self) -> str:
        """The caption, see the grammar above."""
        if len(self.things) == 4:
            a, b, c, d = (thing.digit for thing in self.things)
            return f'two rows: {a} {b} / {c} {d}'
        relation = RELATIONS[2 * self.upright + self.backwards]
        first, second = reversed(self.things) if self.backwards else self.things
        return f'{first.caption()} {relation} {second.caption()}'

    def captions(self) -> set[str]:
        """All captions that say what the image shows."""
        if len(self.things) == 4:
            return {self.caption()}
        ways = (dataclasses.replace(self, backwards=backwards) for backwards in (False, True))
        return {way.caption() for way in ways}

    def pairs(self) -> set[tuple[int, int]]:
        """The ordered pairs of digits of which the second is beside or below the first."""
        digits = [thing.digit for thing in self.things]
        if len(digits) == 2:
            return {(digits[0], digits[1])}
        neighbours = ((0, 1), (2, 3), (0, 2), (1, 3))
        return {(digits[i], digits[j]) for i, j in neighbours}

    def corners(self) -> list[tuple[int, int]]:
        """The upper left corner (y, x) of each digit's cell.

        The cells of two digits are in the middle of their halves, along which they may move.
        """
        if len(self.things) == 4:
            return [(y, x) for y in (0, CELL) for x in (0, CELL)]
        middle = (SIDE - CELL) // 2
        if self.upright:
            return [(0, middle), (CELL, middle)]
        return [(middle, 0), (middle, CELL)]


def held_out_pairs(seed: int) -> frozenset[tuple[int, int]]:
    """The ordered pairs of digits that training images do not have beside or below each other.

    Each digit is the first of two of these pairs, and the second of two.

    Args:
      seed: which pairs these are.
    """
    first = np.random.default_rng((seed, 0)).permutation(10)
    second = np.roll(first, 3)
    third = np.roll(first, 6)
    pairs = [*zip(first, second, strict=True), *zip(first, third, strict=True)]
    return frozenset((int(a), int(b)) for a, b in pairs)


def _thing(rng: np.random.Generator, digit: int) -> Thing:
    """Draws the size and the strokes of one of two digits."""
    small, thick = rng.random(2) < (_SMALL, _THICK)
    return Thing(digit, bool(small), bool(thick))


def draw_composition(
    rng: np.random.Generator, held_out: frozenset[tuple[int, int]], new: bool
) -> Composition:
    """Draws what an image shows.

    Args:
      rng: makes the draws.
      held_out: see `held_out_pairs`.
      new: whether the image has two digits that are such a pair; else it has no such pair.
    """
    is_rows = not new and rng.random() < _ROWS
    upright, backwards = (bool(word) for word in rng.random(2) < 0.5)
    if new:
        pairs = sorted(held_out)
        pair = pairs[rng.integers(len(pairs))]
        return Composition(tuple(_thing(rng, k) for k in pair), upright, backwards)
    while True:
        digits = tuple(int(k) for k in rng.integers(10, size=4 if is_rows else 2))
        if is_rows:
            found = Composition(tuple(Thing(k) for k in digits))
        else:
            found = Composition(tuple(_thing(rng, k) for k in digits), upright, backwards)
        if not found.pairs() & held_out:
            return found


def paint(thing: Thing, scan: np.ndarray) -> np.ndarray:
    """A scan (8, 8) in [0, 1] as pixels of the thing, (14, 14), or (10, 10) where it is small.

    Strokes of thick things are blurred and then brightened, so that holes stay open.
    """
    # SciPy's images take a while to import.
    from scipy import ndimage

    fine = ndimage.zoom(scan, 2, order=1)
    if thing.thick:
        fine = np.clip(1.4 * ndimage.gaussian_filter(fine, 0.7, mode='constant'), 0, 1)
    side = SMALL if thing.small else LARGE
    return ndimage.zoom(fine, side / len(fine), order=1)


class Composed:
    """Images of composed digits, each a function of the seed, the part and its number alone.

    Attributes:
      labels: (n,) int32, zeros: the images have captions in place of classes.
      image_shape: (32, 32, 1).
      num_classes: 1.
      class_names: None.
    """

    image_shape = (SIDE, SIDE, 1)
    num_classes = 1
    class_names = None

    def __init__(self, split: str, seed: int, holdout: float = 0.2, count: int | None = None):
        """Loads the scans of one of the two parts.

        Args:
          split: 'train', or 'heldout' for images of held-out scans and pairs.
          seed: decides which scans and pairs are held out, and draws the images.
          holdout: the share of the scans that is held out.
          count: n, 20,000 or 2,000 if not given.

        Raises:
          UserError: the part has no scan of some digit.
        """
        self._part = ('train', 'heldout').index(split)
        self._seed = seed
        self._scans = Digits(split, seed, holdout)
        self._of_digit = [np.flatnonzero(self._scans.labels == k) for k in range(10)]
        lacking = [k for k, found in enumerate(self._of_digit) if not len(found)]
        if lacking:
            raise UserError(
                f'data.holdout is {holdout}: the {split} part has no scan of the digit '
                f'{lacking[0]}; give a share nearer to 0.2'
            )
        self._held_out = held_out_pairs(seed)
        self.labels: np.ndarray = np.zeros(count or _COUNTS[self._part], np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def _rng(self, index: int) -> np.random.Generator:
        """The generator that draws an image."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return np.random.default_rng((self._seed, self._part, index))

    def composition(self, index: int) -> Composition:
        """What an image shows."""
        return draw_composition(self._rng(index), self._held_out, self._part == 1)

    def draw(self, composition: Composition, rng: np.random.Generator) -> np.ndarray:
        """Draws an image of a composition, (32, 32) in [0, 1].

        A digit lies anywhere in its cell. The cells of two digits move by up to 4 pixels along
        their halves.
        """
        canvas = np.zeros((SIDE, SIDE))
        for thing, (y, x) in zip(composition.things, composition.corners(), strict=True):
            chosen = self._of_digit[thing.digit]
            painted = paint(thing, self._scans.pixels[chosen[rng.integers(len(chosen))]])
            side = len(painted)
            if len(composition.things) == 2:
                move = int(rng.integers(-4, 5))
                y, x = (y, x + move) if composition.upright else (y + move, x)
            y, x = np.array((y, x)) + rng.integers(CELL - side + 1, size=2)
            canvas[y : y + side, x : x + side] = painted
        return canvas

    def drawn(self, index: int) -> tuple[Composition, np.ndarray]:
        """What an image shows, and its pixels (32, 32) in [0, 1]."""
        rng = self._rng(index)
        composition = draw_composition(rng, self._held_out, self._part == 1)
        return composition, self.draw(composition, rng)

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """All images, (n, 32, 32) float32 in [0, 1]."""
        return np.stack([self.drawn(i)[1].astype(np.float32) for i in range(len(self))])

    def __getitem__(self, index: int) -> dict[str, Any]:
        composition, pixels = self.drawn(index)
        image = (2 * pixels[..., None] - 1).astype(np.float32)
        return {'image': image, 'label': np.int32(0), 'captions': (composition.caption(),)}

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Model images (n, 32, 32, 1) in [−1, 1] → (n, 32, 32) in [0, 1]."""
        return np.clip((np.asarray(images)[..., 0] + 1) / 2, 0, 1)


def splits(seed: int, holdout: float) -> tuple[Composed, Composed]:
    """Loads (the images to train on, those of held-out scans and pairs); see `Composed`."""
    return Composed('train', seed, holdout), Composed('heldout', seed, holdout)
