"""How alike two images look: LPIPS (a training loss and a score), SSIM and PSNR of each image
(scores).

Dimensions:
  B     images     H, W  pixels     c  channels of the images, or features of a pixel inside VGG16
Images are (B, H, W, c), float in [−1, 1] unless said otherwise. All but `load` and `read` may be
jitted.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

# Channels of VGG16's 3×3 convolutions, each with a ReLU; between the stages the resolution is
# halved.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and deviation of ImageNet's channels, for pixels in [−1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """The convolutions of VGG16. Images (B, H, W, 3), normalised → the features at the end of each
    stage, five arrays (B, H/2^i, W/2^i, c), i = 0 … 4, sizes rounded down.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = []
        for i, stage in enumerate(STAGES, 1):
            if i > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j, channels in enumerate(stage, 1):
                x = nn.relu(
                    nn.Conv(channels, (3, 3), padding=1, dtype=self.dtype, name=f'conv{i}_{j}')(x)
                )
            features.append(x)
        return features


def _unit(x):
    """x / (‖x‖ + 1e-10) over the last axis, with a finite slope at x = 0, where a root has none."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(square, 1e-36)) + 1e-10)


class LPIPS(nn.Module):
    """Learned perceptual distance: Σ over VGG16's stages of mean over pixels of Σ_c w_c·(f̂_c(a) −
    f̂_c(b))².

    f̂ are the features of a pixel, normalised to length 1; w are learned weights. Parameters: see
    `load`.

    Attributes:
      dtype: of the convolutions; normalisation and distance are float32.
    Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1, version 0.1 as in taming-transformers.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, a, b):
        """a, b: (B, H, W, 3) in [−1, 1], H and W ≥ 16 → distances (B,) float32. ValueError for
        other shapes.

        A gradient wanted for `a` alone costs no backward pass through b's features.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or min(a.shape[1:3]) < 16:
            raise ValueError(
                f'LPIPS needs two batches (B, H, W, 3) of at least 16×16 pixels: {a.shape} and {b.shape}'
            )
        vgg = VGG16(self.dtype, name='vgg')
        shift, scale = (jnp.asarray(s, jnp.float32)[None, None, None] for s in (SHIFT, SCALE))
        features = lambda x: [_unit(f.astype(jnp.float32)) for f in vgg((x - shift) / scale)]
        distance = jnp.zeros(len(a))
        for i, (f, g) in enumerate(zip(features(a), features(b), strict=True)):
            weight = self.param(f'lin{i}', nn.initializers.ones, f.shape[-1:])
            per_pixel = jnp.sum(weight[None, None, None] * jnp.square(f - g), axis=-1)
            distance += jnp.mean(per_pixel, axis=(1, 2))
        return distance
