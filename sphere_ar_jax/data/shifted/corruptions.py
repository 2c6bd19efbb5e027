"""Corruptions of images, each in five severities.

  CORRUPTIONS   the corruptions by their words

| word      | what it does                                      | severity 1 to 5              |
|-----------|---------------------------------------------------|------------------------------|
| inverted  | mixes an image with 255 − v, by this share of it  | 0.6, 0.7, 0.8, 0.9, 1        |
| rotated   | turns it counterclockwise, by so many degrees     | 15, 30, 60, 90, 180          |
| noisy     | adds Gaussian noise, of this deviation over 255   | 0.08, 0.12, 0.18, 0.26, 0.38 |
| thickened | lets bright parts grow, by this share of the side | 1/16, 3/32, 1/8, 5/32, 3/16  |

The deviations of the noise are those of ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261).

Dimensions:
  n  images     H, W, c  height, width and channels of an image
Images are uint8 (n, H, W, c).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from sphere_ar_jax.data import pixels
from sphere_ar_jax.runtime.console import UserError

SEVERITIES = (1, 2, 3, 4, 5)

# Turns images (n, H, W, c) into floats of the same shape by a strength, called as
# apply(images, strength, rngs); each image has a generator of its own.
_Apply: TypeAlias = Callable[[np.ndarray, float, Sequence[np.random.Generator]], np.ndarray]


def _inverted(
    images: np.ndarray, strength: float, rngs: Sequence[np.random.Generator]
) -> np.ndarray:
    """Mixes images v with 255 − v: (1 − s) v + s (255 − v), s in [0, 1]."""
    return (1 - strength) * images + strength * (255.0 - images)


def _rotated(
    images: np.ndarray, strength: float, rngs: Sequence[np.random.Generator]
) -> np.ndarray:
    """Turns images counterclockwise by degrees; pixels from outside are those of the border."""
    # SciPy's images take a while to import.
    from scipy import ndimage

    values = images.astype(np.float64)
    return ndimage.rotate(values, strength, (2, 1), reshape=False, order=1, mode='nearest')


def _noisy(images: np.ndarray, strength: float, rngs: Sequence[np.random.Generator]) -> np.ndarray:
    """Adds noise N(0, (255 s)²) to every number."""
    noise = np.stack([rng.standard_normal(images.shape[1:]) for rng in rngs])
    return images + 255 * strength * noise


def _thickened(
    images: np.ndarray, strength: float, rngs: Sequence[np.random.Generator]
) -> np.ndarray:
    """Gives each pixel the largest value in a disc, whose radius is a share of the shorter side."""
    from scipy import ndimage

    radius = strength * min(images.shape[1:3])
    reach = np.arange(-int(radius), int(radius) + 1)
    disc = reach[:, None] ** 2 + reach**2 <= radius**2
    return ndimage.grey_dilation(images, footprint=disc[None, :, :, None], mode='nearest')


class Corruption(NamedTuple):
    """A corruption.

    Attributes:
      apply: see `_Apply`.
      strengths: the strength at each of SEVERITIES.
    """

    apply: _Apply
    strengths: tuple[float, float, float, float, float]


CORRUPTIONS: dict[str, Corruption] = {
    'inverted': Corruption(_inverted, (0.6, 0.7, 0.8, 0.9, 1.0)),
    'rotated': Corruption(_rotated, (15.0, 30.0, 60.0, 90.0, 180.0)),
    'noisy': Corruption(_noisy, (0.08, 0.12, 0.18, 0.26, 0.38)),
    'thickened': Corruption(_thickened, (1 / 16, 3 / 32, 1 / 8, 5 / 32, 3 / 16)),
}


class Shift(NamedTuple):
    """A corruption with its severity.

    Attributes:
      word: a key of CORRUPTIONS.
      severity: one of SEVERITIES.
    """

    word: str
    severity: int


def parse(text: str) -> Shift:
    """Reads 'noisy:3'.

    Raises:
      UserError: there is no such corruption or severity; one line.
    """
    word, _, severity = text.partition(':')
    if word not in CORRUPTIONS or severity not in map(str, SEVERITIES):
        raise UserError(
            f'{text!r} is no corruption: write WORD:SEVERITY, as noisy:3, with one of '
            f'{", ".join(CORRUPTIONS)} and a severity from {SEVERITIES[0]} to {SEVERITIES[-1]}'
        )
    return Shift(word, int(severity))


def corrupt(
    images: np.ndarray, shift: Shift, seed: int, index: ArrayLike | None = None
) -> np.ndarray:
    """Corrupts images.

    Args:
      images: uint8 (n, H, W, c).
      shift: what is done to them.
      seed: seed of the noise. What is drawn for an image depends on it and on the image's number.
      index: the images' numbers (n,); 0 to n − 1 if not given.

    Returns:
      uint8 (n, H, W, c).

    Raises:
      ValueError: the images are of another dtype or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f'images must be uint8 (n, H, W, c), but are {images.dtype} {images.shape}'
        )
    corruption = CORRUPTIONS[shift.word]
    strength = corruption.strengths[SEVERITIES.index(shift.severity)]
    numbers = np.arange(len(images)) if index is None else np.asarray(index)
    rngs = [np.random.default_rng((seed, int(i))) for i in numbers]
    values = corruption.apply(images, strength, rngs)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def corrupt_floats(images: np.ndarray, shift: Shift, seed: int) -> np.ndarray:
    """Corrupts images of a model as `corrupt` does, by way of uint8.

    Args:
      images: float32 (n, H, W, c) in [−1, 1].
      shift: see `corrupt`.
      seed: see `corrupt`.

    Returns:
      float32 (n, H, W, c) in [−1, 1].
    """
    clean = np.asarray(pixels.to_uint8(images))
    return pixels.to_float(corrupt(clean, shift, seed))
