"""--mode=sample and --mode=grid: draws images of a run."""

import os
import time

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import build, schema
from sphere_ar_jax.evaluation import class_names, pictures
from sphere_ar_jax.runtime import console, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import generation, on_mesh


def _num_classes(config: ConfigDict) -> int:
    """The number of classes that the AR model of an opened run knows."""
    count = schema.num_classes(config)
    assert count is not None  # the model was built with it
    return count


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
    wanted = [name.strip() for name in classes.split(';') if name.strip()]
    if not wanted or columns < 1:
        raise UserError(
            "give --classes='golden retriever; 388; n02099601' and at least 1 for --columns"
        )
    run, mesh = open_run.open_run(workdir, like)
    names = class_names.of_run(workdir, run.config)
    known = _num_classes(run.config)
    numbers = [class_names.find(name, names, known) for name in wanted]
    titles = class_names.titles(numbers, names)
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
