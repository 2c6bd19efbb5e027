"""Keys and values of the positions that were read, in one of two layouts.

Dimensions:
  B    rows of the batch              T    new positions
  N    heads, K the head dimension    S    length of the cache
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike


class Cache(Protocol):
    """The keys and values of one block."""

    def written(self, k: jax.Array, v: jax.Array, start: jax.Array | int) -> 'Cache':
        """Returns the cache with k and v (B, T, N, K) of new positions, from entry `start` on."""

    def attended(self, q: jax.Array, start: jax.Array | int) -> jax.Array:
        """Computes softmax(q·kᵀ/√K)·v of T positions from `start` on, with a float32 softmax.

        It maps q (B, T, N, K) → (B, T, N, K). The first start + T entries are filled. A position
        attends to itself and to those before it.
        """


class HeadsFirst(NamedTuple):
    """The layout (B, N, S, K): the entries of a head lie one after the other.

    Attributes:
      keys: (B, N, S, K).
      values: (B, N, S, K).
    """

    keys: jax.Array
    values: jax.Array

    def written(self, k: jax.Array, v: jax.Array, start: jax.Array | int) -> 'HeadsFirst':
        """See `Cache.written`."""

        def write(cached: jax.Array, new: jax.Array) -> jax.Array:
            new = new.swapaxes(1, 2).astype(cached.dtype)
            return jax.lax.dynamic_update_slice_in_dim(cached, new, start, axis=2)

        return HeadsFirst(write(self.keys, k), write(self.values, v))

    def attended(self, q: jax.Array, start: jax.Array | int) -> jax.Array:
        """See `Cache.attended`."""
        T = q.shape[1]
        S = self.keys.shape[2]
        logits = jnp.einsum('btnk,bnsk->bnts', q, self.keys, preferred_element_type=jnp.float32)
        visible = jnp.arange(S)[None] <= start + jnp.arange(T)[:, None]
        logits = jnp.where(visible[None, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.values.dtype)
        return jnp.einsum('bnts,bnsk->btnk', weights, self.values)

    def rows_last(self) -> 'RowsLast':
        """Returns the same entries in the other layout."""
        return RowsLast(*map(_rows_last, self))


class RowsLast(NamedTuple):
    """The layout (S, K, B·N), for one new position at a time (T = 1).

    A TPU fills up the last axis of an array to a multiple of 128 numbers, and reads them all. In
    that place K = 64 would double what is read at each token. Rows and heads together leave less to
    fill up: nothing with 12 heads and 32 rows. See `docs/speed.md`, "Compile ahead for TPU slices".

    Attributes:
      keys: (S, K, B·N).
      values: (S, K, B·N).
    """

    keys: jax.Array
    values: jax.Array

    def written(self, k: jax.Array, v: jax.Array, start: jax.Array | int) -> 'RowsLast':
        """See `Cache.written`."""

        def write(cached: jax.Array, new: jax.Array) -> jax.Array:
            new = _rows_last(new.swapaxes(1, 2)).astype(cached.dtype)
            cached = jax.lax.dynamic_update_slice_in_dim(cached, new, start, axis=0)
            # XLA would choose K as the last axis in memory.
            return with_layout_constraint(cached, Layout((0, 1, 2)))

        return RowsLast(write(self.keys, k), write(self.values, v))

    def attended(self, q: jax.Array, start: jax.Array | int) -> jax.Array:
        """See `Cache.attended`."""
        B, T, N, K = q.shape
        assert T == 1, 'this layout takes one position at a time'
        rows = _rows_last(q.swapaxes(1, 2))[0]
        logits = jnp.einsum('kr,skr->sr', rows, self.keys, preferred_element_type=jnp.float32)
        visible = jnp.arange(len(self.keys))[:, None] <= start
        logits = jnp.where(visible, logits * K**-0.5, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=0).astype(self.values.dtype)
        out = jnp.einsum('sr,skr->kr', weights, self.values)
        return out.reshape(K, B, N).transpose(1, 2, 0)[:, None]


def _rows_last(a: jax.Array) -> jax.Array:
    """Moves rows and heads to the end: (B, N, S, K) → (S, K, B·N)."""
    B, N, S, K = a.shape
    return a.transpose(2, 3, 0, 1).reshape(S, K, B * N)


def empty_caches(
    depth: int,
    rows: int,
    length: int,
    heads: int,
    head_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[HeadsFirst, ...]:
    """Makes the caches of a transformer's blocks, of zeros.

    Args:
      depth: number of blocks.
      rows: B.
      length: S.
      heads: N.
      head_dim: K.
      dtype: dtype of keys and values.
    """

    def zeros() -> jax.Array:
        return jnp.zeros((rows, heads, length, head_dim), dtype)

    return tuple(HeadsFirst(zeros(), zeros()) for _ in range(depth))
