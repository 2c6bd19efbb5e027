"""What a workdir holds, and whether another run may go on in it."""

import os
import time

from etils import epath
from ml_collections import ConfigDict

from sphere_ar_jax.config import schema
from sphere_ar_jax.runtime import files, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import run


def has(workdir: str | os.PathLike[str], what: str) -> bool:
    """Whether a stage in a workdir has 'weights' (converted ones) or 'checkpoints' (trained)."""
    return any(epath.Path(workdir, stage, what).is_dir() for stage in ('tokenizer', 'ar'))


def other_model(old: ConfigDict, new: ConfigDict, tokenizer_only: bool = False) -> list[str]:
    """The differences of two configs' models, or of their tokenizers alone, as 'KEY OLD → NEW'."""
    parts = ('vae.',) if tokenizer_only else ('vae.', 'ar.')
    differences = schema.differences(schema.as_dict(old), schema.as_dict(new))
    changed = [difference for difference in differences if difference.startswith(parts)]
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


def _remedy(changed: list[str], workdir: str | os.PathLike[str], converted: bool) -> str:
    """What to do about a run whose config differs from the one that its workdir was begun with.

    Args:
      changed: the differences, as 'KEY OLD → NEW'.
      workdir: the workdir.
      converted: whether it holds converted weights, in which no training has begun.
    """
    keys = [difference.split()[0] for difference in changed]
    on_it = f'--config.tokenizer={os.fspath(workdir)} in another --workdir'
    if converted and 'data.num_classes' in keys:
        return f'a converted AR model keeps its classes; to train one for others, give {on_it}'
    if not all(key.startswith(('ar_training.', 'ar.', 'sampling.', 'watch.')) for key in keys):
        return 'use another --workdir, in which all is trained from the beginning'
    longer = ''
    if 'ar_training.steps' in keys:
        longer = 'the learning rate of a training falls over all of its steps, so that it cannot '
        longer += 'be lengthened; '
    return f'{longer}to train another AR model on this tokenizer, give {on_it}'


def claim(cfg: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Writes WORKDIR/config.json, if the workdir is free or belongs to this run.

    A workdir of converted weights in which no training has begun needs the same model only. All
    processes must call this.

    Args:
      cfg: the config of the run.
      workdir: the workdir.

    Raises:
      UserError: the workdir was begun with another model, data or training.
    """
    path = epath.Path(workdir, 'config.json')
    mine = schema.as_dict(cfg)
    converted = has(workdir, 'weights') and not has(workdir, 'checkpoints')
    if path.exists():
        # It is read through the schema, so that a key that is newer than the run has its default.
        before = run.load_config(workdir)
        if converted:
            alone = not epath.Path(workdir, 'ar', 'weights').is_dir()
            changed = other_model(before, cfg, alone)
        else:
            changed = schema.differences(schema.as_dict(before), mine)
        if changed:
            some = '; '.join(changed[:4])
            remedy = _derived_otherwise(before, cfg) or _remedy(changed, workdir, converted)
            raise UserError(f'{workdir} was begun with another config ({some}): {remedy}')
    elif converted:
        raise UserError(
            f'a conversion into {workdir} broke off: repeat it, or use another --workdir'
        )
    hosts.wait()  # Nothing is written before all processes have found nothing wrong.
    files.write_json(path, mine)
    hosts.wait()
    if not _appears(path):
        raise UserError(
            f'{workdir} is not the same directory for all processes: '
            'they must share its disk, or gs://…'
        )
