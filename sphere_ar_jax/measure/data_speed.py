"""How fast training images are read: decoding and augmentation on one core, then the pipeline.

    python -m sphere_ar_jax.measure.data_speed --images=64

The program encodes synthetic JPEGs of ImageNet's usual sizes (500×375, 375×500, 500×333, …): noise
with the falling spectrum of a natural image, about 110 KB each. Every way takes its turn on all of
them, --repeats times, and the median round counts. Rates per core are per second of processor time,
so that other work on the machine hardly matters. Rates by the clock need a machine of their own.

`public` is the public recipe, by Pillow alone. `ours` has its pixels to the bit. `draft` decodes
large JPEGs at a fraction of their size, so that its pixels differ. The program prints its distance
from the exact pixels, also for images of three times the sides, where alone it does anything.

How many cores an accelerator needs: cores = (images of a step on it / seconds of the step) /
(images per second and core).
"""

import functools
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import flags
from PIL import Image

from sphere_ar_jax.data import augment
from sphere_ar_jax.data import batches as data_batches
from sphere_ar_jax.runtime import console

# {'image': the file as bytes, 'label': int32}
Record: TypeAlias = dict[str, Any]
# (record, epoch, random numbers) → {'image': float32 pixels, 'label': int32}
Way: TypeAlias = Callable[[Record, int, np.random.Generator], dict[str, Any]]

# These flags are not absl's global ones, because worker processes import this module too.
_FLAGS = flags.FlagValues()
_IMAGES = flags.DEFINE_integer('images', 64, 'Images of a round.', 1, flag_values=_FLAGS)
_REPEATS = flags.DEFINE_integer(
    'repeats', 7, 'Rounds of each way, taken in turns.', 1, flag_values=_FLAGS
)
_SIZE = flags.DEFINE_integer('size', 256, 'Side of the crops.', 1, flag_values=_FLAGS)
_WORKERS = flags.DEFINE_list(
    'workers', ['1', '2'], 'Numbers of worker processes to try.', flag_values=_FLAGS
)

# (width, height)
_SIDES = ((500, 375), (500, 375), (375, 500), (500, 333), (333, 500), (500, 400))


def photograph(number: int, scale: int = 1) -> Record:
    """A record with a JPEG of quality 95 and 4:2:0 chroma.

    It shows octaves of noise of amplitude ∝ n^−0.3, a quarter of it coloured.

    Args:
      number: chooses the sides and the noise.
      scale: multiplies the sides.
    """
    rng = np.random.default_rng(number)
    width, height = (scale * side for side in _SIDES[number % len(_SIDES)])
    total = np.zeros((height, width, 3), np.float32)
    n = 2
    while n <= 2 * max(width, height) // scale:
        grid = (min(height, n), min(width, n))
        layer = rng.normal(size=(*grid, 1)) + 0.25 * rng.normal(size=(*grid, 3))
        for c in range(3):
            plane = Image.fromarray(layer[..., c].astype(np.float32))
            plane = plane.resize((width, height), Image.Resampling.BICUBIC)
            total[..., c] += np.asarray(plane) / n**0.3
        n *= 2
    pixels = (120 + 55 * total / total.std()).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', quality=95)
    return {'image': file.getvalue(), 'label': np.int32(0)}


def public(size: int, record: Record, epoch: int, rng: np.random.Generator) -> dict[str, Any]:
    """The steps of the public recipe (`docs/method.md`, "Data augmentation").

    The whole image is resized, as a copy in RGB, and cut as an array; then come the floats. The
    random numbers are drawn as `augment.Augmentation` does, so that the pixels can be compared.

    Args:
      size: side of the crop.
      record: see `photograph`.
      epoch: decides how likely a random crop is.
      rng: random numbers of this image.

    Returns:
      {'image': (3, size, size) float32 in [−1, 1], 'label'}.
    """
    ratio = augment.aug_ratio(epoch)
    is_random = rng.random() < ratio
    shorter = int(rng.integers(size, math.ceil(size / 0.8) + 1)) if is_random else size
    image = Image.open(io.BytesIO(record['image'])).convert('RGB')
    while min(image.size) >= 2 * shorter:
        half = (image.size[0] // 2, image.size[1] // 2)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = shorter / min(image.size)
    resized = (round(image.size[0] * scale), round(image.size[1] * scale))
    pixels = np.array(image.resize(resized, resample=Image.Resampling.BICUBIC))
    if is_random:
        y, x = (int(rng.integers(0, side - size + 1)) for side in pixels.shape[:2])
    else:
        y, x = ((side - size) // 2 for side in pixels.shape[:2])
    pixels = pixels[y : y + size, x : x + size]
    if rng.integers(0, 2):
        pixels = pixels[:, ::-1]
    pixels = pixels.transpose(2, 0, 1).astype(np.float32)
    return {'image': (pixels / 255.0 - 0.5) * 2.0, 'label': record['label']}


def _read(way: Way, records: Sequence[Record], epoch: int) -> Iterator[np.ndarray]:
    """What a way makes of each image, one after the other."""
    for number, record in enumerate(records):
        yield way(record, epoch, np.random.default_rng(number))['image']


def compare(
    records: Sequence[Record], ways: Mapping[str, Way], repeats: int
) -> dict[str, np.floating]:
    """Measures ways to read images, which take turns.

    They run at epoch 360, where 6 of 10 crops are random.

    Args:
      records: the images of a round.
      ways: {name: way}.
      repeats: rounds.

    Returns:
      {name: median images per second and core}.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            for _ in _read(way, records, 360):
                pass
            rates[name].append(len(records) / (time.process_time() - start))
    return {name: np.median(values) for name, values in rates.items()}


def difference(
    records: Sequence[Record], one: Way, other: Way
) -> tuple[np.floating, np.floating, float]:
    """How far the pixels of two ways are apart, in 8-bit levels, on images of equal crops.

    Args:
      records: the images.
      one: a way.
      other: another way.

    Returns:
      the mean and the largest absolute difference, and the PSNR in dB (inf for equal pixels).
    """
    pairs = zip(_read(one, records, 399), _read(other, records, 399), strict=True)
    levels = np.abs([(a - b) * 127.5 for a, b in pairs]).astype(np.float64)
    square = np.mean(levels**2)
    psnr = 10 * math.log10(255**2 / square) if square else math.inf
    return levels.mean(), levels.max(), psnr


def _clocks() -> np.ndarray:
    """Seconds by the clock, and of this process's processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def pipeline(
    records: list[Record], size: int, images: int, repeats: int, threads: int, workers: int
) -> np.ndarray:
    """Images per second of `batches.batches`, after a first batch of 64 that starts it all.

    Args:
      records: the images, which are read again and again.
      size: side of the crops.
      images: of a round, at least one batch of 64.
      repeats: rounds.
      threads: of each process that reads.
      workers: processes that read, 0 for none but this one.

    Returns:
      (2,) medians over the rounds: by the clock, and per second of this process's processor time,
        which is that of its threads without its workers.
    """
    rates = []
    count = max(1, images // 64)
    reading = data_batches.batches(
        1000 * records,
        batch_size=64,
        seed=0,
        transform=augment.Augmentation(size),
        threads=threads,
        workers=workers,
    )
    with reading as batches:
        next(batches)
        for _ in range(repeats):
            start = _clocks()
            for _ in range(count):
                next(batches)
            rates.append(64 * count / (_clocks() - start))
    return np.median(rates, axis=0)


def main(argv: list[str]) -> None:
    """Prints the table.

    Args:
      argv: the command line, with the program's name first.

    Raises:
      UserError: a flag is wrong; the message is one line.
    """
    console.parse(argv, _FLAGS, __doc__)
    wrong = [text for text in _WORKERS.value if not text.isdecimal()]
    if wrong:
        raise console.UserError(f'--workers: {wrong[0]} is no number of processes')
    usual = [photograph(i) for i in range(_IMAGES.value)]
    large = [photograph(i, 3) for i in range(max(1, _IMAGES.value // 8))]
    size = _SIZE.value
    repeats = _REPEATS.value
    exact = augment.Augmentation(size)
    draft = augment.Augmentation(size, draft=True)
    by_pillow = functools.partial(public, size)
    ways: dict[str, Way] = {'public': by_pillow, 'ours': exact, 'draft': draft}

    def channels_last(record: Record, epoch: int, rng: np.random.Generator) -> dict[str, Any]:
        return {'image': by_pillow(record, epoch, rng)['image'].transpose(1, 2, 0)}

    pairs: tuple[tuple[str, Way, Way], ...] = (
        ('ours − public:', exact, channels_last),
        ('draft − ours: ', draft, exact),
    )
    for name, some in (('usual', usual), ('large', large)):
        kilobytes = np.mean([len(record['image']) for record in some]) / 1000
        print(f'{name} images: {len(some)} of {kilobytes:.0f} KB', flush=True)
        rates = compare(some, ways, repeats)
        for way, rate in rates.items():
            ratio = rate / rates['public']
            print(f'  {way:8}{rate:8.0f} images/s per core   {ratio:.2f}×', flush=True)
        for pair, one, other in pairs:
            mean, largest, psnr = difference(some, one, other)
            print(f'  {pair} mean {mean:.4f}, largest {largest:.4f}, PSNR {psnr:.1f} dB')
    print(f'pipeline on {os.cpu_count()} cores, batches of 64:')
    for threads, workers in [(1, 0), (2, 0), (4, 0)] + [(1, int(w)) for w in _WORKERS.value]:
        rate, core_rate = pipeline(usual, size, 4 * _IMAGES.value, repeats, threads, workers)
        per_core = '' if workers else f', {core_rate:.0f} per core'
        text = f'{rate:.0f} images/s by the clock{per_core}'
        print(f'  threads {threads}, workers {workers}: {text}', flush=True)


if __name__ == '__main__':
    console.run(main)
