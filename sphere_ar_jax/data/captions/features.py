"""Features of texts that another model has computed, such as T5 or CLIP, from a file.

The file is an npz with

  texts      (N,) str, each once
  features   (N, T, F) floats; what stands beyond the end of a text is 0

A vector for each text, (N, F), is taken as T = 1.

Dimensions:
  N  texts     T  places of a text     F  features of a place
"""

import functools
import os
import unicodedata
import zipfile
import zlib
from typing import Any

import numpy as np

from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError, first_line, printable

# What NumPy and zipfile raise at files that are not whole, or not theirs.
_BAD = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def _form(text: str) -> str:
    """A text without spaces around it, in Unicode's form NFC, by which texts are compared."""
    return unicodedata.normalize('NFC', text.strip())


class TextFeatures:
    """The features of some texts.

    Attributes:
      texts: the texts, in the order of the file.
      shape: (T, F).
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads a file.

        Args:
          path: an npz, see the module.

        Raises:
          UserError: it is none, or it has no such arrays.
        """
        self._path = os.fspath(path)
        place = os.path.expanduser(path)
        if not os.path.isfile(place):
            raise UserError(
                f'there is no file {self._path} with the features of texts: give '
                '--config.ar.features=FILE.npz'
            )
        try:
            with np.load(place) as file:
                texts = file['texts']
                features = file['features']
        except _BAD as error:
            raise UserError(
                f'{self._path} is no npz with texts and their features: {first_line(error)}'
            ) from None
        if features.ndim == 2:
            features = features[:, None]
        is_kind = (texts.dtype.kind, features.dtype.kind) == ('U', 'f')
        is_kind = is_kind and (texts.ndim, features.ndim) == (1, 3)
        if not is_kind or not 0 < len(texts) == len(features):
            raise UserError(
                f'{self._path} must have texts (N,) and features (N, T, F) of floats, not '
                f'{texts.dtype} {texts.shape} and {features.dtype} {features.shape}'
            )
        self._features = features
        self.texts: tuple[str, ...] = tuple(texts.tolist())
        self.shape: tuple[int, int] = features.shape[1:]
        self._numbers = {_form(text): i for i, text in enumerate(self.texts)}
        if len(self._numbers) < len(self.texts):
            raise UserError(f'{self._path} has a text twice: leave each of them there once')

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the file itself.
        return open_features, (self._path,)

    def __call__(self, text: str) -> np.ndarray:
        """Gives the features (T, F) float32 of a text.

        Raises:
          UserError: the file has no such text, or its features are not finite or all 0.
        """
        number = self._numbers.get(_form(text))
        if number is None:
            raise UserError(
                f"{self._path} has no features of the text '{printable(text, 60)}': add them"
            )
        with np.errstate(over='ignore'):  # What float32 cannot hold is refused below.
            found = self._features[number].astype(np.float32)
        if not np.isfinite(found).all() or not found.any():
            raise UserError(
                f"{self._path} has no features of the text '{printable(text, 60)}', but numbers "
                'that are all 0 or not finite'
            )
        return found


@functools.lru_cache(2)
def _opened(path: str, stamp: tuple[int, int] | None) -> TextFeatures:
    """The features in a file whose `files.stamp` is `stamp`."""
    del stamp  # A file that was changed has another one, and is read again.
    return TextFeatures(path)


def open_features(path: str) -> TextFeatures:
    """Opens a file of features, once until it changes.

    Raises:
      UserError: see `TextFeatures`.
    """
    return _opened(path, files.stamp(os.path.expanduser(path)))
