"""Reads npz and npy files of any origin, in bounded time and memory.

NumPy's own reader trusts a file: it evaluates headers of any depth, allocates what they say, and
unpacks every method of compression. Here a header has at most MAX_HEADER bytes, an array is as
large as its file can hold, and a member is stored or deflated. Whatever is wrong becomes one
UserError of one printable line.
"""

import contextlib
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple

import numpy as np

from sphere_ar_jax.runtime.console import UserError, first_line, printable

MAX_HEADER = 1000  # NumPy's headers of arrays of numbers have 118 bytes.
MAX_MEMBER = 2**37  # bytes of a member when unpacked: 128 GiB, 50,000 images of 512×512 are 37 GiB
MAX_MEMBERS = 1000
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_DEFLATED = 1032  # A deflated byte unpacks to no more bytes than this.
# What NumPy, zipfile and zlib raise at files that are not whole, or not theirs.
_BAD = (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    SyntaxError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    RuntimeError,
    NotImplementedError,
)


class Header(NamedTuple):
    """What an npy file says of its array.

    Attributes:
      shape: its shape.
      fortran: whether the first axis is the one whose numbers lie side by side.
      dtype: its dtype.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the array's numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        order = ' in Fortran order' if self.fortran else ''
        return printable(f'{self.dtype} {self.shape}{order}')


@contextlib.contextmanager
def _in_one_line(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns whatever is wrong with a file into a UserError that says `what` the file is not."""
    try:
        yield
    except UserError:
        raise
    except _BAD as error:
        why = printable(first_line(error))
        raise UserError(f'{path} is not a whole {what} file: {why}') from None


def _check_members(path: str | os.PathLike[str], archive: zipfile.ZipFile) -> None:
    """Raises UserError for members that are packed in another way, or unpack to too much."""
    members = archive.infolist()
    size = os.path.getsize(path)
    if len(members) > MAX_MEMBERS:
        raise UserError(f'{path} has {len(members)} arrays, but may have {MAX_MEMBERS}')
    for info in members:
        name = printable(info.filename, 60)
        if not 0 <= info.header_offset < size:
            raise UserError(f'{path}: {name} does not lie in the file')
        if info.compress_type not in _METHODS:
            raise UserError(
                f'{path}: {name} is compressed by method {info.compress_type}; only stored and '
                'deflated arrays are read, as np.savez and np.savez_compressed write them'
            )
        packed = info.compress_type == zipfile.ZIP_DEFLATED
        most = info.compress_size * (_MOST_DEFLATED if packed else 1)
        if info.file_size > min(most, MAX_MEMBER):
            raise UserError(f'{path}: {name} says that it unpacks to {info.file_size} bytes')


@contextlib.contextmanager
def open_archive(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Context of an npz; damage of any kind, found here or while it is open, is one UserError.

    Raises:
      OSError: there is no file.
      UserError: the file is damaged, or a member is packed in a way that is not read.
    """
    with _in_one_line(path, 'npz'), zipfile.ZipFile(path) as archive:
        _check_members(path, archive)
        yield archive


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays in an open npz."""
    return [name.removesuffix('.npy') for name in archive.namelist()]


def read_header(file: IO[bytes]) -> Header:
    """Reads the header of an npy; the file then stands at the first number.

    Raises:
      ValueError: this is no npy, its header is too long, or its array holds Python objects.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        found = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_HEADER)
    elif version == (2, 0):
        found = np.lib.format.read_array_header_2_0(file, max_header_size=MAX_HEADER)
    else:
        raise ValueError(f'it has the version {version}')
    header = Header(*found)
    if header.dtype.hasobject:
        raise ValueError('its array holds Python objects')
    if any(type(length) is not int or length < 0 for length in header.shape):
        raise ValueError('its shape is impossible')
    return header


def read_numbers(file: IO[bytes], header: Header) -> np.ndarray:
    """Reads the numbers after a header, see `read_header`.

    The caller must have compared the header's size with what it expects, or with the file's.

    Raises:
      EOFError: the file ends too early.
    """
    content = file.read(header.size)
    if len(content) < header.size:
        raise EOFError('it ends too early')
    order: Literal['F', 'C'] = 'F' if header.fortran else 'C'
    return np.frombuffer(content, header.dtype).reshape(header.shape, order=order)


def read_open_npy(file: IO[bytes], path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an npy from an open file of the disk, which then stands after it.

    Args:
      file: stands at the beginning of the npy.
      path: names the file in messages.

    Raises:
      UserError: the file is damaged, or no npy.
    """
    with _in_one_line(path, 'npy'):
        header = read_header(file)
        if header.size > os.fstat(file.fileno()).st_size:
            raise EOFError(f'its array is {header}, which is more than the file holds')
        return read_numbers(file, header)


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an npy file.

    Raises:
      OSError: there is no file.
      UserError: the file is damaged, or no npy.
    """
    with open(path, 'rb') as file:
        return read_open_npy(file, path)
