"""The job of --mode=train: both trainings, or a head distilled from them, then samples, scores and report.html."""

import functools
import json
import os
import resource
import time

import jax
import numpy as np

from sphere_ar_jax import config, console, data, evaluation, report, sharding, training
from sphere_ar_jax.console import UserError


def has(workdir, what):
    """Whether a stage's directory in a workdir has 'weights' (converted) or 'checkpoints' (trained)."""
    return any(os.path.isdir(os.path.join(workdir, stage, what)) for stage in ('tokenizer', 'ar'))


def other_model(old, new, tokenizer_only=False):
    """'KEY OLD → NEW' for each difference of two configs' models, or of their tokenizers alone."""
    parts = ('vae.',) if tokenizer_only else ('vae.', 'ar.')
    changed = [d for d in config.differences(config.as_dict(old), config.as_dict(new)) if d.startswith(parts)]
    classes = config.num_classes(old), config.num_classes(new)
    if classes[0] != classes[1] and not tokenizer_only:
        changed.append('data.num_classes {} → {}'.format(*classes))
    return changed


def _claim(cfg, workdir):
    """Writes WORKDIR/config.json, or refuses a workdir that was begun with another model, data or training.

    In a workdir of converted weights where no training has begun, only the model must be theirs.
    """
    path = os.path.join(workdir, 'config.json')
    mine = config.as_dict(cfg)
    converted = has(workdir, 'weights') and not has(workdir, 'checkpoints')
    if os.path.exists(path):
        if converted:
            alone = not os.path.isdir(f'{workdir}/ar/weights')
            changed = other_model(evaluation.load_config(workdir), cfg, alone)
        else:
            try:
                with open(path) as f:
                    changed = config.differences(json.load(f), mine)
            except (ValueError, AttributeError):
                raise UserError(f'{path} is no config of ours: use another --workdir, or move the file away') from None
        if changed:
            raise UserError(
                f'{workdir} was begun with another config ({"; ".join(changed[:4])}): use another --workdir'
            )
    elif converted:
        raise UserError(f'a conversion into {workdir} broke off: repeat it, or use another --workdir')
    report.write_json(path, mine)


def _teacher(cfg, mesh):
    """The run in cfg.init_from, which must be of cfg's own model, finished, and no distilled one."""
    try:
        teacher = evaluation.load_teacher(cfg.init_from, mesh)
    except (OSError, ValueError) as error:
        raise UserError(f'init_from: {error}') from None
    published = has(cfg.init_from, 'weights') and not has(cfg.init_from, 'checkpoints')
    if published:  # whatever data it saw
        changed = other_model(teacher.config, cfg)
    else:
        changed = config.differences(config.as_dict(teacher.config), config.as_dict(cfg))
        changed = [d for d in changed if d.startswith(('vae.', 'ar.', 'data.', 'seed '))]
    if changed:
        raise UserError(f'{cfg.init_from} has another model ({"; ".join(changed)}): a head is distilled from its own')
    if not published and not os.path.exists(os.path.join(cfg.init_from, 'metrics.json')):
        raise UserError(f'{cfg.init_from} is not finished: run its own command to the end first')
    return teacher


def _distil(cfg, workdir, mesh, vae, ar, source, teacher):
    """A head of few evaluations from a teacher's run. Returns what `_train` does."""
    stage = training.distillation_stage(
        ar, vae, teacher.vae_params, teacher.ar_params, cfg.distillation_training, cfg.seed
    )
    state, seconds = training.train(stage, source, f'{workdir}/distillation', seed=cfg.seed, mesh=mesh)
    return teacher.vae_params, teacher.ar_params | {'head': state.eval_params}, {'distillation': seconds}


def _train(cfg, workdir, mesh, vae, ar, source):
    """Both stages. Returns (S-VAE parameters, AR parameters, seconds by stage)."""
    seconds = {}
    stage = training.tokenizer_stage(vae, cfg.tokenizer_training, cfg.seed)
    state, seconds['tokenizer'] = training.train(stage, source, f'{workdir}/tokenizer', seed=cfg.seed, mesh=mesh)
    vae_params = state.eval_params
    stage = training.ar_stage(ar, vae, vae_params, cfg.ar_training, cfg.seed)
    state, seconds['ar'] = training.train(stage, source, f'{workdir}/ar', seed=cfg.seed, mesh=mesh)
    return vae_params, state.eval_params, seconds


def score_digits(cfg, workdir, mesh, vae, ar, vae_params, ar_params, train, heldout):
    """Reconstructs, samples and scores; writes the pictures. Returns (metrics, seconds by part)."""
    s, key = cfg.sampling, jax.random.key(cfg.seed + 1)
    seconds, mark = {}, time.perf_counter()
    recon, kl, kappa = evaluation.reconstruct(vae, vae_params, heldout.images, key, s.batch_size, mesh)
    metrics = {'vae/psnr': evaluation.psnr(recon, heldout.images), 'vae/kl': kl, 'vae/kappa': kappa}
    report.save_reconstructions(f'{workdir}/reconstructions.png', heldout.images, recon)
    seconds['reconstruction'], mark = time.perf_counter() - mark, time.perf_counter()

    labels = np.arange(s.num_images) % train.num_classes
    print(f'sampling {s.num_images} images: {s.solver}, {s.num_steps} steps, guidance {s.guidance_scale}', flush=True)
    images = evaluation.sample_images(
        ar, vae, ar_params, vae_params, labels, key, config.build_sampler(cfg), batch_size=s.batch_size, mesh=mesh,
        guidance_scale=s.guidance_scale, temperature=s.temperature, progress=console.bar(s.num_images, 'samples'),
    )  # fmt: skip
    report.save_samples(f'{workdir}/samples.png', images, labels)
    seconds['sampling'], mark = time.perf_counter() - mark, time.perf_counter()

    print('scoring', flush=True)
    metrics |= evaluation.score_digits(evaluation.digit_pixels(images), labels, train, heldout)
    seconds['scoring'] = time.perf_counter() - mark
    return metrics, seconds


def _summary(cfg, metrics):
    return (
        f'{cfg.sampling.num_images} digits, drawn class by class, none selected. An independent classifier reads '
        f'{metrics["samples/accuracy"]:.1%} of them as the class asked for (and {metrics["classifier/accuracy"]:.1%} '
        f'of real held-out digits correctly). Fréchet distance to real digits: {metrics["samples/frechet"]:.3f}; '
        f'between the training and the held-out real digits it is {metrics["real/frechet"]:.3f}.'
    )


def train(cfg, workdir, command, started):
    """Both trainings, then evaluation and report; each part goes on where an earlier run stopped.

    Args:
      cfg: a checked config. workdir: an absolute path, made if needed. command: what report.html says to type.
      started: `time.perf_counter()` at the start of the process.
    Returns:
      the metrics, as written to WORKDIR/metrics.json.
    """
    if cfg.data.name == 'synthetic':
        raise UserError(
            'data.name is synthetic: there are no images to train on; python -m sphere_ar_jax.benchmark measures'
        )
    if cfg.init_from is not None:
        cfg.init_from = os.path.abspath(cfg.init_from)
    try:
        os.makedirs(workdir, exist_ok=True)
        mesh = sharding.make_mesh(**cfg.mesh)
        teacher = _teacher(cfg, mesh) if cfg.init_from is not None else None
        for name in ('distillation_training',) if cfg.init_from else ('tokenizer_training', 'ar_training'):
            size = cfg[name].batch_size
            if size % mesh.size:
                raise UserError(f'{name}.batch_size is {size}, not a multiple of the {mesh.size} devices')
        if not (cfg.init_from or cfg.tokenizer_training.steps or os.path.isdir(f'{workdir}/tokenizer/weights')):
            raise UserError('tokenizer_training.steps is 0, but no tokenizer was converted into the workdir')
        _claim(cfg, workdir)  # last: what was refused leaves the workdir free
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    vae, ar = config.build_vae(cfg), config.build_ar(cfg)
    train, heldout = (data.SOURCES[cfg.data.name](split, cfg.seed, cfg.data.holdout) for split in ('train', 'heldout'))
    platform = jax.devices()[0].platform
    print(f'{len(train)} training images, {len(heldout)} held out; {mesh.size} {platform} device(s)', flush=True)
    seconds = {'start': time.perf_counter() - started}

    stages = _train if teacher is None else functools.partial(_distil, teacher=teacher)
    vae_params, ar_params, parts = stages(cfg, workdir, mesh, vae, ar, train)
    seconds |= parts
    metrics, parts = score_digits(cfg, workdir, mesh, vae, ar, vae_params, ar_params, train, heldout)
    mark = time.perf_counter()
    report.save_curves(f'{workdir}/curves.png', workdir)
    seconds |= parts | {'curves': time.perf_counter() - mark}
    metrics |= {f'wall_s/{name}': round(value, 1) for name, value in seconds.items()}
    metrics['wall_s/total'] = round(sum(seconds.values()), 1)
    metrics['peak_rss_mb'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    report.write_json(f'{workdir}/metrics.json', metrics)
    summary = _summary(cfg, metrics)
    report.save_page(workdir, cfg.data.name, summary, metrics, str(cfg), command)
    print(f'{summary}\nlook at {workdir}/report.html; all numbers: {workdir}/metrics.json')
    return metrics
