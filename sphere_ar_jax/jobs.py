"""What the program does for each --mode: train, convert, export, sample, grid, evaluate.

Each job is a function of plain arguments that prints what it does, writes files under the workdir and raises UserError
for what the user can put right.
"""

import functools
import json
import os
import resource
import shutil
import sys
import time

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from sphere_ar_jax import (
    checkpoint,
    config,
    convert,
    data,
    evaluation,
    fidelity,
    generation,
    imagenet,
    inception,
    perceptual,
    report,
    sharding,
    torch_file,
    training,
)


class UserError(Exception):
    """Something that the user can put right; one line."""


# What a job raises for input that cannot be used: each says so in its message.
INPUT_ERRORS = (
    OSError, config.ConfigError, checkpoint.DamagedError, torch_file.FileError, convert.ConversionError,
    generation.GenerationError, imagenet.ClassNameError, fidelity.ImageSetError, inception.WeightsError,
    perceptual.WeightsError,
)  # fmt: skip


def _bar(total, name, unit='image'):
    """A progress bar; where nobody watches (no terminal), a line at every quarter."""
    bar = tqdm(total=total, desc=name, unit=unit, disable=not sys.stderr.isatty())
    shown = -1

    def progress(done, total=total):
        nonlocal shown
        if not bar.disable:
            bar.total = total
            bar.update(done - bar.n)
        elif total and done * 4 // total > shown:
            shown = done * 4 // total
            print(f'{name}: {done} of {total}', flush=True)

    return progress


def _has(workdir, what):
    """Whether a stage's directory in a workdir has 'weights' (converted) or 'checkpoints' (trained)."""
    return any(os.path.isdir(os.path.join(workdir, stage, what)) for stage in ('tokenizer', 'ar'))


def _other_model(old, new, tokenizer_only=False):
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
    converted = _has(workdir, 'weights') and not _has(workdir, 'checkpoints')
    if os.path.exists(path):
        if converted:
            alone = not os.path.isdir(f'{workdir}/ar/weights')
            changed = _other_model(evaluation.load_config(workdir), cfg, alone)
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
    published = _has(cfg.init_from, 'weights') and not _has(cfg.init_from, 'checkpoints')
    if published:  # whatever data it saw
        changed = _other_model(teacher.config, cfg)
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


def _evaluate(cfg, workdir, mesh, vae, ar, vae_params, ar_params, train, heldout):
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
        guidance_scale=s.guidance_scale, temperature=s.temperature, progress=_bar(s.num_images, 'samples'),
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
    metrics, parts = _evaluate(cfg, workdir, mesh, vae, ar, vae_params, ar_params, train, heldout)
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


def _local(source):
    """The path of a checkpoint; hf://OWNER/REPOSITORY/FILE is fetched into Hugging Face's cache, with a bar."""
    if not source.startswith('hf://'):
        return source
    owner, repository, file = [*source.removeprefix('hf://').split('/', 2), '', ''][:3]
    if not file:
        raise UserError(f'{source} must be hf://OWNER/REPOSITORY/FILE')
    try:
        import huggingface_hub
    except ImportError:
        raise UserError('hf:// needs another package: pip install huggingface_hub') from None
    try:
        return huggingface_hub.hf_hub_download(f'{owner}/{repository}', file)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(f'{source}: {(str(error).strip() or type(error).__name__).splitlines()[0]}') from None


def convert_checkpoint(source, workdir, *, ema=True, heads=None, like=None):
    """A PyTorch checkpoint → WORKDIR with config.json and weights, which the other jobs take as a trained run.

    Needs the parameters' size in memory, float32, and no PyTorch. Killed, it leaves no run; again, it starts anew.

    Args:
      source: FILE.pt or hf://OWNER/REPOSITORY/FILE. ema: prefer EMA weights. heads: of the AR model, see
        `convert.sizes`. like: a config whose model the checkpoint's must be, or None.
    """
    if os.path.exists(f'{workdir}/config.json') or _has(workdir, 'checkpoints'):
        raise UserError(f'{workdir} has a run already: use another --workdir')
    tree = torch_file.open_file(_local(source))
    tensors = convert.state_dict(tree, ema)
    sizes = convert.sizes(tensors, tree.get('args'), heads)
    cfg = config.check(config.of_checkpoint(sizes))
    changed = [] if like is None else _other_model(like, cfg, sizes.ar is None)
    if changed:
        raise UserError(f'{source} holds another model than --config ({"; ".join(changed)})')
    name = f'SphereAR-{sizes.name}' if sizes.name else 'a SphereAR model of sizes of its own'
    name = 'a tokenizer' if sizes.ar is None else name
    chosen = 'ema' if ema and tree.get('ema') else 'model' if tree.get('model') else 'all of the file'
    print(f'{source}: {name}, {len(tensors)} tensors ({chosen}), grid {cfg.vae.grid[0]}x{cfg.vae.grid[1]}', flush=True)
    models = {'tokenizer': config.build_vae(cfg)} | ({} if sizes.ar is None else {'ar': config.build_ar(cfg)})
    for stage in ('tokenizer', 'ar'):  # of a conversion that broke off, perhaps of another file
        shutil.rmtree(f'{workdir}/{stage}/weights', ignore_errors=True)
    for stage, model in models.items():
        shapes = jax.eval_shape(model.init_params, jax.random.key(0))
        show = _bar(len(convert.torch_shapes(shapes)), stage, 'tensor')
        weights = checkpoint.Checkpoints(f'{workdir}/{stage}/weights')
        leaves, tree_def = jax.tree.flatten(convert.from_torch(tensors, shapes, show))
        for i in range(len(leaves)):  # one by one: all of it is in memory once
            leaves[i] = jax.block_until_ready(jax.device_put(leaves[i]))
        weights.save(0, tree_def.unflatten(leaves), {}, 0.0)
        del leaves
        weights.close()
    report.write_json(f'{workdir}/config.json', config.as_dict(cfg))
    print(f'converted to {workdir}: --mode=sample, grid, evaluate and train take it')


def export_checkpoint(workdir, path):
    """The weights of a run → a safetensors file with the public names, S-VAE and AR model as published."""
    run, _ = _load(workdir, tokenizer_only=not os.path.isdir(f'{workdir}/ar'))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    convert.export(f'{path}.tmp', run.vae, run.vae_params, run.ar_params)
    os.replace(f'{path}.tmp', path)
    print(f'wrote {path}')


def _load(workdir, like=None, tokenizer_only=False):
    """(run, mesh) of a workdir; sampling, seed, dtype and mesh as in the config `like`, if given."""
    if not os.path.exists(f'{workdir}/config.json'):
        raise UserError(f'{workdir} has no run: train one, or --mode=convert a checkpoint')
    cfg = evaluation.load_config(workdir)
    if like is not None:
        changed = _other_model(cfg, like, tokenizer_only)
        if changed:
            raise UserError(f'{workdir} holds another model than --config ({"; ".join(changed)})')
        cfg = cfg.copy_and_resolve_references()  # placeholders do not take each other's values
        cfg.sampling.update(like.sampling)
        cfg.seed, cfg.dtype = like.seed, like.dtype
        cfg.mesh.update(like.mesh)
        config.check(cfg)
    try:
        mesh = sharding.make_mesh(**cfg.mesh)
    except ValueError as error:
        raise UserError(str(error)) from None
    run = evaluation.load_run(workdir, mesh, tokenizer_only)
    return run._replace(config=cfg, vae=config.build_vae(cfg), ar=config.build_ar(cfg)), mesh


def sample(workdir, path, *, labels='uniform', png=None, num_images=None, like=None):
    """Draws images of a run to an npz, see `generation.generate`, and as PNG files to a directory `png`."""
    run, mesh = _load(workdir, like)
    s = run.config.sampling
    n = num_images or s.num_images
    labels = generation.draw_labels(labels, n, config.num_classes(run.config), run.config.seed)
    guided = 'no guidance' if s.guidance is None else f'{s.guidance} guidance {s.guidance_scale}'
    print(f'{n} images: {s.solver}, {s.num_steps} steps, {guided}, {mesh.size} device(s)', flush=True)
    started, before = time.perf_counter(), None
    show = _bar(n, 'samples')

    def progress(done):
        nonlocal before
        before = done if before is None else before
        show(done)

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    generation.generate(run, labels, run.config.seed, path, batch_size=s.batch_size, mesh=mesh, progress=progress)
    seconds, drawn = time.perf_counter() - started, n - before
    rate = f'{drawn} images in {seconds:.1f} s, {drawn / seconds:.2f} images/s with compiling' if drawn else 'was there'
    print(f'{path}: {rate}')
    if png is not None:
        os.makedirs(png, exist_ok=True)
        show = _bar(n, 'PNG files')
        for i, image in enumerate(generation.images(path)):
            Image.fromarray(image.squeeze()).save(os.path.join(png, f'{i:06d}.png'))
            show(i + 1)
        print(f'{png}: {n} PNG files')


def grid(workdir, path, *, classes, seeds=4, like=None):
    """A PNG for people: a row for each class, a column for each seed.

    Args:
      classes: names, synsets or numbers, separated by semicolons; of a data set other than ImageNet, numbers.
      seeds: columns; image (class, column) is drawn from key `seed` folded by the column alone.
    """
    wanted = [name.strip() for name in classes.split(';') if name.strip()]
    if not wanted or seeds < 1:
        raise UserError("give --classes='golden retriever; 388; n02099601' and at least 1 for --columns")
    numbers = [int(name) if name.isdecimal() else imagenet.find(name) for name in wanted]
    run, mesh = _load(workdir, like)
    known = config.num_classes(run.config)
    for name, number in zip(wanted, numbers, strict=True):
        if number >= known or (known != 1000 and not name.isdecimal()):
            raise UserError(f'{name!r} is no class: this model knows the numbers 0 to {known - 1}')
    titles = [f'{n} {imagenet.classes()[n][1].split(",")[0]}' if known == 1000 else str(n) for n in numbers]
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    s = run.config.sampling
    labels, columns = np.repeat(numbers, seeds), np.tile(np.arange(seeds), len(numbers))
    images = evaluation.sample_images(
        run.ar, run.vae, run.ar_params, run.vae_params, labels, jax.random.key(run.config.seed),
        config.build_sampler(run.config), batch_size=min(s.batch_size, len(labels)), mesh=mesh, index=columns,
        guidance_scale=s.guidance_scale, temperature=s.temperature, progress=_bar(len(labels), 'samples'),
    )  # fmt: skip
    report.save_classes(path, images, seeds, titles)
    print(f'wrote {path}')


def evaluate(workdir, *, samples=None, reference=None, network=None, images=None, lpips=None, like=None):
    """Scores a run, or samples alone, and writes WORKDIR/evaluation.json.

    Args:
      samples, reference: npz files for `fidelity.evaluate`. network: Inception weights (.pb or .pth). images: npz with
        real images (arr_0) for the tokenizer's scores. lpips: (linear weights, VGG16's weights) files.
      Without samples and images a run on the digits is scored by the digits' protocol.
    Returns:
      what was written.
    """
    scores = {}
    if (samples is None) != (reference is None):
        raise UserError('give --samples=NPZ and --reference=NPZ together')
    if samples is not None and network is None:
        raise UserError('give --inception=classify_image_graph_def.pb (or the .pth of pytorch-fid, torch-fidelity)')
    if network is not None and samples is None and images is None:
        raise UserError('--inception is for --samples and --reference, or for --images: give those too')
    weights = None if network is None else inception.load(network)
    if samples is not None:
        bars = {}

        def progress(part, done, total):
            if part not in bars:
                bars[part] = _bar(total, part)
            bars[part](done, total)

        scores = fidelity.evaluate(samples, reference, weights, progress=progress)
    if images is not None:
        run, _ = _load(workdir, like, tokenizer_only=True)
        judge = None
        if lpips is not None:
            judge = perceptual.load(*(convert.state_dict(torch_file.open_file(file)) for file in lpips))
        batches = fidelity.read_images(images, min(run.config.sampling.batch_size, 64))
        scores['tokenizer'] = evaluation.score_tokenizer(
            run, batches, network=weights, lpips=judge, progress=_bar(None, 'reconstructions')
        )
    if not scores:
        run, mesh = _load(workdir, like)
        if run.config.data.name != 'digits':
            raise UserError(
                'give --samples, --reference and --inception, or --images: only digits have scores of their own'
            )
        train, heldout = (
            data.SOURCES['digits'](split, run.config.seed, run.config.data.holdout) for split in ('train', 'heldout')
        )
        scores, _ = _evaluate(run.config, workdir, mesh, run.vae, run.ar, run.vae_params, run.ar_params, train, heldout)
    path = f'{workdir}/evaluation.json'
    os.makedirs(workdir, exist_ok=True)
    report.write_json(path, scores)
    print(json.dumps(scores, indent=2))
    print(f'wrote {path}')
    return scores
