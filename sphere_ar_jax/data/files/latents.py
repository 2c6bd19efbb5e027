"""Latents of images: the parameters of their tokens' posteriors, as `--mode=encode` writes them.

Dimensions:
  n  images     L  tokens of an image     d  latent dimension
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from sphere_ar_jax.data.files import array_records
from sphere_ar_jax.data.files.array_records import LATENTS
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.runtime.types import Progress

_HASHES = 'hashes.npy'


class Latents:
    """A directory that `write` wrote. It is a source without images.

    `source[i]` is a dictionary of the posterior's parameters by name, each float32 (L, …), as mu
    (L, d) and kappa (L,), and of label, np.int32 ().

    Attributes:
      path: the directory, absolute.
      num_classes: number of classes.
      class_names: the classes' names, or None.
      left_out: what of the encoded data was left out, in one line, or ''.
      tokenizer: `checkpoint.digest` of the tokenizer's parameters.
      hashes: (n,) uint64, the hashes of the images' names, see `sources.hashes`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a directory.

        Args:
          path: the directory.

        Raises:
          UserError: see `array_records.RecordFiles`. `source[i]` raises it where the record is
            damaged.
        """
        self._records = array_records.RecordFiles(path, LATENTS)
        self.path = self._records.path
        self.num_classes = self._records.num_classes
        self.class_names = self._records.class_names
        about = self._records.about
        try:
            self.left_out: str = about['left_out']
            self.tokenizer: str = about['tokenizer']
            self._shapes = {name: tuple(shape) for name, shape in about['shapes'].items()}
            self.hashes = np.load(os.path.join(self.path, _HASHES), allow_pickle=False)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f'{self.path} is damaged: {first_line(error)}; encode it again'
            ) from None
        if len(self.hashes) != len(self):
            raise UserError(
                f'{self.path} is damaged: {len(self.hashes)} hashes of {len(self)} records; '
                'encode it again'
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self._records[i]
        found: dict[str, Any] = {'label': np.int32(record['label'])}
        for name, shape in self._shapes.items():
            found[name] = np.frombuffer(record['posterior'][name], '<f4').reshape(shape)
        return found

    def name(self, i: int) -> str:
        """Gives the name of the image that entry i was encoded from."""
        return self._records[i]['name']


def write(
    directory: str | os.PathLike[str],
    entries: Iterable[dict[str, Any] | None],
    hashes: np.ndarray,
    about: dict[str, Any],
    shards: int,
    progress: Progress = lambda done, total: None,
) -> int:
    """Writes a directory that `Latents` reads.

    Args:
      directory: the directory to make; it must not exist. See `array_records.write`.
      entries: for each image in order a dictionary of label, name, and posterior: its parameters by
        name, each float32 (L, …). None for an image that could not be encoded.
      hashes: see `sources.hashes`, one for each entry.
      about: num_classes, class_names and tokenizer, see `Latents`.
      shards: number of files, at most one for each image.
      progress: called as progress(done, total), in images.

    Returns:
      The number of images that could not be encoded.

    Raises:
      UserError: see `array_records.write`; or no image could be encoded.
    """
    encoded = np.zeros(len(hashes), bool)
    shapes: dict[str, list[int]] = {}

    def records() -> Iterable[dict[str, Any] | None]:
        for i, entry in enumerate(entries):
            if entry is None:
                yield None
                continue
            encoded[i] = True
            posterior = {}
            for name, value in entry['posterior'].items():
                shapes[name] = list(value.shape)
                posterior[name] = np.asarray(value, '<f4').tobytes()
            yield {'posterior': posterior, 'label': int(entry['label']), 'name': entry['name']}

    def finish(partial: str) -> dict[str, Any]:
        if not encoded.any():
            raise UserError('none of the images can be encoded: all are broken')
        np.save(os.path.join(partial, _HASHES), hashes[encoded])
        broken = int((~encoded).sum())
        said = [f'{broken} broken image(s)'] if broken else []
        said += [about['left_out']] if about['left_out'] else []
        return about | {'left_out': '; '.join(said), 'shapes': shapes}

    array_records.write(directory, LATENTS, records(), len(hashes), shards, finish, progress)
    return int((~encoded).sum())
