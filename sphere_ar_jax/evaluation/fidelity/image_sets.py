"""Sets of images in npz files and directories, read batch by batch."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import IO

import numpy as np

from sphere_ar_jax.data import augment
from sphere_ar_jax.data.files import listing
from sphere_ar_jax.interop import npz
from sphere_ar_jax.runtime.console import UserError, first_line, printable

IMAGES = 'arr_0'  # the array of images in an npz, as np.savez names it


@contextlib.contextmanager
def open_npz(
    path: str | os.PathLike[str],
) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Context of the images in an npz.

    Yields:
      (the open file, which stands at the first number; the shape (n, H, W, 3) of the images).

    Raises:
      OSError: there is no file.
      UserError: the file is damaged, or holds anything but uint8 (n, H, W, 3).
    """
    with npz.open_archive(path) as archive:
        names = npz.array_names(archive)
        if IMAGES not in names:
            shown = ', '.join(printable(name, 60) for name in names[:20])
            raise UserError(f'{path} has no array {IMAGES}, only {shown or "nothing"}')
        member = archive.getinfo(f'{IMAGES}.npy')
        with archive.open(member) as f:
            header = npz.read_header(f)
            shape = header.shape
            images = header.dtype == np.uint8 and len(shape) == 4 and shape[3] == 3
            if not images or 0 in shape or header.fortran:
                raise UserError(f'{path}: {IMAGES} must be uint8 (n, H, W, 3), but is {header}')
            if header.size > member.file_size:
                raise UserError(f'{path} is cut off: {IMAGES} ends too early')
            yield f, shape


def list_images(directory: str | os.PathLike[str]) -> list[str]:
    """The paths of the images in a directory and in all directories below it, sorted.

    Images are known by their suffix, see `listing.is_image`; what systems leave behind is ignored.
    Linked directories are followed, and each is listed once.

    Raises:
      OSError: the directory cannot be read.
      UserError: there are no images in it.
    """

    def stop(error: OSError) -> None:
        raise error

    found = []
    seen = set()
    for inside, directories, files in os.walk(directory, onerror=stop, followlinks=True):
        real = os.path.realpath(inside)
        if real in seen:  # a link leads back, or a second one leads here
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(name for name in directories if not listing.is_of_system(name))
        found += [
            os.path.join(inside, name)
            for name in files
            if listing.is_image(name) and not listing.is_of_system(name)
        ]
    if not found:
        raise UserError(f'{directory} holds no images ({", ".join(listing.IMAGE_SUFFIXES)})')
    return sorted(found)


def count_images(path: str | os.PathLike[str]) -> int:
    """The number of images of an npz or a directory.

    Raises:
      OSError: there is no such file.
      UserError: see `open_npz` and `list_images`.
    """
    if os.path.isdir(path):
        return len(list_images(path))
    with open_npz(path) as (_, shape):
        return shape[0]


def _decode(path: str) -> np.ndarray:
    """Reads an image file as uint8 (H, W, 3)."""
    with open(path, 'rb') as file:
        content = file.read()
    try:
        return np.asarray(augment.decode(content))
    except augment.BrokenImageError as error:
        raise UserError(f'{listing.shown(path)} cannot be decoded: {first_line(error)}') from None


def _read_directory(directory: str | os.PathLike[str], batch_size: int) -> Iterator[np.ndarray]:
    """Reads the images of a directory, see `read_images`."""
    paths = list_images(directory)
    expected = None
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), batch_size):
            chosen = paths[start : start + batch_size]
            images = list(pool.map(_decode, chosen))
            expected = images[0].shape if expected is None else expected
            for path, image in zip(chosen, images, strict=True):
                if image.shape != expected:
                    raise UserError(
                        f'{listing.shown(path)} has {image.shape[:2]} pixels, but '
                        f'{listing.shown(paths[0])} has {expected[:2]}: the images of a set have '
                        'one size; --mode=reference crops them'
                    )
            yield np.stack(images)


def read_images(path: str | os.PathLike[str], batch_size: int = 64) -> Iterator[np.ndarray]:
    """Reads the images of an npz (`arr_0`) or of a directory, one batch in memory at a time.

    Args:
      path: the npz, compressed or not, or a directory, whose images are taken in the order of
        `list_images` and decoded by `augment.decode`. It is opened when the first batch is asked
        for.
      batch_size: images of a batch. The last batch may be smaller.

    Yields:
      Images as uint8 (b, H, W, 3).

    Raises:
      OSError: there is no file.
      UserError: the file is damaged, or holds anything but uint8 (n, H, W, 3); an image file cannot
        be decoded, or images differ in size.
    """
    if os.path.isdir(path):
        yield from _read_directory(path, batch_size)
        return
    with open_npz(path) as (f, shape):
        for start in range(0, shape[0], batch_size):
            wanted = (min(batch_size, shape[0] - start), *shape[1:])
            content = f.read(math.prod(wanted))
            if len(content) < math.prod(wanted):
                raise UserError(f'{path} is cut off: {IMAGES} ends too early')
            yield np.frombuffer(content, np.uint8).reshape(wanted)


def whole_batches(batches: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Regroups batches of any sizes into batches of one size.

    Args:
      batches: uint8 arrays (b, H, W, 3) with any b and one H × W.
      size: images of a batch.

    Yields:
      (images (size, H, W, 3), how many of them count). The last batch is filled up with repeated
      images.

    Raises:
      UserError: a batch is anything else, or images differ in H or W.
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
