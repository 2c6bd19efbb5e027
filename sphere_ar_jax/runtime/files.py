"""Files: how they become whole, where they are kept, who may write them, which faults may pass."""

import contextlib
import errno
import json
import os
import platform
import re
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import filelock
from etils import epath

from sphere_ar_jax.runtime import hosts
from sphere_ar_jax.runtime.console import TemporaryError, UserError, first_line, passes, printable

_CHECKED = 2**26  # bytes of compiled programs that one sweep decompresses at most
_MOST_JSON_BYTES = 2**26


# Errors that say what contents are like: a piece is missing or is no file.
_CONTENT_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# What TensorStore and gRPC say of a disk, a network or a bucket. All other words of theirs, such as
# NOT_FOUND and DATA_LOSS, are about contents.
_STATUS = re.compile(
    r'\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|'
    r'PERMISSION_DENIED|CANCELLED|INTERNAL|UNKNOWN): '
)
_LASTING_STATUS = ('UNAUTHENTICATED', 'PERMISSION_DENIED')
_OS_ERROR = re.compile(r"OS error (\d+): |os_error_code='(\d+)'")  # by versions of TensorStore
_HTTP = (401, 403, 408, 429, 500, 502, 503, 504)
_LASTING_HTTP = (401, 403)
# Packages that speak with buckets.
_BUCKETS = ('aiohttp', 'botocore', 'fsspec', 'gcsfs', 'google', 'requests', 'urllib3')


class Fault(NamedTuple):
    """A fault of a disk, a network or a bucket, which says nothing about contents.

    Attributes:
      said: what the error says, in one line.
      passes: whether it may be gone in a moment; a missing permission or a full disk is not.
    """

    said: str
    passes: bool


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that led to it, the first cause last."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from chain(inner)
        error = error.__cause__ or error.__context__


def _http_status(error: BaseException) -> int:
    """The HTTP status that an error of a bucket's package carries, 0 if there is none."""
    for holder in (error, getattr(error, 'response', None)):
        for name in ('code', 'status', 'status_code'):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return int(value)
            if isinstance(value, str) and value.isdigit():
                return int(value)
    return 0


def _is_of_bucket(error: BaseException) -> bool:
    """Whether an error was raised by a package that speaks with buckets."""
    return type(error).__module__.partition('.')[0] in _BUCKETS


def _bucket_fault_in(error: BaseException) -> Fault | None:
    """What `fault` finds in a single error of a package that speaks with buckets."""
    line = first_line(error, 120)
    status = _http_status(error)
    if status in _HTTP:
        return Fault(f'HTTP {status}: {line}', status not in _LASTING_HTTP)
    if type(error).__module__.startswith('google.auth'):
        return Fault(line, bool(getattr(error, 'retryable', False)))
    if not isinstance(error, OSError):
        return None
    # Their errors of connections mostly have no number.
    return Fault(line, error.errno is None or passes(error))


def _fault_in(error: BaseException) -> Fault | None:
    """What `fault` finds in a single error."""
    if _is_of_bucket(error):
        return _bucket_fault_in(error)
    line = first_line(error, 120)
    if isinstance(error, FileNotFoundError):
        return None
    if isinstance(error, OSError) and error.errno not in _CONTENT_ERRORS:
        return Fault(line, passes(error))
    text = str(error)
    numbers = [int(old or new) for old, new in _OS_ERROR.findall(text)]
    for number in numbers:
        if number not in _CONTENT_ERRORS:
            return Fault(os.strerror(number), passes(OSError(number, '')))
    status_found = _STATUS.search(text)
    if status_found and not numbers:
        return Fault(line, status_found[1] not in _LASTING_STATUS)
    return None


def fault(error: BaseException) -> Fault | None:
    """The fault of a disk, a network or a bucket that an error tells of, None if it tells of none.

    TensorStore's errors have no errno, only its number and name in their message.
    """
    return next((found for found in map(_fault_in, chain(error)) if found), None)


def bucket_fault(error: BaseException) -> Fault | None:
    """The fault of a bucket that the error of a package that speaks with buckets tells of.

    It is None where no such package raised an error. So an error of JAX, whose words may be those
    of TensorStore's, is none.
    """
    found = (_bucket_fault_in(one) for one in chain(error) if _is_of_bucket(one))
    return next(filter(None, found), None)


def may_pass(error: BaseException) -> bool:
    """Whether an error, or one that led to it, tells of a fault that may be gone in a moment."""
    if any(isinstance(one, TemporaryError) for one in chain(error)):
        return True
    found = fault(error)
    return found is not None and found.passes


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a bucket, as gs://… does, and not to a disk."""
    return '://' in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """A path from the root, without ~; gs://… as it is."""
    text = os.fspath(path)
    return text if is_remote(text) else os.path.abspath(os.path.expanduser(text))


def is_same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one place; those of gs://… do where they are equal."""
    paths = [os.fspath(path) for path in (one, other)]
    if any(is_remote(path) for path in paths):
        return paths[0].rstrip('/') == paths[1].rstrip('/')
    return os.path.realpath(paths[0]) == os.path.realpath(paths[1])


def user_cache(environ: Mapping[str, str]) -> str:
    """The directory in the user's cache that belongs to this program.

    Args:
      environ: the environment variables.
    """
    root = environ.get('XDG_CACHE_HOME')
    if not root:
        root = os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(root, 'sphere_ar_jax')


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
    try:
        with open('/proc/cpuinfo') as f:
            processor = next((line for line in f if line.startswith(('flags', 'Features'))), '')
    except OSError:
        processor = platform.processor()
    kind = f'{platform.machine()}-{zlib.crc32(processor.encode()):08x}'
    return os.path.join(user_cache(environ), kind)


def _is_readable(path: str) -> bool:
    """Whether JAX can decompress an entry of its cache: by zstd if there is one, else by zlib."""
    with open(path, 'rb') as f:
        content = f.read()
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd

            zstd.decompress(content)
            return True
        try:
            import zstandard
        except ImportError:
            zlib.decompress(content)
        else:
            zstandard.ZstdDecompressor().decompress(content)
    except Exception:  # Each of the packages has errors of its own.
        return False
    return bool(content)


def sweep_compilation_cache(directory: str) -> None:
    """Removes from JAX's cache of compiled programs what is left of a kill or a full disk.

    JAX keeps an entry in two files, KEY-cache and KEY-atime. It writes no more entries once one of
    the two is alone, and it never replaces an entry that it cannot decompress. The sweep removes
    single files, empty entries, and those that do not decompress. It looks only into entries that
    were written since the last sweep, the newest ones first, and stops after 64 MiB of them.

    Nothing happens while another process uses the cache, or where it cannot be written.

    Args:
      directory: the cache, which belongs to this program.
    """
    if not os.path.isdir(directory):
        return  # FileLock would make it.
    try:
        with filelock.FileLock(os.path.join(directory, '.lockfile'), timeout=0):
            _sweep(directory)
    except (filelock.Timeout, OSError, NotImplementedError):
        return


def _sweep(directory: str) -> None:
    """Does what `sweep_compilation_cache` says, for whoever holds the cache's lock."""
    now = time.time()
    stamp = os.path.join(directory, '.swept')
    last = os.path.getmtime(stamp) if os.path.exists(stamp) else 0.0
    names = os.listdir(directory)
    entries = {name.removesuffix('-cache') for name in names if name.endswith('-cache')}
    times = {name.removesuffix('-atime') for name in names if name.endswith('-atime')}
    broken = entries ^ times
    written = {key: os.stat(os.path.join(directory, f'{key}-cache')) for key in entries & times}
    left = _CHECKED
    for key in sorted(written, key=lambda key: written[key].st_mtime, reverse=True):
        size = written[key].st_size
        if written[key].st_mtime >= last and 0 < size <= left:
            left -= size
            if not _is_readable(os.path.join(directory, f'{key}-cache')):
                broken.add(key)
        elif not size:
            broken.add(key)
    for key in broken:
        for suffix in ('-cache', '-atime'):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(directory, key + suffix))
    with open(stamp, 'wb'):
        os.utime(stamp, (now, now))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which an OSError that names no file gets the name of this one.

    A full disk is noticed while something is written, when the system knows no path any more.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        raise


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """A context that writes or replaces a file, or leaves it as it was where an error ends it.

    Whoever reads `path` meanwhile finds the old file or the new one, never half of it.

    Args:
      path: the file.

    Yields:
      The path of a temporary file, which becomes `path` at the end.
    """
    temporary = epath.Path(f'{os.fspath(path)}.tmp')
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace(path: str | os.PathLike[str], write: Callable[[IO[Any]], object]) -> None:
    """Writes or replaces a file, in the first process only.

    Whoever reads `path` meanwhile finds the old file or the new one, never half of it. An error
    leaves the old one.

    Args:
      path: the file.
      write: is called with a temporary binary file, which becomes `path` when it is written.

    Raises:
      OSError: the file cannot be written; it names the file.
    """
    if not hosts.is_first():
        return
    # The file is closed, and so written to the end, before it takes the place of `path`.
    with whole(path) as temporary, temporary.open('wb') as f:
        write(f)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes bytes to a file, see `replace`."""
    replace(path, lambda f: f.write(content))


def stamp(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """The time of the last change and the size of a file; None where there is no local one."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


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


def _owner(path: str) -> str:
    """Who has left a note in the JSON file at `path`, in words."""
    try:
        with open(path) as f:
            note = json.load(f)
        words = '{what}, process {pid} on {host}, since {since}'.format_map(note)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 'another process'
    return ''.join(sign if sign.isprintable() else '?' for sign in words)[:300]


def _take(directory: str, what: str) -> filelock.BaseFileLock | None:
    """Locks a directory and leaves a note of the owner beside the lock.

    Returns:
      The lock, or None where the file system knows no locks.

    Raises:
      UserError: another process has locked it.
    """
    lock = filelock.FileLock(os.path.join(directory, 'lock'), timeout=0)
    note = os.path.join(directory, 'lock.json')
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f'{directory} is in use by {_owner(note)}: wait for its end, or stop it'
        ) from None
    except NotImplementedError:
        print(f'{directory} cannot be locked: start nothing else in it', file=sys.stderr)
        return None
    owner = {
        'what': what,
        'pid': os.getpid(),
        'host': socket.gethostname(),
        'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
        'command': sys.argv,
    }
    try:
        write_json(note, owner)
    except BaseException:
        lock.release()
        raise
    return lock


@contextlib.contextmanager
def owned(directory: str, what: str) -> Iterator[None]:
    """A context in which no other run writes to a directory. All processes must enter it.

    The lock is the kernel's, so that it ends with its process, however that ends. DIRECTORY/lock
    holds it, and DIRECTORY/lock.json says who has it; both are gone at the end. Directories in
    buckets are not locked.

    Args:
      directory: the directory, which is made if needed.
      what: what goes on in it, for the line that whoever comes second gets, as 'a training'.

    Raises:
      UserError: another run has the directory; the message names it.
      OSError: the directory cannot be made or written.
    """
    if is_remote(directory):
        yield
        return
    lock = None
    if hosts.is_first():
        os.makedirs(directory, exist_ok=True)
        lock = _take(directory, what)
    try:
        if hosts.count() > 1:
            hosts.wait()  # A refusal of the first process ends the others here.
        yield
    finally:
        if lock is not None:
            # Whoever has opened the file meanwhile sees that it is gone, and makes another one.
            for name in ('lock.json', 'lock'):
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(directory, name))
            with contextlib.suppress(OSError):
                lock.release()
