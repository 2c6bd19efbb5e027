"""--mode=convert and --mode=export: read PyTorch checkpoints, write weights as published."""

import contextlib
import os
import shutil
from typing import Any

import jax
import safetensors
from etils import epath
from ml_collections import ConfigDict

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import build, checks, recipes, schema
from sphere_ar_jax.interop import torch_file, torch_names, torch_sizes
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime import checkpoint, console, files
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.training.workdir import has, other_model


def _local(source: str) -> str:
    """The path of a checkpoint on this machine.

    hf://OWNER/REPOSITORY/FILE is fetched into Hugging Face's cache, with a progress bar.
    """
    if not source.startswith('hf://'):
        return source
    parts = source.removeprefix('hf://').split('/', 2)
    if len(parts) < 3 or not parts[2]:
        raise UserError(f'{source} must be hf://OWNER/REPOSITORY/FILE')
    owner, repository, file = parts
    try:
        import huggingface_hub
    except ImportError:
        raise UserError('hf:// needs another package: pip install huggingface_hub') from None
    try:
        return huggingface_hub.hf_hub_download(f'{owner}/{repository}', file)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(f'{source}: {first_line(error)}') from None


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
      source: FILE.pt or hf://OWNER/REPOSITORY/FILE.
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
    tree = torch_file.open_file(_local(source))
    tensors = torch_sizes.state_dict(tree, ema)
    sizes = torch_sizes.sizes(tensors, tree.get('args'), heads)
    cfg = checks.check(recipes.of_checkpoint(sizes))
    changed = [] if like is None else other_model(like, cfg, sizes.ar is None)
    if changed:
        raise UserError(f'{source} holds another model than --config ({"; ".join(changed)})')
    height, width = cfg.vae.grid
    print(
        f'{source}: {_kind(sizes)}, {len(tensors)} tensors ({_chosen(tree, ema)}), '
        f'grid {height}x{width}',
        flush=True,
    )
    models: dict[str, VAE | AR] = {'tokenizer': build.build_vae(cfg)}
    if sizes.ar is not None:
        models['ar'] = build.build_ar(cfg)
    # What is there comes from a conversion that broke off, perhaps of another file.
    for stage in ('tokenizer', 'ar'):
        shutil.rmtree(f'{workdir}/{stage}/weights', ignore_errors=True)
    for stage, model in models.items():
        _write_weights(workdir, stage, model, tensors)
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


def export_checkpoint(workdir: str, output: str | None = None) -> None:
    """Writes the weights of a run to a safetensors file.

    Names and shapes of the S-VAE and the AR model are the published ones.

    Args:
      workdir: the directory of the run; one without an AR model gives its tokenizer alone.
      output: the file, WORKDIR/model.safetensors if None.

    Raises:
      UserError: the run cannot be read, or the file cannot be written.
      OSError: likewise.
    """
    path = output or f'{workdir}/model.safetensors'
    run, _ = open_run.open_run(workdir, tokenizer_only=not epath.Path(workdir, 'ar').is_dir())
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as temporary:
        try:
            torch_names.export(temporary, run.vae, run.vae_params, run.ar_params)
        except safetensors.SafetensorError as error:
            raise UserError(f'{path} cannot be written ({first_line(error)})') from None
    print(f'wrote {path}')
