"""Sampling and autoencoding on all devices of a mesh."""

import functools

import jax
import numpy as np

from sphere_ar_jax.models.ar import unstacked
from sphere_ar_jax.models.vae import draw_tokens
from sphere_ar_jax.runtime import hosts, sharding
from sphere_ar_jax.sampling.tokens import sample_tokens


def _in_batches(run, arrays, batch_size, mesh, progress=lambda done: None):
    """Applies `run` to whole batches of arrays (n, …), rows split over the mesh (batch_size is rounded up to a multiple
    of its devices); the last batch is filled up and cut.

    Of several processes all call it, with the same arrays.

    Returns the results, a tuple of NumPy arrays (n, …), whole in each process.
    """
    n, parts = len(arrays[0]), []
    batch_size = -(-batch_size // mesh.size) * mesh.size
    for start in range(0, n, batch_size):
        rows = np.arange(start, start + batch_size) % n  # whole batches only: one compilation
        rows = rows[sharding.local_rows(mesh, batch_size)]
        results = run(*sharding.place_batch(mesh, tuple(a[rows] for a in arrays)))
        parts.append([hosts.gather(result)[: n - start] for result in results])
        progress(min(start + batch_size, n))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@functools.cache
def autoencoder(vae):
    """For one device, the compiled ((params, key's data), (images, index)) → results (b, …) of `reconstruct`."""

    def run(frozen, rows):
        (params, key), (images, index) = frozen, rows
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(key), index)
        z, posterior = draw_tokens(vae, params, images, keys)
        return vae.apply({'params': params}, z, method='decode'), posterior.kl(), posterior.kappa

    return jax.jit(run)


def reconstruct(vae, params, images, key, batch_size, mesh, first=0):
    """Autoencodes images (n, H, W, c) with posterior samples, one key per image folded by `first` + its index.

    Every device its own rows, by a program of its own: libtpu 0.0.52 aborts on the decoder with rows split by `BATCH`.

    Returns:
      (reconstructions (n, H, W, c), mean KL in nats per token, mean kappa).
    """
    key = np.asarray(jax.random.key_data(key))  # keys themselves cannot be put on other processes' devices
    frozen = jax.device_put((params, key), sharding.whole(mesh))  # once for all batches
    run = lambda *rows: sharding.on_each_device(autoencoder(vae), mesh, frozen, rows)
    recon, kl, kappa = _in_batches(run, (images, first + np.arange(len(images))), batch_size, mesh)
    return recon, float(kl.mean()), float(kappa.mean())


def sampling_programs(ar, vae, options, mesh):
    """The two programs of `sampler`, not compiled yet.

    Returns:
      (tokens, of all devices: (ar_params, labels, index, key, guidance_scale, temperature) → (B, L, d); decode, of one
      device and its rows: (vae_params, tokens) → images).
    """

    def rows(ar_params, labels, index, key, guidance_scale, temperature):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        return sample_tokens(ar, ar_params, labels, keys, options, guidance_scale, temperature)

    whole, split = sharding.P(), sharding.BATCH
    specs = (whole, split, split, whole, whole, whole)
    by_rows = {'data', 'fsdp'}  # along 'tensor' the compiler splits, as the parameters are
    tokens = jax.jit(
        jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=split, axis_names=by_rows, check_vma=False)
    )
    return tokens, jax.jit(lambda params, z: vae.apply({'params': params}, z, method='decode'))


@functools.cache
def sampler(ar, vae, options, mesh):
    """`tokens.sample_images` for the rows of a mesh: every device draws and decodes its own.

    The compiler's own split of conditional and null rows would send data between devices at every token; this way none
    is sent but along the axis 'tensor', along which the devices share the heads and the cache of their rows. Parameters
    that are split along 'fsdp' are gathered once a batch. Where each device gets equally many rows and 'tensor' is 1,
    the images are the same bit for bit on any number of devices (seen on CPUs in float32); the decoder is a program of
    each device for that, since XLA fuses its loops otherwise where it compiles for several at once.
    ar: see `ar.unstacked`. options: `plan.Options`.

    Returns:
      function of (ar_params, vae_params, labels (B,) int32, index (B,) int32, key, guidance_scale, temperature) →
      (images (B, H, W, c) float32, tokens (B, L, d)); labels and index as `sharding.place_batch` lays them out.
    """
    tokens, decode = sampling_programs(ar, vae, options, mesh)

    def draw(ar_params, vae_params, labels, index, key, guidance_scale, temperature):
        z = tokens(ar_params, labels, index, key, guidance_scale, temperature)
        return sharding.on_each_device(decode, mesh, vae_params, z), z

    return draw


def sample_images(
    ar,
    vae,
    ar_params,
    vae_params,
    labels,
    key,
    options,
    *,
    batch_size,
    mesh,
    guidance_scale,
    temperature,
    index=None,
    progress=lambda done: None,
):
    """Draws one image per label, `batch_size` at a time; image i's key is folded from i alone, or from index[i].

    Args:
      labels: (n,) ints. key: PRNG key. options: `plan.Options`. index: (n,) ints or None.
      progress: called with the number of images done.
    Returns:
      images (n, H, W, c) float32, about [−1, 1], the same for any batch size and mesh up to rounding; see `sampler`.
    """
    ar, ar_params = unstacked(ar, ar_params)
    draw = sampler(ar, vae, options, mesh)
    vae_params = jax.device_put(vae_params, sharding.whole(mesh))  # once for all batches
    run = lambda *rows: draw(ar_params, vae_params, *rows, key, guidance_scale, temperature)
    index = np.arange(len(labels)) if index is None else index
    arrays = np.asarray(labels, np.int32), np.asarray(index, np.int32)
    return _in_batches(run, arrays, batch_size, mesh, progress)[0]
