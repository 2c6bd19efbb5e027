"""--mode=convert and --mode=export: published PyTorch checkpoints in, our weights out."""

import os
import shutil

import jax
from etils import epath

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import build, checks, recipes, schema
from sphere_ar_jax.interop import torch_file, torch_names, torch_sizes
from sphere_ar_jax.runtime import checkpoint, console, files
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.training.workdir import has, other_model


def _local(source):
    """The path of a checkpoint; hf://OWNER/REPOSITORY/FILE is fetched into Hugging Face's cache,
    with a bar.
    """
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
        raise UserError(f'{source}: {first_line(error)}') from None


def convert_checkpoint(source, workdir, *, ema=True, heads=None, like=None):
    """A PyTorch checkpoint → WORKDIR with config.json and weights, which the other jobs take as a
    trained run.

    Needs the parameters' size in memory, float32, and no PyTorch. Killed, it leaves no run; again,
    it starts anew.

    Args:
      source: FILE.pt or hf://OWNER/REPOSITORY/FILE. ema: prefer EMA weights. heads: of the AR
        model, see `torch_sizes.sizes`. like: a config whose model the checkpoint's must be, or
        None.
    """
    if epath.Path(workdir, 'config.json').exists() or has(workdir, 'checkpoints'):
        raise UserError(f'{workdir} has a run already: use another --workdir')
    tree = torch_file.open_file(_local(source))
    tensors = torch_sizes.state_dict(tree, ema)
    sizes = torch_sizes.sizes(tensors, tree.get('args'), heads)
    cfg = checks.check(recipes.of_checkpoint(sizes))
    changed = [] if like is None else other_model(like, cfg, sizes.ar is None)
    if changed:
        raise UserError(f'{source} holds another model than --config ({"; ".join(changed)})')
    name = f'SphereAR-{sizes.name}' if sizes.name else 'a SphereAR model of sizes of its own'
    name = 'a tokenizer' if sizes.ar is None else name
    chosen = (
        'ema' if ema and tree.get('ema') else 'model' if tree.get('model') else 'all of the file'
    )
    print(
        f'{source}: {name}, {len(tensors)} tensors ({chosen}), grid {cfg.vae.grid[0]}x{cfg.vae.grid[1]}',
        flush=True,
    )
    models = {'tokenizer': build.build_vae(cfg)} | (
        {} if sizes.ar is None else {'ar': build.build_ar(cfg)}
    )
    for stage in ('tokenizer', 'ar'):  # of a conversion that broke off, perhaps of another file
        shutil.rmtree(f'{workdir}/{stage}/weights', ignore_errors=True)
    for stage, model in models.items():
        shapes = jax.eval_shape(model.init_params, jax.random.key(0))
        show = console.bar(len(torch_names.torch_shapes(shapes)), stage, 'tensor')
        weights = checkpoint.Checkpoints(f'{workdir}/{stage}/weights')
        leaves, tree_def = jax.tree.flatten(torch_names.from_torch(tensors, shapes, show))
        for i in range(len(leaves)):  # one by one: all of it is in memory once
            leaves[i] = jax.block_until_ready(jax.device_put(leaves[i]))
        weights.save(0, tree_def.unflatten(leaves), {}, 0.0)
        del leaves
        weights.close()
    files.write_json(f'{workdir}/config.json', schema.as_dict(cfg))
    print(f'converted to {workdir}: --mode=sample, grid, evaluate and train take it')


def export_checkpoint(workdir, output=None):
    """The weights of a run → a safetensors file with the public names, S-VAE and AR model as
    published.
    """
    path = output or f'{workdir}/model.safetensors'
    run, _ = open_run.open_run(workdir, tokenizer_only=not epath.Path(workdir, 'ar').is_dir())
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch_names.export(f'{path}.tmp', run.vae, run.vae_params, run.ar_params)
    os.replace(f'{path}.tmp', path)
    print(f'wrote {path}')
