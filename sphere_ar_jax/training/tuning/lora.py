"""Factors of low rank beside the transformer's kernels (LoRA, Hu et al., arXiv 2106.09685).

A kernel W is frozen, and W + A·B takes its place wherever the model is applied. A begins as a
normal draw of deviation 1/√I and B as 0, so that the model begins as what it was. The models know
nothing of this: `merged` gives them plain kernels.

Dimensions:
  n  blocks in the stack     I  inputs of a product, over all its input axes     r  rank
"""

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

A = 'lora_a'
B = 'lora_b'
# The transformer's products: (pattern of the kernel's path, number of its input axes). Kernels are
# (n, *in, *out), see `models.transformer`.
_PRODUCTS = (
    (r'stack/blocks/attention/qkv/kernel', 1),
    (r'stack/blocks/attention/out/kernel', 2),
    (r'stack/blocks/mlp/w[12]/kernel', 1),
)


def _inputs(path: str) -> int:
    """The number of input axes of the kernel of a path, 0 where it is no product's."""
    return next((axes for pattern, axes in _PRODUCTS if re.fullmatch(pattern, path)), 0)


def is_product(path: str) -> bool:
    """Whether a path is that of a kernel of the transformer's products."""
    return _inputs(path) > 0


def init(kernels: dict[str, jax.Array], rank: int, key: jax.Array) -> dict[str, jax.Array]:
    """Makes the factors of some kernels.

    Args:
      kernels: the kernels (n, *in, *out) by their paths, abstract or not.
      rank: r.
      key: a PRNG key.

    Returns:
      {PATH/lora_a: (n, *in, r), PATH/lora_b: (n, r, *out)}, float32.
    """
    factors = {}
    for i, (path, kernel) in enumerate(sorted(kernels.items())):
        end = 1 + _inputs(path)
        shape = kernel.shape
        scale = math.prod(shape[1:end]) ** -0.5
        draw = jax.random.normal(jax.random.fold_in(key, i), (*shape[:end], rank))
        factors[f'{path}/{A}'] = scale * draw
        factors[f'{path}/{B}'] = jnp.zeros((shape[0], rank, *shape[end:]))
    return factors


@jax.jit
def _add(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes W + A·B of each block; no axes are merged, since they may be split over devices."""
    product = jax.lax.dot_general(
        a, b, (((a.ndim - 1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
    )
    return kernel + product


def _add_whole(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes W + A·B as one device does, whatever the mesh, and lays it out as W is.

    A product of split arrays may have other last bits.
    """
    layout = getattr(kernel, 'sharding', None)  # arrays of NumPy have none
    if not isinstance(layout, NamedSharding) or layout.mesh.size == 1:
        return _add(kernel, a, b)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    gather = jax.jit(lambda *arrays: arrays, out_shardings=everywhere)
    total = _add(*gather(kernel, a, b))
    return jax.jit(lambda array: array, out_shardings=layout)(total)


def merged(flat: dict[str, jax.Array], whole: bool = False) -> dict[str, jax.Array]:
    """Puts W + A·B in the place of every kernel W that has factors beside it.

    Args:
      flat: parameters and factors by their paths.
      whole: gives the same bits on any mesh, for arrays that are no part of a larger program. What
        is trained on such a model notes them.

    Returns:
      The parameters by their paths.
    """
    add = _add_whole if whole else _add
    found = {path: leaf for path, leaf in flat.items() if not path.endswith((A, B))}
    for path in flat:
        if path.endswith(f'/{A}'):
            kernel = path.removesuffix(f'/{A}')
            found[kernel] = add(flat[kernel], flat[path], flat[f'{kernel}/{B}'])
    return found
