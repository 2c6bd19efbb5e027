"""Pictures of images: grids, samples, reconstructions. The first process alone writes files.

Images are (n, H, W, c) float in [−1, 1].
"""

import io
import os
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from PIL import Image

from sphere_ar_jax.data.pixels import to_uint8
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110  # dots per inch of all pictures


def tile(images: np.ndarray, columns: int, scale: int = 3, gap: int = 4) -> np.ndarray:
    """Lays images out in a grid, row by row, on grey.

    Args:
      images: (n, H, W, c).
      columns: images in a row.
      scale: pixels of the grid along each side of an image's pixel.
      gap: pixels between images and around them.

    Returns:
      (height, width, c) uint8.
    """
    pixels = np.asarray(to_uint8(images)).repeat(scale, 1).repeat(scale, 2)
    n, H, W, c = pixels.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, c), 96, np.uint8)
    for i, image in enumerate(pixels):
        y = gap + i // columns * (H + gap)
        x = gap + i % columns * (W + gap)
        canvas[y : y + H, x : x + W] = image
    return canvas


def read_all(directory: str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads those of some pictures that a directory has.

    Args:
      directory: where DIRECTORY/NAME.png are.
      names: the names.

    Returns:
      {name: uint8 (height, width, 3)}.
    """
    found = {}
    for name in names:
        path = epath.Path(directory, f'{name}.png')
        if path.exists():
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                found[name] = np.asarray(image.convert('RGB'))
    return found


def subplots(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> 'tuple[Figure, np.ndarray]':
    """Makes a figure with a grid of axes, which needs no screen.

    Args:
      rows: rows of axes.
      columns: columns of axes.
      size: width and height of the figure in inches.
      options: further ones of `Figure.subplots`.

    Returns:
      (the figure, its axes (rows, columns)).
    """
    # Imported here, because it takes half a second, and most starts make no figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def legend_below(figure: 'Figure', axis: 'Axes', columns: int) -> None:
    """Puts the legend of one axis below the figure, for all of its axes."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc='upper center', ncols=columns, bbox_to_anchor=(0.5, 0), fontsize=8
    )


def save_figure(figure: 'Figure', path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A title may have letters that the font lacks, which are drawn as boxes.
        warnings.filterwarnings('ignore', 'Glyph .* missing from')
        figure.savefig(buffer, dpi=DPI, bbox_inches='tight')
    files.write_bytes(path, buffer.getvalue())


def _save_grid(
    path: str | os.PathLike[str],
    images: np.ndarray,
    columns: int,
    row_labels: Sequence[str],
    title: str,
    axis_label: str = '',
    scale: int = 3,
) -> None:
    """Writes a grid of images with a label at each row."""
    grid = tile(images, columns, scale)
    figure, axes = subplots(1, 1, (grid.shape[1] / DPI, grid.shape[0] / DPI))
    axis = axes[0, 0]
    # The axes have a dot for each pixel. Labels stand outside of them, inside the tight box.
    axis.set_position((0, 0, 1, 1))
    # Grey images become RGB, because a colour map would round them.
    axis.imshow(np.broadcast_to(grid, (*grid.shape[:2], 3)), interpolation='none')
    height = grid.shape[0] / len(row_labels)
    # A dollar in a caption is a dollar, and no formula.
    places = [(i + 0.5) * height for i in range(len(row_labels))]
    axis.set_yticks(places, row_labels, parse_math=False)
    axis.set_xticks([])
    axis.set_ylabel(axis_label)
    axis.set_title(title, parse_math=False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    save_figure(figure, path)


def save_samples(
    path: str | os.PathLike[str],
    images: np.ndarray,
    labels: np.ndarray,
    titles: Sequence[str],
    per_class: int = 16,
) -> None:
    """Writes a labelled grid of samples, a row for each class.

    Args:
      path: the PNG.
      images: (n, H, W, c).
      labels: (n,) int, the classes that the images were drawn for.
      titles: the title of each class, by its label.
      per_class: images in a row, the first of each class. Where a class has fewer, all rows have
        as few.
    """
    labels = np.asarray(labels)
    classes = np.unique(labels)
    per_class = min(per_class, *(np.sum(labels == c) for c in classes))
    chosen = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in classes])
    title = f'drawn by the model: the first {per_class} of each class'
    scale = max(1, 48 // images.shape[1])
    names = [titles[c] for c in classes]
    _save_grid(path, images[chosen], per_class, names, title, 'class asked for', scale)


def save_classes(
    path: str | os.PathLike[str],
    images: np.ndarray,
    columns: int,
    titles: Sequence[str],
    title: str = '',
) -> None:
    """Writes rows of `columns` images, with a title at each row; small images are enlarged.

    Args:
      path: the PNG.
      images: (n, H, W, c), row by row.
      columns: images of a row.
      titles: the title of each row.
      title: the text above the picture.
    """
    scale = max(1, 128 // images.shape[1])
    _save_grid(path, images, columns, titles, title, scale=scale)


def save_captioned(
    path: str | os.PathLike[str],
    images: np.ndarray,
    captions: Sequence[str],
    columns: int = 6,
    rows: int = 8,
) -> None:
    """Writes the first images in a grid, each with its caption above it.

    Args:
      path: the PNG.
      images: (n, H, W, c).
      captions: the caption of each.
      columns: images of a row.
      rows: rows, at most.
    """
    rows = min(rows, -(-len(images) // columns))
    figure, axes = subplots(rows, columns, (2 * columns, 2.3 * rows))
    for axis in axes.flat:
        axis.set_axis_off()
    shown = images[: rows * columns]
    for axis, image, caption in zip(axes.flat, shown, captions, strict=False):
        pixels = np.asarray(to_uint8(image))
        # Grey images become RGB, because a colour map would round them.
        axis.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), interpolation='none')
        title = textwrap.fill(printable(caption, 80), 26)
        axis.set_title(title, fontsize=7, parse_math=False)
    save_figure(figure, path)


def save_reconstructions(
    path: str | os.PathLike[str],
    images: np.ndarray,
    reconstructions: np.ndarray,
    columns: int = 16,
    pairs: int = 3,
    title: str = 'held-out images, decoded',
) -> None:
    """Writes rows of images, each above the row of their reconstructions.

    Args:
      path: the PNG.
      images: (n, H, W, c), at least `columns` of them, because only full rows are shown.
      reconstructions: (n, H, W, c).
      columns: images in a row.
      pairs: how many rows of images there are, at most.
      title: the text above the picture.
    """
    pairs = min(pairs, len(images) // columns)
    row_labels = ['real', 'decoded'] * pairs
    _save_pairs(path, images, reconstructions, columns, row_labels, title)


def save_nearest(
    path: str | os.PathLike[str],
    samples: np.ndarray,
    nearest: np.ndarray,
    titles: Sequence[str],
    title: str,
) -> None:
    """Writes a row of samples for each class, each above the row of the nearest training images.

    Args:
      path: the PNG.
      samples: (n, H, W, c), as many of each class, class by class.
      nearest: (n, H, W, c), the training image that is nearest to each sample.
      titles: the name of each class.
      title: the text above the picture.
    """
    row_labels = [label for name in titles for label in (name, 'nearest')]
    _save_pairs(path, samples, nearest, len(samples) // len(titles), row_labels, title)


def _save_pairs(
    path: str | os.PathLike[str],
    upper: np.ndarray,
    lower: np.ndarray,
    columns: int,
    row_labels: Sequence[str],
    title: str,
) -> None:
    """Writes rows of images of one set, each above the row of those of the other."""
    rows = []
    for i in range(len(row_labels) // 2):
        shown = slice(i * columns, (i + 1) * columns)
        rows += [upper[shown], lower[shown]]
    scale = max(1, 48 // upper.shape[1])
    _save_grid(path, np.concatenate(rows), columns, row_labels, title, scale=scale)
