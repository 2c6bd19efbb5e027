"""What counts as an image when files are listed, and how names are shown.

Directories and tars are listed by the same rules: files that operating systems leave behind are
passed over, and images are known by their suffix. `LeftOut` says what was passed over. Images and
captions that turn out to be broken have their errors here, too.
"""

import collections
import glob
import os
import re
from collections.abc import Iterable, Sequence

from sphere_ar_jax.runtime.console import UserError, first_line


class BrokenImageError(ValueError):
    """An image cannot be decoded: truncated, empty, of no known format or mode, or too large."""


class BrokenCaptionError(BrokenImageError, UserError):
    """A caption is no text, or the vocabulary has no numbers for it.

    In batches another image takes the place of its image, as for broken images. Elsewhere it is a
    user's error.
    """


IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.ppm', '.pgm', '.gif')
# Names of files and directories, in lower case, that systems make by themselves.
_OF_SYSTEMS = {'thumbs.db', 'desktop.ini', '__macosx', '@eadir', 'lost+found', '$recycle.bin'}
_LONGEST = 200  # characters of a name that are shown
# Names, in lower case, of directories and files that hold the parts of a data set, not its classes.
SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')


def escaped(text: str) -> str:
    """Escapes every character of a text that is not printable."""
    return repr(text)[1:-1]


def shown(text: str) -> str:
    """A name for messages: of bounded length, and escaped where it is not printable."""
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f'{text[:half]} … {text[-half:]}'
    return text if text.isprintable() else escaped(text)


def first_names(names: Sequence[str], most: int) -> str:
    """A list of names for messages, which ends with '…' where there are more than `most`."""
    if len(names) <= most:
        return ', '.join(map(shown, names))
    return ', '.join([*map(shown, names[: most - 2]), '…'])


def is_of_system(path: str) -> bool:
    """Whether a path leads to what a system keeps for itself.

    These are hidden names, which begin with a dot ('.DS_Store', AppleDouble's '._x.jpg'), and such
    names as 'Thumbs.db' and '__MACOSX', for any part of the path.
    """
    parts = [part for part in path.split('/') if part not in ('', '.', '..')]
    return any(part.startswith('.') or part.lower() in _OF_SYSTEMS for part in parts)


def is_image(path: str) -> bool:
    """Whether a path has the suffix of an image, in upper or lower case."""
    return path.lower().endswith(IMAGE_SUFFIXES)


class LeftOut:
    """Counts what a source does not take as an image.

    Attributes:
      hidden: files and directories of systems, see `is_of_system`.
      outside: images that lie beside the directories of the classes.
      others: {suffix: files that are no images}.
      empty: the classes without images, in order.
    """

    def __init__(self) -> None:
        self.hidden = 0
        self.outside = 0
        self.others: collections.Counter[str] = collections.Counter()
        self.empty: list[str] = []

    def takes(self, path: str) -> bool:
        """Whether a file is an image; counts it if it is none."""
        if is_of_system(path):
            self.hidden += 1
            return False
        if is_image(path):
            return True
        self.others[os.path.splitext(path)[1].lower()[:12]] += 1
        return False

    def describe(self) -> str:
        """What was left out, with counts, in one line; '' where nothing was."""
        said = []
        if self.outside:
            said.append(f'{self.outside} image(s) beside the directories of the classes')
        if self.others:
            kinds = [
                f'{shown(suffix) or "no suffix"} {count}'
                for suffix, count in sorted(self.others.items(), key=lambda kind: (-kind[1], kind))
            ]
            total = sum(self.others.values())
            said.append(f'{total} file(s) that are no images ({first_names(kinds, 5)})')
        if self.hidden:
            said.append(f'{self.hidden} hidden file(s)')
        if self.empty:
            said.append(f'classes without images: {first_names(self.empty, 5)}')
        return '; '.join(said)


def _names_of_ranges(pattern: str) -> list[str]:
    """Writes out the ranges of a pattern: 'a{08..11}' → 'a08', 'a09', 'a10', 'a11'."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    names = []
    for number in range(int(first), int(last) + 1):
        start = pattern[: found.start()] + str(number).zfill(len(first))
        names += [start + rest for rest in _names_of_ranges(pattern[found.end() :])]
    return names


def _parts_of_data_set(names: Iterable[str]) -> list[str]:
    """The parts of a data set that names have among their words, as train and val, as written.

    They are sorted. There is none where a single part, or no part, is named. In each name the first
    of `SPLITS` counts, in upper or lower case.
    """
    found = {}
    for name in names:
        words = [word for word in re.split(r'[^A-Za-z]+', name) if word.lower() in SPLITS]
        for word in words[:1]:
            found[word.lower()] = word
    return [found[part] for part in sorted(found)] if len(found) > 1 else []


def _check_splits(path: str, names: Sequence[str], kind: str, suffix: str) -> None:
    """Raises UserError where files of a directory are named as different parts of a data set."""
    parts = _parts_of_data_set(names)
    if parts:
        part = next((word for word in parts if word.lower().startswith('train')), parts[0])
        start = '' if any(name.startswith(part) for name in names) else '*'
        raise UserError(
            f'{path} holds {" and ".join(parts)}, parts of a data set: give those to train on, '
            f'as data={kind}:{path}/{start}{part}*{suffix} (or all of them, as {path}/*{suffix})'
        )


def data_files(path: str, suffix: str, kind: str) -> list[str]:
    """Finds the files that the path of a data set means.

    Args:
      path: a file; a directory, of which files with the suffix are taken; or a pattern with `*`,
        `?`, `[…]` or ranges as `{000..127}`.
      suffix: that of the files, as '.tar'.
      kind: the kind of data, for messages.

    Returns:
      Absolute paths, sorted, at least one.

    Raises:
      UserError: there are none, a file of a range is missing, or those of a directory are parts of
        a data set such as train and test.
    """
    path = os.path.abspath(path)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            raise UserError(f'{shown(path)} cannot be read: {first_line(error)}') from None
        names = [name for name in names if name.endswith(suffix) and not is_of_system(name)]
        if not names:
            raise UserError(f'{shown(path)} holds no files *{suffix}: give a directory that does')
        _check_splits(path, names, kind, suffix)
        return [os.path.join(path, name) for name in names]
    found = []
    for name in _names_of_ranges(path):
        matches = [name]
        if not os.path.isfile(name):
            # Beside tars lie their indices.
            matches = [match for match in glob.glob(name) if match.endswith(suffix)]
        if not matches:
            raise UserError(f'there is no {shown(name)}: give files *{suffix}, or their directory')
        found += matches
    if not found:
        raise UserError(f'{shown(path)} names no files: a range goes upwards, as {{0..9}}')
    return sorted(set(found))
