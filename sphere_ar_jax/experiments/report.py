"""What an experiment says: its table, verdicts, plots and page."""

import base64
import html
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments
from sphere_ar_jax.evaluation import page
from sphere_ar_jax.evaluation.pictures import save_figure
from sphere_ar_jax.experiments import shifted, statistics
from sphere_ar_jax.runtime import console, files

# {row: {seed: scores by name}}
_Summaries = Mapping[str, Mapping[int, Mapping[str, float]]]

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
        'frechet_degradation': 'lost at the largest guidance',
        'precision_best': 'precision',
        'recall_best': 'recall',
    },
    'Accuracy of samples': {
        'accuracy_best': 'at the best guidance',
        'accuracy_common': 'at the common guidance',
        'accuracy_degradation': 'lost at the largest guidance',
        'collapsed_degradation': 'collapsed at the largest guidance',
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
}

# What the table of verdicts calls the scores.
_SCORES = {
    'frechet_best': 'Fréchet distance, best guidance',
    'frechet_common': 'Fréchet distance, common guidance',
    'frechet_degradation': 'Fréchet distance lost at the largest guidance',
    'accuracy_best': 'accuracy, best guidance',
    'accuracy_common': 'accuracy, common guidance',
    'accuracy_degradation': 'accuracy lost at the largest guidance',
    'collapsed_degradation': 'collapsed samples at the largest guidance',
    'brightness_distance': 'distance of the brightness, best guidance',
    'norm_drift': 'drift of the norm before projection',
    'seconds_per_image': 'seconds per image',
    'psnr': 'PSNR, dB',
    'rfrechet': 'Fréchet distance of reconstructions',
    'tokenizer_steps_per_second': 'steps/s of the tokenizer',
    'radial_growth': 'growth of radial errors',
    'tangential_growth': 'growth of tangential errors',
    'shifted_distance': 'distance behind corrupted prefixes',
    'shifted_slope': 'distance gained per token',
    'shifted_norm': 'change of the norm behind corrupted prefixes',
    'shifted_collapsed': 'collapsed samples behind corrupted prefixes',
}


def best_of_variants(config: ConfigDict, summaries: _Summaries) -> dict[str, str]:
    """{row: the name of its variant with the least mean Fréchet distance at its best guidance}.

    Rows without variants, or without samples, stand for themselves. The variants of a row share
    none of their names with other rows.
    """

    def distance(name: str) -> float:
        found = [scores['frechet_best'] for scores in summaries.get(name, {}).values()]
        return float(np.mean(found)) if found else math.inf

    chosen = {}
    for row in config.rows:
        others = config.variants.get(row, ())
        chosen[row] = min((row, *others), key=distance) if others else row
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


def _interval(plain: Mapping[str, Any]) -> statistics.Interval:
    """The interval that `_plain` wrote."""
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
        seeds = [seed for seed in first if seed in second]
        if not seeds:
            continue
        sign = 1 if experiments.SCORES[score] else -1
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


def _curves(
    measured: Sequence[Mapping[str, Any]], row: str, name: str
) -> tuple[np.ndarray, list[statistics.Interval]]:
    """The guidance scales of a row, and the interval of a score over seeds at each of them."""
    values: dict[float, list[float]] = {}
    for unit in measured:
        if unit['row'] != row:
            continue
        for line in unit['lines']:
            if line.get('guidance') is not None:
                values.setdefault(line['guidance'], []).append(line[name])
    scales = sorted(values)
    return np.array(scales), [statistics.interval(values[scale]) for scale in scales]


def _band(
    axis: Axes, x: Sequence[float] | np.ndarray, found: list[statistics.Interval], **style: Any
) -> None:
    """Draws means as a line and their intervals as a band."""
    (line,) = axis.plot(x, [interval.mean for interval in found], marker='o', ms=3, **style)
    if all(interval.seeds > 1 for interval in found):
        low = [interval.low for interval in found]
        high = [interval.high for interval in found]
        axis.fill_between(x, low, high, alpha=0.15, color=line.get_color())


_GUIDED = {
    'frechet': 'Fréchet distance',
    'accuracy': 'accuracy',
    'recall': 'recall',
    'collapsed': 'share of collapsed samples',
}


def _plot_guidance(path: str, rows: Sequence[str], measured: Sequence[Mapping[str, Any]]) -> None:
    """Plots scores of samples against the guidance scale, one line for each row."""
    figure, axes = plt.subplots(1, len(_GUIDED), figsize=(4.2 * len(_GUIDED), 3.6))
    for axis, (name, label) in zip(axes, _GUIDED.items(), strict=True):
        for row in rows:
            scales, found = _curves(measured, row, name)
            if len(scales):
                _band(axis, scales, found, label=row)
        axis.set_xlabel('guidance scale')
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale('log')
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def _of_part(measured: Sequence[Mapping[str, Any]], row: str, part: str) -> list[Mapping[str, Any]]:
    """The lines of one part of a row's measurements."""
    return [
        line
        for unit in measured
        if unit['row'] == row
        for line in unit['lines']
        if line.get('part') == part
    ]


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """The mean over lines of a list of numbers."""
    return np.mean([line[name] for line in lines], axis=0)


def _plot_norms(path: str, rows: Sequence[str], measured: Sequence[Mapping[str, Any]]) -> None:
    """Plots the norms of tokens before projection against their position."""
    figure, axes = plt.subplots(1, len(rows), figsize=(4.2 * len(rows), 3.6), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        lines = _of_part(measured, row, 'norms')
        modes = dict.fromkeys(line['mode'] for line in lines)
        for mode, dashes in zip(modes, ('-', '--', ':'), strict=False):
            mine = [line for line in lines if line['mode'] == mode]
            mean = _mean(mine, 'raw_norm_mean')
            spread = _mean(mine, 'raw_norm_std')
            (line,) = axis.plot(mean, dashes, label=f'projected {mode}')
            x = np.arange(len(mean))
            axis.fill_between(x, mean - spread, mean + spread, alpha=0.15, color=line.get_color())
        axis.set_title(row)
        axis.set_xlabel('position of the token')
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0, 0].set_ylabel('norm before projection, mean ± spread')
    figure.tight_layout()
    save_figure(figure, path)


def _plot_changes(path: str, rows: Sequence[str], measured: Sequence[Mapping[str, Any]]) -> None:
    """Plots changes of later tokens against their distance from the disturbed one."""
    figure, axes = plt.subplots(1, len(rows), figsize=(4.2 * len(rows), 3.6), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        lines = _of_part(measured, row, 'disturbance')
        position = min(line['position'] for line in lines)
        for i, direction in enumerate(('radial', 'tangential')):
            for size in sorted({line['size'] for line in lines}):
                mine = [
                    line
                    for line in lines
                    if line['direction'] == direction
                    and line['size'] == size
                    and line['position'] == position
                ]
                change = _mean(mine, 'change')[position + 1 :]
                predicted = _mean(mine, 'predicted')[position + 1 :]
                x = np.arange(1, len(change) + 1)
                label = f'{direction}, ε = {size:g}'
                axis.plot(x, change, color=f'C{i}', alpha=0.3 + size * 6, label=label)
                axis.plot(x, predicted, ':', color=f'C{i}', alpha=0.3 + size * 6)
        axis.set_yscale('log')
        axis.set_title(row)
        axis.set_xlabel('tokens after the disturbed one')
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel('change / norm (dotted: to first order)')
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='upper center', ncols=6, bbox_to_anchor=(0.5, 0), fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def _plot_shifted(path: str, rows: Sequence[str], measured: Sequence[Mapping[str, Any]]) -> None:
    """Plots distances and norms by position, of the shortest prefix and the largest severities."""
    size = (4.2 * len(rows), 6.4)
    figure, axes = plt.subplots(2, len(rows), figsize=size, sharey='row', squeeze=False)
    for column, row in zip(axes.T, rows, strict=True):
        lines = _of_part(measured, row, 'shifted')
        kept = min(line['kept'] for line in lines)
        for word in dict.fromkeys(line['corruption'] for line in lines):
            most = max(line['severity'] for line in lines if line['corruption'] == word)
            mine = [
                line
                for line in lines
                if (line['corruption'], line['severity'], line['kept']) == (word, most, kept)
            ]
            distance = _mean(mine, 'distance')
            column[0].plot(distance, label=word)
            x = np.arange(kept, len(distance))
            column[1].plot(x, _mean(mine, 'raw_norm_mean')[kept:])
        for axis in column:
            axis.axvspan(-0.5, kept - 0.5, color='0.9')
            axis.grid(alpha=0.3)
        column[0].set_title(row)
        column[1].set_xlabel('position of the token (grey: prefix)')
    axes[0, 0].set_ylabel('distance to training tokens')
    axes[1, 0].set_ylabel('norm before projection')
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def _plots(config: ConfigDict, found: Mapping[str, Any], directory: str) -> dict[str, str]:
    """Writes the plots. Returns {file name: what it shows}."""
    rows = [row for row in config.rows if row in found['rows']]
    if not rows:
        return {}
    if config.kind == 'comparison':
        _plot_guidance(f'{directory}/guidance.png', rows, found['measured'])
        return {'guidance.png': 'scores of samples over the guidance scale, with 95% intervals'}
    if config.kind == 'shifted':
        _plot_shifted(f'{directory}/shifted.png', rows, found['measured'])
        return {'shifted.png': 'distances and norms of tokens behind corrupted prefixes'}
    _plot_norms(f'{directory}/norms.png', rows, found['measured'])
    _plot_changes(f'{directory}/changes.png', rows, found['measured'])
    return {
        'norms.png': 'norms of tokens before projection',
        'changes.png': 'changes of later tokens after a disturbance of one',
    }


def _rows_table(config: ConfigDict, found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads and the cells of the table that says what the rows are."""
    cells = [[row, experiments.flat(config.rows[row].to_dict())] for row in found['rows']]
    return ['row', 'changes of the base'], cells


def _score_tables(
    found: Mapping[str, Any],
) -> dict[str, tuple[list[str], list[list[str]]]]:
    """{heading: (heads, cells)} of the tables of scores."""
    tables = {}
    for heading, columns in _TABLES.items():
        names = [
            name for name in columns if all(name in scores for scores in found['rows'].values())
        ]
        if not names:
            continue
        cells = [
            [row, *(str(_interval(scores[name])) for name in names)]
            for row, scores in found['rows'].items()
        ]
        tables[heading] = (['row', *(columns[name] for name in names)], cells)
    modes = _mode_cells(found)
    if modes:
        heads = ['row', 'projected', 'accuracy', 'Fréchet', 'norm of token 0', 'of the last one']
        tables['Scores with and without projection'] = (heads, modes)
    shifts = _shift_cells(found)
    if shifts:
        heads = ['row', 'corruption', 'kept tokens', 'distance', 'per token', 'norm', 'collapsed']
        tables['Each corruption, beyond clean prefixes'] = (heads, shifts)
    return tables


def _shift_cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table of corruptions, as `shifted.beyond_clean` has them; [] without any."""
    values: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for unit in found['measured']:
        lines = [line for line in unit['lines'] if line.get('part') == 'shifted']
        for line in shifted.beyond_clean(lines):
            corruption = f'{line["corruption"]} {line["severity"]}'
            values.setdefault((unit['row'], corruption, str(line['kept'])), []).append(line)
    cells = []
    for names, lines in values.items():
        shown = [
            str(statistics.interval([line[name] for line in lines]))
            for name in ('distance', 'slope', 'norm', 'collapsed')
        ]
        cells.append([*names, *shown])
    return cells


def _mode_cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table of the ways in which tokens are projected; [] where there are none."""
    cells = []
    for row in found['rows']:
        lines = _of_part(found['measured'], row, 'norms')
        for mode in dict.fromkeys(line['mode'] for line in lines):
            mine = [line for line in lines if line['mode'] == mode]
            numbers = [
                [line['accuracy'] for line in mine],
                [line['frechet'] for line in mine],
                [line['raw_norm_mean'][0] for line in mine],
                [line['raw_norm_mean'][-1] for line in mine],
            ]
            shown = [str(statistics.interval(values)) for values in numbers]
            cells.append([row, mode, *shown])
    return cells


def _verdict_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads and the cells of the table of verdicts."""
    heads = ['claimed', 'in', 'lead, paired by seed', 'seeds', 'verdict']
    cells = []
    for verdict in found['verdicts']:
        better, worse = verdict['variants']
        lead = _interval(verdict['advantage'])
        cells.append(
            [
                f'{better} before {worse}',
                _SCORES[verdict['score']],
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
    if not rows + parts:
        return ''
    return f'Not measured yet: {", ".join(rows + parts)}.'


def _measured_by(found: Mapping[str, Any]) -> str:
    """What the numbers were measured with and how long it took, in three sentences."""
    seeds = sorted({unit['seed'] for unit in found['measured']})
    return (
        f'Measured with {len(seeds)} seed{"s" if len(seeds) != 1 else ""} '
        f'({", ".join(map(str, seeds)) or "none yet"}), sphere_ar_jax {found["version"]}, '
        f'JAX {found["jax"]}, on a {found["platform"]}. Brackets are 95% t-intervals of the mean. '
        f'The trainings took {spoken(found["seconds"]["training"])}, one after the other, and the '
        f'measurements {spoken(found["seconds"]["measuring"])}.'
    )


def _markdown(config: ConfigDict, found: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """The page as Markdown."""
    parts = [
        f'# {config.title}',
        f'**Claim.** {config.claim}',
        f'**Method.** {config.method}',
        *(f'![{alt}]({name})' for name, alt in plots.items()),
        '## Verdicts',
        '\n'.join(console.markdown(*_verdict_table(found))),
        config.caveat,
        _missing(config, found),
        '## Rows',
        '\n'.join(console.markdown(*_rows_table(config, found))),
        *(
            f'## {heading}\n\n' + '\n'.join(console.markdown(*cells))
            for heading, cells in _score_tables(found).items()
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


def write(config: ConfigDict, found: Mapping[str, Any], directory: str) -> None:
    """Writes plots, page.md and page.html into the experiment's directory.

    Args:
      config: the experiment's config.
      found: what results.json holds.
      directory: the experiment's directory.
    """
    plots = _plots(config, found, directory)
    files.write_bytes(f'{directory}/page.md', _markdown(config, found, plots).encode())
    body = [
        f'<p><b>Claim.</b> {html.escape(config.claim)}</p>',
        f'<p><b>Method.</b> {html.escape(config.method)}</p>',
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
            for heading, cells in _score_tables(found).items()
        ),
        f'<p>{html.escape(_measured_by(found))}</p>',
        f'<pre>{html.escape(found["command"])}</pre>',
    ]
    document = page.document(config.title, '\n'.join(body))
    files.write_bytes(f'{directory}/page.html', document.encode())
