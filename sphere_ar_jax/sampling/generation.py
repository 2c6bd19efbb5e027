"""Many images from one model to one npz: in batches, on all devices, and on again after a kill.

Image i is drawn from the key folded by i, so that it is the same whatever the batch size, the
devices and the starts that it took. With as many rows on each device its tokens are so bit for bit,
and its pixels to a rounding before they become bytes; otherwise products of other shapes round
otherwise. See `on_mesh.sampler`.

All processes of a run draw; the first one alone reads and writes files.

Dimensions:
  n  images in all      B  images of a batch      images are uint8 (n, H, W, c)
"""

import json
import math
import os
import shutil
import zipfile
import zlib

import jax
import numpy as np

from sphere_ar_jax.config import build
from sphere_ar_jax.data import pixels
from sphere_ar_jax.runtime import checkpoint, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.files import replace, write_json
from sphere_ar_jax.sampling import on_mesh

LABELS = ('uniform', 'balanced')


def draw_labels(kind, n, num_classes, seed):
    """Labels (n,) int32 of the images to draw; label i does not depend on n.

    Args:
      kind: 'uniform', each at random by seed and i, as published; 'balanced', i mod num_classes; or
        the path of a file with n whole numbers, .npy or text.
    Raises UserError for a file that is no such list, or not there; OSError where it cannot be read.
    """
    if kind == 'balanced':
        return (np.arange(n) % num_classes).astype(np.int32)
    if kind == 'uniform':
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b'labels'))
        one = lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, num_classes)
        return np.asarray(jax.jit(jax.vmap(one))(np.arange(n)), np.int32)
    if not os.path.exists(kind):
        raise UserError(
            f'there is no file {kind}; labels are uniform, balanced, or a file of whole numbers'
        )
    try:  # mapped: a wrong header takes no memory
        npy = kind.endswith('.npy')
        labels = np.load(kind, mmap_mode='r') if npy else np.loadtxt(kind, dtype=np.int64, ndmin=1)
    except (ValueError, EOFError, OverflowError) as error:
        raise UserError(f'{kind} is no list of whole numbers: {error}') from None
    if not isinstance(labels, np.ndarray):
        raise UserError(f'{kind} is an npz, but must be an npy or text')
    if labels.shape != (n,) or labels.dtype.kind not in 'iu':
        raise UserError(
            f'{kind} must hold {n} whole numbers, but holds {labels.dtype} {labels.shape}'
        )
    if not ((labels >= 0) & (labels < num_classes)).all():
        raise UserError(f'{kind}: labels must lie between 0 and {num_classes - 1}')
    return labels.astype(np.int32)


def _identity(run, labels, seed):
    """What the images depend on, to be compared before a run goes on: as JSON takes it."""
    s = run.config.sampling.to_dict() | {'num_images': len(labels)}
    s.pop('batch_size')
    params = checkpoint.fingerprint((run.ar_params, run.vae_params))
    crc = lambda values, kind: zlib.crc32(np.asarray(values, kind).tobytes())
    about = {
        'sampling': s,
        'seed': seed,
        'key': np.asarray(jax.random.key_data(on_mesh.sampling_key(seed))).tolist(),
        'dtype': run.config.dtype,
        'model': [
            run.vae.grid,
            run.config.vae.heads,
            run.ar.heads,
        ],  # what the shapes of parameters do not tell
        'labels': crc(labels, np.int32),
        'parameters': crc(params, np.uint32),
    }
    return json.loads(json.dumps(about))  # tuples become lists


def _is_of(about, identity):
    """Whether the file `about` says that samples are those of `identity`."""
    try:
        with open(about) as f:
            return json.load(f) == identity
    except (OSError, ValueError):
        return False


class _Parts:
    """The batches done so far, each a file of a directory that says what they are of."""

    def __init__(self, directory, identity, shape):
        self.directory, self.done, self.files = directory, 0, []
        about = os.path.join(directory, 'about.json')
        if os.path.exists(about) and not _is_of(about, identity):
            raise UserError(
                f'{directory} holds samples of other settings: remove it, or take another --output'
            )
        os.makedirs(directory, exist_ok=True)
        write_json(about, identity)
        while os.path.exists(self._path(self.done)):
            try:
                part = np.load(self._path(self.done), mmap_mode='r')
            except (ValueError, OSError, EOFError):
                break  # cut off: drawn again
            if (
                part.dtype != np.uint8
                or part.shape[1:] != shape[1:]
                or not 0 < len(part) <= shape[0] - self.done
            ):
                break
            self.files.append(self._path(self.done))
            self.done += len(part)

    def _path(self, start):
        return os.path.join(self.directory, f'{start:08d}.npy')

    def add(self, images):
        path = self._path(self.done)
        replace(path, lambda f: np.save(f, images))
        self.files.append(path)
        self.done += len(images)


def _assemble(path, files, shape, labels):
    """Writes samples.npz, part by part: `arr_0` images, `arr_1` labels, as ADM's evaluator reads
    them.
    """

    def write(f):
        with zipfile.ZipFile(f, 'w', zipfile.ZIP_STORED) as archive:
            with archive.open('arr_0.npy', 'w', force_zip64=True) as member:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': tuple(shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for file in files:
                    member.write(np.load(file).tobytes())
            with archive.open('arr_1.npy', 'w', force_zip64=True) as member:
                np.lib.format.write_array(member, labels)

    replace(path, write)


def images(path):
    """Yields the images of a file that `generate` wrote, uint8 (H, W, c), one at a time in memory."""
    with zipfile.ZipFile(path) as archive, archive.open('arr_0.npy') as f:
        np.lib.format.read_magic(f)
        (n, *shape), _, _ = np.lib.format.read_array_header_1_0(f)
        for _ in range(n):
            yield np.frombuffer(f.read(math.prod(shape)), np.uint8).reshape(shape)


def _begin(path, identity, shape):
    """The `_Parts` of a file that is not whole yet; None where it is, of the same settings."""
    if not os.path.exists(path):
        return _Parts(f'{path}.parts', identity, shape)
    if not _is_of(f'{path}.json', identity):
        raise UserError(
            f'{path} holds samples of other settings: move it away, or take another --output'
        )
    shutil.rmtree(f'{path}.parts', ignore_errors=True)  # a kill may have left it
    return None


def generate(run, labels, seed, path, *, batch_size, mesh, progress=lambda done: None):
    """Draws an image for each label and writes them to an npz with `arr_0`, uint8 (n, H, W, c), and
    `arr_1`, labels.

    Batches lie in `PATH.parts` until all are there: a run that was killed goes on behind the last
    one. The file appears whole or not at all; where it is there already, of the same settings,
    nothing is done. While a batch is computed, the one before is written.

    Args:
      run: `run.Run`. labels: (n,) int32. seed: of all images' keys. path: ends in .npz.
      batch_size: B, rounded up to a multiple of the mesh's devices.
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

    def write(images, first):
        images = hosts.gather(images)[: n - first]
        if parts is not None:
            parts.add(images)
        progress(first + len(images))

    running = None
    sampler = build.build_sampler(run.config)
    for start, images, _ in on_mesh.draw_batches(
        run, sampler, labels, seed=seed, batch_size=batch_size, mesh=mesh, start=done
    ):
        images = pixels.to_uint8(images)
        if running is not None:
            write(*running)
        running = (
            jax.block_until_ready(images),
            start,
        )  # never two unfinished batches, for a kill to take
    if running is not None:
        write(*running)
    if parts is not None:
        write_json(f'{path}.json', identity)
        _assemble(path, parts.files, shape, labels)
        shutil.rmtree(parts.directory)
