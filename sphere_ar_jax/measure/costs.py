"""Operations of a program, counted from its jaxpr, and the rates that the machine reaches.

Only matrix products and convolutions are counted, two operations for each multiply-add, as is usual
for FLOP counts. The rates are those of matrix products and of memory.
"""

import functools
import math
import timeit
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.flow.plan import Options, Plan
from sphere_ar_jax.models.heads.flow import chunk_size
from sphere_ar_jax.runtime.types import PyTree


def _shape(variable: Any) -> tuple[int, ...]:
    """The shape of a variable or literal of a jaxpr."""
    return variable.aval.shape


def _dot(equation: JaxprEqn) -> int:
    """Operations of a matrix product."""
    (contract, _), _ = equation.params['dimension_numbers']
    lhs = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(lhs[i] for i in contract)


def _conv(equation: JaxprEqn) -> float:
    """Operations of a convolution, without products with the zeros that fill a dilated input."""
    p = equation.params
    kernel = _shape(equation.invars[1])
    out_features = kernel[p['dimension_numbers'].rhs_spec[0]]
    return (
        2
        * math.prod(_shape(equation.outvars[0]))
        * math.prod(kernel)
        / out_features
        / math.prod(p['lhs_dilation'])
    )


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs within an equation."""
    found = []
    for value in equation.params.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            jaxpr: Any = getattr(candidate, 'jaxpr', candidate)
            if hasattr(jaxpr, 'eqns'):
                found.append(jaxpr)
    return found


def _count(jaxpr: Jaxpr, lengths: tuple[float, ...], taken: float) -> float:
    """Operations of a jaxpr; `lengths` and `taken` as in `flops`."""
    total: float = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        p = equation.params
        if name == 'dot_general':
            total += _dot(equation)
        elif name == 'conv_general_dilated':
            total += _conv(equation)
        elif name == 'scan':
            total += p['length'] * _count(p['jaxpr'].jaxpr, lengths, taken)
        elif name == 'while':
            once = _count(p['body_jaxpr'].jaxpr, lengths[1:], taken)
            if once and not lengths:
                raise ValueError(
                    'products inside a loop of unknown length cannot be counted: give its length'
                )
            total += lengths[0] * once if once else 0
        else:
            inside = _inner(equation)
            if name == 'cond' and p.get('branches_platforms'):
                # The branches are kernels for the same; the last one is the plain one.
                inside = inside[-1:]
            counts = [_count(inner, lengths, taken) for inner in inside]
            if name == 'cond' and len(counts) > 1:
                *others, last = counts
                counts = [taken * last, (1 - taken) * sum(others) / len(others)]
            total += sum(counts)
    return total


def _shapes(jaxpr: Jaxpr, found: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Adds the shapes of all results in a jaxpr to a set, and returns it."""
    for equation in jaxpr.eqns:
        found.update(_shape(v) for v in equation.outvars)
        for inner in _inner(equation):
            _shapes(inner, found)
    return found


def shapes(function: Callable[..., Any], *arguments: PyTree) -> set[tuple[int, ...]]:
    """The shapes of all arrays that a function computes on the way, as if on one device.

    Args:
      function: traceable by JAX.
      *arguments: its arguments, abstract or not.
    """
    return _shapes(jax.make_jaxpr(function)(*arguments).jaxpr, set())


def flops(
    function: Callable[..., Any],
    *arguments: PyTree,
    lengths: tuple[float, ...] = (),
    taken: float = 0.5,
) -> float:
    """Floating-point operations of a function in products and convolutions.

    A conditional counts as the weighted mean of its branches. Where the branches are kernels for
    several platforms, the plain one counts.

    Args:
      function: traceable by JAX.
      *arguments: its arguments, abstract or not.
      lengths: how often loops of products run whose length is data, the outermost first.
      taken: the share of the runs of a conditional that take its last branch, which is that of True
        in `jax.lax.cond`. The others are taken equally often.

    Raises:
      ValueError: the length of such a loop is not given.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, lengths, taken)


def head_loops(
    plan: Plan, rows: int, fused: bool, evaluations: float | None = None
) -> tuple[float, float]:
    """`lengths` of the two loops of `solvers.integrate`.

    The outer one runs over chunks of evaluations, the inner one over those within a chunk.

    Args:
      plan: what the solver does.
      rows: rows of the sampler on a device.
      fused: see `FlowHead`.
      evaluations: those of one token, None for the mean over all tokens.
    """
    count = plan.evaluations if evaluations is None else evaluations
    most = plan.tables.t.shape[1]
    chunks = math.ceil(count / chunk_size(most, rows, fused))
    return chunks, count / chunks


def guided_evaluations(options: Options, num_tokens: int) -> np.ndarray:
    """How many of each token's evaluations read null rows, (L,) int.

    Args:
      options: of a sampler with guidance.
      num_tokens: L.
    """
    plan = options.plan(num_tokens)
    guidance = Guidance(jnp.float32(1), jnp.asarray(False), options.guidance_interval)
    inside = np.asarray(guidance.guides_at(jnp.asarray(plan.tables.t)))
    is_evaluated = np.arange(inside.shape[1]) < plan.count[:, None]
    guided = (inside & is_evaluated).sum(1)[plan.which]
    if options.splits_first_token:
        # The null rows of token 0 go apart, at all times.
        guided[0] = plan.count[plan.which[0]]
    return guided


def tree_bytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays, abstract or not."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def device_bytes(tree: PyTree) -> int:
    """Bytes that a tree of abstract arrays with shardings takes on one device."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def best_seconds(function: Callable[[], Any]) -> float:
    """Shortest of three runs of a function without arguments, after one that is not counted."""

    def run() -> None:
        jax.block_until_ready(function())

    run()
    return min(timeit.repeat(run, number=1, repeat=3))


def machine(
    rows: int, dtype: Any = jnp.float32, size: int | None = None, width: int = 1024
) -> dict[str, float]:
    """What the first device reaches here and now.

    Args:
      rows: rows of the thin products.
      dtype: of all matrices.
      size: side of the large square matrices; None takes 2048 on CPUs, and 8192 elsewhere, where a
        smaller product would measure how long it takes to launch.
      width: the weights of the thin products are width × 3·width.

    Returns:
      'matrix_flops': operations a second of a chain of large square products.
      'matrix_flops_rows': those of `rows` rows times 24 matrices in turn, 300 MB in float32 at the
        default width.
      'bytes_per_second': of reading 256 MB (4 GB on accelerators).
    """
    large = jax.devices()[0].platform != 'cpu'
    side = size or (8192 if large else 2048)
    chain = 10 if large else 2
    a = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), dtype) / side**0.5
    x = jnp.ones((rows, width), dtype)
    weights = [jnp.full((width, 3 * width), 1 / width + i, dtype) for i in range(24)]
    big = jnp.ones((1024 if large else 64, 2**20), jnp.float32)

    @jax.jit
    def square(a: jax.Array) -> jax.Array:
        return functools.reduce(lambda x, _: x @ a, range(chain), a)

    @jax.jit
    def thin(x: jax.Array, weights: list[jax.Array]) -> Any:
        return sum((x @ w).sum() for w in weights)

    total = jax.jit(jnp.sum)
    return {
        'matrix_flops': chain * 2 * side**3 / best_seconds(lambda: square(a)),
        'matrix_flops_rows': 24 * 2 * rows * 3 * width**2 / best_seconds(lambda: thin(x, weights)),
        'bytes_per_second': big.nbytes / best_seconds(lambda: total(big)),
    }
