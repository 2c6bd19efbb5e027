"""The statistics that standardise latents for the AR model (`docs/method.md`, "Token spaces").

They are the mean and the standard deviation of each latent dimension, or of log ‖z‖ alone, over the
tokens of training images. `WORKDIR/tokenizer/statistics.json` keeps them beside the tokenizer that
they belong to.

Dimensions:
  n  images that are measured
  B  images of a batch
  L  tokens of an image
  d  numbers that `VAE.measured` gives for a token
"""

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from sphere_ar_jax.data import batches as data_batches
from sphere_ar_jax.models.vae import VAE, batch_posterior, image_keys
from sphere_ar_jax.runtime import checkpoint, files, hosts, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree

# The most images that are measured. 50,000 images of 256 tokens give a mean to 0.03% of a spread.
MOST_IMAGES = 50_000
# The least standard deviation, so that a dimension in which all tokens agree can be divided by it.
LEAST_STD = 1e-6


def path(workdir: str | os.PathLike[str]) -> epath.Path:
    """The file of the statistics in a workdir."""
    return epath.Path(workdir, 'tokenizer', 'statistics.json')


@functools.cache
def _latents(vae: VAE) -> Callable[..., jax.Array]:
    """The compiled function (params, batch of B images, index (B,), key) → numbers (B, L, d)."""

    def draw(params, batch, index, key):
        q = batch_posterior(vae, params, batch)
        return vae.measured(q.sample(q.draws(image_keys(key, index))))

    return jax.jit(draw)


def measure(
    vae: VAE,
    params: PyTree,
    source: Any,
    *,
    seed: int,
    batch_size: int,
    mesh: Mesh,
    reading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures the latents of the first images of a training's order, each once.

    Image i of that order draws its latents from the key `fold_in(key(seed + 2), i)`. All processes
    call this. The sums are made in float64.

    Args:
      vae: the tokenizer.
      params: its parameters.
      source: the images, see `data.batches.batches`.
      seed: seed of the order and of the draws.
      batch_size: B.
      mesh: the devices.
      reading: further arguments of `data.batches.batches`.

    Returns:
      A dictionary of images (n), mean (d numbers) and std (d numbers, at least `LEAST_STD`).
    """
    n = min(len(source), MOST_IMAGES)
    rows = sharding.local_rows(mesh, batch_size)
    key = jax.random.key(seed + 2)
    count = 0
    d = vae.num_statistics
    total = np.zeros(d)
    squares = np.zeros(d)
    with data_batches.batches(
        source, batch_size=batch_size, seed=seed, rows=rows, **(reading or {})
    ) as batches:
        for first in range(0, n, batch_size):
            batch, index = sharding.place_batch(mesh, (next(batches), first + rows))
            drawn = hosts.gather(_latents(vae)(params, batch, index, key))
            z = drawn[: n - first].reshape(-1, d).astype(np.float64)
            count += len(z)
            total += z.sum(axis=0)
            squares += (z**2).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return {
        'images': n,
        'mean': mean.tolist(),
        'std': np.maximum(std, LEAST_STD).tolist(),
    }


def read(vae: VAE, params: PyTree, workdir: str | os.PathLike[str]) -> PyTree:
    """Adds the statistics that a workdir keeps to the tokenizer's parameters.

    Args:
      vae: the tokenizer.
      params: its parameters.
      workdir: the workdir of the AR model.

    Returns:
      The parameters as `VAE.with_statistics` gives them.

    Raises:
      FileNotFoundError: the token space needs statistics, but there are none yet.
      UserError: the file is damaged.
    """
    if not vae.num_statistics:
        return params
    file = path(workdir)
    if not file.exists():
        raise FileNotFoundError(f'{workdir} has no statistics of the latents yet: train it first')
    kept = files.read_json(file)
    d = vae.num_statistics
    is_whole = isinstance(kept, dict) and all(_are_numbers(kept.get(k), d) for k in ('mean', 'std'))
    if not is_whole or min(kept['std']) <= 0:
        raise UserError(
            f'{file} does not hold the statistics of {d} numbers: remove it, and training '
            'writes it again'
        )
    return vae.with_statistics(params, kept['mean'], kept['std'])


def _are_numbers(values: Any, count: int) -> bool:
    """Whether a value is a list of so many finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(x, int | float) and math.isfinite(x) for x in values)


def add(
    vae: VAE, params: PyTree, source: Any, workdir: str | os.PathLike[str], **measuring: Any
) -> PyTree:
    """Adds the statistics to the tokenizer's parameters, and measures them where there are none.

    A file that was measured for other parameters is written again.

    Args:
      vae: the tokenizer.
      params: its parameters.
      source: see `measure`.
      workdir: the workdir of the AR model.
      **measuring: the other arguments of `measure`.

    Returns:
      The parameters as `VAE.with_statistics` gives them.
    """
    if not vae.num_statistics:
        return params
    tokenizer = checkpoint.fingerprint(params)
    file = path(workdir)
    kept = files.read_json(file) if file.exists() else None
    is_ours = isinstance(kept, dict) and kept.get('tokenizer') == tokenizer
    # All processes have looked before the first one writes, and all do the same.
    if int(hosts.largest(int(not is_ours))) == 0:
        return read(vae, params, workdir)
    print('measuring the latents of the training images', flush=True)
    found = measure(vae, params, source, **measuring)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file, found | {'tokenizer': tokenizer})
    hosts.wait()
    # A network's disk may hide the file from other processes for a while.
    return vae.with_statistics(params, found['mean'], found['std'])
