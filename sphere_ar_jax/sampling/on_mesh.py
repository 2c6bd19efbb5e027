"""Sampling on all devices of a mesh.

Dimensions:
  n  images in all
  B  images of a batch
  b  images of a batch on one device
  L  tokens of an image
  d  latent dimension
  images are float32 (…, H, W, c)
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from sphere_ar_jax.config.build import Sampler
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.conditions import Condition, Labels
from sphere_ar_jax.models.vae import VAE, image_keys
from sphere_ar_jax.runtime import hosts, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import autoencoding, batching
from sphere_ar_jax.sampling.tokens import Drawn, Prefix, begin, go_on
from sphere_ar_jax.sampling.tokens import draw as draw_tokens


class Models(Protocol):
    """What is sampled from: both models and their parameters, as `training.run.Run` has them."""

    @property
    def vae(self) -> VAE:
        """The tokenizer."""

    @property
    def vae_params(self) -> PyTree:
        """Parameters of the tokenizer."""

    @property
    def ar(self) -> AR:
        """The AR model."""

    @property
    def ar_params(self) -> PyTree:
        """Parameters of the AR model."""


def _nothing(done: int) -> None:
    """Reports progress to nobody."""


def checked_labels(condition: Condition, labels: PyTree) -> PyTree:
    """Labels as a tree of NumPy arrays, a list as one array; whole numbers become int32.

    Raises:
      ValueError: the model does not know the labels; the message is one line.
    """

    def narrow(a: np.ndarray) -> np.ndarray:
        return a.astype(np.int32) if a.dtype.kind in 'iu' else a

    arrays = jax.tree.map(np.asarray, labels, is_leaf=lambda a: isinstance(a, list))
    condition.check(arrays)
    return jax.tree.map(narrow, arrays)


def _noise_numbers(index: ArrayLike | None, n: int) -> np.ndarray:
    """The numbers (n,) int32 of the images' noise, see `draw_batches`.

    Raises:
      UserError: they are not n whole numbers below 2³¹.
    """
    numbers = np.arange(n) if index is None else np.asarray(index)
    whole = numbers.dtype.kind in 'iu' and numbers.shape == (n,)
    if not whole or numbers.min() < 0 or numbers.max() >= 2**31:
        raise UserError(
            f'index must be {n} whole numbers from 0 to {2**31 - 1}, '
            f'but is {numbers.dtype} {numbers.shape}'
        )
    return numbers.astype(np.int32)


def _split_rows(function: Callable[..., PyTree], mesh: Mesh, specs: tuple) -> Callable[..., PyTree]:
    """Makes a function run on every device of a mesh, each on its own rows of the batch.

    Args:
      function: the function of one device's rows; its results have the rows in front.
      mesh: the devices.
      specs: how each argument is laid out.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=sharding.BATCH,
        # The compiler splits along the axis 'tensor', as the parameters are split.
        axis_names={'data', 'fsdp'},
        check_vma=False,
    )


def _spec(values: ArrayLike | None) -> sharding.PartitionSpec:
    """How a value for all images, () or None, or one for each, (B,), is laid out."""
    return sharding.BATCH if values is not None and jnp.ndim(values) else sharding.P()


def sampling_programs(
    ar: AR, vae: VAE, options: Options, mesh: Mesh
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """The two jitted programs of `program`, not compiled yet.

    Args:
      ar: the AR model with scan=False, see `ar.unstacked`.
      vae: the tokenizer.
      options: what the sampler does.
      mesh: devices that draw.

    Returns:
      (tokens, decode). The program `tokens` runs on all devices: (ar_params, labels, index, key,
        guidance_scale, temperature, prefix=None) → `Drawn` of (B, L, d). The program `decode` runs
        on one device, for its rows: (vae_params, tokens) → images.
    """
    on_tpus = mesh.devices.flat[0].platform == 'tpu'
    # The axis 'tensor' splits heads, which it could not where they share an axis with rows.
    rows_last = on_tpus and mesh.shape['tensor'] == 1 and not ar.fused

    def rows(ar_params, labels, index, key, guidance_scale, temperature, prefix):
        return draw_tokens(
            ar,
            ar_params,
            labels,
            image_keys(key, index),
            options,
            guidance_scale,
            temperature,
            project=vae.project,
            prefix=prefix,
            rows_last=rows_last,
        )

    def tokens(ar_params, labels, index, key, guidance_scale, temperature, prefix=None):
        whole = sharding.P()
        split = sharding.BATCH
        given = whole if prefix is None else Prefix(split, whole)
        specs = (whole, split, split, _spec(key), _spec(guidance_scale), whole, given)
        draw = _split_rows(rows, mesh, specs)
        return draw(ar_params, labels, index, key, guidance_scale, temperature, prefix)

    return jax.jit(tokens), autoencoding.decoder(vae)


# A page in the browser may ask for many numbers of steps, and each program takes memory.
KEPT_PROGRAMS = 32


@functools.lru_cache(maxsize=KEPT_PROGRAMS)
def program(
    ar: AR, vae: VAE, options: Options, mesh: Mesh
) -> Callable[..., tuple[jax.Array, Drawn]]:
    """Makes the function that draws a batch on a mesh, where each device has rows of its own.

    If the compiler split conditional and null rows by itself, devices would exchange data at every
    token. Here they exchange data only along the axis 'tensor', along which they share the heads
    and the cache of their rows. Parameters that are split along 'fsdp' are gathered once a batch.

    Where each device gets equally many rows and 'tensor' is 1, the images are the same bit for bit
    on any number of devices (seen on CPUs in float32). For this, every device decodes by a program
    of its own: XLA fuses the decoder's loops differently where it compiles for several devices.

    Args:
      ar: the AR model with scan=False, see `ar.unstacked`.
      vae: the tokenizer.
      options: what the sampler does.
      mesh: devices that draw.

    Returns:
      function of (ar_params, vae_params, labels, index (B,) int32, key, guidance_scale,
        temperature, prefix=None) → (images (B, H, W, c) float32, `Drawn` of (B, L, d)). Labels are
        a tree of (B, …), see `conditions`. Key and guidance scale are those of all images, (), or
        of each, (B,). What has rows of images is laid out by `sharding.place_batch`.
    """
    tokens, decode = sampling_programs(ar, vae, options, mesh)

    def draw(ar_params, vae_params, labels, index, key, guidance_scale, temperature, prefix=None):
        drawn = tokens(ar_params, labels, index, key, guidance_scale, temperature, prefix)
        return sharding.on_each_device(decode, mesh, vae_params, drawn.z), drawn

    return draw


@functools.lru_cache(maxsize=KEPT_PROGRAMS)
def row_programs(
    ar: AR, vae: VAE, options: Options, mesh: Mesh
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """The two jitted programs that draw a batch row by row of the token grid.

    They make the steps of `program`, where one program draws all tokens.

    Args:
      ar: the AR model with scan=False, see `ar.unstacked`.
      vae: the tokenizer.
      options: what the sampler does.
      mesh: devices that draw.

    Returns:
      (start, advance). The program `start` is (ar_params, labels) → carry. The program `advance` is
        (ar_params, carry, first, index, key, guidance_scale, temperature) → (carry, `Drawn` of (B,
        W, d)), where `first` is the number of the row's first token. The carry that it is given
        is donated.
    """
    whole = sharding.P()
    split = sharding.BATCH

    def start(ar_params, labels):
        def rows(ar_params, labels):
            return begin(ar, ar_params, labels, options)

        return _split_rows(rows, mesh, (whole, split))(ar_params, labels)

    def advance(ar_params, carry, first, index, key, guidance_scale, temperature):
        def rows(ar_params, carry, first, index, key, guidance_scale, temperature):
            return go_on(
                ar,
                ar_params,
                carry,
                first,
                ar.grid[1],
                image_keys(key, index),
                options,
                guidance_scale,
                temperature,
                project=vae.project,
            )

        specs = (whole, split, whole, split, _spec(key), _spec(guidance_scale), whole)
        draw = _split_rows(rows, mesh, specs)
        return draw(ar_params, carry, first, index, key, guidance_scale, temperature)

    return jax.jit(start), jax.jit(advance, donate_argnums=1)


def sampling_key(seed: int | jax.Array) -> jax.Array:
    """The key of all images that a seed stands for; image i folds it by i.

    The draws of training have another key. See `docs/method.md`, "Random numbers".
    """
    return jax.random.key(seed + 1)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the images of a call are drawn from; arrays have a row for each image.

    Attributes:
      labels: a tree of (n, …).
      index: numbers of the images' noise, (n,) int32.
      key: the key of all images, or None where each has its own.
      key_data: those of the images, (n, 2) uint32, or None.
      scale: the guidance scale: a number, (n,) float32, or None without guidance.
      prefix: tokens that are given, or None.
    """

    labels: Labels
    index: np.ndarray
    key: jax.Array | None
    key_data: np.ndarray | None
    scale: float | np.ndarray | None
    prefix: Prefix | None

    def batch(self, mesh: Mesh, rows: np.ndarray) -> tuple[Any, ...]:
        """The arguments of `program` for some rows: labels, index, key, scale and prefix."""
        scales = self.scale if isinstance(self.scale, np.ndarray) else None
        given = None if self.prefix is None else self.prefix.tokens
        arrays = (self.labels, self.index, self.key_data, scales, given)
        placed = sharding.place_batch(mesh, jax.tree.map(lambda a: a[rows], arrays))
        labels, index, key_data, scales, given = placed
        key = self.key if key_data is None else jax.random.wrap_key_data(key_data)
        scale = self.scale if scales is None else scales
        prefix = None if self.prefix is None else Prefix(given, self.prefix.length)
        return labels, index, key, scale, prefix


def _settings(
    models: Models,
    sampler: Sampler,
    labels: Labels,
    seed: int | np.ndarray,
    index: np.ndarray | None,
    prefix: Prefix | None,
) -> _Settings:
    """The checked settings of a call of `draw_batches`, which explains the arguments.

    Raises:
      ValueError: the model does not know the labels, or an array has no row for each image.
    """
    labels = checked_labels(models.ar.condition, labels)
    n = batching.count(labels)
    numbers = _noise_numbers(index, n)
    key = None
    key_data = None
    if isinstance(seed, np.ndarray):
        _require_rows('seed', seed, n)
        keys = jax.vmap(sampling_key)(jnp.asarray(seed, jnp.uint32))
        key_data = np.asarray(jax.random.key_data(keys))
    else:
        key = sampling_key(seed)
    scale = sampler.guidance_scale
    if isinstance(scale, np.ndarray):
        scale = scale.astype(np.float32)
        _require_rows('guidance_scale', scale, n)
    if prefix is not None:
        given = np.asarray(prefix.tokens, np.float32)
        _require_rows('prefix', given[:, 0, 0], n)
        prefix = Prefix(given, np.asarray(prefix.length, np.int32))
    return _Settings(labels, numbers, key, key_data, scale, prefix)


def _require_rows(name: str, rows: np.ndarray, n: int) -> None:
    """Raises UserError unless there is one row for each of n images."""
    if rows.shape != (n,):
        raise UserError(f'{name} must be one for all {n} images or one for each: {rows.shape}')


def draw_row_by_row(
    models: Models,
    sampler: Sampler,
    labels: Labels,
    *,
    seed: int | np.ndarray,
    index: np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, np.ndarray, Drawn]]:
    """Draws one image per label, and shows the images after each row of the token grid.

    The images are those of `draw_batches` up to rounding. All of them are one batch. Beside the
    sampling this costs H decodings of the batch, and a wait for the devices after each row.

    Args:
      models: see `draw_batches`.
      sampler: see `draw_batches`.
      labels: see `draw_batches`.
      seed: see `draw_batches`.
      index: see `draw_batches`.
      mesh: see `draw_batches`.

    Yields:
      (number k of tokens that are drawn, images (n, H, W, c) float32, `Drawn` of (n, k, d)) after
        each row. The decoder sees zeros in the place of the other tokens.

    Raises:
      ValueError: see `draw_batches`.
      NonFiniteSamples: an image is not finite.
    """
    settings = _settings(models, sampler, labels, seed, index, None)
    mesh = sharding.make_mesh() if mesh is None else mesh
    ar, ar_params = unstacked(models.ar, models.ar_params)
    start, advance = row_programs(ar, models.vae, sampler.options, mesh)
    n = len(settings.index)
    rows = batching.rows_of_process(0, sharding.whole_rows(mesh, n), n, mesh)
    placed, index, key, scale, _ = settings.batch(mesh, rows)
    carry = start(ar_params, placed)
    parts: list[Drawn] = []
    for first in range(0, ar.num_tokens, ar.grid[1]):
        number = np.int32(first)
        carry, drawn = advance(ar_params, carry, number, index, key, scale, sampler.temperature)
        parts.append(jax.tree.map(lambda a: hosts.gather(a)[:n], drawn))
        so_far = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *parts)
        missing = ar.num_tokens - so_far.z.shape[1]
        tokens = np.pad(so_far.z, ((0, 0), (0, missing), (0, 0)))
        images = batching.in_batches(
            autoencoding.decoder(models.vae), models.vae_params, tokens, n, mesh
        )
        batching.require_finite(np.isfinite(images).all((1, 2, 3)), 0)
        yield so_far.z.shape[1], images, so_far


def draw_batches(
    models: Models,
    sampler: Sampler,
    labels: Labels,
    *,
    seed: int | np.ndarray,
    index: np.ndarray | None = None,
    prefix: Prefix | None = None,
    batch_size: int = 250,
    mesh: Mesh | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[int, jax.Array, Drawn]]:
    """Draws one image per label, batch by batch; every command that samples goes through here.

    Image i is drawn from `sampling_key` folded by i alone, or by index[i]. Whatever batch and
    devices it is drawn in, it is the same up to rounding; see `program`. All processes call this
    with the same arguments. Other labels, seeds, numbers, guidance scales and lengths of the prefix
    need no compilation, as long as their shapes stay.

    Args:
      models: both models and their parameters.
      sampler: how they are sampled. Its guidance scale is a number, or one for each image, (n,).
      labels: labels of n images, see `conditions`.
      seed: see `sampling_key`; one for all images, or one for each, (n,).
      index: (n,) ints, or None for 0 to n − 1.
      prefix: tokens (n, L, d) of which the first are given, and their number; None gives none.
      batch_size: B. It is lowered to n if it is larger, then rounded up to a multiple of the mesh's
        devices.
      mesh: devices that draw; None stands for all devices.
      start: number of the first image to draw.
      stop: number after the last image to draw; None stands for n.

    Yields:
      (number of the first image, images (B, H, W, c) float32 about [−1, 1], `Drawn` of (B, L, d))
        of each batch, which is computed in the background. The caller must leave out the rows of
        the last batch that go beyond `stop`, and ask `are_finite` before it writes the others.

    Raises:
      ValueError: the model does not know the labels, or an array has no row for each image; the
        message is one line.
    """
    settings = _settings(models, sampler, labels, seed, index, prefix)
    mesh = sharding.make_mesh() if mesh is None else mesh
    ar, ar_params = unstacked(models.ar, models.ar_params)
    draw = program(ar, models.vae, sampler.options, mesh)
    vae_params = jax.device_put(models.vae_params, sharding.whole(mesh))  # Once for all batches.
    n = len(settings.index)
    size = sharding.whole_rows(mesh, min(batch_size, n))
    for first in range(start, n if stop is None else stop, size):
        rows = batching.rows_of_process(first, size, n, mesh)
        *batch, given = settings.batch(mesh, rows)
        images, drawn = draw(ar_params, vae_params, *batch, sampler.temperature, given)
        yield first, images, drawn


def draw_images(
    models: Models,
    sampler: Sampler,
    labels: Labels,
    *,
    seed: int | np.ndarray,
    index: np.ndarray | None = None,
    prefix: Prefix | None = None,
    batch_size: int = 250,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] = _nothing,
) -> tuple[np.ndarray, Drawn]:
    """Draws one image per label by `draw_batches`, and gathers them all with what was drawn.

    Args:
      models: see `draw_batches`.
      sampler: see `draw_batches`.
      labels: see `draw_batches`.
      seed: see `draw_batches`.
      index: see `draw_batches`.
      prefix: see `draw_batches`.
      batch_size: see `draw_batches`.
      mesh: see `draw_batches`.
      progress: called with the number of images done.

    Returns:
      (images (n, H, W, c) float32, about [−1, 1], `Drawn` of (n, L, d)). Every process gets all of
        them. All images are finite.

    Raises:
      ValueError: see `draw_batches`.
      NonFiniteSamples: an image is not finite.
    """
    labels = checked_labels(models.ar.condition, labels)
    n = batching.count(labels)
    batches = draw_batches(
        models,
        sampler,
        labels,
        seed=seed,
        index=index,
        prefix=prefix,
        batch_size=batch_size,
        mesh=mesh,
    )
    parts = []
    for first, images, drawn in batches:
        batching.require_finite_images(images, n - first, first)
        parts.append(jax.tree.map(lambda a: hosts.gather(a)[: n - first], (images, drawn)))
        progress(min(first + len(images), n))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
