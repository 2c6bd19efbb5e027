"""Tars of samples as WebDataset has them: KEY.jpg beside KEY.cls.

Files of a tar whose paths are alike up to the first dot of their names are one sample. The label
stands in KEY.cls, or in KEY.json under the key 'label': a whole number, or the name of a class.
Captions are the lines of KEY.txt, or stand in KEY.json under one of `columns.CAPTIONS`.

Dimensions:
  n  samples that have an image     t  tars
"""

import codecs
import json
import os
import re
import tarfile
from typing import Any

import numpy as np

from sphere_ar_jax.data.files import columns, tar_index
from sphere_ar_jax.data.files.listing import (
    IMAGE_SUFFIXES,
    BrokenCaptionError,
    LeftOut,
    data_files,
    escaped,
    is_of_system,
    shown,
)
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.runtime.types import Progress

_INDEX_VERSION = 'webdataset 5'
_LONGEST_LABEL = 255  # characters
_LONGEST_BLANK = 64  # bytes
_MOST_READ = 2**20  # bytes of a .json that are read for its label
_HEADERS = 64  # images by whose headers a tar is known again


def _read_label(fd: int, member: tarfile.TarInfo, extension: str) -> str | None:
    """Reads the label in a .cls or .json file as text, None where it holds none."""
    if member.size > _MOST_READ:
        return None
    try:
        text = os.pread(fd, member.size, member.offset_data).decode('utf-8-sig')
        if extension == 'json':
            value = json.loads(text)['label']
            text = str(value) if isinstance(value, int | str) else ''
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return text.strip()[:_LONGEST_LABEL] or None


def _is_blank(fd: int, member: tarfile.TarInfo) -> bool:
    """Whether a text holds nothing but white space; longer ones than `_LONGEST_BLANK` do not."""
    if member.size > _LONGEST_BLANK:
        return False
    return not os.pread(fd, member.size, member.offset_data).removeprefix(codecs.BOM_UTF8).strip()


def _build_index(path: str, fd: int) -> dict[str, np.ndarray]:
    """Builds the index of a tar of samples by a walk over all headers.

    Args:
      path: the tar, absolute.
      fd: the tar, open.

    Returns:
      A dictionary of:
      tars: offsets of the headers of some images.
      offsets: (n,) int64, where each image's data begins.
      sizes: (n,) int64, bytes of each image's data.
      checksums: (n,) int64, the checksum that each image's header holds.
      keys: (n,) bytes, the key of each sample, as UTF-8.
      labels: (n,) str, '' where a sample has none.
      texts: (n, 3) int64, where the data of each KEY.txt or else KEY.json begin, their bytes, and
        whether they are JSON; zeros where a sample has none.
      left_out: str, JSON of the hidden and the other files, counted.

    Raises:
      UserError: the tar is damaged, a sample has two images or texts, or the tar changed while it
        was read.
    """
    before = os.fstat(fd)
    tar_index.check_whole(fd, before.st_size, path)
    left = LeftOut()
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    texts: dict[str, tuple[int, int, bool]] = {}
    with open(fd, 'rb', closefd=False) as file, tar_index.open_tar(file, path) as archive:
        for member in tar_index.plain_files(archive, path):
            folder, slash, name = member.name.rpartition('/')
            stem, _, extension = name.partition('.')
            key = f'{folder}{slash}{stem}'
            extension = extension.lower()
            if is_of_system(member.name):
                left.hidden += 1
            elif f'.{extension}' in IMAGE_SUFFIXES:
                if key in images:
                    raise UserError(f'{path} holds two images of the sample {shown(key)}')
                images[key] = member
            else:
                found = None
                if extension in ('cls', 'json'):
                    found = _read_label(fd, member, extension)
                is_text = extension in ('txt', 'json') and not _is_blank(fd, member)
                if is_text and extension == 'txt' and not texts.get(key, (0, 0, True))[2]:
                    raise UserError(f'{path} holds two texts of the sample {shown(key)}')
                if is_text and (extension == 'txt' or key not in texts):
                    texts[key] = (member.offset_data, member.size, extension == 'json')
                if found is None:
                    left.others[f'.{extension}'[:12] if extension else ''] += 1
                elif extension == 'cls' or key not in labels:
                    labels[key] = found
        tar_index.check_end(fd, archive.offset, path)
    tar_index.check_unchanged(fd, before, path)
    members = list(images.values())
    offsets = np.array([member.offset_data for member in members], np.int64)
    spread = np.linspace(0, max(len(members) - 1, 0), min(len(members), _HEADERS)).astype(int)
    return {
        'tars': offsets[spread] - tar_index.BLOCK,
        'offsets': offsets,
        'sizes': np.array([member.size for member in members], np.int64),
        'checksums': np.array([member.chksum for member in members], np.int64),
        'keys': np.array([key.encode('utf-8', 'surrogateescape') for key in images], np.bytes_),
        'labels': np.array([labels.get(key, '') for key in images], np.str_),
        'texts': np.array([texts.get(key, (0, 0, False)) for key in images], np.int64),
        'left_out': np.array(json.dumps({'hidden': left.hidden, 'others': left.others})),
    }


def _values(where: str, texts: list[str]) -> list[int] | list[str]:
    """The labels of samples: whole numbers where all are, else names.

    Raises:
      UserError: some samples have no label.
    """
    missing = texts.count('')
    if missing:
        raise UserError(
            f'{where}: {missing} of {len(texts)} images have no label: '
            'each needs KEY.cls, or KEY.json with the key "label"'
        )
    if all(re.fullmatch(r'-?[0-9]+', text.strip()) for text in texts):
        return [int(text) for text in texts]
    return texts


class WebDataset:
    """The images of WebDataset's tars, read at the offsets that an index of each tar holds.

    The indices are made when the tars are opened for the first time, and are kept as
    `tar_index.kept_index` says. Images are in the order of the sorted tars. Where no sample has a
    label, all are a single class.

    Attributes:
      num_classes: number of classes; where labels are numbers, one more than the largest.
      class_names: the names, sorted, or None where labels are numbers.
      left_out: what the tars hold besides images and labels, with counts.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        progress: Progress = lambda done, total: None,
        needs_labels: bool = True,
    ):
        """Opens tars.

        Args:
          path: a tar, a directory of tars, or a pattern, see `listing.data_files`.
          progress: called as progress(done, total), in bytes, after each tar.
          needs_labels: whether labels that cannot be told are an error. If not, all images are then
            a single class.

        Raises:
          UserError: there are no tars or no images, labels that are needed cannot be told, or a tar
            is damaged. `source[i]` raises it where a tar has changed since.
        """
        where = os.path.abspath(path)
        self._paths = data_files(where, '.tar', 'webdataset')
        total = sum(map(os.path.getsize, self._paths))
        left = LeftOut()
        parts = []
        done = 0
        for tar in self._paths:
            parts.append(self._index(tar))
            counts = json.loads(str(parts[-1]['left_out']))
            left.hidden += counts['hidden']
            left.others.update(counts['others'])
            done += os.path.getsize(tar)
            progress(done, total)
        self._tars = np.repeat(np.arange(len(parts)), [len(part['sizes']) for part in parts])
        if not len(self._tars):
            raise UserError(f'{where} holds no images ({left.describe()})')
        self._offsets = np.concatenate([part['offsets'] for part in parts])
        self._sizes = np.concatenate([part['sizes'] for part in parts])
        self._checksums = np.concatenate([part['checksums'] for part in parts])
        self._keys = np.concatenate([part['keys'] for part in parts])
        self._texts = np.concatenate([part['texts'].reshape(-1, 3) for part in parts])
        words = np.concatenate([part['labels'] for part in parts]).tolist()

        def read() -> columns.Labels | None:
            return columns.labels_of(where, _values(where, words)) if any(words) else None

        own_name = os.path.basename(where)
        labels = columns.or_one_class(read, needs_labels, len(words), own_name)
        self._labels, self.num_classes, self.class_names = labels
        self.left_out = left.describe()

    @staticmethod
    def _index(path: str) -> dict[str, np.ndarray]:
        """The index of a tar."""
        try:
            with open(path, 'rb', buffering=0) as file:
                fd = file.fileno()
                return tar_index.kept_index(
                    path, fd, _INDEX_VERSION, lambda: _build_index(path, fd)
                )
        except OSError as error:
            raise UserError(f'{shown(path)} cannot be read: {first_line(error)}') from None

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        label = self._labels[i]
        path = self._paths[self._tars[i]]
        place = (int(self._offsets[i]), int(self._sizes[i]), int(self._checksums[i]))
        try:
            # Opened for each image, since there may be more tars than a process may have open.
            with open(path, 'rb', buffering=0) as file:
                image = tar_index.read_file(file.fileno(), *place, path)
        except OSError as error:
            raise UserError(f'{shown(path)} cannot be read: {first_line(error)}') from None
        return {'image': image, 'label': label}

    def captions(self, i: int) -> tuple[str, ...]:
        """Reads the captions of sample i, () where it has none.

        Raises:
          BrokenCaptionError: they are no text.
          UserError: the tar cannot be read.
        """
        offset, size, is_json = (int(number) for number in self._texts[i])
        if not offset:
            return ()
        where = self.name(i)
        if size > _MOST_READ:
            raise BrokenCaptionError(
                f'{where} has a caption of {size:,} bytes, of which {_MOST_READ:,} are the most'
            )
        try:
            with open(self._paths[self._tars[i]], 'rb', buffering=0) as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UserError(f'{where} cannot be read: {first_line(error)}') from None
        try:
            text = content.decode('utf-8-sig')
            found: Any = json.loads(text) if is_json else text.split('\n')
        except (ValueError, RecursionError) as error:
            raise BrokenCaptionError(
                f'{where} has a caption that is no text: {first_line(error)}'
            ) from None
        if isinstance(found, dict):
            found = columns.first_of(found, columns.CAPTIONS)
        return columns.captions_of(where, found)

    def name(self, i: int) -> str:
        """Names sample i by its tar and its key, as '00017.tar/000123'."""
        key = self._keys[i].decode('utf-8', 'surrogateescape')
        return escaped(f'{os.path.basename(self._paths[self._tars[i]])}/{key}')
