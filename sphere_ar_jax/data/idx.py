"""IDX files, as MNIST, Fashion-MNIST, KMNIST and EMNIST are published: grey images with labels.

An IDX file is one array. It begins with two zeros, a code of the elements' type and the number of
dimensions, a byte each. The dimensions follow as four bytes each, the highest first, and then the
elements. Source: http://yann.lecun.com/exdb/mnist, "The IDX file format".

A data set has four files, packed by gzip or not:
  PREFIXtrain-images-idx3-ubyte   PREFIXtrain-labels-idx1-ubyte
  PREFIXt10k-images-idx3-ubyte    PREFIXt10k-labels-idx1-ubyte    (or test- in place of t10k-)
The prefix is empty for most; EMNIST has several data sets with prefixes in one directory.

Dimensions:
  n     images of a split
  h, w  height and width of an image in the files
  H     side of an image for the models, the smallest power of two that is not below h and w
"""

import gzip
import hashlib
import math
import os
import re
import struct
import zlib
from typing import IO, Any

import numpy as np

from sphere_ar_jax.data import pixels
from sphere_ar_jax.data.files.listing import first_names, shown
from sphere_ar_jax.runtime.console import UserError, first_line

# Codes of the elements' types. Images and labels have bytes.
_TYPES = {8: 'uint8', 9: 'int8', 11: 'int16', 12: 'int32', 13: 'float32', 14: 'float64'}
_BYTES = 8
_MOST = 2**31  # elements of a file; the largest published one, of EMNIST, has 547,178,688
_MOST_DEFLATED = 1032  # a byte that gzip has packed holds no more bytes than this
_LARGEST = 1024  # pixels along a side
_PIECE = 2**24  # bytes that are read at a time
_FILE = re.compile(
    r'(?P<prefix>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(\.gz)?'
)
_PARTS = {'train': 'train', 't10k': 'test', 'test': 'test'}
_DIMENSIONS = {'images': 3, 'labels': 1}

# Names of classes by the SHA-256 of the training labels, for data sets whose files say none.
_KNOWN = {
    '657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7': (  # Fashion-MNIST
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
        'Ankle boot',
    ),
}  # fmt: skip


def _shape(file: IO[bytes], dimensions: int) -> tuple[int, ...]:
    """Reads the header of an IDX file; the file then stands at the first element.

    Raises:
      ValueError: this is no IDX file, or one of other elements or dimensions.
    """
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b'\0\0' or magic[2] not in _TYPES:
        raise ValueError('this is no IDX file')
    if magic[2] != _BYTES:
        raise ValueError(f'its elements are {_TYPES[magic[2]]}, but must be uint8')
    if magic[3] != dimensions:
        raise ValueError(f'it has {magic[3]} dimension(s), but must have {dimensions}')
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ValueError('it is cut off')
    return struct.unpack(f'>{dimensions}I', sizes)


def _elements(file: IO[bytes], count: int) -> np.ndarray:
    """Reads the elements after a header, piece by piece.

    Raises:
      ValueError: there are fewer or more than `count`.
    """
    found = np.empty(count, np.uint8)
    done = 0
    while done < count:
        piece = file.read(min(_PIECE, count - done))
        if not piece:
            raise ValueError(f'it is cut off: it has {done} of {count} elements')
        found[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    # gzip compares its checksum here, too.
    if file.read(1):
        raise ValueError(f'it has more than the {count} elements that it speaks of')
    return found


def read(path: str | os.PathLike[str], dimensions: int) -> np.ndarray:
    """Reads an IDX file of bytes, packed by gzip or not.

    Nothing is allocated that the file cannot hold.

    Args:
      path: the file.
      dimensions: how many the array must have.

    Returns:
      The array, uint8.

    Raises:
      UserError: the file cannot be read, is damaged or cut off, or holds something else; one line
        that names it.
    """
    try:
        with open(path, 'rb') as raw:
            is_packed = raw.read(2) == b'\x1f\x8b'
            raw.seek(0)
            file: Any = gzip.GzipFile(fileobj=raw) if is_packed else raw
            shape = _shape(file, dimensions)
            count = math.prod(shape)
            most = os.fstat(raw.fileno()).st_size * (_MOST_DEFLATED if is_packed else 1)
            if count > min(most, _MOST):
                raise ValueError(f'it speaks of {count} elements, more than it can hold')
            return _elements(file, count).reshape(shape)
    except (OSError, EOFError, ValueError, MemoryError, zlib.error) as error:
        reason = first_line(error) or type(error).__name__
        raise UserError(f'{shown(os.fspath(path))} cannot be read: {reason}') from None


# ---- the files of a directory


def _listed(directory: str) -> dict[str, dict[tuple[str, str], str]]:
    """The IDX files of a directory: {prefix: {(train or test, images or labels): path}}.

    A file that is there with and without gzip is taken without.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f'{shown(directory)} cannot be read: {first_line(error)}') from None
    found: dict[str, dict[tuple[str, str], str]] = {}
    for name in names:
        match = _FILE.fullmatch(name)
        if match:
            key = (_PARTS[match['part']], match['what'])
            found.setdefault(match['prefix'], {}).setdefault(key, os.path.join(directory, name))
    return found


def _find(path: str) -> tuple[str, str, dict[tuple[str, str], str]]:
    """Finds the four files of a data set.

    Args:
      path: the directory, or DIRECTORY/PREFIX where it holds several data sets.

    Returns:
      (directory, prefix, paths as `_listed` gives them).

    Raises:
      UserError: a file is missing, or the directory holds several data sets.
    """
    if os.path.isfile(path):
        raise UserError(f'{shown(path)} is a file: give the directory that holds all four')
    directory = path
    begins = ''
    if not os.path.isdir(path):
        directory, begins = os.path.split(path)
    found = {
        prefix: files
        for prefix, files in _listed(directory or '.').items()
        if prefix.startswith(begins)
    }
    if not found:
        raise UserError(
            f'{shown(path)} has no IDX files, as train-images-idx3-ubyte, packed by gzip or not'
        )
    exact = begins if begins in found else f'{begins}-'
    if len(found) > 1 and exact not in found:
        prefixes = [prefix.rstrip('-') or '(none)' for prefix in found]
        raise UserError(
            f'{shown(path)} holds several data sets ({first_names(prefixes, 8)}): give one as '
            f'idx:{shown(os.path.join(directory, prefixes[-1]))}'
        )
    prefix = exact if exact in found else next(iter(found))
    for part in ('train', 'test'):
        for what, dimensions in _DIMENSIONS.items():
            if (part, what) not in found[prefix]:
                missing = f'{prefix}{part}-{what}-idx{dimensions}-ubyte'
                also = ' (or t10k-…)' if part == 'test' else ''
                raise UserError(f'{shown(directory)} has no {shown(missing)}{also}, .gz or not')
    return directory, prefix, found[prefix]


def _arrays(
    files: dict[tuple[str, str], str], part: str, is_turned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, h, w) and labels (n,) of a split, both uint8.

    Args:
      files: the paths, see `_listed`.
      part: 'train' or 'test'.
      is_turned: whether the files have rows and columns exchanged, as EMNIST's have.
    """
    images = read(files[part, 'images'], 3)
    labels = read(files[part, 'labels'], 1)
    where = shown(files[part, 'images'])
    if not images.size:
        raise UserError(f'{where} has no images')
    if len(images) != len(labels):
        raise UserError(
            f'{where} has {len(images)} images, but {shown(files[part, "labels"])} '
            f'{len(labels)} labels'
        )
    if max(images.shape[1:]) > _LARGEST:
        raise UserError(f'{where} has images of {images.shape[1:]}, more than {_LARGEST} pixels')
    return images.swapaxes(1, 2) if is_turned else images, labels


def _class_names(directory: str, labels: np.ndarray) -> tuple[str, ...] | None:
    """The names of the classes.

    DIRECTORY/classes.txt says them, one a line in the order of the labels. Without it the names of
    data sets that this module knows are taken.

    Args:
      directory: where the files are.
      labels: those of the training images, as the file has them.
    """
    path = os.path.join(directory, 'classes.txt')
    try:
        with open(path, encoding='utf-8-sig') as f:  # some editors write a byte order mark
            text = f.read(2**20)
    except FileNotFoundError:
        return _KNOWN.get(hashlib.sha256(labels.tobytes()).hexdigest())
    except (OSError, ValueError) as error:
        raise UserError(f'{shown(path)} cannot be read: {first_line(error)}') from None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    first = _first(labels)
    last = int(labels.max())  # as a uint8, 255 + 1 would be 0
    if len(names) != 1 + last - first:
        raise UserError(
            f'{shown(path)} has {len(names)} names, but the labels are {first} to {last}'
        )
    return names


def _first(labels: np.ndarray) -> int:
    """The label of the first class: 1 where labels count from 1, as EMNIST's letters do, or 0."""
    return min(int(labels.min()), 1)


class IDX:
    """One split of a data set in IDX files, held in memory.

    Images are filled up with zeros on all sides to a square whose side is a power of two: 28×28
    pixels become 32×32.

    Attributes:
      path: the directory.
      part: 'train' or 'test'.
      labels: (n,) int32 from 0.
      image_shape: (H, H, 1).
      num_classes: the number of classes.
      class_names: their names, or None where they are not known.
      left_out: ''.
    """

    left_out = ''

    def __init__(
        self,
        path: str,
        part: str,
        scans: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        class_names: tuple[str, ...] | None,
    ):
        """Makes a split of arrays; see `splits`, which reads them from files.

        Args:
          path: the directory.
          part: 'train' or 'test'.
          scans: the images (n, h, w) as the files have them, uint8.
          labels: (n,), 0 … num_classes − 1.
          num_classes: the number of classes.
          class_names: their names, or None.
        """
        self.path = path
        self.part = part
        self._scans = scans
        self.labels = labels.astype(np.int32)
        self.num_classes = num_classes
        self.class_names = class_names
        h, w = scans.shape[1:]
        side = 2 ** math.ceil(math.log2(max(h, w)))
        self.image_shape = (side, side, 1)
        top = (side - h) // 2
        left = (side - w) // 2
        self._rows = slice(top, top + h)
        self._columns = slice(left, left + w)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        """Returns {'image': (H, H, 1) float32 in [−1, 1], 'label': int32 ()}."""
        filled = np.zeros(self.image_shape, np.uint8)
        filled[self._rows, self._columns, 0] = self._scans[index]
        return {'image': pixels.to_float(filled), 'label': self.labels[index]}

    def name(self, index: int) -> str:
        """Names an image by its place in the file."""
        return f'{self.path} {self.part} [{range(len(self))[index]}]'

    @property
    def pixels(self) -> np.ndarray:
        """The images as the files have them, (n, h, w) float32 in [0, 1]."""
        return self._scans.astype(np.float32) / np.float32(255)

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Model images (n, H, H, 1) in [−1, 1] → (n, h, w) in [0, 1], without what was filled."""
        scaled = np.clip((np.asarray(images) + 1) / 2, 0, 1)
        return scaled[:, self._rows, self._columns, 0]


def splits(path: str | os.PathLike[str]) -> tuple[IDX, IDX]:
    """Reads a data set.

    EMNIST's images, which lie on their side in its files, are turned upright. Labels that count
    from 1, as those of EMNIST's letters, are taken down by one.

    Args:
      path: the directory of the four files, or DIRECTORY/PREFIX where it holds several data sets.
        ~ is the user's own directory.

    Returns:
      (the split to train on, the test split).

    Raises:
      UserError: a file is missing, cannot be read or is damaged, or the files do not belong
        together.
    """
    path = os.path.expanduser(os.fspath(path))
    directory, prefix, files = _find(path)
    is_turned = prefix.lower().startswith('emnist')
    images, labels = _arrays(files, 'train', is_turned)
    test_images, test_labels = _arrays(files, 'test', is_turned)
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f'{shown(path)} has images of {images.shape[1:]} to train on and of '
            f'{test_images.shape[1:]} to test on'
        )
    first = _first(labels)
    last = int(labels.max())
    if test_labels.min() < first or test_labels.max() > last:
        raise UserError(
            f'{shown(files["test", "labels"])} has labels {test_labels.min()} to '
            f'{test_labels.max()}, but the training images {first} to {last}'
        )
    names = _class_names(directory, labels)
    count = last - first + 1
    return (
        IDX(path, 'train', images, labels - first, count, names),
        IDX(path, 'test', test_images, test_labels - first, count, names),
    )
