"""Labelled images, as their files hold them: tars, directories, ArrayRecord, Parquet, data sets.

A source (`Images`) is a random-access sequence: `source[i]` is a dictionary of
  image   bytes of one encoded image file (JPEG, PNG, …; it may be broken)
  label   np.int32 (), 0 … num_classes − 1
Threads may share a source. Processes get it by pickle, without its open files. Faults of the data
raise `UserError`, when the source is opened if they can be seen then.

  KINDS   the sources by name      pack   copies any source to the files of `ArrayRecords`
  split   holds some images of a source out      spread  some of its images, evenly

Dimensions:
  n     entries
  k     classes
  H, W  height and width of an image
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from sphere_ar_jax.data.files import array_records, columns
from sphere_ar_jax.data.files.emoji import Emoji
from sphere_ar_jax.data.files.hugging_face import HuggingFace
from sphere_ar_jax.data.files.latents import Latents
from sphere_ar_jax.data.files.listing import (
    SPLITS,
    BrokenCaptionError,
    LeftOut,
    escaped,
    is_image,
    is_of_system,
    shown,
)
from sphere_ar_jax.data.files.parquet import Parquet
from sphere_ar_jax.data.files.tar_index import BLOCK, open_index, read_file
from sphere_ar_jax.data.files.webdataset import WebDataset
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.runtime.types import Progress


class Images(Protocol):
    """What every source of this module offers.

    Attributes:
      num_classes: the number of classes.
      class_names: their names, for ImageNet the synsets, or None where they have none.
      left_out: what lies there and was not taken as an image, with counts, in one line; '' where
        nothing was.
    """

    num_classes: int
    left_out: str

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes' names."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...

    def name(self, i: int, /) -> str:
        """Names entry i in messages."""


class ImageNetTar:
    """ILSVRC2012_img_train.tar as it is fetched: a tar of tars, one for each synset.

    It is not unpacked. Every image is one read at an offset that an index holds. The index is made
    by a walk over all headers when the tar is opened for the first time. It is kept beside the tar
    as `TAR.index.npz`, or, where nothing can be written there, in ~/.cache/sphere_ar_jax. It is
    made anew when the tar's size, time of change or synset headers differ. The header in front of
    each image is read with it and must be the one that the index saw.

    Images are in the order of the tar. A label is the index of a synset among the sorted synsets.
    If there are 1,000 synsets they must be ILSVRC2012's; any other number is taken as it is. Files
    that are no images by their suffix, and those that systems leave behind, are left out. A synset
    whose tar has no images stays a class.

    Attributes:
      path: the tar, absolute.
      num_classes: number of synsets.
      class_names: the synsets, sorted.
      left_out: see `Images`.
    """

    def __init__(self, path: str | os.PathLike[str], progress: Progress = lambda done, total: None):
        """Opens a tar.

        Args:
          path: the tar.
          progress: called as progress(done, total), in bytes, after each synset while the index is
            made.

        Raises:
          UserError: the tar is not there, cannot be read, is not of this make, or is damaged or cut
            off. `source[i]` raises it where the tar has changed since.
        """
        self.path = os.path.abspath(path)
        self._open()
        index = open_index(self.path, self._file.fileno(), progress)
        self._offsets = index['offsets']
        self._sizes = index['sizes']
        self._labels = index['labels']
        self._checksums = index['checksums']
        self.class_names: tuple[str, ...] = tuple(index['synsets'].tolist())
        self.num_classes = len(self.class_names)
        self.left_out: str = str(index['left_out'])

    def _open(self) -> None:
        try:
            self._file = open(self.path, 'rb', buffering=0)  # noqa: SIM115
        except IsADirectoryError:
            raise UserError(
                f'{self.path} cannot be read: Is a directory, not a tar; a directory with one for '
                f'each class is read with data=folder:{self.path}'
            ) from None
        except OSError as error:
            raise UserError(f'{self.path} cannot be read: {first_line(error)}') from None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != '_file'}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        offset = int(self._offsets[i])
        size = int(self._sizes[i])
        image = read_file(self._file.fileno(), offset, size, int(self._checksums[i]), self.path)
        return {'image': image, 'label': self._labels[i]}

    def name(self, i: int) -> str:
        """Reads the name of entry i from the tar, as 'n01440764/n01440764_10026.JPEG'.

        It has at most 100 bytes. In a pax tar it is the ASCII form of the name.
        """
        header = os.pread(self._file.fileno(), BLOCK, int(self._offsets[i]) - BLOCK)
        name = header[:100].split(b'\0')[0].decode('utf-8', 'surrogateescape')
        return f'{self.class_names[self._labels[i]]}/{escaped(name)}'


# ---- directories


def _check_directories(path: str, classes: list[str]) -> None:
    """Raises UserError where a directory has no directories for classes."""
    if not classes:
        hint = 'all images may also lie in it directly, as a single class'
        if os.path.exists(os.path.join(path, array_records.IMAGES.metadata)):
            hint = f'what --mode=pack wrote is read with data=array_records:{path}'
        raise UserError(f'{path} has no directories, but must have one for each class; {hint}')


def _check_classes(path: str, classes: list[str]) -> None:
    """Raises UserError where the directories with images are the parts of a data set.

    A year may stand behind, as in train2017. One that is numbered, as test1 and test2, is a class.

    Args:
      path: the directory.
      classes: the names of the directories in it, sorted.
    """
    stems = {name.lower().rstrip('0123456789_-. ') for name in classes}
    if stems <= SPLITS and (len(stems) > 1 or len(classes) == 1):
        training = [name for name in classes if name.lower().startswith('train')]
        part = (training or classes)[0]
        raise UserError(
            f'{path} holds {" and ".join(classes)}, parts of a data set and not classes: '
            f'give --config.data.path={path}/{part} (or data=folder:{path}/{part}), '
            'with a directory in it for each class'
        )


class ImageFolder:
    """A directory with a directory for each class, as PATH/CLASS/…/NAME.jpg.

    A directory of images without any directory in it is a single class, which has its name. Where
    no labels are needed, so are all images where some lie beside directories.

    Images are in sorted order, class by class. A label is the index of a class among the sorted
    classes. Images are recognised by their suffix, in upper or lower case. Hidden files and those
    that systems leave behind are ignored, see `listing.is_of_system`. Links to directories are
    followed, but no directory is listed twice in a class. A class without images stays a class.

    Attributes:
      path: the directory, absolute.
      num_classes: number of classes.
      class_names: the classes' directories, sorted, printable.
      labels: the label of each image, (n,) int32.
      left_out: see `Images`.
    """

    def __init__(self, path: str | os.PathLike[str], needs_labels: bool = True):
        """Lists the images of a directory.

        Args:
          path: the directory.
          needs_labels: whether images beside the directories of classes are left out. If not, all
            images below the directory are then a single class.

        Raises:
          UserError: there are no classes, no class has images, the classes are parts of a data set
            such as train and val, or the directory cannot be read. `source[i]` raises it where a
            file is gone.
        """
        self.path = os.path.abspath(path)
        left = LeftOut()
        try:
            classes = self._classes(left)
            is_one_class = not classes and left.outside > 0
            if not needs_labels:
                is_one_class = left.outside > 0
            if is_one_class:
                left = LeftOut()  # They do not lie beside classes, but are the class.
                classes = ['']
            _check_directories(self.path, classes)
            # Before a listing that may take minutes; below, without the directories that are empty.
            _check_classes(self.path, classes)
            found = [self._list(name, left) for name in classes]
        except NotADirectoryError:
            raise UserError(
                f"{self.path} cannot be read: Not a directory; a tar like ImageNet's is read with "
                f'data={self.path}, without "folder:"'
            ) from None
        except OSError as error:
            where = error.filename or self.path
            raise UserError(f'{shown(where)} cannot be read: {first_line(error)}') from None
        left.empty = [name for name, files in zip(classes, found, strict=True) if not files]
        self.left_out = left.describe()
        if len(left.empty) == len(classes):
            raise UserError(f'{self.path} holds no images ({self.left_out})')
        _check_classes(self.path, [name for name in classes if name not in left.empty])
        self._names = [name for files in found for name in files]
        counts = [len(files) for files in found]
        self.labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
        if is_one_class:
            classes = [os.path.basename(self.path)]
        self.class_names = tuple(map(escaped, classes))
        self.num_classes = len(classes)

    def _classes(self, left: LeftOut) -> list[str]:
        """Lists the directories of the classes, sorted, and counts what lies beside them."""
        classes = []
        for entry in os.scandir(self.path):
            if is_of_system(entry.name):
                left.hidden += 1
            elif entry.is_dir():
                classes.append(entry.name)
            elif is_image(entry.name):
                left.outside += 1
            else:
                left.takes(entry.name)
        return sorted(classes)

    def _list(self, name: str, left: LeftOut) -> list[str]:
        """Lists the image files of a class, as paths below PATH, and counts what is left out.

        The name '' stands for the directory itself.
        """
        files = []
        listed = {os.path.realpath(self.path)} if name else set()
        waiting = [name]
        while waiting:
            inside = waiting.pop(0)
            real = os.path.realpath(os.path.join(self.path, inside))
            if real in listed:  # a link leads back, or a second one leads here
                continue
            listed.add(real)
            for entry in sorted(os.scandir(real), key=lambda entry: entry.name):
                path = os.path.join(inside, entry.name)
                if entry.is_dir() and not is_of_system(entry.name):
                    waiting.append(path)
                elif entry.is_dir():
                    left.hidden += 1
                elif left.takes(path) and (entry.is_file() or entry.is_symlink()):
                    files.append(path)
        return sorted(files)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            with open(self.file(i), 'rb') as f:
                return {'image': f.read(), 'label': self.labels[i]}
        except OSError as error:
            where = f'{self.path}/{self.name(i)}'
            raise UserError(f'{where} cannot be read: {first_line(error)}') from None

    def captions(self, i: int) -> tuple[str, ...]:
        """Reads the captions of image i, the lines of NAME.txt or NAME.TXT; () without such a file.

        Raises:
          BrokenCaptionError: the file is no text in UTF-8.
          UserError: it cannot be read.
        """
        stem = os.path.splitext(self.file(i))[0]
        for place in (f'{stem}.txt', f'{stem}.TXT'):
            try:
                with open(place, encoding='utf-8-sig') as f:
                    return columns.captions_of(place, f.read().split('\n'))
            except (FileNotFoundError, IsADirectoryError):
                continue
            except UnicodeDecodeError as error:
                raise BrokenCaptionError(
                    f'{shown(place)} is no text in UTF-8: {error.reason}'
                ) from None
            except OSError as error:
                raise UserError(f'{shown(place)} cannot be read: {first_line(error)}') from None
        return ()

    def file(self, i: int) -> str:
        """Gives the path of image file i."""
        return os.path.join(self.path, self._names[i])

    def name(self, i: int) -> str:
        """Gives the path of image file i below PATH."""
        return escaped(self._names[i])


# ---- ArrayRecord


_NAMES = 'names.json'


class ArrayRecords:
    """A directory that `pack` wrote: ArrayRecord files, and images.json.

    A record is {'image': bytes, 'label': int, 'name': str}. Damage to a record is noticed when it
    is read. The names stand in names.json once more, so that a table of captions finds its images
    without a pass over all of them.

    Attributes:
      num_classes: number of classes.
      class_names: the classes' names, or None.
      left_out: ''.
    """

    left_out = ''

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a directory.

        Args:
          path: the directory.

        Raises:
          UserError: see `array_records.RecordFiles`. `source[i]` raises it where the record is
            damaged.
        """
        self._records = array_records.RecordFiles(path, array_records.IMAGES)
        self.num_classes = self._records.num_classes
        self.class_names = self._records.class_names

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self._records[i]
        return {'image': record['image'], 'label': np.int32(record['label'])}

    @functools.cached_property
    def _names(self) -> list[str] | None:
        """The names of all entries, None in a directory without names.json."""
        path = os.path.join(self._records.path, _NAMES)
        if not os.path.exists(path):
            return None
        try:
            with open(path) as f:
                names = json.load(f)
        except (OSError, ValueError, RecursionError):
            names = None
        are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not are_names or len(names) != len(self):
            raise UserError(f'{path} is damaged: remove it, and names are read with the images')
        return names

    def name(self, i: int) -> str:
        """Gives the name that the packed source had for entry i."""
        if self._names is None:
            return self._records[i]['name']
        return self._names[i]


def pack(
    source: Images,
    directory: str | os.PathLike[str],
    shards: int = 128,
    progress: Progress = lambda done, total: None,
) -> None:
    """Copies a source to a directory that `ArrayRecords` reads: same order, labels and bytes.

    Args:
      source: the images.
      directory: the directory to make; it must not exist. See `array_records.write`.
      shards: number of files, at most one for each image. If ImageNet is packed into 128 files,
        each has 1.1 GB.
      progress: called as progress(done, total), in images.

    Raises:
      UserError: see `array_records.write`; or the source raises it.
    """
    n = len(source)
    names = []

    def record(i: int) -> dict[str, Any]:
        entry = source[i]
        names.append(source.name(i))
        return {'image': entry['image'], 'label': int(entry['label']), 'name': names[-1]}

    def about(directory: str) -> dict[str, Any]:
        with open(os.path.join(directory, _NAMES), 'w') as f:
            json.dump(names, f)
        return {'num_classes': source.num_classes, 'class_names': source.class_names}

    records = map(record, range(n))
    array_records.write(directory, array_records.IMAGES, records, n, shards, about, progress)


# ---- TFDS


def _image_and_label(tfds: Any, info: Any) -> tuple[str, str]:
    """Finds the keys of the image and of the label of a data set, a `tfds.core.DatasetInfo`.

    Raises:
      UserError: the data set has no uint8 image with a class label.
    """
    features = info.features
    keys = info.supervised_keys or ('image', 'label')
    match [features[key] if isinstance(key, str) and key in features else None for key in keys]:
        case [tfds.features.Image(np_dtype=np.uint8), tfds.features.ClassLabel()]:
            return keys
    raise UserError(
        f'{info.full_name} has no uint8 image with a class label, but {", ".join(features)}'
    )


class TFDS:
    """A split of a TFDS data set as it was prepared: the encoded images, without TensorFlow.

    The data set must be stored as array_record; TFDS's own default is tfrecord, which has no random
    access. It must have a uint8 image and a class label: its supervised keys, or else 'image' and
    'label'.

    The data set is not prepared here. With TFDS 4.9.10 TensorFlow is needed to prepare
    imagenet2012, mnist and all others whose code opens files through it, and for
    `tfds.ImageFolder`. It is not needed to read them once prepared, nor to prepare a
    `GeneratorBasedBuilder` of one's own with file_format='array_record' that yields encoded images.

    Attributes:
      num_classes: number of classes.
      class_names: the label's names.
      left_out: ''.
    """

    left_out = ''

    def __init__(
        self,
        name: str,
        split: str = 'train',
        data_dir: str | os.PathLike[str] | None = None,
    ):
        """Opens a split of a prepared data set.

        Args:
          name: the data set, as 'imagenet2012:5.1.0'.
          split: the split, as 'train' or 'train[:90%]'.
          data_dir: where data sets are kept, ~/tensorflow_datasets if None.

        Raises:
          UserError: TFDS is not installed, or the data set is not prepared, stored otherwise, or of
            another kind. `source[i]` raises it where the entry is damaged or has no label.
        """
        try:
            # Imported here, because it takes seconds.
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f'TFDS cannot be imported ({error})') from None
        self._arguments = (name, split, data_dir)
        builder_arguments = f"{name!r}, data_dir={data_dir!r}, file_format='array_record'"
        again = (
            f'tfds.builder({builder_arguments}).download_and_prepare(), '
            'where TensorFlow is installed'
        )
        try:
            builder = tfds.builder(name, data_dir=data_dir)
            if not builder.is_prepared():
                raise UserError(f'{name} is not prepared in {builder.data_dir}: run {again}')
            self._keys = _image_and_label(tfds, builder.info)
            skip = {
                key: tfds.decode.SkipDecoding()
                for key, feature in builder.info.features.items()
                if isinstance(feature, tfds.features.Image)
            }
            self._data = builder.as_data_source(split, decoders=skip)
        except NotImplementedError:
            where = builder.data_dir
            raise UserError(
                f'{where} is not stored as array_record: move it away, and run {again}'
            ) from None
        except ImportError as error:
            raise UserError(f'TFDS cannot read {name} ({first_line(error)}): run {again}') from None
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise UserError(f'TFDS cannot read {name}, split {split}: {reason}') from None
        label = builder.info.features[self._keys[1]]
        self.num_classes: int = label.num_classes
        self.class_names: tuple[str, ...] = tuple(label.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return TFDS, self._arguments

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]
        try:
            entry = self._data[i]
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f'{self.name(i)} is damaged: {first_line(error)}') from None
        image, label = (entry[key] for key in self._keys)
        if label < 0:
            raise UserError(f'{self.name(i)} has no label')
        return {'image': image, 'label': np.int32(label)}

    def name(self, i: int) -> str:
        """Names entry i by the data set, the split and its number."""
        name, split, _ = self._arguments
        return f'{name} {split} [{range(len(self))[i]}]'


# ---- a part of a source


class Part:
    """Some of the images of a source, in its order; else it is like the source."""

    def __init__(self, source: Images, chosen: np.ndarray):
        """Takes entries of a source.

        Args:
          source: the source.
          chosen: the numbers of the entries, (n,) ints, ascending.
        """
        self._source = source
        self._chosen = chosen
        self.num_classes = source.num_classes
        self.left_out = source.left_out

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the source's classes."""
        return self._source.class_names

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._source[int(self._chosen[i])]

    def name(self, i: int) -> str:
        """Gives the source's name of entry i of this part."""
        return self._source.name(int(self._chosen[i]))

    @property
    def hashes(self) -> np.ndarray:
        """The hashes of the entries, see `hashes`."""
        return hashes(self._source)[self._chosen]


# Sources that do not grow, and whose names cost a read each or change with the directory.
_BY_NUMBER = (ImageNetTar, ArrayRecords, HuggingFace)


def hashes(source: Images) -> np.ndarray:
    """A hash of each entry's name, (n,) uint64, by which images are held out.

    ImageNet's tar, ArrayRecord files and `datasets` have hashes of the numbers of their entries.
    Latents have those of the images that they were encoded from, and parts and captioned images
    those of the source that they are made of.

    Args:
      source: the images.
    """
    own = getattr(source, 'hashes', None)
    if own is not None:
        return own
    found = np.empty(len(source), np.uint64)
    for i in range(len(source)):
        name = str(i) if isinstance(source, _BY_NUMBER) else source.name(i)
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        found[i] = int.from_bytes(digest, 'big')
    return found


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 … count − 1, spread evenly, so that all classes are met."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def split(source: Images, share: float) -> tuple[Images, Images | None]:
    """Holds a share of a source's images out.

    The hash of an image's name alone decides, for a folder that of its path below the folder. So
    an image stays on its side when others are added or removed; see `hashes`.

    Args:
      source: the images.
      share: about this share is held out, in [0, 1).

    Returns:
      (the images to train on, those held out). None in place of the second where there would be
        none in one of the two, as with a share of 0.
    """
    if not share:
        return source, None
    out = hashes(source) < np.uint64(share * 2**64)
    if out.all() or not out.any():
        return source, None
    return Part(source, np.flatnonzero(~out)), Part(source, np.flatnonzero(out))


def open_source(
    kind: str,
    path: str,
    split: str = 'train',
    data_dir: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
    needs_labels: bool = True,
) -> Images:
    """Opens a source by the name of its kind.

    Args:
      kind: one of KINDS, or 'latents', which are a source without images, see `latents.Latents`.
      path: the tar or the directory, where ~ is the user's own; for tfds and hf the name of the
        data set.
      split: the split of the data set, for tfds and hf only.
      data_dir: where data sets are kept, for tfds and hf only.
      progress: called while an index is made, for imagenet and webdataset; see `ImageNetTar`.
      needs_labels: whether images of hf, webdataset and parquet are refused, and some of a folder
        left out, where their labels cannot be told. If not, all are then a single class.

    Returns:
      The source.

    Raises:
      UserError: the images cannot be opened, see the classes.
    """
    if kind == 'latents':
        return Latents(os.path.expanduser(path))
    known = {
        'split': split,
        'data_dir': None if data_dir is None else os.path.expanduser(data_dir),
        'progress': progress,
        'needs_labels': needs_labels,
    }
    options = {name: known[name] for name in _OPTIONS.get(kind, ())}
    place = path if kind in _NAMED else os.path.expanduser(path)
    return KINDS[kind](place, **options)


def is_name(kind: str, path: str | None) -> bool:
    """Tells whether the path of a kind of data is the name of a data set of TFDS or of a hub."""
    if kind == 'hf':
        return path is None or not os.path.isdir(os.path.expanduser(path))
    return kind == 'tfds'


def require_images(kind: str, path: str) -> None:
    """Raises UserError where a kind of data has latents in place of images."""
    if kind == 'latents':
        raise UserError(
            f'{path} holds latents, not images: only a training of the AR model reads them'
        )


def check_split(kind: str, split: str | None, data_dir: str | None) -> None:
    """Raises UserError where a command names a split or a `data_dir` of data that have neither."""
    for name, value in (('split', split), ('data_dir', data_dir)):
        if value is not None and kind not in _NAMED:
            raise UserError(
                f'--{name} is for {" and ".join(_NAMED)}: of data {kind} name the files or '
                "directory in --data, as webdataset:'DIR/test-*.tar'"
            )


KINDS: dict[str, Callable[..., Images]] = {
    'imagenet': ImageNetTar,
    'folder': ImageFolder,
    'array_records': ArrayRecords,
    'tfds': TFDS,
    'hf': HuggingFace,
    'webdataset': WebDataset,
    'parquet': Parquet,
    'emoji': Emoji,
}
# The arguments of `open_source` that sources take besides a path.
_OPTIONS = {
    'imagenet': ('progress',),
    'folder': ('needs_labels',),
    'tfds': ('split', 'data_dir'),
    'hf': ('split', 'data_dir', 'needs_labels'),
    'webdataset': ('progress', 'needs_labels'),
    'parquet': ('needs_labels',),
}
# Sources whose path may be the name of a data set.
_NAMED = ('tfds', 'hf')
