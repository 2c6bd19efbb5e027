"""Measures every part of ours beside the public PyTorch code, taking turns."""

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, checks, schema
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.measure import costs, our_parts, public_code
from sphere_ar_jax.runtime import console, files
from sphere_ar_jax.runtime.console import first_line

# What the process of a side has prepared: 'run' does its part, 'peak' says its memory.
_prepared: dict[str, Callable[[], Any]] = {}


def _peak_of_ours() -> int | None:
    """The most bytes that JAX has held on the accelerator; None where it does not say."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get('peak_bytes_in_use')


def _forget_preparation() -> None:
    """Returns the memory of preparing to the system, and restarts the high-water mark.

    Compilers above all have freed memory. The mark is then that of the timed runs.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')


def _first_run(
    config: dict[str, Any],
    part: str,
    side: str,
    batch: int,
    weights: str | None,
    checkout: str | None,
    directory: str,
    spawned: float,
) -> tuple[dict[str, float], np.ndarray]:
    """Prepares a part in a process of its own and runs it once.

    `config` is a checked config as a dict, `directory` is for the compilers' caches, and `spawned`
    is when the process was started, by `time.time`. The other arguments are those of `measure`.

    Returns:
      What the part says of itself (see `_Side.about`), and its result.
    """
    # The caches are of this part alone: empty for the first start of a side, full for the second.
    jax.config.update('jax_compilation_cache_dir', os.path.join(directory, 'jax'))
    for name in ('TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR'):
        os.environ[name] = os.path.join(directory, name)
    compiling = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith('backend_compile_duration'):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    cfg = checks.from_dict(config)
    about: dict[str, float]
    if side == 'ours':
        ours = our_parts.Part(cfg, part, batch, weights)
        run = ours.run
        peak = _peak_of_ours
        about = {'flops': ours.flops, 'bytes': float(ours.bytes)}
    else:
        # The imports of this module are no part of the public code's start.
        about = {'not_theirs': time.time() - spawned}
        assert checkout is not None
        assert weights is not None
        run, peak = public_code.part(checkout, side == 'compiled', cfg, part, batch, weights)
    result = run()
    if side == 'ours':
        about['compile_seconds'] = sum(compiling)
    if part not in our_parts.STARTS:
        _forget_preparation()
    _prepared.update(run=run, peak=peak)
    return about, result


def _timed_run() -> float:
    """Seconds of one run of the part that this process has prepared."""
    started = time.perf_counter()
    _prepared['run']()
    return time.perf_counter() - started


def _peak_bytes() -> int:
    """The most memory that this process has taken, of the accelerator if there is one."""
    # `ru_maxrss` would also count the memory of the process that started this one.
    with open('/proc/self/status') as f:
        rss = next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    return _prepared['peak']() or rss


class _Side:
    """A part of one side, in a process of its own.

    Attributes:
      about: what the part says of itself: `flops`, `bytes` and `compile_seconds` on our side.
      result: the result of its first run.
      start_seconds: from the start of the process to the first result.
    """

    def __init__(self, *job: Any):
        """Starts the process and waits for the first result.

        Args:
          *job: all arguments of `_first_run` but `spawned`.
        """
        self._pool = futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
        started = time.perf_counter()
        self.about, self.result = self.call(_first_run, *job, time.time())
        self.start_seconds = time.perf_counter() - started - self.about.pop('not_theirs', 0)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns in that process.

        Args:
          function: a function of this module.
          *arguments: its arguments, which are pickled.

        Raises:
          RuntimeError: the function failed; the message is one line.
        """
        try:
            return self._pool.submit(function, *arguments).result()
        except Exception as error:  # A part may raise anything.
            self.close()
            raise RuntimeError(f'{type(error).__name__}: {first_line(error)}') from None

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


class _Sides:
    """The sides of one part.

    Attributes:
      running: the sides that have not failed, by name.
      found: {side: what was measured, or 'error' with why the side failed, in one line}.
    """

    def __init__(self) -> None:
        self.running: dict[str, _Side] = {}
        self.found: dict[str, dict[str, Any]] = {}

    def guarded(self, side: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """The result of an action, or None where the side failed, which is then left out."""
        try:
            return action(*arguments)
        except RuntimeError as error:
            self.found[side] = {'error': str(error)}
            self.running.pop(side, None)
            return None

    def start(self, side: str, job: tuple[Any, ...], twice: bool) -> None:
        """Starts a side; `job` has the arguments of `_Side`.

        With `twice` a first process is started and ended before, to fill the caches.
        """
        if twice:
            first = self.guarded(side, _Side, *job)
            if first is None:
                return
            first.close()
        worker = self.guarded(side, _Side, *job)
        if worker is not None:
            self.running[side] = worker


def _summary(worker: _Side, times: list[float], count: int, peak: int) -> dict[str, Any]:
    """What is reported of a side.

    `times` are the seconds of its timed runs; a part without timed runs is a start, whose seconds
    are taken. One run does `count` times what is timed. `peak` is in bytes.
    """
    t = np.array(times or [worker.start_seconds]) / count
    return {
        'start_seconds': worker.start_seconds,
        'seconds': float(np.median(t)),
        'spread': float(np.subtract(*np.percentile(t, [75, 25]))),
        'repeats': len(t),
        'peak_bytes': peak,
        **worker.about,
    }


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two results, relative to our largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def measure(
    cfg: ConfigDict,
    part: str,
    batch: int,
    sides: Sequence[str],
    repeats: int,
    weights: str | None = None,
    checkout: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures one part on all sides, taking turns.

    Args:
      cfg: a checked config.
      part: a key of `our_parts.PARTS`.
      batch: images.
      sides: 'ours', 'compiled', 'eager', or some of them.
      repeats: timed runs of each side; a start has none.
      weights: a .npz file of {PyTorch name: array}; None takes random parameters.
      checkout: directory of the public code, for sides other than ours.

    Returns:
      What was measured, by side: 'start_seconds', 'seconds' (the median), 'spread' (the
      interquartile range), 'repeats' and 'peak_bytes', and for our side 'flops', 'bytes' and
      'compile_seconds'. Where both sides compute from the same inputs, the other side has
      'difference', its largest difference to our result relative to our largest value. A side that
      failed has only 'error', one line. Under 'machine' are the medians of `costs.machine`,
      measured in the same rounds.
    """
    contest = _Sides()
    times: dict[str, list[float]] = {side: [] for side in sides}
    found = contest.found
    with tempfile.TemporaryDirectory() as directory:
        for side in sides:
            job = (schema.as_dict(cfg), part, side, batch, weights, checkout, directory)
            contest.start(side, job, twice=part == 'cached')
        rates = [costs.machine(2 * batch, build.dtype(cfg))]
        for _ in range(0 if part in our_parts.STARTS else repeats):
            for side, worker in list(contest.running.items()):
                times[side].append(contest.guarded(side, worker.call, _timed_run))
            rates.append(costs.machine(2 * batch, build.dtype(cfg)))
        found['machine'] = {
            name: float(np.median([rate[name] for rate in rates])) for name in rates[0]
        }
        count = 1
        if part == 'transformer':
            count = len(our_parts.positions(build.build_ar(cfg).num_tokens))
        compared = part in ('prefill', 'transformer', 'decode')
        for side, worker in list(contest.running.items()):
            peak = contest.guarded(side, worker.call, _peak_bytes)
            if peak is None:
                continue
            worker.close()
            found[side] = _summary(worker, times[side], count, peak)
            if compared and side != 'ours' and 'ours' in contest.running:
                ours = contest.running['ours']
                found[side]['difference'] = _difference(ours.result, worker.result)
    return found


def floor_seconds(about: Mapping[str, float], machine: Mapping[str, float]) -> float:
    """The time below which a part cannot come.

    It is the longer of two times: that of its operations at the rate of large products, and that of
    reading its weights and its cache from memory once for each use.

    Args:
      about: `flops` and `bytes` of the part.
      machine: the rates of `costs.machine`.
    """
    return max(
        about['flops'] / machine['matrix_flops'], about['bytes'] / machine['bytes_per_second']
    )


# seconds: the median of the runs. spread: their interquartile range. start: from the start of the
# process to the first result. ratio: seconds of the side over ours. differs by: the largest
# difference of the results over ours' largest value.
COLUMNS = (
    'part', 'side', 'seconds', 'spread', 'start', 'compiling', 'peak MB', 'GFLOP', 'of rate',
    'floor', '× floor', 'ratio', 'differs by',
)  # fmt: skip
SAMPLING = ('prefill', 'transformer', 'head', 'decode')


def _uses(num_tokens: int) -> dict[str, int]:
    """How often each part of `SAMPLING` runs for one batch of images."""
    return {'prefill': 1, 'transformer': num_tokens - 1, 'head': num_tokens, 'decode': 1}


def sampling_seconds(seconds: Mapping[str, float], num_tokens: int) -> float:
    """Seconds for a batch of images, from those of the parts.

    Args:
      seconds: those of one run of each part of `SAMPLING`.
      num_tokens: L.
    """
    return sum(seconds[part] * n for part, n in _uses(num_tokens).items())


def _cells(side: str, sides: Mapping[str, dict[str, Any]]) -> list[str]:
    """The columns from 'seconds' on, of one side of a part."""
    r = sides[side]
    ours = sides['ours']
    machine = sides['machine']
    if 'error' in r:
        return [f'failed: {r["error"]}', *[''] * 10]
    cells = [
        f'{r["seconds"]:.4g}',
        f'{r["spread"]:.2g}',
        f'{r["start_seconds"]:.1f}',
        f'{r["compile_seconds"]:.1f}' if 'compile_seconds' in r else '',
        f'{r["peak_bytes"] / 2**20:.0f}',
    ]
    if side == 'ours' and r['flops']:
        floor = floor_seconds(r, machine)
        share = r['flops'] / r['seconds'] / machine['matrix_flops']
        cells += [
            f'{r["flops"] / 1e9:.4g}',
            f'{share:.0%}',
            f'{floor:.4g}',
            f'{r["seconds"] / floor:.2f}',
        ]
    else:
        cells += [''] * 4
    is_compared = side != 'ours' and 'seconds' in ours
    cells.append(f'{r["seconds"] / ours["seconds"]:.2f}' if is_compared else '')
    cells.append(f'{r["difference"]:.1e}' if 'difference' in r else '')
    return cells


def _sampling_line(side: str, results: Mapping[str, Any]) -> str | None:
    """How fast a side draws images, in a line; None where one of its parts is missing."""
    seconds = {p: results['parts'].get(p, {}).get(side, {}).get('seconds') for p in SAMPLING}
    if not all(seconds.values()):
        return None
    whole = sampling_seconds(seconds, results['tokens'])
    split = ', '.join(
        f'{p} {seconds[p] * n / whole:.1%}' for p, n in _uses(results['tokens']).items()
    )
    return f'Sampling, {side}: {results["batch"] / whole:.4g} images/s ({split})'


def markdown(results: Mapping[str, Any]) -> str:
    """The results of `run` as Markdown tables."""
    rows = []
    rates = []
    for part, sides in results['parts'].items():
        m = sides['machine']
        rates.append(
            f'{part} {m["matrix_flops"] / 1e9:.0f} ({m["matrix_flops_rows"] / 1e9:.0f}), '
            f'{m["bytes_per_second"] / 1e9:.0f}'
        )
        rows += [[part, side, *_cells(side, sides)] for side in sides if side != 'machine']
    lines = [
        f'{results["config"]}, {results["machine"]}, {results["batch"]} images, '
        f'{results["train_batch"]} in training.',
        '',
        *console.markdown(COLUMNS, rows),
    ]
    for side in ('ours', 'compiled', 'eager'):
        line = _sampling_line(side, results)
        if line is not None:
            lines += ['', line]
    lines += [
        '',
        'GFLOP/s of large products (of those of few rows), GB/s, in the same rounds: '
        f'{"; ".join(rates)}.',
    ]
    for curve in results.get('curves', {}).values():
        cells = [[f'{value:.4g}' for value in row.values()] for row in curve]
        lines += ['', *console.markdown(curve[0], cells)]
    return '\n'.join(lines) + '\n'


def _describe(cfg: ConfigDict) -> str:
    """The machine and the versions, in a line."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == 'cpu':
        with open('/proc/cpuinfo') as f:
            models = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
        processor = models[0] if models else platform.processor()
        name = f'{processor} × {len(os.sched_getaffinity(0))} cores'
    return f'{name}, {cfg.dtype}, Python {platform.python_version()}, JAX {jax.__version__}'


def curves(cfg: ConfigDict, batch: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Our cost against batch size, tokens, depth and solver steps.

    Args:
      cfg: a checked config.
      batch: images, where their number does not vary.
      repeats: timed runs of each part.

    Returns:
      a list of table rows for each of 'batch', 'tokens', 'depth' and 'steps'. What failed is NaN.
    """

    def row(key: str, value: int, cfg: ConfigDict, batch: int) -> dict[str, float]:
        missing = {'seconds': math.nan, 'peak_bytes': math.nan}
        r = {
            part: missing | measure(cfg, part, batch, ['ours'], repeats)['ours']
            for part in ('transformer', 'head')
        }
        return {
            key: value,
            'transformer s/token': r['transformer']['seconds'],
            'head s/token': r['head']['seconds'],
            's/token': r['transformer']['seconds'] + r['head']['seconds'],
            'peak MB': max(part['peak_bytes'] for part in r.values()) / 2**20,
        }

    def changed(key: str, value: Any) -> ConfigDict:
        return schema.changed(cfg, {key: value})

    return {
        'batch': [row('images', b, cfg, b) for b in (1, 4, 16, 64)],
        'tokens': [
            row('tokens', g * g, changed('vae.grid', (g, g)), batch) for g in (4, 8, 16, 32)
        ],
        'depth': [row('blocks', d, changed('ar.depth', d), batch) for d in (6, 12, 24, 48)],
        'steps': [
            row('steps', n, changed('sampling.num_steps', n), batch) for n in (10, 25, 50, 100, 200)
        ],
    }


def _write(results: Mapping[str, Any], output: str) -> None:
    """Writes benchmark.json and benchmark.md into a directory."""
    files.write_json(os.path.join(output, 'benchmark.json'), results)
    with open(os.path.join(output, 'benchmark.md'), 'w') as f:
        f.write(markdown(results))


def _write_weights(cfg: ConfigDict, path: str) -> None:
    """Writes random parameters of both models into a .npz file, under their PyTorch names."""
    tensors: dict[str, Any] = {}
    for seed, model in ((1, build.build_ar(cfg)), (2, build.build_vae(cfg))):
        tensors |= torch_names.to_torch(our_parts.random_params(model, seed))
    np.savez(path, **tensors)


def run(
    cfg: ConfigDict,
    name: str,
    output: str,
    names: Sequence[str],
    batch: int,
    train_batch: int,
    repeats: int,
    checkout: str | None,
    sides: Sequence[str],
    with_curves: bool,
) -> dict[str, Any]:
    """Measures the parts and writes the tables, anew after each part.

    Args:
      cfg: a checked config.
      name: of the config, for the tables.
      output: directory of the tables; it is made.
      names: the parts to measure, keys of `our_parts.PARTS`.
      batch: images drawn or decoded at a time.
      train_batch: images of a training step.
      repeats: timed runs of each part and side.
      checkout: directory of the public code; None measures our side alone.
      sides: how the public code is run: 'compiled', 'eager' or both.
      with_curves: whether `curves` are measured too.

    Returns:
      the results, as in benchmark.json.
    """
    os.makedirs(output, exist_ok=True)
    parts: dict[str, Any] = {}
    results = {
        'config': name,
        'tokens': build.build_ar(cfg).num_tokens,
        'batch': batch,
        'train_batch': train_batch,
        'machine': _describe(cfg),
        'parts': parts,
    }
    all_sides = ['ours', *(sides if checkout else [])]
    with tempfile.TemporaryDirectory() as directory:
        weights = None
        if checkout:
            weights = os.path.join(directory, 'weights.npz')
            _write_weights(cfg, weights)
        for part in names:
            print(f'{part}: {our_parts.PARTS[part]}', flush=True)
            size = train_batch if part.startswith('train') else batch
            parts[part] = measure(cfg, part, size, all_sides, repeats, weights, checkout)
            for side in all_sides:
                r = parts[part][side]
                text = r['error'] if 'error' in r else f'{r["seconds"]:.4g} s'
                print(f'  {side}: {text}', flush=True)
            _write(results, output)
    if with_curves:
        results['curves'] = curves(cfg, batch, repeats)
    _write(results, output)
    print('\n' + markdown(results))
    return results
