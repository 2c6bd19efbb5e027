"""--mode=sample, --mode=grid and --mode=complete: draws images of a run."""

import os
import time

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data.shifted import corruptions, folders
from sphere_ar_jax.evaluation import class_names, pictures
from sphere_ar_jax.evaluation.fidelity import image_sets
from sphere_ar_jax.runtime import console, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import generation, inputs, on_mesh
from sphere_ar_jax.sampling.model import Model


def _num_classes(config: ConfigDict) -> int:
    """The number of classes that the AR model of an opened run knows."""
    count = schema.num_classes(config)
    assert count is not None  # the model was built with it
    return count


def _classes(workdir: str, config: ConfigDict, text: str) -> tuple[list[int], list[str]]:
    """The numbers and titles of classes whose names or numbers a text has between semicolons.

    Raises:
      UserError: the model does not know one of them.
    """
    names = class_names.of_run(workdir, config)
    known = _num_classes(config)
    wanted = [name.strip() for name in text.split(';') if name.strip()]
    numbers = [class_names.find(name, names, known) for name in wanted]
    return numbers, class_names.titles(numbers, names)


def _save_pngs(path: str, directory: str, n: int) -> None:
    """Writes each of the n images of an npz as DIRECTORY/NUMBER.png."""
    os.makedirs(directory, exist_ok=True)
    show = console.bar(n, 'PNG files')
    for i, image in enumerate(generation.images(path)):
        Image.fromarray(image.squeeze()).save(os.path.join(directory, f'{i:06d}.png'))
        show(i + 1)
    print(f'{directory}: {n} PNG files')


def sample(
    workdir: str,
    *,
    output: str | None = None,
    labels: str = 'uniform',
    png: str | None = None,
    num_images: int | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Draws images of a run to an npz, see `generation.generate`.

    If it is stopped, the same call goes on from there.

    Args:
      workdir: the directory of the run.
      output: the npz, WORKDIR/samples.npz if None.
      labels: 'uniform', 'balanced' or a file of whole numbers, see `generation.draw_labels`.
      png: a directory in which every image becomes a PNG file, too; None writes none.
      num_images: number of images, that of the config if None.
      like: a config whose sampler is taken, see `open_run.open_run`.
    """
    path = output or f'{workdir}/samples.npz'
    run, mesh = open_run.open_run(workdir, like)
    s = run.config.sampling
    seed = run.config.seed
    n = num_images or s.num_images
    numbers = generation.draw_labels(labels, n, _num_classes(run.config), seed)
    guided = 'no guidance' if s.guidance is None else f'{s.guidance} guidance {s.guidance_scale}'
    print(
        f'{n} images: {s.solver}, {s.num_steps} steps, {guided}, {mesh.size} device(s)', flush=True
    )
    started = time.perf_counter()
    show = console.bar(n, 'samples')
    counts = []  # images that are there, at the start and after each batch

    def progress(done: int) -> None:
        counts.append(done)
        show(done)

    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    generation.generate(
        run, numbers, seed, path, batch_size=s.batch_size, mesh=mesh, progress=progress
    )
    seconds = time.perf_counter() - started
    drawn = n - counts[0]
    if drawn:
        rate = drawn / seconds
        print(f'{path}: {drawn} images in {seconds:.1f} s, {rate:.2f} images/s with compiling')
    else:
        print(f'{path}: was there')
    if png is not None and hosts.is_first():
        _save_pngs(path, png, n)


def grid(
    workdir: str,
    *,
    classes: str,
    columns: int = 4,
    output: str | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Draws a picture with a row of images for each class.

    The images of a column share their noise: it depends on the run's seed and the column alone.

    Args:
      workdir: the directory of the run.
      classes: names of the run's own classes, or numbers, separated by semicolons; for ImageNet
        also synsets and English names. See `class_names.find`.
      columns: number of images of each class.
      output: the PNG file, WORKDIR/grid.png if None.
      like: a config whose sampler is taken, see `open_run.open_run`.

    Raises:
      UserError: the model does not know a class, or there is nothing to draw.
    """
    path = output or f'{workdir}/grid.png'
    if not classes.strip(' ;') or columns < 1:
        raise UserError(
            "give --classes='golden retriever; 388; n02099601' and at least 1 for --columns"
        )
    run, mesh = open_run.open_run(workdir, like)
    numbers, titles = _classes(workdir, run.config, classes)
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    labels = np.repeat(numbers, columns)
    images, _ = on_mesh.sample_images(
        run,
        build.build_sampler(run.config),
        labels,
        seed=run.config.seed,
        index=np.tile(np.arange(columns), len(numbers)),
        batch_size=run.config.sampling.batch_size,
        mesh=mesh,
        progress=console.bar(len(labels), 'samples'),
    )
    pictures.save_classes(path, images, columns, titles)
    print(f'wrote {path}')


def _kept_part(image: np.ndarray, grid: tuple[int, int], count: int) -> np.ndarray:
    """An image (H, W, c) whose pixels are grey but for those of its first tokens."""
    is_kept = inputs.kept_pixels(count, grid, image.shape)
    return np.where(is_kept[..., None], image, 0)


# Rows of a picture. More would make it too high for the program that draws it.
_MOST_ROWS = 200


def _originals(
    workdir: str, config: ConfigDict, images: str, classes: str | None, num_images: int | None
) -> tuple[folders.Pictures, list[str]]:
    """The pictures to complete, and a title for each; the arguments are those of `complete`."""
    names = class_names.of_run(workdir, config)
    known = _num_classes(config)
    is_folder = os.path.isdir(images)
    if classes is None:
        if not is_folder:
            raise UserError(f"give --classes='golden retriever', the class of {images}")
        found = folders.labelled(images, lambda name: class_names.find(name, names, known))
    else:
        files = image_sets.list_images(images) if is_folder else [images]
        numbers, _ = _classes(workdir, config, classes)
        if len(numbers) not in (1, len(files)):
            raise UserError(
                f'--classes names {len(numbers)} classes for {len(files)} images: give one for '
                'all, or one for each'
            )
        found = folders.Pictures(files, numbers * (len(files) // len(numbers)))
    rows = min(num_images or len(found.files), len(found.files))
    if rows > _MOST_ROWS:
        raise UserError(
            f'{images}: a picture has at most {_MOST_ROWS} rows, not {rows}: give --num_images=16'
        )
    chosen = folders.spread(found, rows)
    return chosen, class_names.titles(chosen.labels, names)


def complete(
    workdir: str,
    *,
    images: str,
    classes: str | None = None,
    keep: str = '0.5',
    corruption: str | None = None,
    num_images: int | None = None,
    columns: int = 4,
    output: str | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Draws a picture of images, of the part of each that is kept, and of completions.

    Tokens are in raster order, so that half of them is the upper half of an image. The completions
    of a row differ by their noise alone.

    Args:
      workdir: the directory of the run.
      images: a picture, or a directory of pictures, of any size; see `inputs.images`.
      classes: the class of all images, or one for each, see `grid`. If None, the images lie in
        directories that have the names of their classes, as those of ImageNet-Sketch and
        ImageNet-R do; see `folders.labelled`.
      keep: a whole number of tokens, or a share of them, see `inputs.kept`.
      corruption: what is done to the images first, see `corruptions.parse`; None leaves them as
        they are.
      num_images: number of images, evenly spread over those there are; all if None.
      columns: completions of each image.
      output: the PNG file, WORKDIR/complete.png if None.
      like: a config whose sampler is taken, see `open_run.open_run`.

    Raises:
      UserError: a picture cannot be read, or classes, tokens to keep or the corruption are not
        possible.
      OSError: likewise for a file.
    """
    path = output or f'{workdir}/complete.png'
    try:
        share = float(keep) if '.' in keep else int(keep)
    except ValueError:
        raise UserError(f'--keep is {keep}: give a number of tokens, or a share as 0.5') from None
    shift = None if corruption is None else corruptions.parse(corruption)
    run, mesh = open_run.open_run(workdir, like)
    originals, titles = _originals(workdir, run.config, images, classes, num_images)
    model = Model(run, mesh=mesh)
    count = inputs.kept(share, model.num_tokens)
    given = inputs.images(originals.files, model.image_shape)
    if shift is not None:
        given = corruptions.corrupt_floats(given, shift, run.config.seed)
    drawn = model.complete(
        np.repeat(given, columns, axis=0),
        np.repeat(originals.labels, columns),
        keep=count,
        seed=run.config.seed,
    )
    rows = []
    for i, image in enumerate(given):
        rows += [image, _kept_part(image, tuple(run.config.vae.grid), count)]
        rows += [*drawn[i * columns : (i + 1) * columns]]
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    noun = 'image' if shift is None else f'{shift.word} image (severity {shift.severity})'
    title = f'{noun}, its first {count} of {model.num_tokens} tokens, completions'
    pictures.save_classes(path, np.stack(rows), columns + 2, titles, title)
    print(f'wrote {path}')
