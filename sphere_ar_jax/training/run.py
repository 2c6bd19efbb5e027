"""Trained runs, read from their workdirs."""

import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, checks, fine_tuning, schema
from sphere_ar_jax.data.captions import vocabulary
from sphere_ar_jax.interop import shared
from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime import checkpoint, files, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import adversarial, stages, standardisation, state
from sphere_ar_jax.training.tuning import tuned


class Run(NamedTuple):
    """A training run as `load_run` reads it.

    Attributes:
      config: its config.
      vae: the tokenizer.
      vae_params: the tokenizer's parameters to sample with.
      ar: the AR model.
      ar_params: the AR model's parameters to sample with, None if they were not asked for.
    """

    config: ConfigDict
    vae: VAE
    vae_params: PyTree
    ar: AR
    ar_params: PyTree


def load_config(workdir: str | os.PathLike[str]) -> ConfigDict:
    """Reads the config of a run.

    Args:
      workdir: the run's workdir.

    Returns:
      The checked config.

    Raises:
      OSError: there is no run.
      UserError: the file is not a sphere_ar_jax config.
    """
    path = epath.Path(workdir, 'config.json')
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f'there is no run in {workdir}') from None
    try:
        values = json.loads(content)
        if 'vocabulary' in values.get('ar', {}):
            values['ar']['vocabulary'] = vocabulary.of_run(values['ar']['vocabulary'], workdir)
        return checks.from_dict(values)
    except UserError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise UserError(
            f'{path} is not a sphere_ar_jax config: use another --workdir, or remove the file, and '
            "training with the run's own --config writes it again"
        ) from None


def apart(run: Run) -> Run:
    """Brings a run into the layout that sampling needs, see `ar.unstacked`.

    Who draws and keeps the run in its other layout has the AR model's parameters in memory twice.
    """
    ar, ar_params = unstacked(run.ar, run.ar_params)
    return run._replace(ar=ar, ar_params=ar_params)


def tokenizer_chain(workdir: str | os.PathLike[str]) -> Iterator[tuple[str, ConfigDict]]:
    """Yields a workdir and its config, then those that its tokenizer comes from.

    The last one trained the tokenizer, or converted it.

    Raises:
      OSError: see `load_config`.
      UserError: see `load_config`; or the workdirs take the tokenizer from one another.
    """
    seen: list[str] = []
    place = os.fspath(workdir)
    while place is not None:
        if any(files.is_same(place, other) for other in seen):
            raise UserError(f'{place} takes its tokenizer from itself, by {seen[-1]}')
        seen.append(place)
        cfg = load_config(place)
        yield place, cfg
        place = cfg.tokenizer


def of_rate(training: ConfigDict, rate: float | None) -> Callable[[state.TrainState], PyTree]:
    """Makes the function that takes the parameters to sample with out of a state.

    Args:
      training: the section of the config that trained the stage.
      rate: of the EMA; 0 takes the weights themselves, None the stage's `eval_params`.
    """

    def chosen(whole: state.TrainState) -> PyTree:
        if rate is None:
            return whole.eval_params
        if rate == 0:
            return whole.params
        return whole.ema[state.ema_decays(training).index(rate)]

    return chosen


def _from_checkpoint(
    stage: state.Stage,
    workdir: str | os.PathLike[str],
    mesh: Mesh,
    part: Callable[[state.TrainState], PyTree],
) -> PyTree | None:
    """Reads a part of a stage's newest state, None where there is no checkpoint.

    Raises:
      UserError: it was trained on other frozen parameters than the stage has.
    """
    directory = os.path.join(workdir, stage.name)
    checkpoints = checkpoint.Checkpoints(os.path.join(directory, 'checkpoints'), read_only=True)
    restored = checkpoints.restore(state.abstract_state(stage, mesh), part)
    checkpoints.close()
    if restored is None:
        return None
    found, data_state, _ = restored
    state.check_frozen(stage, state.frozen_identity(stage), data_state, directory)
    return found


def _restore(
    stage: state.Stage,
    workdir: str | os.PathLike[str],
    mesh: Mesh,
    rate: float | None = None,
) -> PyTree:
    """Reads the parameters of a stage's model to sample with, and nothing else of its state.

    Args:
      stage: the stage.
      workdir: the run's workdir.
      mesh: where the parameters go.
      rate: of the EMA that is taken, see `of_rate`.

    Raises:
      FileNotFoundError: there is no checkpoint yet.
      UserError: there are converted or shared weights, which have no EMA of another rate.
    """
    params = _from_checkpoint(stage, workdir, mesh, of_rate(stage.options, rate))
    if params is not None:
        return stage.to_model(params)
    directory = os.path.join(workdir, stage.name)
    like = state.abstract_state(stage, mesh)
    weights = None if stage.begin is not None else state.converted(directory, like.params)
    if weights is None:
        weights = shared.read(workdir, like.params)
    if weights is None:
        raise FileNotFoundError(f'{workdir} has no checkpoint of the stage {stage.name} yet')
    # What earlier versions shared may name the rate that was shared.
    if rate is not None and rate != load_config(workdir).sampling.ema_decay:
        raise UserError(
            f'sampling.ema_decay is {rate:g}, but {workdir} holds converted or shared weights, '
            'which have no other EMA: leave it out'
        )
    return weights


def check_origin(stage: state.Stage, workdir: str | os.PathLike[str], mesh: Mesh) -> None:
    """Checks that a stage's checkpoints were trained on its frozen parameters.

    Nothing of the checkpoints is read but what they note.

    Raises:
      UserError: they were trained on others.
    """
    _from_checkpoint(stage, workdir, mesh, lambda whole: whole.step)


def load_tokenizer(cfg: ConfigDict, mesh: Mesh) -> PyTree:
    """Reads the parameters of the tokenizer in the workdir that `cfg.tokenizer` names.

    Raises:
      OSError: there is no run, or no checkpoint of its tokenizer yet.
      UserError: its tokenizer is another model than the config's.
    """
    theirs = load_config(cfg.tokenizer)
    found = schema.differences(schema.as_dict(theirs), schema.as_dict(cfg))
    changed = [difference for difference in found if difference.startswith('vae.')]
    if changed:
        raise UserError(
            f'{cfg.tokenizer} has another tokenizer ({"; ".join(changed)}) than this config'
        )
    return load_run(cfg.tokenizer, mesh, tokenizer_only=True).vae_params


def load_run(
    workdir: str | os.PathLike[str],
    mesh: Mesh | None = None,
    tokenizer_only: bool = False,
    cfg: ConfigDict | None = None,
) -> Run:
    """Reads the newest whole checkpoints of both stages in a workdir of `main`.

    Parameters are EMAs where there are any. A workdir that was converted from a PyTorch checkpoint
    and not trained since gives the converted parameters. A workdir with a distilled head gives that
    head; all else comes from the workdir that it was distilled from.

    Args:
      workdir: the run's workdir.
      mesh: where the parameters go, all devices if None.
      tokenizer_only: leave the AR model's parameters None.
      cfg: a config of the same models, in place of the run's own.

    Returns:
      The run.

    Raises:
      OSError: there is no run, or no checkpoint of a stage yet.
      UserError: the head was distilled from itself or from a distilled one, or the tokenizer is not
        the one that the AR model was trained with.
    """
    if cfg is None:
        cfg = load_config(workdir)
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)
    if mesh is None:
        mesh = sharding.make_mesh()
    if cfg.init_from is not None:
        if files.is_same(cfg.init_from, workdir):
            raise UserError(f'{workdir} is distilled from itself')
        vae_params = load_teacher(cfg, mesh, tokenizer_only=True).vae_params
    elif cfg.tokenizer is not None and files.is_same(cfg.tokenizer, workdir):
        raise UserError(
            f'{workdir} names itself as the run that has its tokenizer: give --config.tokenizer=DIR'
        )
    elif cfg.tokenizer is None:
        tokenizer = adversarial.tokenizer_stage(vae, cfg.tokenizer_training)
        vae_params = _restore(tokenizer, workdir, mesh)
    else:
        vae_params = load_tokenizer(cfg, mesh)
    run = Run(cfg, vae, vae_params, ar, None)
    return run if tokenizer_only else with_ar(run, workdir, mesh)


def with_ar(run: Run, workdir: str | os.PathLike[str], mesh: Mesh | None = None) -> Run:
    """Reads the AR model of a run whose tokenizer alone was read.

    Args:
      run: the run, from `load_run(workdir, mesh, tokenizer_only=True)`.
      workdir: the run's workdir.
      mesh: where the parameters go, all devices if None.

    Returns:
      The run as `load_run` gives it.

    Raises:
      OSError: see `load_run`.
      UserError: see `load_run`.
    """
    cfg = run.config
    if mesh is None:
        mesh = sharding.make_mesh()
    if cfg.init_from is not None:
        theirs = _teacher_config(cfg)
        vae = build.build_vae(theirs)
        teacher = Run(theirs, vae, run.vae_params, build.build_ar(theirs), None)
        teacher = with_ar(teacher, cfg.init_from, mesh)
        distillation = stages.distillation_stage(
            run.ar,
            run.vae,
            teacher.vae_params,
            teacher.ar_params,
            cfg.distillation_training,
        )
        trained = _restore(distillation, workdir, mesh, cfg.sampling.ema_decay)
        ar_params = stages.student_params(teacher.ar_params, trained, cfg.distillation_training)
        return run._replace(vae_params=teacher.vae_params, ar_params=ar_params)
    vae_params = standardisation.read(run.vae, run.vae_params, workdir)
    stage = stages.ar_stage(run.ar, run.vae, vae_params, cfg.ar_training)
    tuning = fine_tuning.read(cfg.fine_tuning)
    stage = tuned.of_workdir(stage, tuning, os.path.join(workdir, 'ar'), mesh)
    ar_params = _restore(stage, workdir, mesh, cfg.sampling.ema_decay)
    return run._replace(vae_params=vae_params, ar_params=ar_params)


def _teacher_config(cfg: ConfigDict) -> ConfigDict:
    """Reads the config of the run in cfg.init_from; arguments and errors as of `load_teacher`."""
    teacher = load_config(cfg.init_from)
    if teacher.init_from is not None:
        raise UserError(
            f'{cfg.init_from} has a distilled head: distil from the run that trained it'
        )
    if teacher.tokenizer is None or cfg.tokenizer is None:
        return teacher
    if not epath.Path(teacher.tokenizer, 'config.json').exists():
        return schema.changed(teacher, {'tokenizer': cfg.tokenizer})
    return teacher


def load_teacher(cfg: ConfigDict, mesh: Mesh | None = None, tokenizer_only: bool = False) -> Run:
    """Reads the run to distil from, in cfg.init_from, as `load_run` does.

    Args:
      cfg: the config of the distillation. Its `tokenizer` says where that of the teacher is now, if
        it lies in a workdir of its own.
      mesh: where the parameters go, all devices if None.
      tokenizer_only: leave the AR model's parameters None.

    Returns:
      The run.

    Raises:
      OSError: as `load_run`.
      UserError: as `load_run`, or the run's head is a distilled one itself.
    """
    return load_run(cfg.init_from, mesh, tokenizer_only, _teacher_config(cfg))
