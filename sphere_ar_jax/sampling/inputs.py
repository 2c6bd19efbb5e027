"""What Python callers give: images, tokens, labels, seeds, guidance scales; checked in one place.

Whatever the model cannot take is a `UserError`, which is a ValueError of one line.

Dimensions:
  n  images
  H, W, c   height, width and channels of the model's images
  L  tokens of an image
  d  latent dimension
"""

import io
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from sphere_ar_jax.data import augment, pixels
from sphere_ar_jax.runtime.console import UserError, first_line

# A picture of any size: a file, or an image of PIL.
Picture: TypeAlias = str | os.PathLike[str] | Image.Image
# Images of the model's size as an array, or pictures.
Images: TypeAlias = ArrayLike | Picture | Sequence[Picture]
# A class by its number or its name, or a text to draw; or one for each image.
Labels: TypeAlias = ArrayLike | str | Sequence[str | int]

_ROUNDING = 1e-6  # by which floats may leave [−1, 1]
_MOST_SEED = 2**32 - 2


def _is_picture(value: Any) -> bool:
    """Whether a value is a picture, not an array."""
    return isinstance(value, str | os.PathLike | Image.Image)


def _read(picture: Picture) -> Image.Image:
    """A picture as an RGB image, as training reads it: turned upright, on white, see `augment`.

    Raises:
      UserError: the file is no whole image.
      OSError: it cannot be read.
    """
    if isinstance(picture, Image.Image):
        try:
            picture.load()
        except MemoryError:
            raise
        except Exception as error:  # damaged files make PIL raise many kinds
            reason = first_line(error, 160)
            raise UserError(f'an image cannot be read ({reason}): give a whole one') from None
        content = io.BytesIO()
        lossless = 'TIFF' if picture.mode in ('CMYK', 'YCbCr', 'F', 'LAB') else 'PNG'
        try:
            picture.save(content, lossless, exif=picture.getexif())
            return augment.decode(content.getvalue())
        except (augment.BrokenImageError, OSError, ValueError) as error:
            raise UserError(
                f'an image of the mode {picture.mode} is not read ({error}): convert it first, as '
                "by image.convert('RGB')"
            ) from None
    with open(picture, 'rb') as f:
        encoded = f.read()
    try:
        return augment.decode(encoded)
    except augment.BrokenImageError as error:
        raise UserError(f'{os.fspath(picture)}: {error}') from None


def _cropped(picture: Picture, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture as uint8 (H, W, c): its shorter side resized, then the square in its middle.

    Raises:
      UserError: it cannot be read, or the model's images are not squares.
      OSError: likewise.
    """
    height, width, channels = shape
    if height != width:
        raise UserError(
            f'the model has images of {height} × {width} pixels: give arrays, since pictures are '
            'cropped to squares alone'
        )
    try:
        return augment.with_channels(augment.center_crop(_read(picture), height), channels)
    except augment.BrokenImageError as error:
        raise UserError(f'a picture cannot be cropped: {error}') from None


def images(value: Images, shape: tuple[int, int, int]) -> np.ndarray:
    """Checks images and brings them into the model's range.

    Args:
      value: an array (n, H, W, c), or (H, W, c) for one image; uint8 from 0 to 255, or floats from
        −1 to 1. Or paths of files and images of PIL, one or several, of any size: they are cropped
        as for an evaluation (`augment.center_crop`).
      shape: (H, W, c).

    Returns:
      (n, H, W, c) float32 in [−1, 1].

    Raises:
      UserError: the images have another shape, dtype or range, or a file is not an image.
      OSError: a file cannot be read.
    """
    pictures: Any = [value] if _is_picture(value) else value
    if isinstance(pictures, list | tuple) and pictures and all(map(_is_picture, pictures)):
        array = np.stack([_cropped(picture, shape) for picture in pictures])
    else:
        array = _array(value, 'images')
    if array.ndim == 3:
        array = array[None]
    if array.shape[1:] != shape or not len(array):
        raise UserError(
            f'images must be (n, {", ".join(map(str, shape))}), as this model has them, '
            f'but are {array.shape}'
        )
    if array.dtype == np.uint8:
        return pixels.to_float(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f'images must be uint8 or floats in [-1, 1], but are {array.dtype}')
    floats = array.astype(np.float32)
    _require_finite('images', floats)
    if np.abs(floats).max() > 1 + _ROUNDING:
        raise UserError(
            f'images of floats must lie in [-1, 1], but go from {floats.min():g} to '
            f'{floats.max():g}: give uint8 for 0 to 255'
        )
    return floats


def tokens(value: ArrayLike, count: int, latent_dim: int) -> np.ndarray:
    """Checks tokens.

    Args:
      value: (n, L, d), or (L, d) for one image.
      count: L.
      latent_dim: d.

    Returns:
      (n, L, d) float32.

    Raises:
      UserError: the tokens have another shape, are not numbers, or are not finite.
    """
    array = _array(value, 'tokens')
    if array.ndim == 2:
        array = array[None]
    if array.shape[1:] != (count, latent_dim) or not len(array):
        raise UserError(f'tokens must be (n, {count}, {latent_dim}), but are {array.shape}')
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f'tokens must be floats, but are {array.dtype}')
    floats = array.astype(np.float32)
    _require_finite('tokens', floats)
    return floats


def labels(value: Any, find: Callable[[str], Any] | None = None, *, is_tree: bool = False) -> Any:
    """Makes a list of one label; texts become numbers. What the model knows is not checked here.

    Args:
      value: `Labels`.
      find: gives the number of the class that has a name, or the numbers of a text to draw; None
        knows no names.
      is_tree: whether the condition's labels are a tree of several arrays, which stays as it is.

    Returns:
      The labels, as `conditions` has them.

    Raises:
      UserError: there is no class of a name.
    """

    def found(label: Any) -> Any:
        if not isinstance(label, str):
            return label
        if find is None:
            raise UserError(f'{label!r} is a name, but this model knows classes by numbers alone')
        return find(label)

    if is_tree:
        return value
    if isinstance(value, list | tuple) and value:
        return _alike([found(label) for label in value])
    if isinstance(value, str):
        return [found(value)]
    array = np.asarray(value)
    if not array.size:
        raise UserError('there are no labels: give one for each image')
    texts = array.dtype.kind in 'UT'
    # A column of a table holds its texts as objects.
    if texts or (array.dtype.kind == 'O' and all(isinstance(a, str) for a in array.flat)):
        return [found(label) for label in np.atleast_1d(array).tolist()]
    return array[None] if array.ndim == 0 else array


def _alike(labels: list[Any]) -> list[Any]:
    """The same labels. Raises UserError where some are numbers and others rows of them."""
    if len({np.shape(_array(label, 'the parts of a label')) for label in labels}) > 1:
        raise UserError('labels must be all of one kind, texts or numbers')
    return labels


def seeds(value: ArrayLike, count: int) -> int | np.ndarray:
    """Checks a seed, or one for each image.

    Args:
      value: a whole number, or (n,) of them.
      count: n.

    Returns:
      The number, or (n,) uint32.

    Raises:
      UserError: a seed is no whole number from 0 to 2³² − 2, or their number is another one.
    """
    array = _array(value, 'seed')
    whole = array.dtype.kind in 'iu' and array.shape in ((), (count,))
    if not whole or array.min() < 0 or array.max() > _MOST_SEED:
        raise UserError(
            f'seed must be a whole number from 0 to {_MOST_SEED}, or one for each of {count} '
            f'image(s), but is {_shown(array)}'
        )
    return array.astype(np.uint32) if array.ndim else int(array)


def scales(value: ArrayLike, count: int) -> float | np.ndarray:
    """Checks a guidance scale, or one for each image.

    Args:
      value: a number, or (n,) of them.
      count: n.

    Returns:
      The number, or (n,) float32.

    Raises:
      UserError: a scale is not a finite number, or there are more or fewer than images.
    """
    array = _array(value, 'guidance')
    if array.dtype.kind not in 'iuf' or array.shape not in ((), (count,)):
        raise UserError(
            f'guidance must be a number, or one for each of {count} image(s), '
            f'but is {_shown(array)}'
        )
    _require_finite('guidance', array)
    return array.astype(np.float32) if array.ndim else float(array)


def kept(value: float | str, grid: tuple[int, int]) -> int:
    """The number of an image's tokens that are kept.

    Args:
      value: a whole number from 0 to L, rows of tokens as '2rows', or a share between 0 and 1,
        which is rounded.
      grid: (rows, tokens of a row), L in all.

    Raises:
      UserError: it is none of them.
    """
    height, width = grid
    count = height * width
    rows = re.fullmatch(r'(\d{1,9})rows', value) if isinstance(value, str) else None
    if rows is not None and int(rows[1]) <= height:
        return int(rows[1]) * width
    is_number = isinstance(value, int | float | np.integer | np.floating)
    if is_number and not isinstance(value, bool):
        if isinstance(value, int | np.integer) and 0 <= value <= count:
            return int(value)
        if isinstance(value, float | np.floating) and 0 < value < 1:
            return round(float(value) * count)
    raise UserError(
        f'keep must be a whole number of tokens from 0 to {count}, up to {height}rows, or a share '
        f'between 0 and 1, but is {value!r}'
    )


def kept_pixels(count: int, grid: tuple[int, int], image_shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels in the place of an image's first tokens, (H, W) bool.

    Args:
      count: number of these tokens.
      grid: the numbers of tokens along both axes.
      image_shape: (H, W, c).
    """
    height, width = grid
    is_kept = (np.arange(height * width) < count).reshape(grid)
    patch = np.ones((image_shape[0] // height, image_shape[1] // width), bool)
    return np.kron(is_kept, patch)


def number(name: str, value: int, least: int) -> int:
    """Checks a whole number that may not be below `least`.

    Raises:
      UserError: it is another one.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise UserError(f'{name} must be a whole number of at least {least}, but is {value!r}')
    return int(value)


def _array(value: Any, name: str) -> np.ndarray:
    """A value as an array. Raises UserError where its rows differ in shape."""
    try:
        return np.asarray(value)
    except ValueError:
        raise UserError(f'{name} must all have the same shape') from None


def _shown(array: np.ndarray) -> str:
    """A value for messages: itself, or the dtype and shape of an array."""
    return f'{array.dtype} {array.shape}' if array.ndim else repr(array.item())


def _require_finite(name: str, array: np.ndarray) -> None:
    """Raises UserError where a number is not finite."""
    wrong = int(np.sum(~np.isfinite(array)))
    if wrong:
        raise UserError(f'{name} must be finite, but {wrong} of {array.size} numbers are not')
