"""What a training reads besides images: a tokenizer, a teacher, the run that it is fine-tuned from.

Each is a run of another workdir, which a key of the config names. Features of texts and the files
of LPIPS are read, too.
"""

import shlex
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, fine_tuning, schema
from sphere_ar_jax.data.captions import vocabulary
from sphere_ar_jax.evaluation import class_names
from sphere_ar_jax.interop import shared
from sphere_ar_jax.interop.lpips import check_paths, read
from sphere_ar_jax.runtime import files, sharding
from sphere_ar_jax.runtime.console import UserError, refusal
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training.run import (
    Run,
    load_config,
    load_run,
    load_teacher,
    load_tokenizer,
    tokenizer_chain,
    with_ar,
)
from sphere_ar_jax.training.tuning import transfer, tuned
from sphere_ar_jax.training.workdir import is_converted, is_trained, other_model

_T = TypeVar('_T')


def _opened(key: str, load: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Calls `load` for the workdir that a key of the config names.

    Errors become UserErrors whose message begins with the key, TemporaryErrors where they may pass.
    """
    try:
        return load(*arguments, **options)
    except (OSError, ValueError) as error:
        raise refusal(f'{key}: {error}', may_pass=files.may_pass(error)) from None


def check_finished(key: str, workdir: str) -> None:
    """Raises UserError unless the run in a workdir is finished, or a converted one."""
    if is_converted(workdir):
        return
    if shared.is_shared(workdir):
        raise UserError(
            f'{key}: {workdir} holds shared weights: convert them into a workdir first, by '
            f'{shared.how_to_convert(workdir)}'
        )
    has_ended = epath.Path(workdir, 'metrics.json').exists()
    # A run that is prolonged has ended before.
    if not has_ended or not all(is_trained(workdir, stage) for stage in ('tokenizer', 'ar')):
        raise UserError(f'{key}: {workdir} is not finished: run its own command to the end first')


def _check_vocabulary(key: str, origin: str, theirs: ConfigDict, cfg: ConfigDict) -> None:
    """Raises UserError where a run that is gone on from numbers the words of texts otherwise."""
    if cfg.ar.condition != 'text':
        return
    if not vocabulary.are_same(theirs.ar.vocabulary, cfg.ar.vocabulary):
        raise UserError(
            f'{key}: {origin} has another vocabulary: give --config.ar.vocabulary='
            f'{theirs.ar.vocabulary}'
        )


def _as_flag(value: Any) -> Any:
    """A value of a config as an override writes it: lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


def _check_base(cfg: ConfigDict) -> None:
    """Checks that the run in cfg.fine_tuning.init_from can be trained on.

    Raises:
      UserError: its head is distilled, or its models are others than cfg's.
    """
    key = 'fine_tuning.init_from'
    origin = cfg.fine_tuning.init_from
    theirs = _opened(key, load_config, origin)
    if theirs.init_from is not None:
        raise UserError(f'{key}: {origin} has a distilled head: take the run that trained it')
    changed = [d for d in other_model(theirs, cfg) if not d.startswith('data.num_classes')]
    if changed:
        values = schema.leaves(schema.as_dict(theirs))
        names = [difference.split()[0] for difference in changed]
        as_theirs = shlex.join(f'--config.{name}={_as_flag(values[name])}' for name in names)
        raise UserError(
            f'{key}: {origin} has other models ({"; ".join(changed)}): only the classes may '
            f'differ, give {as_theirs}'
        )
    _check_vocabulary(key, origin, theirs, cfg)


class Base(NamedTuple):
    """A run that is trained on.

    Attributes:
      run: its models.
      rows: for each new class the class of the run whose tokens it takes, see `transfer.origins`.
        None where the model reads texts, whose tokens stay.
    """

    run: Run
    rows: list[int | None] | None


def read_base(cfg: ConfigDict, workdir: str, source: Any, mesh: Mesh) -> Base | None:
    """Reads the run in cfg.fine_tuning.init_from.

    Returns:
      The run, or None where there is none to take, or the workdir has its weights already.

    Raises:
      UserError: it cannot be read or cannot be trained on, or a pattern matches nothing.
    """
    origin = cfg.fine_tuning.init_from
    if origin is None or transfer.is_done(workdir):
        return None
    _check_base(cfg)
    shapes = jax.eval_shape(build.build_ar(cfg).init_params, jax.random.key(0))
    tuned.select(shapes, fine_tuning.read(cfg.fine_tuning))
    tokenizer = _opened('fine_tuning.init_from', load_run, origin, mesh, tokenizer_only=True)
    whole = _opened('fine_tuning.init_from', with_ar, tokenizer, origin, mesh)
    # The tokenizer without the statistics of its latents, which are a file of their own.
    run = whole._replace(vae_params=tokenizer.vae_params)
    if build.has_captions(cfg):
        return Base(run, None)
    old = class_names.of_run(origin, whole.config)
    new = getattr(source, 'class_names', None)
    known = schema.num_classes(whole.config)
    count = schema.num_classes(cfg)
    assert known is not None
    assert count is not None
    return Base(run, transfer.origins(old, new, known, count))


def take_base(cfg: ConfigDict, workdir: str, source: Any, mesh: Mesh, base: Base) -> None:
    """Writes the weights of a run that is trained on into the workdir, and says what is new."""
    origin = cfg.fine_tuning.init_from
    transfer.take(workdir, base.run, origin, base.rows, mesh, tokenizer=cfg.tokenizer is None)
    names = getattr(source, 'class_names', None)
    print(f'weights of {origin}; {transfer.describe(base.rows, names)}', flush=True)


def read_teacher(cfg: ConfigDict, mesh: Mesh) -> Run:
    """The run in cfg.init_from, which a head is distilled from.

    Raises:
      UserError: there is no run, its model is not cfg's own, or it is distilled itself.
    """
    teacher = _opened('init_from', load_teacher, cfg, mesh)
    changed = other_model(teacher.config, cfg)
    # A converted run's config does not tell its data and seed.
    if not is_converted(cfg.init_from):
        found = schema.differences(schema.as_dict(teacher.config), schema.as_dict(cfg))
        of_data = [d for d in found if d.startswith(('data.', 'seed ')) and d not in changed]
        changed += of_data
    if changed:
        raise UserError(
            f'{cfg.init_from} has another model ({"; ".join(changed)}): '
            'a head is distilled from its own'
        )
    _check_vocabulary('init_from', cfg.init_from, teacher.config, cfg)
    return teacher


def read_tokenizer(cfg: ConfigDict, mesh: Mesh) -> PyTree | None:
    """The parameters of the tokenizer in cfg.tokenizer, None where the config names none.

    Raises:
      UserError: there is no such run, or its tokenizer is not cfg's own model.
    """
    if cfg.tokenizer is None:
        return None
    return _opened('tokenizer', load_tokenizer, cfg, mesh)


def _with_lpips(cfg: ConfigDict) -> bool:
    """Whether a tokenizer is to be trained with LPIPS."""
    t = cfg.tokenizer_training
    return bool(t.steps and t.perceptual_weight and cfg.tokenizer is None and cfg.init_from is None)


def read_lpips(cfg: ConfigDict, mesh: Mesh) -> PyTree | None:
    """LPIPS' parameters, on all devices, or None where no tokenizer is trained with them."""
    if not _with_lpips(cfg):
        return None
    t = cfg.tokenizer_training
    return jax.device_put(read(t.lpips, t.vgg), sharding.whole(mesh))


def _tokenizer_places(directory: str) -> list[str]:
    """A workdir, and those that its tokenizer comes from."""
    return [place for place, _ in tokenizer_chain(directory)]


def _check_origin(key: str, directory: str, workdir: str | None) -> None:
    """Checks that a run that the config names can be read, and is trained to its end.

    Args:
      key: the key that names it.
      directory: its workdir.
      workdir: that of the training, None where not known.
    """
    if workdir is not None and files.is_same(directory, workdir):
        raise UserError(f'{key}: {directory} is this --workdir: give another --workdir')
    _opened(key, load_config, directory)
    if key != 'tokenizer':
        check_finished(key, directory)
        return
    for place in _opened(key, _tokenizer_places, directory):
        if workdir is not None and files.is_same(place, workdir):
            raise UserError(
                f'tokenizer: {directory} takes its tokenizer from this --workdir: give another '
                '--workdir'
            )
    if not is_trained(directory, 'tokenizer'):
        raise UserError(
            f'tokenizer: that in {directory} is not trained to its end: run its own command first'
        )


def check_inputs(cfg: ConfigDict, workdir: str | None) -> list[str]:
    """Checks that a training finds what it reads besides images.

    That is a tokenizer, a teacher, the run that it is fine-tuned from, features of texts, and the
    files of LPIPS.

    Args:
      cfg: a checked config.
      workdir: the directory of the run, None where not known.

    Returns:
      The paths of what is read.

    Raises:
      UserError: something is missing or cannot be used.
    """
    is_taken = workdir is not None and transfer.is_done(workdir)
    places = {
        'tokenizer': cfg.tokenizer,
        'init_from': cfg.init_from,
        'fine_tuning.init_from': None if is_taken else cfg.fine_tuning.init_from,
    }
    is_here = workdir is not None and epath.Path(workdir, 'tokenizer', 'weights').is_dir()
    if not (any(places.values()) or cfg.tokenizer_training.steps or is_here):
        raise UserError(
            'tokenizer_training.steps is 0, but no tokenizer was converted into the workdir: give '
            '--config.tokenizer=DIR, the workdir of a trained or converted one'
        )
    found = [directory for directory in places.values() if directory is not None]
    for name, directory in places.items():
        if directory is not None:
            _check_origin(name, directory, workdir)
    if build.reads_features(cfg):
        build.open_features(cfg)
        found.append(cfg.ar.features)
    if _with_lpips(cfg):
        weights = (cfg.tokenizer_training.lpips, cfg.tokenizer_training.vgg)
        check_paths(*weights)
        found += weights
    return found
