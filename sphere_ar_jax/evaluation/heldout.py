"""The loss of a training on images that it never sees, by which overfitting shows.

Dimensions:
  n  held-out images     B  images of a batch     H, W, c  an image
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import losses
from sphere_ar_jax.training.state import Batch, Scalars, Stage

# Scalars of a stage's loss that are shown beside the loss itself, where the stage has them.
_SHOWN = ('psnr', 'l1', 'flow_loss', 'text_loss')
# Added to the seed, so that the draws are others than those of training, of sampling and of the
# latents' statistics (docs/method.md, "Random numbers").
_SEED = 3


class HeldOut:
    """A stage's loss on held-out images. All looks have the same images and the same draws."""

    def __init__(self, stage: Stage, images: Batch, seed: int, mesh: Mesh) -> None:
        """Prepares the program; nothing is compiled before it is needed.

        Args:
          stage: the stage, which must have a `loss`.
          images: {'image': (n, H, W, c), 'label': (n,)}, of which as many are used as fill whole
            batches of the training's own size. Fewer than a batch are one smaller batch. Those
            that do not divide over the devices are left out, unless there are fewer than devices:
            then some count twice.
          seed: the run's seed.
          mesh: the devices.
        """
        n = len(images['label'])
        most = stage.options.batch_size // stage.options.accumulate
        self._size = min(most, max(mesh.size, n // mesh.size * mesh.size))
        self._batches = max(1, n // self._size)
        self._images = images
        self._frozen = stage.frozen
        self._seed = np.uint32(seed + _SEED)
        self._mesh = mesh
        size = self._size
        compute = stage.loss
        assert compute is not None  # by the caller

        def run(
            params: PyTree, frozen: PyTree, batch: Batch, seed: jax.Array, number: jax.Array
        ) -> Scalars:
            keys = losses.sample_keys(jax.random.key(seed), number, size)
            value, scalars = compute(params, frozen, batch, keys)
            return {name: scalars[name] for name in _SHOWN if name in scalars} | {'loss': value}

        self._run = jax.jit(sharding.keep_rows_split(mesh, run))

    def scalars(self, params: PyTree) -> dict[str, float]:
        """The means over all batches: heldout_loss, and with it those of `_SHOWN` that there are.

        All processes must call it. Numbers that are not finite are left out.

        Args:
          params: the stage's parameters.
        """
        n = len(self._images['label'])
        rows = sharding.local_rows(self._mesh, self._size)
        sums: dict[str, float] = {}
        for number in range(self._batches):
            of_batch = (number * self._size + rows) % n
            batch = {name: values[of_batch] for name, values in self._images.items()}
            placed = sharding.place_batch(self._mesh, batch)
            found = self._run(params, self._frozen, placed, self._seed, np.int32(number))
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        means = {f'heldout_{name}': total / self._batches for name, total in sums.items()}
        return {name: value for name, value in means.items() if math.isfinite(value)}
