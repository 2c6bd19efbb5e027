"""--mode=experiment: trains and measures rows with several seeds, and writes the verdicts.

Everything lies in the workdir: `models` has the trained models, which all experiments share, and
NAME/ has what one experiment leaves. A killed experiment goes on when its command is typed again.

Files of NAME/:
  lines.jsonl    what was measured, a line for each row and seed, and one for its speed
  results.json   the same with summaries, intervals, verdicts, versions and the config
  *.png, page.md, page.html
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
from sphere_ar_jax.config import experiments, schema
from sphere_ar_jax.experiments import comparison, propagation, report, runs, speed
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


class _Results:
    """The lines of lines.jsonl.

    Attributes:
      measured: {(row, seed, key of the config): the lines that were measured}.
      seconds: {(row, seed, key of the config): the wall time of the measurement}.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        needed = ('row', 'seed', 'key', 'lines')
        rows = metric_writer.read_scalars(path, needed)
        self.measured = {(row['row'], row['seed'], row['key']): row['lines'] for row in rows}
        # Files of earlier versions have no times.
        self.seconds = {
            (row['row'], row['seed'], row['key']): row.get('seconds', 0.0) for row in rows
        }
        # The file is written again without a line that was cut off.
        files.write_bytes(path, ''.join(json.dumps(row) + '\n' for row in rows).encode())

    def add(self, row: str, seed: int, key: str, lines: list[Any], seconds: float) -> None:
        """Adds what was measured of a row and seed, and the wall time that it took."""
        self.measured[row, seed, key] = lines
        self.seconds[row, seed, key] = seconds
        line = {'row': row, 'seed': seed, 'key': key, 'lines': lines, 'seconds': seconds}
        with files.naming(self._path), open(self._path, 'a') as f:
            f.write(json.dumps(line) + '\n')


_MEASURE = {'comparison': comparison.measure, 'propagation': propagation.measure}


def _measure_key(config: ConfigDict, cfg: ConfigDict) -> str:
    """What a measurement depends on: the trained models, the sampler and the experiment's keys."""
    own = {name: config[name] for name in _MEASURED_BY[config.kind]}
    return runs.key([runs.ar_directory('', cfg), schema.as_dict(cfg)['sampling'], own])


def _speed_key(config: ConfigDict, seed: int) -> str:
    """What the speeds of a seed depend on: the tokenizers of all rows, which are timed in turns."""
    rows = [experiments.row(config, row, seed) for row in config.rows]
    return f'speed-{runs.key([runs.tokenizer_directory("", cfg) for cfg in rows])}'


def _compares_speeds(config: ConfigDict) -> bool:
    """Whether a comparison of the config is about the speed of training."""
    return any(words.endswith('steps_per_second') for words in config.comparisons)


def _lines(config: ConfigDict, results: _Results, row: str, seed: int) -> list[Any] | None:
    """All lines that were measured of a row and seed, None until they are complete."""
    key = _measure_key(config, experiments.row(config, row, seed))
    lines = results.measured.get((row, seed, key))
    if lines is None or not _compares_speeds(config):
        return lines
    timed = results.measured.get((row, seed, _speed_key(config, seed)))
    return None if timed is None else lines + timed


# The keys of an experiment that decide what is measured of a row and seed.
_MEASURED_BY = {
    'comparison': ('num_images', 'guidance_scales'),
    'propagation': (
        'num_images',
        'common_guidance',
        'disturbances',
        'positions',
        'followed_images',
    ),
}


def units(config: ConfigDict, cache: str, results: _Results, mesh: Mesh) -> list[Unit]:
    """The work of an experiment, seed by seed, so that early results have all rows.

    Args:
      config: the experiment's config.
      cache: directory of the trained models.
      results: what is measured.
      mesh: the devices.
    """
    found = []
    for seed in config.seeds:
        for row in config.rows:
            found += _units_of(config, row, seed, cache, results, mesh)
        if _compares_speeds(config):
            found.append(_speed_unit(config, seed, results, mesh))
    return found


def _speed_unit(config: ConfigDict, seed: int, results: _Results, mesh: Mesh) -> Unit:
    """The work of timing the training steps of all rows with one seed."""
    key = _speed_key(config, seed)

    def run() -> None:
        started = time.perf_counter()
        found = speed.measure(config, seed, mesh)
        seconds = (time.perf_counter() - started) / len(found)
        for row, steps_per_second in found.items():
            line = {'tokenizer_steps_per_second': steps_per_second}
            results.add(row, seed, key, [line], seconds)

    return Unit(
        kind='speed',
        what=f'seed {seed}: steps/s of all tokenizers, in turns',
        is_done=lambda: all((row, seed, key) in results.measured for row in config.rows),
        run=run,
    )


def _units_of(
    config: ConfigDict, row: str, seed: int, cache: str, results: _Results, mesh: Mesh
) -> list[Unit]:
    """The work for one row and seed: two trainings and a measurement."""
    cfg = experiments.row(config, row, seed)
    key = _measure_key(config, cfg)

    def measure() -> None:
        started = time.perf_counter()
        lines = _MEASURE[config.kind](config, row, cfg, cache, mesh)
        results.add(row, seed, key, lines, time.perf_counter() - started)

    tokenizer = runs.tokenizer_directory(cache, cfg)
    ar = runs.ar_directory(cache, cfg)
    return [
        Unit(
            kind=f'tokenizer {cfg.vae.backbone}',
            what=f'{row}, seed {seed}: tokenizer',
            is_done=functools.partial(runs.is_finished, tokenizer),
            run=functools.partial(runs.train_tokenizer, cfg, cache, mesh),
        ),
        Unit(
            kind='ar',
            what=f'{row}, seed {seed}: AR model',
            is_done=functools.partial(runs.is_finished, ar),
            run=functools.partial(runs.train_ar, cfg, cache, mesh),
        ),
        Unit(
            kind='measure',
            what=f'{row}, seed {seed}: samples',
            is_done=lambda: (row, seed, key) in results.measured,
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


def summaries(config: ConfigDict, results: _Results) -> dict[str, dict[int, dict[str, float]]]:
    """{row: {seed: its summary}} of all that is measured by this config."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in config.rows:
        for seed in config.seeds:
            lines = _lines(config, results, row, seed)
            if lines is None:
                continue
            if config.kind == 'comparison':
                summary = comparison.summarize(lines, config.common_guidance)
            else:
                summary = propagation.summarize(lines)
            found.setdefault(row, {})[seed] = summary
    return found


def _seconds(config: ConfigDict, cache: str, results: _Results) -> dict[str, float]:
    """The wall time of all that is measured by this config: its trainings, its measurements."""
    trainings = set()
    measuring = 0.0
    for row in config.rows:
        for seed in config.seeds:
            cfg = experiments.row(config, row, seed)
            if _lines(config, results, row, seed) is None:
                continue
            trainings |= {runs.tokenizer_directory(cache, cfg), runs.ar_directory(cache, cfg)}
            measuring += results.seconds[row, seed, _measure_key(config, cfg)]
            measuring += results.seconds.get((row, seed, _speed_key(config, seed)), 0.0)
    finished = [directory for directory in trainings if runs.is_finished(directory)]
    return {'training': sum(map(runs.seconds, finished)), 'measuring': measuring}


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
    directory = os.path.join(workdir, name)
    os.makedirs(directory, exist_ok=True)
    with files.owned(workdir, 'an experiment'):
        results = _Results(f'{directory}/lines.jsonl')
        cache = os.path.join(workdir, 'models')
        work = units(config, cache, results, mesh)
        todo = [unit for unit in work if not unit.is_done()]
        print(f'{name}: {len(work) - len(todo)} of {len(work)} parts are done', flush=True)

        def write() -> dict[str, Any]:
            return _write(config, name, workdir, command, results)

        _do(todo, write)
        found = write()
    print(f'look at {directory}/page.html; all numbers: {directory}/results.json')
    return found


def _write(
    config: ConfigDict, name: str, workdir: str, command: str, results: _Results
) -> dict[str, Any]:
    """Writes results.json, plots and pages of what is measured so far."""
    directory = os.path.join(workdir, name)
    by_row = summaries(config, results)
    measured = [
        {'row': row, 'seed': seed, 'lines': _lines(config, results, row, seed)}
        for row, seeds in by_row.items()
        for seed in seeds
    ]
    found = {
        'experiment': name,
        'title': config.title,
        'version': __version__,
        'jax': jax.__version__,
        'platform': jax.devices()[0].platform,
        'command': command,
        'seconds': _seconds(config, os.path.join(workdir, 'models'), results),
        'config': json.loads(config.to_json_best_effort()),
        'rows': report.table(config, by_row),
        'verdicts': report.verdicts(config, by_row),
        'measured': measured,
    }
    files.write_json(f'{directory}/results.json', found)
    report.write(config, found, directory)
    return found
