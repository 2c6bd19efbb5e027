"""The configuration: every key with its type and published default, its checks, and the objects it describes.

`default()` is the schema. A file in configs/ starts from it, changes values and returns it; unknown keys and wrong
types are refused by ml_collections, impossible values by `check`.
"""

import dataclasses
import json
import re

import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from sphere_ar_jax import ar, data, discriminators, flow, losses, sampling, transformer, vae

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line that says what to change."""


# Kinds of data, and how many classes each has; None: as many as are found. See `sources.open_source`.
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
        accumulate=1,  # pieces of a batch whose gradients are computed one after the other, to save memory
        log_every=100,
        checkpoint_every=1000,
        keep=2,  # newest checkpoints kept
        keep_every=0,  # steps whose multiples are kept for good, 0: none
    )
    return ConfigDict(common | values)


def default():
    """A locked ConfigDict with every key there is.

    Models, optimizers and losses have the published values of SphereAR-B at 256×256 (spec §3–§8). The numbers of steps,
    the data and the sampling are stand-ins, for a config file to set.
    """
    config = ConfigDict(
        dict(
            seed=0,
            dtype='float32',  # of the computation: float32 or bfloat16; parameters are float32 always
            mesh=dict(data=-1, fsdp=1, tensor=1),  # devices along each axis, see `sharding`; −1: as many as there are
            data=dict(
                name='digits',  # a key of DATA
                path=config_dict.placeholder(str),  # of the tar, the directory; of tfds, the data set's name
                split='train',  # of tfds
                data_dir=config_dict.placeholder(str),  # of tfds, if not its default
                holdout=0.2,  # of digits
                num_classes=config_dict.placeholder(int),  # of the AR model; as many as the data has, if not given
                crop_until=(350, 375),  # epochs at which random crops begin to give way to centre crops, and have
                max_broken=0.001,  # share of images that cannot be decoded at which a run stops
                draft=False,  # let JPEG's decoder scale down: faster, not exact
                workers=0,  # processes that load images, 0: threads of this one
                threads=16,  # that load images, of each process
            ),
            vae=dict(
                grid=(16, 16), latent_dim=16, image_channels=3, stem=64, channels=(64, 64, 128, 256, 512),
                encoder_depth=6, decoder_depth=12, heads=8, remat=False, unroll=1,
            ),
            ar=dict(ar.VARIANTS['B'], class_tokens=16, remat=False, unroll=1),
            tokenizer=config_dict.placeholder(str),  # a workdir whose tokenizer is taken; none is trained then
            tokenizer_training=_training(
                kl_weight=0.004, l2_weight=0.0, perceptual_weight=1.0,
                lpips=config_dict.placeholder(str), vgg=config_dict.placeholder(str),  # files of LPIPS' weights
                disc_weight=0.5, disc_start=20_000, discriminator='patchgan', disc_loss='hinge',
            ),
            ar_training=_training(
                batch_size=512, learning_rate=3e-4, final_learning_rate=1e-5, warmup_steps=20_000, ema_decay=0.9999,
                copies=4, label_dropout=0.1,
                encoder_dtype='',  # of the frozen tokenizer's computation, '': as dtype
            ),
            watch=dict(
                every=0,  # steps between looks at the model while it is trained, 0: none
                classes=8, columns=8,  # of the grid of samples: this many classes, this many images of each
                fid_images=0,  # samples whose FID is computed at each look, 0: none
                inception=config_dict.placeholder(str), reference=config_dict.placeholder(str),  # for it: files
            ),
            init_from=config_dict.placeholder(str),  # a finished workdir: distil its flow head, train nothing else
            distillation_training=_training(
                ema_decay=0.9999, teacher_steps=16, levels=(1, 2), guidance='linear', guidance_scale=4.5
            ),
            sampling=dict(
                num_images=1000, batch_size=250, solver='euler_maruyama', num_steps=100,
                last_step=config_dict.placeholder(float), guidance=config_dict.placeholder(str),
                guidance_scale=config_dict.placeholder(float), temperature=1.0,
                first_token_apart=config_dict.placeholder(bool), guidance_interval=config_dict.placeholder(tuple),
                noise_scale=config_dict.placeholder(float), shift=config_dict.placeholder(float),
                final_steps=config_dict.placeholder(int), annealing=config_dict.placeholder(str),
                ema_decay=config_dict.placeholder(float),  # the EMA to sample with; the first, if not given
            ),
        )
    )  # fmt: skip
    return config.lock()  # a key that is not here is an error


def num_classes(config):
    """Classes that the AR model knows, the null class apart; None where only the data, once opened, could say."""
    return config.data.num_classes or DATA[config.data.name]


def keys(tree, prefix=''):
    """All dotted names of a (nested) config, sections included."""
    names = []
    for name, value in tree.items():
        names.append(prefix + name)
        if hasattr(value, 'items'):
            names += keys(value, f'{prefix}{name}.')
    return names


def _leaves(tree, prefix=''):
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in _leaves(value, f'{prefix}{key}.').items()}


# What may change between two starts in one workdir: speed, how often to log and save, sampling, and what helps a run
# that broke off with a loss that is no number.
_FREE = re.compile(
    r'mesh\..*|sampling\..*|watch\..*|tokenizer|data\.(path|data_dir|workers|threads|max_broken)'
    r'|.*\.(lpips|vgg|log_every|checkpoint_every|keep|keep_every|remat|unroll|learning_rate|final_learning_rate|clip_norm)'
)


def differences(old, new):
    """'KEY OLD → NEW' for each difference of two configs (as plain dictionaries) that a run cannot go on across."""
    old, new = _leaves(old), _leaves(new)
    distilled = old.get('init_from') is not None or new.get('init_from') is not None
    matters = lambda name: not _FREE.fullmatch(name) and (distilled or not name.startswith('distillation_training.'))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name) and matters(name)]
    return [f'{name} {old.get(name)} → {new.get(name)}' for name in changed]


def as_dict(config):
    """The config as plain values that JSON takes: what a `config.json` holds, and `differences` compares."""
    return json.loads(config.to_json_best_effort())


def from_dict(values):
    """The config of a `config.json`, checked."""
    config = default()
    for name, value in _leaves(values).items():
        config.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value})
    return check(config)


def dtype(config):
    """The dtype of the computation."""
    return DTYPES[config.dtype]


def build_vae(config):
    """The S-VAE that the config describes."""
    options = config.vae.to_dict()
    return vae.VAE(
        **{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in options.items()}, dtype=dtype(config)
    )


def build_ar(config):
    """The AR model that the config describes. Raises ConfigError where the number of classes is not known yet."""
    if num_classes(config) is None:
        raise ConfigError(f'data.num_classes: say how many classes the model knows ({config.data.name} does not)')
    return ar.AR(
        **config.ar.to_dict(),
        num_classes=num_classes(config),
        grid=tuple(config.vae.grid),
        latent_dim=config.vae.latent_dim,
        dtype=dtype(config),
        average=config.init_from is not None,
    )


def build_sampler(config):
    """The sampler's compiled-in options."""
    s = config.sampling.to_dict()
    if s['guidance_interval'] is not None:
        s['guidance_interval'] = tuple(s['guidance_interval'])
    return sampling.Options(**{field.name: s[field.name] for field in dataclasses.fields(sampling.Options)})


def _require(condition, message):
    if not condition:
        raise ConfigError(message)


def _check_heads(where, width, heads):
    _require(heads >= 1, f'{where}.heads is {heads}, but must be at least 1')
    try:
        transformer.head_dim(width, heads)
    except ValueError as error:
        raise ConfigError(f'{where}: {error}') from None


def _check_training(name, training):
    for key in ('steps', 'batch_size', 'log_every', 'checkpoint_every', 'keep'):
        least = 0 if key == 'steps' and name != 'distillation_training' else 1  # 0: not trained
        _require(training[key] >= least, f'{name}.{key} is {training[key]}, but must be at least {least}')
    for key in ('learning_rate', 'final_learning_rate', 'clip_norm'):
        _require(training[key] > 0, f'{name}.{key} is {training[key]}, but must be above 0')
    for key in ('b1', 'b2', 'ema_decay'):
        _require(0 <= training[key] < 1, f'{name}.{key} is {training[key]}, but must lie in [0, 1)')
    rates = tuple(training.more_ema_decays)
    _require(
        all(isinstance(rate, float) and 0 < rate < 1 for rate in rates) and (training.ema_decay or not rates),
        f'{name}.more_ema_decays is {rates}, but must be numbers between 0 and 1, beside an ema_decay',
    )
    _require(
        training.accumulate >= 1 and training.batch_size % training.accumulate == 0,
        f'{name}.accumulate is {training.accumulate}, but must divide the batch size {training.batch_size}',
    )
    for key in ('warmup_steps', 'keep_every', 'weight_decay'):
        _require(training[key] >= 0, f'{name}.{key} is {training[key]}, but must not be negative')
    _require(
        training.warmup_steps <= training.steps or not training.steps,
        f'{name}.warmup_steps is {training.warmup_steps}, more than its {training.steps} steps',
    )


def _check_tokenizer(training, image_shape):
    for key in ('kl_weight', 'l2_weight', 'perceptual_weight', 'disc_weight', 'disc_start'):
        _require(training[key] >= 0, f'tokenizer_training.{key} is {training[key]}, but must not be negative')
    for key, known in (('discriminator', discriminators.KINDS), ('disc_loss', losses.ADVERSARIAL)):
        _require(training[key] in known, f'tokenizer_training.{key} is {training[key]!r}: use {", ".join(known)}')
    _require(
        not training.perceptual_weight or image_shape[-1] == 3,
        f'tokenizer_training.perceptual_weight: LPIPS is for 3 channels, not {image_shape[-1]}; set it to 0',
    )
    _require(
        not training.perceptual_weight or min(image_shape[:2]) >= 16,
        f'tokenizer_training.perceptual_weight: LPIPS is for 16×16 pixels or more, not {image_shape[:2]}; set it to 0',
    )
    try:
        if training.disc_weight:
            discriminators.build(training.discriminator, image_shape)
    except discriminators.DiscriminatorError as error:
        raise ConfigError(f'tokenizer_training.disc_weight: {error}; set it to 0') from None
    _require(
        not training.disc_weight or training.accumulate == 1,
        'tokenizer_training.accumulate: a discriminator needs its whole batch at once, for its statistics',
    )


def _check_models(v, a):
    for key in ('latent_dim', 'image_channels', 'stem', 'encoder_depth', 'decoder_depth', 'heads', 'unroll'):
        _require(v[key] >= (2 if key == 'latent_dim' else 1), f'vae.{key} is {v[key]}: too small')
    for key in a:
        _require(key == 'remat' or a[key] >= 1, f'ar.{key} is {a[key]}, but must be at least 1')
    for key in ('grid', 'channels'):
        _require(all(type(n) is int for n in v[key]), f'vae.{key} is {tuple(v[key])}, but must be whole numbers')
    _require(len(v.grid) == 2 and min(v.grid) >= 1, f'vae.grid is {tuple(v.grid)}, but must be two sizes of at least 1')
    _require(len(v.channels) >= 2, f'vae.channels is {tuple(v.channels)}, but needs at least two stages')
    for channels in (v.stem, *v.channels):
        groups = min(32, channels // 4)
        _require(
            groups >= 1 and channels % groups == 0,
            f'vae: {channels} channels cannot be normalised in {groups} groups: use a multiple of 4 up to 128 or of 32',
        )
    _check_heads('vae', v.channels[-1], v.heads)
    _check_heads('ar', a.width, a.heads)
    _require(
        a.head_depth % a.head_groups == 0, f'ar: {a.head_groups} head_groups do not divide head_depth {a.head_depth}'
    )


def _check_data(d, image_shape):
    height, _, channels = image_shape
    want = data.Digits.image_shape if d.name == 'digits' else (height, height, channels)
    _require(want == image_shape, f'vae makes images of {image_shape} (grid · 2^stages), but data {d.name} has {want}')
    _require(0.01 <= d.holdout <= 0.9, f'data.holdout is {d.holdout}, but must lie between 0.01 and 0.9')
    _require(0 < d.max_broken <= 1, f'data.max_broken is {d.max_broken}, but must lie in (0, 1]')
    _require(d.workers >= 0 and d.threads >= 1, 'data.workers must be at least 0, data.threads at least 1')
    _require(
        len(d.crop_until) == 2 and 0 <= d.crop_until[0] <= d.crop_until[1],
        f'data.crop_until is {tuple(d.crop_until)}, but must be two epochs in order',
    )


def _check_ar(t):
    _require(t.copies >= 1, f'ar_training.copies is {t.copies}, but must be at least 1')
    _require(0 <= t.label_dropout < 1, f'ar_training.label_dropout is {t.label_dropout}, but must lie in [0, 1)')
    _require(
        t.encoder_dtype in ('', *DTYPES), f'ar_training.encoder_dtype is {t.encoder_dtype!r}: use {", ".join(DTYPES)}'
    )


def _check_watch(w):
    _require(min(w.every, w.fid_images) >= 0 and min(w.classes, w.columns) >= 1, 'watch: numbers must not be negative')
    _require(
        not w.fid_images or (w.inception is not None and w.reference is not None),
        'watch.fid_images needs watch.inception=FILE and watch.reference=FILE too',
    )


def _check_distillation(init_from, t, s):
    """t: options of the training; s: those of sampling."""
    _require(init_from != '', 'give --config.init_from=DIR, the workdir of a finished run')
    _require(t.guidance in flow.SCHEDULES, f'distillation_training.guidance is {t.guidance!r}: use linear or constant')
    _require(t.teacher_steps >= 1, f'distillation_training.teacher_steps is {t.teacher_steps}, but must be at least 1')
    _require(
        len(t.levels) > 0 and all(type(n) is int and n >= 1 and t.teacher_steps % n == 0 for n in t.levels),
        f'distillation_training.levels is {tuple(t.levels)}, but must be divisors of teacher_steps {t.teacher_steps}',
    )
    _require(
        init_from is None or (s.guidance is None and s.solver == 'euler' and s.annealing is None),
        'a distilled head has its guidance within and takes plain steps: use sampling.solver euler without guidance',
    )
    _require(
        init_from is None or (s.num_steps in t.levels and s.shift is None),
        f'sampling.num_steps is {s.num_steps}, but the distilled head knows equal steps of {tuple(t.levels)}',
    )


def _check_sampling(config):
    s, t = config.sampling, config.ar_training
    _require(
        s.guidance is None or t.label_dropout > 0,
        'ar_training.label_dropout is 0: the null class, which guidance needs, would never be trained',
    )
    _require(s.guidance in (None, *flow.SCHEDULES), f'sampling.guidance is {s.guidance!r}: use linear or constant')
    _require(
        (s.guidance is None) == (s.guidance_scale is None),
        'sampling: give guidance_scale with a guidance schedule, and only then',
    )
    classes, of_data = num_classes(config), DATA[config.data.name]
    least = of_data if config.data.name == 'digits' else 1
    _require(
        classes is None or classes >= least,
        f'data.num_classes is {classes}, but {config.data.name} has {least} classes',
    )
    _require(
        s.num_images >= least,
        f'sampling.num_images is {s.num_images}, but must be at least one for each of {least} classes',
    )
    _require(s.batch_size >= 1, f'sampling.batch_size is {s.batch_size}, but must be at least 1')
    _require(s.temperature >= 0, f'sampling.temperature is {s.temperature}, but must not be negative')
    rates = [r for r in (t.ema_decay, *t.more_ema_decays) if r]
    _require(s.ema_decay in (None, *rates), f'sampling.ema_decay is {s.ema_decay}, but ar_training keeps {rates}')
    try:
        build_sampler(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f'sampling: {error}') from None


def check(config):
    """Raises ConfigError, one line, for values that no run can have; returns the config."""
    _require(config.dtype in DTYPES, f'dtype is {config.dtype!r}, but must be one of {", ".join(DTYPES)}')
    _require(0 <= config.seed < 2**31, f'seed is {config.seed}, but must lie between 0 and 2³¹ − 1')
    _require(config.data.name in DATA, f'data.name is {config.data.name!r}, but must be one of {", ".join(DATA)}')
    _check_models(config.vae, config.ar)
    image_shape = build_vae(config).image_shape
    _check_data(config.data, image_shape)
    for name in ('tokenizer_training', 'ar_training', 'distillation_training'):
        _check_training(name, config[name])
    _check_tokenizer(config.tokenizer_training, image_shape)
    _check_ar(config.ar_training)
    _check_watch(config.watch)
    _check_distillation(config.init_from, config.distillation_training, config.sampling)
    _check_sampling(config)
    return config
