"""Files of prompts, a text in each line."""

import os

from sphere_ar_jax.runtime.console import UserError

_MOST_BYTES = 2**26


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Reads a file of prompts: UTF-8, one in each line; empty lines are skipped.

    Raises:
      UserError: there is no such file, it is no text, or has no prompt.
      OSError: it cannot be read.
    """
    if not os.path.isfile(path):
        raise UserError(f'there is no file {os.fspath(path)} of prompts, a text in each line')
    if os.path.getsize(path) > _MOST_BYTES:
        raise UserError(f'{os.fspath(path)} is no file of prompts: it has more than 64 MiB')
    with open(path, 'rb') as f:
        content = f.read()
    try:
        # A byte order mark is no part of the first prompt.
        lines = content.decode('utf-8-sig').split('\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{os.fspath(path)} is no text in UTF-8: {error.reason}') from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f'{os.fspath(path)} has no prompt: write one in each line')
    return found
