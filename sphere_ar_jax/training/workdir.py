"""What a workdir holds, and whether another run may go on in it."""

import os
import time

from etils import epath
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data.captions import vocabulary
from sphere_ar_jax.interop import shared
from sphere_ar_jax.runtime import checkpoint, files, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import run


def has(workdir: str | os.PathLike[str], what: str) -> bool:
    """Whether a stage in a workdir has 'weights' (converted ones) or 'checkpoints' (trained)."""
    return any(epath.Path(workdir, stage, what).is_dir() for stage in ('tokenizer', 'ar'))


def is_converted(workdir: str | os.PathLike[str]) -> bool:
    """Whether a workdir has converted weights, and no training was begun in it."""
    return has(workdir, 'weights') and not has(workdir, 'checkpoints')


# Weights of losses, which decide how a model is trained and not what it is.
_LOSS_WEIGHTS = ('ar.text_weight', 'ar.alone_weight', 'ar.magnitude_weight')


def other_model(old: ConfigDict, new: ConfigDict, tokenizer_only: bool = False) -> list[str]:
    """The differences of two configs' models, or of their tokenizers alone, as 'KEY OLD → NEW'.

    Weights of losses may differ, as long as both models write texts or neither does: one that
    writes texts has more parameters.
    """
    parts = ('vae.',) if tokenizer_only else ('vae.', 'ar.')
    free = _LOSS_WEIGHTS if build.writes_texts(old) == build.writes_texts(new) else ()
    differences = schema.differences(schema.as_dict(old), schema.as_dict(new))
    changed = [
        difference
        for difference in differences
        if difference.startswith(parts) and difference.split()[0] not in free
    ]
    if tokenizer_only:
        return changed
    before = schema.num_classes(old)
    after = schema.num_classes(new)
    if before is not None and after is not None and before != after:
        changed.append(f'data.num_classes {before} → {after}')
    return changed


def _appears(path: epath.Path) -> bool:
    """Waits up to a minute for a file: NFS may remember for a while that it was not there."""
    for _ in range(60):
        if path.exists():
            return True
        time.sleep(1)
    return False


def _derived_otherwise(before: ConfigDict, now: ConfigDict) -> str:
    """What to do where two configs derive their values from different images; '' otherwise."""
    old = before.reasons[:1]
    new = now.reasons[:1]
    if not old or not new or old == new:
        return ''
    was = old[0].split('. ')[0]
    is_now = new[0].split('. ')[0]
    return (
        f'its values were {was}, and now they are {is_now}. A run goes on with the images that it '
        'was begun with alone: put the folder back as it was, or use another --workdir'
    )


def can_be_prolonged(old: ConfigDict, new: ConfigDict, done: int) -> bool:
    """Whether a training can be prolonged without a break in what was trained so far.

    It can where its learning rate up to here is the same by both sections of the config: the rate
    is constant after the warm-up, or has not begun to fall, or restarts where the former steps end.

    Args:
      old: the section that it was begun with.
      new: the section with more steps.
      done: the number of steps done.
    """
    if not 0 < old.steps < new.steps:
        return False
    if tuple(new.restarts) == (*old.restarts, old.steps):
        return True
    if tuple(new.restarts) != tuple(old.restarts):
        return False
    if all(section.learning_rate == section.final_learning_rate for section in (old, new)):
        return True
    return done <= max(old.restarts, default=0) + old.warmup_steps


def saved_steps(workdir: str | os.PathLike[str], stage: str) -> list[int]:
    """The steps of a stage's checkpoints in a workdir, ascending."""
    place = os.path.join(workdir, stage, 'checkpoints')
    return checkpoint.Checkpoints(place, read_only=True).steps()


def _done(workdir: str | os.PathLike[str], stage: str) -> int:
    """The number of steps of a stage's newest checkpoint, 0 without one."""
    return max(saved_steps(workdir, stage), default=0)


def is_trained(workdir: str | os.PathLike[str], stage: str) -> bool:
    """Tells whether a stage in a workdir is trained to the last step of its config.

    Weights that were converted are, and so is a stage that the workdir does not hold. The tokenizer
    of another workdir is looked at there.
    """
    if epath.Path(workdir, stage, 'checkpoints').is_dir():
        training = run.load_config(workdir)[f'{stage}_training']
        return _done(workdir, stage) >= training.steps
    if stage != 'tokenizer' or not epath.Path(workdir, 'config.json').exists():
        return True
    cfg = run.load_config(workdir)
    other = cfg.init_from or cfg.tokenizer
    return other is None or is_trained(other, stage)


# What other workdirs lose where a stage is prolonged, since they need its former weights.
_LOST = {
    'tokenizer': '. AR models and latents of this tokenizer in other workdirs must be made again',
    'ar': '. Heads that were distilled from it must be distilled again',
}


def _prolonged(
    before: ConfigDict, now: ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, str]:
    """Finds the trainings that get more steps and may: {section: the line that says so}."""
    found = {}
    for stage in ('tokenizer', 'ar', 'distillation'):
        section = f'{stage}_training'
        old = before[section]
        new = now[section]
        if stage == 'tokenizer' and (now.tokenizer or now.init_from or _done(workdir, 'ar')):
            continue  # It is not trained here, or would be of no use to the AR model.
        if can_be_prolonged(old, new, _done(workdir, stage)):
            line = f'{section}: prolonged from {old.steps} to {new.steps} steps'
            if len(new.restarts) > len(old.restarts):
                line += f'; the learning rate rises and falls anew from step {old.steps} on'
            line += _LOST.get(stage, '')
            found[section] = line
    return found


def _changes(
    before: ConfigDict, now: ConfigDict, workdir: str | os.PathLike[str]
) -> tuple[list[str], list[str]]:
    """What a run cannot go on across, and what it can.

    Returns:
      (differences as 'KEY OLD → NEW', lines that say which trainings are prolonged).
    """
    found = schema.differences(schema.as_dict(before), schema.as_dict(now))
    if _derived_otherwise(before, now):
        return found, []  # Steps that follow from other images do not ask for a longer training.
    longer = _prolonged(before, now, workdir)
    allowed = {f'{section}.{key}' for section in longer for key in ('steps', 'restarts')}
    changed = [difference for difference in found if difference.split()[0] not in allowed]
    return changed, list(longer.values())


def _how_to_prolong(
    before: ConfigDict, now: ConfigDict, changed: list[str], workdir: str | os.PathLike[str]
) -> str:
    """How to prolong the one training whose steps alone were raised; '' in all other cases."""
    keys = {difference.split()[0] for difference in changed}
    for stage in ('tokenizer', 'ar', 'distillation'):
        section = f'{stage}_training'
        old = before[section]
        if keys != {f'{section}.steps'} or not 0 < old.steps < now[section].steps:
            continue
        if stage == 'tokenizer' and _done(workdir, 'ar'):
            return (
                'the AR model in it was trained on this tokenizer, which therefore stays as it is; '
                'to train the tokenizer longer, use another --workdir'
            )
        restarts = (*old.restarts, old.steps)
        return (
            'the learning rate has begun to fall towards its last step; to let it rise and fall '
            f"anew from step {old.steps} on, add --config.{section}.restarts='{restarts}'"
        )
    return ''


def _remedy(changed: list[str], workdir: str | os.PathLike[str], converted: bool) -> str:
    """What to do about a run whose config differs from the one that its workdir was begun with.

    Args:
      changed: the differences, as 'KEY OLD → NEW'.
      workdir: the workdir.
      converted: whether it holds converted weights, in which no training has begun.
    """
    keys = [difference.split()[0] for difference in changed]
    began_elsewhere = ('init_from', 'fine_tuning.', 'distillation_training.')
    if any(key.startswith(began_elsewhere) for key in keys):
        return 'use another --workdir'
    if not converted and epath.Path(workdir, 'ar', 'weights').is_dir():
        return (
            'use another --workdir, and convert the weights into it that this one began with, or '
            'take them by --config.fine_tuning.init_from'
        )
    on_it = f'--config.tokenizer={os.fspath(workdir)} in another --workdir'
    if converted and 'data.num_classes' in keys:
        return f'a converted AR model keeps its classes; to train one for others, give {on_it}'
    if not all(key.startswith(('ar_training.', 'ar.', 'sampling.', 'watch.')) for key in keys):
        return 'use another --workdir, in which all is trained from the beginning'
    return f'to train another AR model on this tokenizer, give {on_it}'


def _check_places(before: ConfigDict, now: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Checks that a run goes on with the tokenizer of another workdir, or with its own.

    A tokenizer of another workdir may be moved, which only changes its path.

    Raises:
      UserError: a run that was begun on such a tokenizer names none now, or an AR model with a
        tokenizer of its own is given another.
    """
    if (before.tokenizer is None) == (now.tokenizer is None) or now.init_from is not None:
        return
    if now.tokenizer is None:
        raise UserError(
            f'{workdir} was begun on the tokenizer of {before.tokenizer}: give '
            '--config.tokenizer=DIR, where it is now, or use another --workdir'
        )
    if _done(workdir, 'ar'):
        raise UserError(
            f'the AR model in {workdir} was begun on a tokenizer of its own: leave '
            '--config.tokenizer out, or use another --workdir'
        )


def _other_than_converted(
    before: ConfigDict, now: ConfigDict, workdir: str | os.PathLike[str]
) -> list[str]:
    """The differences of a run's models from those of the converted weights in its workdir.

    Raises:
      UserError: a tokenizer is given to an AR model that was converted with its own.
    """
    alone = not epath.Path(workdir, 'ar', 'weights').is_dir()
    if not alone and now.tokenizer is not None:
        raise UserError(
            f'the AR model in {workdir} was converted with its tokenizer: leave '
            '--config.tokenizer out, or use another --workdir'
        )
    return other_model(before, now, alone)


def check_claim(cfg: ConfigDict, workdir: str | os.PathLike[str]) -> list[str]:
    """Checks that a workdir is free or belongs to a run.

    A workdir of converted weights in which no training has begun needs the same model only. A
    training may have more steps than before where `can_be_prolonged` allows it.

    Args:
      cfg: the config of the run.
      workdir: the workdir.

    Returns:
      Lines that say which trainings are prolonged.

    Raises:
      UserError: the workdir was begun with another model, data, tokenizer or training, or it holds
        shared weights.
    """
    if shared.is_shared(workdir):
        raise UserError(
            f'{workdir} holds shared weights, which no training goes on from: convert them into '
            f'another --workdir by {shared.how_to_convert(workdir)}'
        )
    converted = is_converted(workdir)
    if not epath.Path(workdir, 'config.json').exists():
        if converted:
            raise UserError(
                f'a conversion into {workdir} broke off: repeat it, or use another --workdir'
            )
        return []
    # It is read through the schema, so that a key that is newer than the run has its default.
    before = run.load_config(workdir)
    is_tuned = (before.fine_tuning.init_from, cfg.fine_tuning.init_from) != (None, None)
    if converted and not is_tuned:
        changed = _other_than_converted(before, cfg, workdir)
        longer: list[str] = []
    else:
        _check_places(before, cfg, workdir)
        changed, longer = _changes(before, cfg, workdir)
    if changed:
        some = '; '.join(changed[:4])
        remedy = (
            _derived_otherwise(before, cfg)
            or _how_to_prolong(before, cfg, changed, workdir)
            or _remedy(changed, workdir, converted)
        )
        raise UserError(f'{workdir} was begun with another config ({some}): {remedy}')
    words = (before.ar.vocabulary, cfg.ar.vocabulary)
    if cfg.ar.condition == 'text' and not vocabulary.are_same(*words):
        raise UserError(
            f'{workdir} was begun with another vocabulary than {words[1]}: use another --workdir'
        )
    return longer


def claim(cfg: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Writes WORKDIR/config.json, if the workdir is free or belongs to this run.

    A line says which trainings are prolonged. All processes must call this.

    Args:
      cfg: the config of the run.
      workdir: the workdir.

    Raises:
      UserError: see `check_claim`; or the processes do not share the workdir.
    """
    longer = check_claim(cfg, workdir)
    if longer:
        print('\n'.join(longer), flush=True)
    path = epath.Path(workdir, 'config.json')
    hosts.wait()  # Nothing is written before all processes have found nothing wrong.
    files.write_json(path, schema.as_dict(cfg))
    hosts.wait()
    if not _appears(path):
        raise UserError(
            f'{workdir} is not the same directory for all processes: '
            'they must share its disk, or gs://…'
        )
