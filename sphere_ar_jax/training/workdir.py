"""What a workdir holds, and whether another run may go on in it."""

import time

from etils import epath

from sphere_ar_jax.config import schema
from sphere_ar_jax.runtime import files, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import run


def has(workdir, what):
    """Whether a stage's directory in a workdir has 'weights' (converted) or 'checkpoints'
    (trained).
    """
    return any(epath.Path(workdir, stage, what).is_dir() for stage in ('tokenizer', 'ar'))


def other_model(old, new, tokenizer_only=False):
    """'KEY OLD → NEW' for each difference of two configs' models, or of their tokenizers alone."""
    parts = ('vae.',) if tokenizer_only else ('vae.', 'ar.')
    changed = [
        d
        for d in schema.differences(schema.as_dict(old), schema.as_dict(new))
        if d.startswith(parts)
    ]
    classes = schema.num_classes(old), schema.num_classes(new)
    if None not in classes and classes[0] != classes[1] and not tokenizer_only:
        changed.append('data.num_classes {} → {}'.format(*classes))
    return changed


def claim(cfg, workdir):
    """Writes WORKDIR/config.json, or refuses a workdir that was begun with another model, data or
    training.

    In a workdir of converted weights where no training has begun, only the model must be theirs.
    """
    path = epath.Path(workdir, 'config.json')
    mine = schema.as_dict(cfg)
    converted = has(workdir, 'weights') and not has(workdir, 'checkpoints')
    if path.exists():
        before = run.load_config(
            workdir
        )  # through the schema: a key that is newer than the run has its default
        if converted:
            alone = not epath.Path(workdir, 'ar', 'weights').is_dir()
            changed = other_model(before, cfg, alone)
        else:
            changed = schema.differences(schema.as_dict(before), mine)
        if changed:
            raise UserError(
                f'{workdir} was begun with another config ({"; ".join(changed[:4])}): use another --workdir'
            )
    elif converted:
        raise UserError(
            f'a conversion into {workdir} broke off: repeat it, or use another --workdir'
        )
    hosts.wait()  # not before all processes have found nothing wrong
    files.write_json(path, mine)
    hosts.wait()
    for _ in range(60):  # seconds: NFS remembers for a while that a file is not there
        if path.exists():
            break
        time.sleep(1)
    else:
        raise UserError(
            f'{workdir} is not the same directory for all processes: they must share its disk, or gs://…'
        )
