"""Little sources of encoded images, importable by worker processes without JAX."""

import io

import numpy as np
from PIL import Image


def encode(pixels, kind='JPEG', **options):
    """A file's bytes, of a PIL image or an array."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(index, height=40, width=56):
    """(height, width, 3) uint8: something smooth of its own for every index."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing='ij')
    return (
        127 + 120 * np.sin((y * (1 + index % 7) + x * (2 + index % 5)) / 20 + c + index)
    ).astype(np.uint8)


class Pictures:
    """n JPEGs, whose labels are their indices.

    Those in `broken` are cut off half-way, `missing` cannot be read.
    """

    num_classes = 1000

    def __init__(self, n=50, broken=(), missing=()):
        self.files = [encode(picture(i, 40 + i % 9, 56 - i % 11)) for i in range(n)]
        self.broken = broken
        self.missing = missing

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if index in self.missing:
            raise OSError('the disk is gone\nand more')
        content = self.files[index]
        return {
            'image': content[: len(content) // 2] if index in self.broken else content,
            'label': np.int32(index),
        }

    def name(self, index):
        return f'class/{index}.JPEG'


class Epochs:
    """A transform that shows what it is given: the image is (epoch, a draw), the label the
    source's.
    """

    def __call__(self, record, epoch, rng):
        return {'image': np.float32([epoch, rng.random()]), 'label': record['label']}
