"""Refuses values that no run can have, each in one line that says what to change."""

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sphere_ar_jax.config import build, fine_tuning, schema
from sphere_ar_jax.data import small
from sphere_ar_jax.flow import guidance
from sphere_ar_jax.models import transformer, vae
from sphere_ar_jax.models.backbones import convolutional
from sphere_ar_jax.models.conditions import CONDITIONS
from sphere_ar_jax.models.heads import HEADS, mean_velocity
from sphere_ar_jax.models.judges import discriminators
from sphere_ar_jax.runtime import console
from sphere_ar_jax.runtime.console import UserError, pick

# Small data sets of which `small` makes other ones: some classes, larger or darker images.
_VIEWED = [name for name in small.KINDS if name not in schema.CAPTIONED]


def _at_least(least: float) -> Callable[[float], bool]:
    """The rule that a number must be `least` or more."""
    return lambda n: n >= least


class _Rule(NamedTuple):
    """What some numbers must be.

    Attributes:
      words: the rule in words.
      holds: the rule as a function.
      keys: the keys of the numbers. A section * stands for all trainings.
    """

    words: str
    holds: Callable[[float], bool]
    keys: tuple[str, ...]


_NUMBERS = (
    _Rule('be at least 2', _at_least(2), ('vae.latent_dim',)),
    _Rule(
        'be at least 1',
        _at_least(1),
        (
            'vae.image_channels', 'vae.stem', 'vae.encoder_depth', 'vae.decoder_depth',
            'vae.heads', 'vae.unroll', 'ar.depth', 'ar.heads', 'ar.width', 'ar.class_tokens',
            'ar.text_tokens', 'ar.head_depth', 'ar.head_width', 'ar.head_groups', 'ar.unroll',
            '*.batch_size', '*.accumulate', '*.log_every', '*.checkpoint_every', '*.keep',
            'ar_training.copies', 'distillation_training.steps',
            'distillation_training.teacher_steps', 'data.threads', 'data.classifier_steps',
            'data.enlarge', 'sampling.batch_size', 'watch.classes', 'watch.columns',
        ),
    ),
    # A stage of 0 steps is not trained.
    _Rule(
        'be at least 0',
        _at_least(0),
        (
            'tokenizer_training.steps', 'ar_training.steps', 'ar.text_encoder_depth',
            'data.workers', 'data.num_classes',
        ),
    ),
    _Rule(
        'not be negative',
        _at_least(0),
        (
            '*.warmup_steps', '*.keep_every', '*.weight_decay', 'tokenizer_training.kl_weight',
            'tokenizer_training.l2_weight', 'tokenizer_training.perceptual_weight',
            'tokenizer_training.disc_weight', 'tokenizer_training.disc_start', 'watch.every',
            'watch.fid_images', 'sampling.temperature', 'ar.alone_weight',
        ),
    ),
    _Rule(
        'be above 0',
        lambda n: n > 0,
        (
            'vae.sigma', 'vae.radius', 'vae.kappa_scale', 'ar.prior_scale', 'ar.magnitude_weight',
            'ar.text_weight', '*.learning_rate', '*.final_learning_rate', '*.clip_norm',
            'distillation_training.teacher_shift',
        ),
    ),
    _Rule(
        'lie in [0, 1)',
        lambda n: 0 <= n < 1,
        ('*.b1', '*.b2', '*.ema_decay', 'ar_training.label_dropout'),
    ),
    _Rule('lie in (0, 1]', lambda n: 0 < n <= 1, ('data.max_broken',)),
    _Rule('lie between 0.01 and 0.9', lambda n: 0.01 <= n <= 0.9, ('data.holdout',)),
    _Rule('lie between 0 and 0.9', lambda n: 0 <= n <= 0.9, ('data.holdout_files',)),
    _Rule('lie between 0 and 2³¹ − 1', lambda n: 0 <= n < 2**31, ('seed',)),
)  # fmt: skip


def _use(words: Collection[str]) -> str:
    """The end of a message that refuses a word: the words to use instead."""
    return f': use {", ".join(words)}'


# What words must be: {key: (the allowed words, the end of the message that refuses another)}.
_WORDS: dict[str, tuple[Collection[Any], str]] = {
    'dtype': (schema.DTYPES, f', but must be one of {", ".join(schema.DTYPES)}'),
    'data.name': (schema.DATA, f', but must be one of {", ".join(schema.DATA)}'),
    'ar.condition': (CONDITIONS, _use(CONDITIONS)),
    'vae.decoder_input': (vae.DECODER_INPUTS, _use(vae.DECODER_INPUTS)),
    'ar.token_space': (vae.TOKEN_SPACES, _use(vae.TOKEN_SPACES)),
    'tokenizer_training.discriminator': (discriminators.KINDS, _use(discriminators.KINDS)),
    'tokenizer_training.disc_loss': (discriminators.ADVERSARIAL, _use(discriminators.ADVERSARIAL)),
    'ar_training.encoder_dtype': (('', *schema.DTYPES), _use(schema.DTYPES)),
    'distillation_training.guidance': (guidance.SCHEDULES, ': use linear or constant'),
    'sampling.guidance': ((None, *guidance.SCHEDULES), ': use linear or constant'),
}


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """Makes the config of a `config.json`, checked; keys that are not in it have their defaults."""
    config = schema.default()
    defaults = schema.leaves(config.to_dict())
    for name, value in schema.leaves(values).items():
        if value == '' and defaults.get(name) is None:
            value = None  # It was once allowed, and meant the same.
        # JSON knows no tuples.
        config.update_from_flattened_dict(
            {name: tuple(value) if isinstance(value, list) else value}
        )
    return check(config)


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def _are_whole(numbers: Any) -> bool:
    """Whether all values are of type int."""
    return all(type(n) is int for n in numbers)


def _check_values(config: ConfigDict) -> None:
    """Checks every number and every word by itself."""
    for name, value in schema.leaves(config.to_dict()).items():
        if name in _WORDS:
            known, otherwise = _WORDS[name]
            require(value in known, f'{name} is {value!r}{otherwise}')
        # These have messages of their own, where they are read.
        elif name not in ('init_from', 'fine_tuning.init_from', 'data.path'):
            console.require_value(name, value)
        if type(value) in (int, float):
            _check_number(name, value)
        for number in value if isinstance(value, tuple) else (value,):
            is_finite = not isinstance(number, float) or math.isfinite(number)
            require(is_finite, f'{name} is {value}, but must be finite')


def _check_number(name: str, value: float) -> None:
    """Checks a number by the rule of `_NUMBERS` that has its key, if there is one."""
    section, _, key = name.rpartition('.')
    names = {name, f'*.{key}'} if section.endswith('_training') else {name}
    for rule in _NUMBERS:
        if names.intersection(rule.keys):
            require(rule.holds(value), f'{name} is {value}, but must {rule.words}')


def _check_training(name: str, training: ConfigDict) -> None:
    """Checks the section of one training."""
    rates = tuple(training.more_ema_decays)
    are_rates = all(isinstance(rate, float) and 0 < rate < 1 for rate in rates)
    require(
        are_rates and bool(training.ema_decay or not rates),
        f'{name}.more_ema_decays is {rates}, but must be numbers between 0 and 1, '
        'beside an ema_decay',
    )
    require(
        bool(training.ema_decay) or not training.ema_ramp,
        f'{name}.ema_ramp: there is no average to ramp up; give an ema_decay too',
    )
    require(
        training.batch_size % training.accumulate == 0,
        f'{name}.accumulate is {training.accumulate}, '
        f'but must divide the batch size {training.batch_size}',
    )
    require(
        training.warmup_steps <= training.steps or not training.steps,
        f'{name}.warmup_steps is {training.warmup_steps}, more than its {training.steps} steps',
    )


def _check_restarts(name: str, training: ConfigDict) -> None:
    """Checks that the learning rate of a training can rise and fall between its restarts."""
    ends = (0, *training.restarts, training.steps)
    fit = _are_whole(ends)
    if fit:
        lengths = [after - before for before, after in itertools.pairwise(ends)]
        fit = min(lengths) > training.warmup_steps
    require(
        not training.restarts or fit,
        f'{name}.restarts is {tuple(training.restarts)}, but must be ascending steps below '
        f'{training.steps}, further apart than the warm-up of {training.warmup_steps}',
    )


def _check_tokenizer(training: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Checks that the tokenizer's losses can judge images (H, W, c)."""
    if training.perceptual_weight:
        key = 'tokenizer_training.perceptual_weight'
        require(
            image_shape[-1] == 3,
            f'{key}: LPIPS is for 3 channels, not {image_shape[-1]}; set it to 0',
        )
        require(
            min(image_shape[:2]) >= 16,
            f'{key}: LPIPS is for 16×16 pixels or more, not {image_shape[:2]}; set it to 0',
        )
    if training.disc_weight:
        try:
            discriminators.build(training.discriminator, image_shape)
        except UserError as error:
            raise UserError(f'tokenizer_training.disc_weight: {error}; set it to 0') from None
        require(
            training.accumulate == 1,
            'tokenizer_training.accumulate: a discriminator needs its whole batch at once, '
            'for its statistics',
        )


def _check_fused(cfg: ConfigDict) -> None:
    """Checks that the sampler's own kernels get whole heads."""
    require(
        not cfg.ar.fused or cfg.mesh.tensor == 1,
        f'ar.fused: its kernels take whole heads, but mesh.tensor {cfg.mesh.tensor} splits them; '
        'set one of the two back',
    )


def _check_heads(section: str, width: int, heads: int) -> None:
    """Checks that attention of a width can have so many heads."""
    try:
        transformer.head_dim(width, heads)
    except ValueError as error:
        raise UserError(f'{section}: {error}') from None


def _check_backbone(v: ConfigDict, fields: Collection[str]) -> None:
    """Checks the keys of the section `vae` (v) that are fields of its backbone."""
    for channels in (v.stem, *v.channels) if 'channels' in fields else ():
        try:
            convolutional.norm_groups(channels)
        except ValueError as error:
            raise UserError(f'vae: {error}') from None
    if 'heads' in fields:
        _check_heads('vae', v.channels[-1], v.heads)


def _check_models(v: ConfigDict, a: ConfigDict, fields: Collection[str]) -> None:
    """Checks the sections `vae` (v) and `ar` (a).

    fields are the names of the backbone's fields.
    """
    for key in ('grid', 'channels'):
        require(_are_whole(v[key]), f'vae.{key} is {tuple(v[key])}, but must be whole numbers')
    require(
        len(v.grid) == 2 and min(v.grid) >= 1,
        f'vae.grid is {tuple(v.grid)}, but must be two sizes of at least 1',
    )
    require(
        len(v.channels) >= 2, f'vae.channels is {tuple(v.channels)}, but needs at least two stages'
    )
    require(
        min(v.channels) >= 1, f'vae.channels is {tuple(v.channels)}, but must be at least 1 each'
    )
    _check_backbone(v, fields)
    _check_heads('ar', a.width, a.heads)


def _check_captions(config: ConfigDict) -> None:
    """Checks that what images are drawn for comes with the data."""
    kind = config.data.name
    own = kind in schema.CAPTIONED
    given = config.data.captions is not None
    in_files = kind not in small.KINDS and kind != 'latents'
    require(not given or in_files, f'data.captions is for images in files, not for data {kind}')
    if build.has_captions(config):
        way = "image files, or use ar.condition 'classes'"
        if in_files:
            way = '--config.data.captions=FILE.jsonl, or beside'
        require(
            own or given,
            f'ar.condition {config.ar.condition!r} reads captions, which data {kind} has not: '
            f'give {way}',
        )
    else:
        require(
            not own and not given,
            f"ar.condition is {config.ar.condition}, but data {kind} has captions: use 'text'",
        )


def _check_texts(config: ConfigDict) -> None:
    """Checks the keys of the condition 'text', and that no other condition has them."""
    require(
        config.ar.alone_weight == 1 or build.writes_texts(config),
        'ar.alone_weight is for models that write texts: give ar.text_weight, or leave it out',
    )
    if config.ar.condition == 'text':
        build.open_vocabulary(config)
        require(
            not (config.ar.text_encoder_depth and build.writes_texts(config)),
            'an encoder sees a whole text, which a model that writes it may not: leave out '
            'ar.text_encoder_depth or ar.text_weight',
        )
    else:
        require(
            config.ar.text_weight is None,
            "ar.text_weight is for models of texts: use ar.condition 'text', or leave it out",
        )
        require(
            not config.ar.text_encoder_depth,
            "ar.text_encoder_depth is for models of texts: use ar.condition 'text', or set it to 0",
        )


def _check_features(config: ConfigDict) -> None:
    """Checks the keys of the condition 'features', and that no other condition has them.

    It sets `ar.feature_shape` to that of the file of features, where the config does not say it.
    """
    if build.reads_features(config):
        # A run that is opened knows the shape, and its file may be gone.
        if config.ar.feature_shape is None:
            config.ar.feature_shape = build.open_features(config).shape
        shape = tuple(config.ar.feature_shape)
        require(
            len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape),
            f'ar.feature_shape is {shape}, but must be two numbers: the places of a text, and '
            'features',
        )
    else:
        for key in ('features', 'feature_shape'):
            require(
                config.ar[key] is None,
                f"ar.{key} is for ar.condition 'features': use that, or leave it out",
            )


def _check_sphere(config: ConfigDict) -> None:
    """Checks that a radius has a use, and that the head can have what is asked of it."""
    radius = config.vae.radius
    require(
        radius is None or build.reads_radius(config),
        f'vae.radius is {radius}, but latents of vae.posterior {config.vae.posterior} lie on no '
        'sphere, and neither vae.decoder_input nor ar.token_space is projected: leave it out',
    )
    try:
        build.build_head(config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f'ar.head {config.ar.head}: {error}') from None


def _check_geodesics(config: ConfigDict) -> None:
    """Checks that a head of geodesics gets tokens on the sphere, and no option without a use."""
    if config.ar.head != 'riemannian':
        return
    require(
        build.on_a_sphere(config),
        f'ar.head riemannian needs tokens on the sphere, but those of vae.posterior '
        f'{config.vae.posterior} with ar.token_space {config.ar.token_space} have any length: '
        'use ar.token_space projected',
    )
    require(
        config.sampling.temperature == 1,
        f'sampling.temperature is {config.sampling.temperature}, but the noise of ar.head '
        'riemannian has no length to change: leave it at 1',
    )


def _check_polar(config: ConfigDict) -> None:
    """Checks that directions and lengths have their head, and latents that differ in length."""
    a = config.ar
    require(
        a.head != 'direction_magnitude' or a.token_space == 'polar',
        'ar.head direction_magnitude draws a direction and a length, but ar.token_space is '
        f'{a.token_space}: use polar',
    )
    if a.token_space != 'polar':
        return
    require(
        a.head == 'direction_magnitude',
        f'ar.token_space polar is a direction and a length, but ar.head is {a.head}: '
        'use direction_magnitude',
    )
    require(
        not build.latents_on_a_sphere(config),
        f'ar.token_space polar keeps the length of tokens, but those of vae.posterior '
        f'{config.vae.posterior} have all the same: use another posterior, as gaussian',
    )


def _check_teacher(teacher: str, head: str) -> None:
    """Checks that a head is distilled from the head that the AR model has."""
    known = pick(HEADS, 'ar.head', teacher)
    fitting = [word for word, found in HEADS.items() if getattr(found, 'TEACHER', None) is known]
    require(
        len(fitting) > 0,
        f'no head can be distilled from ar.head {teacher}: take a run whose ar.head is flow or '
        'riemannian',
    )
    require(
        head in fitting,
        f'distillation_training.head is {head}, but ar.head is {teacher}: '
        f'use {" or ".join(fitting)}',
    )


def _check_head(config: ConfigDict) -> None:
    """Checks the head beside the tokens that it draws."""
    if config.init_from is not None:
        _check_teacher(config.ar.head, config.distillation_training.head)
    _check_geodesics(config)
    _check_polar(config)


def check_image_shape(
    name: str, want: tuple[int, int, int] | None, image_shape: tuple[int, int, int]
) -> None:
    """Checks that the tokenizer's images are as large as those of a small data set.

    Args:
      name: the kind of data.
      want: the shape of its images, None where it is not known yet.
      image_shape: the shape of the tokenizer's images.

    Raises:
      UserError: the shapes differ.
    """
    require(
        want in (None, image_shape),
        f'vae makes images of {image_shape} (grid · 2^(n − 1) for n entries of vae.channels), but '
        f'data {name} has {want}',
    )


def _check_data(d: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Checks the section `data`, and that its images have the tokenizer's shape (H, W, c)."""
    height, width, channels = image_shape
    kind = small.KINDS.get(d.name)
    if kind is not None:
        want = kind.image_shape
        if want is not None:
            want = (d.enlarge * want[0], d.enlarge * want[1], want[2])
        check_image_shape(d.name, want, image_shape)
        require(
            channels == 1,
            f'vae.image_channels is {channels}, but data {d.name} is grey: set it to 1',
        )
        require(
            not d.holdout_files,
            f'data.holdout_files is for image files: data {d.name} has a held-out part of its own',
        )
    require(
        d.enlarge == 1 or d.name in _VIEWED,
        f'data.enlarge is for {" and ".join(_VIEWED)}: images of data {d.name} are resized to '
        "the tokenizer's size",
    )
    chosen = list(d.classes)
    require(
        not chosen or d.name in _VIEWED,
        f'data.classes is for {" and ".join(_VIEWED)}: of data {d.name} take the classes by a '
        'folder of links to their folders',
    )
    require(
        _are_whole(chosen) and chosen == sorted(set(chosen)) and min(chosen, default=0) >= 0,
        f'data.classes is {tuple(chosen)}, but must be ascending whole numbers from 0',
    )
    ends = tuple(d.brightness)
    require(
        not ends or d.name in _VIEWED,
        f'data.brightness is for {" and ".join(_VIEWED)}, not for {d.name}',
    )
    are_ends = all(isinstance(end, int | float) for end in ends) and len(ends) == 2
    require(
        not ends or (are_ends and 0 <= ends[0] < ends[1] <= 1),
        f'data.brightness is {ends}, but must be two numbers in order between 0 and 1',
    )
    is_central = not d.flip and tuple(d.crop_until) == (0, 0)
    require(
        d.name != 'latents' or is_central,
        'latents are of centre crops that are not flipped: give --config.data.flip=False '
        "--config.data.crop_until='(0, 0)'",
    )
    require(
        channels in (1, 3),
        f'vae.image_channels is {channels}, but must be 3 for colour or 1 for grey',
    )
    require(
        height == width,
        f'vae.grid makes images of {height} × {width} pixels (grid · 2^(n − 1) for n entries of '
        f'vae.channels), but images of data {d.name} are cropped to squares: give two equal sizes',
    )
    require(
        all(isinstance(end, int | float) for end in d.crop_until)
        and len(d.crop_until) == 2
        and 0 <= d.crop_until[0] <= d.crop_until[1],
        f'data.crop_until is {tuple(d.crop_until)}, but must be two epochs in order',
    )


def _check_distillation(
    init_from: str | None, t: ConfigDict, s: ConfigDict, text_weight: float | None
) -> None:
    """Checks the sections `distillation_training` (t) and `sampling` (s) of a distillation.

    init_from is the workdir of the teacher, None where nothing is distilled. text_weight is that
    of the AR model.
    """
    require(init_from != '', 'give --config.init_from=DIR, the workdir of a finished run')
    require(
        len(t.levels) > 0 and all(type(n) is int and n >= 1 for n in t.levels),
        f'distillation_training.levels is {tuple(t.levels)}, but must be numbers of steps',
    )
    try:
        mean_velocity.segment_steps(t.levels, t.teacher_steps, t.teacher_shift)
    except ValueError as error:
        raise UserError(
            f'distillation_training: {error}; change teacher_steps or teacher_shift'
        ) from None
    if init_from is None:
        return
    require(
        not t.transformer or text_weight is None,
        'distillation_training.transformer trains for images alone, and the model would forget to '
        'write texts: give --config.distillation_training.transformer=False',
    )
    require(
        s.guidance is None and s.solver == 'euler' and s.annealing is None,
        'a distilled head has its guidance within and takes plain steps: '
        'use sampling.solver euler without guidance',
    )
    require(
        s.num_steps in t.levels,
        f'sampling.num_steps is {s.num_steps}, '
        f'but the distilled head knows equal steps of {tuple(t.levels)}',
    )
    require(
        s.shift is None,
        f'sampling.shift is {s.shift}, but the distilled head knows equal steps: set it to None',
    )


def _check_fine_tuning(config: ConfigDict) -> None:
    """Checks the section `fine_tuning` beside what is trained."""
    tuning = fine_tuning.read(config.fine_tuning)
    init_from = config.fine_tuning.init_from
    require(init_from != '', 'give --config.fine_tuning.init_from=DIR, a finished workdir')
    require(
        init_from is not None or tuning == fine_tuning.Tuning(),
        'fine_tuning has wishes, but nothing to begin with: give '
        '--config.fine_tuning.init_from=DIR, a finished workdir',
    )
    require(
        init_from is None or config.init_from is None,
        'init_from distils a head and fine_tuning.init_from trains a model on: give one of them',
    )
    require(
        init_from is None or config.ar_training.steps > 0,
        'ar_training.steps is 0, but fine_tuning.init_from trains an AR model on',
    )


def _check_sampling(config: ConfigDict) -> None:
    """Checks the section `sampling` beside the training and the data."""
    s = config.sampling
    t = config.ar_training
    require(
        s.guidance is None or t.label_dropout > 0,
        'ar_training.label_dropout is 0: '
        'the null class, which guidance needs, would never be trained',
    )
    require(
        (s.guidance is None) == (s.guidance_scale is None),
        'sampling: give guidance_scale with a guidance schedule, and only then',
    )
    kind = small.KINDS.get(config.data.name)
    least = 1
    if kind is not None:
        least = len(config.data.classes) or kind.num_classes
    if config.data.name == 'composed':
        require(
            s.num_images >= 3,
            f'sampling.num_images is {s.num_images}, but must be at least one for each of three '
            'kinds of captions: pairs trained on, pairs held out, and rows',
        )
    elif kind is not None:
        require(
            s.num_images >= 4,
            f'sampling.num_images is {s.num_images}, but must be at least 4: precision and recall '
            'take the third nearest of the others',
        )
    classes = schema.num_classes(config)
    require(
        classes is None or classes >= least,
        f'data.num_classes is {classes}, but {config.data.name} has {least} classes',
    )
    require(
        s.num_images >= least,
        f'sampling.num_images is {s.num_images}, '
        f'but must be at least one for each of {least} classes',
    )
    section = 'ar_training' if config.init_from is None else 'distillation_training'
    trained = config[section]
    rates = [rate for rate in (trained.ema_decay, *trained.more_ema_decays) if rate]
    require(
        s.ema_decay in (None, 0.0, *rates),
        f'sampling.ema_decay is {s.ema_decay}, but {section} keeps {rates}, '
        'and 0 takes the weights themselves',
    )
    try:
        build.build_sampler(config)
    except (ValueError, TypeError) as error:
        raise UserError(f'sampling: {error}') from None


def _check_watch(w: ConfigDict, channels: int) -> None:
    """Checks the section `watch` beside the number of channels of the images."""
    has_files = w.inception is not None and w.reference is not None
    require(
        not w.fid_images or has_files,
        'watch.fid_images needs watch.inception=FILE and watch.reference=FILE too',
    )
    require(
        not w.fid_images or channels == 3,
        f'watch.fid_images: FID is for 3 channels, not {channels}; set it to 0',
    )
    require(w.fid_images != 1, 'watch.fid_images is 1, but FID needs at least 2 images')


# A share of the initialisation in an average above which it is said.
START_SHOWS = 0.05


# Epochs of a training above which its length hardly fits its images.
_MANY_EPOCHS = 2000


def share_of_start(decay: float, steps: int, ramp: bool = False) -> float:
    """The share of the initialisation in an EMA of a rate after so many steps.

    It is the product of the rates of all steps: rⁿ, or with a ramp that of
    min(r, (1 + i)/(10 + i)) for i = 0 … n − 1.
    """
    if not ramp:
        return decay**steps
    share = 1.0
    for i in range(steps):
        share *= min(decay, (1 + i) / (10 + i))
        if share < START_SHOWS / 100:  # What follows only makes it smaller.
            break
    return share


def advice(config: ConfigDict, num_images: int) -> list[str]:
    """Lines on what the trainings of a checked config amount to, for the images there are.

    They say which keys the backbone does not read, how many epochs the steps are, and where an
    average of the weights still holds much of the initialisation, see `share_of_start`.

    Args:
      config: a checked config.
      num_images: the number of training images.
    """
    lines = []
    unread = build.unread_keys(config)
    if unread:
        lines.append(f'vae: the backbone {config.vae.backbone} does not read {", ".join(unread)}')
    for name in trainings(config):
        t = config[name]
        epochs = t.steps * t.batch_size / num_images
        line = f'{name}: {t.steps} steps of {t.batch_size} images are {epochs:,.1f} epochs'
        if config.data.name not in (*small.KINDS, 'latents'):
            first, last = config.data.crop_until
            line += f'; crops are random up to epoch {first}, and all central from {last}'
        if epochs > _MANY_EPOCHS and not config.reasons:
            line += '; configs/own.py derives shorter trainings from the number of images'
        lines.append(line)
        share = share_of_start(t.ema_decay, t.steps, t.ema_ramp)
        if share > START_SHOWS:
            remedy = f'lower --config.{name}.ema_decay, give --config.{name}.ema_ramp=True'
            if name == 'ar_training':
                remedy += ', or sample the weights themselves by --config.sampling.ema_decay=0'
            began = 'initialisation'
            if config.fine_tuning.init_from is not None:
                began = 'the weights that it began with'
            lines.append(
                f'{name}: after {t.steps} steps the average of rate {t.ema_decay} '
                f'is still {share:.0%} {began}: {remedy}'
            )
    return lines


def trainings(config: ConfigDict) -> list[str]:
    """The sections of the trainings that a config asks for."""
    if config.init_from is not None:
        return ['distillation_training']
    names = (
        ['ar_training'] if config.tokenizer is not None else ['tokenizer_training', 'ar_training']
    )
    return [name for name in names if config[name].steps]


def check_training(config: ConfigDict) -> ConfigDict:
    """Checks what only a training needs. A run that was trained otherwise is opened all the same.

    Args:
      config: a checked config.

    Returns:
      The same config.

    Raises:
      UserError: it cannot be trained; one line.
    """
    for name in trainings(config):
        training = config[name]
        require(
            training.final_learning_rate <= training.learning_rate,
            f'{name}.final_learning_rate is {training.final_learning_rate}, above its '
            f'learning_rate {training.learning_rate}, so that the rate would rise: lower it, too',
        )
    d = config.data
    require(
        d.name in ('tfds', 'hf') or (d.split == 'train' and d.data_dir is None),
        f'data.split and data.data_dir are for tfds and hf: of data {d.name} name the files or the '
        'directory in data.path',
    )
    require(
        d.name not in schema.WITHOUT_PATH or not d.path,
        f'data.path is {d.path}, but data {d.name} has no path: leave it out',
    )
    is_trained = 'ar_training' in trainings(config)
    require(
        not is_trained or config.ar_training.accumulate == 1 or not build.writes_texts(config),
        'ar_training.accumulate: the loss of texts is a mean over the captions of a whole batch: '
        'set it to 1 with ar.text_weight; ar.remat=True saves memory, too',
    )
    return config


def check(config: ConfigDict) -> ConfigDict:
    """Checks the values of a config.

    Returns:
      The same config, with `ar.feature_shape` where a file of features says it.

    Raises:
      UserError: a value is impossible, or some values do not go together; one line.
    """
    _check_values(config)
    words = tuple(config.logging)
    require(
        set(words) <= set(schema.LOGGING) and len(set(words)) == len(words),
        f'logging is {words}, but must be any of {", ".join(schema.LOGGING)}',
    )
    _check_models(config.vae, config.ar, build.backbone_fields(config))
    _check_fused(config)
    image_shape = build.build_vae(config).image_shape
    _check_data(config.data, image_shape)
    for name in ('tokenizer_training', 'ar_training', 'distillation_training'):
        _check_training(name, config[name])
        _check_restarts(name, config[name])
    _check_tokenizer(config.tokenizer_training, image_shape)
    given = config.tokenizer is not None or config.init_from is not None
    require(
        config.data.name != 'latents' or given or not config.tokenizer_training.steps,
        'a tokenizer cannot be trained on latents: give --config.tokenizer=DIR, the run whose '
        'tokenizer has made them',
    )
    _check_watch(config.watch, image_shape[-1])
    _check_distillation(
        config.init_from, config.distillation_training, config.sampling, config.ar.text_weight
    )
    _check_fine_tuning(config)
    _check_head(config)
    _check_captions(config)
    _check_texts(config)
    _check_features(config)
    _check_sphere(config)
    _check_sampling(config)
    return config
