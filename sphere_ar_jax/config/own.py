"""What configs/own.py derives from a folder of images: sizes, steps and rates, each with a reason.

  count    how many images and classes a data set has
  decide   the values of the config that follow, a pure function
  apply    writes them into a config, with their reasons
  lines    what the start of a training says about them

No value was tuned on images other than the package's own, and none was measured on a GPU. The
lengths come from an account of operations ("How long it takes" in docs/own_images.md).

Dimensions:
  n  images of the data set
  B  images of a step
"""

import json
import math
import os
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sphere_ar_jax.config import recipes, schema
from sphere_ar_jax.data import sources
from sphere_ar_jax.runtime.console import UserError

# Sides of the images, in pixels.
SIZES = (64, 128, 256)


class Counted(NamedTuple):
    """What is known of a data set before it is opened.

    Attributes:
      images: n, at least 1.
      classes: the number of classes, at least 1.
      how: how this is known, a clause that follows 'n images in so many classes'.
      grey: whether its images are grey, and are neither cropped nor flipped.
      side: where they are grey, the side of the images that they are filled up to.
      is_guess: whether the images of a data set that is fetched by its name are not counted.
    """

    images: int
    classes: int
    how: str
    grey: bool = False
    side: int = 32
    is_guess: bool = False


class Wishes(NamedTuple):
    """What the words after the colon of configs/own.py ask for.

    Attributes:
      size: the side of the images in pixels, one of `SIZES`.
      steps: steps of the AR model, None where they are derived.
      epochs: its epochs in place of steps, or None.
      grey: whether the model is grey.
      flip: whether images are flipped left to right.
      crop: whether crops are random; otherwise all are the square in the middle.
      captions: `data.captions` of images that have texts, None where they have classes.
      features: a file with the features of these texts, None where the model reads the texts.
      smoke: the smallest models for a few steps.
    """

    size: int = 64
    steps: int | None = None
    epochs: int | None = None
    grey: bool = False
    flip: bool = True
    crop: bool = True
    captions: str | None = None
    features: str | None = None
    smoke: bool = False


class Decision(NamedTuple):
    """Values of the config that have one reason.

    Attributes:
      values: {dotted key: value}; empty for a sentence on what all others follow from.
      reason: a sentence.
    """

    values: dict[str, Any]
    reason: str

    def line(self) -> str:
        """The decision as 'KEY=VALUE KEY=VALUE: reason', or the reason alone."""
        if not self.values:
            return self.reason
        pairs = ' '.join(f'{key}={_shown(value)}' for key, value in self.values.items())
        return f'{pairs}: {self.reason}'


# A pair of `Decision.line`, and what follows it.
_PAIR = re.compile(r'(?P<key>[\w.]+)=(?P<value>"(?:[^"\\]|\\.)*"|[^\s"]+?)(?P<end>:? )')


def _shown(value: Any) -> str:
    """A value as text without spaces; a text that has some itself is in quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if re.search(r'[\s"]', value) else value
    return str(value).replace(' ', '')


def _pairs(line: str) -> list[tuple[str, str]]:
    """The keys and shown values of a line of `Decision.line`."""
    found = []
    start = 0
    while match := _PAIR.match(line, start):
        found.append((match['key'], match['value']))
        start = match.end()
        if match['end'] == ': ':
            break
    return found


# ---- counting


def _opened(kind: str, path: str, captions: str | None) -> Counted:
    """Counts the images of a data set whose opening is quick.

    Raises:
      UserError: it cannot be opened.
    """
    if kind == 'idx':
        # Imported here, because JAX comes with it.
        from sphere_ar_jax.data import idx

        training, _ = idx.splits(path)
        how = 'as its files say'
        side = training.image_shape[0]
        return Counted(len(training), training.num_classes, how, grey=True, side=side)
    source = sources.open_source(kind, path, needs_labels=captions is None)
    # Each name of an ArrayRecord is a read of a record with its image.
    if captions is not None and kind != 'array_records':
        # Imported here, because JAX comes with it.
        from sphere_ar_jax.data.captions import table

        # Images that a table does not name are left out.
        source = table.with_captions(source, captions)
    return Counted(len(source), source.num_classes, 'as counted there')


def count(kind: str, path: str, captions: str | None = None) -> Counted:
    """Counts the images and classes of a data set, as far as that is quick.

    A folder is listed, which takes seconds for a million files. No image is read.

    Args:
      kind: a key of `schema.DATA` other than `schema.WITHOUT_PATH`.
      path: its path; for tfds and hf its name.
      captions: `data.captions` of images that have texts, None where they have classes.
    """
    if kind == 'imagenet':
        how = 'which is assumed: a tar is counted only when it is opened'
        return Counted(recipes.IMAGENET, 1000, how)
    why = 'a TFDS data set is counted only when it is opened'
    if kind == 'hf':
        why = 'a data set of a hub is counted only when it is opened'
    if not sources.is_name(kind, path):
        try:
            return _opened(kind, path, captions)
        except (OSError, UserError):
            why = f'{os.path.basename(path) or path} cannot be counted here'
    how = f'which is assumed: {why}; give images= where there are more or fewer'
    is_guess = sources.is_name(kind, path)
    return Counted(2000, 10, how, grey=kind == 'idx', is_guess=is_guess)


# ---- deciding

# The share of the images that is held out, and the number of images from which on it is.
_HELD_OUT = 0.05
_HELD_OUT_FROM = 200


def _rounded(number: float) -> int:
    """A number to two significant digits, at least 1."""
    digits = max(0, math.floor(math.log10(max(number, 1))) - 1)
    return max(1, round(number / 10**digits) * 10**digits)


def _batch(n: int, size: int) -> int:
    """B: the largest power of two up to n/8, from 16 to what a small GPU's memory takes."""
    most = {64: 64, 128: 32, 256: 16}[size]
    return max(min(most, 2 ** int(math.log2(max(n / 8, 1)))), 16)


def _facts(found: Counted, size: int) -> Decision:
    """The sentence on what all else follows from."""
    classes = '1 class' if found.classes == 1 else f'{found.classes:,} classes'
    few = ''
    if found.images < 500:
        few = ' So few images are learnt by heart, and samples will resemble them.'
    return Decision(
        {},
        f'derived for {size}×{size} pixels from {found.images:,} images in {classes}, {found.how}. '
        f'Each line gives values and their reason; --config.KEY=VALUE overrides one.{few}',
    )


def _tokenizer(size: int, channels: int, smoke: bool) -> Decision:
    """The tokenizer's model."""
    stages = {64: (32, 64, 128, 256), 128: (32, 64, 128, 256), 256: (32, 32, 64, 128, 256)}[size]
    stem = 32
    depths = (2, 4)
    heads = 4
    if smoke:
        stages = tuple(width // 8 if width > 64 else 8 for width in stages)
        stem = 8
        depths = (1, 1)
        heads = 2
    tokens = size // 2 ** (len(stages) - 1)
    reason = f'{tokens}×{tokens} tokens of {size // tokens}×{size // tokens} pixels each.'
    # Without convolutions there is half as much to compile.
    backbone = {'vae.backbone': 'vit'} if smoke else {}
    return Decision(
        backbone
        | {
            'vae.grid': (tokens, tokens),
            'vae.channels': stages,
            'vae.stem': stem,
            'vae.encoder_depth': depths[0],
            'vae.decoder_depth': depths[1],
            'vae.heads': heads,
            'vae.image_channels': channels,
        },
        reason,
    )


# Sizes of the AR model: (images below which it is taken, its values, what it amounts to).
_MODELS: tuple[tuple[float, dict[str, int], str], ...] = (
    (
        1000,
        dict(depth=6, heads=4, width=256, head_depth=4, head_width=256, head_groups=2),
        '7 million parameters, for fewer than 1,000 images',
    ),
    (
        20_000,
        dict(depth=8, heads=6, width=384, head_depth=4, head_width=384, head_groups=2),
        '18 million parameters, for 1,000 to 20,000 images',
    ),
    (
        200_000,
        dict(depth=12, heads=8, width=512, head_depth=6, head_width=512, head_groups=2),
        '51 million parameters, for 20,000 to 200,000 images',
    ),
    (
        math.inf,
        dict(depth=16, heads=12, width=768, head_depth=6, head_width=768, head_groups=2),
        '135 million parameters, for 200,000 images and more, on a GPU that is not small',
    ),
)
_SMALLEST = dict(depth=1, heads=2, width=64, head_depth=1, head_width=64, head_groups=1)


def _ar(n: int, size: int, smoke: bool) -> Decision:
    """The AR model."""
    sizes, amount = next((sizes, text) for most, sizes, text in _MODELS if n < most)
    reason = f'{amount}; more would learn the images by heart sooner.'
    if smoke:
        sizes = _SMALLEST
        reason = 'a model that draws nothing yet, to see that everything runs.'
    values = {f'ar.{key}': value for key, value in sizes.items()}
    values['ar.class_tokens'] = 4 if size == 64 else 16
    return Decision(values, reason)


def _length(trained: int, batch: int, wishes: Wishes) -> tuple[int, str]:
    """The steps of the AR model, and why; `trained` are the images that are not held out."""
    if wishes.steps is not None:
        return wishes.steps, 'as asked for'
    if wishes.epochs is not None:
        steps = max(1, round(wishes.epochs * trained / batch))
        return steps, f'the {wishes.epochs} epochs asked for'
    if wishes.smoke:
        return 20, 'a smoke test'
    seen = 600_000 * math.sqrt(trained / 2000)
    steps = _rounded(seen / batch)
    return steps, (
        f'each image is seen {steps * batch / trained:,.0f} times. The rule is 300 times for 2,000 '
        'training images, and half as often for four times as many'
    )


def _training(batch: int, steps: int, why: str, rate: float) -> list[Decision]:
    """The lengths and rates of both trainings."""
    follows = _rounded(0.75 * steps)
    window = max(steps / 20, 1)
    decay = round(min(max(1 - 1 / window, 0.9), 0.9999), 5)
    log_every = min(max(steps // 100, 5), 100)
    save_every = min(max(steps // 10, 10), 1000)
    both = ('tokenizer_training', 'ar_training')
    size_of_batch = 'up to an eighth of the images, from 16 to what a small GPU holds.'
    if batch < 16:
        size_of_batch = 'a small batch for a smoke test.'
    return [
        Decision({f'{name}.batch_size': batch for name in both}, size_of_batch),
        Decision({'ar_training.steps': steps}, f'{why}.'),
        Decision(
            {'tokenizer_training.steps': follows},
            "three quarters of the AR model's: it has less to learn.",
        ),
        Decision(
            {
                'tokenizer_training.warmup_steps': _warmup(follows),
                'ar_training.warmup_steps': _warmup(steps),
            },
            'a twentieth of the steps, at most 5,000.',
        ),
        Decision(
            {
                'tokenizer_training.learning_rate': 5e-4,
                'tokenizer_training.final_learning_rate': 1e-5,
                'ar_training.learning_rate': rate,
                'ar_training.final_learning_rate': 1e-5,
            },
            'small models and batches bear more than the published rates, 0.0001 and 0.0003. '
            'Both fall along a cosine.',
        ),
        Decision(
            {'ar_training.ema_decay': decay, 'ar_training.ema_ramp': True},
            'the average is over about a twentieth of the steps, and begins with a short one, so '
            'that nothing of the initialisation stays in it.',
        ),
        Decision(
            {f'{name}.log_every': log_every for name in both}
            | {f'{name}.checkpoint_every': save_every for name in both}
            | {'watch.every': max(steps // 8, 10)},
            'a hundred lines, ten checkpoints and eight looks at samples, or more and fewer where '
            'the training is long or short.',
        ),
    ]


def _warmup(steps: int) -> int:
    """Steps in which the learning rate rises."""
    return min(math.ceil(steps / 20), 5000)


def _images(n: int, epochs: float, wishes: Wishes) -> list[Decision]:
    """What becomes of image files before a model sees them."""
    if wishes.crop:
        until = (int(epochs * 0.875), int(epochs * 0.9375))
        crops = (
            'random crops keep 80 to 100% of the shorter side; the last sixteenth of the epochs '
            'has the square in the middle alone. Give whole for that one throughout.'
        )
        if until[1] == 0:
            crops = 'the square in the middle alone, since the epochs are few.'
    else:
        until = (0, 0)
        crops = 'always the whole square in the middle.'
    flips = 'images are not flipped.'
    if wishes.flip:
        flips = 'images are mirrored left to right at random. Give no_flip for letters and maps.'
    return [
        Decision({'data.crop_until': until}, crops),
        Decision({'data.flip': wishes.flip}, flips),
        Decision({'data.max_broken': 0.05}, 'a broken file is named, and up to 5% are replaced.'),
        _held_out(n, wishes.smoke),
    ]


def _blocks(size: int, side: int) -> Decision:
    """How images of IDX files, of side × side pixels, come to the model's size."""
    reason = f'images of these files have {side}×{side} pixels here, and each becomes a block.'
    return Decision({'data.enlarge': max(size // side, 1)}, reason)


def _held_out(n: int, smoke: bool) -> Decision:
    """The share of the images that is held out."""
    if smoke:
        reason = 'none in a smoke test, since their losses are programs to compile.'
        return Decision({'data.holdout_files': 0.0}, reason)
    if n < _HELD_OUT_FROM:
        reason = f'fewer than {_HELD_OUT_FROM} images are all trained on.'
        return Decision({'data.holdout_files': 0.0}, reason)
    return Decision(
        {'data.holdout_files': _HELD_OUT},
        'these are never trained on. Where their loss rises while that of the others falls, the '
        'model learns its images by heart.',
    )


# Rows of a look at samples, at most.
_LOOKED_AT = 8


def _texts(captions: str | None, features: str | None) -> list[Decision]:
    """What the model reads where images have captions."""
    if captions is None:
        return []
    values = {'ar.condition': 'text', 'data.captions': captions}
    what = 'captions'
    if features is not None:
        values |= {'ar.condition': 'features', 'ar.features': features}
        what = 'the features of captions'
    return [Decision(values, f'the model reads {what} in place of classes.')]


def _sampling(rows: int, tokens: int, smoke: bool) -> list[Decision]:
    """How images are drawn. `rows` is the number of classes, or that of captions to look at."""
    amount = dict(num_images=max(1000, rows), batch_size=64)
    if smoke:
        amount = dict(num_images=max(16, rows), batch_size=16, **recipes.FAST)
    count = Decision(
        {f'sampling.{key}': value for key, value in amount.items()},
        'what --mode=sample draws, unless it is told another number.',
    )
    if rows == 1:
        return [
            count,
            Decision(
                {
                    'sampling.guidance': None,
                    'sampling.guidance_scale': None,
                    'ar_training.label_dropout': 0.0,
                    'watch.columns': 8 if smoke else 16,
                },
                'with one class there is nothing to guide towards: samples are unconditional.',
            ),
        ]
    schedule = ('constant', 1.5) if tokens == 64 else ('linear', 3.0)
    watch = dict(classes=min(2 if smoke else _LOOKED_AT, rows), columns=4 if smoke else 8)
    return [
        count,
        Decision(
            {'sampling.guidance': schedule[0], 'sampling.guidance_scale': schedule[1]},
            'mild guidance towards what is asked for; more gives clearer, more uniform images.',
        ),
        Decision(
            {f'watch.{key}': value for key, value in watch.items()},
            'a look shows a row for each of some classes or captions.',
        ),
    ]


def decide(found: Counted, wishes: Wishes) -> tuple[Decision, ...]:
    """The values of the config that follow from a data set and from the words after the colon.

    Sized so that 2,000 images of 64×64 pixels take 1.0·10¹⁶ operations, 34 minutes at 5 TFLOP/s.

    Args:
      found: the data set.
      wishes: the words.

    Returns:
      The decisions. The first one has no values and says what all follow from.
    """
    n = found.images
    smoke = wishes.smoke
    held_out = 0.0 if found.grey else _held_out(n, smoke).values['data.holdout_files']
    trained = round(n * (1 - held_out))
    size = wishes.size
    batch = 8 if smoke else _batch(n, size)
    steps, why = _length(trained, batch, wishes)
    model = _ar(n, size, smoke)
    rate = 5e-4 if model.values['ar.width'] < 512 else 3e-4
    tokenizer = _tokenizer(size, 1 if wishes.grey or found.grey else 3, smoke)
    tokens = math.prod(tokenizer.values['vae.grid'])
    losses = Decision(
        {
            'tokenizer_training.l2_weight': 1.0,
            'tokenizer_training.perceptual_weight': 0.0,
            'tokenizer_training.disc_weight': 0.0,
        },
        'absolute and squared error need no files; LPIPS would give sharper images, see '
        'docs/own_images.md.',
    )
    images = [_blocks(size, found.side)]
    if not found.grey:
        images = _images(n, steps * batch / trained, wishes)
    return (
        _facts(found, size),
        tokenizer,
        model,
        *_training(batch, steps, why, rate),
        losses,
        *images,
        *_texts(wishes.captions, wishes.features),
        *_sampling(_LOOKED_AT if wishes.captions else found.classes, tokens, smoke),
    )


# ---- in a config


def apply(config: ConfigDict, decisions: tuple[Decision, ...]) -> None:
    """Writes decisions into a config, and their lines into its key `reasons`."""
    for decision in decisions:
        config.update_from_flattened_dict(decision.values)
    config.reasons = tuple(decision.line() for decision in decisions)


def lines(config: ConfigDict) -> list[str]:
    """The reasons that a config holds, with what was overridden since.

    Args:
      config: any config; one that derives nothing has no reasons.
    """
    values = schema.leaves(config.to_dict())
    found = []
    for reason in config.reasons:
        other = [
            f'{key}={_shown(values[key])}'
            for key, value in _pairs(reason)
            if key in values and _shown(values[key]) != value
        ]
        overridden = f' Overridden: {" ".join(other)}.' if other else ''
        found.append(f'{reason}{overridden}')
    return found
