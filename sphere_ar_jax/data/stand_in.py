"""A stand-in for ImageNet: a small ILSVRC2012_img_train.tar of the same make, drawn at random.

  python -m sphere_ar_jax.data.stand_in DIR [--synsets=5 --images=12 --seed=0 --broken=2]

It writes a tar of tars, one for each synset, of JPEG files of 60 to 600 pixels a side. The polygon
and the colours of an image tell its class, so that there is something to learn; the rest is random.
As in ImageNet some files are odd: grey, CMYK or progressive JPEG, PNG in a file named .JPEG, JPEG
that an EXIF tag rotates. Files that are cut off or empty (`broken`) do not occur in ImageNet. The
same seed gives the same bytes with the same Pillow. TAR.json lists the odd and the broken files.

Dimensions:
  h, w  height and width of an image
  k     class, its place among the given synsets
"""

import colorsys
import io
import json
import os
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from sphere_ar_jax.data import imagenet
from sphere_ar_jax.runtime import console
from sphere_ar_jax.runtime.console import UserError

ODD = ('grey', 'cmyk', 'progressive', 'png', 'rotated')
BROKEN = ('truncated', 'empty')
_ROTATED = 6  # EXIF: turn by 90° clockwise to show
_ORIENTATION = 0x0112  # the EXIF tag that says so
_TIME = 1_339_000_000  # mtime of every file, in 2012; any time would do, if it is always the same


def _colour(hue: float, value: float) -> tuple[int, int, int]:
    """Gives the RGB colour of a hue, 0 to 255 each."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, 0.8, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw(rng: np.random.Generator, k: int) -> Image.Image:
    """Draws a random RGB image of class k.

    It is a smooth background with a polygon; the class decides the hues and the number of corners.
    """
    w, h = (round(60 * 10**x) for x in rng.uniform(0, 1, 2).tolist())
    hue = k * 0.618034  # by the golden ratio, so that neighbours differ
    noise = rng.uniform(-70, 70, (4, 5, 3)) + _colour(hue, 0.55)
    small = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    image = small.resize((w, h), Image.Resampling.BICUBIC)
    fill = _colour(hue + 0.4, rng.uniform(0.75, 1))
    radius = rng.uniform(0.2, 0.35) * min(w, h)
    x = rng.uniform(radius, w - radius)
    y = rng.uniform(radius, h - radius)
    ImageDraw.Draw(image).regular_polygon((x, y, radius), 3 + k % 5, fill=fill)
    return image


def _encode(image: Image.Image, kind: str | None) -> bytes:
    """Encodes an RGB image as a file of a kind: one of ODD or BROKEN, or None for a plain JPEG."""
    if kind == 'empty':
        return b''
    options: dict[str, Any] = {'format': 'JPEG', 'quality': 90}
    if kind == 'png':
        options = {'format': 'PNG'}
    elif kind == 'grey':
        image = image.convert('L')
    elif kind == 'cmyk':
        image = image.convert('CMYK')
    elif kind == 'progressive':
        options['progressive'] = True
    elif kind == 'rotated':
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[_ORIENTATION] = _ROTATED
        options['exif'] = exif
    file = io.BytesIO()
    image.save(file, **options)
    content = file.getvalue()
    if kind == 'truncated':
        return content[: len(content) * 6 // 10]
    return content


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mtime = _TIME
    archive.addfile(member, io.BytesIO(content))


def write_tar(
    path: str | os.PathLike[str],
    synsets: Sequence[str],
    images: int,
    seed: int = 0,
    broken: int = 2,
) -> dict[str, str]:
    """Writes a tar of tars to `path`, and what is odd in it to `path`.json.

    Args:
      path: the tar to write.
      synsets: names of the classes, in the order of their tars.
      images: number of images in each class.
      seed: decides everything that is drawn.
      broken: how many files cannot be decoded, 'truncated' and 'empty' in turn. The other files
        include one of each kind in `ODD`, as far as there are enough files.

    Returns:
      {'n01440764/n01440764_3.JPEG': 'grey', …}, the odd and the broken ones, as in the JSON.
    """
    rng = np.random.default_rng(seed)
    kinds = [BROKEN[i % len(BROKEN)] for i in range(broken)] + list(ODD)
    places = rng.permutation(len(synsets) * images).tolist()
    kind_at = dict(zip(places, kinds, strict=False))
    odd = {}
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as outer:
        for k, synset in enumerate(synsets):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode='w', format=tarfile.USTAR_FORMAT) as inner:
                numbers = rng.permutation(20 * images)[:images]  # with gaps, in no order
                for i, number in enumerate(numbers):
                    name = f'{synset}_{number}.JPEG'
                    kind = kind_at.get(k * images + i)
                    _add(inner, name, _encode(_draw(rng, k), kind))
                    if kind:
                        odd[f'{synset}/{name}'] = kind
            _add(outer, f'{synset}.tar', buffer.getvalue())
    with open(f'{path}.json', 'w') as f:
        f.write(json.dumps(odd, indent=2) + '\n')
    return odd


_FLAGS = flags.FlagValues()
_SYNSETS = flags.DEFINE_integer('synsets', 5, 'Number of classes.', 1, 1000, flag_values=_FLAGS)
_IMAGES = flags.DEFINE_integer('images', 12, 'Number in each class.', 1, flag_values=_FLAGS)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of all that is drawn.', 0, flag_values=_FLAGS)
_BROKEN = flags.DEFINE_integer(
    'broken', 2, 'Number of files that cannot be decoded.', 0, flag_values=_FLAGS
)


def main(argv: list[str]) -> None:
    """Writes a stand-in, as a command line says.

    Args:
      argv: the command line, with the program's name first.

    Raises:
      UserError: a flag is wrong; the message is one line.
    """
    (directory,) = console.parse(argv, _FLAGS, __doc__, 'DIR')
    synsets = _SYNSETS.value
    total = synsets * _IMAGES.value
    if _BROKEN.value > total:
        raise UserError(f'--broken must lie between 0 and {total}, the number of images')
    names = [synset for synset, _ in imagenet.classes()]
    chosen = [names[i * len(names) // synsets] for i in range(synsets)]
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, 'ILSVRC2012_img_train.tar')
    write_tar(path, chosen, _IMAGES.value, _SEED.value, _BROKEN.value)
    size = os.path.getsize(path)
    print(f'{path}: {synsets} classes of {_IMAGES.value} images, {size:,} bytes')


if __name__ == '__main__':
    console.run(main)
