"""What a config that is given beside a trained run decides about it.

Commands that draw, score and encode open a run with its own config. A command line may name another
config, or change keys of the run's own. The tables below say which of those values count. The run's
own config decides the others.
"""

from collections.abc import Collection, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sphere_ar_jax.config import schema
from sphere_ar_jax.data.captions import vocabulary
from sphere_ar_jax.runtime import console, files
from sphere_ar_jax.runtime.console import UserError

# Sections and keys that say how a run's models compute and sample.
_MODELS_COMPUTE = ('sampling', 'dtype', 'ar.fused')
# The same of a command, which has devices and a seed besides.
_COMPUTED = (*_MODELS_COMPUTE, 'mesh', 'seed')
# Runs and files that may have moved since the training; None leaves the run's own.
_MOVED = ('tokenizer', 'init_from', 'ar.features')
# Where images are now; None leaves the run's own.
_PLACES = ('data.path', 'data.captions', 'data.data_dir')
# The other keys of the data that may be given. They say of which kind the images are, what judges
# them, and the number of classes of a config file whose own is another.
_OF_IMAGES = ('data.name', 'data.classifier_steps', 'data.num_classes')


def _values(config: ConfigDict, names: Collection[str]) -> dict[str, Any]:
    """The values of keys and whole sections of a config, {dotted key: value}."""
    values = schema.leaves(config.copy_and_resolve_references().to_dict())
    return {
        key: value for key, value in values.items() if key in names or key.split('.')[0] in names
    }


def _given(config: ConfigDict, names: Collection[str]) -> dict[str, Any]:
    """The values of keys that are not None."""
    return {key: value for key, value in _values(config, names).items() if value is not None}


def with_kept_vocabulary(cfg: ConfigDict, workdir: str) -> ConfigDict:
    """A config with the vocabulary that a workdir keeps, where the file that it names is gone.

    Args:
      cfg: a config of the command line, which need not be checked.
      workdir: the directory of a run, which need not be there.
    """
    word = cfg.ar.vocabulary
    if cfg.ar.condition != 'text' or epath.Path(word).expanduser().exists():
        return cfg
    return schema.changed(cfg, {'ar.vocabulary': vocabulary.of_run(word, workdir)})


def without_other_images(
    cfg: ConfigDict, own: ConfigDict | None, overrides: Collection[str], names_images: bool
) -> ConfigDict:
    """A config of the command line that names images only where the command line itself does.

    The images that a config file names by itself need not be those of the run.

    Args:
      cfg: the config of the command line.
      own: that of the run, None where there is none.
      overrides: the keys that the command line overrides.
      names_images: whether the argument of the config file names images.

    Raises:
      UserError: an override would take other images than the run has.
    """
    asked = schema.leaves(schema.as_dict(cfg))
    there = asked if own is None else schema.leaves(schema.as_dict(own))
    for key in overrides:
        is_fixed = key.startswith('data.') and key not in (*_PLACES, *_OF_IMAGES)
        if is_fixed and asked[key] != there[key]:
            raise UserError(f'{key} is that of the run, {there[key]}: leave --config.{key} out')
    if names_images:
        return cfg
    return schema.changed(cfg, {key: None for key in _PLACES if key not in overrides})


def for_the_model(own: ConfigDict, like: ConfigDict) -> ConfigDict:
    """A run's config for opening its models as another config says.

    Args:
      own: the config of the run.
      like: a config of the same model.
    """
    return schema.changed(own, _values(like, _COMPUTED) | _moved(own, _given(like, _MOVED)))


def _moved(own: ConfigDict, places: Mapping[str, str]) -> dict[str, str]:
    """Where the keys of `_MOVED` lie now, from the root; `places` are those that are given."""
    found = {key: files.absolute(path) for key, path in places.items()}
    if own.init_from is None:
        found.pop('init_from', None)  # A run that is no distillation has no teacher to move.
    return found


def with_values(own: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A run's config for opening its models with some of its values changed.

    Args:
      own: the config of the run.
      values: {dotted key: value}, as {'dtype': 'bfloat16'}. None leaves a place as it is.

    Raises:
      UserError: there is no such key, the training has decided it, or it takes no such value.
    """
    names = (*_MODELS_COMPUTE, *_MOVED)
    free = _values(own, names)
    for key in values:
        message = schema.unknown(key)
        if message is not None:
            raise UserError(message)
        if key not in free:
            raise UserError(f'{key} is fixed here: only these change, {", ".join(names)}')
        console.require_value(key, values[key])
    places = {key: values[key] for key in _MOVED if values.get(key) is not None}
    computed = {key: value for key, value in values.items() if key not in _MOVED}
    try:
        return schema.changed(own, computed | _moved(own, places))
    except (TypeError, ValueError) as error:
        raise UserError(console.said(error)) from None


def for_the_images(own: ConfigDict, like: ConfigDict | None) -> ConfigDict:
    """A run's config for opening the images that it was trained on, where they are now.

    Its seed is the run's own, which decides what is held out, whatever seed draws.

    Args:
      own: the config of the run.
      like: a config that may say where the images are and how long their judge is trained, None
        where none is given.

    Raises:
      UserError: `like` names images of another kind.
    """
    if like is None:
        return own
    if like.data.name == own.data.name:
        return schema.changed(own, _given(like, (*_PLACES, 'data.classifier_steps')))
    if like.data.path is None:
        return own
    raise UserError(
        f'the run was trained on data {own.data.name}, but --config names data {like.data.name}: '
        'give images of the same kind'
    )
