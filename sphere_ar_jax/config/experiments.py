"""The schema of an experiment's config: rows that are trained and compared, and the analysis.

An experiment repeats a run of an ordinary config for several rows and seeds. A row is a set of
changes of that config. What is compared, and on which side the paper's claim lies, stands in the
config before the first run. Files in configs/experiments/ start from `default`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sphere_ar_jax.config import checks, packaged, recipes, schema
from sphere_ar_jax.data import small
from sphere_ar_jax.data.shifted import corruptions
from sphere_ar_jax.runtime.console import UserError

# What an experiment measures of each trained row: `comparison` scores samples over guidance,
# `propagation` follows errors from token to token, `shifted` goes on from corrupted prefixes, and
# `captions` reads back what was asked for.
KINDS = ('comparison', 'propagation', 'shifted', 'captions')


class Score(NamedTuple):
    """A score of a row and seed that a claim may be about.

    Attributes:
      title: what the table of verdicts calls it.
      more_is_better: whether more of it is better.
      kind: which of `KINDS` gives it.
    """

    title: str
    more_is_better: bool
    kind: str = 'comparison'


# The scores by the names that `summarize` of each kind gives them.
SCORES = {
    'frechet_best': Score('Fréchet distance, best guidance', False),
    'frechet_common': Score('Fréchet distance, common guidance', False),
    'frechet_degradation': Score('Fréchet distance lost at the largest guidance', False),
    'accuracy_best': Score('accuracy, best guidance', True),
    'accuracy_common': Score('accuracy, common guidance', True),
    'accuracy_degradation': Score('accuracy lost at the largest guidance', False),
    'collapsed_degradation': Score('collapsed samples at the largest guidance', False),
    'brightness_distance': Score('distance of the brightness, best guidance', False),
    'norm_drift': Score('drift of the norm before projection', False),
    'seconds_per_image': Score('seconds per image', False),
    'psnr': Score('PSNR, dB', True),
    'rfrechet': Score('Fréchet distance of reconstructions', False),
    'tokenizer_steps_per_second': Score('steps/s of the tokenizer', True),
    'radial_growth': Score('growth of radial errors', False, 'propagation'),
    'tangential_growth': Score('growth of tangential errors', False, 'propagation'),
    'shifted_distance': Score('distance behind corrupted prefixes', False, 'shifted'),
    'shifted_slope': Score('distance gained per token', False, 'shifted'),
    'shifted_norm': Score('change of the norm behind corrupted prefixes', False, 'shifted'),
    'shifted_collapsed': Score('collapsed samples behind corrupted prefixes', False, 'shifted'),
    'seen_best': Score('pairs trained on, best guidance', True, 'captions'),
    'seen_common': Score('pairs trained on, common guidance', True, 'captions'),
    'held_out_best': Score('held-out pairs, best guidance', True, 'captions'),
    'held_out_common': Score('held-out pairs, common guidance', True, 'captions'),
    'rows_best': Score('two rows, best guidance', True, 'captions'),
    'rows_common': Score('two rows, common guidance', True, 'captions'),
    'captions_seen': Score('right captions, pairs trained on', True, 'captions'),
    'captions_held_out': Score('right captions, held-out pairs', True, 'captions'),
    'captions_rows': Score('right captions, two rows', True, 'captions'),
    'captions_nats': Score('−log p of a caption, nats', False, 'captions'),
}

# The paper's rows: changes of a run's config (docs/method.md, "Token spaces" and "Posterior").
LATENTS: dict[str, dict[str, Any]] = {
    'gaussian': {
        'vae': {'posterior': 'gaussian'},
        'ar': {'token_space': 'standardised'},
    },
    'gaussian_decoder_norm': {
        'vae': {'posterior': 'gaussian', 'decoder_input': 'projected'},
        'ar': {'token_space': 'standardised'},
    },
    'gaussian_norm': {
        'vae': {'posterior': 'gaussian', 'decoder_input': 'projected'},
        'ar': {'token_space': 'projected'},
    },
    'power_spherical': {},
    'sigma_vae': {
        # Its sigma is about half of the spread of mu, which the log has as `sigma_to_spread`.
        'vae': {'posterior': 'sigma_vae', 'sigma': 0.75},
        'ar': {'token_space': 'standardised'},
    },
    'vmf': {'vae': {'posterior': 'vmf'}},
}


def rows(**changes: Any) -> ConfigDict:
    """The rows of an experiment in the order in which tables show them.

    Args:
      **changes: {row: changes of the base}.
    """
    return ConfigDict(changes, sort_keys=False)


def default(base: ConfigDict) -> ConfigDict:
    """The config of an experiment, with every key there is.

    Args:
      base: the config of a run, which the rows change.
    """
    return ConfigDict(
        dict(
            # One of KINDS.
            kind='comparison',
            # The heading of the page, the claim in a sentence, and the method in a few.
            title='',
            claim='',
            method='',
            # What would change the verdict, in a sentence.
            caveat='',
            base=base.copy_and_resolve_references().to_dict(),
            # {row: changes of the base}.
            rows=rows(power_spherical={}),
            # {row: names of the rows that differ from it in the weight of the KL term alone}. The
            # best of them stands for the row.
            variants=dict(),
            seeds=(0, 1, 2, 3, 4),
            # Samples of each row, seed and guidance scale.
            num_images=1000,
            # Guidance scales, and the one at which all rows are compared.
            guidance_scales=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
            common_guidance=1.5,
            # Pairs that the claim orders: 'BETTER WORSE SCORE', a score of SCORES.
            comparisons=(),
            # {line: rows} of a plot of the Fréchet distance, the numbers that belong to the rows of
            # each line, and what the numbers are.
            curves=dict(),
            curves_at=(),
            curves_over='',
            # Pairs of rows, 'BETTER WORSE', of a map of leads over guidance.
            map=(),
            # Of the kind `propagation`: sizes of the disturbance as shares of the token's norm,
            # positions of the disturbed tokens as shares of the sequence, and images.
            disturbances=(0.01, 0.03, 0.1),
            positions=(0.0, 0.25, 0.5),
            followed_images=64,
            # Of the kind `shifted`: corruptions with their severity, see `corruptions.parse`, and
            # the shares of an image's tokens that are kept.
            shifts=tuple(f'{word}:{n}' for word in corruptions.CORRUPTIONS for n in (1, 3, 5)),
            prefixes=(0.25, 0.5),
        )
    )


def row(config: ConfigDict, name: str, seed: int) -> ConfigDict:
    """The config of the run of one row and seed.

    Args:
      config: the experiment's config.
      name: a key of its rows.
      seed: the seed.

    Returns:
      The checked config.
    """
    values = schema.leaves(config.base.to_dict())
    changes = schema.leaves(config.rows[name].to_dict())
    values.update(changes, seed=seed)
    cfg = schema.default()
    cfg.update_from_flattened_dict(values)
    return checks.check_training(checks.check(cfg))


def _check_comparison(config: ConfigDict, words: str) -> None:
    """Checks one of the comparisons, after the rows."""
    parts = words.split()
    scores = [name for name, score in SCORES.items() if score.kind == config.kind]
    known = len(parts) == 3 and all(name in config.rows for name in parts[:2])
    checks.require(
        known and parts[2] in scores,
        f'comparisons: {words!r} is not BETTER WORSE SCORE, with two of the rows '
        f'({", ".join(config.rows)}) and one of {", ".join(scores)}',
    )
    checks.require(
        not parts[2].startswith('captions_')
        or all(row(config, name, config.seeds[0]).ar.text_weight is not None for name in parts[:2]),
        f'comparisons: {words!r} needs two rows with ar.text_weight, which write captions',
    )


def _check_numbers(config: ConfigDict) -> None:
    """Checks the numbers of images, and what is varied."""
    for name in ('guidance_scales', 'disturbances', 'positions', 'prefixes'):
        values = tuple(config[name])
        are_numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in values)
        checks.require(
            len(values) > 0 and are_numbers,
            f'{name} are {values}, but must be one or more numbers',
        )
    checks.require(
        config.common_guidance in config.guidance_scales,
        f'guidance_scales are {tuple(config.guidance_scales)}, but must have common_guidance '
        f'{config.common_guidance}',
    )
    checks.require(
        min(config.num_images, config.followed_images) >= 1,
        f'num_images is {config.num_images} and followed_images {config.followed_images}, but both '
        'must be at least 1',
    )
    checks.require(
        config.kind != 'captions' or config.num_images >= 3,
        f'num_images is {config.num_images}, but must be at least 3, for three groups of captions',
    )
    checks.require(
        min(config.disturbances) > 0,
        f'disturbances are {tuple(config.disturbances)}, but must be above 0',
    )
    checks.require(
        all(0 < share < 0.9 for share in config.prefixes),
        f'prefixes are {tuple(config.prefixes)}, but must be shares between 0 and 0.9',
    )


def _check_row(config: ConfigDict, name: str, cfg: ConfigDict) -> None:
    """Checks the config of a row and seed beside the experiment's own."""
    checks.require(
        cfg.data.name in small.KINDS,
        f'the row {name}: experiments are on {", ".join(small.KINDS)}, not on data {cfg.data.name}',
    )
    checks.require(
        cfg.tokenizer is None and cfg.init_from is None and cfg.fine_tuning.init_from is None,
        f'the row {name}: experiments train all from the start: leave out tokenizer, init_from '
        'and fine_tuning',
    )
    checks.require(
        (config.kind == 'captions') == (cfg.data.name == 'composed'),
        f'the row {name}: kind {config.kind} does not go with data {cfg.data.name}: captions '
        'are scored on composed digits alone, and these by nothing else',
    )
    checks.require(
        config.kind in ('comparison', 'captions') or cfg.ar.token_space != 'polar',
        f'the row {name}: {config.kind} needs tokens with a norm, which those of '
        'ar.token_space polar have not',
    )
    checks.require(
        cfg.sampling.guidance is not None,
        f'the row {name}: experiments vary the guidance: give sampling.guidance and a scale',
    )
    count = math.prod(cfg.vae.grid)
    checks.require(
        config.kind != 'propagation'
        or all(0 <= int(share * count) <= count - 2 for share in config.positions),
        f'the row {name}: positions are {tuple(config.positions)}, but must be shares from 0 on '
        f'that leave one of {count} tokens behind them',
    )
    checks.require(
        config.kind != 'shifted'
        or all(count - round(share * count) >= 2 for share in config.prefixes),
        f'the row {name}: prefixes are {tuple(config.prefixes)}, but must leave two of {count} '
        'tokens to draw',
    )


def check(config: ConfigDict) -> ConfigDict:
    """Checks an experiment's config.

    Returns:
      The same config.

    Raises:
      UserError: a value is impossible; one line.
    """
    checks.require(config.kind in KINDS, f'kind is {config.kind!r}: use {" or ".join(KINDS)}')
    seeds = tuple(config.seeds)
    checks.require(
        len(seeds) > 0 and len(set(seeds)) == len(seeds),
        f'seeds are {seeds}, but must be one or more different numbers',
    )
    checks.require(len(config.rows) > 0, 'rows: give at least one')
    _check_numbers(config)
    for text in config.shifts:
        corruptions.parse(text)
    checks.require(len(config.shifts) > 0, 'shifts: give at least one, as noisy:3')
    for name in ('variants', 'curves', 'map'):
        checks.require(
            not config[name] or config.kind == 'comparison',
            f'{name} are for kind comparison, not for {config.kind}: leave them out',
        )
    checks.require(
        not (config.curves and config.map),
        'curves replace the plot that map would change: leave one of them out',
    )
    for name, others in config.variants.items():
        for other in (name, *others):
            checks.require(other in config.rows, f'variants: there is no row {other}')
    for name, others in config.curves.items():
        checks.require(
            len(others) == len(config.curves_at) and all(other in config.rows for other in others),
            f'curves: {name} needs a row for each of curves_at, {tuple(config.curves_at)}',
        )
    for words in config.map:
        checks.require(
            len(words.split()) == 2 and all(name in config.rows for name in words.split()),
            f'map: {words!r} is not BETTER WORSE, two of the rows ({", ".join(config.rows)})',
        )
    for name in config.rows:
        try:
            cfg = row(config, name, seeds[0])
        except UserError as error:
            raise UserError(f'the row {name}: {error}') from None
        _check_row(config, name, cfg)
    for words in config.comparisons:
        _check_comparison(config, words)
    return config


def flat(changes: Mapping[str, Any]) -> str:
    """The changes of a row as 'vae.posterior=gaussian, …', or 'nothing'."""
    found = [f'{key}={value}' for key, value in schema.leaves(dict(changes)).items()]
    return ', '.join(found) or 'nothing'


def merged(row: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The changes of a row and further ones, section by section; the latter win."""
    return {
        section: dict(row.get(section, {})) | dict(changes.get(section, {}))
        for section in dict.fromkeys([*row, *changes])
    }


def add_kl_weights(config: ConfigDict, name: str, weights: tuple[float, ...]) -> tuple[str, ...]:
    """Adds rows that differ from a row in the weight of the KL term alone.

    Args:
      config: the experiment's config.
      name: the row.
      weights: a weight for each new row.

    Returns:
      The names of the new rows.
    """
    names = []
    for weight in weights:
        # A key of a ConfigDict has no dot.
        millionths = round(1e6 * weight)
        number = f'{millionths}e-6' if millionths % 1000 else f'{millionths // 1000}e-3'
        new = f'{name}_kl_{number}'
        changes = {'tokenizer_training': {'kl_weight': weight}}
        config.rows[new] = merged(config.rows[name].to_dict(), changes)
        names.append(new)
    return tuple(names)


def shorten(training: ConfigDict, share: float) -> None:
    """Gives a training a share of its steps and of its warm-up.

    The average of the weights is kept where it forgets the initialisation in the steps that are
    left. Where it would not (`checks.START_SHOWS`), its memory 1/(1 − decay) is shortened by the
    same share.

    Args:
      training: a section of a run's config, which is changed.
      share: between 0 and 1.
    """
    steps = max(2, int(share * training.steps))
    training.update(steps=steps, warmup_steps=int(share * training.warmup_steps))
    training.log_every = min(training.log_every, steps)
    start = checks.share_of_start(training.ema_decay, steps, training.ema_ramp)
    if start > checks.START_SHOWS:
        training.ema_decay = 1 - (1 - training.ema_decay) / share


def shortened(base: ConfigDict, share: float) -> ConfigDict:
    """A run's config with a share of both trainings, and the sampler of the fewest evaluations.

    Args:
      base: the config of a run.
      share: see `shorten`.
    """
    c = base.copy_and_resolve_references()
    for name in ('tokenizer_training', 'ar_training'):
        shorten(c[name], share)
    c.sampling.update(recipes.FAST)
    return c


class _DataSet(NamedTuple):
    """What experiments on one data set share.

    Attributes:
      noun: its name in a sentence.
      share: of the steps of its own config.
      share_in_words: the same, as the page says it.
      seeds: their number.
      scores: sentences on how samples are scored.
    """

    noun: str
    share: float
    share_in_words: str
    seeds: int
    scores: str


# The data sets of the experiments by the word of their config.
_DATA = {
    'digits': _DataSet(
        'the digits',
        0.5,
        'half',
        5,
        'An SVC trained on the real digits reads 1,000 samples per row, seed and guidance scale. '
        'The Fréchet distance to all real digits is taken on their 8×8 pixels. ',
    ),
    'fashion': _DataSet(
        'Fashion-MNIST',
        0.25,
        'a quarter of',
        3,
        'A convolutional network trained on the real images reads 1,000 samples per row, seed and '
        'guidance scale. The Fréchet distance to all real images is taken in its features. ',
    ),
    'composed': _DataSet(
        'composed digits',
        0.5,
        'half',
        3,
        'A network trained on real images reads each digit and its size. An image is right where '
        'all are those asked for, in their places. A third of the 1,500 samples of a row, seed and '
        'guidance scale shows pairs of digits that were trained on, a third pairs that were held '
        'out, and a third four digits in two rows. ',
    ),
}


def start(
    name: str,
    arg: str,
    title: str,
    more: str = '',
    sampler: str = 'ab2 with 10 evaluations',
    data: str = 'digits',
) -> ConfigDict:
    """The config of an experiment before its rows, on the data that its word names.

    The trainings have a share of the steps of the data's own config.

    Args:
      name: the name of the experiment's file.
      arg: the words behind its colon, separated by commas: 'fashion' for Fashion-MNIST in place of
        the digits, 'smoke' for what `finish` does.
      title: the heading of the page.
      more: a further sentence of the method.
      sampler: what the method calls the rows' sampler.
      data: the data without the word fashion, a key of `_DATA`.

    Raises:
      ValueError: another word was given; one line.
    """
    file = f'configs/experiments/{name}.py'
    known = ('smoke',) if data == 'composed' else ('fashion', 'smoke')
    words, _ = recipes.arguments(file, arg, known)
    if 'fashion' in words:
        data = 'fashion'
    known_data = _DATA[data]
    c = default(shortened(packaged.load(data), known_data.share))
    c.title = f'{title} ({known_data.noun})'
    c.seeds = tuple(range(known_data.seeds))
    c.method = (
        'Where the table of rows says nothing else, all rows share data, order, noise, sizes and '
        f'steps: {known_data.share_in_words} the steps of configs/{data}.py, {sampler}, constant '
        f'guidance. {more}{known_data.scores}'
        'A lead is the difference of two rows, seed by seed.'
    )
    return c


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """The config of an experiment, made small where its words ask for it.

    Args:
      config: the config with its rows.
      arg: the words behind the colon. 'smoke' takes the rows of the first comparison, in few steps
        and samples of narrow models, which only show that everything runs.
    """
    if 'smoke' in arg.split(','):
        _make_small(config)
    return config


def _make_small(config: ConfigDict) -> None:
    """Takes the rows of the first comparison alone, in few steps and samples of narrow models."""
    base = config.base
    channels = (4, 8, 16, 16)[: len(base.vae.channels)]
    base.vae.update(stem=4, channels=channels, encoder_depth=1, decoder_depth=1, heads=2)
    base.ar.update(depth=1, heads=2, width=16, head_depth=2, head_width=16, head_groups=1)
    first = config.comparisons[0].split()[:2]
    for name in list(config.rows):
        if name not in first:
            del config.rows[name]
    config.variants = {}
    config.curves = {}
    for name in ('comparisons', 'map'):
        config[name] = tuple(
            words for words in config[name] if set(words.split()[:2]) <= set(first)
        )
    for name in ('tokenizer_training', 'ar_training'):
        base[name].update(steps=4, warmup_steps=1, log_every=2, checkpoint_every=4, batch_size=16)
    base.sampling.update(num_steps=2, batch_size=64)
    base.data.classifier_steps = 20
    config.update(seeds=(0, 1), num_images=60, followed_images=4, disturbances=(0.01, 0.1))
    config.update(guidance_scales=(config.common_guidance, 8.0), positions=(0.0,))
    config.update(shifts=('noisy:5',), prefixes=(0.5,))
