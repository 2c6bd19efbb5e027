"""Files that are whole or absent, and where things are kept."""

import json
import os
import platform
import zlib
from collections.abc import Callable, Mapping
from typing import IO, Any

from etils import epath

from sphere_ar_jax.runtime import hosts
from sphere_ar_jax.runtime.console import UserError, first_line, printable

_MOST_JSON_BYTES = 2**26


def absolute(path: str | os.PathLike[str]) -> str:
    """A directory's path from the root; gs://… as it is."""
    text = os.fspath(path)
    return text if '://' in text else os.path.abspath(text)


def compilation_cache(environ: Mapping[str, str]) -> str | None:
    """The directory that keeps compiled programs for the next start.

    It lies in the user's cache. Each kind of processor has a directory of its own, since a program
    for CPUs is compiled for the processor that it runs on.

    Args:
      environ: the environment variables.

    Returns:
      The directory, or None where JAX_COMPILATION_CACHE_DIR already names one.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in environ:
        return None
    root = environ.get('XDG_CACHE_HOME')
    if not root:
        root = os.path.join(os.path.expanduser('~'), '.cache')
    try:
        with open('/proc/cpuinfo') as f:
            processor = next((line for line in f if line.startswith(('flags', 'Features'))), '')
    except OSError:
        processor = platform.processor()
    kind = f'{platform.machine()}-{zlib.crc32(processor.encode()):08x}'
    return os.path.join(root, 'sphere_ar_jax', kind)


def replace(path: str | os.PathLike[str], write: Callable[[IO[Any]], object]) -> None:
    """Writes or replaces a file, in the first process only.

    Whoever reads `path` meanwhile finds the old file or the new one, never half of it.

    Args:
      path: the file.
      write: is called with a temporary binary file, which becomes `path` when it is written.
    """
    if not hosts.is_first():
        return
    temporary = epath.Path(f'{path}.tmp')
    with temporary.open('wb') as f:
        write(f)
    temporary.replace(path)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes bytes to a file, see `replace`."""
    replace(path, lambda f: f.write(content))


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Writes a value as an indented JSON file, see `replace`."""
    write_bytes(path, (json.dumps(values, indent=2) + '\n').encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file of any origin.

    Args:
      path: the file; gs://… too.

    Returns:
      The value.

    Raises:
      OSError: the file cannot be read.
      UserError: it holds something else, or is too large or too deep; the message is one line.
    """
    file = epath.Path(path)
    if file.stat().length > _MOST_JSON_BYTES:
        raise UserError(f'{path} has more bytes than any JSON file of a run')
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is no JSON file: {printable(first_line(error))}') from None
