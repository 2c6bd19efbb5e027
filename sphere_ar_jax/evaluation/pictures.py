"""Pictures of images: grids, samples, reconstructions. The first process alone writes files.

Images are (n, H, W, c) float in [−1, 1].
"""

import io

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from sphere_ar_jax.data.pixels import to_uint8
from sphere_ar_jax.runtime import files

matplotlib.use('Agg')

DPI = 110  # dots per inch of all pictures


def tile(images, columns, scale=3, gap=4):
    """Images in a grid, row by row: uint8 (height, width, c), each pixel `scale` wide, on grey."""
    pixels = np.asarray(to_uint8(images)).repeat(scale, 1).repeat(scale, 2)
    n, H, W, c = pixels.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, c), 96, np.uint8)
    for i, image in enumerate(pixels):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        canvas[y : y + H, x : x + W] = image
    return canvas


def save_figure(figure, path):
    """Write a figure as PNG, at once, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, bbox_inches='tight')
    plt.close(figure)
    files.write_bytes(path, buffer.getvalue())


def _save_grid(path, images, columns, row_labels, title, axis_label='', scale=3):
    """A grid of images with a label at each row."""
    grid = tile(images, columns, scale)
    size = grid.shape[1] / DPI, grid.shape[0] / DPI
    figure = plt.figure(figsize=size)
    axis = figure.add_axes(
        (0, 0, 1, 1)
    )  # a dot for each pixel; labels go outside, which the tight box takes in
    axis.imshow(
        np.broadcast_to(grid, (*grid.shape[:2], 3)), interpolation='none'
    )  # a colour map rounds greys
    height = grid.shape[0] / len(row_labels)
    axis.set_yticks([(i + 0.5) * height for i in range(len(row_labels))], row_labels)
    axis.set_xticks([])
    axis.set_ylabel(axis_label)
    axis.set_title(title)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    save_figure(figure, path)


def save_samples(path, images, labels, per_class=16):
    """A labelled grid: one row per class, the first `per_class` images drawn for it."""
    labels = np.asarray(labels)
    classes = np.unique(labels)
    per_class = min(per_class, *(np.sum(labels == c) for c in classes))
    chosen = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in classes])
    title = f'drawn by the model: the first {per_class} of each class'
    scale = max(1, 48 // images.shape[1])
    _save_grid(
        path, images[chosen], per_class, [str(c) for c in classes], title, 'class asked for', scale
    )


def save_classes(path, images, columns, titles):
    """Rows of `columns` images, a row for each title; large images as they are, small ones
    enlarged.
    """
    scale = max(1, 128 // images.shape[1])
    _save_grid(path, images, columns, titles, '', scale=scale)


def save_reconstructions(
    path, images, reconstructions, columns=16, pairs=3, title='held-out images, decoded'
):
    """Rows of images, each row above its reconstructions; full rows only, so at least `columns`
    images.
    """
    pairs = min(pairs, len(images) // columns)
    rows = [
        x[i * columns : (i + 1) * columns] for i in range(pairs) for x in (images, reconstructions)
    ]
    scale = max(1, 48 // images.shape[1])
    _save_grid(path, np.concatenate(rows), columns, ['real', 'decoded'] * pairs, title, scale=scale)
