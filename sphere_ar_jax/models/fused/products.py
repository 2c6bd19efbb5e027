"""Products with the norm before them, or the gate and sum behind them, each as one GPU kernel.

XLA runs a normalisation, a product and what follows it as kernels of their own. Where a program
makes many small products one after the other, as the sampler does, a GPU spends most of its time on
starting kernels. Two functions make up a pre-norm block:

  normed_product   norm, modulation, product, bias and SwiGLU
  added_product    product, bias, gate and residual sum

On GPUs each is one kernel, written in Pallas for Triton. Other platforms compute the same formula
in plain JAX, and so does a GPU where no tile divides a size.

Dimensions:
  R  rows                 P  parts of a product: 2 for a SwiGLU, else 1
  D  features that come in                  F  features that go out
  E  entries of a table of modulations, each of Q parts
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from sphere_ar_jax.models import kernels
from sphere_ar_jax.models.sizes import EPS

# Sides of the tiles that a kernel works on, the best first. Triton's products take 16 and more.
SIDES = (64, 32, 16)
# Multiprocessors of an H100 or H200, among which the tiles of a result are shared out.
MULTIPROCESSORS = 132
# Warps of a kernel, of 32 threads each, and tiles that are read ahead.
WARPS = 4
STAGES = 3

# References to arrays in a GPU's memory, in the tree of the arrays.
Refs: TypeAlias = Any


class Norm(NamedTuple):
    """The learned numbers of a normalisation.

    Attributes:
      scale: (D,), or None for 1.
      bias: (D,), or None for 0.
    """

    scale: jax.Array | None = None
    bias: jax.Array | None = None


class Modulations(NamedTuple):
    """Scales, shifts and gates of adaLN in one table, of which a kernel reads what it needs.

    To slice the table outside of the kernel would start one more.

    Attributes:
      table: (E, R', Q, M) of at least R rows, of which the first R are read.
      entry: (1,) int32, the index of the entry that is read.
    """

    table: jax.Array
    entry: jax.Array


class Tile(NamedTuple):
    """The part of a product that one program of a kernel makes.

    Attributes:
      rows: rows of the result.
      depth: features that are multiplied at a time.
      columns: columns of the result.
    """

    rows: int
    depth: int
    columns: int


def choose_tile(R: int, D: int, F: int, reads: float, parts: int = 1) -> Tile | None:
    """Chooses the tile for which the busiest multiprocessor reads least.

    Small tiles read all in all more, but there are enough of them for all multiprocessors.

    Args:
      R: rows of the result.
      D: features that come in.
      F: features that go out.
      reads: what a program reads for one feature of one row, in numbers of the kernel's dtype.
      parts: P.

    Returns:
      The tile; None where none divides a size.
    """

    def fitting(size: int) -> list[int]:
        return [side for side in SIDES if size % side == 0]

    def busiest_reads(rows: int, columns: int) -> float:
        """Numbers for each of D features that the busiest multiprocessor reads."""
        programs = (R // rows) * (F // columns)
        return -(-programs // MULTIPROCESSORS) * (reads * rows + parts * columns)

    depths = fitting(D)
    sides = [(rows, columns) for rows in fitting(R) for columns in fitting(F)]
    if not (depths and sides):
        return None
    rows, columns = min(sides, key=lambda side: busiest_reads(*side))
    return Tile(rows, depths[0], columns)


def normed_product(
    x: jax.Array,
    norm: Norm,
    modulations: Modulations | None,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    centred: bool,
    first: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Computes act((norm(x)·(1 + scale) + shift)·kernel + bias), with norm and sums in float32.

    With two parts, act is the SwiGLU silu(one)·other; with one it is nothing.

    Args:
      x: (R, D).
      norm: the normalisation, with eps 1e-6.
      modulations: of D features, or None for neither scale nor shift.
      kernel: (D, P, F).
      bias: (P, F), or None.
      centred: whether the mean of a row is taken off first, as LayerNorm does and RMSNorm does not.
      first: the part of the modulations that is the scale; the next one is the shift.
      interpret: whether to interpret the kernel, on any platform, which is slow.

    Returns:
      (R, F) in the kernel's dtype.
    """
    R, D = x.shape
    _, parts, F = kernel.shape
    # Mean, variance and product read x one after the other.
    reads = (3 if centred else 2) * x.dtype.itemsize / kernel.dtype.itemsize
    tile = choose_tile(R, D, F, reads if modulations is None else reads + 2, parts)
    plain = functools.partial(_plain_normed, centred=centred, first=first)
    run = functools.partial(_normed_kernel, centred=centred, first=first)
    result = jax.ShapeDtypeStruct((R, F), kernel.dtype)
    accessed = _bytes(x, norm, kernel, bias, result)
    if modulations is not None:
        accessed += 2 * R * D * modulations.table.dtype.itemsize
    return _on_gpus_if_tiled(run, plain, tile, result, accessed, interpret)(
        x, norm, modulations, kernel, bias
    )


def added_product(
    h: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    modulations: Modulations | None = None,
    x: jax.Array | None = None,
    *,
    dtype: DTypeLike,
    gate: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Computes x + gate·(h·kernel + bias), with sums in float32.

    Args:
      h: (R, D).
      kernel: (D, F).
      bias: (F,), or None for 0.
      modulations: of F features, or None for no gate.
      x: (R, F), or None for 0.
      dtype: of the result.
      gate: the part of the modulations that is the gate.
      interpret: see `normed_product`.

    Returns:
      (R, F).
    """
    R, D = h.shape
    F = kernel.shape[-1]
    tile = choose_tile(R, D, F, reads=h.dtype.itemsize / kernel.dtype.itemsize)
    plain = functools.partial(_plain_added, dtype=dtype, gate=gate)
    run = functools.partial(_added_kernel, gate=gate)
    result = jax.ShapeDtypeStruct((R, F), dtype)
    accessed = _bytes(h, kernel, bias, x, result)
    if modulations is not None:
        accessed += R * F * modulations.table.dtype.itemsize
    return _on_gpus_if_tiled(run, plain, tile, result, accessed, interpret)(
        h, kernel, bias, modulations, x
    )


def _on_gpus_if_tiled(
    run: Callable[..., None],
    plain: Callable[..., jax.Array],
    tile: Tile | None,
    result: jax.ShapeDtypeStruct,
    accessed: int,
    interpret: bool,
) -> Callable[..., jax.Array]:
    """Makes the function that runs a kernel on GPUs, and plain JAX elsewhere.

    Args:
      run: the kernel, a function of references and the keyword `tile`. It makes one tile
        of the result, whose reference comes last.
      plain: the same function of the same arrays.
      tile: the tile, None if there is none.
      result: shape and dtype.
      accessed: bytes that the kernel reads and writes, as reports have them.
      interpret: see `normed_product`.
    """
    if tile is None:
        return plain
    # Imported here, because it takes a while, and few runs have these kernels.
    from jax.experimental.pallas import triton

    R, F = result.shape
    fused = pl.pallas_call(
        functools.partial(run, tile=tile),
        grid=(R // tile.rows, F // tile.columns),
        out_shape=result,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        metadata={kernels.BYTES_ACCESSED: str(accessed)},
    )
    return fused if interpret else kernels.on_gpus(fused, plain)


def _bytes(*arrays: Any) -> int:
    """Bytes of trees of arrays."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def _rows_and_columns(tile: Tile) -> tuple[Any, Any]:
    """The rows and the columns of the tile that this program makes."""
    rows = pl.ds(pl.program_id(0) * tile.rows, tile.rows)
    columns = pl.ds(pl.program_id(1) * tile.columns, tile.columns)
    return rows, columns


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies matrices, with sums in float32. Float32 matrices are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def _normalised(
    x: jax.Array,
    mean: jax.Array | float,
    variance: jax.Array,
    norm: Norm,
    modulation: Sequence[jax.Array],
) -> jax.Array:
    """Normalises and modulates rows (R, D), or a tile of them, in float32.

    `modulation` is scale and shift of the rows, or empty.
    """
    h = (x - mean) * jax.lax.rsqrt(variance + EPS)
    if norm.scale is not None:
        h = h * norm.scale[None].astype(jnp.float32)
    if norm.bias is not None:
        h = h + norm.bias[None].astype(jnp.float32)
    if modulation:
        scale, shift = (a.astype(jnp.float32) for a in modulation)
        h = h * (1 + scale) + shift
    return h


def _activated(parts: list[jax.Array], biases: list[jax.Array]) -> jax.Array:
    """Adds biases (F,), if there are any, to P parts (R, F), and makes one of them."""
    if biases:
        pairs = zip(parts, biases, strict=True)
        parts = [part + bias[None].astype(jnp.float32) for part, bias in pairs]
    if len(parts) == 1:
        return parts[0]
    gate, up = parts
    return jax.nn.silu(gate) * up


def _parts(modulations: Modulations, R: int, *parts: int) -> list[jax.Array]:
    """Some parts of the entry that is read, of its first R rows, each (R, M)."""
    table, entry = modulations
    current = jax.lax.dynamic_index_in_dim(table, entry[0], keepdims=False)
    return [current[:R, part] for part in parts]


def _plain_normed(
    x: jax.Array,
    norm: Norm,
    modulations: Modulations | None,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    centred: bool,
    first: int,
) -> jax.Array:
    """`normed_product` in plain JAX."""
    modulation = [] if modulations is None else _parts(modulations, len(x), first, first + 1)
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True) if centred else 0.0
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    h = _normalised(x, mean, variance, norm, modulation).astype(kernel.dtype)
    products = [_dot(h, kernel[:, i]) for i in range(kernel.shape[1])]
    biases = [] if bias is None else list(bias)
    return _activated(products, biases).astype(kernel.dtype)


def _normed_kernel(
    x: Refs,
    norm: Refs,
    modulations: Refs,
    kernel: Refs,
    bias: Refs,
    out: Refs,
    *,
    centred: bool,
    first: int,
    tile: Tile,
) -> None:
    """Makes one tile of `normed_product`'s result."""
    rows, columns = _rows_and_columns(tile)
    D, parts, _ = kernel.shape

    def read(k: jax.Array) -> jax.Array:
        """The features of step k, (rows, depth) float32."""
        return x[rows, pl.ds(k * tile.depth, tile.depth)].astype(jnp.float32)

    def mean_of(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The mean of a function of the features, (rows, 1)."""

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + jnp.sum(function(read(k)), axis=-1)

        zeros = jnp.zeros((tile.rows,), jnp.float32)
        return jax.lax.fori_loop(0, D // tile.depth, add, zeros)[:, None] / D

    mean = mean_of(lambda part: part) if centred else 0.0
    variance = mean_of(lambda part: jnp.square(part - mean))

    def multiply(k: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        features = pl.ds(k * tile.depth, tile.depth)
        norm_part = Norm(*(None if a is None else a[features] for a in norm))
        modulation = []
        if modulations is not None:
            table, entry = modulations
            modulation = [table[entry[0], rows, first + i, features] for i in range(2)]
        h = _normalised(read(k), mean, variance, norm_part, modulation).astype(kernel.dtype)
        return [total + _dot(h, kernel[features, i, columns]) for i, total in enumerate(sums)]

    sums = [jnp.zeros((tile.rows, tile.columns), jnp.float32) for _ in range(parts)]
    sums = jax.lax.fori_loop(0, D // tile.depth, multiply, sums)
    biases = [] if bias is None else [bias[i, columns] for i in range(parts)]
    out[rows, columns] = _activated(sums, biases).astype(out.dtype)


def _added(
    product: jax.Array,
    bias: jax.Array | None,
    gate: jax.Array | None,
    x: jax.Array | None,
) -> jax.Array:
    """Computes x + gate·(product + bias) of rows (R, F), or a tile of them, in float32."""
    if bias is not None:
        product = product + bias[None].astype(jnp.float32)
    if gate is not None:
        product = product * gate.astype(jnp.float32)
    if x is not None:
        product = product + x.astype(jnp.float32)
    return product


def _plain_added(
    h: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    modulations: Modulations | None,
    x: jax.Array | None,
    *,
    dtype: DTypeLike,
    gate: int,
) -> jax.Array:
    """`added_product` in plain JAX."""
    product = _dot(h.astype(kernel.dtype), kernel)
    gates = None if modulations is None else _parts(modulations, len(h), gate)[0]
    return _added(product, bias, gates, x).astype(dtype)


def _added_kernel(
    h: Refs,
    kernel: Refs,
    bias: Refs,
    modulations: Refs,
    x: Refs,
    out: Refs,
    *,
    tile: Tile,
    gate: int,
) -> None:
    """Makes one tile of `added_product`'s result."""
    rows, columns = _rows_and_columns(tile)

    def multiply(k: jax.Array, total: jax.Array) -> jax.Array:
        features = pl.ds(k * tile.depth, tile.depth)
        left = h[rows, features].astype(kernel.dtype)
        return total + _dot(left, kernel[features, columns])

    zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    product = jax.lax.fori_loop(0, h.shape[1] // tile.depth, multiply, zeros)
    bias_tile = None if bias is None else bias[columns]
    gate_tile = None
    if modulations is not None:
        table, entry = modulations
        gate_tile = table[entry[0], rows, gate, columns]
    x_tile = None if x is None else x[rows, columns]
    out[rows, columns] = _added(product, bias_tile, gate_tile, x_tile).astype(out.dtype)
