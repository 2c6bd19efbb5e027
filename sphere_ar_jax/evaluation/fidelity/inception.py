"""The Inception-v3 of FID: `classify_image_graph_def.pb` of 2015-12-05, as OpenAI's
guided-diffusion evaluator runs it.

Parameters keep the names of that graph's nodes, so its file needs no table:
'mixed_4/tower_1/conv_2' holds `kernel` (h, w, in, out; the graph's conv2d_params) and `beta`,
`gamma`, `mean`, `variance` (out,; its batchnorm/*). PyTorch's port of the same weights names the
blocks otherwise; `_TORCH_BLOCKS` is the table.

Dimensions:
  n  images, H × W pixels, NHWC     299 × 299  what the network sees, whatever H and W are
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299
EPSILON = 1e-3  # of every batch norm
POOL, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008


class Features(NamedTuple):
    """What the evaluator takes from the network, float32.

    pool: (n, 2048), `pool_3`. spatial: (n, 2023), `mixed_6/conv`'s first 7 channels (after its
    ReLU) over 17 × 17 places, channels fastest. logits: (n, 1008), pool · softmax/weights without
    the bias.
    """

    pool: Any
    spatial: Any
    logits: Any


def resize(images, size=SIZE):
    """Bilinear resize as TensorFlow 1's ResizeBilinear with align_corners=False and no half-pixel
    centres.

    Output pixel i lies at input coordinate i·(in/out), so the last row and column are never reached
    from beyond: there the nearest pixel is repeated. No antialiasing.

    Args:
      images: (n, H, W, c) float32, or uint8.
    Returns:
      (n, size, size, c) float32, in the range of the images. Coordinates are float32, as in
      tensorflow/core/kernels/image/resize_bilinear_op.cc.
    """
    x = jnp.asarray(images).astype(jnp.float32)
    for axis in (2, 1):  # along a row first, then between rows
        length = x.shape[axis]
        at = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
        low = at.astype(np.int32)
        weight = np.expand_dims(at - low.astype(np.float32), [d for d in range(4) if d != axis])
        below = jnp.take(x, low, axis)
        x = below + (jnp.take(x, np.minimum(low + 1, length - 1), axis) - below) * weight
    return x


def _numbered(name, i):
    return f'{name}_{i}' if i else name


class Conv(nn.Module):
    """Convolution, batch norm with fixed statistics, ReLU: the graph's `conv`, whose output is the
    ReLU's.
    """

    features: int
    kernel: tuple = (1, 1)
    stride: int = 1
    padding: str = 'SAME'

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.he_normal(), shape)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        beta, mean = (self.param(name, zeros, (self.features,)) for name in ('beta', 'mean'))
        gamma, variance = (
            self.param(name, ones, (self.features,)) for name in ('gamma', 'variance')
        )
        x = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,) * 2, self.padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            # no TF32, no bfloat16: scores are compared to the second decimal
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        scale = jax.lax.rsqrt(variance + EPSILON) * gamma
        channels = lambda a: a.reshape(1, 1, 1, -1)
        return nn.relu((x - channels(mean)) * channels(scale) + channels(beta))


class Fork(nn.Module):
    """A 1 × 3 and a 3 × 1 convolution side by side."""

    features: int

    @nn.compact
    def __call__(self, x):
        parts = [
            Conv(self.features, k, name=_numbered('conv', i))(x)
            for i, k in enumerate(((1, 3), (3, 1)))
        ]
        return jnp.concatenate(parts, -1)


class Tower(nn.Module):
    """Convolutions one after another, each the arguments of a `Conv`; with `fork` features, a
    `Fork` at the end.
    """

    convs: tuple
    fork: int = 0

    @nn.compact
    def __call__(self, x):
        for i, arguments in enumerate(self.convs):
            x = Conv(*arguments, name=_numbered('conv', i))(x)
        return Fork(self.fork, name='mixed')(x) if self.fork else x


def _average_pool(x):
    """3 × 3 means of the pixels that are there: padding does not count."""
    return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _max_pool(x):
    return nn.max_pool(x, (3, 3), (1, 1), 'SAME')


def _shrinking_pool(x):
    return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


class Block(nn.Module):
    """`conv`, the towers, and a pooled branch (with a convolution if pool_features), channels
    joined in this order.
    """

    conv: tuple
    towers: tuple
    pool: Any
    pool_features: int = 0
    fork: int = 0

    @nn.compact
    def __call__(self, x):
        parts = [Conv(*self.conv, name='conv')(x)] if self.conv else []
        for i, convs in enumerate(self.towers):
            parts.append(Tower(convs, self.fork, name=_numbered('tower', i))(x))
        pooled = self.pool(x)
        if self.pool_features:
            pooled = Tower(((self.pool_features,),), name=_numbered('tower', len(self.towers)))(
                pooled
            )
        return jnp.concatenate([*parts, pooled], -1)


_HALVE = (3, 3), 2, 'VALID'


def _block_35(pool_features):
    towers = ((48,), (64, (5, 5))), ((64,), (96, (3, 3)), (96, (3, 3)))
    return dict(conv=(64,), towers=towers, pool=_average_pool, pool_features=pool_features)


def _block_17(c):
    long = (c,), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))
    towers = ((c,), (c, (1, 7)), (192, (7, 1))), long
    return dict(conv=(192,), towers=towers, pool=_average_pool, pool_features=192)


def _block_8(pool):
    return dict(
        conv=(320,),
        towers=(((384,),), ((448,), (384, (3, 3)))),
        pool=pool,
        pool_features=192,
        fork=384,
    )


_BLOCKS = {
    'mixed': _block_35(32),
    'mixed_1': _block_35(64),
    'mixed_2': _block_35(64),
    'mixed_3': dict(
        conv=(384, *_HALVE), towers=(((64,), (96, (3, 3)), (96, *_HALVE)),), pool=_shrinking_pool,
    ),
    'mixed_4': _block_17(128),
    'mixed_5': _block_17(160),
    'mixed_6': _block_17(160),
    'mixed_7': _block_17(192),
    'mixed_8': dict(
        conv=(), pool=_shrinking_pool,
        towers=(((192,), (320, *_HALVE)), ((192,), (192, (1, 7)), (192, (7, 1)), (192, *_HALVE))),
    ),
    'mixed_9': _block_8(_average_pool),
    'mixed_10': _block_8(_max_pool),  # only here the maximum, a quirk of this graph
}  # fmt: skip


class Inception(nn.Module):
    """The network from the resize on."""

    @nn.compact
    def __call__(self, images):
        """images: (n, 299, 299, 3) float32 in [0, 255], as `resize` leaves them. Returns
        `Features`.
        """
        x = (images - 128) / 128
        x = Conv(32, *_HALVE, name='conv')(x)
        x = Conv(32, (3, 3), padding='VALID', name='conv_1')(x)
        x = _shrinking_pool(Conv(64, (3, 3), name='conv_2')(x))
        x = Conv(80, name='conv_3')(x)
        x = _shrinking_pool(Conv(192, (3, 3), padding='VALID', name='conv_4')(x))
        for name, arguments in _BLOCKS.items():
            x = Block(**arguments, name=name)(x)
            if name == 'mixed_6':
                spatial = x[..., :7].reshape(
                    len(x), SPATIAL
                )  # the channels of its `conv` come first
        pool = x.mean((1, 2))
        weights = self.param('softmax_weights', nn.initializers.lecun_normal(), (POOL, CLASSES))
        return Features(
            pool, spatial, jnp.matmul(pool, weights, precision=jax.lax.Precision.HIGHEST)
        )


_resize = jax.jit(resize)
_apply = jax.jit(lambda params, images: Inception().apply({'params': params}, images))


def features(params, images):
    """`Features` of images (n, H, W, 3), uint8 or float32 in [0, 255]; of any layout over devices.

    Compiled: the network once for each n, the resize for each shape.
    """
    return _apply(params, _resize(images))
