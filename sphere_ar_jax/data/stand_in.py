"""A stand-in for ImageNet: a small ILSVRC2012_img_train.tar of the same make, drawn at random.

  python -m sphere_ar_jax.data.stand_in DIR [--synsets 5 --images 12 --seed 0 --broken 2]

A tar of tars, one for each synset, of JPEG files of 60 to 600 pixels a side. The polygon and the
colours of an image tell its class, so that there is something to learn; the rest is random. As in
ImageNet some files are odd: grey, CMYK or progressive JPEG, PNG in a file named .JPEG, JPEG that an
EXIF tag rotates; `broken` ones are cut off or empty, which ImageNet's are not. The same seed gives
the same bytes (with the same Pillow). What is odd stands in TAR.json.

Dimensions:
  h, w  height and width of an image      k  class, its place among the given synsets
"""

import argparse
import colorsys
import io
import json
import os
import sys
import tarfile

import numpy as np
from PIL import Image, ImageDraw

from sphere_ar_jax.data import imagenet

ODD = ('grey', 'cmyk', 'progressive', 'png', 'rotated')
BROKEN = ('truncated', 'empty')
_ROTATED = 6  # EXIF: turn by 90° clockwise to show
_ORIENTATION = 0x0112  # the EXIF tag that says so


def _draw(rng, k):
    """A random image of class k, RGB: a smooth background and a polygon, with the class's hues and
    corners.
    """
    w, h = (round(60 * 10**x) for x in rng.uniform(0, 1, 2).tolist())
    hue = k * 0.618034  # golden ratio: neighbours differ
    colour = lambda offset, value: [
        round(255 * c) for c in colorsys.hsv_to_rgb((hue + offset) % 1, 0.8, value)
    ]
    noise = rng.uniform(-70, 70, (4, 5, 3)) + colour(0, 0.55)
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize(
        (w, h), Image.Resampling.BICUBIC
    )
    pen, fill = ImageDraw.Draw(image), tuple(colour(0.4, rng.uniform(0.75, 1)))
    r = rng.uniform(0.2, 0.35) * min(w, h)
    x, y = rng.uniform(r, w - r), rng.uniform(r, h - r)
    pen.regular_polygon((x, y, r), 3 + k % 5, fill=fill)
    return image


def _encode(image, kind):
    """The file of an image, bytes: JPEG, or as odd as `kind` says."""
    if kind == 'empty':
        return b''
    options = {'format': 'PNG'} if kind == 'png' else {'format': 'JPEG', 'quality': 90}
    if kind in ('grey', 'cmyk'):
        image = image.convert({'grey': 'L', 'cmyk': 'CMYK'}[kind])
    elif kind == 'progressive':
        options['progressive'] = True
    elif kind == 'rotated':
        image, options['exif'] = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        options['exif'][_ORIENTATION] = _ROTATED
    file = io.BytesIO()
    image.save(file, **options)
    content = file.getvalue()
    return content[: len(content) * 6 // 10] if kind == 'truncated' else content


def _add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(content), 1_339_000_000  # 2012; any, but the same every time
    archive.addfile(member, io.BytesIO(content))


def write_tar(path, synsets, images, seed=0, broken=2):
    """Writes a tar of tars to `path`, and what is odd in it to `path`.json.

    Args:
      synsets: names of the classes, the order of their tars. images: number in each. seed: of all
        that is drawn.
      broken: how many files cannot be decoded, 'truncated' and 'empty' in turn. Among the others is
        one of each kind in `ODD`, as far as there are enough.
    Returns:
      {'n01440764/n01440764_3.JPEG': 'grey', …}, the odd ones, which the JSON holds too.
    """
    rng = np.random.default_rng(seed)
    kinds = [BROKEN[i % len(BROKEN)] for i in range(broken)] + list(ODD)
    kinds = dict(zip(rng.permutation(len(synsets) * images).tolist(), kinds, strict=False))
    odd = {}
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as outer:
        for k, synset in enumerate(synsets):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode='w', format=tarfile.USTAR_FORMAT) as inner:
                for i, number in enumerate(
                    rng.permutation(20 * images)[:images]
                ):  # numbers with gaps, in no order
                    name, kind = f'{synset}_{number}.JPEG', kinds.get(k * images + i)
                    _add(inner, name, _encode(_draw(rng, k), kind))
                    if kind:
                        odd[f'{synset}/{name}'] = kind
            _add(outer, f'{synset}.tar', buffer.getvalue())
    with open(f'{path}.json', 'w') as f:
        f.write(json.dumps(odd, indent=2) + '\n')
    return odd


def main(arguments):
    """Write a stand-in for the words of a command line."""
    parser = argparse.ArgumentParser(
        prog='python -m sphere_ar_jax.data.stand_in', description='A small ImageNet to try on.'
    )
    parser.add_argument('directory')
    parser.add_argument('--synsets', type=int, default=5, help='number of classes, 1 to 1000')
    parser.add_argument('--images', type=int, default=12, help='number in each class')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--broken', type=int, default=2, help='number of files that cannot be decoded'
    )
    options = parser.parse_args(arguments)
    if not (1 <= options.synsets <= 1000 and options.images >= 1 and options.seed >= 0):
        parser.error(
            '--synsets must lie between 1 and 1000, --images be at least 1, --seed not negative'
        )
    if not 0 <= options.broken <= options.synsets * options.images:
        parser.error(
            f'--broken must lie between 0 and {options.synsets * options.images}, the number of images'
        )
    names = [synset for synset, _ in imagenet.classes()]
    chosen = [names[i * len(names) // options.synsets] for i in range(options.synsets)]
    os.makedirs(options.directory, exist_ok=True)
    path = os.path.join(options.directory, 'ILSVRC2012_img_train.tar')
    write_tar(path, chosen, options.images, options.seed, options.broken)
    print(
        f'{path}: {options.synsets} classes of {options.images} images, {os.path.getsize(path):,} bytes'
    )


if __name__ == '__main__':
    main(sys.argv[1:])
