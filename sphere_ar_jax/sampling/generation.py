"""Many images from one model to one npz, in batches on all devices; a killed run can go on.

Image i is drawn from the key folded by i. It is therefore the same whatever the batch size, the
devices, and how often the run was killed, up to rounding. As long as each device gets equally many
rows, its tokens are the same bit for bit, and its pixels differ by a rounding at most before they
become bytes. Otherwise matrix products have other shapes and round differently. See
`on_mesh.program`.

All processes of a run draw; the first one alone reads and writes files.

Dimensions:
  n  images in all
  B  images of a batch
  images are uint8 (n, H, W, c)
"""

import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build
from sphere_ar_jax.data import pixels
from sphere_ar_jax.interop import npz
from sphere_ar_jax.models.conditions import check_labels
from sphere_ar_jax.runtime import checkpoint, hosts
from sphere_ar_jax.runtime.console import UserError, first_line, printable
from sphere_ar_jax.runtime.files import owned, read_json, replace, write_bytes, write_json
from sphere_ar_jax.sampling import batching, on_mesh

_MOST_LABEL_BYTES = 2**30


class Run(on_mesh.Models, Protocol):
    """Both models with their parameters and their config, as `training.run.Run` has them."""

    @property
    def config(self) -> ConfigDict:
        """The config that says how the models are sampled."""


def draw_labels(kind: str, n: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels (n,) int32 of the images to draw.

    Unless they come from a file, label i does not depend on n.

    Args:
      kind: 'uniform' draws each label at random by seed and i, as published; 'balanced' gives
        i mod num_classes. Anything else is the path of a file with n whole numbers, .npy or text.
      n: number of labels.
      num_classes: labels are below it.
      seed: seed of the uniform labels.

    Raises:
      UserError: the file does not exist, or is not such a list.
      OSError: the file cannot be read.
    """
    if kind == 'balanced':
        return (np.arange(n) % num_classes).astype(np.int32)
    if kind == 'uniform':
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b'labels'))
        return np.asarray(_uniform(key, np.arange(n), num_classes), np.int32)
    return _read_labels(kind, n, num_classes)


@functools.partial(jax.jit, static_argnums=2)
def _uniform(key: jax.Array, index: jax.Array, num_classes: int) -> jax.Array:
    """Uniform labels (n,) of the images with these numbers."""

    def one(i: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, i), (), 0, num_classes)

    return jax.vmap(one)(index)


def _read_labels(path: str, n: int, num_classes: int) -> np.ndarray:
    """Labels (n,) int32 of a file. Raises UserError and OSError as `draw_labels` does."""
    if not os.path.exists(path):
        raise UserError(
            f'there is no file {path}; labels are uniform, balanced, or a file of whole numbers'
        )
    if os.path.getsize(path) > _MOST_LABEL_BYTES:
        raise UserError(f'{path} is not a list of whole numbers: it has more than 1 GiB')
    if path.endswith('.npy'):
        labels = npz.read_npy(path)
    else:
        try:
            labels = np.loadtxt(path, dtype=np.int64, ndmin=1)
        except (ValueError, OverflowError) as error:
            why = printable(first_line(error))
            raise UserError(f'{path} is not a list of whole numbers: {why}') from None
    if labels.shape != (n,) or labels.dtype.kind not in 'iu':
        raise UserError(
            f'{path} must hold {n} whole numbers, but holds {labels.dtype} {labels.shape}'
        )
    try:
        check_labels(labels, num_classes)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    return labels.astype(np.int32)


def _crc(values: Any, dtype: type[np.generic]) -> int:
    """A checksum of numbers, taken as an array of a dtype."""
    return zlib.crc32(np.ascontiguousarray(values, dtype).data)


def parameters_crc(run: Run) -> int:
    """A checksum of all parameters of a run, by which results name the weights they are of."""
    return _crc(checkpoint.fingerprint((run.ar_params, run.vae_params)), np.uint32)


def _identity(run: Run, labels: np.ndarray, seed: int, parameters: int) -> dict[str, Any]:
    """What the images depend on, as JSON gives it back. A run goes on only if it is unchanged.

    `parameters` is their checksum.
    """
    settings = run.config.sampling.to_dict()
    settings['num_images'] = len(labels)
    del settings['batch_size']
    about = {
        'sampling': settings,
        'seed': seed,
        'key': np.asarray(jax.random.key_data(on_mesh.sampling_key(seed))).tolist(),
        'dtype': run.config.dtype,
        # What the shapes of the parameters do not tell.
        'model': [run.vae.grid, run.config.vae.heads, run.ar.heads],
        'labels': _crc(labels, np.float32 if labels.dtype.kind == 'f' else np.int32),
        'parameters': parameters,
    }
    return json.loads(json.dumps(about))  # Tuples become lists.


def _has_identity(path: str, identity: dict[str, Any]) -> bool:
    """Whether the JSON file at `path` holds this identity."""
    try:
        return read_json(path) == identity
    except (OSError, UserError):
        return False


class _Part(NamedTuple):
    """A file of consecutive images: an npy, and after it the CRC-32 of the whole npy.

    Parts of earlier versions end with the npy.

    Attributes:
      path: the file.
      start: number of its first image.
      stop: number after its last image.
    """

    path: str
    start: int
    stop: int


def _write_part(path: str, images: np.ndarray) -> None:
    """Writes a part, whole or not at all."""
    content = io.BytesIO()
    np.save(content, images)
    npy = content.getvalue()
    checksum = zlib.crc32(npy).to_bytes(4, 'little')
    write_bytes(path, npy + checksum)


def _read_part(path: str) -> np.ndarray | None:
    """The images (b, H, W, c) of a part, or None where its file is cut off or damaged."""
    with open(path, 'rb') as f:
        try:
            images = npz.read_open_npy(f, path)
        except UserError:
            return None
        end = f.tell()
        checksum = f.read()
        f.seek(0)
        crc = zlib.crc32(f.read(end))
    # A part of an earlier version has no checksum, but its length tells that it is whole.
    if checksum not in (b'', crc.to_bytes(4, 'little')) or images.dtype != np.uint8:
        return None
    return images


class _Parts:
    """The batches done so far: a directory with a file for each, and a file of their identity.

    Attributes:
      directory: where the files are.
      parts: those that are there and whole, in order.
    """

    def __init__(self, directory: str, identity: dict[str, Any], shape: tuple[int, ...]) -> None:
        """Opens or makes the directory, and finds the batches that are there and whole.

        Args:
          directory: where the files are.
          identity: what the images depend on.
          shape: (n, H, W, c), that of all images.

        Raises:
          UserError: the directory holds samples of another identity.
        """
        self.directory = directory
        self._shape = shape
        self.parts: list[_Part] = []
        about = os.path.join(directory, 'about.json')
        if os.path.exists(about) and not _has_identity(about, identity):
            raise UserError(
                f'{directory} holds samples of other settings: remove it, or take another --output'
            )
        os.makedirs(directory, exist_ok=True)
        write_json(about, identity)
        damaged = []
        for name in sorted(os.listdir(directory)):
            number = re.fullmatch(r'(\d{8,})\.npy', name)
            path = os.path.join(directory, name)
            if number is not None and not self._take(path, int(number[1])):
                damaged.append(name)
                os.remove(path)
        if damaged:
            print(
                f'{directory}: damaged files: {len(damaged)}, {damaged[0]} the first; '
                'their images are drawn again',
                file=sys.stderr,
                flush=True,
            )

    def _take(self, path: str, start: int) -> bool:
        """Takes a file in as the next part. Returns whether it is whole."""
        images = _read_part(path)
        if images is None or images.shape[1:] != self._shape[1:] or not len(images):
            return False
        stop = start + len(images)
        done = self.parts[-1].stop if self.parts else 0
        if stop > self._shape[0]:
            return False
        if start >= done:  # else it repeats images of the part before
            self.parts.append(_Part(path, start, stop))
        return True

    def gaps(self) -> list[tuple[int, int]]:
        """The images that no part has, as (number of the first, number after the last)."""
        found = []
        begin = 0
        for part in self.parts:
            if begin < part.start:
                found.append((begin, part.start))
            begin = part.stop
        if begin < self._shape[0]:
            found.append((begin, self._shape[0]))
        return found

    def add(self, start: int, images: np.ndarray) -> None:
        """Writes a batch; `start` is the number of its first image."""
        path = os.path.join(self.directory, f'{start:08d}.npy')
        _write_part(path, images)
        self.parts.append(_Part(path, start, start + len(images)))
        self.parts.sort(key=lambda part: part.start)

    def read(self) -> Iterator[bytes]:
        """Yields the images of all parts in order.

        Raises:
          UserError: a file was damaged since it was found or written.
        """
        for part in self.parts:
            images = _read_part(part.path)
            if images is None or len(images) != part.stop - part.start:
                raise UserError(
                    f'{part.path} was damaged after it was written: the same command draws its '
                    'images again'
                )
            yield images.tobytes()


def _assemble(path: str, parts: _Parts, shape: tuple[int, ...], labels: np.ndarray) -> None:
    """Writes the npz part by part: images as `arr_0`, labels as `arr_1`, for ADM's evaluator."""

    def write(f: IO[bytes]) -> None:
        with zipfile.ZipFile(f, 'w', zipfile.ZIP_STORED) as archive:
            with archive.open('arr_0.npy', 'w', force_zip64=True) as member:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': tuple(shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for content in parts.read():
                    member.write(content)
            with archive.open('arr_1.npy', 'w', force_zip64=True) as member:
                np.lib.format.write_array(member, labels)

    replace(path, write)


def images(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Yields the images of a file that `generate` wrote, uint8 (H, W, c), reading one at a time."""
    with npz.open_archive(path) as archive, archive.open('arr_0.npy') as f:
        n, *shape = npz.read_header(f).shape
        for _ in range(n):
            yield np.frombuffer(f.read(math.prod(shape)), np.uint8).reshape(shape)


def _begin(path: str, identity: dict[str, Any], shape: tuple[int, ...]) -> _Parts | None:
    """The parts of a file that is not whole yet, or None where it is whole and of this identity."""
    if not os.path.exists(path):
        return _Parts(f'{path}.parts', identity, shape)
    if not _has_identity(f'{path}.json', identity):
        raise UserError(
            f'{path} holds samples of other settings: move it away, or take another --output'
        )
    shutil.rmtree(f'{path}.parts', ignore_errors=True)  # A kill may have left it.
    return None


def _owned(path: str) -> contextlib.AbstractContextManager[None]:
    """A context in which no other run draws samples to a path. All processes must enter it.

    Nothing is locked where the file is there already, because nothing will be drawn.

    Raises:
      UserError: another run draws to it now; the message names that run.
    """
    if hosts.from_first(os.path.exists(path)):
        return contextlib.nullcontext()
    return owned(f'{path}.parts', 'a sampling')


def _tell_all(gaps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The gaps that the first process gives. All processes must call it."""
    count = hosts.from_first(len(gaps))
    mine = gaps if hosts.is_first() else [(0, 0)] * count
    return [(hosts.from_first(start), hosts.from_first(stop)) for start, stop in mine]


def _draw_gap(
    run: Run,
    labels: np.ndarray,
    gap: tuple[int, int],
    add: Callable[[int, np.ndarray], None],
    **drawing: Any,
) -> None:
    """Draws the images of a gap, and gives each batch to `add` while the next is computed.

    Args:
      run: both models and their config.
      labels: labels of all images.
      gap: number of the first image, and number after the last.
      add: called with the number of a batch's first image, and its images.
      **drawing: options of `on_mesh.draw_batches`.

    Raises:
      NonFiniteSamples: an image is not finite; the batches before are written.
    """
    start, stop = gap
    running = None
    sampler = build.build_sampler(run.config)

    def write(batch: jax.Array, finite: jax.Array, first: int) -> None:
        kept = hosts.gather(finite)[: stop - first]
        batching.require_finite(
            kept, first, ', so that none of these is written; those before them are kept'
        )
        add(first, hosts.gather(batch)[: stop - first])

    batches = on_mesh.draw_batches(run, sampler, labels, start=start, stop=stop, **drawing)
    for first, drawn, _ in batches:
        batch = pixels.to_uint8(drawn)
        finite = batching.are_finite(drawn)
        if running is not None:
            write(*running)
        # Waiting here leaves at most one unfinished batch for a kill to take.
        running = (jax.block_until_ready(batch), finite, first)
    if running is not None:
        write(*running)


def generate(
    run: Run,
    labels: np.ndarray,
    seed: int,
    path: str,
    *,
    numbers: np.ndarray | None = None,
    parameters: int | None = None,
    batch_size: int,
    mesh: Mesh,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Draws an image for each label and writes them to an npz.

    The npz holds `arr_0`, uint8 (n, H, W, c), and `arr_1`, the labels or `numbers`. Batches lie in
    `PATH.parts` until all of them are there, so that a run that was killed goes on after the last
    one. Each has a checksum, and those that are damaged are drawn again. The file appears whole or
    not at all. If it exists already and has the same settings, nothing is done. While a batch is
    computed, the one before is written.

    Args:
      run: both models and their config.
      labels: labels of n images, see `conditions`.
      seed: of all images' keys, see `on_mesh.sampling_key`.
      path: path of the npz.
      numbers: (n,) int32 that are written in place of labels which are large; None writes labels.
      parameters: `parameters_crc` of the run as it was read. That of `run.apart` differs. None
        computes it.
      batch_size: B, rounded up to a multiple of the mesh's devices.
      mesh: devices that draw.
      progress: called with the number of images done, at first with those of earlier starts.

    Returns:
      The number of images that were drawn now.

    Raises:
      UserError: there are samples of other settings at the path, or another process draws there.
      NonFiniteSamples: an image is not finite; what was drawn before is kept.
      ValueError: the model does not know the labels.
    """
    run.ar.condition.check(labels)
    n = len(labels)
    shape = (n, *run.vae.image_shape)
    checksum = parameters_crc(run) if parameters is None else parameters
    identity = _identity(run, labels, seed, checksum)
    with _owned(path):
        parts = _begin(path, identity, shape) if hosts.is_first() else None
        gaps = _tell_all(parts.gaps() if parts is not None else [])
        missing = sum(stop - start for start, stop in gaps)
        done = n - missing
        progress(done)

        def add(first: int, images: np.ndarray) -> None:
            nonlocal done
            if parts is not None:
                parts.add(first, images)
            done += len(images)
            progress(done)

        for gap in gaps:
            _draw_gap(run, labels, gap, add, seed=seed, batch_size=batch_size, mesh=mesh)
        if parts is not None:
            write_json(f'{path}.json', identity)
            _assemble(path, parts, shape, labels if numbers is None else numbers)
    if parts is not None:
        # Not before the lock in it is released: NFS keeps a file that is open, and its directory.
        shutil.rmtree(parts.directory, ignore_errors=True)
    return missing
