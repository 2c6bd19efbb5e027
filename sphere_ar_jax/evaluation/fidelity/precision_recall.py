"""Improved precision and recall of samples.

Dimensions:
  n  images     f  features of an image     r, c  points of two blocks
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import Progress

# Points of a block, as in the evaluator: one overflow in float16 turns a whole block to float32.
BLOCK = 10_000


class _Points(NamedTuple):
    """Points of a set.

    Attributes:
      exact: the features (r, f) as they come.
      rows: the features as they are multiplied.
      norms: squared norms (r,) of `rows`, in float32 at least.
    """

    exact: np.ndarray
    rows: np.ndarray
    norms: np.ndarray

    def blocks(self, size: int) -> list['_Points']:
        """Splits the points into blocks of `size`; the last block may be smaller."""
        return [
            _Points(*(a[start : start + size] for a in self))
            for start in range(0, len(self.rows), size)
        ]


def _points(x: ArrayLike, dtype: DTypeLike) -> _Points:
    """Features (r, f) as points for arithmetic in a dtype.

    With float16 the features are rounded to it, and so are their squares and the norms, which are
    summed in float32.
    """
    x = np.asarray(x)
    wide = np.promote_types(dtype, np.float32)
    # What overflows becomes infinite, and the caller takes float32 then.
    with np.errstate(over='ignore'):
        rows = x.astype(dtype)
        norms = np.square(rows).sum(1, dtype=wide).astype(dtype)
    return _Points(x, rows, norms.astype(wide))


@jax.jit
def _block_distances(
    rows_u: jax.Array, norms_u: jax.Array, rows_v: jax.Array, norms_v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Squared distances between two blocks, with every result rounded to float16 if rows are.

    Returns:
      (squared distances (r, c), whether all of them are finite).
    """
    half = rows_u.dtype == jnp.float16

    def rounded(a: jax.Array) -> jax.Array:
        if not half:
            return a
        # XLA may leave out a conversion to float16 and back, but never this.
        return jax.lax.reduce_precision(a, exponent_bits=5, mantissa_bits=10)

    rows_u = rows_u.astype(norms_u.dtype)
    rows_v = rows_v.astype(norms_v.dtype)
    product = jnp.matmul(rows_u, rows_v.T, precision=jax.lax.Precision.HIGHEST)
    square = rounded(rounded(norms_u[:, None] - rounded(2 * product)) + norms_v[None])
    return jnp.maximum(square, 0), jnp.isfinite(square).all()


def _squared_distances(u: _Points, v: _Points) -> jax.Array:
    """Squared distances (r, c) between two blocks, on the device.

    A block of float16 in which one overflows is computed again in float32.
    """
    square, finite = _block_distances(u.rows, u.norms, v.rows, v.norms)
    if u.rows.dtype == np.float16 and not finite:
        return _squared_distances(_points(u.exact, np.float32), _points(v.exact, np.float32))
    return square


@jax.jit
def _smallest(found: jax.Array, square: jax.Array) -> jax.Array:
    """The smallest numbers of every row, ascending: as many as `found` has columns.

    They are taken from `found` (r, k + 1), the smallest so far, and from `square` (r, c).
    """
    smallest, _ = jax.lax.top_k(-jnp.concatenate([found, square], 1), found.shape[1])
    return -smallest


@jax.jit
def _inside(
    square: jax.Array, radii_u: jax.Array, radii_v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether each u lies in some ball around a v, and each v in some ball around a u."""
    return (square <= radii_v[None]).any(1), (square <= radii_u[:, None]).any(0)


def _radii(blocks: list[_Points], k: int, done: Callable[[], None]) -> list[jax.Array]:
    """Squared distance of each point to its k-th neighbour in the set, one array for each block.

    The point itself is neighbour 0. `done` is called after every pair of blocks.
    """
    radii = []
    for u in blocks:
        found = jnp.full((len(u.rows), k + 1), jnp.inf, u.norms.dtype)
        for v in blocks:
            found = _smallest(found, _squared_distances(u, v))
            done()
        radii.append(found[:, k])
    return radii


def _on_manifolds(
    real: list[_Points], fake: list[_Points], k: int, done: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each fake point lies on the real manifold, and each real point on the fake one.

    `real` and `fake` are the blocks of n and of m points; `done` is called after every pair of
    them.

    Returns:
      (bool (m,), bool (n,)).
    """
    real_radii = _radii(real, k, done)
    fake_radii = _radii(fake, k, done)
    real_hit = [np.zeros(len(u.rows), bool) for u in real]
    fake_hit = [np.zeros(len(v.rows), bool) for v in fake]
    for i, u in enumerate(real):
        for j, v in enumerate(fake):
            of_u, of_v = _inside(_squared_distances(u, v), real_radii[i], fake_radii[j])
            real_hit[i] |= np.asarray(of_u)
            fake_hit[j] |= np.asarray(of_v)
            done()
    return np.concatenate(fake_hit), np.concatenate(real_hit)


def precision_recall(
    real: np.ndarray,
    fake: np.ndarray,
    k: int = 3,
    *,
    dtype: DTypeLike = np.float16,
    block: int = BLOCK,
    progress: Progress = lambda done, total: None,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A point lies on a set's manifold if it is at most as far from some point of the set as that
    point's k-th neighbour within the set (itself not counted). Squared distances |u|² − 2u·v + |v|²
    are compared, block by block.

    float16 is the evaluator's arithmetic: features, norms, products and the sum of the three terms
    are rounded to float16, while sums within a norm or a product are float32. A block of distances
    in which one overflows is computed again in float32. float32 and float64 are more exact; float64
    is computed on the host. See `docs/evaluation.md`, "How exact they are".

    Args:
      real: (n, f).
      fake: (m, f).
      k: neighbours, less than n and m.
      dtype: arithmetic of the distances.
      block: points of a block. Memory is about 12·block² bytes.
      progress: called after every pair of blocks with how many are done, and of how many.

    Returns:
      (precision, recall): the share of fake points on the real manifold, and of real points on the
      fake manifold.

    Raises:
      UserError: a set is too small, or the sets have different features.
    """
    few = min(len(real), len(fake)) <= k
    if few or np.shape(real)[1:] != np.shape(fake)[1:] or np.ndim(real) != 2:
        raise UserError(
            f'precision and recall need two sets (n, f), (m, f) of more than {k} images, '
            f'not {np.shape(real)} and {np.shape(fake)}'
        )
    real_blocks = _points(real, dtype).blocks(block)
    fake_blocks = _points(fake, dtype).blocks(block)
    within = len(real_blocks) ** 2 + len(fake_blocks) ** 2
    total = within + len(real_blocks) * len(fake_blocks)
    steps = itertools.count(1)

    def done() -> None:
        progress(next(steps), total)

    double = dtype == np.float64
    # Accelerators may have no float64.
    device = jax.local_devices(backend='cpu')[0] if double else None
    with jax.enable_x64(double), jax.default_device(device):
        fake_hit, real_hit = _on_manifolds(real_blocks, fake_blocks, k, done)
    return float(fake_hit.mean()), float(real_hit.mean())
