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

import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build
from sphere_ar_jax.data import pixels
from sphere_ar_jax.runtime import checkpoint, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.files import replace, write_json
from sphere_ar_jax.sampling import on_mesh

LABELS = ('uniform', 'balanced')


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

        def one(i: jax.Array) -> jax.Array:
            return jax.random.randint(jax.random.fold_in(key, i), (), 0, num_classes)

        return np.asarray(jax.jit(jax.vmap(one))(np.arange(n)), np.int32)
    return _read_labels(kind, n, num_classes)


def _read_labels(path: str, n: int, num_classes: int) -> np.ndarray:
    """Labels (n,) int32 of a file. Raises UserError and OSError as `draw_labels` does."""
    if not os.path.exists(path):
        raise UserError(
            f'there is no file {path}; labels are uniform, balanced, or a file of whole numbers'
        )
    npy = path.endswith('.npy')
    try:
        # The file is mapped, so that a wrong header takes no memory.
        labels = np.load(path, mmap_mode='r') if npy else np.loadtxt(path, dtype=np.int64, ndmin=1)
    except (ValueError, EOFError, OverflowError) as error:
        raise UserError(f'{path} is no list of whole numbers: {error}') from None
    if not isinstance(labels, np.ndarray):
        raise UserError(f'{path} is an npz, but must be an npy or text')
    if labels.shape != (n,) or labels.dtype.kind not in 'iu':
        raise UserError(
            f'{path} must hold {n} whole numbers, but holds {labels.dtype} {labels.shape}'
        )
    if not ((labels >= 0) & (labels < num_classes)).all():
        raise UserError(f'{path}: labels must lie between 0 and {num_classes - 1}')
    return labels.astype(np.int32)


def _crc(values: Any, dtype: type[np.generic]) -> int:
    """A checksum of numbers, taken as an array of a dtype."""
    return zlib.crc32(np.asarray(values, dtype).tobytes())


def _identity(run: Run, labels: np.ndarray, seed: int) -> dict[str, Any]:
    """What the images depend on, as JSON gives it back. A run goes on only if it is unchanged."""
    settings = run.config.sampling.to_dict()
    settings['num_images'] = len(labels)
    del settings['batch_size']
    params = checkpoint.fingerprint((run.ar_params, run.vae_params))
    about = {
        'sampling': settings,
        'seed': seed,
        'key': np.asarray(jax.random.key_data(on_mesh.sampling_key(seed))).tolist(),
        'dtype': run.config.dtype,
        # What the shapes of the parameters do not tell.
        'model': [run.vae.grid, run.config.vae.heads, run.ar.heads],
        'labels': _crc(labels, np.int32),
        'parameters': _crc(params, np.uint32),
    }
    return json.loads(json.dumps(about))  # Tuples become lists.


def _has_identity(path: str, identity: dict[str, Any]) -> bool:
    """Whether the JSON file at `path` holds this identity."""
    try:
        with open(path) as f:
            return json.load(f) == identity
    except (OSError, ValueError):
        return False


class _Parts:
    """The batches done so far: a directory with a file for each, and a file of their identity.

    Attributes:
      directory: where the files are.
      done: number of images in them.
      files: their paths, in order.
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
        self.done = 0
        self.files: list[str] = []
        about = os.path.join(directory, 'about.json')
        if os.path.exists(about) and not _has_identity(about, identity):
            raise UserError(
                f'{directory} holds samples of other settings: remove it, or take another --output'
            )
        os.makedirs(directory, exist_ok=True)
        write_json(about, identity)
        while os.path.exists(self._path(self.done)):
            try:
                part = np.load(self._path(self.done), mmap_mode='r')
            except (ValueError, OSError, EOFError):
                break  # The file was cut off; its images are drawn again.
            is_image = part.dtype == np.uint8 and part.shape[1:] == shape[1:]
            if not is_image or not 0 < len(part) <= shape[0] - self.done:
                break
            self.files.append(self._path(self.done))
            self.done += len(part)

    def _path(self, start: int) -> str:
        """The file of the batch whose first image has the number `start`."""
        return os.path.join(self.directory, f'{start:08d}.npy')

    def add(self, images: np.ndarray) -> None:
        """Writes the next batch."""
        path = self._path(self.done)
        replace(path, lambda f: np.save(f, images))
        self.files.append(path)
        self.done += len(images)


def _assemble(path: str, files: Sequence[str], shape: tuple[int, ...], labels: np.ndarray) -> None:
    """Writes the npz part by part: images as `arr_0`, labels as `arr_1`, for ADM's evaluator."""

    def write(f: IO[bytes]) -> None:
        with zipfile.ZipFile(f, 'w', zipfile.ZIP_STORED) as archive:
            with archive.open('arr_0.npy', 'w', force_zip64=True) as member:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': tuple(shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for file in files:
                    member.write(np.load(file).tobytes())
            with archive.open('arr_1.npy', 'w', force_zip64=True) as member:
                np.lib.format.write_array(member, labels)

    replace(path, write)


def images(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Yields the images of a file that `generate` wrote, uint8 (H, W, c), reading one at a time."""
    with zipfile.ZipFile(path) as archive, archive.open('arr_0.npy') as f:
        np.lib.format.read_magic(f)
        (n, *shape), _, _ = np.lib.format.read_array_header_1_0(f)
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


def generate(
    run: Run,
    labels: np.ndarray,
    seed: int,
    path: str,
    *,
    batch_size: int,
    mesh: Mesh,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Draws an image for each label and writes them to an npz.

    The npz holds `arr_0`, uint8 (n, H, W, c), and `arr_1`, the labels. Batches lie in `PATH.parts`
    until all of them are there, so that a run that was killed goes on after the last one. The file
    appears whole or not at all. If it exists already and has the same settings, nothing is done.
    While a batch is computed, the one before is written.

    Args:
      run: both models and their config.
      labels: (n,) int32.
      seed: of all images' keys, see `on_mesh.sampling_key`.
      path: path of the npz.
      batch_size: B, rounded up to a multiple of the mesh's devices.
      mesh: devices that draw.
      progress: called with the number of images done, at first with those of earlier starts.

    Raises:
      UserError: there are samples of other settings at the path.
    """
    n = len(labels)
    shape = (n, *run.vae.image_shape)
    identity = _identity(run, labels, seed)
    parts = _begin(path, identity, shape) if hosts.is_first() else None
    done = hosts.from_first(n if parts is None else parts.done)
    progress(done)
    if done == n and parts is None:
        return

    def write(batch: jax.Array, first: int) -> None:
        images = hosts.gather(batch)[: n - first]
        if parts is not None:
            parts.add(images)
        progress(first + len(images))

    running = None
    sampler = build.build_sampler(run.config)
    batches = on_mesh.draw_batches(
        run, sampler, labels, seed=seed, batch_size=batch_size, mesh=mesh, start=done
    )
    for start, drawn, _ in batches:
        batch = pixels.to_uint8(drawn)
        if running is not None:
            write(*running)
        # Waiting here leaves at most one unfinished batch for a kill to take.
        running = (jax.block_until_ready(batch), start)
    if running is not None:
        write(*running)
    if parts is not None:
        write_json(f'{path}.json', identity)
        _assemble(path, parts.files, shape, labels)
        shutil.rmtree(parts.directory)
