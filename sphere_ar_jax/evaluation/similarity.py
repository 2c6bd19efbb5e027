"""Similarity of two images, by dm-pix: SSIM and PSNR.

Dimensions:
  B  pairs of images     H, W  pixels     c  channels
"""

import dm_pix
import jax
import jax.numpy as jnp

WINDOW = 11


def _unit_range(x: jax.Array, pixel_range: tuple[float, float]) -> jax.Array:
    """Pixels from `pixel_range` to [0, 1], float32."""
    low, high = pixel_range
    return (jnp.asarray(x, jnp.float32) - low) / (high - low)


def ssim(a: jax.Array, b: jax.Array, pixel_range: tuple[float, float] = (-1, 1)) -> jax.Array:
    """Structural similarity of each pair, (B,) float32, 1 for equal images.

    Windows of 11×11 pixels inside the image, weighted by a Gaussian with σ = 1.5; C1 = 0.01² and C2 = 0.03² for pixels
    brought from `pixel_range` to [0, 1]. (The mean is not free of the zero point: pixels in [−1, 1] with a range of 2
    would give other numbers.)

    Args:
      a, b: (B, H, W, c), of any type, H and W ≥ 11. pixel_range: the values of black and white, (0, 255) for bytes.
    Raises ValueError for other shapes. Source: Wang et al. 2004; scikit-image's `structural_similarity` with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, averaged over channels, gives the same to 1e-4.
    """
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[1:3]) < WINDOW:
        raise ValueError(f'SSIM needs two batches (B, H, W, c) of at least 11×11 pixels: {a.shape} and {b.shape}')
    with jax.numpy_dtype_promotion('standard'):  # dm-pix mixes types
        return dm_pix.ssim(_unit_range(a, pixel_range), _unit_range(b, pixel_range))


def image_psnr(a: jax.Array, b: jax.Array, pixel_range: tuple[float, float] = (-1, 1)) -> jax.Array:
    """Peak signal-to-noise ratio of each pair in dB, (B,) float32; infinite for equal images.

    Papers that score image by image, as scikit-image does, report its mean. `tokenizer.psnr`, of all pixels together,
    is never more than that (− log is convex).

    Args: as for `ssim`, of any size. Raises ValueError for different shapes.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f'PSNR needs two batches (B, H, W, c): {a.shape} and {b.shape}')
    with jax.numpy_dtype_promotion('standard'):
        return dm_pix.psnr(_unit_range(a, pixel_range), _unit_range(b, pixel_range))
