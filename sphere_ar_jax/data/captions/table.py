"""Captions of images in files: a table of paths and texts, or a text beside each image.

`data.captions` says where they are: the path of a table, or 'beside' for the texts that the images
have themselves, as a folder has them in NAME.txt beside NAME.jpg.

A table is one of

  jsonl   an object in each line, as {"file_name": "cat/1.jpg", "text": "a grey cat"}
  json    a list of such objects, or one of them
  tsv     two columns with a tab between them, the path and the text, without a head

The path is what messages call an image: for a folder that below the folder. In an object it stands
under one of `PATHS` and the text under one of `columns.CAPTIONS`, a string or a list of strings.
Several objects or lines of one image are several captions.
"""

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from sphere_ar_jax.data.batches import Record
from sphere_ar_jax.data.captions import files
from sphere_ar_jax.data.files import columns
from sphere_ar_jax.data.files.listing import BrokenCaptionError, escaped
from sphere_ar_jax.data.sources import Images, Part, hashes
from sphere_ar_jax.runtime.console import UserError, first_line, printable

BESIDE = 'beside'
PATHS = ('path', 'file_name', 'image')

# The captions of an image, or why they cannot be read.
Texts: TypeAlias = tuple[str, ...] | BrokenCaptionError


def _texts(where: str, value: object) -> Texts:
    """The captions that stand in a table; `where` names the line."""
    try:
        return columns.captions_of(where, value)
    except BrokenCaptionError as error:
        return error


def _pair(entry: Any, where: str) -> tuple[str, Texts]:
    """The path and the texts of an object of a table.

    Raises:
      UserError: it has no path, or no key for texts.
    """
    path = columns.first_of(entry, PATHS) if isinstance(entry, dict) else None
    if not isinstance(path, str) or not any(key in entry for key in columns.CAPTIONS):
        raise UserError(
            f'{where} is no caption: write {{"file_name": "cat/1.jpg", "text": "a grey cat"}}'
        )
    return path, _texts(where, columns.first_of(entry, columns.CAPTIONS))


def _columns(path: str) -> Iterator[tuple[str, Texts]]:
    """The paths and texts of a table with a tab in each line."""
    for number, line in files.lines(path):
        name, tab, text = line.partition('\t')
        if not tab:
            raise UserError(f'{path}, line {number} has no tab between a path and a text')
        if '\t' in text:
            raise UserError(f'{path}, line {number} has more than two columns')
        yield name, _texts(f'{path}, line {number}', text)


def _entries(path: str) -> Iterator[tuple[str, Texts]]:
    """The paths and texts of a table."""
    kind = os.path.splitext(path)[1].lower()
    if kind == '.tsv':
        yield from _columns(path)
    elif kind == '.jsonl':
        for number, line in files.lines(path):
            where = f'{path}, line {number}'
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f'{where} is no JSON: {first_line(error)}') from None
            yield _pair(entry, where)
    elif kind == '.json':
        try:
            lines = dict(files.lines(path))
            # Empty lines count, so that an error names the line of the file.
            count = max(lines, default=0)
            found = json.loads('\n'.join(lines.get(i + 1, '') for i in range(count)))
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path} is no JSON: {first_line(error)}') from None
        for number, entry in enumerate(found if isinstance(found, list) else [found], 1):
            yield _pair(entry, f'{path}, entry {number}')
    else:
        raise UserError(
            f"data.captions is {path}: give a .jsonl, .json or .tsv file, or '{BESIDE}'"
        )


def _plain(name: str) -> str:
    """A path without parts that say nothing, as './a.png' and 'x.tar/./a' have them."""
    return name.removeprefix('./').replace('/./', '/')


def read_table(path: str) -> dict[str, Texts]:
    """Reads the captions of a table.

    Args:
      path: the file, see the module.

    Returns:
      {path of an image as messages show it: its captions in the file's order}. Texts that are
      empty are left out. Where one is no text, the error stands in their place.

    Raises:
      UserError: the file is not there or is no table; the message names the line.
    """
    place = os.path.expanduser(path)
    if not os.path.isfile(place):
        raise UserError(f"data.captions is {path}, but there is no such file; '{BESIDE}' is a word")
    found: dict[str, Texts] = {}
    for name, texts in _entries(place):
        key = _plain(escaped(name))
        before = found.get(key, ())
        if isinstance(before, tuple) and isinstance(texts, tuple):
            found[key] = before + texts
        elif isinstance(before, tuple):
            found[key] = texts
    return found


def _keys(names: Sequence[str], table: Mapping[str, Texts]) -> list[str]:
    """The path under which a table has each image, its own name where it has none.

    An accented letter may be one character or two (Unicode's forms NFC and NFD), and file systems
    and archives differ in it. A path without an image is that of an image with the same letters,
    where no other path has them.
    """
    forms: dict[str, list[str]] = {}
    for key in set(table).difference(names):
        forms.setdefault(unicodedata.normalize('NFC', key), []).append(key)

    def find(name: str) -> str:
        plain = _plain(name)
        if plain in table:
            return plain
        alike = forms.get(unicodedata.normalize('NFC', name), ())
        return alike[0] if len(alike) == 1 else name

    return [find(name) for name in names]


class Captioned:
    """A source of images whose records have captions besides; else it is like the source.

    Attributes:
      num_classes: number of the source's classes.
      left_out: what the source leaves out, images without a caption, and captions of the table
        without an image, with counts.
    """

    def __init__(self, source: Images, table: Mapping[str, Texts] | None = None):
        """Joins images and captions.

        Args:
          source: the images.
          table: see `read_table`; None takes the texts that the images have themselves.

        Raises:
          UserError: no image has a caption, or the images have no texts of their own; or two
            images have one name, so that a table cannot tell them apart.
        """
        self._captions: list[Texts] | None = None
        self.num_classes = source.num_classes
        self.left_out = source.left_out
        if table is None:
            if not hasattr(source, 'captions'):
                raise UserError(
                    f"data.captions is '{BESIDE}', but such data have no texts of their own: give "
                    'the path of a table'
                )
            if '.txt ' in self.left_out or '.json ' in self.left_out:
                self.left_out += '; texts beside images among them are read as captions'
            self._source = source
            return
        names = [source.name(i) for i in range(len(source))]
        keys = _keys(names, table)
        for key, count in Counter(keys).items():
            if count > 1 and key in table:
                raise UserError(
                    f'two images have the name {printable(key, 80)}, so that a table cannot tell '
                    'them apart: give the files different names'
                )
        found = [table.get(key, ()) for key in keys]
        has_caption = np.array([bool(captions) for captions in found])
        if not has_caption.any():
            empty = [key for key in keys if key in table]
            if empty:
                raise UserError(
                    'none of the images has a caption: the table has an empty text for each, as '
                    f"for '{printable(empty[0], 80)}'"
                )
            raise UserError(
                f'none of the {len(source)} images has a caption: the table has no path like '
                f"'{printable(names[0], 80)}'"
            )
        self._captions = [captions for captions in found if captions]
        missing = int(np.sum(~has_caption))
        self._source = Part(source, np.flatnonzero(has_caption)) if missing else source
        said = [self.left_out] if self.left_out else []
        if missing:
            first = names[int(np.argmin(has_caption))]
            said.append(f'images without a caption: {missing}, {printable(first, 80)} the first')
        there = set(keys)
        strange = [name for name in table if table[name] and name not in there]
        if strange:
            said.append(
                f'captions without an image: {len(strange)}, {printable(strange[0], 80)} the first'
            )
        self.left_out = '; '.join(said)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the source's classes."""
        return self._source.class_names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Record:
        captions = self._source.captions(i) if self._captions is None else self._captions[i]
        if isinstance(captions, BrokenCaptionError):
            raise BrokenCaptionError(str(captions))
        return self._source[i] | {'captions': captions}

    def name(self, i: int) -> str:
        """Names entry i in messages."""
        return self._source.name(i)

    @property
    def hashes(self) -> np.ndarray:
        """The hashes of the entries, those that they have without captions."""
        return hashes(self._source)


def with_captions(source: Images, captions: str) -> Captioned:
    """Gives images the captions that `data.captions` names.

    Raises:
      UserError: see `read_table` and `Captioned`.
    """
    return Captioned(source, None if captions == BESIDE else read_table(captions))
