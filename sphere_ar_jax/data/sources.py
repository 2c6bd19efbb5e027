"""Labelled images, as their files hold them: the tar of ImageNet, directories, ArrayRecord, TFDS.

A source is a random-access sequence: `len(source)`, and `source[i]`, a dictionary of
  image   bytes of one encoded image file (JPEG, PNG, …; it may be broken)
  label   np.int32 (), 0 … num_classes − 1
with the attributes `num_classes` and `class_names` (a tuple of str, for ImageNet the synsets, or
None), and `name(i)`, a str to tell entry i by in messages. Threads may share a source, and
processes get it by pickle, without its open files. What is wrong with the data is a `UserError`, on
opening wherever it shows there.

  KINDS   the sources by name      pack   any source → the files of `ArrayRecords`

Dimensions:
  n  entries      k  classes      H, W  height and width of an image
"""

import json
import os
import tarfile

import filelock
import msgpack
import numpy as np

from sphere_ar_jax.data.tar_index import BLOCK, IMAGE_SUFFIXES, open_index, printable
from sphere_ar_jax.runtime.console import UserError, first_line


class ImageNetTar:
    """ILSVRC2012_img_train.tar as it is fetched: a tar of a tar for each synset, which is not
    unpacked.

    Every image is one read at an offset that an index holds. The index is made when the tar is
    opened for the first time, by a walk over all headers, and kept beside the tar as
    `TAR.index.npz`, or, where nothing can be written there, in ~/.cache/sphere_ar_jax. It is made
    anew when the tar's size, time of change or synset headers differ. The header in front of each
    image is read with it and must be the one that the index saw.

    Order: the tar's. Labels: the places of the synsets, sorted. If there are 1,000 they must be
    ILSVRC2012's; fewer are taken as they are.

    Args:
      path: of the tar.
      progress: called as progress(done, total), in bytes, after each synset while the index is
        made.
    Raises:
      UserError: it is not there, cannot be read, is not of this make, or is damaged or cut off.
        From `source[i]`: it has changed since.
    """

    def __init__(self, path, progress=lambda done, total: None):
        self.path = os.path.abspath(path)
        self._open()
        index = open_index(self.path, self._file.fileno(), progress)
        self._offsets, self._sizes, self._labels, self._checksums = (
            index[key] for key in ('offsets', 'sizes', 'labels', 'checksums')
        )
        self.class_names = tuple(index['synsets'].tolist())
        self.num_classes = len(self.class_names)

    def _open(self):
        try:
            self._file = open(self.path, 'rb', buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f'{self.path} cannot be read: {first_line(error)}') from None

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != '_file'}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return len(self._labels)

    def _read(self, i, size):
        """The header of entry i and `size` bytes of its data."""
        return os.pread(self._file.fileno(), BLOCK + size, int(self._offsets[i]) - BLOCK)

    def __getitem__(self, i):
        size = int(self._sizes[i])
        block = self._read(i, size)
        try:
            seen = tarfile.TarInfo.frombuf(block[:BLOCK], 'utf-8', 'surrogateescape')
        except tarfile.TarError:
            seen = None
        if (
            len(block) != BLOCK + size
            or seen is None
            or (seen.size, seen.chksum) != (size, self._checksums[i])
        ):
            raise UserError(f'{self.path} has changed since it was opened: start again')
        return {'image': block[BLOCK:], 'label': self._labels[i]}

    def name(self, i):
        """As 'n01440764/n01440764_10026.JPEG', read from the tar: at most 100 bytes; of a pax tar,
        its ASCII form.
        """
        name = self._read(i, 0)[:100].split(b'\0')[0].decode('utf-8', 'surrogateescape')
        return f'{self.class_names[self._labels[i]]}/{printable(name)}'


# ---- directories


class ImageFolder:
    """A directory of a directory for each class, as PATH/CLASS/…/NAME.jpg.

    Order: sorted, class by class. Labels: the places of the classes, sorted. Files are told by
    their suffix, in upper or lower case; what begins with a dot is not looked at.

    Raises:
      UserError: there are no classes, one without images, or it cannot be read. From `source[i]`: a
        file is gone.
    """

    def __init__(self, path):
        self.path = os.path.abspath(path)
        try:
            classes = sorted(
                e.name for e in os.scandir(self.path) if e.is_dir() and not e.name.startswith('.')
            )
            found = [self._list(name) for name in classes]
        except OSError as error:
            raise UserError(
                f'{error.filename or self.path} cannot be read: {first_line(error)}'
            ) from None
        if not classes:
            raise UserError(f'{self.path} has no directories, but must have one for each class')
        for name, files in zip(classes, found, strict=True):
            if not files:
                raise UserError(
                    f'{self.path}/{printable(name)} holds no images: fill it, or remove it'
                )
        self._names = [name for files in found for name in files]
        self._labels = np.repeat(
            np.arange(len(classes), dtype=np.int32), [len(files) for files in found]
        )
        self.class_names, self.num_classes = tuple(map(printable, classes)), len(classes)

    def _list(self, name):
        """The image files of a class, as paths below PATH."""

        def fail(error):
            raise error

        files = []
        for directory, below, names in os.walk(os.path.join(self.path, name), onerror=fail):
            below[:] = [n for n in below if not n.startswith('.')]
            names = [
                n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith('.')
            ]
            directory = os.path.relpath(directory, self.path)
            files += [os.path.join(directory, n) for n in names]
        return sorted(files)

    def __len__(self):
        return len(self._names)

    def __getitem__(self, i):
        try:
            with open(os.path.join(self.path, self._names[i]), 'rb') as f:
                return {'image': f.read(), 'label': self._labels[i]}
        except OSError as error:
            raise UserError(
                f'{self.path}/{self.name(i)} cannot be read: {first_line(error)}'
            ) from None

    def name(self, i):
        """The path of an image file below PATH."""
        return printable(self._names[i])


# ---- ArrayRecord

_METADATA = 'images.json'
_METADATA_KEYS = ('format', 'files', 'num_classes', 'class_names')
_FORMAT = 'sphere_ar_jax images 1'


class ArrayRecords:
    """A directory that `pack` wrote: ArrayRecord files, and images.json, which is written last and
    says what they hold.

    A record is a msgpack of {'image': bytes, 'label': int, 'name': str}. Damage to one is noticed
    when it is read.

    Raises:
      UserError: it is not there, not packed to the end, or a file is missing or of another length.
        From `source[i]`: the record is damaged.
    """

    def __init__(self, path):
        from array_record.python import (
            array_record_data_source,
        )  # of Grain, where there is any: not on Windows

        self.path = os.path.abspath(path)
        try:
            with open(os.path.join(self.path, _METADATA)) as f:
                about = json.load(f)
            made, files, self.num_classes, names = (about[key] for key in _METADATA_KEYS)
        except FileNotFoundError:
            raise UserError(
                f'{self.path} has no {_METADATA}: it was not packed, or not to the end'
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{self.path}/{_METADATA} is damaged: {first_line(error)}') from None
        if made != _FORMAT:
            raise UserError(
                f'{self.path} is of the format {made!r}, but must be {_FORMAT!r}: pack it again'
            )
        self.class_names = names and tuple(names)
        try:
            for name, size in files.items():
                if os.path.getsize(os.path.join(self.path, name)) != size:
                    raise UserError(
                        f'{self.path}/{name} has not the {size:,} bytes that it was packed with'
                    )
            paths = [os.path.join(self.path, name) for name in files]
            self._records = array_record_data_source.ArrayRecordDataSource(paths)
        except (OSError, RuntimeError) as error:
            raise UserError(f'{self.path} cannot be read: {first_line(error)}') from None

    def __len__(self):
        return len(self._records)

    def _record(self, i):
        i = range(len(self))[i]
        try:
            return msgpack.unpackb(self._records[i])
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f'{self.path}: record {i} is damaged: {first_line(error)}') from None

    def __getitem__(self, i):
        record = self._record(i)
        return {'image': record['image'], 'label': np.int32(record['label'])}

    def name(self, i):
        """As the source that was packed named it."""
        return self._record(i)['name']


def pack(source, directory, shards=128, progress=lambda done, total: None):
    """Copies a source to a directory that `ArrayRecords` reads: same order, labels and bytes.

    All is written to DIRECTORY.partial, which becomes the directory when it is whole; what a run
    that was killed has left there is written anew.

    Args:
      directory: must not exist. shards: number of files (of ImageNet, with 128: 1.1 GB each), at
        most one each image.
      progress: called as progress(done, total), in images.
    Raises:
      UserError: the directory exists, cannot be written, or another process is writing it; or from
        the source.
    """
    from array_record.python import array_record_module

    directory, n = os.path.abspath(directory), len(source)
    partial, shards = f'{directory}.partial', min(shards, n)
    if os.path.exists(directory):
        raise UserError(f'{directory} exists: remove it, or take another')
    if shards < 1:
        raise UserError(f'{n} images cannot be packed into {shards} files')
    try:
        os.makedirs(partial, exist_ok=True)
        with filelock.FileLock(os.path.join(partial, 'lock'), timeout=0):
            files = {}
            for name in set(os.listdir(partial)) - {'lock'}:
                os.remove(os.path.join(partial, name))
            for shard in range(shards):
                name = f'images-{shard:05d}-of-{shards:05d}.array_record'
                path = os.path.join(partial, name)
                # Groups of one record for random access, as Grain asks; the images are compressed
                # already.
                writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
                for i in range(n * shard // shards, n * (shard + 1) // shards):
                    entry = source[i]
                    record = {
                        'image': entry['image'],
                        'label': int(entry['label']),
                        'name': source.name(i),
                    }
                    writer.write(msgpack.packb(record))
                    progress(i + 1, n)
                writer.close()
                files[name] = os.path.getsize(path)
            about = {
                'format': _FORMAT,
                'num_classes': source.num_classes,
                'class_names': source.class_names,
            }
            with open(os.path.join(partial, _METADATA), 'w') as f:
                json.dump(about | {'files': files}, f, indent=2)
            os.rename(partial, directory)
            os.remove(os.path.join(directory, 'lock'))
    except filelock.Timeout:
        raise UserError(f'another process is writing {partial}') from None
    except (OSError, RuntimeError) as error:
        raise UserError(f'{directory} cannot be written: {first_line(error)}') from None


# ---- TFDS


def _image_and_label(tfds, info):
    """The keys of the image and of the label of a data set."""
    features, keys = info.features, info.supervised_keys or ('image', 'label')
    match [features[key] if isinstance(key, str) and key in features else None for key in keys]:
        case [tfds.features.Image(np_dtype=np.uint8), tfds.features.ClassLabel()]:
            return keys
    raise UserError(
        f'{info.full_name} has no uint8 image with a class label, but {", ".join(features)}'
    )


class TFDS:
    """A split of a TFDS data set, as it was prepared: the encoded images, without TensorFlow.

    The data set must be stored as array_record (TFDS's own default is tfrecord, which has no random
    access) and have an image, uint8, and a class label: its supervised keys, or else 'image' and
    'label'. It is not prepared here. With TFDS 4.9.10 TensorFlow is needed to prepare imagenet2012,
    mnist and all others whose code opens files through it, and for `tfds.ImageFolder`; not to read
    them once prepared, nor for a `GeneratorBasedBuilder` of one's own with
    file_format='array_record' that yields encoded images.

    Args:
      name: as 'imagenet2012:5.1.0'. split: as 'train' or 'train[:90%]'. data_dir:
        ~/tensorflow_datasets if None.
    Raises:
      UserError: TFDS is not installed, or the data set is not prepared, stored otherwise, or of
        another kind. From `source[i]`: the entry is damaged or has no label.
    """

    def __init__(self, name, split='train', data_dir=None):
        try:
            import tensorflow_datasets as tfds  # seconds to import: only where it is wanted
        except ImportError as error:
            raise UserError(f'TFDS cannot be imported ({error})') from None
        self._arguments = name, split, data_dir
        make = f"tfds.builder({name!r}, data_dir={data_dir!r}, file_format='array_record').download_and_prepare()"
        again = f'{make}, where TensorFlow is installed'
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
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f'TFDS cannot read {name}, split {split}: {first_line(error)}'
            ) from None
        label = builder.info.features[self._keys[1]]
        self.num_classes, self.class_names = label.num_classes, tuple(label.names)

    def __reduce__(self):
        return TFDS, self._arguments

    def __len__(self):
        return len(self._data)

    def __getitem__(self, i):
        i = range(len(self))[i]
        try:
            entry = self._data[i]
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f'{self.name(i)} is damaged: {first_line(error)}') from None
        image, label = (entry[key] for key in self._keys)
        if label < 0:
            raise UserError(f'{self.name(i)} has no label')
        return {'image': image, 'label': np.int32(label)}

    def name(self, i):
        """The data set, the split and the number of an entry."""
        name, split, _ = self._arguments
        return f'{name} {split} [{range(len(self))[i]}]'


def open_source(kind, path, split='train', data_dir=None, progress=lambda done, total: None):
    """The source of a kind of KINDS at a path (of tfds, a name). split, data_dir: of tfds;
    progress: of imagenet.
    """
    if kind == 'tfds':
        return TFDS(path, split, data_dir)
    return ImageNetTar(path, progress=progress) if kind == 'imagenet' else KINDS[kind](path)


KINDS = {
    'imagenet': ImageNetTar,
    'folder': ImageFolder,
    'array_records': ArrayRecords,
    'tfds': TFDS,
}
