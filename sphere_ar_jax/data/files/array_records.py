"""Directories of ArrayRecord files, with a JSON file that says what they hold.

The JSON file is written last, so that a directory that has it is whole. A record is a msgpack of a
dictionary. `--mode=pack` and `--mode=encode` write such directories.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import filelock
import msgpack

from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.runtime.types import Progress


class Layout(NamedTuple):
    """A kind of such directories.

    Attributes:
      metadata: the name of the JSON file.
      format: what stands there as its format.
      stem: the beginning of the names of the ArrayRecord files.
      verb: what is done again where a directory is of another format.
      participle: what a directory without the JSON file was not, to the end.
    """

    metadata: str
    format: str
    stem: str
    verb: str
    participle: str


IMAGES = Layout('images.json', 'sphere_ar_jax images 1', 'images', 'pack', 'packed')
LATENTS = Layout('latents.json', 'sphere_ar_jax latents 1', 'latents', 'encode', 'encoded')


# What the JSON file of every layout holds.
_KEYS = ('format', 'files', 'num_classes', 'class_names')


class RecordFiles:
    """The records of a directory that `write` wrote.

    Damage to a record is noticed when it is read. Threads may share it, and processes get it by
    pickle.

    Attributes:
      path: the directory, absolute.
      about: what the JSON file says.
      num_classes: the number of classes.
      class_names: their names, or None.
    """

    def __init__(self, path: str | os.PathLike[str], layout: Layout):
        """Opens a directory.

        Args:
          path: the directory.
          layout: what kind it must be of.

        Raises:
          UserError: the directory is not there, was not written to the end, or a file is missing or
            of another length.
        """
        # Grain installs this package, except on Windows, for which there is none.
        from array_record.python import array_record_data_source

        self.path = os.path.abspath(path)
        metadata = os.path.join(self.path, layout.metadata)
        try:
            with open(metadata) as f:
                self.about: dict[str, Any] = json.load(f)
            made, files, classes, names = (self.about[key] for key in _KEYS)
            sizes = dict(files)
            self.num_classes: int = classes
            self.class_names: tuple[str, ...] | None = None if names is None else tuple(names)
        except FileNotFoundError:
            raise UserError(
                f'{self.path} has no {layout.metadata}: it was not {layout.participle}, '
                'or not to the end'
            ) from None
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f'{metadata} is damaged: {first_line(error)}') from None
        if made != layout.format:
            raise UserError(
                f'{self.path} is of the format {made!r}, but must be {layout.format!r}: '
                f'{layout.verb} it again'
            )
        try:
            for name, size in sizes.items():
                if os.path.getsize(os.path.join(self.path, name)) != size:
                    raise UserError(
                        f'{self.path}/{name} has not the {size:,} bytes that it was '
                        f'{layout.participle} with'
                    )
            paths = [os.path.join(self.path, name) for name in sizes]
            self._records = array_record_data_source.ArrayRecordDataSource(paths)
        except (OSError, RuntimeError) as error:
            raise UserError(f'{self.path} cannot be read: {first_line(error)}') from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]
        try:
            return msgpack.unpackb(self._records[i])
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f'{self.path}: record {i} is damaged: {first_line(error)}') from None


def require_new(directory: str | os.PathLike[str]) -> None:
    """Raises UserError where a directory that is to be written is there already."""
    if os.path.exists(directory):
        raise UserError(f'{os.path.abspath(directory)} exists: remove it, or take another')


def write(
    directory: str | os.PathLike[str],
    layout: Layout,
    records: Iterable[dict[str, Any] | None],
    n: int,
    shards: int,
    finish: Callable[[str], dict[str, Any]],
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes a directory that `RecordFiles` reads.

    Everything is written to DIRECTORY.partial, which becomes the directory when it is complete.
    What a killed run has left there is removed first.

    Args:
      directory: the directory to make; it must not exist.
      layout: its kind.
      records: n records in order; None in place of one leaves it out.
      n: how many there are.
      shards: number of files, at most one for each record.
      finish: called with the path of DIRECTORY.partial after the last record. It may write further
        files there. It returns what the JSON file says besides format and files: `num_classes`,
        `class_names` and more.
      progress: called as progress(done, n).

    Raises:
      UserError: the directory exists, cannot be written, or is being written by another process; or
        `records` or `finish` raises it.
    """
    from array_record.python import array_record_module

    directory = os.path.abspath(directory)
    partial = f'{directory}.partial'
    shards = min(shards, n)
    require_new(directory)
    if shards < 1:
        raise UserError(f'{n} images cannot be {layout.participle} into {shards} files')
    try:
        os.makedirs(partial, exist_ok=True)
        with filelock.FileLock(os.path.join(partial, 'lock'), timeout=0):
            for name in set(os.listdir(partial)) - {'lock'}:
                os.remove(os.path.join(partial, name))
            waiting = iter(records)
            files = {}
            for shard in range(shards):
                name = f'{layout.stem}-{shard:05d}-of-{shards:05d}.array_record'
                path = os.path.join(partial, name)
                # Grain asks for groups of one record, for random access. Images are compressed
                # already, and latents cannot be.
                writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
                for i in range(n * shard // shards, n * (shard + 1) // shards):
                    record = next(waiting)
                    if record is not None:
                        writer.write(msgpack.packb(record))
                    progress(i + 1, n)
                writer.close()
                files[name] = os.path.getsize(path)
            about = {'format': layout.format, **finish(partial), 'files': files}
            with open(os.path.join(partial, layout.metadata), 'w') as f:
                json.dump(about, f, indent=2)
            os.rename(partial, directory)
            os.remove(os.path.join(directory, 'lock'))
    except filelock.Timeout:
        raise UserError(f'another process is writing {partial}') from None
    except (OSError, RuntimeError) as error:
        raise UserError(f'{directory} cannot be written: {first_line(error)}') from None
