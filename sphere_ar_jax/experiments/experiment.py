"""--mode=experiment: trains and measures rows with several seeds, and writes the verdicts.

A killed experiment goes on when its command is typed again. Experiments of one workdir share what
they train and measure:

  models/              the trained models, which are needed until all is measured
  measured.jsonl       what was measured of each of them; files of several machines may be joined
  NAME/results.json    the numbers of one experiment, intervals, verdicts, versions and the config
  NAME/*.png, page.md, page.html
"""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax import __version__
from sphere_ar_jax.config import build, experiments, schema
from sphere_ar_jax.experiments import report, runs, speed
from sphere_ar_jax.experiments.kinds import KINDS
from sphere_ar_jax.runtime import files, metric_writer, sharding


class Unit(NamedTuple):
    """A piece of work.

    Attributes:
      kind: units of one kind take about the same time.
      what: what it does, for the progress.
      is_done: tells whether it was done before.
      run: does it.
    """

    kind: str
    what: str
    is_done: Callable[[], bool]
    run: Callable[[], None]


class Part(NamedTuple):
    """One row with one seed.

    Attributes:
      row: a key of the experiment's rows.
      seed: one of its seeds.
      cfg: the config of its run.
      key: stands for all that its measurement depends on.
      speed_key: stands for all that its speed depends on; None where no speeds are compared.
    """

    row: str
    seed: int
    cfg: ConfigDict
    key: str
    speed_key: str | None


# What was measured before these scores existed does not have them. An experiment that compares one
# measures anew.
_LATER_SCORES = ('brightness_distance', 'seconds_per_image')


def parts(config: ConfigDict) -> list[Part]:
    """The parts of an experiment, seed by seed, so that early results have all rows."""
    own = {name: config[name] for name in KINDS[config.kind].measured_by}
    compared = {words.split()[-1] for words in config.comparisons}
    for score in _LATER_SCORES:
        if score in compared:
            own[score] = True
    compares_speeds = 'tokenizer_steps_per_second' in compared
    found = []
    for seed in config.seeds:
        configs = {row: experiments.row(config, row, seed) for row in config.rows}
        tokenizers = [runs.tokenizer_directory('', cfg) for cfg in configs.values()]
        for row, cfg in configs.items():
            sampling = schema.as_dict(cfg)['sampling']
            key = runs.key([runs.ar_directory('', cfg), sampling, own])
            speed_key = None
            if compares_speeds:
                # The tokenizers of all rows are timed in turns.
                speed_key = f'speed-{runs.key([row, tokenizers])}'
            found.append(Part(row, seed, cfg, key, speed_key))
    return found


class Measured(NamedTuple):
    """What was measured.

    Attributes:
      lines: the scores.
      seconds: the wall time that it took.
      trained: {name of a workdir: the wall time of the training there} of what was measured.
      made_with: the `version`, `jax` and `platform` that measured it; {} where they were not noted.
    """

    lines: list[Any]
    seconds: float
    trained: dict[str, float]
    made_with: dict[str, str]


def _made_with() -> dict[str, str]:
    """What measures here and now, as `Measured` notes it."""
    platform = jax.devices()[0].platform
    return {'version': __version__, 'jax': jax.__version__, 'platform': platform}


class _Results:
    """The lines of measured.jsonl."""

    def __init__(self, path: str) -> None:
        self._file = metric_writer.JsonLines(path, ('key', 'lines', 'seconds'))
        self._measured = {
            line['key']: Measured(
                line['lines'],
                line['seconds'],
                line.get('trained', {}),
                line.get('made_with', {}),
            )
            for line in self._file.lines
        }

    def add(self, key: str, what: str, measured: Measured) -> None:
        """Adds what was measured; `what` is for readers."""
        self._measured[key] = measured
        self._file.add({'what': what, 'key': key, **measured._asdict()})

    def has(self, key: str | None) -> bool:
        """Whether this was measured."""
        return key in self._measured

    def complete(self, part: Part) -> Measured | None:
        """All that was measured of a part, None until it is complete."""
        found = self._measured.get(part.key)
        if found is None or part.speed_key is None:
            return found
        timed = self._measured.get(part.speed_key)
        if timed is None:
            return None
        return found._replace(
            lines=found.lines + timed.lines, seconds=found.seconds + timed.seconds
        )


def units(
    config: ConfigDict, chosen: Sequence[Part], cache: str, results: _Results, mesh: Mesh
) -> list[Unit]:
    """The work of an experiment in the order of its parts.

    Args:
      config: the experiment's config.
      chosen: its parts.
      cache: directory of the trained models.
      results: what is measured.
      mesh: the devices.
    """
    found = []
    for seed in config.seeds:
        same_seed = [part for part in chosen if part.seed == seed]
        for part in same_seed:
            found += _units_of(config, part, cache, results, mesh)
        if same_seed[0].speed_key is not None:
            found.append(_speed_unit(config, same_seed, results, mesh))
    return found


def _speed_unit(
    config: ConfigDict, same_seed: Sequence[Part], results: _Results, mesh: Mesh
) -> Unit:
    """The work of timing the training steps of all rows with one seed."""
    seed = same_seed[0].seed

    def run() -> None:
        started = time.perf_counter()
        found = speed.measure(config, seed, mesh)
        seconds = (time.perf_counter() - started) / len(found)
        for part in same_seed:
            line = {'tokenizer_steps_per_second': found[part.row]}
            what = f'{part.row}, seed {seed}: speed'
            results.add(str(part.speed_key), what, Measured([line], seconds, {}, _made_with()))

    return Unit(
        kind='speed',
        what=f'seed {seed}: steps/s of all tokenizers, in turns',
        is_done=lambda: all(results.has(part.speed_key) for part in same_seed),
        run=run,
    )


def _units_of(
    config: ConfigDict, part: Part, cache: str, results: _Results, mesh: Mesh
) -> list[Unit]:
    """The work for one part: two trainings and a measurement."""
    row, seed, cfg, key, _ = part
    tokenizer = runs.tokenizer_directory(cache, cfg)
    ar = runs.ar_directory(cache, cfg)

    def measure() -> None:
        started = time.perf_counter()
        lines = KINDS[config.kind].measure(config, cfg, cache, mesh)
        seconds = time.perf_counter() - started
        trained = {
            os.path.basename(directory): runs.seconds(directory) for directory in (tokenizer, ar)
        }
        measured = Measured(lines, seconds, trained, _made_with())
        results.add(key, f'{row}, seed {seed}: {config.kind}', measured)

    def is_trained(directory: str) -> bool:
        # What is measured needs no models.
        return results.has(key) or runs.is_finished(directory)

    return [
        Unit(
            kind=f'tokenizer {cfg.vae.backbone}',
            what=f'{row}, seed {seed}: tokenizer',
            is_done=functools.partial(is_trained, tokenizer),
            run=functools.partial(runs.train_tokenizer, cfg, cache, mesh),
        ),
        Unit(
            kind='ar',
            what=f'{row}, seed {seed}: AR model',
            is_done=functools.partial(is_trained, ar),
            run=functools.partial(runs.train_ar, cfg, cache, mesh),
        ),
        Unit(
            kind='measure',
            what=f'{row}, seed {seed}: samples',
            is_done=functools.partial(results.has, key),
            run=measure,
        ),
    ]


def time_left(todo: Sequence[Unit], seconds: dict[str, list[float]]) -> float | None:
    """The time that units will take, by the mean of finished ones of their kind.

    Args:
      todo: the units that are left.
      seconds: {kind: times of finished units}.

    Returns:
      Seconds, or None where a kind has not been seen yet.
    """
    if any(unit.kind not in seconds for unit in todo):
        return None
    return sum(sum(seconds[unit.kind]) / len(seconds[unit.kind]) for unit in todo)


def _do(todo: list[Unit], after: Callable[[], Any]) -> None:
    """Does units one after the other and says where it is; calls `after` after each measurement."""
    seconds: dict[str, list[float]] = {}
    total = len(todo)
    for i, unit in enumerate(todo):
        if unit.is_done():  # An equal training of another row may have done it.
            continue
        left = time_left(todo[i:], seconds)
        ahead = '' if left is None else f'; {report.spoken(left)} left'
        print(f'[{i + 1}/{total}] {unit.what}{ahead}', flush=True)
        started = time.perf_counter()
        unit.run()
        seconds.setdefault(unit.kind, []).append(time.perf_counter() - started)
        if unit.kind in ('measure', 'speed'):
            after()


def _summaries(
    config: ConfigDict, chosen: Sequence[Part], results: _Results
) -> dict[str, dict[int, dict[str, float]]]:
    """{row: {seed: its summary}} of all parts that are measured."""
    found: dict[str, dict[int, dict[str, float]]] = {row: {} for row in config.rows}
    for part in chosen:
        measured = results.complete(part)
        if measured is not None:
            scores = KINDS[config.kind].summarize(config, measured.lines)
            found[part.row][part.seed] = scores
    return {row: seeds for row, seeds in found.items() if seeds}


def _seconds(chosen: Sequence[Part], results: _Results) -> dict[str, float]:
    """The wall time of all parts that are measured: of their trainings, of their measurements."""
    trained: dict[str, float] = {}
    measuring = 0.0
    for part in chosen:
        measured = results.complete(part)
        if measured is not None:
            trained.update(measured.trained)
            measuring += measured.seconds
    return {'training': sum(trained.values()), 'measuring': measuring}


def run(config: ConfigDict, name: str, workdir: str, command: str) -> dict[str, Any]:
    """Does what an experiment still lacks, and writes what it leaves.

    Args:
      config: the experiment's config, checked.
      name: its name, that of its directory.
      workdir: an absolute path, shared by experiments.
      command: what the page says to type.

    Returns:
      What results.json holds.
    """
    mesh = sharding.make_mesh()
    build.count_classes(config.base, build.open_data_set(config.base).train)
    directory = os.path.join(workdir, name)
    os.makedirs(directory, exist_ok=True)
    with files.owned(workdir, 'an experiment'):
        results = _Results(f'{workdir}/measured.jsonl')
        cache = os.path.join(workdir, 'models')
        chosen = parts(config)
        work = units(config, chosen, cache, results, mesh)
        todo = [unit for unit in work if not unit.is_done()]
        print(f'{name}: {len(work) - len(todo)} of {len(work)} parts are done', flush=True)

        def write() -> dict[str, Any]:
            return _write(config, name, chosen, workdir, command, results)

        _do(todo, write)
        found = write()
    print(f'look at {directory}/page.html; all numbers: {directory}/results.json')
    return found


def _write(
    config: ConfigDict,
    name: str,
    chosen: Sequence[Part],
    workdir: str,
    command: str,
    results: _Results,
) -> dict[str, Any]:
    """Writes results.json, plots and pages of what is measured so far."""
    directory = os.path.join(workdir, name)
    by_row = _summaries(config, chosen, results)
    measured = []
    for part in chosen:
        complete = results.complete(part)
        if complete is not None:
            measured.append(
                {
                    'row': part.row,
                    'seed': part.seed,
                    'lines': complete.lines,
                    'made_with': complete.made_with,
                }
            )
    found = {
        'experiment': name,
        'title': config.title,
        'written_with': _made_with(),
        'command': command,
        'seconds': _seconds(chosen, results),
        'config': json.loads(config.to_json_best_effort()),
        'rows': report.table(config, by_row),
        'verdicts': report.verdicts(config, by_row),
        'measured': measured,
    }
    files.write_json(f'{directory}/results.json', found)
    report.write(KINDS[config.kind], config, found, directory)
    return found
