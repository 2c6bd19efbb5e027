"""Decoding, cropping and flipping of training images on the CPU.

The crops are those of ADM (`docs/method.md`, "Data augmentation"). Every random number of a crop is
a call draw(low, high), which gives an integer in [low, high), so that the draws alone determine the
crop. `Augmentation` documents their order.

Dimensions:
  H, W   height and width of an image as it was encoded
  S      side of the square crop
  s ≥ S  the shorter side that an image is resized to
  c      channels of the model's images
"""

import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sphere_ar_jax.data.files.listing import BrokenImageError
from sphere_ar_jax.data.pixels import to_float
from sphere_ar_jax.runtime.console import first_line

# Draws an integer in [low, high), called as draw(low, high).
Draw: TypeAlias = Callable[[int, int], int]


# PIL would run Ghostscript for EPS.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF', 'GIF')
# What becomes of an image of each of PIL's modes: 'colour' is converted to RGB by PIL, 'grey16' is
# grey of 16 bits and see `_grey16`. All else is refused with the words that stand here.
_MODES = {
    '1': 'colour',
    'L': 'colour',
    'LA': 'colour',
    'P': 'colour',
    'PA': 'colour',
    'RGB': 'colour',
    'RGBA': 'colour',
    'RGBX': 'colour',
    'CMYK': 'colour',
    'YCbCr': 'colour',
    'I': 'grey16',
    'I;16': 'grey16',
    'I;16L': 'grey16',
    'I;16B': 'grey16',
    'I;16N': 'grey16',
    'F': 'float images have no agreed range: convert them to 8 or 16 bits',
    'LAB': 'CIELAB images are not read: convert them to RGB',
}
_DEPTH = 24  # the byte of a PNG that holds the bits of a sample
_BITS_PER_SAMPLE = 258  # tags of TIFF
_PHOTOMETRIC = 262
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


def _scaled_transparency(image: Image.Image, depth: int) -> None:
    """Gives the transparent colour of a PNG the scale of its pixels.

    PIL scales the pixels to 8 bits, but leaves the colour at the file's own `depth` in bits.
    """
    colour = image.info.get('transparency')
    if image.mode == 'L' and isinstance(colour, int) and depth < 8:
        image.info['transparency'] = colour * 255 // (2**depth - 1)
    if isinstance(colour, tuple) and depth == 16:
        image.info['transparency'] = tuple(value >> 8 for value in colour)


def _grey16(image: Image.Image) -> Image.Image:
    """Maps grey of 16 bits, or of 12 in TIFF, to 8 bits: round(value/257) for 16 bits.

    PIL would clip the values at 255 instead.

    Returns:
      An image of mode L, or LA where one value is transparent.

    Raises:
      BrokenImageError: values lie outside of 16 bits.
    """
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BrokenImageError('grey values beyond 16 bits have no agreed range')
    tags = getattr(image, 'tag_v2', {})
    most = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    shown = most - values if tags.get(_PHOTOMETRIC) == 0 else values  # 0: white is stored as 0
    grey = Image.fromarray(((shown * 255 + most // 2) // most).astype(np.uint8))
    if 'transparency' in image.info:
        opaque = (values != image.info['transparency']) * np.uint8(255)
        grey.putalpha(Image.fromarray(opaque))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    """Lays an image with any kind of transparency on white. Returns one of mode RGB."""
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(image.convert('RGBA'))
    return white.convert('RGB')


def _turn(image: Image.Image) -> None:
    """Turns an image upright in place, as EXIF asks for."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged EXIF data make PIL raise many kinds; the pixels are whole
        return


def _to_rgb(image: Image.Image, as_stored: bool) -> Image.Image:
    """Converts a loaded image to RGB, see `decode`."""
    kind = _MODES.get(image.mode, f"images of PIL's mode {image.mode} are not read")
    if kind == 'grey16':
        image = _grey16(image)
    elif kind != 'colour':
        raise BrokenImageError(kind)
    if image.has_transparency_data and not as_stored:
        return _on_white(image)
    return image if image.mode == 'RGB' else image.convert('RGB')


def decode(content: bytes, draft: int | None = None, as_stored: bool = False) -> Image.Image:
    """Decodes an image file to an RGB image of PIL.

    Grey, palette and CMYK become RGB as PIL converts them, and grey of 16 bits becomes
    round(value/257). Whatever is transparent is laid on white. The image is turned as its EXIF data
    ask for. The first of several frames is taken.

    Args:
      content: bytes of a file of one of FORMATS.
      draft: if not None, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that leaves
        both sides ≥ draft. This is faster for large images only, and does not give the recipe's
        pixels.
      as_stored: whether alpha is dropped and EXIF ignored, as torchvision reads image folders. The
        exact recipe of ImageNet needs it.

    Returns:
      The image, of mode RGB, loaded.

    Raises:
      BrokenImageError: the image cannot be decoded, has more than MAX_PIXELS, or is of a mode
        without an agreed range, such as float.
    """
    if not content:
        raise BrokenImageError('the file is empty')
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(*image.size)
        if draft is not None:
            image.draft('RGB', (draft, draft))
        image.load()
        if image.format == 'PNG':
            _scaled_transparency(image, content[_DEPTH])
        if not as_stored:
            _turn(image)
        return _to_rgb(image, as_stored)
    except (BrokenImageError, MemoryError):
        raise
    except UnidentifiedImageError:  # whose message has the address of an object
        known = ', '.join(FORMATS)
        raise BrokenImageError(f'it is no whole image of a format that is read: {known}') from None
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

    Raises:
      BrokenImageError: see `crop`.
    """
    return crop(image, size, size, _middle)


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Gives a crop the number of channels that the model has.

    Args:
      pixels: (S, S, 3) uint8.
      channels: 3, or 1 for grey by PIL's weights (ITU-R 601-2).

    Returns:
      (S, S, channels) uint8.
    """
    if channels == 3:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert('L'))[..., None]


def central(encoded: bytes, size: int, channels: int = 3, as_stored: bool = False) -> np.ndarray:
    """Decodes an image for an evaluation and cuts out its middle.

    Args:
      encoded: a file's content.
      size: S.
      channels: c, see `with_channels`.
      as_stored: see `decode`.

    Returns:
      (S, S, c) uint8.

    Raises:
      BrokenImageError: see `decode` and `crop`.
    """
    return with_channels(center_crop(decode(encoded, as_stored=as_stored), size), channels)


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
    3. With `flip`, 0 or 1. 1 flips left and right.

    Attributes:
      size: S.
      decay_from: the last epoch of random crops alone, see `aug_ratio`.
      decay_to: the first epoch of centre crops alone, see `aug_ratio`.
      draft: whether to decode at a reduced size, see `decode`; this is not exact.
      as_stored: whether alpha is dropped and EXIF ignored, see `decode`.
      channels: c, 3 or 1, see `with_channels`.
      flip: whether images are flipped.
    """

    size: int
    decay_from: int = 350
    decay_to: int = 375
    draft: bool = False
    as_stored: bool = False
    channels: int = 3
    flip: bool = True

    def __call__(
        self, record: dict[str, Any], epoch: int, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Decodes, crops and flips the image of a record.

        Args:
          record: {'image': bytes of a file, 'label'}.
          epoch: the epoch that the record belongs to.
          rng: makes the draws.

        Returns:
          {'image': (S, S, c) float32 in [−1, 1], 'label'}.

        Raises:
          BrokenImageError: see `decode` and `crop`.
        """

        def draw(low: int, high: int) -> int:
            return int(rng.integers(low, high))

        is_random = rng.random() < aug_ratio(epoch, self.decay_from, self.decay_to)
        shorter = draw_shorter_side(self.size, draw) if is_random else self.size
        image = decode(record['image'], shorter if self.draft else None, self.as_stored)
        pixels = crop(image, self.size, shorter, draw if is_random else _middle)
        pixels = with_channels(pixels, self.channels)
        if self.flip and draw(0, 2):
            pixels = pixels[:, ::-1]
        return {'image': to_float(pixels), 'label': record['label']}
