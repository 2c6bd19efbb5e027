"""Data sets of Hugging Face's library `datasets`, from its hub or from a directory.

Dimensions:
  n  rows
"""

import importlib
import os
from typing import Any

import numpy as np

from sphere_ar_jax.data.files import columns
from sphere_ar_jax.data.files.listing import escaped, first_names
from sphere_ar_jax.runtime.console import UserError, first_line

# Files of a directory that `save_to_disk` wrote.
_SAVED = ('state.json', 'dataset_dict.json')


def _library() -> Any:
    """The module datasets.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module('datasets')
    except ImportError as error:
        raise UserError(
            f"data=hf:NAME needs datasets: pip install 'sphere_ar_jax[hf]' ({first_line(error)})"
        ) from None


def _load(name: str, split: str, cache: str | None) -> Any:
    """Opens a split as a `datasets.Dataset`; see `HuggingFace`."""
    datasets = _library()
    where = os.path.expanduser(name)
    try:
        if not any(os.path.exists(os.path.join(where, file)) for file in _SAVED):
            place = name
            config = ''
            if not os.path.isdir(where):
                place, _, config = name.partition(':')
            return datasets.load_dataset(
                os.path.expanduser(place), config or None, split=split, cache_dir=cache
            )
        found = datasets.load_from_disk(where)
        if isinstance(found, datasets.Dataset):
            # One that was never part of a data set with splits has none.
            found = {split if found.split is None else str(found.split): found}
        if split not in found:
            known = first_names(list(found), 6)
            raise UserError(f'{name} has no split {split!r}, but {known}: give --config.data.split')
        return found[split]
    except UserError:
        raise
    except Exception as error:  # the library and its network raise many kinds
        raise UserError(
            f'{name}, split {split!r}, cannot be opened by datasets '
            f'({type(error).__name__}: {first_line(error, 300)}): give a name of the hub, '
            'NAME:CONFIG or a directory, and --config.data.split'
        ) from None


def _columns(features: Any, where: str, needs_labels: bool) -> tuple[str, str | None]:
    """The names of the columns of the images and of the labels, None without labels.

    A column of class labels goes before others. One that is named 'label' holds labels, whatever
    its type. Integers of another name are labels only where labels are needed, since they may be
    widths or numbers.

    Raises:
      UserError: there is no column of images, or several for one of the two that is needed.
    """
    datasets = _library()
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image = columns.choose(where, 'images', images, 'image')
    if image is None:
        raise UserError(
            f'{where} has no column of images, but {first_names(list(features), 6)}: '
            'dataset.cast_column(NAME, datasets.Image()) makes one of bytes or paths'
        )
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not labels and 'label' in features and image != 'label':
        labels = ['label']
    elif not labels and needs_labels:
        labels = [
            name
            for name, kind in features.items()
            if isinstance(kind, datasets.Value) and kind.dtype.lstrip('u').startswith('int')
        ]
    return image, columns.choose(where, 'labels', labels, 'label', needs_labels)


class HuggingFace:
    """A split of a data set that `datasets` opens: the encoded images, and class labels or numbers.

    The columns are found by their types, `Image` and `ClassLabel` or integers, or by the name
    'label'. Without a column of labels all images are a single class.

    Attributes:
      num_classes: number of classes.
      class_names: the label's names, or None.
      left_out: ''.
    """

    left_out = ''

    def __init__(
        self,
        name: str | os.PathLike[str],
        split: str = 'train',
        data_dir: str | os.PathLike[str] | None = None,
        needs_labels: bool = True,
    ):
        """Opens a split. What `datasets` has not prepared yet it fetches and prepares.

        Args:
          name: a name of the hub, as 'uoft-cs/cifar10' or 'NAME:CONFIG'; a directory of Parquet or
            image files, as `datasets` reads them; or one that `save_to_disk` wrote.
          split: the split, as 'train' or 'train[:90%]'.
          data_dir: where `datasets` keeps what it prepares, its default if None.
          needs_labels: whether labels that cannot be told are an error. If not, all images are then
            a single class.

        Raises:
          UserError: `datasets` is not installed or cannot open the split, or columns or labels
            that are needed cannot be told. `source[i]` raises it where an image cannot be read.
        """
        self._name = os.fspath(name)
        self._split = split
        place = os.path.expanduser(self._name)
        # A directory may be moved, or its path be written in another way.
        is_here = os.path.isdir(place)
        self._shown_name = os.path.basename(os.path.abspath(place)) if is_here else self._name
        cache = None if data_dir is None else os.fspath(data_dir)
        # A set may have been saved with a format, in which lists of texts become arrays.
        found = _load(self._name, split, cache).with_format(None)
        where = f'{self._name} {split}'
        image, label = _columns(found.features, where, needs_labels)
        if not len(found):
            raise UserError(f'{where} has no images')
        undecoded = found.select_columns([image])
        self._data = undecoded.cast_column(image, _library().Image(decode=False))
        self._column = image
        texts = [name for name in columns.CAPTIONS if name in found.features]
        self._texts = found.select_columns(texts) if texts else None

        def read() -> columns.Labels | None:
            if label is None:
                return None
            table = found.select_columns([label]).with_format('arrow')[:]
            names = getattr(found.features[label], 'names', None)
            return columns.labels_of(where, table.column(0).to_pylist(), names)

        own_name = os.path.basename(self._name.rstrip('/'))
        labels = columns.or_one_class(read, needs_labels, len(found), own_name)
        self._labels, self.num_classes, self.class_names = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        label = self._labels[i]
        try:
            image = self._data[range(len(self))[i]][self._column]
            # A cell without an image is an empty one, which is broken as an empty file is.
            content = b'' if image is None else image['bytes']
            if content is None:
                with open(image['path'], 'rb') as file:
                    content = file.read()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'{self.name(i)} cannot be read: {first_line(error)}') from None
        return {'image': content, 'label': np.int32(label)}

    def captions(self, i: int) -> tuple[str, ...]:
        """Reads the captions of row i, of the first column of `columns.CAPTIONS` that has some.

        Raises:
          UserError: there is no such column.
          BrokenCaptionError: the row has something else than a text.
        """
        if self._texts is None:
            raise UserError(
                f'{self._name} {self._split} has no column {", ".join(columns.CAPTIONS)}: '
                'dataset.rename_column(NAME, "text") names the one to take'
            )
        texts = self._texts
        return columns.captions_of_row(self.name(i), lambda: texts[range(len(self))[i]])

    def name(self, i: int) -> str:
        """Names row i by the data set, the split and its number, as 'uoft-cs/cifar10 train [17]'.

        A directory goes by its own name, without the path to it.
        """
        return escaped(f'{self._shown_name} {self._split} [{range(len(self))[i]}]')
