"""--mode=sample and --mode=grid: draws images of a run."""

import os
import time

import numpy as np
from etils import epath
from PIL import Image

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import imagenet
from sphere_ar_jax.evaluation import pictures
from sphere_ar_jax.runtime import console, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import generation, on_mesh


def sample(workdir, *, output=None, labels='uniform', png=None, num_images=None, like=None):
    """Draws images of a run to an npz, see `generation.generate`, and as PNG files to a directory
    `png`.
    """
    path = output or f'{workdir}/samples.npz'
    run, mesh = open_run.open_run(workdir, like)
    s = run.config.sampling
    n = num_images or s.num_images
    labels = generation.draw_labels(labels, n, schema.num_classes(run.config), run.config.seed)
    guided = 'no guidance' if s.guidance is None else f'{s.guidance} guidance {s.guidance_scale}'
    print(
        f'{n} images: {s.solver}, {s.num_steps} steps, {guided}, {mesh.size} device(s)', flush=True
    )
    started, before = time.perf_counter(), None
    show = console.bar(n, 'samples')

    def progress(done):
        nonlocal before
        before = done if before is None else before
        show(done)

    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    generation.generate(
        run, labels, run.config.seed, path, batch_size=s.batch_size, mesh=mesh, progress=progress
    )
    seconds, drawn = time.perf_counter() - started, n - before
    rate = (
        f'{drawn} images in {seconds:.1f} s, {drawn / seconds:.2f} images/s with compiling'
        if drawn
        else 'was there'
    )
    print(f'{path}: {rate}')
    if png is not None and hosts.is_first():
        os.makedirs(png, exist_ok=True)
        show = console.bar(n, 'PNG files')
        for i, image in enumerate(generation.images(path)):
            Image.fromarray(image.squeeze()).save(os.path.join(png, f'{i:06d}.png'))
            show(i + 1)
        print(f'{png}: {n} PNG files')


def grid(workdir, *, classes, columns=4, output=None, like=None):
    """A PNG for people: a row for each class; its images are drawn from key `seed` folded by the
    column alone.

    Args:
      classes: names, synsets or numbers, separated by semicolons; of a data set other than
        ImageNet, numbers.
    """
    path = output or f'{workdir}/grid.png'
    wanted = [name.strip() for name in classes.split(';') if name.strip()]
    if not wanted or columns < 1:
        raise UserError(
            "give --classes='golden retriever; 388; n02099601' and at least 1 for --columns"
        )
    numbers = [int(name) if name.isdecimal() else imagenet.find(name) for name in wanted]
    run, mesh = open_run.open_run(workdir, like)
    known = schema.num_classes(run.config)
    for name, number in zip(wanted, numbers, strict=True):
        if number >= known or (known != 1000 and not name.isdecimal()):
            raise UserError(f'{name!r} is no class: this model knows the numbers 0 to {known - 1}')
    titles = [
        f'{n} {imagenet.classes()[n][1].split(",")[0]}' if known == 1000 else str(n)
        for n in numbers
    ]
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
