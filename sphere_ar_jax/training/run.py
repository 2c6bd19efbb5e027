"""Trained runs, read from their workdirs."""

import json
import os
from typing import Any, NamedTuple

from etils import epath

from sphere_ar_jax.config import build, checks
from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import adversarial, stages, state


class Run(NamedTuple):
    """A training run as `load_run` reads it: the config, both models and the parameters to sample
    with.
    """

    config: Any
    vae: Any
    vae_params: Any
    ar: Any
    ar_params: Any


def load_config(workdir):
    """The config of a run. Raises OSError where there is none, UserError for a file that is no
    config of ours.
    """
    path = epath.Path(workdir, 'config.json')
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f'there is no run in {workdir}') from None
    try:
        return checks.from_dict(json.loads(text))
    except UserError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f'{path} is no config of ours: use another --workdir') from None


def load_run(workdir, mesh=None, tokenizer_only=False, cfg=None):
    """Reads the newest whole checkpoints of both stages in a workdir of `main`; parameters are EMA
    where there is one.

    A workdir that was converted from a PyTorch checkpoint and not trained since gives those
    parameters. One with a distilled head gives that head, and all else comes from the workdir that
    it was distilled from.

    Args:
      mesh: where the parameters go, all devices if None. tokenizer_only: leave the AR model's
        parameters None.
      cfg: in place of the run's own config, of the same models.
    Raises:
      OSError: there is no run, or no checkpoint of a stage yet. UserError: the head was distilled
        from a distilled one,
      or the tokenizer is another than the AR model's.
    """
    cfg = load_config(workdir) if cfg is None else cfg
    rates, rate = state.ema_decays(cfg.ar_training), cfg.sampling.ema_decay
    chosen = None if rate is None else rates.index(rate)
    vae, ar, mesh = build.build_vae(cfg), build.build_ar(cfg), mesh or sharding.make_mesh()

    def restore(stage):
        checkpoints = checkpoint.Checkpoints(
            os.path.join(workdir, stage.name, 'checkpoints'), read_only=True
        )
        like = state.abstract_state(stage, mesh)
        found = checkpoints.restore(like)
        checkpoints.close()
        if found is not None:
            frozen = state.frozen_identity(stage)
            state.check_frozen(stage, frozen, found[1], os.path.join(workdir, stage.name))
            return (
                found[0].ema[chosen]
                if stage.name == 'ar' and chosen is not None
                else found[0].eval_params
            )
        weights = state.converted(os.path.join(workdir, stage.name), like.params)
        if weights is None:
            raise FileNotFoundError(f'{workdir} has no checkpoint of the stage {stage.name} yet')
        return weights

    if cfg.init_from is not None:
        if os.path.realpath(cfg.init_from) == os.path.realpath(workdir):
            raise UserError(f'{workdir} is distilled from itself')
        teacher = load_teacher(cfg.init_from, mesh)
        head = restore(
            stages.distillation_stage(
                ar, vae, teacher.vae_params, teacher.ar_params, cfg.distillation_training, cfg.seed
            )
        )
        return Run(cfg, vae, teacher.vae_params, ar, teacher.ar_params | {'head': head})
    if cfg.tokenizer is None:
        vae_params = restore(adversarial.tokenizer_stage(vae, cfg.tokenizer_training, cfg.seed))
    else:
        vae_params = load_run(cfg.tokenizer, mesh, tokenizer_only=True).vae_params
    if tokenizer_only:
        return Run(cfg, vae, vae_params, ar, None)
    return Run(
        cfg,
        vae,
        vae_params,
        ar,
        restore(stages.ar_stage(ar, vae, vae_params, cfg.ar_training, cfg.seed)),
    )


def load_teacher(workdir, mesh=None):
    """`load_run` of a run to distil from. Raises UserError as well where its head is a distilled
    one itself.
    """
    run = load_run(workdir, mesh)
    if run.config.init_from is not None:
        raise UserError(f'{workdir} has a distilled head: distil from the run that trained it')
    return run
