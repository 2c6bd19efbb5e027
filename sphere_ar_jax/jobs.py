"""What the program does with checkpoints and trained runs: --mode=convert, export, pack, sample, grid, evaluate.

Each job is a function of plain arguments that prints what it does, writes files and raises `console.UserError` for
what the user can put right. The job of --mode=train is `experiment`.
"""

import json
import os
import shutil
import time

import jax
import numpy as np
from etils import epath
from PIL import Image

from sphere_ar_jax import (
    adversarial,
    checkpoint,
    config,
    console,
    convert,
    data,
    discriminators,
    evaluation,
    experiment,
    fidelity,
    generation,
    hosts,
    imagenet,
    inception,
    looks,
    perceptual,
    recipes,
    report,
    sharding,
    sources,
    torch_file,
    training,
)
from sphere_ar_jax.console import UserError

# What a job raises for input that cannot be used: each says so in its message.
INPUT_ERRORS = (
    OSError, config.ConfigError, checkpoint.DamagedError, torch_file.FileError, convert.ConversionError,
    generation.GenerationError, imagenet.ClassNameError, fidelity.ImageSetError, inception.WeightsError,
    perceptual.WeightsError, sources.SourceError, data.DataError, training.FrozenError, adversarial.OptionsError,
    discriminators.DiscriminatorError,
)  # fmt: skip


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
    if epath.Path(workdir, 'config.json').exists() or experiment.has(workdir, 'checkpoints'):
        raise UserError(f'{workdir} has a run already: use another --workdir')
    tree = torch_file.open_file(_local(source))
    tensors = convert.state_dict(tree, ema)
    sizes = convert.sizes(tensors, tree.get('args'), heads)
    cfg = config.check(recipes.of_checkpoint(sizes))
    changed = [] if like is None else experiment.other_model(like, cfg, sizes.ar is None)
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
        show = console.bar(len(convert.torch_shapes(shapes)), stage, 'tensor')
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
    run, _ = _load(workdir, tokenizer_only=not epath.Path(workdir, 'ar').is_dir())
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    convert.export(f'{path}.tmp', run.vae, run.vae_params, run.ar_params)
    os.replace(f'{path}.tmp', path)
    print(f'wrote {path}')


def _load(workdir, like=None, tokenizer_only=False):
    """(run, mesh) of a workdir; sampling, seed, dtype and mesh as in the config `like`, if given."""
    if not epath.Path(workdir, 'config.json').exists():
        raise UserError(f'{workdir} has no run: train one, or --mode=convert a checkpoint')
    cfg = evaluation.load_config(workdir)
    if like is not None:
        changed = experiment.other_model(cfg, like, tokenizer_only)
        if changed:
            raise UserError(f'{workdir} holds another model than --config ({"; ".join(changed)})')
        cfg = cfg.copy_and_resolve_references()  # placeholders do not take each other's values
        cfg.sampling.update(like.sampling)
        cfg.seed, cfg.dtype = like.seed, like.dtype
        if like.tokenizer is not None:  # it was moved
            cfg.tokenizer = checkpoint.absolute(like.tokenizer)
        cfg.mesh.update(like.mesh)
        config.check(cfg)
    try:
        mesh = sharding.make_mesh(**cfg.mesh)
    except ValueError as error:
        raise UserError(str(error)) from None
    run = evaluation.load_run(workdir, mesh, tokenizer_only, cfg)
    if said := sharding.describe_not_split(mesh, {'ar': run.ar_params, 'tokenizer': run.vae_params}):
        print(said, flush=True)
    return run, mesh


def pack(data_set, directory, *, shards=128, split='train', data_dir=None):
    """Copies images to sharded ArrayRecord files, which training then reads as array_records:DIRECTORY.

    Args:
      data_set: KIND:PATH, see `recipes.data_set`. split, data_dir: of tfds.
    """
    kind, path = recipes.data_set(data_set)
    show = console.bar(None, 'reading the tar', 'byte')
    source = data.Digits('all', 0) if kind == 'digits' else sources.open_source(kind, path, split, data_dir, show)
    sources.pack(source, directory, shards, console.bar(len(source), 'packed'))
    print(f'{directory}: {len(source)} images of {source.num_classes} classes')


def sample(workdir, path, *, labels='uniform', png=None, num_images=None, like=None):
    """Draws images of a run to an npz, see `generation.generate`, and as PNG files to a directory `png`."""
    run, mesh = _load(workdir, like)
    s = run.config.sampling
    n = num_images or s.num_images
    labels = generation.draw_labels(labels, n, config.num_classes(run.config), run.config.seed)
    guided = 'no guidance' if s.guidance is None else f'{s.guidance} guidance {s.guidance_scale}'
    print(f'{n} images: {s.solver}, {s.num_steps} steps, {guided}, {mesh.size} device(s)', flush=True)
    started, before = time.perf_counter(), None
    show = console.bar(n, 'samples')

    def progress(done):
        nonlocal before
        before = done if before is None else before
        show(done)

    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    generation.generate(run, labels, run.config.seed, path, batch_size=s.batch_size, mesh=mesh, progress=progress)
    seconds, drawn = time.perf_counter() - started, n - before
    rate = f'{drawn} images in {seconds:.1f} s, {drawn / seconds:.2f} images/s with compiling' if drawn else 'was there'
    print(f'{path}: {rate}')
    if png is not None and hosts.is_first():
        os.makedirs(png, exist_ok=True)
        show = console.bar(n, 'PNG files')
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
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    s = run.config.sampling
    labels, columns = np.repeat(numbers, seeds), np.tile(np.arange(seeds), len(numbers))
    images = evaluation.sample_images(
        run.ar, run.vae, run.ar_params, run.vae_params, labels, jax.random.key(run.config.seed),
        config.build_sampler(run.config), batch_size=min(s.batch_size, len(labels)), mesh=mesh, index=columns,
        guidance_scale=s.guidance_scale, temperature=s.temperature, progress=console.bar(len(labels), 'samples'),
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
        scores = fidelity.evaluate(samples, reference, weights, progress=console.bars())
    if images is not None:
        run, _ = _load(workdir, like, tokenizer_only=True)
        judge = None if lpips is None else perceptual.read(*lpips)
        batches = fidelity.read_images(images, min(run.config.sampling.batch_size, 64))
        scores['tokenizer'] = evaluation.score_tokenizer(
            run, batches, network=weights, lpips=judge, progress=console.bar(None, 'reconstructions')
        )
    if not scores:
        run, mesh = _load(workdir, like)
        if run.config.data.name != 'digits':
            raise UserError(
                'give --samples, --reference and --inception, or --images: only digits have scores of their own'
            )
        train, heldout = (
            data.Digits(split, run.config.seed, run.config.data.holdout) for split in ('train', 'heldout')
        )
        setting = looks.Setting(run.config, workdir, mesh, run.vae, run.ar, train, heldout)
        scores, _ = looks.score_digits(setting, run.vae_params, run.ar_params)
    path = f'{workdir}/evaluation.json'
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    report.write_json(path, scores)
    print(json.dumps(scores, indent=2))
    print(f'wrote {path}')
    return scores
