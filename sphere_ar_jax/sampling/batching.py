"""Many images in batches on a mesh, and what is done about those that are not finite.

Dimensions:
  n  images in all
  B  images of a batch
  b  images of a batch on one device
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sphere_ar_jax.runtime import hosts, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree


class NonFiniteSamples(UserError):
    """Images hold numbers that are not finite, so that there is nothing to show of them.

    Attributes:
      indices: the numbers of these images.
    """

    def __init__(self, indices: Sequence[int], first: int, stop: int, kept: str = '') -> None:
        """Makes the error and its message.

        Args:
          indices: the numbers of these images.
          first: number of the first image of their batch.
          stop: number after the last image of their batch.
          kept: a further clause of the message.
        """
        named = ', '.join(str(i) for i in indices[:10])
        more = ', …' if len(indices) > 10 else ''
        super().__init__(
            f'{len(indices)} of the images {first} to {stop - 1} are not finite '
            f'(numbers {named}{more}){kept}; the weights, guidance_scale, temperature or what was '
            'given may be too large, or dtype too small'
        )
        self.indices = list(indices)


@jax.jit
def are_finite(images: jax.Array) -> jax.Array:
    """Tells which images (B, …) hold finite numbers alone, (B,) bool."""
    return jnp.isfinite(images).all(tuple(range(1, images.ndim)))


def require_finite(finite: np.ndarray, first: int, kept: str = '') -> None:
    """Refuses a batch in which an image is not finite.

    Args:
      finite: (B,) bool, from `are_finite`.
      first: number of the first image of the batch.
      kept: a further clause of the message.

    Raises:
      NonFiniteSamples: an image is not finite.
    """
    if not finite.all():
        indices = (first + np.flatnonzero(~finite)).tolist()
        raise NonFiniteSamples(indices, first, first + len(finite), kept)


def require_finite_images(images: jax.Array, count: int, first: int) -> None:
    """Refuses a batch (B, …) in which one of the first `count` images is not finite.

    All processes must call it.

    Raises:
      NonFiniteSamples: as `require_finite`, which says what `first` is.
    """
    require_finite(hosts.gather(are_finite(images))[:count], first)


def count(rows: PyTree) -> int:
    """The number of rows n of a tree of arrays (n, …)."""
    return len(jax.tree.leaves(rows)[0])


def rows_of_process(start: int, size: int, n: int, mesh: Mesh) -> np.ndarray:
    """Numbers of those images of a batch that this process loads.

    The last batch is filled up with the first images, so that one compilation serves all batches.
    """
    return (start + sharding.local_rows(mesh, size)) % n


def in_batches_of(
    function: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    rows: PyTree,
    size: int,
    mesh: Mesh,
) -> PyTree:
    """Computes `in_batches` with batches of `size` rows, a multiple of the mesh's devices."""
    params = jax.device_put(params, sharding.whole(mesh))  # Once for all batches.
    n = count(rows)
    parts = []
    for start in range(0, n, size):
        taken = rows_of_process(start, size, n, mesh)
        batch = sharding.place_batch(mesh, jax.tree.map(lambda a, taken=taken: a[taken], rows))
        results = sharding.on_each_device(function, mesh, params, batch)
        parts.append(jax.tree.map(lambda a, start=start: hosts.gather(a)[: n - start], results))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def in_batches(
    function: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    rows: PyTree,
    batch_size: int,
    mesh: Mesh,
) -> PyTree:
    """Computes function(params, rows) for many rows, batch by batch, each device for its own rows.

    All processes call it with the same arguments.

    Args:
      function: jitted, with rows (b, …) → results (b, …), see `sharding.on_each_device`.
      params: a tree of arrays.
      rows: a tree of NumPy arrays (n, …).
      batch_size: B. It is lowered to n if it is larger, then rounded up to a multiple of the mesh's
        devices.
      mesh: devices to use.

    Returns:
      The results (n, …) as NumPy arrays. Every process gets all of them.
    """
    size = sharding.whole_rows(mesh, min(batch_size, count(rows)))
    return in_batches_of(function, params, rows, size, mesh)
