"""Similarity of two images: SSIM and PSNR.

Dimensions:
  B  pairs of images     H, W  pixels     c  channels
"""

import jax.numpy as jnp
import numpy as np

WINDOW, SIGMA = 11, 1.5


def _blur(x):
    """(B, H, W, c) → (B, H − 10, W − 10, c): Gaussian means of 11×11 windows that lie inside the image.

    Sums of shifted images, not a convolution: those round to bfloat16 on TPUs, to TF32 on GPUs.
    """
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).tolist()
    H, W = x.shape[1] - WINDOW + 1, x.shape[2] - WINDOW + 1
    x = sum(w * x[:, i : i + H] for i, w in enumerate(weights))
    return sum(w * x[:, :, i : i + W] for i, w in enumerate(weights))


def ssim(a, b, pixel_range=(-1, 1)):
    """Structural similarity of each pair, (B,) float32, 1 for equal images.

    Mean over channels and windows of (2μ_a μ_b + C1)(2σ_ab + C2) / ((μ_a² + μ_b² + C1)(σ_a² + σ_b² + C2)): means,
    variances (biased) and covariance weighted by a Gaussian of 11×11 pixels with σ = 1.5, windows inside the image
    only; C1 = 0.01², C2 = 0.03² for pixels brought from `pixel_range` to [0, 1]. (μ is not free of the zero point:
    pixels in [−1, 1] with a range of 2 would give other numbers.)

    Args:
      a, b: (B, H, W, c), of any type, H and W ≥ 11. pixel_range: the values of black and white, (0, 255) for bytes.
    Raises ValueError for other shapes. Source: Wang et al. 2004; scikit-image's `structural_similarity` with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, averaged over channels.
    """
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[1:3]) < WINDOW:
        raise ValueError(f'SSIM needs two batches (B, H, W, c) of at least 11×11 pixels: {a.shape} and {b.shape}')
    # grey at 0: E x² − μ² then cancels least
    a, b = (_unit_range(x, pixel_range) - 0.5 for x in (a, b))
    mean_a, mean_b = _blur(a), _blur(b)
    variances = _blur(a * a) + _blur(b * b) - mean_a**2 - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (variances + c2), axis=(1, 2, 3))


def image_psnr(a, b, pixel_range=(-1, 1)):
    """Peak signal-to-noise ratio of each pair in dB, (B,) float32: −10 log₁₀ of the mean square error of pixels brought
    to [0, 1]; infinite for equal images.

    Papers that score image by image, as scikit-image does, report its mean. `tokenizer.psnr`, of all pixels together,
    is never more than that (− log is convex).

    Args: as of `ssim`, of any size. Raises ValueError for different shapes.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f'PSNR needs two batches (B, H, W, c): {a.shape} and {b.shape}')
    error = _unit_range(a, pixel_range) - _unit_range(b, pixel_range)
    return -10 * jnp.log10(jnp.mean(jnp.square(error), axis=(1, 2, 3)))


def _unit_range(x, pixel_range):
    """Pixels from `pixel_range` to [0, 1], float32."""
    low, high = pixel_range
    return (jnp.asarray(x, jnp.float32) - low) / (high - low)
