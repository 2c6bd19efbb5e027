"""Improved precision and recall of samples.

Dimensions:
  n  images     f  features of an image
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.runtime.console import UserError

BLOCK = 10_000  # of the evaluator: one overflow in float16 turns a whole block to float32


class _Points(NamedTuple):
    """Features as they come, as they are multiplied, and the squared norms of the latter, all (r,
    …).
    """

    exact: Any
    rows: Any
    norms: Any

    def blocks(self, size):
        return [
            _Points(*(a[start : start + size] for a in self))
            for start in range(0, len(self.rows), size)
        ]


def _points(x, dtype):
    """float16: rows are rounded to it, and so are their squares and the (float32) sum of these."""
    x = np.asarray(x)
    with np.errstate(over='ignore'):  # infinite: the caller takes float32 then
        rows = x.astype(dtype)
        norms = np.square(rows).sum(1, dtype=np.promote_types(dtype, np.float32)).astype(dtype)
    return _Points(x, rows, norms.astype(np.promote_types(dtype, np.float32)))


@jax.jit
def _block_distances(rows_u, norms_u, rows_v, norms_v):
    """(squared distances (r, c), whether all are finite); every result is rounded to float16 where
    rows are float16.
    """
    rounded = lambda a: a
    if rows_u.dtype == jnp.float16:
        # not astype: XLA may leave a conversion there and back out
        rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=5, mantissa_bits=10)
    rows_u, rows_v = rows_u.astype(norms_u.dtype), rows_v.astype(norms_v.dtype)
    product = jnp.matmul(rows_u, rows_v.T, precision=jax.lax.Precision.HIGHEST)
    square = rounded(rounded(norms_u[:, None] - rounded(2 * product)) + norms_v[None])
    return jnp.maximum(square, 0), jnp.isfinite(square).all()


def _squared_distances(u, v):
    """Squared distances (r, c) between two blocks of `_Points`, on the device."""
    square, finite = _block_distances(u.rows, u.norms, v.rows, v.norms)
    if u.rows.dtype == np.float16 and not finite:
        return _squared_distances(_points(u.exact, np.float32), _points(v.exact, np.float32))
    return square


@jax.jit
def _smallest(found, square):
    """The smallest of every row, as many as `found` (r, k + 1) has, among these and `square` (r,
    c); ascending.
    """
    return -jax.lax.top_k(-jnp.concatenate([found, square], 1), found.shape[1])[0]


@jax.jit
def _inside(square, radii_u, radii_v):
    """Whether each u lies in some ball around a v, and each v in some around a u."""
    return (square <= radii_v[None]).any(1), (square <= radii_u[:, None]).any(0)


def _radii(blocks, k, done):
    """Squared distance of each point to its k-th neighbour, one array per block; the point itself
    is the 0-th.
    """
    radii = []
    for u in blocks:
        found = jnp.full((len(u.rows), k + 1), jnp.inf, u.norms.dtype)
        for v in blocks:
            found = _smallest(found, _squared_distances(u, v))
            done()
        radii.append(found[:, k])
    return radii


def precision_recall(
    real, fake, k=3, *, dtype=np.float16, block=BLOCK, progress=lambda done, total: None
):
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A point lies on a set's manifold if it is at most as far from some point of the set as that
    point's k-th neighbour within the set (itself not counted). Squared distances |u|² − 2u·v + |v|²
    are compared, block by block.

    Args:
      real: (n, f), fake: (m, f). k: neighbours, < n and < m.
      dtype: arithmetic of the distances. float16 is the evaluator's: features, norms, products and
        their sums are rounded to it (sums within a norm or a product are float32), and a block of
        distances in which one overflows is done in float32. float32 and float64 are more exact, the
        latter is computed on the host.
      block: points of a block; memory is about 12·block² bytes.
      progress: called after every block with how many are done, of how many.
    Returns:
      (precision, recall): the share of fake points on the real manifold, and of real ones on the
        fake. Raises
      UserError for sets that are too small or of different features.
    """
    if (
        min(len(real), len(fake)) <= k
        or np.shape(real)[1:] != np.shape(fake)[1:]
        or np.ndim(real) != 2
    ):
        shapes = f'{np.shape(real)} and {np.shape(fake)}'
        raise UserError(
            f'precision and recall need two sets (n, f), (m, f) of more than {k} images, not {shapes}'
        )
    real, fake = (_points(x, dtype).blocks(block) for x in (real, fake))
    total, steps = len(real) ** 2 + len(fake) ** 2 + len(real) * len(fake), itertools.count(1)
    done = lambda: progress(next(steps), total)
    double = dtype == np.float64  # on the host: accelerators may have none
    with (
        jax.enable_x64(double),
        jax.default_device(jax.local_devices(backend='cpu')[0] if double else None),
    ):
        real_radii, fake_radii = _radii(real, k, done), _radii(fake, k, done)
        real_hit, fake_hit = (
            [np.zeros(len(u.rows), bool) for u in blocks] for blocks in (real, fake)
        )
        for i, u in enumerate(real):
            for j, v in enumerate(fake):
                of_u, of_v = _inside(_squared_distances(u, v), real_radii[i], fake_radii[j])
                real_hit[i] |= np.asarray(of_u)
                fake_hit[j] |= np.asarray(of_v)
                done()
    return float(np.concatenate(fake_hit).mean()), float(np.concatenate(real_hit).mean())
