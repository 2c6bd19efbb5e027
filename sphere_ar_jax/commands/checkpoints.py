"""--mode=convert and --mode=export: read published weights, and write weights as published."""

import contextlib
import os
import re
from typing import Any

import jax
import safetensors
from etils import epath
from ml_collections import ConfigDict

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import build, checks, recipes, schema
from sphere_ar_jax.evaluation import class_names, model_card
from sphere_ar_jax.interop import shared, torch_file, torch_names, torch_sizes
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime import checkpoint, console, files
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.training.run import Run, load_config, tokenizer_chain
from sphere_ar_jax.training.workdir import has, other_model, saved_steps


def _hub(what: str) -> Any:
    """The package huggingface_hub, which `what` needs. Raises UserError where it is missing."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f'{what} needs another package: pip install huggingface_hub') from None
    return huggingface_hub


def _local(source: str) -> str:
    """The path of a checkpoint on this machine.

    hf://OWNER/REPOSITORY/FILE is fetched into Hugging Face's cache, with a progress bar. What a
    shared directory has beside its weights comes with a safetensors file.
    """
    if not source.startswith('hf://'):
        return source
    parts = source.removeprefix('hf://').split('/', 2)
    if len(parts) < 3 or not parts[2]:
        raise UserError(f'{source} must be hf://OWNER/REPOSITORY/FILE')
    owner, repository, file = parts
    if file == shared.WEIGHTS:
        return os.path.join(fetched(f'hf://{owner}/{repository}'), file)
    hub = _hub('hf://')
    try:
        return hub.hf_hub_download(f'{owner}/{repository}', file)
    except Exception as error:  # It passes on whatever its packages for HTTP raise.
        raise UserError(f'{source}: {first_line(error)}') from None


def fetched(source: str) -> str:
    """Fetches shared weights into Hugging Face's cache.

    Args:
      source: hf://OWNER/REPOSITORY.

    Returns:
      The directory, see `shared`.

    Raises:
      UserError: there is no such repository, or it holds no shared weights.
    """
    hub = _hub('hf://')
    try:
        directory = hub.snapshot_download(
            source.removeprefix('hf://').strip('/'), allow_patterns=list(shared.FILES)
        )
    except Exception as error:  # See `_local`.
        raise UserError(f'{source}: {first_line(error)}') from None
    if not shared.is_shared(directory):
        raise UserError(
            f'{source} has no {shared.WEIGHTS} with a {shared.CONFIG}: name one of its files, '
            'hf://OWNER/REPOSITORY/FILE.pt'
        )
    return directory


def _kind(sizes: torch_sizes.Sizes) -> str:
    """What a checkpoint holds, in words."""
    if sizes.ar is None:
        return 'a tokenizer'
    if sizes.name:
        return f'SphereAR-{sizes.name}'
    return 'a SphereAR model of sizes of its own'


def _chosen(tree: dict[str, Any], ema: bool) -> str:
    """Which of a checkpoint's entries the weights come from, in words."""
    if ema and tree.get('ema'):
        return 'ema'
    return 'model' if tree.get('model') else 'all of the file'


def _opened(path: str, ema: bool, heads: int | None) -> tuple[dict[str, Any], ConfigDict, str]:
    """Opens a file of published weights, see `convert_checkpoint`.

    Returns:
      (tensors by name, the config of their model, what they are in words).
    """
    if re.search(r'-\d+-of-\d+\.safetensors$|\.index\.json$', path):
        raise UserError(f'{path} is a part of several: join them into one safetensors file first')
    is_shared = path.endswith('.safetensors')
    if is_shared:
        tensors = torch_sizes.plain(shared.open_file(path))
        args = None
        chosen = 'all of the file'
    else:
        tree = torch_file.open_file(path)
        tensors = torch_sizes.state_dict(tree, ema)
        args = tree.get('args')
        chosen = _chosen(tree, ema)
    count = f'{len(tensors)} tensors ({chosen})'
    beside = os.path.join(os.path.dirname(path), shared.CONFIG)
    if is_shared and os.path.exists(beside):
        try:
            cfg = shared.config(load_config(os.path.dirname(path)))
        except UserError as error:
            raise UserError(
                f'{beside}: {error}; if it is no config of this model, move it away, and the '
                'tensors alone tell the sizes'
            ) from None
        if heads not in (None, cfg.ar.heads):
            raise UserError(f'--heads is {heads}, but {beside} says {cfg.ar.heads}: leave it out')
        return tensors, cfg, f'the model of its {shared.CONFIG}, {count}'
    if is_shared and heads is None:
        heads = shared.heads(path)
    sizes = torch_sizes.sizes(tensors, args, heads)
    if sizes.ar is not None and sizes.name is None and heads is None:
        print(
            f'attention heads: {sizes.ar["heads"]}, the width over 64, since shapes do not tell; '
            '--heads=N names another number',
            flush=True,
        )
    return tensors, checks.check(recipes.of_checkpoint(sizes)), f'{_kind(sizes)}, {count}'


def _write_weights(workdir: str, stage: str, model: VAE | AR, tensors: dict[str, Any]) -> None:
    """Writes WORKDIR/STAGE/weights, the parameters of one model, from a checkpoint's tensors."""
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    show = console.bar(len(torch_names.torch_shapes(shapes)), stage, 'tensor')
    leaves, tree_def = jax.tree.flatten(torch_names.from_torch(tensors, shapes, show))
    # One leaf at a time, so that the parameters are in memory only once.
    for i in range(len(leaves)):
        leaves[i] = jax.block_until_ready(jax.device_put(leaves[i]))
    with contextlib.closing(checkpoint.Checkpoints(f'{workdir}/{stage}/weights')) as weights:
        weights.save(0, jax.tree.unflatten(tree_def, leaves), {}, 0.0)
        del leaves


def convert_checkpoint(
    source: str,
    workdir: str,
    *,
    ema: bool = True,
    heads: int | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Converts a PyTorch checkpoint to a run: WORKDIR with config.json and weights.

    The other modes take it as a trained run. The conversion needs no PyTorch, and as much memory as
    the parameters have in float32. If it is killed, it leaves no run, and starts from the beginning
    when it is repeated.

    Args:
      source: FILE.pt, FILE.safetensors or hf://OWNER/REPOSITORY/FILE. A safetensors file that has a
        config.json beside it is of that config's model.
      workdir: the directory to write.
      ema: whether to prefer the EMA weights.
      heads: attention heads of an AR model that was not published, see `torch_sizes.sizes`.
      like: a config whose model the checkpoint's must be, or None.

    Raises:
      UserError: the checkpoint is none of SphereAR's, is damaged, or holds another model than
        `like`; or the workdir has a run already, or is in use, or cannot be written.
    """
    with files.owned(workdir, 'a conversion'):
        _convert(source, workdir, ema, heads, like)


def _convert(
    source: str, workdir: str, ema: bool, heads: int | None, like: ConfigDict | None
) -> None:
    """Does what `convert_checkpoint` says, in a workdir that is locked."""
    if epath.Path(workdir, 'config.json').exists() or has(workdir, 'checkpoints'):
        raise UserError(f'{workdir} has a run already: use another --workdir')
    local = _local(source)
    tensors, cfg, kind = _opened(local, ema, heads)
    has_ar = not all(name.startswith('vae.') for name in tensors)
    changed = [] if like is None else other_model(like, cfg, not has_ar)
    if changed:
        raise UserError(f'{source} holds another model than --config ({"; ".join(changed)})')
    height, width = cfg.vae.grid
    print(f'{source}: {kind}, grid {height}x{width}', flush=True)
    models: dict[str, VAE | AR] = {'tokenizer': build.build_vae(cfg)}
    if has_ar:
        models['ar'] = build.build_ar(cfg)
    # What is there comes from a conversion that broke off, perhaps of another file.
    for stage in ('tokenizer', 'ar'):
        epath.Path(workdir, stage, 'weights').rmtree(missing_ok=True)
    epath.Path(workdir, shared.CLASSES).unlink(missing_ok=True)
    for stage, model in models.items():
        _write_weights(workdir, stage, model, tensors)
    beside = os.path.dirname(local)
    if shared.is_shared(beside):
        class_names.keep(workdir, class_names.of_run(beside, cfg))
    files.write_json(f'{workdir}/config.json', schema.as_dict(cfg))
    print(f'converted to {workdir}: --mode=sample, grid, evaluate and train take it')


def converted_once(source: str) -> str:
    """Converts a checkpoint of Hugging Face into the user's cache, the first time it is asked for.

    Args:
      source: hf://OWNER/REPOSITORY/FILE.

    Returns:
      The workdir, below ~/.cache/sphere_ar_jax/converted. Each revision of the file has its own.

    Raises:
      UserError: as `convert_checkpoint`.
    """
    local = _local(source)
    # Hugging Face's cache has a file at …/models--OWNER--REPOSITORY/snapshots/REVISION/FILE.
    *_, inside = local.rpartition('/snapshots/')
    name = '--'.join([*source.removeprefix('hf://').split('/'), inside.split('/')[0]])
    workdir = os.path.join(files.user_cache(os.environ), 'converted', name)
    if not os.path.exists(os.path.join(workdir, 'config.json')):
        convert_checkpoint(local, workdir)
    return workdir


def _done(workdir: str, stage: str) -> int | None:
    """The steps of a stage's newest checkpoint, None where it was converted or is not there."""
    return max(saved_steps(workdir, stage), default=None)


def _card(workdir: str, run: Run, source: str | None) -> str:
    """The model card of a run, see `model_card`."""
    cfg = run.config
    *_, (first, origin) = tokenizer_chain(workdir)
    done = {'tokenizer': _done(first, 'tokenizer'), 'ar': _done(workdir, 'ar')}
    trainings = {'tokenizer': origin.tokenizer_training, 'ar': cfg.ar_training}
    # The scores at the end of a run are those of its last step alone.
    finished = all(
        steps is None or steps >= trainings[stage].steps or (stage == 'tokenizer' and cfg.tokenizer)
        for stage, steps in done.items()
    )
    return model_card.text(
        run,
        class_names.of_run(workdir, cfg),
        {
            stage: None if steps is None else (steps, trainings[stage].batch_size)
            for stage, steps in done.items()
        },
        model_card.scores(workdir, run, finished),
        source,
    )


def _check_place(path: str) -> None:
    """Raises UserError unless shared weights may be written to a directory."""
    if files.is_remote(path):
        raise UserError(f'--output is {path}: give a directory of this machine')
    if os.path.isfile(path) or path.endswith('.pt'):
        raise UserError(f'--output is {path}: give a directory, or FILE.safetensors')
    if os.path.exists(os.path.join(path, shared.CONFIG)) and not shared.is_shared(path):
        raise UserError(f'{path} holds another {shared.CONFIG}: give another --output')


def _write_directory(workdir: str, run: Run, path: str, source: str | None) -> None:
    """Writes a directory to share, see `shared`. A model card that is there stays."""
    _check_place(path)
    config = schema.as_dict(shared.config(run.config))
    _write_file(run, os.path.join(path, shared.WEIGHTS))
    files.write_json(os.path.join(path, shared.CONFIG), config)
    names = class_names.of_run(workdir, run.config)
    classes = os.path.join(path, shared.CLASSES)
    if names is not None:
        files.write_json(classes, list(names))
    elif os.path.exists(classes):  # of another run that was exported here before
        os.remove(classes)
    card = os.path.join(path, shared.CARD)
    if os.path.exists(card):
        print(f'{card} is there already and stays as it is; without it, it is written anew')
    else:
        files.write_bytes(card, _card(workdir, run, source).encode())


def _require_public(run: Run) -> None:
    """Raises UserError for a run that has parts that the public code lacks."""
    if run.ar_params is None:
        torch_names.require_public(run.vae)
    else:
        torch_names.require_public(run.vae, run.ar.head, run.ar.condition)


def _write_file(run: Run, path: str) -> None:
    """Writes the weights of a run to a safetensors file. Raises UserError where it cannot."""
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as temporary:
        try:
            heads = None if run.ar_params is None else run.ar.heads
            torch_names.export(temporary, run.vae, run.vae_params, run.ar_params, heads)
        except safetensors.SafetensorError as error:
            raise UserError(f'{path} cannot be written ({first_line(error)})') from None


def _uploader(push: str) -> Any:
    """huggingface_hub's client, once a repository can be pushed to.

    Raises:
      UserError: the name is none, or there is no token.
    """
    hub = _hub('--push')
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', push):
        raise UserError(f'--push is {push}, but must be USER/NAME')
    if not hub.get_token():
        raise UserError('--push needs a token of Hugging Face: set HF_TOKEN, or `hf auth login`')
    return hub.HfApi()


def _upload(api: Any, path: str, push: str) -> None:
    """Uploads a directory to share to a repository, which is made if there is none."""
    try:
        api.create_repo(push, exist_ok=True)
        api.upload_folder(repo_id=push, folder_path=path, allow_patterns=list(shared.FILES))
    except Exception as error:  # See `_local`.
        raise UserError(f'--push={push}: {first_line(error)}; {path} is written') from None
    print(f"pushed to hf://{push}: sphere_ar_jax.load('hf://{push}') opens it")


def export_checkpoint(
    workdir: str,
    output: str | None = None,
    push: str | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Writes the weights of a run to a safetensors file, or to a directory to share.

    Names and shapes of the S-VAE and the AR model are the published ones.

    Args:
      workdir: the directory of the run; one without an AR model gives its tokenizer alone.
      output: FILE.safetensors for the weights alone, else a directory, see `shared`. If it is None,
        it is WORKDIR/model.safetensors, or with `push` the directory WORKDIR/export.
      push: USER/NAME, a repository of Hugging Face that the directory is uploaded to.
      like: a config whose sampler is taken, and with it the EMA; see `open_run.open_run`.

    Raises:
      UserError: the run cannot be read, or has parts that the public code lacks, or the files
        cannot be written or uploaded.
      OSError: likewise.
    """
    path = output or f'{workdir}/{shared.WEIGHTS if push is None else "export"}'
    is_file = path.endswith('.safetensors')
    api = None
    if push is not None:
        if is_file:
            raise UserError(f'--output is {path}, but --push uploads a directory: give one')
        api = _uploader(push)
    if not is_file:
        _check_place(path)
    teacher = open_run.config_of(workdir).init_from
    if teacher is not None:
        raise UserError(
            f'{workdir} has a distilled head, which the public code lacks: export the run that it '
            f'was distilled from, {teacher}'
        )
    has_ar = epath.Path(workdir, 'ar').is_dir() or shared.has_ar(workdir)
    run, _ = open_run.open_run(workdir, like, tokenizer_only=not has_ar)
    _require_public(run)
    if is_file:
        _write_file(run, path)
    else:
        _write_directory(workdir, run, path, None if push is None else f'hf://{push}')
    print(f'wrote {path}')
    if push is not None:
        _upload(api, path, push)
