"""Parquet files with a column of encoded images, as Hugging Face's data sets have them.

Dimensions:
  n  rows of all files
"""

import contextlib
import functools
import importlib
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sphere_ar_jax.data.files import columns
from sphere_ar_jax.data.files.listing import data_files, escaped, first_names, shown
from sphere_ar_jax.runtime.console import UserError, first_line

# Row groups that were read are kept up to about so many bytes, in each process.
_KEPT = 2**28


def _pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
      UserError: they are not installed.
    """
    try:
        return importlib.import_module('pyarrow'), importlib.import_module('pyarrow.parquet')
    except ImportError:
        raise UserError(
            "Parquet files need pyarrow: pip install 'sphere_ar_jax[parquet]'"
        ) from None


def _is_image(pa: Any, kind: Any) -> bool:
    """Whether a column's type is that of encoded images: bytes, or a struct with bytes in it."""
    if pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
        kind = kind.field('bytes').type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(pa: Any, schema: Any, field: Any, needs_labels: bool) -> bool:
    """Whether a column may hold labels.

    One that is named 'label' does, whatever its type. Integers of another name are labels where the
    file notes names of classes, or where labels are needed: else they may be widths or numbers.
    """
    if field.name == 'label':
        return True
    named = _names(schema, field.name) is not None
    return pa.types.is_integer(field.type) and (needs_labels or named)


def _columns(pa: Any, schema: Any, where: str, needs_labels: bool) -> tuple[str, str | None]:
    """The names of the columns of the images and of the labels, None without labels.

    Raises:
      UserError: there is no column of images, or several for one of the two that is needed.
    """
    images = [field.name for field in schema if _is_image(pa, field.type)]
    image = columns.choose(where, 'images', images, 'image')
    if image is None:
        raise UserError(
            f'{where} has no column of image bytes, but {first_names(schema.names, 6)}: '
            'write images as bytes, or as structs of bytes and path'
        )
    labels = [
        field.name
        for field in schema
        if field.name != image and _holds_labels(pa, schema, field, needs_labels)
    ]
    return image, columns.choose(where, 'labels', labels, 'label', needs_labels)


def _names(schema: Any, label: str) -> list[str] | None:
    """The names of the classes that Hugging Face's `datasets` notes in a file's schema."""
    try:
        noted = json.loads(schema.metadata[b'huggingface'])
        return list(map(str, noted['info']['features'][label]['names']))
    except (KeyError, TypeError, ValueError):
        return None


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Makes UserErrors of what pyarrow raises while a file is read."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own are among these
        raise UserError(f'{shown(path)} cannot be read: {first_line(error)}') from None


class _Contents(NamedTuple):
    """What is known of a file before images are read.

    Attributes:
      rows: the number of rows of each row group.
      size: bytes of all columns, uncompressed.
      labels: the values of the column of labels; empty where there is none.
      texts: the columns of captions that it has.
    """

    rows: list[int]
    size: int
    labels: list[Any]
    texts: list[str]


def _contents(path: str, image: str, label: str | None) -> _Contents:
    """Reads the labels of a file, and how its rows lie in it.

    Raises:
      UserError: the file cannot be read, or has not these columns.
    """
    _, parquet = _pyarrow()
    with _reading(path), parquet.ParquetFile(path) as file:
        for column in (image, label):
            if column is not None and column not in file.schema_arrow.names:
                raise UserError(
                    f'{shown(path)} has no column {column!r}, which other files have: '
                    'give files that belong together'
                )
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        labels = [] if label is None else file.read(columns=[label]).column(label).to_pylist()
        size = sum(group.total_byte_size for group in groups)
        texts = [name for name in columns.CAPTIONS if name in file.schema_arrow.names]
        return _Contents([group.num_rows for group in groups], size, labels, texts)


class Parquet:
    """The rows of Parquet files, each with an encoded image and a label or captions.

    Images are bytes, or structs with `bytes` in them. Labels are integers or texts; without a
    column of labels all rows are a single class. Captions are texts or lists of texts, in columns
    of the names `columns.CAPTIONS`, of which each file may have others. Labels are read when the
    files are opened, images and captions when they are needed.

    Parquet has no access to a single row: an image costs the reading of its row group. Row groups
    that were read are kept up to 256 MiB in each process. Where they are larger, `pack` the images.

    Attributes:
      num_classes: number of classes.
      class_names: the names that the files note, or those of texts, sorted; else None.
      left_out: ''.
    """

    left_out = ''

    def __init__(self, path: str | os.PathLike[str], needs_labels: bool = True):
        """Opens files.

        Args:
          path: a file, a directory of files *.parquet, or a pattern, see `listing.data_files`.
          needs_labels: whether labels that cannot be told are an error. If not, all images are then
            a single class.

        Raises:
          UserError: pyarrow is not installed, there are no files or no images, columns or labels
            that are needed cannot be told, or files have other columns than the first one.
            `source[i]` raises it where a row has no image or a file cannot be read any more.
        """
        pa, parquet = _pyarrow()
        where = shown(os.path.abspath(path))
        self._paths = data_files(os.fspath(path), '.parquet', 'parquet')
        with _reading(self._paths[0]), parquet.ParquetFile(self._paths[0]) as file:
            schema = file.schema_arrow
        self._image, label = _columns(pa, schema, shown(self._paths[0]), needs_labels)
        files = [_contents(file_path, self._image, label) for file_path in self._paths]
        self._texts = [file.texts for file in files]
        # (file, row group of it) of each row group.
        self._groups = [
            (k, group) for k, file in enumerate(files) for group in range(len(file.rows))
        ]
        # The number of the first row of each row group, and of each file.
        rows = [count for file in files for count in file.rows]
        self._firsts = np.cumsum([0, *rows], dtype=np.int64)
        self._first_of_file = np.cumsum([0, *(sum(file.rows) for file in files)], dtype=np.int64)
        n = int(self._firsts[-1])
        if not n:
            raise UserError(f'{where} has no rows')

        def read() -> columns.Labels | None:
            if label is None:
                return None
            values = [value for file in files for value in file.labels]
            return columns.labels_of(where, values, _names(schema, label))

        own_name = os.path.basename(os.path.abspath(path))
        labels = columns.or_one_class(read, needs_labels, n, own_name)
        self._labels, self.num_classes, self.class_names = labels
        total = sum(file.size for file in files)
        self._kept = max(1, _KEPT * len(self._groups) // max(total, 1))
        self._remember()

    def _remember(self) -> None:
        """Sets what reads a row group by its number, and keeps those that it read last."""
        self._read = functools.lru_cache(self._kept)(self._read_images)
        self._read_texts = functools.lru_cache(self._kept)(self._read_captions)

    def _table(self, number: int, names: list[str]) -> Any:
        """Reads columns of a row group."""
        _, parquet = _pyarrow()
        file_number, group = self._groups[number]
        path = self._paths[file_number]
        # Opened each time: threads cannot share a file, and there may be many of them.
        with _reading(path), parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=names)

    def _read_images(self, number: int) -> Any:
        """Reads the images of a row group."""
        pa, _ = _pyarrow()
        images = self._table(number, [self._image]).column(0).combine_chunks()
        return images.field('bytes') if pa.types.is_struct(images.type) else images

    def _read_captions(self, number: int) -> Any:
        """Reads the captions of a row group: a table of the columns that its file has."""
        file_number, _ = self._groups[number]
        return self._table(number, self._texts[file_number])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith('_read')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def __len__(self) -> int:
        return len(self._labels)

    def _place(self, i: int) -> tuple[int, int]:
        """The number of the row group of row i, and the row's place in it."""
        i = range(len(self))[i]
        number = int(np.searchsorted(self._firsts, i, side='right')) - 1
        return number, i - int(self._firsts[number])

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, row = self._place(i)
        # A cell without an image is an empty one, which is broken as an empty file is.
        image = self._read(number)[row].as_py() or b''
        return {'image': image, 'label': self._labels[i]}

    def captions(self, i: int) -> tuple[str, ...]:
        """Reads the captions of row i, of the first column of `columns.CAPTIONS` that has some.

        Raises:
          UserError: no file has such a column, or this one cannot be read.
          BrokenCaptionError: the row has something else than a text.
        """
        if not any(self._texts):
            raise UserError(
                f'{shown(self._paths[0])} has no column {", ".join(columns.CAPTIONS)}: give the '
                'column of captions one of these names'
            )
        number, row = self._place(i)
        found = self._read_texts(number)

        def read() -> dict[str, Any]:
            return {name: found.column(name)[row].as_py() for name in found.column_names}

        return columns.captions_of_row(self.name(i), read)

    def name(self, i: int) -> str:
        """Names row i by its file and its number in it, as 'train-00000-of-00002.parquet [17]'."""
        number, row = self._place(i)
        file, _ = self._groups[number]
        row += int(self._firsts[number] - self._first_of_file[file])
        return escaped(f'{os.path.basename(self._paths[file])} [{row}]')
