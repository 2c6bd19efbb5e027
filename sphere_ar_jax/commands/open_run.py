"""Opens the run of a workdir as every command but training needs it."""

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import checks, schema
from sphere_ar_jax.runtime import files, sharding
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
        raise UserError(f'{workdir} has no run: train one, or --mode=convert a checkpoint')
    return load_config(workdir)


def data_config(workdir: str, like: ConfigDict | None = None) -> ConfigDict:
    """The config of a run for opening the images that it was trained on.

    Its seed is the run's own, which decides what is held out, whatever seed draws.

    Args:
      workdir: the directory of the run.
      like: a config that may say where the images are now.

    Raises:
      UserError: there is no run, its config is damaged, or `like` names images of another kind.
    """
    cfg = config_of(workdir)
    if like is None:
        return cfg
    if like.data.name != cfg.data.name:
        if like.data.path is not None:
            raise UserError(
                f'{workdir} was trained on data {cfg.data.name}, but --config names data '
                f'{like.data.name}: give images of the same kind'
            )
        return cfg
    places = {f'data.{key}': like.data[key] for key in ('path', 'captions', 'data_dir')}
    return schema.changed(cfg, {key: place for key, place in places.items() if place is not None})


def open_run(
    workdir: str, like: ConfigDict | None = None, tokenizer_only: bool = False
) -> tuple[Run, Mesh]:
    """The run of a workdir, with its parameters on a mesh.

    Args:
      workdir: the directory of a trained or converted run.
      like: a config whose sampling, seed, dtype, `ar.fused` and mesh are taken instead of the run's
        own, and whose `tokenizer` and `ar.features` if they are given. It must have the same model
        as the run.
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
        # A placeholder of one config does not take the value of another config's placeholder, but
        # resolved values can be replaced.
        cfg = cfg.copy_and_resolve_references()
        cfg.sampling.update(like.sampling)
        cfg.seed = like.seed
        cfg.dtype = like.dtype
        cfg.ar.fused = like.ar.fused
        if like.tokenizer is not None:  # the tokenizer's workdir was moved
            cfg.tokenizer = files.absolute(like.tokenizer)
        if like.ar.features is not None:  # likewise, or it has other texts
            cfg.ar.features = files.absolute(like.ar.features)
        cfg.mesh.update(like.mesh)
        checks.check(cfg)
    mesh = sharding.make_mesh(**cfg.mesh)
    run = load_run(workdir, mesh, tokenizer_only, cfg)
    params = {'ar': run.ar_params, 'tokenizer': run.vae_params}
    said = sharding.describe_not_split(mesh, params)
    if said:
        print(said, flush=True)
    return run, mesh
