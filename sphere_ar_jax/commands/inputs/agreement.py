"""One config on all machines: paths from the root, and the comparison of the processes of a run."""

import zlib
from typing import Any

from ml_collections import ConfigDict

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import sources
from sphere_ar_jax.data.captions import captioned
from sphere_ar_jax.data.captions import table as captions_table
from sphere_ar_jax.runtime import files, hosts
from sphere_ar_jax.runtime.console import UserError

# Keys that may hold a path, which may be another one on another machine.
_PATHS = (
    'init_from', 'tokenizer', 'fine_tuning.init_from', 'ar.features',
    'data.path', 'data.data_dir', 'data.captions',
    'tokenizer_training.lpips', 'tokenizer_training.vgg', 'watch.inception', 'watch.reference',
)  # fmt: skip
# Further keys that processes on different machines may set each in its own way.
_OF_MACHINES = ('reasons', 'data.threads', 'data.workers', 'ar.vocabulary')


def check_same(cfg: ConfigDict, source: Any) -> None:
    """Raises UserError unless all processes of the run have the same config and the same images."""
    values = schema.leaves(schema.as_dict(cfg))
    for key in _OF_MACHINES:
        values.pop(key, None)
    for key in _PATHS:
        values[key] = values[key] is not None
    values['the number of images'] = len(source)
    # A single class has the name of its directory, which may lie elsewhere on another machine.
    names = getattr(source, 'class_names', None) or ()
    values['the names of classes'] = names if len(names) > 1 else ()
    read: Any = None
    if hosts.count() > 1 and build.has_captions(cfg):
        encode = build.caption_encoder(cfg)
        looked = captioned.look(source, captioned.LOOKED_AT, encode)
        read = ([encode(text).tobytes() for text in looked.texts], looked.broken)
    # All processes must have as many values, also where one of them has another kind of model.
    values['what the model reads of captions'] = read
    sums = [zlib.crc32(repr(value).encode()) for value in values.values()]
    keys = list(values)
    differing = sorted(keys[i] for i in hosts.differing(sums))
    if differing:
        some = ', '.join(differing[:4])
        raise UserError(
            f'the processes of this run differ in {some}: start all of them by the same command, '
            'with the same images'
        )


def with_absolute_paths(cfg: ConfigDict) -> ConfigDict:
    """A copy of a config with paths from the root, which hold in any directory.

    The names of data sets that are no paths stay as they are.
    """
    values = schema.leaves(schema.as_dict(cfg))
    named = set()
    if sources.is_name(cfg.data.name, cfg.data.path):
        named.add('data.path')
    if cfg.data.captions == captions_table.BESIDE:
        named.add('data.captions')
    paths = {key: files.absolute(values[key]) for key in _PATHS if values[key] and key not in named}
    return schema.changed(cfg, paths)
