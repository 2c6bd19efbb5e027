"""Files that are whole or absent, and where things are kept."""

import json
import os
import platform
import zlib

from etils import epath

from sphere_ar_jax.runtime import hosts


def absolute(path):
    """A directory's path from the root; gs://… as it is."""
    return path if '://' in str(path) else os.path.abspath(path)


def compilation_cache(environ):
    """Where compiled programs are kept for the next start, or None where JAX_COMPILATION_CACHE_DIR
    says it already.

    A directory of the user's for each kind of processor, since programs for CPUs are compiled for
    the one they run on.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in environ:
        return None
    root = environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    try:
        with open('/proc/cpuinfo') as f:
            processor = next((line for line in f if line.startswith(('flags', 'Features'))), '')
    except OSError:
        processor = platform.processor()
    return os.path.join(
        root, 'sphere_ar_jax', f'{platform.machine()}-{zlib.crc32(processor.encode()):08x}'
    )


def replace(path, write):
    """Calls write(file) on a temporary file that then becomes `path`: the old file or the new one,
    never half of it.
    """
    if not hosts.is_first():
        return
    temporary = epath.Path(f'{path}.tmp')
    with temporary.open('wb') as f:
        write(f)
    temporary.replace(path)


def write_bytes(path, content):
    """Writes bytes to a path at once."""
    replace(path, lambda f: f.write(content))


def write_json(path, values):
    """Writes a dictionary as an indented JSON file, at once."""
    write_bytes(path, (json.dumps(values, indent=2) + '\n').encode())
