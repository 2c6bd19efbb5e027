"""Files with a text in each line."""

import os
from collections.abc import Iterator

from etils import epath

from sphere_ar_jax.runtime.console import UserError

_MOST_BYTES = 2**26


def lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file that are not empty, with their numbers from 1.

    A byte order mark is no part of the first line.

    Raises:
      UserError: the file is no text in UTF-8.
    """
    try:
        # A workdir may lie in a bucket.
        text = epath.Path(path).read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{os.fspath(path)} is no text in UTF-8: {error.reason}') from None
    for number, line in enumerate(text.split('\n'), 1):
        if line.strip():
            yield number, line.rstrip('\r')


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Reads a file of prompts: UTF-8, one in each line; empty lines are skipped.

    Raises:
      UserError: there is no such file, it is no text, or has no prompt.
      OSError: it cannot be read.
    """
    if not os.path.isfile(path):
        what = 'is no plain file' if os.path.exists(path) else 'is not there'
        raise UserError(f'{os.fspath(path)} {what}: give a file of prompts, a text in each line')
    if os.path.getsize(path) > _MOST_BYTES:
        raise UserError(f'{os.fspath(path)} is no file of prompts: it has more than 64 MiB')
    found = [text.strip() for _, text in lines(path)]
    if not found:
        raise UserError(f'{os.fspath(path)} has no prompt: write one in each line')
    return found
