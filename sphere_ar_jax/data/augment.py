"""Decoding, cropping and flipping of training images, on the CPU (the crops are those of ADM).

Every random draw is a call draw(low, high) → integer in [low, high), so that a crop is a function
of its draws. `Augmentation` documents their order.

Dimensions:
  H, W  an image as it was encoded      S  side of the square crop      s ≥ S  the shorter side that
  it is resized to
"""

import dataclasses
import io
import math

import numpy as np
from PIL import Image

from sphere_ar_jax.data.pixels import to_float
from sphere_ar_jax.runtime.console import first_line


class BrokenImageError(ValueError):
    """An image cannot be decoded: truncated, empty, of no known format, or of absurd size."""


FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF')  # PIL would run Ghostscript for EPS
MAX_PIXELS = (
    2**30 // 12
)  # 256 MiB at 4 bytes, as PIL holds RGB; PIL itself only warns of up to twice that
SMALLEST_SHARE = 0.8  # of the shorter side, that a random crop keeps


def _check_size(width, height):
    if width * height > MAX_PIXELS:
        raise BrokenImageError(
            f'{width} × {height} pixels are more than the {MAX_PIXELS} that are read'
        )


def decode(content, draft=None):
    """An encoded image as an RGB image of PIL.

    Grey, palette, CMYK and alpha become RGB as PIL converts them (alpha is dropped, not blended),
    the rotation that EXIF may ask for is ignored, and of several frames the first counts: all as
    torchvision reads image folders.

    Args:
      content: bytes of a file of one of FORMATS. draft: if not None, a JPEG is decoded at 1/2, 1/4
        or 1/8 of its size, the smallest that leaves both sides ≥ draft. Faster for large images
        only, and not the recipe's pixels.
    Returns:
      PIL.Image.Image, mode RGB, loaded.
    Raises:
      BrokenImageError.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(*image.size)
        if draft is not None:
            image.draft('RGB', (draft, draft))
        image.load()
        return image if image.mode == 'RGB' else image.convert('RGB')
    except (BrokenImageError, MemoryError):
        raise
    except Exception as error:  # damaged files make PIL raise many kinds
        raise BrokenImageError(first_line(error, 160)) from None


def _resized_crop(image, width, height, y, x, size):
    """Rows y to y + S, columns x to x + S of image.resize((width, height), BICUBIC), to the bit.

    PIL resizes along x first, rounds to 8 bits, then along y. Neither step here computes what is
    cut off after it (about a sixth less time); both see the coordinates of the whole image, and so
    have the same weights.
    """
    bicubic, step = Image.Resampling.BICUBIC, image.height / height
    if image.height - height > max(
        0, 2 * (image.width - width)
    ):  # y first, from Pillow 13 on (12.2: if > 100 times)
        return image.resize((width, height), bicubic).crop((x, y, x + size, y + size))
    reach = 2 * max(step, 1) + 2  # pixels, on either side: the cubic's support, and rounding
    top, bottom = (
        max(0, math.floor(y * step - reach)),
        min(image.height, math.ceil((y + size) * step + reach)),
    )
    strip = image.crop((0, top, image.width, bottom)).resize((width, bottom - top), bicubic)
    columns = strip.crop(
        (x, -top, x + size, image.height - top)
    )  # back at its place; the missing rows are not needed
    return columns.resize((size, height), bicubic).crop((0, y, size, y + size))


def crop(image, size, shorter, draw):
    """ADM's crop: the shorter side resized to s (halved by BOX while ≥ 2·s, then bicubic), then S ×
    S at a drawn y, x.

    PIL RGB image → (S, S, 3) uint8. Raises BrokenImageError for an image so long and thin that it
    would be resized beyond MAX_PIXELS.
    """
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_size(width, height)
    y = draw(0, height - size + 1)
    x = draw(0, width - size + 1)
    return np.asarray(_resized_crop(image, width, height, y, x, size))


def _middle(low, high):
    """What a draw would be for the middle of the image."""
    return (low + high - 1) // 2


def center_crop(image, size):
    """`crop` of the middle, the shorter side resized to S."""
    return crop(image, size, size, _middle)


def draw_shorter_side(size, draw):
    """s of a random crop, uniform from S to ⌈S/0.8⌉."""
    return draw(size, math.ceil(size / SMALLEST_SHARE) + 1)


def aug_ratio(epoch, decay_from=350, decay_to=375):
    """The probability of a random crop: 1 up to epoch decay_from, falling linearly to 0 at epoch
    decay_to.

    epoch counts from 0. Equal ends are a step: 0 from that epoch on.
    """
    if epoch >= decay_to:
        return 0.0
    return 1.0 if epoch <= decay_from else 1 - (epoch - decay_from) / (decay_to - decay_from)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The transform of `batches.batches` for training on encoded images.

    Draws, in this order, all from the rng of one image: a float in [0, 1), below `aug_ratio` of the
    epoch for a random crop; for one of those s, y, x; 0 or 1, where 1 flips left and right.

    Attributes:
      size: S. decay_from, decay_to: epochs, see `aug_ratio`. draft: see `decode`; not exact.
    """

    size: int
    decay_from: int = 350
    decay_to: int = 375
    draft: bool = False

    def __call__(self, record, epoch, rng):
        """{'image': bytes of a file, 'label'} → {'image': (S, S, 3) float32 in [−1, 1], 'label'}.

        Raises BrokenImageError.
        """
        draw = lambda low, high: int(rng.integers(low, high))
        is_random = rng.random() < aug_ratio(epoch, self.decay_from, self.decay_to)
        shorter = draw_shorter_side(self.size, draw) if is_random else self.size
        image = decode(record['image'], shorter if self.draft else None)
        pixels = crop(image, self.size, shorter, draw if is_random else _middle)
        if draw(0, 2):
            pixels = pixels[:, ::-1]
        return {'image': to_float(pixels), 'label': record['label']}
