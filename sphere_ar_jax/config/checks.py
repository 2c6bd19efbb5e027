"""Refuses values that no run can have, each in one line that says what to change."""

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import digits
from sphere_ar_jax.flow import guidance
from sphere_ar_jax.models import discriminators, transformer
from sphere_ar_jax.runtime.console import UserError


def from_dict(values):
    """The config of a `config.json`, checked."""
    config = schema.default()
    for name, value in schema.leaves(values).items():
        config.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value})
    return check(config)


def _require(condition, message):
    if not condition:
        raise UserError(message)


def _check_heads(where, width, heads):
    _require(heads >= 1, f'{where}.heads is {heads}, but must be at least 1')
    try:
        transformer.head_dim(width, heads)
    except ValueError as error:
        raise UserError(f'{where}: {error}') from None


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
    for key, known in (('discriminator', discriminators.KINDS), ('disc_loss', discriminators.ADVERSARIAL)):
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
    except UserError as error:
        raise UserError(f'tokenizer_training.disc_weight: {error}; set it to 0') from None
    _require(
        not training.disc_weight or training.accumulate == 1,
        'tokenizer_training.accumulate: a discriminator needs its whole batch at once, for its statistics',
    )


def _check_models(v, a):
    for key in ('latent_dim', 'image_channels', 'stem', 'encoder_depth', 'decoder_depth', 'heads', 'unroll'):
        _require(v[key] >= (2 if key == 'latent_dim' else 1), f'vae.{key} is {v[key]}: too small')
    for key in a:
        _require(
            key == 'remat' or isinstance(a[key], str) or a[key] >= 1, f'ar.{key} is {a[key]}, but must be at least 1'
        )
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
    want = digits.Digits.image_shape if d.name == 'digits' else (height, height, channels)
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
        t.encoder_dtype in ('', *schema.DTYPES),
        f'ar_training.encoder_dtype is {t.encoder_dtype!r}: use {", ".join(schema.DTYPES)}',
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
    _require(
        t.guidance in guidance.SCHEDULES, f'distillation_training.guidance is {t.guidance!r}: use linear or constant'
    )
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
    _require(s.guidance in (None, *guidance.SCHEDULES), f'sampling.guidance is {s.guidance!r}: use linear or constant')
    _require(
        (s.guidance is None) == (s.guidance_scale is None),
        'sampling: give guidance_scale with a guidance schedule, and only then',
    )
    classes, of_data = schema.num_classes(config), schema.DATA[config.data.name]
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
        build.build_sampler(config)
    except (ValueError, TypeError) as error:
        raise UserError(f'sampling: {error}') from None


def check(config):
    """Raises UserError, one line, for values that no run can have; returns the config."""
    _require(config.dtype in schema.DTYPES, f'dtype is {config.dtype!r}, but must be one of {", ".join(schema.DTYPES)}')
    _require(0 <= config.seed < 2**31, f'seed is {config.seed}, but must lie between 0 and 2³¹ − 1')
    _require(
        config.data.name in schema.DATA,
        f'data.name is {config.data.name!r}, but must be one of {", ".join(schema.DATA)}',
    )
    _check_models(config.vae, config.ar)
    image_shape = build.build_vae(config).image_shape
    _check_data(config.data, image_shape)
    for name in ('tokenizer_training', 'ar_training', 'distillation_training'):
        _check_training(name, config[name])
    _check_tokenizer(config.tokenizer_training, image_shape)
    _check_ar(config.ar_training)
    _check_watch(config.watch)
    _check_distillation(config.init_from, config.distillation_training, config.sampling)
    _check_sampling(config)
    return config
