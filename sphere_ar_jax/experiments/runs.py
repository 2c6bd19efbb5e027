"""Trained tokenizers and AR models, each trained once and shared by all experiments of a workdir.

Each is an ordinary workdir in WORKDIR/models. Its name has a hash of all keys of its config that
decide what is trained. A training that broke off goes on where it was.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import small
from sphere_ar_jax.data.captions import vocabulary
from sphere_ar_jax.evaluation import small_images
from sphere_ar_jax.evaluation.captioned import composed_digits
from sphere_ar_jax.runtime import files
from sphere_ar_jax.training import adversarial, loop, standardisation, workdir
from sphere_ar_jax.training.run import Run, load_config, load_run
from sphere_ar_jax.training.stages import ar_stage
from sphere_ar_jax.training.state import Stage

_T = TypeVar('_T')

# The sections of a config that decide what a tokenizer and an AR model become.
_OF_TOKENIZER = ('seed', 'dtype', 'data', 'vae', 'tokenizer_training')
_OF_AR = (*_OF_TOKENIZER, 'ar', 'ar_training')
# A file of a finished training, with the seconds that it took.
_FINISHED = 'finished.json'


def key(values: Any) -> str:
    """Eight hexadecimal digits that stand for a value that JSON takes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _of_sections(cfg: ConfigDict, sections: tuple[str, ...]) -> str:
    """The key of some sections of a config.

    Only values that differ from the schema's defaults count, so that a new key of the schema leaves
    trained models valid. A default of these sections must therefore never change.
    """
    defaults = schema.leaves(schema.as_dict(schema.default()))
    values = schema.leaves(schema.as_dict(cfg))
    found = {
        name: value
        for name, value in values.items()
        if name.split('.')[0] in sections and value != defaults[name]
    }
    # The content of a file counts, and not where it lies. The defaults are no files.
    for name in {'ar.vocabulary', 'ar.features'} & set(found):
        content = epath.Path(found[name]).expanduser().read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
    return key(found)


def tokenizer_directory(cache: str, cfg: ConfigDict) -> str:
    """The workdir of a config's tokenizer."""
    return f'{cache}/tokenizer-{cfg.vae.posterior}-{cfg.seed}-{_of_sections(cfg, _OF_TOKENIZER)}'


def ar_directory(cache: str, cfg: ConfigDict) -> str:
    """The workdir of a config's AR model."""
    return f'{cache}/ar-{cfg.vae.posterior}-{cfg.seed}-{_of_sections(cfg, _OF_AR)}'


# The last judge that was made, by the name of what makes it and the key of its data. Experiments go
# from seed to seed, and need no earlier one again.
_last_judge: dict[tuple[str, str], Any] = {}


def _once(cfg: ConfigDict, make: Callable[[small.DataSet], _T]) -> _T:
    """What `make` makes of a run's data set, made once for the data set and its seed."""
    values = schema.as_dict(cfg)
    name = (make.__qualname__, key([values['data'], values['seed']]))
    if name not in _last_judge:
        _last_judge.clear()
        _last_judge[name] = make(build.open_data_set(cfg))
    return _last_judge[name]


def judge(cfg: ConfigDict, cache: str) -> small_images.Judge:
    """The judge of a run's samples, made once for a data set and the seed of its split.

    Args:
      cfg: the run's config.
      cache: directory of the trained models, which keeps the classifier, too.
    """

    def make(data: small.DataSet) -> small_images.Judge:
        classifier = small_images.classifier(data, cfg.data.classifier_steps, keep_in=cache)
        return small_images.Judge(data, classifier)

    return _once(cfg, make)


def reader(cfg: ConfigDict, cache: str) -> composed_digits.Reader:
    """The reader of composed digits, made as `judge` is and with the same arguments."""

    def make(data: small.DataSet) -> composed_digits.Reader:
        return composed_digits.Reader(data, cfg.data.classifier_steps, cache)

    return _once(cfg, make)


def is_finished(directory: str) -> bool:
    """Whether a training in a workdir of the cache is finished."""
    return epath.Path(directory, _FINISHED).exists()


@contextlib.contextmanager
def _logged(directory: str) -> Iterator[None]:
    """A context that appends what a training prints to log.txt in its workdir."""
    os.makedirs(directory, exist_ok=True)
    with (
        open(f'{directory}/log.txt', 'a') as log,
        contextlib.redirect_stdout(log),
    ):
        yield


def _reading(cfg: ConfigDict) -> dict[str, Any]:
    """What else a training needs to read a config's data."""
    return {'transform': build.captioning(cfg)}


def _train(stage: Stage, source: small.Split, directory: str, cfg: ConfigDict, mesh: Mesh) -> None:
    """Trains a stage of a config in its workdir, and marks the workdir as finished."""
    place = f'{directory}/{stage.name}'
    _, seconds = loop.train(stage, source, place, seed=cfg.seed, mesh=mesh, reading=_reading(cfg))
    files.write_json(f'{directory}/{_FINISHED}', {'seconds': seconds})


def _claim(cfg: ConfigDict, directory: str) -> None:
    """Claims a workdir of the cache, and keeps what its config reads, so that it can be moved."""
    workdir.claim(cfg, directory)
    if cfg.ar.condition == 'text':
        vocabulary.keep(cfg.ar.vocabulary, directory)


def tokenizer_stage(cfg: ConfigDict) -> Stage:
    """The training of a config's tokenizer."""
    return adversarial.tokenizer_stage(build.build_vae(cfg), cfg.tokenizer_training)


def train_tokenizer(cfg: ConfigDict, cache: str, mesh: Mesh) -> None:
    """Trains the tokenizer of a config, unless it is trained.

    Args:
      cfg: a checked config on a data set that is held in memory.
      cache: directory of the trained models.
      mesh: the devices.
    """
    directory = tokenizer_directory(cache, cfg)
    if is_finished(directory):
        return
    own = schema.changed(cfg, {'ar_training.steps': 0, 'ar_training.warmup_steps': 0})
    source = build.open_data_set(cfg).train
    with _logged(directory):
        _claim(own, directory)
        _train(tokenizer_stage(own), source, directory, own, mesh)


def train_ar(cfg: ConfigDict, cache: str, mesh: Mesh) -> None:
    """Trains the AR model of a config on its trained tokenizer, unless it is trained.

    Args:
      cfg: see `train_tokenizer`.
      cache: see `train_tokenizer`.
      mesh: see `train_tokenizer`.
    """
    directory = ar_directory(cache, cfg)
    if is_finished(directory):
        return
    own = schema.changed(cfg, {'tokenizer': tokenizer_directory(cache, cfg)})
    source = build.open_data_set(cfg).train
    tokenizer = load_run(own.tokenizer, mesh, tokenizer_only=True)
    vae = build.build_vae(own)
    with _logged(directory):
        _claim(own, directory)
        params = standardisation.add(
            vae,
            tokenizer.vae_params,
            source,
            directory,
            seed=own.seed,
            batch_size=own.ar_training.batch_size,
            mesh=mesh,
            reading=_reading(own),
        )
        stage = ar_stage(build.build_ar(own), vae, params, own.ar_training)
        _train(stage, source, directory, own, mesh)


def load(cfg: ConfigDict, cache: str, mesh: Mesh) -> Run:
    """Reads the trained models of a config, also where the cache was moved.

    They may have been trained for another row, which is sampled otherwise: the section `sampling`
    is that of `cfg`.
    """
    directory = ar_directory(cache, cfg)
    values = {f'sampling.{key}': value for key, value in cfg.sampling.to_dict().items()}
    values['tokenizer'] = tokenizer_directory(cache, cfg)
    own = schema.changed(load_config(directory), values)
    return load_run(directory, mesh, cfg=own)


def seconds(directory: str) -> float:
    """The wall time of a finished training in a workdir of the cache."""
    return float(files.read_json(epath.Path(directory, _FINISHED))['seconds'])
