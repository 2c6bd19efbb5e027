"""Emoji with their names, as the npm packages `emoji-datasource-…` have them.

Such a package has a list of the emoji, PATH/emoji.json, and their pictures of 64×64 pixels with a
transparent ground, PATH/img/SET/64/NAME.png. https://github.com/iamcal/emoji-data
"""

import json
import os
from typing import Any

import numpy as np

from sphere_ar_jax.data.files.listing import first_names
from sphere_ar_jax.runtime.console import UserError, first_line

# The Fitzpatrick modifiers of Unicode, and what CLDR calls them.
TONES = {
    '1F3FB': 'light',
    '1F3FC': 'medium-light',
    '1F3FD': 'medium',
    '1F3FE': 'medium-dark',
    '1F3FF': 'dark',
}


def _with_tones(name: str, modifiers: str) -> str:
    """A name and its skin tones, as 'waving hand sign, medium skin tone'; modifiers: '1F3FD'."""
    tones = [TONES.get(code, code) for code in modifiers.split('-')]
    plural = 's' if len(tones) > 1 else ''
    return f'{name}, {" and ".join(tones)} skin tone{plural}'


def _captions(entry: dict[str, Any], modifiers: str = '') -> tuple[str, ...]:
    """The captions of an emoji: its name and its short names in lower case, each once."""
    short = [str(name).replace('_', ' ') for name in entry.get('short_names') or ()]
    name = str(entry.get('name') or '').lower()
    names = dict.fromkeys(text for text in (name, *short) if text)
    return tuple(_with_tones(text, modifiers) if modifiers else text for text in names)


def _is_emoji(entry: Any) -> bool:
    """Whether an entry of the list, and each of its variants, names a picture."""
    if not isinstance(entry, dict) or not isinstance(entry.get('short_names') or [], list):
        return False
    variants = entry.get('skin_variations') or {}
    if not isinstance(variants, dict):
        return False
    return all(isinstance(one, dict) and 'image' in one for one in (entry, *variants.values()))


class Emoji:
    """The pictures of a package, whose classes are the categories of the emoji.

    Captions are the name and the short names of an emoji in lower case. Variants with skin tones
    are images of their own. Their captions name the tones. An emoji whose picture is missing is
    left out.

    Attributes:
      path: the package, absolute.
      labels: the label of each image, (n,) int32.
      class_names: the categories, sorted.
      num_classes: their number.
      left_out: see `sources.Images`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a package.

        Args:
          path: the directory of the package.

        Raises:
          UserError: it is no such package, or it has no pictures.
        """
        self.path = os.path.abspath(path)
        self._pictures = self._find_pictures()
        found: list[tuple[str, str, tuple[str, ...]]] = []
        missing = []
        for entry in self._read():
            variants = entry.get('skin_variations') or {}
            images = {'': entry, **variants}
            for modifiers, variant in images.items():
                name = str(variant['image'])
                if not os.path.isfile(os.path.join(self._pictures, name)):
                    missing.append(name)
                    continue
                category = str(entry.get('category') or 'none')
                found.append((name, category, _captions(entry, modifiers)))
        if not found:
            raise UserError(f'{self._pictures} has none of the pictures that emoji.json names')
        self._names = [name for name, _, _ in found]
        self._texts = [texts for _, _, texts in found]
        categories = [category for _, category, _ in found]
        self.class_names: tuple[str, ...] = tuple(sorted(set(categories)))
        self.num_classes = len(self.class_names)
        self.labels = np.searchsorted(self.class_names, categories).astype(np.int32)
        self.left_out = ''
        if missing:
            self.left_out = f'{len(missing)} emoji without a picture ({first_names(missing, 3)})'

    def _find_pictures(self) -> str:
        """The directory of the pictures.

        Raises:
          UserError: there is none, or more than one.
        """
        sets = os.path.join(self.path, 'img')
        names = os.listdir(sets) if os.path.isdir(sets) else []
        names = sorted(name for name in names if os.path.isdir(os.path.join(sets, name, '64')))
        if not os.path.isfile(os.path.join(self.path, 'emoji.json')) or not names:
            raise UserError(
                f'{self.path} is no package of emoji with emoji.json and img/SET/64: get one by '
                'npm pack emoji-datasource-google, and unpack it'
            )
        if len(names) > 1:
            raise UserError(
                f'{sets} has several sets of pictures, {", ".join(names)}: leave one there'
            )
        return os.path.join(sets, names[0], '64')

    def _read(self) -> list[dict[str, Any]]:
        """The entries of emoji.json.

        Raises:
          UserError: it cannot be read, or it is no list of emoji.
        """
        place = os.path.join(self.path, 'emoji.json')
        try:
            with open(place, encoding='utf-8') as f:
                entries = json.load(f)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f'{place} cannot be read: {first_line(error)}') from None
        if not isinstance(entries, list) or not all(map(_is_emoji, entries)):
            raise UserError(f'{place} is no list of emoji')
        return entries

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        place = os.path.join(self._pictures, self._names[i])
        try:
            with open(place, 'rb') as f:
                return {'image': f.read(), 'label': self.labels[i]}
        except OSError as error:
            raise UserError(f'{place} cannot be read: {first_line(error)}') from None

    def captions(self, i: int) -> tuple[str, ...]:
        """Gives the captions of image i."""
        return self._texts[i]

    def name(self, i: int) -> str:
        """Names image i in messages, as 'Smileys & Emotion/1f600.png'."""
        return f'{self.class_names[self.labels[i]]}/{self._names[i]}'
