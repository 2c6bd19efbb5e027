"""The door to quick kernels: a function whose value or gradients come from programs of their own.

Some programs that XLA makes of a derivative are slow on one platform, and some kernels are there
on one platform only. `fast` puts such a program in the place of a plain function's value or
gradient. It stays differentiable in every way that the plain function is: forward, in reverse, over
and over, and under `jit`, `vmap`, `scan` and `checkpoint`. Within `plain()` the plain functions run
alone, so that the two can be compared.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import dce_jaxpr

_plain_alone = jax.make_user_context(default_value=False)  # `jax.jit` traces anew where it changes


def plain() -> AbstractContextManager:
    """A context in which the functions made by `fast` are the plain ones."""
    return _plain_alone(True)


def fast(plain: Callable, backward: Callable, forward: Callable | None = None) -> Callable:
    """A function with the values and derivatives of `plain`, some of them by quicker programs.

    The value is that of `forward`. Gradients are those of `backward`; they read the arguments and
    nothing else, so that nothing else is kept for them. Tangents are those of `plain`, and so are
    derivatives of gradients.

    Args:
      plain: (*arrays) → an array, of operations that JAX can differentiate.
      backward: (arrays, gradient of the value) → gradients of all arrays, each of its array's
        dtype. It may be of operations that JAX cannot differentiate.
      forward: (*arrays) → an array, like `backward`; `plain` if None.
    Returns:
      (*arrays) → an array.
    """

    @jax.custom_jvp
    def quick(*arrays):
        return (forward or plain)(*arrays)

    def jvp(arrays, tangents):
        value = quick(*arrays)
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]
        if not moving:
            return value, jnp.zeros_like(value)
        maps = _differential(plain, backward, moving)
        (tangent,) = _apply(maps, arrays, [tangents[i] for i in moving])
        return value, tangent

    quick.defjvp(jvp, symbolic_zeros=True)

    def function(*arrays):
        return plain(*arrays) if _plain_alone.value else quick(*arrays)

    return function


class _Maps(NamedTuple):
    """A linear map and its transpose, each by a quick program and by a plain one.

    All four are functions of two tuples of arrays, residuals and inputs, to a tuple of outputs,
    and linear in the inputs. JAX can differentiate the plain ones.
    """

    run: Callable
    plain: Callable
    transpose: Callable
    plain_transpose: Callable

    def turned(self):
        """The same of the transpose."""
        return _Maps(self.transpose, self.plain_transpose, self.run, self.plain)


def _differential(plain, backward, moving):
    """The `_Maps` from tangents of the arrays numbered `moving` to the tangent of the value.

    Its residuals are the arrays.
    """

    def of_moving(arrays):
        """`plain` as a function of the moving arrays, and those."""

        def function(*moved):
            replaced = dict(zip(moving, moved, strict=True))
            return plain(*(replaced.get(i, array) for i, array in enumerate(arrays)))

        return function, tuple(arrays[i] for i in moving)

    def push(arrays, tangents):
        function, moved = of_moving(arrays)
        _, tangent = jax.jvp(function, moved, tuple(tangents))
        return (tangent,)

    def pull(arrays, cotangents):
        gradients = backward(arrays, *cotangents)
        return tuple(gradients[i] for i in moving)

    def plain_pull(arrays, cotangents):
        function, moved = of_moving(arrays)
        _, transposed = jax.vjp(function, *moved)
        return transposed(*cotangents)

    return _Maps(push, push, pull, plain_pull)


# `jax.custom_derivatives.linear_call` is much the same, but cannot be used under `vmap`, nor be
# differentiated in its residuals.
_linear = Primitive('linear_map')
_linear.multiple_results = True


def _apply(maps, residuals, inputs):
    """The outputs of maps.run; transposed, those of maps.transpose."""
    traced = jax.make_jaxpr(maps.run)(tuple(residuals), tuple(inputs))
    # Gradients that nobody asked for are not computed.
    needed, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals), instantiate=True)
    jaxpr = ClosedJaxpr(needed, traced.consts)
    return _linear.bind(*residuals, *inputs, jaxpr=jaxpr, maps=maps, count=len(residuals))


def _run(*arrays, jaxpr, maps, count):
    del maps, count
    return jaxpr_as_fun(jaxpr)(*arrays)


def _shapes(*arrays, jaxpr, maps, count):
    del arrays, maps, count
    return jaxpr.out_avals


def _jvp(primals, tangents, *, jaxpr, maps, count):
    outputs = _linear.bind(*primals, jaxpr=jaxpr, maps=maps, count=count)
    known = all(isinstance(tangent, ad.Zero) for tangent in tangents[:count])
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    if known:
        return outputs, _apply(maps, primals[:count], tangents[count:])

    def plain(*arrays):
        return tuple(maps.plain(arrays[:count], arrays[count:]))

    _, moved = jax.jvp(plain, tuple(primals), tuple(tangents))
    return outputs, moved


def _transpose(cotangents, *arrays, jaxpr, maps, count):
    del jaxpr
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    results = _apply(maps.turned(), arrays[:count], cotangents)
    # An input that is known already is a tangent of zero.
    wanted = [ad.is_undefined_primal(array) for array in arrays[count:]]
    inputs = [result if want else None for result, want in zip(results, wanted, strict=True)]
    return [None] * count + inputs


def _batch(arrays, axes, *, jaxpr, maps, count):
    """One map of all rows in the place of a map for each; its outputs have the rows first."""
    of_residuals = tuple(axes[:count])
    of_inputs = tuple(axes[count:])

    def forth(function):
        return jax.vmap(function, in_axes=(of_residuals, of_inputs))

    def back(function):
        of_rows = jax.vmap(function, in_axes=(of_residuals, (0,) * len(jaxpr.out_avals)))

        def transposed(residuals, cotangents):
            results = of_rows(residuals, cotangents)
            return tuple(
                jnp.sum(result, 0) if axis is None else jnp.moveaxis(result, 0, axis)
                for result, axis in zip(results, of_inputs, strict=True)
            )

        return transposed

    maps = _Maps(*map(forth, maps[:2]), *map(back, maps[2:]))
    outputs = _apply(maps, arrays[:count], arrays[count:])
    return outputs, [0] * len(outputs)


_linear.def_impl(_run)
_linear.def_abstract_eval(_shapes)
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
