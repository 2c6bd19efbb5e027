"""What an experiment says: its tables, verdicts and page."""

import base64
import html
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments
from sphere_ar_jax.evaluation import page
from sphere_ar_jax.experiments import statistics
from sphere_ar_jax.runtime import console, files

# {row: {seed: scores by name}}
_Summaries = Mapping[str, Mapping[int, Mapping[str, float]]]
# The measured parts: row, seed and lines of each.
MeasuredParts = Sequence[Mapping[str, Any]]
# The heads and the rows of cells of a table.
Table = tuple[list[str], list[list[str]]]


def no_tables(measured: MeasuredParts) -> dict[str, Table]:
    """Adds no tables to those of the scores."""
    del measured
    return {}


class Kind(NamedTuple):
    """What experiments of one kind do. A module of `kinds` holds each, under the name `KIND`.

    Attributes:
      measured_by: the keys of the experiment's config that decide what is measured of a part.
      measure: (experiment's config, run's config, directory of the models, mesh) → the lines that
        are measured of one row and seed.
      summarize: (experiment's config, lines) → the scores that a claim may be about.
      plots: (experiment's config, what results.json holds, directory) → {file that was written:
        what it shows}.
      tables: (measured parts) → {heading: table} beyond those of the scores.
    """

    measured_by: tuple[str, ...]
    measure: Callable[[ConfigDict, ConfigDict, str, Mesh], list[dict[str, Any]]]
    summarize: Callable[[ConfigDict, Sequence[dict[str, Any]]], dict[str, float]]
    plots: Callable[[ConfigDict, Mapping[str, Any], str], dict[str, str]]
    tables: Callable[[MeasuredParts], dict[str, Table]] = no_tables


# The tables of scores: {heading: {score: head of its column}}.
_TABLES = {
    'Tokenizers': {
        'psnr': 'PSNR, dB',
        'rfrechet': 'rFréchet',
        'kl': 'KL, nats per token',
        'tokenizer_steps_per_second': 'steps/s',
    },
    'Fréchet distance of samples': {
        'best_guidance': 'best guidance',
        'frechet_best': 'at the best guidance',
        'frechet_common': 'at the common guidance',
        'frechet_degradation': 'lost from the best guidance to the largest',
        'precision_best': 'precision',
        'recall_best': 'recall',
    },
    'Accuracy of samples': {
        'accuracy_best': 'at the best guidance',
        'accuracy_common': 'at the common guidance',
        'accuracy_degradation': 'lost from the most accurate guidance to the largest',
        'collapsed_degradation': 'collapsed at the largest guidance, beyond those at the best',
    },
    'Brightness of samples': {
        'brightness_distance': 'Wasserstein distance, best guidance',
    },
    'Sequences': {
        'norm_drift': 'drift of the norm before projection',
        'seconds_per_image': 'seconds per image',
    },
    'Growth of small errors': {
        'radial_growth': 'radial',
        'radial_growth_predicted': 'radial, to first order',
        'tangential_growth': 'tangential',
        'tangential_growth_predicted': 'tangential, to first order',
    },
    'Spectral norms of one decoding step, before projection': {
        'radial_to_radial': 'radial → radial',
        'radial_to_tangential': 'radial → tangential',
        'tangential_to_radial': 'tangential → radial',
        'tangential_to_tangential': 'tangential → tangential',
    },
    'Tokens drawn behind corrupted prefixes, beyond those behind clean ones': {
        'shifted_distance': 'distance',
        'shifted_slope': 'distance gained per token',
        'shifted_norm': 'norm before projection',
        'shifted_collapsed': 'collapsed',
        'clean_distance': 'distance behind clean prefixes',
    },
    'Share of images read back right': {
        'best_guidance_read': 'best guidance',
        'seen_best': 'pairs trained on',
        'seen_real': 'of real images',
        'held_out_best': 'held-out pairs',
        'held_out_real': 'of real images',
        'rows_best': 'two rows',
        'rows_real': 'of real images',
    },
    'Texts written for real images': {
        'captions_seen': 'right: pairs trained on',
        'captions_held_out': 'right: held-out pairs',
        'captions_rows': 'right: two rows',
        'captions_nats': '−log p of a caption, nats',
        'captions_nats_alone': 'without the image',
    },
}


def best_of_variants(config: ConfigDict, summaries: _Summaries) -> dict[str, str]:
    """{row: the name of its variant with the least mean Fréchet distance at its best guidance}.

    Rows without variants, or without samples, stand for themselves. A variant counts when no other
    one of its row has more seeds. The variants of a row share none of their names with other rows.
    """

    def distance(name: str) -> float:
        found = [scores['frechet_best'] for scores in summaries.get(name, {}).values()]
        return float(np.mean(found)) if found else math.inf

    def seeds(name: str) -> int:
        return len(summaries.get(name, {}))

    chosen = {}
    for row in config.rows:
        names = (row, *config.variants.get(row, ()))
        most = max(seeds(name) for name in names)
        complete = [name for name in names if seeds(name) == most]
        chosen[row] = complete[0] if len(complete) == 1 else min(complete, key=distance)
    return chosen


def table(config: ConfigDict, summaries: _Summaries) -> dict[str, dict[str, Any]]:
    """Means and intervals over seeds of all scores.

    Returns:
      {row: {score: {mean, low, high, seeds}}}; ends of intervals of one seed are None. Rows of
      which nothing is measured are left out.
    """
    found = {}
    for row in config.rows:
        seeds = summaries.get(row)
        if not seeds:
            continue
        names = next(iter(seeds.values()))
        found[row] = {
            name: _plain(statistics.interval([scores[name] for scores in seeds.values()]))
            for name in names
            if all(name in scores for scores in seeds.values())
        }
    return found


def _plain(interval: statistics.Interval) -> dict[str, Any]:
    """An interval as JSON takes it."""
    ends = {'low': interval.low, 'high': interval.high}
    finite = {name: x if math.isfinite(x) else None for name, x in ends.items()}
    return {'mean': interval.mean, **finite, 'seeds': interval.seeds}


def interval(plain: Mapping[str, Any]) -> statistics.Interval:
    """Reads an interval of results.json, as `table` gives it."""
    low = -math.inf if plain['low'] is None else plain['low']
    high = math.inf if plain['high'] is None else plain['high']
    return statistics.Interval(plain['mean'], low, high, plain['seeds'])


def verdicts(config: ConfigDict, summaries: _Summaries) -> list[dict[str, Any]]:
    """What the claim's comparisons come to.

    Returns:
      For each comparison of which a seed is measured: better, worse, score, their `variants`,
      `advantage` (the better row's lead, paired by seed) and `verdict`.
    """
    chosen = best_of_variants(config, summaries)
    found = []
    for words in config.comparisons:
        better, worse, score = words.split()
        first = summaries.get(chosen[better], {})
        second = summaries.get(chosen[worse], {})
        seeds = [
            seed
            for seed, scores in first.items()
            if score in scores and score in second.get(seed, {})
        ]
        if not seeds:
            continue
        sign = 1 if experiments.SCORES[score].more_is_better else -1
        advantage = statistics.paired(
            [sign * first[seed][score] for seed in seeds],
            [sign * second[seed][score] for seed in seeds],
        )
        found.append(
            {
                'better': better,
                'worse': worse,
                'variants': [chosen[better], chosen[worse]],
                'score': score,
                'advantage': _plain(advantage),
                'verdict': statistics.verdict(advantage),
            }
        )
    return found


def of_part(measured: MeasuredParts, row: str, part: str) -> list[Mapping[str, Any]]:
    """Picks the lines of one part of a row's measurements."""
    return [
        line
        for unit in measured
        if unit['row'] == row
        for line in unit['lines']
        if line.get('part') == part
    ]


def mean(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Computes the mean over lines of a list of numbers."""
    return np.mean([line[name] for line in lines], axis=0)


def _rows_table(config: ConfigDict, found: Mapping[str, Any]) -> Table:
    """The heads and the cells of the table that says what the rows are."""
    cells = [[row, experiments.flat(config.rows[row].to_dict())] for row in found['rows']]
    return ['row', 'changes of the base'], cells


def _score_tables(kind: Kind, found: Mapping[str, Any]) -> dict[str, Table]:
    """{heading: table} of the scores, and of what a kind of experiments adds.

    A table has the rows that have any of its scores, and the scores that all of these have. Its
    heading says where other rows lack them.
    """
    tables: dict[str, Table] = {}
    for heading, columns in _TABLES.items():
        rows = {
            row: scores
            for row, scores in found['rows'].items()
            if any(name in scores for name in columns)
        }
        names = [name for name in columns if all(name in scores for scores in rows.values())]
        if not rows or not names:
            continue
        cells = [
            [row, *(str(interval(scores[name])) for name in names)] for row, scores in rows.items()
        ]
        left_out = len(found['rows']) - len(rows)
        if left_out:
            heading += f' ({left_out} of {len(found["rows"])} rows were measured without)'
        tables[heading] = (['row', *(columns[name] for name in names)], cells)
    return tables | kind.tables(found['measured'])


def _verdict_table(found: Mapping[str, Any]) -> Table:
    """The heads and the cells of the table of verdicts."""
    heads = ['claimed', 'in', 'lead, paired by seed', 'seeds', 'verdict']
    cells = []
    for verdict in found['verdicts']:
        better, worse = verdict['variants']
        lead = interval(verdict['advantage'])
        cells.append(
            [
                f'{better} better than {worse}',
                experiments.SCORES[verdict['score']].title,
                str(lead),
                str(lead.seeds),
                verdict['verdict'],
            ]
        )
    return heads, cells


def spoken(seconds: float) -> str:
    """A time as '2 h 5 min', '3 min' or '40 s'."""
    if seconds < 60:
        return f'{seconds:.0f} s'
    hours, rest = divmod(round(seconds / 60), 60)
    return f'{hours} h {rest} min' if hours else f'{rest} min'


def _missing(config: ConfigDict, found: Mapping[str, Any]) -> str:
    """Names what the config asks for and nobody has measured yet; '' where nothing is missing."""
    done = {(unit['row'], unit['seed']) for unit in found['measured']}
    seeds = {row: [seed for seed in config.seeds if (row, seed) not in done] for row in config.rows}
    rows = [row for row, lacking in seeds.items() if len(lacking) == len(config.seeds)]
    parts = [
        f'{row} with seed {seed}'
        for row, lacking in seeds.items()
        for seed in lacking
        if row not in rows
    ]
    judged = {verdict['score'] for verdict in found['verdicts']}
    asked = dict.fromkeys(words.split()[-1] for words in config.comparisons)
    scores = [experiments.SCORES[name].title for name in asked if name not in judged]
    lacking = [*rows, *parts, *(scores if judged else ())]
    return f'Not measured yet: {", ".join(lacking)}.' if lacking else ''


def _made_with(found: Mapping[str, Any]) -> str:
    """The versions and devices that measured, to follow the seeds in a sentence."""
    units = [unit.get('made_with', {}) for unit in found['measured']]
    noted = sorted(
        {
            f'sphere_ar_jax {made["version"]}, JAX {made["jax"]}, on a {made["platform"]}'
            for made in units
            if made
        }
    )
    missing = sum(not made for made in units)
    text = ''.join(f', {words}' for words in noted) + '. '
    if missing == len(units):
        text += 'The version was not noted. '
    elif missing:
        text += f'The version was not noted for {missing} of {len(units)} rows and seeds. '
    return text


def _measured_by(found: Mapping[str, Any]) -> str:
    """What the numbers were measured with and how long it took, in a few sentences."""
    seeds = sorted({unit['seed'] for unit in found['measured']})
    return (
        f'Measured with {len(seeds)} seed{"s" if len(seeds) != 1 else ""} '
        f'({", ".join(map(str, seeds)) or "none yet"}){_made_with(found)}'
        'Brackets are 95% t-intervals of the mean. '
        f'The trainings took {spoken(found["seconds"]["training"])}, one after the other, and the '
        f'measurements {spoken(found["seconds"]["measuring"])}.'
    )


def _method(config: ConfigDict) -> str:
    """The method, with the guidance scales where samples are drawn at several."""
    if config.kind not in ('comparison', 'captions'):
        return config.method
    scales = [f'{scale:g}' for scale in config.guidance_scales]
    return (
        f'{config.method} The guidance scales are {", ".join(scales)}, and the common one is '
        f'{config.common_guidance:g}.'
    )


def _markdown(
    kind: Kind, config: ConfigDict, found: Mapping[str, Any], plots: Mapping[str, str]
) -> str:
    """The page as Markdown."""
    parts = [
        f'# {config.title}',
        f'**Claim.** {config.claim}',
        f'**Method.** {_method(config)}',
        *(f'![{alt}]({name})' for name, alt in plots.items()),
        '## Verdicts',
        '\n'.join(console.markdown(*_verdict_table(found))),
        config.caveat,
        _missing(config, found),
        '## Rows',
        '\n'.join(console.markdown(*_rows_table(config, found))),
        *(
            f'## {heading}\n\n' + '\n'.join(console.markdown(*cells))
            for heading, cells in _score_tables(kind, found).items()
        ),
        _measured_by(found),
        f'```bash\n{found["command"]}\n```',
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        inner = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)
        return f'<tr>{inner}</tr>'

    body = ''.join(line(row, 'td') for row in rows)
    return f'<div class="wide"><table>{line(heads, "th")}{body}</table></div>'


def _image(path: str, alt: str) -> str:
    """A plot as HTML that holds it."""
    content = base64.b64encode(epath.Path(path).read_bytes()).decode()
    source = f'data:image/png;base64,{content}'
    return f'<div class="wide"><img class="plot" alt="{alt}" src="{source}"></div>'


def write(kind: Kind, config: ConfigDict, found: Mapping[str, Any], directory: str) -> None:
    """Writes plots, page.md and page.html into the experiment's directory.

    Args:
      kind: what experiments of its kind do.
      config: the experiment's config.
      found: what results.json holds.
      directory: the experiment's directory.
    """
    plots = kind.plots(config, found, directory) if found['rows'] else {}
    files.write_bytes(f'{directory}/page.md', _markdown(kind, config, found, plots).encode())
    body = [
        f'<p><b>Claim.</b> {html.escape(config.claim)}</p>',
        f'<p><b>Method.</b> {html.escape(_method(config))}</p>',
        *(_image(os.path.join(directory, name), alt) for name, alt in plots.items()),
        '<h2>Verdicts</h2>',
        _html_table(*_verdict_table(found)),
        *(
            f'<p>{html.escape(text)}</p>'
            for text in (config.caveat, _missing(config, found))
            if text
        ),
        '<h2>Rows</h2>',
        _html_table(*_rows_table(config, found)),
        *(
            f'<h2>{html.escape(heading)}</h2>{_html_table(*cells)}'
            for heading, cells in _score_tables(kind, found).items()
        ),
        f'<p>{html.escape(_measured_by(found))}</p>',
        f'<pre>{html.escape(found["command"])}</pre>',
    ]
    document = page.document(config.title, '\n'.join(body))
    files.write_bytes(f'{directory}/page.html', document.encode())
