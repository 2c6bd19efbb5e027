"""How fast training images are read: decoding and augmentation on one core, then the whole
pipeline.

    python -m sphere_ar_jax.measure.data_speed --images=64

Synthetic JPEGs of ImageNet's usual sizes (500×375, 375×500, 500×333, …: about 110 KB, noise with a
natural image's falling spectrum) are encoded, and every way takes its turn on all of them,
--repeats times: the median round counts. Rates per core are per second of processor time: others on
the machine hardly matter. Rates by the clock need a machine of their own.

Ways: `public` is the public recipe's, by Pillow alone; `ours` has its pixels to the bit; `draft`
decodes large JPEGs at a fraction of their size and has not: its distance from the exact pixels is
printed, also for images of three times the sides, where alone it does anything.

What an accelerator needs: cores = (images of a step on it / seconds of the step) / (images per
second and core).
"""

import functools
import io
import math
import os
import sys
import time

import numpy as np
from absl import flags
from PIL import Image

from sphere_ar_jax.data import augment
from sphere_ar_jax.data import batches as data_batches

_FLAGS = flags.FlagValues()  # of its own: worker processes read this module too
_IMAGES = flags.DEFINE_integer('images', 64, 'Images of a round.', 1, flag_values=_FLAGS)
_REPEATS = flags.DEFINE_integer(
    'repeats', 7, 'Rounds of each way, taken in turns.', 1, flag_values=_FLAGS
)
_SIZE = flags.DEFINE_integer('size', 256, 'Side of the crops.', 1, flag_values=_FLAGS)
_WORKERS = flags.DEFINE_list(
    'workers', ['1', '2'], 'Numbers of worker processes to try.', flag_values=_FLAGS
)

_SIDES = ((500, 375), (500, 375), (375, 500), (500, 333), (333, 500), (500, 400))  # width, height


def photograph(number, scale=1):
    """A record with a JPEG of quality 95, 4:2:0: octaves of noise, amplitude ∝ n^−0.3, a quarter of
    it coloured.
    """
    rng, (width, height) = (
        np.random.default_rng(number),
        (scale * side for side in _SIDES[number % len(_SIDES)]),
    )
    total, n = np.zeros((height, width, 3), np.float32), 2
    while n <= 2 * max(width, height) // scale:
        grid = (min(height, n), min(width, n))
        layer = rng.normal(size=(*grid, 1)) + 0.25 * rng.normal(size=(*grid, 3))
        for c in range(3):
            plane = Image.fromarray(layer[..., c].astype(np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            total[..., c] += np.asarray(plane) / n**0.3
        n *= 2
    pixels = (120 + 55 * total / total.std()).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', quality=95)
    return {'image': file.getvalue(), 'label': np.int32(0)}


def public(size, record, epoch, rng):
    """The public recipe's steps: all of the image is resized, as a copy in RGB, and cut as an
    array; then the floats.

    It draws as `augment.Augmentation` does, so that the pixels can be compared.
    """
    ratio = augment.aug_ratio(epoch)
    is_random = rng.random() < ratio
    shorter = int(rng.integers(size, math.ceil(size / 0.8) + 1)) if is_random else size
    image = Image.open(io.BytesIO(record['image'])).convert('RGB')
    while min(image.size) >= 2 * shorter:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = shorter / min(image.size)
    pixels = np.array(
        image.resize(
            tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC
        )
    )
    y, x = ((side - size) // 2 for side in pixels.shape[:2])
    if is_random:
        y, x = (int(rng.integers(0, side - size + 1)) for side in pixels.shape[:2])
    pixels = pixels[y : y + size, x : x + size]
    if rng.integers(0, 2):
        pixels = pixels[:, ::-1]
    pixels = pixels.transpose(2, 0, 1).astype(np.float32)
    return {'image': (pixels / 255.0 - 0.5) * 2.0, 'label': record['label']}


def _read(way, records, epoch):
    """What a way makes of each image, one after the other."""
    for number, record in enumerate(records):
        yield way(record, epoch, np.random.default_rng(number))['image']


def compare(records, ways, repeats):
    """{way: median images per second and core}, the ways taking turns; at epoch 360, where 6 of 10
    crops are random.
    """
    rates = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            for _ in _read(way, records, 360):
                pass
            rates[name].append(len(records) / (time.process_time() - start))
    return {name: np.median(values) for name, values in rates.items()}


def difference(records, one, other):
    """(mean, largest absolute difference, PSNR in dB) in 8-bit levels between two ways, on images
    of equal crops.
    """
    pairs = zip(_read(one, records, 399), _read(other, records, 399), strict=True)
    levels = np.abs([(a - b) * 127.5 for a, b in pairs]).astype(np.float64)
    square = np.mean(levels**2)
    return levels.mean(), levels.max(), 10 * math.log10(255**2 / square) if square else math.inf


def pipeline(records, size, images, repeats, threads, workers):
    """Images per second of `batches.batches`, after a first batch of 64 that starts it all: medians
    over the repeats.

    Returns (by the clock, per second of this process's processor time: of its threads, without its
    workers).
    """
    rates, count = [], max(1, images // 64)
    options = dict(
        batch_size=64,
        seed=0,
        transform=augment.Augmentation(size),
        threads=threads,
        workers=workers,
    )
    with data_batches.batches(1000 * records, **options) as batches:
        next(batches)
        for _ in range(repeats):
            start = np.array([time.perf_counter(), time.process_time()])
            for _ in range(count):
                next(batches)
            rates.append(
                64 * count / (np.array([time.perf_counter(), time.process_time()]) - start)
            )
    return np.median(rates, axis=0)


def main():
    """Prints the table."""
    usual = [photograph(i) for i in range(_IMAGES.value)]
    large = [photograph(i, 3) for i in range(max(1, _IMAGES.value // 8))]
    size, repeats = _SIZE.value, _REPEATS.value
    exact, draft = augment.Augmentation(size), augment.Augmentation(size, draft=True)
    ways = {'public': functools.partial(public, size), 'ours': exact, 'draft': draft}
    channels_last = lambda *args: {'image': ways['public'](*args)['image'].transpose(1, 2, 0)}
    for name, some in (('usual', usual), ('large', large)):
        mean = np.mean([len(record['image']) for record in some])
        print(f'{name} images: {len(some)} of {mean / 1000:.0f} KB', flush=True)
        rates = compare(some, ways, repeats)
        for way, rate in rates.items():
            print(
                f'  {way:8}{rate:8.0f} images/s per core   {rate / rates["public"]:.2f}×',
                flush=True,
            )
        for pair, way, other in (
            ('ours − public:', exact, channels_last),
            ('draft − ours: ', draft, exact),
        ):
            mean, largest, psnr = difference(some, way, other)
            print(f'  {pair} mean {mean:.4f}, largest {largest:.4f}, PSNR {psnr:.1f} dB')
    print(f'pipeline on {os.cpu_count()} cores, batches of 64:')
    for threads, workers in [(1, 0), (2, 0), (4, 0)] + [(1, int(w)) for w in _WORKERS.value]:
        rate, core_rate = pipeline(usual, size, 4 * _IMAGES.value, repeats, threads, workers)
        per_core = '' if workers else f', {core_rate:.0f} per core'
        print(
            f'  threads {threads}, workers {workers}: {rate:.0f} images/s by the clock{per_core}',
            flush=True,
        )


if __name__ == '__main__':
    try:
        _FLAGS(sys.argv)
    except flags.Error as error:
        sys.exit(str(error))
    main()
