"""What counts as an image when files are listed, and how names are shown.

Directories and tars are listed by the same rules: files that operating systems leave behind are
passed over, and images are known by their suffix. `LeftOut` says what was passed over.
"""

import collections
import os
from collections.abc import Sequence

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.ppm', '.pgm', '.gif')
# Names of files and directories, in lower case, that systems make by themselves.
_OF_SYSTEMS = {'thumbs.db', 'desktop.ini', '__macosx', '@eadir', 'lost+found', '$recycle.bin'}
_LONGEST = 200  # characters of a name that are shown


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
