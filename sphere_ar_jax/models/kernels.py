"""Functions whose value or gradients are computed by faster programs than XLA's own.

Some programs that XLA makes of a derivative are slow on one platform, and some kernels exist on
one platform only. `fast` lets a faster program compute a plain function's value or gradient there.
The result stays differentiable in every way that the plain function is: forward, in reverse,
repeatedly, and under `jit`, `vmap`, `scan` and `checkpoint`. `on_gpus` does the same for functions
of trees, whose gradients come from the plain function. Within `plain()` the plain functions run
alone, so that the two can be compared.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import dce_jaxpr

Arrays: TypeAlias = tuple[jax.Array, ...]
# Takes residuals and inputs, and is linear in the inputs.
LinearMap: TypeAlias = Callable[[Arrays, Arrays], Arrays]

# Our own kernels say by this key of their metadata how many bytes they read and write, for reports.
# They do not read their operands whole.
BYTES_ACCESSED = 'bytes_accessed'

_plain_alone = jax.make_user_context(default_value=False)  # `jax.jit` retraces where it changes


def plain() -> AbstractContextManager:
    """Returns a context in which functions made by `fast` and `on_gpus` are the plain ones."""
    return _plain_alone(True)


def fast(
    plain: Callable[..., jax.Array],
    backward: Callable[[Arrays, jax.Array], Arrays],
    forward: Callable[..., jax.Array] | None = None,
) -> Callable[..., jax.Array]:
    """Makes a function with the values and derivatives of `plain`, some of them by faster programs.

    The value comes from `forward`. Gradients come from `backward`, which reads the arguments and
    nothing else, so that nothing else is kept for it. Tangents come from `plain`, and so do
    derivatives of gradients.

    Args:
      plain: maps arrays to an array by operations that JAX can differentiate.
      backward: maps (arrays, gradient of the value) to the gradients of all arrays, each of its
        array's dtype. JAX need not be able to differentiate its operations.
      forward: maps arrays to an array. JAX need not be able to differentiate its operations. None
        stands for `plain`.

    Returns:
      A function of the same arrays as `plain`.
    """
    evaluate = plain if forward is None else forward

    @jax.custom_jvp
    def quick(*arrays: jax.Array) -> jax.Array:
        return evaluate(*arrays)

    def jvp(arrays: Arrays, tangents: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        value = quick(*arrays)
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]
        if not moving:
            return value, jnp.zeros_like(value)
        maps = _differential(plain, backward, moving)
        (tangent,) = _apply(maps, arrays, [tangents[i] for i in moving])
        return value, tangent

    quick.defjvp(jvp, symbolic_zeros=True)

    def function(*arrays: jax.Array) -> jax.Array:
        return plain(*arrays) if _plain_alone.value else quick(*arrays)

    return function


def on_gpus(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function that runs a kernel where the program is for NVIDIA GPUs, else plain JAX.

    Tangents come from `plain`, and so do gradients.

    Args:
      kernel: maps trees of arrays to a tree of arrays.
      plain: the same function, which JAX can differentiate.

    Returns:
      A function of the same arguments.
    """

    @jax.custom_jvp
    def by_platform(*arrays: Any) -> Any:
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=plain)

    def jvp(arrays: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        _, moved = jax.jvp(plain, arrays, tangents)
        return by_platform(*arrays), moved

    by_platform.defjvp(jvp)

    def function(*arrays: Any) -> Any:
        return plain(*arrays) if _plain_alone.value else by_platform(*arrays)

    return function


class _Maps(NamedTuple):
    """A linear map and its transpose, each by a faster program and by a plain one.

    JAX can differentiate the plain ones.

    Attributes:
      run: the map.
      plain: the same map by plain operations.
      transpose: the transpose of the map.
      plain_transpose: the same transpose by plain operations.
    """

    run: LinearMap
    plain: LinearMap
    transpose: LinearMap
    plain_transpose: LinearMap

    def turned(self) -> '_Maps':
        """Returns the maps of the transpose, whose transpose is this map."""
        return _Maps(self.transpose, self.plain_transpose, self.run, self.plain)


def _differential(
    plain: Callable[..., jax.Array],
    backward: Callable[[Arrays, jax.Array], Arrays],
    moving: Sequence[int],
) -> _Maps:
    """Makes the maps from tangents of the arrays numbered `moving` to the tangent of the value.

    Their residuals are all arrays.
    """

    def split(arrays: Arrays) -> tuple[Callable[..., jax.Array], Arrays]:
        """Returns `plain` as a function of the moving arrays alone, and the moving arrays."""

        def function(*moved: jax.Array) -> jax.Array:
            replaced = dict(zip(moving, moved, strict=True))
            return plain(*(replaced.get(i, array) for i, array in enumerate(arrays)))

        return function, tuple(arrays[i] for i in moving)

    def push(arrays: Arrays, tangents: Arrays) -> Arrays:
        function, moved = split(arrays)
        _, tangent = jax.jvp(function, moved, tuple(tangents))
        return (tangent,)

    def pull(arrays: Arrays, cotangents: Arrays) -> Arrays:
        gradients = backward(arrays, *cotangents)
        return tuple(gradients[i] for i in moving)

    def plain_pull(arrays: Arrays, cotangents: Arrays) -> Arrays:
        function, moved = split(arrays)
        _, transposed = jax.vjp(function, *moved)
        return transposed(*cotangents)

    return _Maps(run=push, plain=push, transpose=pull, plain_transpose=plain_pull)


# `jax.custom_derivatives.linear_call` does much the same. But it cannot be used under `vmap`, and
# it cannot be differentiated in its residuals.
_linear = Primitive('linear_map')
_linear.multiple_results = True


def _apply(maps: _Maps, residuals: Sequence[Any], inputs: Sequence[Any]) -> list[jax.Array]:
    """Returns the outputs of `maps.run`, as a primitive whose transpose is `maps.transpose`."""
    traced = jax.make_jaxpr(maps.run)(tuple(residuals), tuple(inputs))
    # Gradients that nobody asked for are not computed.
    needed, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals), instantiate=True)
    jaxpr = ClosedJaxpr(needed, traced.consts)
    return _linear.bind(*residuals, *inputs, jaxpr=jaxpr, maps=maps, count=len(residuals))


# The rules of the primitive. Its operands are `count` residuals and then the inputs. `jaxpr` is the
# trace of `maps.run`.


def _run(*arrays: jax.Array, jaxpr: ClosedJaxpr, maps: _Maps, count: int) -> Sequence[jax.Array]:
    """Evaluates the map. It is also what XLA compiles."""
    del maps, count
    return jaxpr_as_fun(jaxpr)(*arrays)


def _shapes(*arrays: Any, jaxpr: ClosedJaxpr, maps: _Maps, count: int) -> Sequence[Any]:
    """Returns shapes and dtypes of the outputs."""
    del arrays, maps, count
    return jaxpr.out_avals


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    jaxpr: ClosedJaxpr,
    maps: _Maps,
    count: int,
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
    """Differentiates the map, which is the same map again where the residuals do not move."""
    outputs = _linear.bind(*primals, jaxpr=jaxpr, maps=maps, count=count)
    residuals_stand = all(isinstance(tangent, ad.Zero) for tangent in tangents[:count])
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    if residuals_stand:
        return outputs, _apply(maps, primals[:count], tangents[count:])

    def plain(*arrays: jax.Array) -> Arrays:
        return tuple(maps.plain(arrays[:count], arrays[count:]))

    _, moved = jax.jvp(plain, tuple(primals), tuple(tangents))
    return outputs, moved


def _transpose(
    cotangents: Sequence[Any], *arrays: Any, jaxpr: ClosedJaxpr, maps: _Maps, count: int
) -> list[jax.Array | None]:
    """Applies the transposed map to the cotangents. Residuals get no gradient."""
    del jaxpr
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    results = _apply(maps.turned(), arrays[:count], cotangents)
    # JAX wants no cotangent of an input that it passes as a value.
    wanted = [ad.is_undefined_primal(array) for array in arrays[count:]]
    inputs = [result if want else None for result, want in zip(results, wanted, strict=True)]
    return [None] * count + inputs


def _batch(
    arrays: Sequence[Any],
    axes: Sequence[int | None],
    *,
    jaxpr: ClosedJaxpr,
    maps: _Maps,
    count: int,
) -> tuple[list[jax.Array], list[int]]:
    """Applies one map to all rows, in the place of a map for each.

    The outputs have the rows first.
    """
    residual_axes = tuple(axes[:count])
    input_axes = tuple(axes[count:])
    output_axes = (0,) * len(jaxpr.out_avals)

    def forth(function: LinearMap) -> LinearMap:
        return jax.vmap(function, in_axes=(residual_axes, input_axes))

    def back(function: LinearMap) -> LinearMap:
        of_rows = jax.vmap(function, in_axes=(residual_axes, output_axes))

        def transposed(residuals: Arrays, cotangents: Arrays) -> Arrays:
            results = of_rows(residuals, cotangents)
            return tuple(
                jnp.sum(result, 0) if axis is None else jnp.moveaxis(result, 0, axis)
                for result, axis in zip(results, input_axes, strict=True)
            )

        return transposed

    batched = _Maps(
        run=forth(maps.run),
        plain=forth(maps.plain),
        transpose=back(maps.transpose),
        plain_transpose=back(maps.plain_transpose),
    )
    outputs = _apply(batched, arrays[:count], arrays[count:])
    return outputs, [0] * len(outputs)


_linear.def_impl(_run)
_linear.def_abstract_eval(_shapes)
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
