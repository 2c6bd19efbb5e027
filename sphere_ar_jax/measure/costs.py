"""Operations of a program, counted from its jaxpr, and what the machine reaches: matrix products,
memory bandwidth.

Only matrix products and convolutions are counted, two operations for each multiply-add, as is usual
for FLOP counts.
"""

import functools
import math
import timeit

import jax
import jax.numpy as jnp
import numpy as np


def _dot(equation):
    (contract, _), _ = equation.params['dimension_numbers']
    lhs = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)


def _conv(equation):
    p, kernel = equation.params, equation.invars[1].aval.shape
    out_features = kernel[p['dimension_numbers'].rhs_spec[0]]
    # multiplications with the zeros that a dilated input is filled up with are none
    return (
        2
        * math.prod(equation.outvars[0].aval.shape)
        * math.prod(kernel)
        / out_features
        / math.prod(p['lhs_dilation'])
    )


def _inner(equation):
    """The jaxprs within an equation."""
    found = []
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, 'jaxpr', inner)
            found += [inner] if hasattr(inner, 'eqns') else []
    return found


def _count(jaxpr, lengths):
    total = 0
    for equation in jaxpr.eqns:
        name, p = equation.primitive.name, equation.params
        if name == 'dot_general':
            total += _dot(equation)
        elif name == 'conv_general_dilated':
            total += _conv(equation)
        elif name == 'scan':
            total += p['length'] * _count(p['jaxpr'].jaxpr, lengths)
        elif name == 'while':
            once = _count(p['body_jaxpr'].jaxpr, lengths[1:])
            if once and not lengths:
                raise ValueError(
                    'products inside a loop of unknown length cannot be counted: give its length'
                )
            total += lengths[0] * once if once else 0
        else:
            counts = [_count(inner, lengths) for inner in _inner(equation)]
            if name == 'cond' and p.get(
                'branches_platforms'
            ):  # kernels for the same; last the plain one
                counts = counts[-1:]
            elif name == 'cond':  # the cache is read to one of several lengths
                counts = [sum(counts) / len(counts)]
            total += sum(counts)
    return total


def _shapes(jaxpr, found):
    for equation in jaxpr.eqns:
        found.update(v.aval.shape for v in equation.outvars)
        for inner in _inner(equation):
            _shapes(inner, found)
    return found


def shapes(function, *arguments):
    """The shapes of all arrays that function(*arguments) computes on the way, as if on one device;
    a set.
    """
    return _shapes(jax.make_jaxpr(function)(*arguments).jaxpr, set())


def flops(function, *arguments, lengths=()):
    """Floating-point operations of function(*arguments) in products and convolutions; arguments may
    be abstract.

    A conditional counts as the mean of its branches, kernels for several platforms as the plain
    one. lengths: how often loops of products run whose length is data, the outermost first; raises
    ValueError where it is not given.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, lengths)


def head_loops(evaluations, chunk):
    """`lengths` of the loops of `solvers.integrate`: over chunks of evaluations, and over those
    within one chunk.
    """
    return evaluations / chunk, chunk


def tree_bytes(tree):
    """Bytes of a tree of arrays, abstract or not."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def device_bytes(tree):
    """Bytes that a tree of abstract arrays with shardings takes on one device."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def best_seconds(function):
    """Shortest of three runs of a function without arguments, after one that is not counted."""

    def run():
        jax.block_until_ready(function())

    run()
    return min(timeit.repeat(run, number=1, repeat=3))


def machine(rows, dtype=jnp.float32, size=None, width=1024):
    """What the device reaches here and now.

    Returns:
      dict: 'matrix_flops', rate of a chain of large square products; 'matrix_flops_rows', that of
        `rows` rows through
      24 matrices of width × 3·width in turn, 300 MB in float32; 'bytes_per_second', of reading 256
        MB (4 GB on
      accelerators).
    """
    large = jax.devices()[0].platform != 'cpu'  # where a small product would measure its launch
    size, chain = size or (8192 if large else 2048), 10 if large else 2
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype) / size**0.5
    square = jax.jit(lambda a: functools.reduce(lambda x, _: x @ a, range(chain), a))
    x = jnp.ones((rows, width), dtype)
    weights = [jnp.full((width, 3 * width), 1 / width + i, dtype) for i in range(24)]
    thin = jax.jit(lambda x, weights: sum((x @ w).sum() for w in weights))
    big = jnp.ones((1024 if large else 64, 2**20), jnp.float32)
    total = jax.jit(jnp.sum)
    return {
        'matrix_flops': chain * 2 * size**3 / best_seconds(lambda: square(a)),
        'matrix_flops_rows': 24 * 2 * rows * 3 * width**2 / best_seconds(lambda: thin(x, weights)),
        'bytes_per_second': big.nbytes / best_seconds(lambda: total(big)),
    }
