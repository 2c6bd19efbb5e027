"""Opens the run of a workdir as every command but training needs it."""

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import beside, checks, packaged
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.run import Run, load_config, load_run
from sphere_ar_jax.training.workdir import other_model


def has_run(workdir: str) -> bool:
    """Whether there is a run in a workdir."""
    return epath.Path(workdir, 'config.json').exists()


def config_of(workdir: str) -> ConfigDict:
    """The config of the run in a workdir.

    Raises:
      UserError: there is no run, or its config is damaged.
    """
    if not has_run(workdir):
        raise UserError(f'{workdir} {packaged.NO_RUN}')
    return load_config(workdir)


def open_run(
    workdir: str, like: ConfigDict | None = None, tokenizer_only: bool = False
) -> tuple[Run, Mesh]:
    """The run of a workdir, with its parameters on a mesh.

    Args:
      workdir: the directory of a trained or converted run.
      like: a config of the same model, which decides what `config.beside` says.
      tokenizer_only: leaves the AR model's parameters None; `like` may then have another AR model.

    Returns:
      (run, mesh).

    Raises:
      UserError: there is no run, or `like` has another model or impossible values.
    """
    cfg = config_of(workdir)
    if like is not None:
        changed = other_model(cfg, like, tokenizer_only)
        if changed:
            raise UserError(f'{workdir} holds another model than --config ({"; ".join(changed)})')
        cfg = checks.check(beside.for_the_model(cfg, like))
    mesh = sharding.make_mesh(**cfg.mesh)
    run = load_run(workdir, mesh, tokenizer_only, cfg)
    params = {'ar': run.ar_params, 'tokenizer': run.vae_params}
    said = sharding.describe_not_split(mesh, params)
    if said:
        print(said, flush=True)
    return run, mesh
