"""How alike two images look: LPIPS (a training loss and a score), SSIM and PSNR of each image (scores).

Dimensions:
  B     images     H, W  pixels     c  channels of the images, or features of a pixel inside VGG16
Images are (B, H, W, c), float in [−1, 1] unless said otherwise. All but `load` and `read` may be jitted.
"""

import os
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax import torch_file

# Channels of VGG16's 3×3 convolutions, each with a ReLU; between the stages the resolution is halved.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and deviation of ImageNet's channels, for pixels in [−1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
WINDOW, SIGMA = 11, 1.5
SOURCES = (
    "taming-transformers' vgg.pth (https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1)",
    "torchvision's vgg16-397923af.pth (https://download.pytorch.org/models/vgg16-397923af.pth)",
)


class WeightsError(ValueError):
    """The files are not LPIPS weights."""


class VGG16(nn.Module):
    """The convolutions of VGG16. Images (B, H, W, 3), normalised → the features at the end of each stage, five arrays
    (B, H/2^i, W/2^i, c), i = 0 … 4, sizes rounded down."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = []
        for i, stage in enumerate(STAGES, 1):
            if i > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j, channels in enumerate(stage, 1):
                x = nn.relu(nn.Conv(channels, (3, 3), padding=1, dtype=self.dtype, name=f'conv{i}_{j}')(x))
            features.append(x)
        return features


def _unit(x):
    """x / (‖x‖ + 1e-10) over the last axis, with a finite slope at x = 0, where a root has none."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(square, 1e-36)) + 1e-10)


class LPIPS(nn.Module):
    """Learned perceptual distance: Σ over VGG16's stages of mean over pixels of Σ_c w_c·(f̂_c(a) − f̂_c(b))².

    f̂ are the features of a pixel, normalised to length 1; w are learned weights. Parameters: see `load`.

    Attributes:
      dtype: of the convolutions; normalisation and distance are float32.
    Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1, version 0.1 as in taming-transformers.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, a, b):
        """a, b: (B, H, W, 3) in [−1, 1], H and W ≥ 16 → distances (B,) float32. ValueError for other shapes.

        A gradient wanted for `a` alone costs no backward pass through b's features.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or min(a.shape[1:3]) < 16:
            raise ValueError(f'LPIPS needs two batches (B, H, W, 3) of at least 16×16 pixels: {a.shape} and {b.shape}')
        vgg = VGG16(self.dtype, name='vgg')
        shift, scale = (jnp.asarray(s, jnp.float32)[None, None, None] for s in (SHIFT, SCALE))
        features = lambda x: [_unit(f.astype(jnp.float32)) for f in vgg((x - shift) / scale)]
        distance = jnp.zeros(len(a))
        for i, (f, g) in enumerate(zip(features(a), features(b), strict=True)):
            weight = self.param(f'lin{i}', nn.initializers.ones, f.shape[-1:])
            per_pixel = jnp.sum(weight[None, None, None] * jnp.square(f - g), axis=-1)
            distance += jnp.mean(per_pixel, axis=(1, 2))
        return distance


def load(lin_tensors, vgg_tensors):
    """Parameters of `LPIPS` from the tensors of two public PyTorch files.

    Args:
      lin_tensors: {name: array-like} of `vgg.pth` of taming-transformers or of the lpips package's v0.1 (the same
        names): lin<i>.model.1.weight (1, c, 1, 1).
      vgg_tensors: {name: array-like} of torchvision's `vgg16-397923af.pth`: features.<n>.weight (out, in, 3, 3) and
        features.<n>.bias (out,); its classifier.* are not needed.
    Returns:
      parameter tree of float32 NumPy arrays.
    Raises WeightsError, in one line, for all missing, mis-shaped and unexpected tensors together.
    """
    lins, shapes, convolutions = {}, {}, {}
    index, before = 0, 3  # torchvision's list counts ReLUs and poolings too
    for i, stage in enumerate(STAGES):
        lins[f'lin{i}.model.1.weight'] = (1, stage[-1], 1, 1)
        for j, channels in enumerate(stage):
            convolutions[f'conv{i + 1}_{j + 1}'] = f'features.{index}'
            shapes[f'features.{index}.weight'], shapes[f'features.{index}.bias'] = (channels, before, 3, 3), (channels,)
            index, before = index + 2, channels
        index += 1
    vgg_tensors = {name: a for name, a in vgg_tensors.items() if not str(name).startswith('classifier.')}
    faults = _faults('vgg.pth', lin_tensors, lins) + _faults('vgg16-397923af.pth', vgg_tensors, shapes)
    if faults:
        raise WeightsError(
            "LPIPS takes the tensors of taming-transformers' vgg.pth and of torchvision's vgg16-397923af.pth, but "
            + '; '.join(faults)
        )
    array = lambda name: np.asarray(vgg_tensors[name], np.float32)
    return {f'lin{i}': np.asarray(lin_tensors[name], np.float32).ravel() for i, name in enumerate(lins)} | {
        'vgg': {
            ours: {'kernel': array(f'{theirs}.weight').transpose(2, 3, 1, 0), 'bias': array(f'{theirs}.bias')}
            for ours, theirs in convolutions.items()
        }
    }


def check_paths(lin_path, vgg_path):
    """Raises WeightsError where a path is None or no file is there; it says where both files are to be had."""
    missing = [f'no file {path}' for path in (lin_path, vgg_path) if path is not None and not os.path.isfile(path)]
    missing += [
        f'no path to {s.split(" (")[0]}' for s, p in zip(SOURCES, (lin_path, vgg_path), strict=True) if p is None
    ]
    if missing:
        raise WeightsError(
            f'LPIPS needs {" and ".join(SOURCES)}, but there is {" and ".join(missing)}: download both '
            '(training goes without at perceptual_weight=0)'
        )


def read(lin_path, vgg_path):
    """`load` of the files `vgg.pth` and `vgg16-397923af.pth`.

    Raises:
      WeightsError: of `check_paths`, or a file is of other tensors. torch_file.FileError: a file is damaged, or none of
      PyTorch.
    """
    check_paths(lin_path, vgg_path)
    contents = [torch_file.open_file(path) for path in (lin_path, vgg_path)]
    for path, tensors in zip((lin_path, vgg_path), contents, strict=True):
        if not isinstance(tensors, dict):
            raise WeightsError(f'{path} holds a {type(tensors).__name__}, but must hold tensors by name')
    return load(*contents)


def _faults(file, tensors, shapes):
    """What is wrong with a file's {name: tensor} that should have these shapes, as a list of clauses."""
    missing = [name for name in shapes if name not in tensors]
    unexpected = [str(name) for name in tensors if name not in shapes]
    faults = [
        f'{name} has shape {np.shape(tensors[name])}, not {shape}'
        for name, shape in shapes.items()
        if name in tensors and np.shape(tensors[name]) != shape
    ]
    if missing:
        faults.append(f'{file} lacks {", ".join(missing)}')
    if unexpected:
        faults.append(f'{file} has unexpected {", ".join(unexpected)}')
    return faults


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

    Papers that score image by image, as scikit-image does, report its mean. `evaluation.psnr`, of all pixels together,
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
