"""An index of where the images are in a tar: how it is made, kept and used.

The index is made once by a walk over all headers and kept in an npz. `tarfile` finds the headers.
It does not report that a tar is cut off or damaged between two files, so that this module checks
for it. `open_index` is for a tar of tars as ImageNet's, and `kept_index` for tars of any make.

Dimensions:
  n  images
  k  classes, an inner tar each, which a synset names
"""

import contextlib
import hashlib
import os
import tarfile
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from sphere_ar_jax.data import imagenet
from sphere_ar_jax.data.files.listing import LeftOut, escaped, is_of_system, shown
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.runtime.types import Progress

BLOCK = tarfile.BLOCKSIZE  # 512: a tar is made of headers and data, each of whole blocks
_INDEX_VERSION = '2'  # that of a tar of tars
_LONGEST_NAME = 255  # characters of a class's name


def _identity(fd: int, tars: np.ndarray) -> str:
    """Identifies a tar by its size, its time of change and a hash of some headers.

    Args:
      fd: the tar, open.
      tars: (k,) int, the offsets of those headers, in a tar of tars those of the inner tars.
    """
    stat = os.fstat(fd)
    digest = hashlib.sha256()
    for start in tars:
        digest.update(os.pread(fd, 2 * BLOCK, int(start)))  # also the first header of the inner tar
    return f'{stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}'


def open_tar(file: IO[bytes], what: str) -> tarfile.TarFile:
    """Opens an uncompressed tar; `what` names it in messages."""
    try:
        return tarfile.open(fileobj=file, mode='r:')
    except Exception as error:  # damaged headers make tarfile raise many kinds
        raise UserError(f'{what} is no uncompressed tar: {_reason(error)}') from None


def _reason(error: Exception) -> str:
    """Why a header cannot be read, in one printable line."""
    if isinstance(error, MemoryError | OverflowError):
        return 'a header has an absurd size'
    return shown(first_line(error))


def plain_files(archive: tarfile.TarFile, what: str) -> Iterator[tarfile.TarInfo]:
    """Yields the plain files of an open tar; `what` names it in messages.

    Directories are passed over.

    Raises:
      UserError: the tar is damaged, or holds something else, such as a link.
    """
    while True:
        try:
            member = archive.next()
        except Exception as error:  # damaged headers make tarfile raise many kinds
            raise UserError(f'{what} is damaged ({_reason(error)}): fetch it again') from None
        if member is None:
            return
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or member.size < 0:
            raise UserError(f'{what} holds {shown(member.name)}, which is no plain file')
        yield member


def check_end(fd: int, end: int, what: str) -> None:
    """Raises UserError unless a tar ends at byte `end` of the outer tar, where `tarfile` stopped.

    A block of zeros marks the end. `tarfile` stops without an error at a damaged header, too.
    """
    if os.pread(fd, BLOCK, end) != bytes(BLOCK):
        raise UserError(f'{what} is damaged at byte {end:,}: fetch it again')


def _class_tars(outer: tarfile.TarFile, path: str, left: LeftOut) -> dict[str, tarfile.TarInfo]:
    """Finds the inner tars, as {synset: member of the outer tar} in the order of the tar.

    What is neither a tar nor an image is counted in `left`.

    Raises:
      UserError: the tar holds images, a synset twice or no tars, or has 1,000 classes that are not
        those of ILSVRC2012.
    """
    found: dict[str, tarfile.TarInfo] = {}
    for member in plain_files(outer, path):
        name, suffix = os.path.splitext(os.path.basename(member.name))
        synset = escaped(name)
        is_tar = suffix == '.tar' and not is_of_system(member.name)
        if not is_tar:
            if left.takes(member.name):
                raise UserError(
                    f'{path} holds images, not a tar for each class, so no labels: '
                    'ILSVRC2012_img_train.tar is needed '
                    '(validation images: unpack them into a directory for each class, '
                    'an ImageFolder; images with KEY.cls beside them: data=webdataset:PATH)'
                )
            continue
        if len(synset) > _LONGEST_NAME:
            raise UserError(f'{path} holds {shown(member.name)}: the name is too long for a class')
        if synset in found:
            raise UserError(f'{path} holds {synset}.tar twice')
        found[synset] = member
    if not found:
        raise UserError(f'{path} holds no tars, but must hold one for each class')
    known = {synset for synset, _ in imagenet.classes()}
    others = sorted(set(found) - known)
    if len(found) == len(known) and others:
        raise UserError(
            f'{path} has 1,000 classes, but not those of ILSVRC2012: {others[0]} is none of them'
        )
    return found


def check_whole(fd: int, size: int, path: str) -> None:
    """Raises UserError unless a file of `size` bytes has whole blocks and ends in two of zeros."""
    is_whole = size % BLOCK == 0 and size >= 2 * BLOCK
    if not is_whole or os.pread(fd, 2 * BLOCK, size - 2 * BLOCK) != bytes(2 * BLOCK):
        raise UserError(
            f'{path} does not end as an uncompressed tar does: '
            'it is none, or cut off; fetch it again'
        )


def check_unchanged(fd: int, before: os.stat_result, path: str) -> None:
    """Raises UserError unless a tar still has the size and time of change that it had before."""
    after = os.fstat(fd)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f'{path} changed while it was read: start again when it is complete')


def read_file(fd: int, offset: int, size: int, checksum: int, path: str) -> bytes:
    """Reads a file of a tar, together with the header in front of it.

    Args:
      fd: the tar, open.
      offset: where the file's data begins.
      size: its length in bytes.
      checksum: the checksum that its header must hold.
      path: names the tar in messages.

    Raises:
      UserError: another header stands there.
    """
    block = os.pread(fd, BLOCK + size, offset - BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(block[:BLOCK], 'utf-8', 'surrogateescape')
        same = header.size == size and header.chksum == checksum
    except tarfile.TarError:
        same = False
    if len(block) != BLOCK + size or not same:
        raise UserError(f'{path} has changed since it was opened: start again')
    return block[BLOCK:]


def _build_index(path: str, fd: int, progress: Progress) -> dict[str, Any]:
    """Builds the index of a tar of tars by a walk over all headers.

    Args:
      path: the tar, absolute.
      fd: the tar, open.
      progress: called as progress(done, total), in bytes, after each inner tar.

    Returns:
      A dictionary of:
      tars: (k,) int64, offsets of the inner tars' headers.
      synsets: (k,) str, sorted.
      offsets: (n,) int64, where each image's data begins in the outer tar.
      sizes: (n,) int64, bytes of each image's data.
      labels: (n,) int32, the index in `synsets` of each image's synset.
      checksums: (n,) int32, the checksum that each image's header holds.
      left_out: str, what the tar holds besides images, see `LeftOut.describe`.

    Raises:
      UserError: the tar is damaged, of another make, or changed while it was read.
    """
    before = os.fstat(fd)
    size = before.st_size
    check_whole(fd, size, path)
    rows: list[tuple[int, int, int, int]] = []
    left = LeftOut()
    with open(fd, 'rb', closefd=False) as file, open_tar(file, path) as outer:
        members = _class_tars(outer, path, left)
        check_end(fd, outer.offset, path)
        synsets = sorted(members)
        label = {synset: k for k, synset in enumerate(synsets)}
        for synset, member in members.items():
            what = f'{path}: {synset}.tar'
            start = member.offset_data
            data = outer.extractfile(member)
            assert data is not None  # since it is a plain file
            with open_tar(data, what) as inner:
                found = [
                    (start + m.offset_data, m.size, label[synset], m.chksum)
                    for m in plain_files(inner, what)
                    if left.takes(m.name)
                ]
                # Where the files fill the inner tar, its length in the outer tar tells its end, and
                # no mark is needed.
                if inner.offset != member.size:
                    check_end(fd, start + inner.offset, what)
            if not found:
                left.empty.append(synset)
            rows += found
            progress(start + member.size, size)
    check_unchanged(fd, before, path)
    if not rows:
        raise UserError(f'{path} holds no images ({left.describe()})')
    left.empty.sort()
    progress(size, size)
    offsets, sizes, labels, checksums = np.array(rows, np.int64).T
    tars = np.array([members[synset].offset for synset in synsets])
    return {
        'tars': tars,
        'synsets': np.array(synsets),
        'offsets': offsets,
        'sizes': sizes,
        'labels': labels.astype(np.int32),
        'checksums': checksums.astype(np.int32),
        'left_out': np.array(left.describe()),
    }


def _digest(index: dict[str, np.ndarray]) -> str:
    """A hash of all arrays of an index but the digest itself, with their names and shapes."""
    digest = hashlib.sha256()
    for name in sorted(set(index) - {'digest'}):
        array = index[name]
        digest.update(f'{name} {array.dtype} {array.shape}'.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _load_index(index_path: str, fd: int, version: str) -> dict[str, np.ndarray] | None:
    """Loads the index at a path, or None if there is none, or it is another tar's or damaged."""
    with contextlib.suppress(Exception):  # damage makes NumPy raise many kinds
        with np.load(index_path, allow_pickle=False) as file:
            index = dict(file)
        if str(index['version']) != version or str(index['digest']) != _digest(index):
            return None
        if str(index['identity']) == _identity(fd, index['tars']):
            return index
    return None


def open_index(path: str, fd: int, progress: Progress) -> dict[str, Any]:
    """The index of a tar of tars, see `kept_index`.

    Args:
      path: the tar, absolute.
      fd: the tar, open.
      progress: see `sources.ImageNetTar`.

    Returns:
      The index, a dictionary of arrays; see `_build_index`.

    Raises:
      UserError: see `sources.ImageNetTar`; or the index cannot be written.
    """
    return kept_index(path, fd, _INDEX_VERSION, lambda: _build_index(path, fd, progress))


def kept_index(
    path: str, fd: int, version: str, build: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Loads the index of a tar from where it is kept, or builds and keeps it.

    It is kept beside the tar, or in the user's cache where nothing can be written there. It holds
    `version`, `identity` (see `_identity`) and `digest` (see `_digest`) besides what was built.

    Args:
      path: the tar, absolute.
      fd: the tar, open.
      version: names the format of the index.
      build: makes the index, a dictionary of arrays. Its `tars` are offsets of headers by which the
        tar is known again.

    Returns:
      The index.

    Raises:
      UserError: `build` raises it; or the index cannot be written.
    """
    # As `files.user_cache`, which comes with JAX.
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    name = os.path.basename(path)
    # Tars of several directories, which may have one name, share the cache.
    place_hash = hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:8]
    targets = [
        f'{path}.index.npz',
        os.path.join(cache, 'sphere_ar_jax', f'{name}.{place_hash}.index.npz'),
    ]
    # Earlier versions kept all of one name in the same place.
    former = os.path.join(cache, 'sphere_ar_jax', f'{name}.index.npz')
    for target in (*targets, former):
        found = _load_index(target, fd, version)
        if found is not None:
            return found
    index = build()
    index['version'] = np.array(version)
    index['identity'] = np.array(_identity(fd, index['tars']))
    index['digest'] = np.array(_digest(index))
    for target in targets:
        # Several processes may build the index at once; the last one's stays.
        temporary = f'{target}.{uuid.uuid4().hex}'
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(temporary, 'xb') as f:
                np.savez(f, **index)
            os.replace(temporary, target)
            return index
        except OSError as error:
            why = first_line(error)
            if os.path.exists(temporary):
                os.remove(temporary)
    places = ' or '.join(os.path.dirname(target) for target in targets)
    raise UserError(f'the index of {path} cannot be written to {places} ({why})')
