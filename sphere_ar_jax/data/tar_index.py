"""Where the images are in a tar of tars: an index, made once by a walk over all headers and kept in
an npz.

`tarfile` finds the headers; what it lets pass in silence, a tar that is cut off or damaged between
two files, is looked for here.

Dimensions:
  n  images      k  classes, an inner tar each, which a synset names
"""

import contextlib
import hashlib
import os
import tarfile
import uuid
import zipfile

import numpy as np

from sphere_ar_jax.data import imagenet
from sphere_ar_jax.runtime.console import UserError, first_line

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.ppm', '.pgm', '.gif')


def printable(text):
    """The text with everything escaped that is no printable character."""
    return repr(text)[1:-1]


BLOCK = tarfile.BLOCKSIZE  # 512: a tar is made of headers and data, each of whole blocks
_INDEX_VERSION = 1


def _identity(fd, tars):
    """What tells one tar from another: its size, its time of change and a hash of the headers at
    `tars`.

    Args:
      tars: (k,) int, the offsets of the inner tars' headers.
    """
    stat, digest = os.fstat(fd), hashlib.sha256()
    for start in tars:
        digest.update(os.pread(fd, 2 * BLOCK, int(start)))  # also the first header of the inner tar
    return f'{stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}'


def _open_tar(file, what):
    try:
        return tarfile.open(fileobj=file, mode='r:')
    except (tarfile.TarError, OSError) as error:
        raise UserError(f'{what} is no uncompressed tar: {first_line(error)}') from None


def _files(archive, what):
    """Yields the plain files of an open tar, `tarfile.TarInfo`; directories are passed over, links
    are refused.
    """
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError) as error:
            raise UserError(f'{what} is damaged ({first_line(error)}): fetch it again') from None
        if member is None:
            return
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or member.size < 0:
            raise UserError(f'{what} holds {printable(member.name)}, which is no plain file')
        yield member


def _check_end(fd, end, what):
    """Raises UserError unless the mark of a tar's end lies where `tarfile` stopped: it does not
    tell.
    """
    if os.pread(fd, BLOCK, end) != bytes(BLOCK):
        raise UserError(f'{what} is damaged at byte {end:,}: fetch it again')


def _class_tars(outer, path):
    """{synset: member of the outer tar}, in the order of the tar."""
    found = {}
    for member in _files(outer, path):
        synset, suffix = os.path.splitext(printable(os.path.basename(member.name)))
        if suffix.lower() in IMAGE_SUFFIXES:
            raise UserError(
                f'{path} holds images, not a tar for each class, so no labels: ILSVRC2012_img_train.tar is needed '
                '(validation images: unpack them into a directory for each class, an ImageFolder)'
            )
        if suffix != '.tar':
            raise UserError(
                f'{path} holds {printable(member.name)}, but must hold only tars, one for each class'
            )
        if synset in found:
            raise UserError(f'{path} holds {synset}.tar twice')
        found[synset] = member
    if not found:
        raise UserError(f'{path} holds no files')
    known = [synset for synset, _ in imagenet.classes()]
    if len(found) == len(known) and (other := sorted(set(found) - set(known))):
        raise UserError(
            f'{path} has 1,000 classes, but not those of ILSVRC2012: {other[0]} is none of them'
        )
    return found


def _build_index(path, fd, progress):
    """The index of a tar of tars, by a walk over all headers.

    identity: see `_identity`. tars: (k,) int64, offsets of the inner tars' headers. synsets: (k,)
    str, sorted. Every image has an entry in the others. offsets, sizes: (n,) int64, of its data in
    the outer tar. labels: (n,) int32, the place of its synset. checksums: (n,) int32, that its
    header holds.
    """
    before = os.fstat(fd)
    size = before.st_size
    if (
        size % BLOCK
        or size < 2 * BLOCK
        or os.pread(fd, 2 * BLOCK, size - 2 * BLOCK) != bytes(2 * BLOCK)
    ):
        raise UserError(
            f'{path} does not end as an uncompressed tar does: it is none, or cut off; fetch it again'
        )
    rows = []
    with open(fd, 'rb', closefd=False) as file, _open_tar(file, path) as outer:
        members = _class_tars(outer, path)
        _check_end(fd, outer.offset, path)
        synsets = sorted(members)
        label = {synset: k for k, synset in enumerate(synsets)}
        for synset, member in members.items():
            what, first, start = f'{path}: {synset}.tar', len(rows), member.offset_data
            with _open_tar(outer.extractfile(member), what) as inner:
                rows += [
                    (start + m.offset_data, m.size, label[synset], m.chksum)
                    for m in _files(inner, what)
                ]
                if (
                    inner.offset != member.size
                ):  # a mark is not needed where the outer tar has the length
                    _check_end(fd, start + inner.offset, what)
            if len(rows) == first:
                raise UserError(f'{what} holds no images')
            progress(start + member.size, size)
    after = os.fstat(fd)
    if (after.st_size, after.st_mtime_ns) != (size, before.st_mtime_ns):
        raise UserError(f'{path} changed while it was read: start again when it is complete')
    progress(size, size)
    offsets, sizes, labels, checksums = np.array(rows, np.int64).T
    tars = np.array([members[synset].offset for synset in synsets])
    return {
        'version': _INDEX_VERSION, 'identity': _identity(fd, tars), 'tars': tars, 'synsets': np.array(synsets),
        'offsets': offsets, 'sizes': sizes, 'labels': labels.astype(np.int32), 'checksums': checksums.astype(np.int32),
    }  # fmt: skip


def _load_index(index_path, fd):
    """The index at a path, or None if there is none, or it is another tar's or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(index_path, allow_pickle=False) as file:
            index = dict(file)
        if index['version'] == _INDEX_VERSION and str(index['identity']) == _identity(
            fd, index['tars']
        ):
            return index
    return None


def open_index(path, fd, progress):
    """The index of a tar, a dictionary of arrays (see `_build_index`): loaded from where it is
    kept, or built and kept.

    That is beside the tar, or in the user's cache where nothing can be written there.

    Args:
      path: of the tar, absolute. fd: the tar, open. progress, and what is raised: see
        `sources.ImageNetTar`.
    """
    cache = os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'sphere_ar_jax'
    )
    places = [os.path.dirname(path), cache]
    name = f'{os.path.basename(path)}.index.npz'
    for place in places:
        index = _load_index(os.path.join(place, name), fd)
        if index is not None:
            return index
    index = _build_index(path, fd, progress)
    for place in places:
        target = os.path.join(place, name)
        # several processes may build it at once: the last one stays
        temporary = f'{target}.{uuid.uuid4().hex}'
        try:
            os.makedirs(place, exist_ok=True)
            with open(temporary, 'xb') as f:
                np.savez(f, **index)
            os.replace(temporary, target)
            return index
        except OSError as error:
            why = first_line(error)
            if os.path.exists(temporary):
                os.remove(temporary)
    raise UserError(f'the index of {path} cannot be written to {" or ".join(places)} ({why})')
