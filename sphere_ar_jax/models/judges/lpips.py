"""LPIPS, the learned perceptual distance of two images: a training loss and a score.

Dimensions:
  B     images     H, W  pixels     c  channels of the images, or features of a pixel inside VGG16
Images are (B, H, W, c), float in [−1, 1] unless said otherwise.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Channels of VGG16's 3×3 convolutions, each with a ReLU. The resolution is halved between stages.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and deviation of ImageNet's channels, for pixels in [−1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """The convolutions of VGG16.

    Attributes:
      dtype: dtype of the convolutions; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Returns the features at the end of each stage.

        Args:
          x: (B, H, W, 3) images, normalised by `SHIFT` and `SCALE`.

        Returns:
          Five arrays (B, H/2^i, W/2^i, c), i = 0 … 4, with sizes rounded down.
        """
        features = []
        for i, stage in enumerate(STAGES, 1):
            if i > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j, channels in enumerate(stage, 1):
                conv = nn.Conv(channels, (3, 3), padding=1, dtype=self.dtype, name=f'conv{i}_{j}')
                x = nn.relu(conv(x))
            features.append(x)
        return features


def _unit(x: jax.Array) -> jax.Array:
    """Computes x / (‖x‖ + 1e-10) over the last axis.

    Its derivative is finite at x = 0, where that of ‖x‖ alone is not.
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(square, 1e-36)) + 1e-10)


class LPIPS(nn.Module):
    """Computes Σ over VGG16's stages of mean over pixels of Σ_c w_c·(f̂_c(a) − f̂_c(b))².

    f̂ are the features of a pixel, normalised to length 1, and w are learned weights.
    `sphere_ar_jax.interop.lpips` reads published parameters. The source is Zhang et al. 2018 (arXiv
    1801.03924), eq. 1, in version 0.1 as in taming-transformers.

    Attributes:
      dtype: dtype of the convolutions; normalisation and distance are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Computes the distance of each pair of images.

        A gradient wanted for `a` alone costs no backward pass through b's features.

        Args:
          a: (B, H, W, 3) in [−1, 1], H and W ≥ 16.
          b: images of the same shape.

        Returns:
          Distances (B,) float32.

        Raises:
          ValueError: the shapes differ, or are not (B, H, W, 3) with H and W ≥ 16.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or min(a.shape[1:3]) < 16:
            needed = 'two batches (B, H, W, 3) of at least 16×16 pixels'
            raise ValueError(f'LPIPS needs {needed}: {a.shape} and {b.shape}')
        vgg = VGG16(self.dtype, name='vgg')
        shift = jnp.asarray(SHIFT, jnp.float32)[None, None, None]
        scale = jnp.asarray(SCALE, jnp.float32)[None, None, None]

        def features(x: jax.Array) -> list[jax.Array]:
            return [_unit(stage.astype(jnp.float32)) for stage in vgg((x - shift) / scale)]

        distance = jnp.zeros(len(a))
        for i, (f, g) in enumerate(zip(features(a), features(b), strict=True)):
            weight = self.param(f'lin{i}', nn.initializers.ones, f.shape[-1:])
            per_pixel = jnp.sum(weight[None, None, None] * jnp.square(f - g), axis=-1)
            distance += jnp.mean(per_pixel, axis=(1, 2))
        return distance
