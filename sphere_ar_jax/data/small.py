"""Small labelled data sets, held in memory whole, with a part held out to score by.

  KINDS   their kinds by the word of the config

Dimensions:
  n        images of a split
  h, w     height and width of an image as its file has it
  H, W, c  height, width and channels of an image for the models
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from sphere_ar_jax.data import digits, idx
from sphere_ar_jax.data.captions import composed
from sphere_ar_jax.data.digits import enlarge, shrink
from sphere_ar_jax.runtime.console import UserError


class Split(Protocol):
    """The images of one part of a small data set.

    Attributes:
      labels: (n,) int, 0 … num_classes − 1.
      num_classes: the number of classes.
      image_shape: (H, W, c).
    """

    labels: np.ndarray
    num_classes: int
    image_shape: tuple[int, int, int]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes' names, or None where they are not known."""

    @property
    def pixels(self) -> np.ndarray:
        """The images as their file has them, (n, h, w) in [0, 1]."""

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Model images (n, H, W, c) in [−1, 1] → (n, h, w) in [0, 1]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class DataSet(NamedTuple):
    """A small data set.

    Attributes:
      kind: a key of `KINDS`.
      train: the images to train on.
      heldout: images of the same kind that are never trained on.
    """

    kind: str
    train: Split
    heldout: Split


class Kind(NamedTuple):
    """What can be said of a kind of small data sets before one is opened.

    Attributes:
      noun: what its images are, in the plural.
      image_shape: (H, W, c), or None where only the files say it.
      num_classes: the least number of classes that there are.
      has_path: whether it lies in files of the user's.
      unpackable: why `--mode=pack` has nothing to do.
    """

    noun: str
    image_shape: tuple[int, int, int] | None
    num_classes: int
    has_path: bool
    unpackable: str


KINDS = {
    'digits': Kind(
        'digits',
        digits.Digits.image_shape,
        digits.Digits.num_classes,
        False,
        'the digits are part of scikit-learn: there is nothing to pack',
    ),
    'composed': Kind(
        'composed digits',
        composed.Composed.image_shape,
        composed.Composed.num_classes,
        False,
        'composed digits are drawn from the digits of scikit-learn: there is nothing to pack',
    ),
    'idx': Kind('images', None, 1, True, 'IDX files are packed already: train on them as they are'),
}


class _View:
    """A `Split` made of another one. What a kind of view leaves alone is that of the other."""

    def __init__(self, split: Split):
        """Takes everything but the images over; `split` is the other one."""
        self._split = split
        self.labels = split.labels
        self.num_classes = split.num_classes
        self.image_shape = split.image_shape
        self.class_names = split.class_names

    @property
    def pixels(self) -> np.ndarray:
        """The images as their file has them, (n, h, w) in [0, 1]."""
        return self._split.pixels

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Model images (n, H, W, c) in [−1, 1] → (n, h, w) in [0, 1]."""
        return self._split.to_pixels(images)

    def __len__(self) -> int:
        return len(self.labels)


class OfClasses(_View):
    """The images of some classes of a split, with labels that count these classes from 0."""

    def __init__(self, split: Split, classes: Sequence[int]):
        """Takes the images of some classes.

        Args:
          split: the split.
          classes: their labels in the split, ascending.

        Raises:
          UserError: the split has no such class, or no image of one.
        """
        for k in classes:
            if not np.any(split.labels == k):
                raise UserError(
                    f'data.classes has {k}, but the images have classes 0 to '
                    f'{split.num_classes - 1}, and none of class {k}'
                )
        super().__init__(split)
        self._chosen = np.flatnonzero(np.isin(split.labels, classes))
        self.labels = np.searchsorted(classes, split.labels[self._chosen]).astype(np.int32)
        self.num_classes = len(classes)
        names = split.class_names
        self.class_names = None if names is None else tuple(names[k] for k in classes)

    @property
    def pixels(self) -> np.ndarray:
        """The images as their file has them, (n, h, w) in [0, 1]."""
        return self._split.pixels[self._chosen]

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._split[int(self._chosen[index])]
        return record | {'label': self.labels[index]}


class Brightened(_View):
    """The images of a split, each darkened by a factor b of its own.

    A pixel v in [0, 1] becomes b·v, so that black stays black.

    Attributes:
      factors: b, (n,) float32. Factor i depends on the seed, the part and i alone.
    """

    def __init__(self, split: Split, ends: Sequence[float], seed: int, part: int):
        """Draws the factors.

        Args:
          split: the split.
          ends: (low, high) of their uniform distribution.
          seed: their seed.
          part: 0 for images to train on, 1 for held-out ones.
        """
        super().__init__(split)
        low, high = ends
        drawn = np.random.default_rng((seed, part)).uniform(low, high, len(split))
        self.factors = drawn.astype(np.float32)

    @property
    def pixels(self) -> np.ndarray:
        """The images as their file has them, times their factors, (n, h, w) in [0, 1]."""
        return self._split.pixels * self.factors[:, None, None]

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._split[index]
        return record | {'image': (record['image'] + 1) * self.factors[index] - 1}


class Enlarged(_View):
    """The images of a split with each pixel repeated along both axes; `pixels` stay as they are."""

    def __init__(self, split: Split, factor: int):
        """Enlarges images for the models.

        Args:
          split: the split.
          factor: how often each pixel is repeated.
        """
        super().__init__(split)
        self._factor = factor
        height, width, channels = split.image_shape
        self.image_shape = (factor * height, factor * width, channels)

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Model images (n, H, W, c) in [−1, 1] → (n, h, w) in [0, 1]."""
        shown = np.clip(images, -1, 1)
        return self._split.to_pixels(shrink(shown, self._factor))

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._split[index]
        return record | {'image': enlarge(record['image'], self._factor)}


def enlarged(data: DataSet, factor: int) -> DataSet:
    """A data set whose images are enlarged for the models, see `Enlarged`; with 1 the same."""
    if factor == 1:
        return data
    return data._replace(train=Enlarged(data.train, factor), heldout=Enlarged(data.heldout, factor))


def open_data_set(
    kind: str,
    path: str | None,
    seed: int,
    holdout: float,
    classes: Sequence[int] = (),
    brightness: Sequence[float] = (),
) -> DataSet:
    """Opens a small data set.

    Args:
      kind: a key of `KINDS`.
      path: where its files are, see `idx.splits`; not used for the digits and composed digits.
      seed: decides which of the digits are held out, composes them, and draws the factors of the
        brightness. IDX files have a test split of their own.
      holdout: the share of the digits that is held out.
      classes: the classes to take, ascending, see `OfClasses`; () takes all.
      brightness: ends of the factors' distribution, see `Brightened`; () leaves images as they are.

    Raises:
      UserError: the path is missing, the files cannot be read, or have no images of a class.
    """
    splits: tuple[Split, Split]
    if kind == 'digits':
        splits = digits.splits(seed, holdout)
    elif kind == 'composed':
        splits = composed.splits(seed, holdout)
    elif path is not None:
        splits = idx.splits(path)
    else:
        raise UserError(f'give --config.data.path, of the {kind} data')
    if brightness:
        train = Brightened(splits[0], brightness, seed, 0)
        splits = (train, Brightened(splits[1], brightness, seed, 1))
    if classes:
        splits = (OfClasses(splits[0], classes), OfClasses(splits[1], classes))
    return DataSet(kind, *splits)


def first_images(split: Split, n: int) -> np.ndarray:
    """The first n images (n, H, W, c) of a split, or all where it has fewer."""
    return np.stack([split[i]['image'] for i in range(min(n, len(split)))])
