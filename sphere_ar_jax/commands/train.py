"""The job of --mode=train: the trainings that the config asks for, then samples, scores and
report.html.

Those are the tokenizer's (or `config.tokenizer` is taken) and the AR model's; or a head's,
distilled from a run.

Dimensions:
  B  images of a batch     H, W, c  an image
"""

import functools
import resource
import time

import jax
from etils import epath

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import augment, digits, sources
from sphere_ar_jax.evaluation import page, snapshots
from sphere_ar_jax.evaluation.fidelity import inception_weights, protocol
from sphere_ar_jax.interop.lpips import check_paths, read
from sphere_ar_jax.runtime import console, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.files import absolute, write_json
from sphere_ar_jax.training import adversarial, loop
from sphere_ar_jax.training.run import load_config, load_run, load_teacher
from sphere_ar_jax.training.stages import ar_stage, distillation_stage
from sphere_ar_jax.training.workdir import claim, has, other_model


def _opened(key, read, *arguments, **options):
    """What `read` finds in the workdir that a key of the config names; what is wrong there is said
    with the key.
    """
    try:
        return read(*arguments, **options)
    except (OSError, ValueError) as error:
        raise UserError(f'{key}: {error}') from None


def _teacher(cfg, mesh):
    """The run in cfg.init_from, which must be of cfg's own model, finished, and no distilled one."""
    teacher = _opened('init_from', load_teacher, cfg.init_from, mesh)
    published = has(cfg.init_from, 'weights') and not has(cfg.init_from, 'checkpoints')
    if published:  # whatever data it saw
        changed = other_model(teacher.config, cfg)
    else:
        changed = schema.differences(schema.as_dict(teacher.config), schema.as_dict(cfg))
        changed = [d for d in changed if d.startswith(('vae.', 'ar.', 'data.', 'seed '))]
    if changed:
        raise UserError(
            f'{cfg.init_from} has another model ({"; ".join(changed)}): a head is distilled from its own'
        )
    if not published and not epath.Path(cfg.init_from, 'metrics.json').exists():
        raise UserError(f'{cfg.init_from} is not finished: run its own command to the end first')
    return teacher


def _open_data(cfg):
    """(training source, held-out source or None, what else `loop.train` needs to read it)."""
    d = cfg.data
    if d.name == 'digits':
        return *digits.splits(cfg.seed, d.holdout), {}
    if d.path is None:
        raise UserError(f'give --config.data.path, of the {d.name} data')
    bar = console.bar(None, 'reading the tar', 'byte')
    source = sources.open_source(d.name, d.path, d.split, d.data_dir, bar)
    if cfg.data.num_classes is None and schema.num_classes(cfg) is None:
        cfg.data.num_classes = source.num_classes
    if source.num_classes > schema.num_classes(cfg):
        raise UserError(
            f'{d.path} has {source.num_classes} classes, but the model {schema.num_classes(cfg)}'
        )
    augmentation = augment.Augmentation(build.build_vae(cfg).image_shape[0], *d.crop_until, d.draft)
    return (
        source,
        None,
        dict(transform=augmentation, workers=d.workers, threads=d.threads, max_broken=d.max_broken),
    )


def _run(setting, reading, stage, look):
    """`loop.train` of one stage. Returns (its state, seconds)."""
    watch = loop.Watch(setting.cfg.watch.every, look) if setting.cfg.watch.every else None
    directory = f'{setting.workdir}/{stage.name}'
    return loop.train(
        stage,
        setting.source,
        directory,
        seed=setting.cfg.seed,
        mesh=setting.mesh,
        reading=reading,
        watch=watch,
    )


def _distil(setting, reading, teacher):
    """A head of few evaluations from a teacher's run. Returns what `_train` does."""
    options = setting.cfg.distillation_training
    stage = distillation_stage(
        setting.ar, setting.vae, teacher.vae_params, teacher.ar_params, options, setting.cfg.seed
    )
    whole = lambda head: teacher.ar_params | {'head': head}
    look = lambda step, head, writer: snapshots.look_at_samples(
        setting, teacher.vae_params, whole(head), f'{setting.workdir}/distillation', step, writer
    )
    state, seconds = _run(setting, reading, stage, look)
    return teacher.vae_params, whole(state.eval_params), {'distillation': seconds}


def _train(setting, reading, tokenizer, lpips):
    """The stages that the config asks for; tokenizer: parameters to take, or None.

    Returns (S-VAE parameters, AR parameters or None, seconds by stage)."""
    seconds, vae_params = {}, tokenizer
    if tokenizer is None:
        stage = adversarial.tokenizer_stage(
            setting.vae, setting.cfg.tokenizer_training, setting.cfg.seed, lpips
        )
        images = snapshots.examples(setting) if setting.cfg.watch.every else None
        look = lambda step, params, writer: snapshots.look_at_reconstructions(
            setting, params, images, step, writer
        )
        state, seconds['tokenizer'] = _run(setting, reading, stage, look)
        vae_params = state.eval_params
    if not setting.cfg.ar_training.steps:
        return vae_params, None, seconds
    stage = ar_stage(setting.ar, setting.vae, vae_params, setting.cfg.ar_training, setting.cfg.seed)
    look = lambda step, params, writer: snapshots.look_at_samples(
        setting, vae_params, params, f'{setting.workdir}/ar', step, writer
    )
    state, seconds['ar'] = _run(setting, reading, stage, look)
    return vae_params, state.eval_params, seconds


def _summary(cfg, metrics):
    if cfg.data.name != 'digits':
        return (
            f'The tokenizer gives training images back at {metrics["vae/psnr"]:.1f} dB. Scores: --mode=sample, then '
            f'--mode=evaluate.'
        )
    if 'samples/accuracy' not in metrics:
        return f'The tokenizer gives held-out digits back at {metrics["vae/psnr"]:.1f} dB.'
    return (
        f'{cfg.sampling.num_images} digits, drawn class by class, none selected. An independent classifier reads '
        f'{metrics["samples/accuracy"]:.1%} of them as the class asked for (and {metrics["classifier/accuracy"]:.1%} '
        f'of real held-out digits correctly). Fréchet distance to real digits: {metrics["samples/frechet"]:.3f}; '
        f'between the training and the held-out real digits it is {metrics["real/frechet"]:.3f}.'
    )


def _with_lpips(cfg):
    """Whether a tokenizer is to be trained with LPIPS."""
    t = cfg.tokenizer_training
    return bool(t.steps and t.perceptual_weight and cfg.tokenizer is None and cfg.init_from is None)


def check_inputs(cfg, workdir):
    """That what a training reads besides images is there: a tokenizer or a teacher, LPIPS' files.
    Raises ValueError.

    Returns:
      those, a list of paths. workdir: may be None.
    """
    here = workdir is not None and epath.Path(workdir, 'tokenizer', 'weights').is_dir()
    if not (cfg.init_from or cfg.tokenizer_training.steps or here or cfg.tokenizer is not None):
        raise UserError(
            'tokenizer_training.steps is 0, but no tokenizer was converted into the workdir: give '
            '--config.tokenizer=DIR, the workdir of a trained or converted one'
        )
    runs = {name: cfg[name] for name in ('tokenizer', 'init_from') if cfg[name] is not None}
    for name, directory in runs.items():
        _opened(name, load_config, directory)
    files = (cfg.tokenizer_training.lpips, cfg.tokenizer_training.vgg) if _with_lpips(cfg) else ()
    if files:
        check_paths(*files)
    return [*runs.values(), *files]


def _check_parts(cfg, workdir, mesh):
    """Raises UserError for trainings that cannot be run with these devices, and as `check_inputs`
    does.
    """
    names = ('distillation_training',) if cfg.init_from else ('tokenizer_training', 'ar_training')
    for name in names:
        if cfg[name].steps and (
            why := sharding.misfit(mesh, cfg[name].batch_size, cfg[name].accumulate)
        ):
            raise UserError(f'{name}.batch_size: {why}')
    check_inputs(cfg, workdir)


def _tokenizer(cfg, mesh):
    """The parameters of the tokenizer in cfg.tokenizer, which must be cfg's own model; None without
    one.
    """
    if cfg.tokenizer is None:
        return None
    run = _opened('tokenizer', load_run, cfg.tokenizer, mesh, tokenizer_only=True)
    changed = other_model(run.config, cfg, tokenizer_only=True)
    if changed:
        raise UserError(
            f'{cfg.tokenizer} has another tokenizer ({"; ".join(changed)}) than this config'
        )
    return run.vae_params


def _lpips(cfg, mesh):
    """LPIPS' parameters, on all devices, where the tokenizer is to be trained with it, else None."""
    if not _with_lpips(cfg):
        return None
    t = cfg.tokenizer_training
    return jax.device_put(read(t.lpips, t.vgg), sharding.whole(mesh))


def _judge(cfg):
    """(Inception parameters, statistics of the reference) for FID while training, or None."""
    w = cfg.watch
    if not (w.every and w.fid_images):
        return None
    network = inception_weights.load(w.inception)
    bar = console.bars()
    return network, protocol.summarize(
        w.reference, network, progress=lambda *done: bar('reference', *done)
    ).pool


def _set_up(cfg, workdir):
    """(`snapshots.Setting`, the stages to run as a function of it), everything checked; then the
    workdir is claimed.
    """
    for name in ('init_from', 'tokenizer'):
        if cfg[name] is not None:
            cfg[name] = absolute(cfg[name])
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(**cfg.mesh)
    source, heldout, reading = _open_data(cfg)
    _check_parts(cfg, workdir, mesh)
    if cfg.init_from is None:
        stages = functools.partial(
            _train, reading=reading, tokenizer=_tokenizer(cfg, mesh), lpips=_lpips(cfg, mesh)
        )
    else:
        stages = functools.partial(_distil, reading=reading, teacher=_teacher(cfg, mesh))
    vae, ar = build.build_vae(cfg), build.build_ar(cfg)
    setting = snapshots.Setting(cfg, workdir, mesh, vae, ar, source, heldout, _judge(cfg))
    claim(cfg, workdir)  # last: what was refused leaves the workdir free
    return setting, stages


def train(cfg, workdir, command, started):
    """The trainings, then evaluation and report; each part goes on where an earlier run stopped.

    Args:
      cfg: a checked config. workdir: an absolute path, made if needed. command: what report.html
        says to type.
      started: `time.perf_counter()` at the start of the process.
    Returns:
      the metrics, as written to WORKDIR/metrics.json.
    """
    try:
        setting, stages = _set_up(cfg, workdir)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    held = '' if setting.heldout is None else f', {len(setting.heldout)} held out'
    platform = jax.devices()[0].platform
    print(
        f'{len(setting.source)} training images{held}; {setting.mesh.size} {platform} device(s)',
        flush=True,
    )
    seconds = {'start': time.perf_counter() - started}

    vae_params, ar_params, parts = stages(setting)
    seconds |= parts
    if cfg.data.name == 'digits':
        metrics, parts = snapshots.score_digits(setting, vae_params, ar_params)
    else:
        metrics, parts = snapshots.show(setting, vae_params, ar_params)
    mark = time.perf_counter()
    page.save_curves(f'{workdir}/curves.png', workdir)
    seconds |= parts | {'curves': time.perf_counter() - mark}
    metrics |= {f'wall_s/{name}': round(value, 1) for name, value in seconds.items()}
    metrics['wall_s/total'] = round(sum(seconds.values()), 1)
    metrics['peak_rss_mb'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    write_json(f'{workdir}/metrics.json', metrics)
    summary = _summary(cfg, metrics)
    page.save_page(workdir, cfg.data.name, summary, metrics, str(cfg), command)
    print(f'{summary}\nlook at {workdir}/report.html; all numbers: {workdir}/metrics.json')
    return metrics
