"""Sets of images in npz files, read batch by batch."""

import contextlib
import math
import zipfile
import zlib

import numpy as np

from sphere_ar_jax.runtime.console import UserError

IMAGES = 'arr_0'  # the array of images in an npz, as np.savez names it


@contextlib.contextmanager
def reading(path):
    """The archive of an npz; damage of any kind becomes one UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise UserError(f'{path} is not a whole npz file: {error}') from None


def array_names(archive):
    """The names of the arrays in an open npz."""
    return [name.removesuffix('.npy') for name in archive.namelist()]


@contextlib.contextmanager
def open_images(path):
    """Context of (open file, shape (n, H, W, 3)) of the images in an npz; the file stands at the
    first number.
    """
    with reading(path) as archive:
        if IMAGES not in array_names(archive):
            raise UserError(
                f'{path} has no array {IMAGES}, only {", ".join(array_names(archive)) or "nothing"}'
            )
        with archive.open(f'{IMAGES}.npy') as f:
            np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(
                f
            )  # of any array of numbers, as NumPy writes
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
                order = ' in Fortran order' if fortran else ''
                raise UserError(
                    f'{path}: {IMAGES} must be uint8 (n, H, W, 3), but is {dtype} {shape}{order}'
                )
            yield f, shape


def read_images(path, batch_size=64):
    """Yields the images `arr_0` of an npz as uint8 (≤ batch_size, H, W, 3), never more than a batch
    in memory.

    The npz may be compressed or not. Raises OSError without a file and UserError, where it is read,
    for a file that is damaged or holds anything but uint8 (n, H, W, 3).
    """
    with open_images(path) as (f, shape):
        for start in range(0, shape[0], batch_size):
            wanted = (min(batch_size, shape[0] - start), *shape[1:])
            content = f.read(math.prod(wanted))
            if len(content) < math.prod(wanted):
                raise UserError(f'{path} is cut off: {IMAGES} ends too early')
            yield np.frombuffer(content, np.uint8).reshape(wanted)


def whole_batches(batches, size):
    """Regroups batches into (size, H, W, 3), with the number of images that count: the last is
    filled up.
    """
    rest = None
    for images in batches:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(
                f'batches must be uint8 (n, H, W, 3), but one is {images.dtype} {images.shape}'
            )
        if rest is not None and rest.shape[1:] != images.shape[1:]:
            raise UserError(
                f'images of {rest.shape[1:3]} and {images.shape[1:3]} pixels in one set'
            )
        rest = images if rest is None else np.concatenate([rest, images])
        while len(rest) >= size:
            yield rest[:size], size
            rest = rest[size:]
    if rest is not None and len(rest):
        yield rest[np.arange(size) % len(rest)], len(rest)
