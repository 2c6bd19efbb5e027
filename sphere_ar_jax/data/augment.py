"""Decoding, cropping and flipping of training images on the CPU.

The crops are those of ADM (`docs/method.md`, "Data augmentation"). Every random number of a crop is
a call draw(low, high), which gives an integer in [low, high), so that the draws alone determine the
crop. `Augmentation` documents their order.

Dimensions:
  H, W   height and width of an image as it was encoded
  S      side of the square crop
  s ≥ S  the shorter side that an image is resized to
"""

import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from sphere_ar_jax.data.pixels import to_float
from sphere_ar_jax.runtime.console import first_line

# Draws an integer in [low, high), called as draw(low, high).
Draw: TypeAlias = Callable[[int, int], int]


class BrokenImageError(ValueError):
    """An image cannot be decoded: truncated, empty, of no known format, or of absurd size."""


FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF')  # PIL would run Ghostscript for EPS
# Above this number PIL itself only warns; it refuses images of more than twice as many pixels. PIL
# holds a pixel of RGB in 4 bytes, so that an image of this size takes 341 MiB.
MAX_PIXELS = 2**30 // 12
SMALLEST_SHARE = 0.8  # a random crop keeps at least this share of the shorter side


def _check_size(width: int, height: int) -> None:
    """Raises BrokenImageError for an image of more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise BrokenImageError(
            f'{width} × {height} pixels are more than the {MAX_PIXELS} that are read'
        )


def decode(content: bytes, draft: int | None = None) -> Image.Image:
    """Decodes an image file to an RGB image of PIL.

    Grey, palette, CMYK and alpha become RGB as PIL converts them; alpha is dropped, not blended.
    The rotation that EXIF may ask for is ignored. The first of several frames is taken. torchvision
    reads image folders in the same way.

    Args:
      content: bytes of a file of one of FORMATS.
      draft: if not None, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that leaves
        both sides ≥ draft. This is faster for large images only, and does not give the recipe's
        pixels.

    Returns:
      The image, of mode RGB, loaded.

    Raises:
      BrokenImageError: the image cannot be decoded, or has more than MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(*image.size)
        if draft is not None:
            image.draft('RGB', (draft, draft))
        image.load()
        return image if image.mode == 'RGB' else image.convert('RGB')
    except (BrokenImageError, MemoryError):
        raise
    except Exception as error:  # damaged files make PIL raise many kinds
        raise BrokenImageError(first_line(error, 160)) from None


def _resized_crop(
    image: Image.Image, width: int, height: int, y: int, x: int, size: int
) -> Image.Image:
    """Resizes an image to width × height, but computes only the S × S window at (y, x).

    The result is bit for bit image.resize((width, height), BICUBIC) cut to rows y to y + S and
    columns x to x + S. PIL resizes along x first, rounds to 8 bits, then resizes along y. Neither
    step here computes what is cut off after it, which saves about a sixth of the time. Both steps
    see the coordinates of the whole image, and so have the same weights.
    """
    bicubic = Image.Resampling.BICUBIC
    step = image.height / height
    # Pillow 13 and later resize such images along y first; 12.2 did so only above a ratio of 100.
    y_first = image.height - height > max(0, 2 * (image.width - width))
    if y_first:
        return image.resize((width, height), bicubic).crop((x, y, x + size, y + size))
    # Rows on either side of the window that it depends on: the cubic's support, and rounding.
    reach = 2 * max(step, 1) + 2
    top = max(0, math.floor(y * step - reach))
    bottom = min(image.height, math.ceil((y + size) * step + reach))
    strip = image.crop((0, top, image.width, bottom)).resize((width, bottom - top), bicubic)
    # The strip goes back to its place in the image's height; the rows around it are not needed.
    columns = strip.crop((x, -top, x + size, image.height - top))
    return columns.resize((size, height), bicubic).crop((0, y, size, y + size))


def crop(image: Image.Image, size: int, shorter: int, draw: Draw) -> np.ndarray:
    """Resizes the shorter side to s and cuts out S × S pixels at a drawn place: ADM's crop.

    The image is halved by a box filter while its shorter side is ≥ 2·s, then resized bicubically.
    y is drawn first, then x.

    Args:
      image: an RGB image of PIL.
      size: S.
      shorter: s.
      draw: gives y and x.

    Returns:
      (S, S, 3) uint8.

    Raises:
      BrokenImageError: the image is so long and thin that it would be resized beyond MAX_PIXELS.
    """
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    _check_size(width, height)
    y = draw(0, height - size + 1)
    x = draw(0, width - size + 1)
    return np.asarray(_resized_crop(image, width, height, y, x, size))


def _middle(low: int, high: int) -> int:
    """Stands in for a random draw, and gives the middle of the range."""
    return (low + high - 1) // 2


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the shorter side to S and cuts out the S × S pixels in the middle, see `crop`.

    Args:
      image: an RGB image of PIL.
      size: S.

    Returns:
      (S, S, 3) uint8.
    """
    return crop(image, size, size, _middle)


def draw_shorter_side(size: int, draw: Draw) -> int:
    """Draws s of a random crop, uniform from S to ⌈S/0.8⌉."""
    return draw(size, math.ceil(size / SMALLEST_SHARE) + 1)


def aug_ratio(epoch: int, decay_from: int = 350, decay_to: int = 375) -> float:
    """Gives the probability of a random crop in an epoch.

    It is 1 up to epoch `decay_from` and falls linearly to 0 at epoch `decay_to`. Epochs count from
    0. Where both ends are equal, it is 0 from that epoch on.
    """
    if epoch >= decay_to:
        return 0.0
    if epoch <= decay_from:
        return 1.0
    return 1 - (epoch - decay_from) / (decay_to - decay_from)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The transform of `batches.batches` for training on encoded images.

    These are the draws from the rng of one image, in order:

    1. A float in [0, 1). If it is below `aug_ratio` of the epoch, the crop is random.
    2. For a random crop: s, y and x.
    3. 0 or 1. 1 flips left and right.

    Attributes:
      size: S.
      decay_from: the last epoch of random crops alone, see `aug_ratio`.
      decay_to: the first epoch of centre crops alone, see `aug_ratio`.
      draft: whether to decode at a reduced size, see `decode`; this is not exact.
    """

    size: int
    decay_from: int = 350
    decay_to: int = 375
    draft: bool = False

    def __call__(
        self, record: dict[str, Any], epoch: int, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Decodes, crops and flips the image of a record.

        Args:
          record: {'image': bytes of a file, 'label'}.
          epoch: the epoch that the record belongs to.
          rng: makes the draws.

        Returns:
          {'image': (S, S, 3) float32 in [−1, 1], 'label'}.

        Raises:
          BrokenImageError: see `decode` and `crop`.
        """

        def draw(low: int, high: int) -> int:
            return int(rng.integers(low, high))

        is_random = rng.random() < aug_ratio(epoch, self.decay_from, self.decay_to)
        shorter = draw_shorter_side(self.size, draw) if is_random else self.size
        image = decode(record['image'], shorter if self.draft else None)
        pixels = crop(image, self.size, shorter, draw if is_random else _middle)
        if draw(0, 2):
            pixels = pixels[:, ::-1]
        return {'image': to_float(pixels), 'label': record['label']}
