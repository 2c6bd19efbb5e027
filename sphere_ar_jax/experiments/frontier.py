r"""Quality against evaluations of the flow head, for trained runs of one small data set.

    python -m sphere_ar_jax.experiments.frontier --workdir=/tmp/digits0 --workdir=/tmp/digits1 \
        --output=/tmp/frontier

Every setting of `settings`, or each that --settings names, samples --num_images images from every
run and scores them by the protocol of its data set. The results are a table and a plot;
`docs/evaluation.md`, "Quality against evaluations", shows them. Each score is added to
OUTPUT/scores.jsonl at once, so that the command goes on where it stopped when it is started again.
Where the head of a run is distilled, the settings are the numbers of steps that it was distilled
for. The Fréchet distance is taken in the classifier's features where it has any, else in pixels.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import flags
from matplotlib.axes import Axes
from tqdm import tqdm

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import small
from sphere_ar_jax.evaluation import pictures, small_images
from sphere_ar_jax.experiments import runs
from sphere_ar_jax.experiments.kinds import comparison
from sphere_ar_jax.flow import plan, solvers
from sphere_ar_jax.models.heads import check_solver
from sphere_ar_jax.runtime import console, files, metric_writer
from sphere_ar_jax.sampling import generation, on_mesh
from sphere_ar_jax.training.run import Run, load_run

REFERENCE = 'euler_maruyama 100, guidance 1.5'
SCORES = ('samples/accuracy', 'samples/frechet', 'samples/precision', 'samples/recall')
# What each line of scores.jsonl has. Earlier versions did not note the `parameters`, a checksum.
_ROW = ('workdir', 'setting', 'num_images', 'evaluations', *SCORES)

# Settings by name: (keyword arguments of `plan.Options`, guidance scale).
_Settings: TypeAlias = dict[str, tuple[dict[str, Any], float | None]]
# What `summarize` returns.
_Summary: TypeAlias = dict[str, dict[str, Any]]


def _setting(scale: float, solver: str, num_steps: int, **options: Any) -> _Settings:
    """A setting with constant guidance; options: further arguments of `plan.Options`."""
    extra = ''.join(f', {name} {value}' for name, value in options.items())
    options |= dict(solver=solver, num_steps=num_steps, guidance='constant')
    return {f'{solver} {num_steps}, guidance {scale}{extra}': (options, scale)}


def _steps(solver: str, evaluations: int) -> int:
    """The steps with which a solver makes so many evaluations."""
    if solver == 'heun':
        return evaluations // 2
    if solver == 'euler_maruyama':
        return max(evaluations - 1, 1)
    return evaluations


def _all_solvers(scale: float, evaluations: int) -> _Settings:
    """Every solver, with steps for so many evaluations."""
    found: _Settings = {}
    for solver in solvers.STRAIGHT:
        found |= _setting(scale, solver, _steps(solver, evaluations))
    return found


def _annealed(scale: float, first: int, last: int, annealing: str) -> _Settings:
    """Every solver, with steps for `first` evaluations at token 0 and `last` at the last token."""
    found: _Settings = {}
    for solver in solvers.STRAIGHT:
        found |= _setting(
            scale,
            solver,
            _steps(solver, first),
            final_steps=_steps(solver, last),
            annealing=annealing,
        )
    return found


def _shifted_and_noisy() -> _Settings:
    """Settings with a shifted time grid, and with other scales of Euler–Maruyama's noise."""
    found: _Settings = {}
    for shift in (0.5, 0.7, 1.5, 2.0):
        found |= _setting(1.5, 'ab2', 10, shift=shift)
        found |= _setting(1.5, 'dpmpp_2m', 10, shift=shift)
        found |= _setting(1.5, 'euler_maruyama', 9, shift=shift)
    for noise_scale in (0.25, 0.5, 2.0):
        found |= _setting(1.5, 'euler_maruyama', 9, noise_scale=noise_scale)
    return found


def _distilled(levels: Iterable[int]) -> _Settings:
    """Settings of a distilled head, which knows its guidance itself."""
    found: _Settings = {}
    for n in levels:
        found[f'distilled {n}'] = (dict(solver='euler', num_steps=n, guidance=None), None)
    return found


def settings(levels: Iterable[int] | None = None) -> _Settings:
    """The settings that are compared.

    Args:
      levels: numbers of steps of a distilled head, or None for a head that is not distilled.

    Returns:
      (keyword arguments of `plan.Options`, guidance scale) by name.
    """
    if levels is not None:
        return _distilled(levels)
    found: _Settings = {}
    for scale in (1.5, 1.0, 2.0, 3.0, 4.5):
        found |= _setting(scale, 'euler_maruyama', 100)
        found |= _all_solvers(scale, 10)
    for evaluations in (2, 4, 6, 8, 16, 32):
        found |= _all_solvers(1.5, evaluations)
    found |= _annealed(1.5, 12, 4, 'linear')
    found |= _annealed(1.5, 16, 4, 'linear')
    found |= _annealed(1.5, 12, 4, 'cosine')
    found |= _annealed(1.5, 12, 4, 'two_stage')
    found |= _shifted_and_noisy()
    for interval in ((0.0, 0.7), (0.2, 1.0), (0.2, 0.7)):
        for scale in (1.5, 2.0):
            found |= _setting(scale, 'ab2', 10, guidance_interval=interval)
    return found


def _measure(
    run: Run,
    judge: small_images.Judge,
    options: plan.Options,
    scale: float | None,
    num_images: int,
    batch_size: int,
) -> dict[str, Any]:
    """Scores of one setting on one run, with its mean evaluations per token."""
    cfg = run.config
    num_classes = schema.num_classes(cfg)
    assert num_classes is not None  # a run knows it
    labels = np.arange(num_images) % num_classes
    sampler = build.Sampler(options, scale, cfg.sampling.temperature)
    images, _ = on_mesh.draw_images(run, sampler, labels, seed=cfg.seed, batch_size=batch_size)
    scores = comparison.sample_scores(judge, images, labels)
    found = {name: scores[name.removeprefix('samples/')] for name in SCORES}
    found['evaluations'] = options.plan(run.ar.num_tokens).evaluations
    return found


def _mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """The mean and the standard deviation of a sample (with n − 1; 0 for a single value)."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {'mean': float(np.mean(values)), 'std': std}


def summarize(rows: Sequence[dict[str, Any]]) -> _Summary:
    """Summarizes the rows of scores.jsonl over runs.

    Returns:
      By name of the setting: `evaluations`, the number of `runs`, and for each of `SCORES` its
      `mean` and `std` over the runs.
    """
    summary = {}
    for name in dict.fromkeys(row['setting'] for row in rows):
        mine = [row for row in rows if row['setting'] == name]
        found: dict[str, Any] = {'evaluations': mine[0]['evaluations'], 'runs': len(mine)}
        for score in SCORES:
            found[score] = _mean_and_std([row[score] for row in mine])
        summary[name] = found
    return summary


def markdown(summary: _Summary) -> str:
    """The summary as a Markdown table, sorted by evaluations and Fréchet distance.

    Scores of several runs are a mean ± the standard deviation over runs.
    """

    def order(name: str) -> tuple[float, float]:
        return summary[name]['evaluations'], summary[name]['samples/frechet']['mean']

    def shown(score: dict[str, float], runs: int) -> str:
        spread = f' ± {score["std"]:.4f}' if runs > 1 else ''
        return f'{score["mean"]:.4f}{spread}'

    rows = []
    for name in sorted(summary, key=order):
        row = summary[name]
        scores = (shown(row[score], row['runs']) for score in SCORES)
        rows.append([name, f'{row["evaluations"]:g}', *scores])
    columns = ('setting', 'evaluations', 'accuracy', 'Fréchet', 'precision', 'recall')
    return '\n'.join(console.markdown(columns, rows)) + '\n'


class _Panels:
    """The plots of one score: above against evaluations per token, below against guidance.

    Args:
      summary: from `summarize`.
      score: one of `SCORES`.
      above: axes of the plot against evaluations, at guidance 1.5.
      below: axes of the plot against the guidance scale.
    """

    def __init__(self, summary: _Summary, score: str, above: Axes, below: Axes) -> None:
        self.summary = summary
        self.score = score
        self.above = above
        self.below = below
        # Names of settings → their parts. The first part is solver, steps and guidance, and each
        # further option is another part.
        self.parts = {name: name.replace(', guidance', ' guidance').split(', ') for name in summary}
        # Settings without further options → [solver, steps, 'guidance', scale].
        self.plain = {name: key[0].split() for name, key in self.parts.items() if len(key) == 1}

    def _evaluations(self, name: str) -> float:
        return self.summary[name]['evaluations']

    def _scale(self, name: str) -> float:
        return float(self.plain[name][3])

    def _line(
        self, axis: Axes, names: Iterable[str], x: Callable[[str], float], **style: Any
    ) -> None:
        """Draws settings as a line with error bars; x gives a setting's place on the axis."""
        names = sorted(names, key=x)
        mean = [self.summary[name][self.score]['mean'] for name in names]
        std = [self.summary[name][self.score]['std'] for name in names]
        axis.errorbar([x(name) for name in names], mean, std, capsize=2, **style)

    def _draw_solver(self, solver: str, color: str) -> None:
        """Draws a solver's settings in both plots."""
        mine = [name for name, words in self.plain.items() if words[0] == solver]
        distilled = solver == 'distilled'
        style = dict(color=color, marker='*' if distilled else 'o')
        at = [name for name in mine if name.endswith('guidance 1.5') or distilled]
        self._line(self.above, at, self._evaluations, label=solver, **style)
        annealed = [
            name
            for name, key in self.parts.items()
            if key[0].startswith(f'{solver} ') and 'annealing' in name
        ]
        x = [self._evaluations(name) for name in annealed]
        y = [self.summary[name][self.score]['mean'] for name in annealed]
        self.above.plot(x, y, '+', color=color, markersize=9)
        guided = [name for name in mine if len(self.plain[name]) == 4]
        for count, line in ((10, '-'), (101, '--')):
            at = [name for name in guided if self._evaluations(name) == count]
            if at:
                label = f'{solver}, {count} evaluations'
                self._line(self.below, at, self._scale, linestyle=line, label=label, **style)

    def _draw_reference(self) -> None:
        """Draws the mean ± standard deviation of `REFERENCE` as a band, and fits the axis to it."""
        mean = self.summary[REFERENCE][self.score]['mean']
        std = self.summary[REFERENCE][self.score]['std']
        label = f'{REFERENCE},\nmean ± std of the runs'
        self.above.axhspan(mean - std, mean + std, color='0.85', label=label)
        if self.score.endswith('frechet'):
            self.above.set_ylim(0, 3 * mean)
        else:
            self.above.set_ylim(max(0, mean - 0.15), min(1, mean + 0.12))

    def draw(self) -> None:
        """Draws both plots."""
        for i, solver in enumerate(dict.fromkeys(words[0] for words in self.plain.values())):
            self._draw_solver(solver, f'C{i}')
        if REFERENCE in self.summary:
            self._draw_reference()
        self.above.set_xscale('log', base=2)
        self.above.xaxis.set_major_formatter('{x:g}')
        self.above.set_title(self.score.removeprefix('samples/'))
        self.above.set_xlabel('evaluations of the flow head per token (+: annealed)')
        self.below.set_xlabel('guidance scale')
        self.above.grid(alpha=0.3)
        self.below.grid(alpha=0.3)


def save_frontier(path: str, summary: _Summary) -> None:
    """Plots the scores, a column each, against evaluations per token and against guidance.

    Args:
      path: the PNG.
      summary: from `summarize`. The mean ± standard deviation of `REFERENCE` is drawn as a band.
    """
    figure, axes = pictures.subplots(2, len(SCORES), (4.6 * len(SCORES), 9))
    for score, above, below in zip(SCORES, *axes, strict=True):
        _Panels(summary, score, above, below).draw()
    for axis in axes[:, 0]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    pictures.save_figure(figure, path)


def _levels(run: Run) -> Sequence[int] | None:
    """The numbers of steps that a run's head is distilled for, or None for another head."""
    return run.config.distillation_training.levels if run.config.init_from else None


def _check_run(workdir: str, opened: Run) -> None:
    """Raises UserError for a run that no setting fits."""
    if build.has_captions(opened.config):
        raise console.UserError(f'{workdir} draws for texts, which the frontier does not score')
    if opened.config.data.name not in small.KINDS:
        raise console.UserError(
            f'{workdir} is of {opened.config.data.name}: the frontier scores the digits and IDX '
            'files alone; draw with --mode=sample and score with --mode=evaluate'
        )
    if _levels(opened) is not None:
        return
    try:
        for solver in solvers.STRAIGHT:
            check_solver(opened.ar.head, solver)
    except ValueError as error:
        raise console.UserError(
            f'{workdir}: {error}; the frontier compares those of straight paths'
        ) from None


def _made_of(opened: Run, num_images: int) -> dict[str, Any]:
    """What scores depend on besides the setting, all of which may change in a workdir."""
    return {
        'parameters': generation.parameters_crc(opened),
        'num_images': num_images,
        'temperature': opened.config.sampling.temperature,
        'classifier_steps': opened.config.data.classifier_steps,
    }


def _is_made_of(row: dict[str, Any], made_of: dict[str, Any]) -> bool:
    """Whether a line of scores.jsonl was measured of the same.

    Lines of earlier versions do not have all entries of `_made_of`. Without a checksum of the
    weights a line does not count.
    """
    return 'parameters' in row and all(
        row.get(key, value) == value for key, value in made_of.items()
    )


def _chosen(runs_by_workdir: dict[str, Run], pattern: str) -> list[tuple[str, str]]:
    """(workdir, name of a setting) of all settings whose whole names match a pattern.

    Raises:
      UserError: the pattern is no regular expression, or no setting matches; one line.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise console.UserError(f'--settings={pattern}: {error}') from None
    known = [
        (workdir, name)
        for workdir, opened in runs_by_workdir.items()
        for name in settings(_levels(opened))
    ]
    found = [(workdir, name) for workdir, name in known if wanted.fullmatch(name)]
    if not found:
        raise console.UserError(
            f"--settings={pattern} names no setting of these runs: '{known[-1][1]}' is one"
        )
    return found


def run(
    workdirs: Sequence[str], output: str, num_images: int, batch_size: int, pattern: str = '.*'
) -> _Summary:
    """Measures what is not measured yet, and writes the table and the plot.

    Args:
      workdirs: finished runs on one small data set.
      output: directory for scores.jsonl, frontier.json, frontier.md and frontier.png.
      num_images: images drawn for each setting and run.
      batch_size: images drawn at a time.
      pattern: a regular expression. Settings whose whole names match it are measured. Others are
        summarized where they were measured before.

    Returns:
      What `summarize` returns for these runs.

    Raises:
      UserError: a run cannot be opened, or the pattern is wrong; one line.
    """
    os.makedirs(output, exist_ok=True)
    workdirs = list(dict.fromkeys(os.path.abspath(workdir) for workdir in workdirs))
    scores = metric_writer.JsonLines(os.path.join(output, 'scores.jsonl'), _ROW)
    opened = {workdir: load_run(workdir) for workdir in workdirs}
    for workdir, one in opened.items():
        _check_run(workdir, one)
    made_of = {workdir: _made_of(run, num_images) for workdir, run in opened.items()}
    rows = [
        row
        for row in scores.lines
        if row['workdir'] in made_of and _is_made_of(row, made_of[row['workdir']])
    ]
    done = {(row['workdir'], row['setting']) for row in rows}
    todo = [place for place in _chosen(opened, pattern) if place not in done]
    watched = sys.stderr.isatty()
    for workdir, name in tqdm(todo, desc='settings × runs', disable=not watched):
        started = time.perf_counter()
        options, scale = settings(_levels(opened[workdir]))[name]
        judge = runs.judge(opened[workdir].config, output)
        row = _measure(
            opened[workdir], judge, plan.Options(**options), scale, num_images, batch_size
        )
        row['setting'] = name
        row['workdir'] = workdir
        row |= made_of[workdir]
        row['seconds'] = time.perf_counter() - started
        rows.append(row)
        scores.add(row)
    summary = summarize(rows)
    files.write_json(os.path.join(output, 'frontier.json'), summary)
    with open(os.path.join(output, 'frontier.md'), 'w') as f:
        f.write(markdown(summary))
    save_frontier(os.path.join(output, 'frontier.png'), summary)
    return summary


# These flags are not absl's global ones, because `main` has flags of the same names.
_FLAGS = flags.FlagValues()
_WORKDIRS = flags.DEFINE_multi_string(
    'workdir', None, 'A finished run; give one for each seed.', flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Directory for scores.jsonl, frontier.json, .md and .png.', flag_values=_FLAGS
)
_NUM_IMAGES = flags.DEFINE_integer(
    'num_images', 2000, 'Images drawn for each setting and run.', 1, flag_values=_FLAGS
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 500, 'Images drawn at a time.', 1, flag_values=_FLAGS
)
_SETTINGS = flags.DEFINE_string(
    'settings',
    '.*',
    "A regular expression: the settings whose whole names match it, as 'ab2 10, .*', are measured.",
    flag_values=_FLAGS,
)


def main(argv: list[str]) -> None:
    """Parses the command line and measures.

    Args:
      argv: the command line, with the program's name first.

    Raises:
      UserError: a flag or a run is wrong; the message is one line.
    """
    console.parse(argv, _FLAGS, __doc__)
    if not _WORKDIRS.value or _OUTPUT.value is None:
        raise console.UserError('give --workdir=DIR, once for each seed, and --output=DIR')
    run(_WORKDIRS.value, _OUTPUT.value, _NUM_IMAGES.value, _BATCH_SIZE.value, _SETTINGS.value)


if __name__ == '__main__':
    console.run(main)
