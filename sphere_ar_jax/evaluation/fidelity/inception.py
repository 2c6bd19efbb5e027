"""The Inception-v3 network of FID, as OpenAI's guided-diffusion evaluator runs it.

The network is the graph in `classify_image_graph_def.pb` of 2015-12-05. Parameters keep the names
of that graph's nodes, so that its file needs no table: 'mixed_4/tower_1/conv_2' holds `kernel`
(h, w, in, out; the graph's conv2d_params) and `beta`, `gamma`, `mean` and `variance` (out,; its
batchnorm/*). PyTorch's port of the same weights has other names for the blocks; `_TORCH_BLOCKS` in
`inception_weights` is the table.

Dimensions:
  n  images, H × W pixels, NHWC     299 × 299  what the network sees, whatever H and W are
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sphere_ar_jax.runtime.types import PyTree

SIZE = 299
EPSILON = 1e-3  # of every batch norm
POOL = 2048
SPATIAL = 17 * 17 * 7
CLASSES = 1008

# Arrays on the devices, or in NumPy.
_Array = TypeVar('_Array', jax.Array, np.ndarray)


class Features(NamedTuple, Generic[_Array]):
    """What the evaluator takes from the network, float32.

    Attributes:
      pool: (n, 2048), `pool_3`.
      spatial: (n, 2023), the first 7 channels of `mixed_6/conv`, after its ReLU, at 17 × 17 places.
        Channels vary fastest.
      logits: (n, 1008), pool · softmax/weights without the bias.
    """

    pool: _Array
    spatial: _Array
    logits: _Array


def resize(images: ArrayLike, size: int = SIZE) -> jax.Array:
    """Resizes images as TensorFlow 1's ResizeBilinear with align_corners=False does.

    Output pixel i lies at input coordinate i·(in/out), without half-pixel centres. Beyond the last
    row and column the nearest pixel is repeated. Nothing is antialiased. Coordinates are float32,
    as in tensorflow/core/kernels/image/resize_bilinear_op.cc.

    Args:
      images: (n, H, W, c), float32 or uint8.
      size: height and width of the result.

    Returns:
      (n, size, size, c) float32, in the range of the images.
    """
    x = jnp.asarray(images).astype(jnp.float32)
    for axis in (2, 1):  # along a row first, then between rows
        length = x.shape[axis]
        at = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
        low = at.astype(np.int32)
        weight = np.expand_dims(at - low.astype(np.float32), [d for d in range(4) if d != axis])
        below = jnp.take(x, low, axis)
        above = jnp.take(x, np.minimum(low + 1, length - 1), axis)
        x = below + (above - below) * weight
    return x


def _numbered(name: str, i: int) -> str:
    """The name of node number i of a kind, as the graph has it: 'conv', 'conv_1', and so on."""
    return f'{name}_{i}' if i else name


def _per_channel(a: jax.Array) -> jax.Array:
    """A vector (c,) in a shape that is broadcast over images (n, H, W, c)."""
    return a.reshape(1, 1, 1, -1)


class Conv(nn.Module):
    """The graph's `conv`: a convolution, a batch norm with fixed statistics, and a ReLU.

    Attributes:
      features: number of output channels.
      kernel: height and width of the kernel.
      stride: stride along both axes.
      padding: 'SAME' or 'VALID'.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = 'SAME'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the ReLU's output (n, H', W', features) for x (n, H, W, c)."""
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.he_normal(), shape)
        beta = self.param('beta', nn.initializers.zeros, (self.features,))
        mean = self.param('mean', nn.initializers.zeros, (self.features,))
        gamma = self.param('gamma', nn.initializers.ones, (self.features,))
        variance = self.param('variance', nn.initializers.ones, (self.features,))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            # TF32 and bfloat16 are too coarse: scores are compared to the second decimal.
            precision=jax.lax.Precision.HIGHEST,
        )
        scale = jax.lax.rsqrt(variance + EPSILON) * gamma
        return nn.relu((x - _per_channel(mean)) * _per_channel(scale) + _per_channel(beta))


# The arguments of a `Conv`.
_ConvArguments = tuple[int] | tuple[int, tuple[int, int]] | tuple[int, tuple[int, int], int, str]


class Fork(nn.Module):
    """A 1 × 3 and a 3 × 1 convolution side by side, with channels joined in this order.

    Attributes:
      features: number of output channels of each of the two.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (n, H, W, 2 · features) for x (n, H, W, c)."""
        wide = Conv(self.features, (1, 3), name=_numbered('conv', 0))(x)
        high = Conv(self.features, (3, 1), name=_numbered('conv', 1))(x)
        return jnp.concatenate([wide, high], -1)


class Tower(nn.Module):
    """Convolutions one after another, with a `Fork` at the end if asked for.

    Attributes:
      convs: the arguments of each `Conv`.
      fork: features of the `Fork`, or 0 for none.
    """

    convs: tuple[_ConvArguments, ...]
    fork: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the output (n, H', W', features) of the last part for x (n, H, W, c)."""
        for i, arguments in enumerate(self.convs):
            x = Conv(*arguments, name=_numbered('conv', i))(x)
        if self.fork:
            x = Fork(self.fork, name='mixed')(x)
        return x


def _average_pool(x: jax.Array) -> jax.Array:
    """Means over 3 × 3 pixels, in which padding does not count."""
    return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), 'SAME')


def _shrinking_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


class Block(nn.Module):
    """Branches side by side, with channels joined: `conv`, the towers, and a pooled branch.

    Attributes:
      conv: the arguments of a `Conv`, or () for none.
      towers: the `Tower.convs` of each tower.
      pool: the pooling of the last branch.
      pool_features: features of a 1 × 1 convolution after the pooling, or 0 for none.
      fork: the `Tower.fork` of all towers.
    """

    conv: tuple[()] | _ConvArguments
    towers: tuple[tuple[_ConvArguments, ...], ...]
    pool: Callable[[jax.Array], jax.Array]
    pool_features: int = 0
    fork: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the branches' outputs (n, H', W', features) for x (n, H, W, c)."""
        parts = []
        if self.conv:
            parts.append(Conv(*self.conv, name='conv')(x))
        for i, convs in enumerate(self.towers):
            parts.append(Tower(convs, self.fork, name=_numbered('tower', i))(x))
        pooled = self.pool(x)
        if self.pool_features:
            name = _numbered('tower', len(self.towers))
            pooled = Tower(((self.pool_features,),), name=name)(pooled)
        parts.append(pooled)
        return jnp.concatenate(parts, -1)


# The end of the arguments of a `Conv` that halves the resolution.
_HALVE = ((3, 3), 2, 'VALID')


def _block_35(pool_features: int) -> dict[str, Any]:
    """The arguments of a `Block` at 35 × 35 places."""
    short = ((48,), (64, (5, 5)))
    long = ((64,), (96, (3, 3)), (96, (3, 3)))
    return dict(conv=(64,), towers=(short, long), pool=_average_pool, pool_features=pool_features)


def _block_17(c: int) -> dict[str, Any]:
    """The arguments of a `Block` at 17 × 17 places, with c features inside the towers."""
    short = ((c,), (c, (1, 7)), (192, (7, 1)))
    long = ((c,), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7)))
    return dict(conv=(192,), towers=(short, long), pool=_average_pool, pool_features=192)


def _block_8(pool: Callable[[jax.Array], jax.Array]) -> dict[str, Any]:
    """The arguments of a `Block` at 8 × 8 places."""
    short = ((384,),)
    long = ((448,), (384, (3, 3)))
    return dict(conv=(320,), towers=(short, long), pool=pool, pool_features=192, fork=384)


def _block_to_17() -> dict[str, Any]:
    """The arguments of the `Block` from 35 × 35 to 17 × 17 places."""
    tower = ((64,), (96, (3, 3)), (96, *_HALVE))
    return dict(conv=(384, *_HALVE), towers=(tower,), pool=_shrinking_pool)


def _block_to_8() -> dict[str, Any]:
    """The arguments of the `Block` from 17 × 17 to 8 × 8 places."""
    short = ((192,), (320, *_HALVE))
    long = ((192,), (192, (1, 7)), (192, (7, 1)), (192, *_HALVE))
    return dict(conv=(), towers=(short, long), pool=_shrinking_pool)


_BLOCKS = {
    'mixed': _block_35(32),
    'mixed_1': _block_35(64),
    'mixed_2': _block_35(64),
    'mixed_3': _block_to_17(),
    'mixed_4': _block_17(128),
    'mixed_5': _block_17(160),
    'mixed_6': _block_17(160),
    'mixed_7': _block_17(192),
    'mixed_8': _block_to_8(),
    'mixed_9': _block_8(_average_pool),
    # Only this block takes the maximum, a quirk of this graph.
    'mixed_10': _block_8(_max_pool),
}


class Inception(nn.Module):
    """The network from the resize on."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Features[jax.Array]:
        """The network's outputs for images (n, 299, 299, 3) float32 in [0, 255], from `resize`."""
        x = (images - 128) / 128
        x = Conv(32, *_HALVE, name='conv')(x)
        x = Conv(32, (3, 3), padding='VALID', name='conv_1')(x)
        x = _shrinking_pool(Conv(64, (3, 3), name='conv_2')(x))
        x = Conv(80, name='conv_3')(x)
        x = _shrinking_pool(Conv(192, (3, 3), padding='VALID', name='conv_4')(x))
        for name, arguments in _BLOCKS.items():
            x = Block(**arguments, name=name)(x)
            if name == 'mixed_6':
                # The channels of the block's `conv` come first.
                spatial = x[..., :7].reshape(len(x), SPATIAL)
        pool = x.mean((1, 2))
        weights = self.param('softmax_weights', nn.initializers.lecun_normal(), (POOL, CLASSES))
        logits = jnp.matmul(pool, weights, precision=jax.lax.Precision.HIGHEST)
        return Features(pool, spatial, logits)


_resize = jax.jit(resize)


@jax.jit
def _apply(params: PyTree, images: jax.Array) -> Features[jax.Array]:
    return Inception().apply({'params': params}, images)


def features(params: PyTree, images: ArrayLike) -> Features[jax.Array]:
    """The network's outputs for images of any size, in any layout over devices.

    The network is compiled once for each n, and the resize once for each shape.

    Args:
      params: from `inception_weights.load`.
      images: (n, H, W, 3), uint8 or float32 in [0, 255].
    """
    return _apply(params, _resize(images))
