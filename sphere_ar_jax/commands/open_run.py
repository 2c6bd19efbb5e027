"""Opens the run of a workdir as every command but training needs it."""

from etils import epath

from sphere_ar_jax.config import checks
from sphere_ar_jax.runtime import files, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.run import load_config, load_run
from sphere_ar_jax.training.workdir import other_model


def open_run(workdir, like=None, tokenizer_only=False):
    """(run, mesh) of a workdir; sampling, seed, dtype and mesh as in the config `like`, if given."""
    if not epath.Path(workdir, 'config.json').exists():
        raise UserError(f'{workdir} has no run: train one, or --mode=convert a checkpoint')
    cfg = load_config(workdir)
    if like is not None:
        changed = other_model(cfg, like, tokenizer_only)
        if changed:
            raise UserError(f'{workdir} holds another model than --config ({"; ".join(changed)})')
        cfg = cfg.copy_and_resolve_references()  # placeholders do not take each other's values
        cfg.sampling.update(like.sampling)
        cfg.seed, cfg.dtype = like.seed, like.dtype
        if like.tokenizer is not None:  # it was moved
            cfg.tokenizer = files.absolute(like.tokenizer)
        cfg.mesh.update(like.mesh)
        checks.check(cfg)
    mesh = sharding.make_mesh(**cfg.mesh)
    run = load_run(workdir, mesh, tokenizer_only, cfg)
    if said := sharding.describe_not_split(
        mesh, {'ar': run.ar_params, 'tokenizer': run.vae_params}
    ):
        print(said, flush=True)
    return run, mesh
