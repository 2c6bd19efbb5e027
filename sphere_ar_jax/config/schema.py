"""The configuration: every key with its type and published default, its checks, and the objects it
describes.

`default()` is the schema. A file in configs/ starts from it, changes values and returns it; unknown
keys and wrong types are refused by ml_collections, impossible values by `check`.
"""

import json
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from sphere_ar_jax.models.sizes import VARIANTS

DTYPES = ('float32', 'bfloat16')


# Kinds of data, and how many classes each has; None: as many as are found. See
# `sources.open_source`.
DATA = {'digits': 10, 'imagenet': 1000, 'folder': None, 'array_records': None, 'tfds': None}


def _training(**values):
    common = dict(
        steps=100_000,
        batch_size=256,
        learning_rate=1e-4,
        final_learning_rate=1e-4,
        warmup_steps=0,
        weight_decay=0.05,
        b1=0.9,
        b2=0.95,
        clip_norm=1.0,
        ema_decay=0.0,  # 0: no EMA
        more_ema_decays=(),  # further EMAs, kept beside
        # pieces of a batch whose gradients are computed one after the other, to save memory
        accumulate=1,
        log_every=100,
        checkpoint_every=1000,
        keep=2,  # newest checkpoints kept
        keep_every=0,  # steps whose multiples are kept for good, 0: none
    )
    return ConfigDict(common | values)


def default():
    """A locked ConfigDict with every key there is.

    Models, optimizers and losses have the published values of SphereAR-B at 256×256. The numbers of
    steps, the data and the sampling are stand-ins, for a config file to set.
    """
    config = ConfigDict(
        dict(
            seed=0,
            # of the computation: float32 or bfloat16; parameters are float32 always
            dtype='float32',
            # devices along each axis, see `sharding`; −1: as many as there are
            mesh=dict(data=-1, fsdp=1, tensor=1),
            data=dict(
                name='digits',  # a key of DATA
                # of the tar, the directory; of tfds, the data set's name
                path=config_dict.placeholder(str),
                split='train',  # of tfds
                data_dir=config_dict.placeholder(str),  # of tfds, if not its default
                holdout=0.2,  # of digits
                # of the AR model; as many as the data has, if not given
                num_classes=config_dict.placeholder(int),
                # epochs at which random crops begin to give way to centre crops, and have
                crop_until=(350, 375),
                max_broken=0.001,  # share of images that cannot be decoded at which a run stops
                draft=False,  # let JPEG's decoder scale down: faster, not exact
                workers=0,  # processes that load images, 0: threads of this one
                threads=16,  # that load images, of each process
            ),
            vae=dict(
                grid=(16, 16), latent_dim=16, image_channels=3, stem=64, channels=(64, 64, 128, 256, 512),
                encoder_depth=6, decoder_depth=12, heads=8, remat=False, unroll=1,
                # words of `models.backbones` and `models.posteriors`
                backbone='hybrid', posterior='power_spherical',
            ),
            ar=dict(VARIANTS['B'], condition='classes', head='flow', class_tokens=16, remat=False, unroll=1),
            # a workdir whose tokenizer is taken; none is trained then
            tokenizer=config_dict.placeholder(str),
            tokenizer_training=_training(
                kl_weight=0.004, l2_weight=0.0, perceptual_weight=1.0,
                # files of LPIPS' weights
                lpips=config_dict.placeholder(str), vgg=config_dict.placeholder(str),
                disc_weight=0.5, disc_start=20_000, discriminator='patchgan', disc_loss='hinge',
            ),
            ar_training=_training(
                batch_size=512, learning_rate=3e-4, final_learning_rate=1e-5, warmup_steps=20_000, ema_decay=0.9999,
                copies=4, label_dropout=0.1,
                encoder_dtype='',  # of the frozen tokenizer's computation, '': as dtype
            ),
            watch=dict(
                every=0,  # steps between looks at the model while it is trained, 0: none
                # of the grid of samples: this many classes, this many images of each
                classes=8, columns=8,
                fid_images=0,  # samples whose FID is computed at each look, 0: none
                # for it: files
                inception=config_dict.placeholder(str), reference=config_dict.placeholder(str),
            ),
            # a finished workdir: distil its flow head, train nothing else
            init_from=config_dict.placeholder(str),
            distillation_training=_training(
                head='mean_velocity', ema_decay=0.9999, teacher_steps=16, levels=(1, 2), guidance='linear',
                guidance_scale=4.5,
            ),
            sampling=dict(
                num_images=1000, batch_size=250, solver='euler_maruyama', num_steps=100,
                last_step=config_dict.placeholder(float), guidance=config_dict.placeholder(str),
                guidance_scale=config_dict.placeholder(float), temperature=1.0,
                first_token_apart=config_dict.placeholder(bool), guidance_interval=config_dict.placeholder(tuple),
                noise_scale=config_dict.placeholder(float), shift=config_dict.placeholder(float),
                final_steps=config_dict.placeholder(int), annealing=config_dict.placeholder(str),
                # the EMA to sample with; the first, if not given
                ema_decay=config_dict.placeholder(float),
            ),
        )
    )  # fmt: skip
    return config.lock()  # a key that is not here is an error


def num_classes(config):
    """Classes that the AR model knows, the null class apart; None where only the data, once opened,
    could say.
    """
    return config.data.num_classes or DATA[config.data.name]


def changed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy of a config with other values, {dotted key: value}; the config itself stays as it is."""
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(values)
    return other


def leaves(tree, prefix=''):
    """The values of a nested dictionary, {dotted name: value}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in leaves(value, f'{prefix}{key}.').items()
    }


# What may change between two starts in one workdir: speed, how often to log and save, sampling, and
# what helps a run that broke off with a loss that is no number.
_FREE = re.compile(
    r'mesh\..*|sampling\..*|watch\..*|tokenizer|data\.(path|data_dir|workers|threads|max_broken)'
    r'|.*\.(lpips|vgg|log_every|checkpoint_every|keep|keep_every|remat|unroll|learning_rate|final_learning_rate|clip_norm)'
)


def differences(old, new):
    """'KEY OLD → NEW' for each difference of two configs (as plain dictionaries) that a run cannot
    go on across.
    """
    old, new = leaves(old), leaves(new)
    distilled = old.get('init_from') is not None or new.get('init_from') is not None
    matters = lambda name: (
        not _FREE.fullmatch(name) and (distilled or not name.startswith('distillation_training.'))
    )
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name) and matters(name)]
    return [f'{name} {old.get(name)} → {new.get(name)}' for name in changed]


def as_dict(config):
    """The config as plain values that JSON takes: what a `config.json` holds, and `differences`
    compares.
    """
    return json.loads(config.to_json_best_effort())
