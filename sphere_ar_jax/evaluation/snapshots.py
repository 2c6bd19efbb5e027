"""Pictures and scores of a run: looks at a model while it is trained, and what is shown and
measured at its end.

Dimensions:
  n  images     H, W, c  an image, float in [−1, 1]
"""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import augment, imagenet, pixels
from sphere_ar_jax.evaluation import digits, pictures, tokenizer
from sphere_ar_jax.evaluation.fidelity import protocol, statistics
from sphere_ar_jax.runtime import console, hosts
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.training.run import Run


class Setting(NamedTuple):
    """What the parts of a run share.

    Attributes:
      cfg: its config. workdir: where it is written. mesh: the devices. vae, ar: the models.
      source: the training images, see `sources`. heldout: others of the same kind, or None.
      judge: (Inception parameters, reference `statistics.Statistics`) for FID while training, or
        None.
    """

    cfg: Any
    workdir: str
    mesh: Any
    vae: Any
    ar: Any
    source: Any
    heldout: Any = None
    judge: Any = None


def examples(setting, n=48):
    """The first n images (n, H, W, c): held-out ones, or training images cropped at the centre, no
    broken ones.
    """
    if setting.heldout is not None:
        return setting.heldout.images[:n]
    found = []
    for i in range(len(setting.source)):
        if len(found) == n:
            break
        try:
            image = augment.decode(setting.source[i]['image'])
        except augment.BrokenImageError:
            continue
        found.append(pixels.to_float(augment.center_crop(image, setting.vae.image_shape[0])))
    return np.stack(found)


def look_at_reconstructions(setting, vae_params, images, step, writer):
    """A picture of the examples' reconstructions."""
    recon, _ = on_mesh.reconstruct(
        setting.vae, vae_params, images, jax.random.key(0), len(images), setting.mesh
    )
    path = f'{setting.workdir}/tokenizer/reconstructions_{step:07d}.png'
    pictures.save_reconstructions(
        path, images, recon, columns=min(8, len(images)), title=f'step {step}'
    )
    pairs = np.concatenate([images[:8], recon[:8]])
    writer.picture('reconstructions', step, pictures.tile(pairs, len(images[:8]), 1))


def _drawing(setting, vae_params, ar_params):
    """What `on_mesh.sample_images` and `on_mesh.draw_batches` need to draw by the config:
    (arguments, options).
    """
    cfg = setting.cfg
    run = Run(cfg, setting.vae, vae_params, setting.ar, ar_params)
    options = {'seed': cfg.seed, 'batch_size': cfg.sampling.batch_size, 'mesh': setting.mesh}
    return (run, build.build_sampler(cfg)), options


def _draw(setting, vae_params, ar_params, labels, **options):
    """Images (n, H, W, c) for labels; options: further ones of `on_mesh.sample_images`."""
    arguments, common = _drawing(setting, vae_params, ar_params)
    images, _ = on_mesh.sample_images(*arguments, labels, **common, **options)
    return images


def _fid(setting, vae_params, ar_params):
    """The FID of so many samples as the config says, class by class in turn, to the judge's
    reference.
    """
    network, reference = setting.judge
    arguments, options = _drawing(setting, vae_params, ar_params)
    n = setting.cfg.watch.fid_images
    labels = np.arange(n) % schema.num_classes(setting.cfg)

    def batches():
        for first, images, _ in on_mesh.draw_batches(*arguments, labels, **options):
            yield np.asarray(pixels.to_uint8(hosts.gather(images)[: n - first]))

    features = protocol.extract(
        batches(), network, batch_size=options['batch_size'], mesh=setting.mesh
    )
    return statistics.frechet_distance(*statistics.statistics(features.pool), *reference)


def _grid(setting):
    """(class of each row, labels, noise index of each image) of the fixed grid of samples."""
    w, classes = setting.cfg.watch, schema.num_classes(setting.cfg)
    of_data = min(classes, setting.source.num_classes)
    rows = np.linspace(0, of_data - 1, min(w.classes, of_data)).round().astype(int)
    return rows, np.repeat(rows, w.columns), np.tile(np.arange(w.columns), len(rows))


def _save_grid(setting, path, images):
    rows, _, _ = _grid(setting)
    names = setting.source.class_names if hasattr(setting.source, 'class_names') else None
    known = dict(imagenet.classes())
    name = lambda k: '' if names is None else ' ' + known.get(names[k], names[k]).split(',')[0]
    pictures.save_classes(path, images, setting.cfg.watch.columns, [f'{k}{name(k)}' for k in rows])


def look_at_samples(setting, vae_params, ar_params, directory, step, writer):
    """A picture of the same classes from the same noise at every look, and the FID of as many
    samples as wished.
    """
    _, labels, index = _grid(setting)
    images = _draw(setting, vae_params, ar_params, labels, index=index)
    _save_grid(setting, f'{directory}/samples_{step:07d}.png', images)
    writer.picture('samples', step, pictures.tile(images, setting.cfg.watch.columns, 1))
    if setting.judge is not None:
        writer.write(step, {'fid': _fid(setting, vae_params, ar_params)}, ('fid',))


def _reconstruct(setting, vae_params, images, batch_size, **picture):
    """Writes WORKDIR/reconstructions.png; returns how good they are."""
    key = jax.random.key(setting.cfg.seed + 1)
    recon, found = on_mesh.reconstruct(
        setting.vae, vae_params, images, key, batch_size, setting.mesh
    )
    pictures.save_reconstructions(
        f'{setting.workdir}/reconstructions.png', images, recon, **picture
    )
    scores = {f'vae/{name}': found[name] for name in setting.vae.posterior.shown}
    return {'vae/psnr': tokenizer.psnr(recon, images), **scores}


def score_digits(setting, vae_params, ar_params):
    """The digits' protocol: reconstructs, samples and scores; writes the pictures. ar_params: None
    leaves samples out.

    Returns (metrics, seconds by part)."""
    s, seconds, mark = setting.cfg.sampling, {}, time.perf_counter()
    metrics = _reconstruct(setting, vae_params, setting.heldout.images, s.batch_size)
    seconds['reconstruction'], mark = time.perf_counter() - mark, time.perf_counter()
    if ar_params is None:
        return metrics, seconds

    labels = np.arange(s.num_images) % setting.source.num_classes
    print(
        f'sampling {s.num_images} images: {s.solver}, {s.num_steps} steps, guidance {s.guidance_scale}',
        flush=True,
    )
    images = _draw(
        setting, vae_params, ar_params, labels, progress=console.bar(s.num_images, 'samples')
    )
    pictures.save_samples(f'{setting.workdir}/samples.png', images, labels)
    seconds['sampling'], mark = time.perf_counter() - mark, time.perf_counter()

    print('scoring', flush=True)
    metrics |= digits.score_digits(
        digits.digit_pixels(images), labels, setting.source, setting.heldout
    )
    seconds['scoring'] = time.perf_counter() - mark
    return metrics, seconds


def show(setting, vae_params, ar_params):
    """Reconstructions, and a grid of samples unless ar_params is None, of a run on images without a
    protocol of ours.

    Returns (metrics, seconds by part)."""
    images, mark, seconds = examples(setting), time.perf_counter(), {}
    title = 'training images, cropped at the centre, and decoded'
    columns = min(8, len(images))
    metrics = _reconstruct(
        setting, vae_params, images, min(16, len(images)), columns=columns, title=title
    )
    seconds['reconstruction'], mark = time.perf_counter() - mark, time.perf_counter()
    if ar_params is not None:
        _, labels, index = _grid(setting)
        bar = console.bar(len(labels), 'samples')
        images = _draw(setting, vae_params, ar_params, labels, index=index, progress=bar)
        _save_grid(setting, f'{setting.workdir}/samples.png', images)
        seconds['sampling'] = time.perf_counter() - mark
    return metrics, seconds
