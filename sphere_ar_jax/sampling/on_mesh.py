"""Sampling and autoencoding on all devices of a mesh."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from sphere_ar_jax.config.build import Sampler
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.conditions import Labels
from sphere_ar_jax.models.vae import VAE, draw_tokens
from sphere_ar_jax.runtime import hosts, sharding
from sphere_ar_jax.sampling.tokens import sample_tokens


class Models(Protocol):
    """What is sampled from: both models and their parameters, as `run.Run` has them."""

    vae: VAE
    vae_params: Any
    ar: AR
    ar_params: Any


def _nothing(done: int) -> None:
    """Progress that nobody watches."""


def _arrays(labels: Any) -> Any:
    """Labels as a tree of NumPy arrays; whole numbers become int32. A list is one array."""

    def array(a):
        a = np.asarray(a)
        return a.astype(np.int32) if a.dtype.kind in 'iu' else a

    return jax.tree.map(array, labels, is_leaf=lambda a: isinstance(a, list))


def _count(labels: Any) -> int:
    """The number of images that labels are for."""
    return len(jax.tree.leaves(labels)[0])


def _rows_of_process(start: int, size: int, n: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch that this process loads. The last batch begins anew: so one compilation
    serves them all.
    """
    return (start + sharding.local_rows(mesh, size)) % n


@functools.cache
def autoencoder(vae: VAE) -> Callable[..., Any]:
    """For one device, the compiled ((params, key's data), (images, index)) → results (b, …) of
    `reconstruct`.
    """

    def run(frozen, rows):
        (params, key), (images, index) = frozen, rows
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(key), index)
        z, q = draw_tokens(vae, params, images, keys)
        return vae.apply({'params': params}, z, method='decode'), q

    return jax.jit(run)


def reconstruct(
    vae: VAE,
    params: Any,
    images: np.ndarray,
    key: jax.Array,
    batch_size: int,
    mesh: Mesh,
    first: int = 0,
) -> tuple[np.ndarray, dict[str, float]]:
    """Autoencode images (n, H, W, c) with posterior samples, one key per image folded by `first` +
    its index.

    Every device takes its own rows in a program of its own: libtpu 0.0.52 aborts on the decoder
    with rows split by `sharding.BATCH`. All processes call it with the same images.

    Returns:
      (reconstructions (n, H, W, c), the posterior's statistics over all images), whole in each
        process.
    """
    key = np.asarray(
        jax.random.key_data(key)
    )  # keys themselves cannot be put on other processes' devices
    frozen = jax.device_put((params, key), sharding.whole(mesh))  # once for all batches
    n = len(images)
    size = sharding.whole_rows(mesh, batch_size)
    index = first + np.arange(n)
    parts = []
    for start in range(0, n, size):
        rows = _rows_of_process(start, size, n, mesh)
        batch = sharding.place_batch(mesh, (images[rows], index[rows]))
        results = sharding.on_each_device(autoencoder(vae), mesh, frozen, batch)
        parts.append(jax.tree.map(lambda a, start=start: hosts.gather(a)[: n - start], results))
    recon, q = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return recon, {name: float(value) for name, value in q.statistics().items()}


def sampling_programs(ar: AR, vae: VAE, options: Options, mesh: Mesh) -> tuple[Any, Any]:
    """The two programs of `program`, not compiled yet.

    Returns:
      (tokens, of all devices: (ar_params, labels, index, key, guidance_scale, temperature) → (B, L,
        d); decode, of one
      device and its rows: (vae_params, tokens) → images).
    """

    def rows(ar_params, labels, index, key, guidance_scale, temperature):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        return sample_tokens(
            ar,
            ar_params,
            labels,
            keys,
            options,
            guidance_scale,
            temperature,
            project=vae.posterior.project,
        )

    whole, split = sharding.P(), sharding.BATCH
    specs = (whole, split, split, whole, whole, whole)
    by_rows = {'data', 'fsdp'}  # along 'tensor' the compiler splits, as the parameters are
    tokens = jax.jit(
        jax.shard_map(
            rows, mesh=mesh, in_specs=specs, out_specs=split, axis_names=by_rows, check_vma=False
        )
    )
    return tokens, jax.jit(lambda params, z: vae.apply({'params': params}, z, method='decode'))


@functools.cache
def program(
    ar: AR, vae: VAE, options: Options, mesh: Mesh
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Tokens and images of a batch, compiled for a mesh: every device draws and decodes its own
    rows.

    The compiler's own split of conditional and null rows would send data between devices at every
    token; this way none is sent but along the axis 'tensor', along which the devices share the
    heads and the cache of their rows. Parameters that are split along 'fsdp' are gathered once a
    batch. Where each device gets equally many rows and 'tensor' is 1, the images are the same bit
    for bit on any number of devices (seen on CPUs in float32); the decoder is a program of each
    device for that, since XLA fuses its loops otherwise where it compiles for several at once. ar:
    see `ar.unstacked`. options: `plan.Options`.

    Returns:
      function of (ar_params, vae_params, labels (B,) int32, index (B,) int32, key, guidance_scale,
        temperature) →
      (images (B, H, W, c) float32, tokens (B, L, d)); labels and index as `sharding.place_batch`
        lays them out.
    """
    tokens, decode = sampling_programs(ar, vae, options, mesh)

    def draw(ar_params, vae_params, labels, index, key, guidance_scale, temperature):
        z = tokens(ar_params, labels, index, key, guidance_scale, temperature)
        return sharding.on_each_device(decode, mesh, vae_params, z), z

    return draw


def sampling_key(seed: int) -> jax.Array:
    """The key of all images that a seed stands for; training's draws have another. Image i folds it
    by i.
    """
    return jax.random.key(seed + 1)


def draw_batches(
    models: Models,
    sampler: Sampler,
    labels: Labels,
    *,
    seed: int,
    index: np.ndarray | None = None,
    batch_size: int = 250,
    mesh: Mesh | None = None,
    start: int = 0,
) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """Draw one image per label, batch by batch; every command that samples goes through here.

    Image i is drawn from `sampling_key` folded by i alone, or by index[i]: in whatever batch and on
    whatever devices it is, it is the same up to rounding. See `program`. All processes call it with
    the same arguments.

    Args:
      labels: of n images, see `conditions`. index: (n,) ints or None. start: the first image, a
        multiple of the batch
      size. batch_size: n if that is less, rounded up to a multiple of the mesh's devices. mesh: all
        devices if None.
    Yields:
      (number of the first image, images (B, H, W, c) float32 about [−1, 1], tokens (B, L, d)) of
        each batch, which is
      computed in the background. What goes beyond n in the last one is to be left out.
    Raises ValueError, one line, for labels that the model does not know.
    """
    labels = _arrays(labels)
    models.ar.condition.check(labels)
    mesh = sharding.make_mesh() if mesh is None else mesh
    ar, ar_params = unstacked(models.ar, models.ar_params)
    draw = program(ar, models.vae, sampler.options, mesh)
    vae_params = jax.device_put(models.vae_params, sharding.whole(mesh))  # once for all batches
    n = _count(labels)
    index = np.arange(n, dtype=np.int32) if index is None else _arrays(index)
    key = sampling_key(seed)
    size = sharding.whole_rows(mesh, min(batch_size, n))
    for first in range(start, n, size):
        rows = _rows_of_process(first, size, n, mesh)
        batch = sharding.place_batch(
            mesh, jax.tree.map(lambda a, rows=rows: a[rows], (labels, index))
        )
        images, tokens = draw(
            ar_params, vae_params, *batch, key, sampler.guidance_scale, sampler.temperature
        )
        yield first, images, tokens


def sample_images(
    models: Models,
    sampler: Sampler,
    labels: Labels,
    *,
    seed: int,
    index: np.ndarray | None = None,
    batch_size: int = 250,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] = _nothing,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image per label: `draw_batches`, gathered.

    Args:
      progress: called with the number of images done. The others: see `draw_batches`.
    Returns:
      (images (n, H, W, c) float32, about [−1, 1], tokens (n, L, d)), whole in each process.
    """
    n = _count(_arrays(labels))
    batches = draw_batches(
        models, sampler, labels, seed=seed, index=index, batch_size=batch_size, mesh=mesh
    )
    images = []
    tokens = []
    for first, drawn, z in batches:
        images.append(hosts.gather(drawn)[: n - first])
        tokens.append(hosts.gather(z)[: n - first])
        progress(min(first + len(drawn), n))
    return np.concatenate(images), np.concatenate(tokens)
