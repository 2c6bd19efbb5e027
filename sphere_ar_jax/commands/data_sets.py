"""--mode=pack copies images to ArrayRecord files, --mode=encode writes latents of them."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import beside, checks, recipes
from sphere_ar_jax.data import augment, imagenet, small, sources
from sphere_ar_jax.data.files import array_records, latents
from sphere_ar_jax.evaluation import class_names
from sphere_ar_jax.models import posteriors
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime import checkpoint, console, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import batching
from sphere_ar_jax.training.run import Run
from sphere_ar_jax.training.workdir import is_trained

_BATCH = 64  # images that are encoded at a time

# Reads image i as the tokenizer takes it: {'image': (H, W, c) float32, 'label'}, None if broken.
_Read = Callable[[int], dict[str, Any] | None]


def pack(
    data: str,
    output: str,
    *,
    shards: int = 128,
    split: str | None = None,
    data_dir: str | None = None,
    labels: str | None = None,
) -> None:
    """Copies images to sharded ArrayRecord files.

    A training reads them with --config.data.name=array_records and --config.data.path=OUTPUT.

    Args:
      data: KIND:PATH, see `recipes.data_set`.
      output: the directory to write.
      shards: the number of files.
      split: the split of tfds or hf, None for 'train'.
      data_dir: the directory of tfds or hf, None for its default.
      labels: 'none' for images whose labels cannot be told or mean nothing, as those that have
        captions: where they cannot be told, all images are a single class. None needs labels.

    Raises:
      UserError: the images are a small data set or cannot be read, or the directory exists or
        cannot be written.
    """
    kind, path = recipes.data_set(data)
    if kind in small.KINDS:
        raise UserError(small.KINDS[kind].unpackable)
    if labels not in (None, 'none'):
        raise UserError(f"--labels is {labels}: --mode=pack takes 'none' alone")
    sources.check_split(kind, split, data_dir)
    sources.require_images(kind, path)
    array_records.require_new(output)
    bar = console.bar(None, 'reading the tar', 'byte')
    source = sources.open_source(
        kind, path, split or 'train', data_dir, bar, needs_labels=labels is None
    )
    sources.pack(source, output, shards, console.bar(len(source), 'packed'))
    classes = class_names.describe(source.num_classes, source.class_names)
    print(f'{output}: {len(source)} images of {classes}')
    if source.left_out:
        print(f'left out: {source.left_out}')


class _Named:
    """The training images of a small data set, as a source whose images have names."""

    left_out = ''

    def __init__(self, kind: str, split: small.Split) -> None:
        self.num_classes = split.num_classes
        self.class_names = split.class_names
        self._kind = kind
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._split[i]

    def name(self, i: int) -> str:
        return f'{self._kind} [{i}]'


def _open_images(
    cfg: ConfigDict,
    vae: VAE,
    kind: str,
    path: str | None,
    split: str = 'train',
    data_dir: str | None = None,
) -> sources.Images:
    """Opens the training images to encode; see `encode`.

    Small images of the run's own kind are those of the run's classes, in its brightness.

    Raises:
      UserError: they cannot be opened, or small images are not of the tokenizer's size.
    """
    if kind in small.KINDS:
        own = (cfg.data.classes, cfg.data.brightness) if kind == cfg.data.name else ()
        data = small.open_data_set(kind, path, cfg.seed, cfg.data.holdout, *own)
        data = small.enlarged(data, cfg.data.enlarge)
        checks.check_image_shape(kind, data.train.image_shape, vae.image_shape)
        return _Named(kind, data.train)
    if path is None:
        raise UserError('give --data=KIND:PATH: the config of this run names no images')
    bar = console.bar(None, 'reading the tar', 'byte')
    sources.require_images(kind, path)
    return sources.open_source(kind, path, split, data_dir, bar)


def _reader(run: Run, kind: str, source: sources.Images) -> _Read:
    """What reads an image as a training without augmentation does: cropped at the centre."""
    if kind in small.KINDS:
        return source.__getitem__
    size, _, channels = run.vae.image_shape
    as_stored = imagenet.are_synsets(source.class_names)
    draft = run.config.data.draft
    central = augment.Augmentation(size, 0, 0, draft, as_stored, channels, flip=False)

    def read(i: int) -> dict[str, Any] | None:
        try:
            return central(source[i], 0, np.random.default_rng(0))
        except augment.BrokenImageError as error:
            print(f'{source.name(i)} is broken: it is left out ({error})', file=sys.stderr)
            return None

    return read


def _read_ahead(read: _Read, n: int, size: int) -> Iterator[list[dict[str, Any] | None]]:
    """Yields the images 0 … n − 1, `size` at a time. The next ones are read meanwhile."""
    with futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:

        def begin(start: int) -> list[futures.Future[dict[str, Any] | None]]:
            return [pool.submit(read, i) for i in range(start, min(start + size, n))]

        waiting = begin(0)
        for start in range(0, n, size):
            ready = waiting
            waiting = begin(start + size)
            yield [future.result() for future in ready]


@functools.cache
def _encoder(vae: VAE) -> Callable[[PyTree, jax.Array], dict[str, jax.Array]]:
    """The compiled program (params, images (b, H, W, c)) → parameters of the posterior by name."""

    def encode(params: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        return posteriors.parameters(vae.apply({'params': params}, images, method='encode'))

    return jax.jit(encode)


def _entries(
    run: Run, mesh: Mesh, source: sources.Images, read: _Read
) -> Iterator[dict[str, Any] | None]:
    """Yields for each image of a source what `latents.write` takes, None where it is broken."""
    params = jax.device_put(run.vae_params, sharding.whole(mesh))  # once for all batches
    size = sharding.whole_rows(mesh, _BATCH)
    first = 0
    for records in _read_ahead(read, len(source), size):
        # Always as many, so that one program is compiled; broken images stay black.
        images = np.zeros((size, *run.vae.image_shape), np.float32)
        for row, record in enumerate(records):
            if record is not None:
                images[row] = record['image']
        found = batching.in_batches(_encoder(run.vae), params, images, size, mesh)
        for row, record in enumerate(records):
            if record is None:
                yield None
                continue
            posterior = {name: values[row] for name, values in found.items()}
            name = source.name(first + row)
            yield {'posterior': posterior, 'label': record['label'], 'name': name}
        first += len(records)


def encode(
    workdir: str,
    output: str,
    *,
    data: str | None = None,
    shards: int = 128,
    split: str | None = None,
    data_dir: str | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Writes the latents of images: the parameters of their tokens' posteriors, and their labels.

    A training of an AR model on the same tokenizer reads them with --config.data.name=latents and
    --config.data.path=OUTPUT. Images are cropped at the centre and not flipped. Broken images are
    named and left out.

    Args:
      workdir: the run whose tokenizer encodes.
      output: the directory to write.
      data: KIND:PATH, see `recipes.data_set`; None takes the images of the run's config. The
        digits and IDX files give their training images.
      shards: the number of files.
      split: the split of tfds or hf; None takes that of the run's config.
      data_dir: the directory of tfds or hf; None takes that of the run's config.
      like: a config whose dtype and mesh are taken, and that may say where the run's images are
        now, see `config.beside`.

    Raises:
      UserError: there is no tokenizer that is trained to its end, the images cannot be read, or the
        directory exists or cannot be written.
    """
    array_records.require_new(output)
    own = beside.for_the_images(open_run.config_of(workdir), like if data is None else None)
    d = own.data
    kind, path = (d.name, d.path) if data is None else recipes.data_set(data)
    sources.check_split(kind, split, data_dir)
    run, mesh = open_run.open_run(workdir, like, tokenizer_only=True)
    if not is_trained(run.config.tokenizer or workdir, 'tokenizer'):
        raise UserError(f'the tokenizer of {workdir} is not trained to its end')
    source = _open_images(own, run.vae, kind, path, split or d.split, data_dir or d.data_dir)
    n = len(source)
    about = {
        'num_classes': source.num_classes,
        'class_names': source.class_names,
        'left_out': source.left_out,
        'tokenizer': checkpoint.digest(run.vae_params),
    }
    entries = _entries(run, mesh, source, _reader(run, kind, source))
    bar = console.bar(n, 'encoded')
    broken = latents.write(output, entries, sources.hashes(source), about, shards, bar)
    classes = class_names.describe(source.num_classes, source.class_names)
    print(f'{output}: latents of {n - broken} images of {classes}')
    if source.left_out or broken:
        print(f'left out: {latents.Latents(output).left_out}')
