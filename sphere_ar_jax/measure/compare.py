"""Measures every part of ours beside the public PyTorch code, taking turns."""

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent import futures

import jax
import numpy as np

from sphere_ar_jax.config import build, checks, schema
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.measure import costs, our_parts, public_code
from sphere_ar_jax.runtime import console, files
from sphere_ar_jax.runtime.console import first_line

_prepared = {}  # in the process of a side: its part, to be run again


def _first_run(config, part, side, batch, weights, checkout, directory, spawned):
    """Prepares a part in a process of its own and runs it once: (what it says of itself, its
    result).
    """
    # Caches of this part alone: empty for the first start of a side, full for the second.
    jax.config.update('jax_compilation_cache_dir', os.path.join(directory, 'jax'))
    for name in ('TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR'):
        os.environ[name] = os.path.join(directory, name)
    compiling = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compiling.append(seconds) if event.endswith('backend_compile_duration') else None
        )
    )
    cfg = checks.from_dict(config)
    if side == 'ours':
        ours = our_parts.Part(cfg, part, batch, weights)
        run, about = ours.run, {'flops': ours.flops, 'bytes': float(ours.bytes)}
        peak = lambda: (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
    else:
        about = {'not_theirs': time.time() - spawned}  # our imports are no part of their start
        run, peak = public_code.part(checkout, side == 'compiled', cfg, part, batch, weights)
    result = run()
    if side == 'ours':
        about['compile_seconds'] = sum(compiling)
    if part not in our_parts.STARTS:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what preparing has freed, compilers above all, goes back to the system
        with open(
            '/proc/self/clear_refs', 'w'
        ) as f:  # the high-water mark is that of the timed runs
            f.write('5')
    _prepared.update(run=run, peak=peak)
    return about, result


def _timed_run():
    """Seconds of one run of the part that this process has prepared."""
    started = time.perf_counter()
    _prepared['run']()
    return time.perf_counter() - started


def _peak_bytes():
    """The most memory that this process has taken, of the accelerator if there is one."""
    with open('/proc/self/status') as f:  # ru_maxrss would count what the starting process had
        rss = next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    return _prepared['peak']() or rss


class _Side:
    """A part of one side in a process of its own: start to the first result in `start_seconds`,
    then more runs.
    """

    def __init__(self, *job):
        self._pool = futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
        started = time.perf_counter()
        self.about, self.result = self.call(_first_run, *job, time.time())
        self.start_seconds = time.perf_counter() - started - self.about.pop('not_theirs', 0)

    def call(self, function, *arguments):
        """What a function returns in that process. Raises RuntimeError, one line, where it fails."""
        try:
            return self._pool.submit(function, *arguments).result()
        except Exception as error:  # whatever the part raises
            self.close()
            raise RuntimeError(f'{type(error).__name__}: {first_line(error)}') from None

    def close(self):
        """Ends the process."""
        self._pool.shutdown()


def measure(cfg, part, batch, sides, repeats, weights=None, checkout=None):
    """One part on all sides, taking turns.

    Returns:
      {'machine': medians of `costs.machine`, measured in the same rounds, side: {'start_seconds',
        'seconds' (median),
      'spread' (interquartile), 'peak_bytes', …}}, with `flops` and `bytes` of ours and, for what
        both compute from the
      same inputs, `difference`, the largest to ours relative to its scale.
    """
    found, running, times = {}, {}, {side: [] for side in sides}

    def start(side, directory):
        return _Side(schema.as_dict(cfg), part, side, batch, weights, checkout, directory)

    def guarded(side, action, *arguments):
        """Its result, or None where the side failed: that is noted, and the side is left out from
        then on.
        """
        try:
            return action(*arguments)
        except RuntimeError as error:
            found[side] = {'error': str(error)}
            running.pop(side, None)

    with tempfile.TemporaryDirectory() as directory:
        for side in sides:
            if part == 'cached' and (first := guarded(side, start, side, directory)):
                first.close()
            if side not in found and (worker := guarded(side, start, side, directory)):
                running[side] = worker
        rates = [costs.machine(2 * batch, build.dtype(cfg))]
        for _ in range(0 if part in our_parts.STARTS else repeats):
            for side, worker in list(running.items()):
                times[side].append(guarded(side, worker.call, _timed_run))
            rates.append(costs.machine(2 * batch, build.dtype(cfg)))
        found['machine'] = {
            name: float(np.median([rate[name] for rate in rates])) for name in rates[0]
        }
        count = (
            len(our_parts.positions(build.build_ar(cfg).num_tokens)) if part == 'transformer' else 1
        )
        for side, worker in list(running.items()):
            peak = guarded(side, worker.call, _peak_bytes)
            if peak is None:
                continue
            worker.close()
            t = np.array(times[side] or [worker.start_seconds]) / count
            found[side] = {
                'start_seconds': worker.start_seconds, 'seconds': float(np.median(t)),
                'spread': float(np.subtract(*np.percentile(t, [75, 25]))), 'repeats': len(t),
                'peak_bytes': peak, **worker.about,
            }  # fmt: skip
            if (
                part in ('prefill', 'transformer', 'decode')
                and side != 'ours'
                and 'ours' in running
            ):
                ours = running['ours'].result
                found[side]['difference'] = float(
                    np.abs(ours - worker.result).max() / np.abs(ours).max()
                )
    return found


def floor_seconds(about, machine):
    """The time below which a part cannot come: its operations at the rate of large products, or its
    weights and cache read once for each use, whichever takes longer.
    """
    return max(
        about['flops'] / machine['matrix_flops'], about['bytes'] / machine['bytes_per_second']
    )


# seconds: median of the runs, spread: their interquartile range; start: process start to the first
# result; ratio: seconds of the side over ours; differs by: the largest difference of the results
# over ours' largest value
COLUMNS = (
    'part', 'side', 'seconds', 'spread', 'start', 'compiling', 'peak MB', 'GFLOP', 'of rate', 'floor', '× floor',
    'ratio', 'differs by',
)  # fmt: skip
SAMPLING = ('prefill', 'transformer', 'head', 'decode')


def _uses(num_tokens):
    """How often each part of `SAMPLING` runs for one batch of images."""
    return {'prefill': 1, 'transformer': num_tokens - 1, 'head': num_tokens, 'decode': 1}


def sampling_seconds(seconds, num_tokens):
    """Seconds for a batch of images from those of the parts."""
    return sum(seconds[part] * n for part, n in _uses(num_tokens).items())


def _cells(side, sides):
    """The columns from 'seconds' on, of one side of a part."""
    r, ours, machine = sides[side], sides['ours'], sides['machine']
    if 'error' in r:
        return [f'failed: {r["error"]}', *[''] * 10]
    cells = [
        f'{r["seconds"]:.4g}', f'{r["spread"]:.2g}', f'{r["start_seconds"]:.1f}',
        f'{r["compile_seconds"]:.1f}' if 'compile_seconds' in r else '', f'{r["peak_bytes"] / 2**20:.0f}',
    ]  # fmt: skip
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
    cells.append(
        f'{r["seconds"] / ours["seconds"]:.2f}' if side != 'ours' and 'seconds' in ours else ''
    )
    cells.append(f'{r["difference"]:.1e}' if 'difference' in r else '')
    return cells


def markdown(results):
    """Results as tables."""
    rows, rates = [], []
    for part, sides in results['parts'].items():
        m = sides['machine']
        rates.append(
            f'{part} {m["matrix_flops"] / 1e9:.0f} ({m["matrix_flops_rows"] / 1e9:.0f}), '
            f'{m["bytes_per_second"] / 1e9:.0f}'
        )
        rows += [[part, side, *_cells(side, sides)] for side in sides if side != 'machine']
    lines = [
        f'{results["config"]}, {results["machine"]}, {results["batch"]} images, {results["train_batch"]} in training.',
        '',
        *console.markdown(COLUMNS, rows),
    ]
    for side in ('ours', 'compiled', 'eager'):
        seconds = {p: results['parts'].get(p, {}).get(side, {}).get('seconds') for p in SAMPLING}
        if all(seconds.values()):
            whole = sampling_seconds(seconds, results['tokens'])
            split = ', '.join(
                f'{p} {seconds[p] * n / whole:.1%}' for p, n in _uses(results['tokens']).items()
            )
            lines += ['', f'Sampling, {side}: {results["batch"] / whole:.4g} images/s ({split})']
    lines += [
        '',
        f'GFLOP/s of large products (of those of few rows), GB/s, in the same rounds: {"; ".join(rates)}.',
    ]
    for rows in results.get('curves', {}).values():
        lines += [
            '',
            *console.markdown(
                rows[0], [[f'{value:.4g}' for value in row.values()] for row in rows]
            ),
        ]
    return '\n'.join(lines) + '\n'


def _describe(cfg):
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == 'cpu':
        with open('/proc/cpuinfo') as f:
            models = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
        name = f'{models[0] if models else platform.processor()} × {len(os.sched_getaffinity(0))} cores'
    return f'{name}, {cfg.dtype}, Python {platform.python_version()}, JAX {jax.__version__}'


def curves(cfg, batch, repeats):
    """Our cost against batch size, tokens, depth and solver steps: one list of rows for each."""

    def row(key, value, cfg, batch):
        missing = {'seconds': math.nan, 'peak_bytes': math.nan}
        r = {
            part: missing | measure(cfg, part, batch, ['ours'], repeats)['ours']
            for part in ('transformer', 'head')
        }
        return {key: value} | {
            'transformer s/token': r['transformer']['seconds'], 'head s/token': r['head']['seconds'],
            's/token': r['transformer']['seconds'] + r['head']['seconds'],
            'peak MB': max(part['peak_bytes'] for part in r.values()) / 2**20,
        }  # fmt: skip

    def changed(key, value):
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


def _write(results, output):
    files.write_json(os.path.join(output, 'benchmark.json'), results)
    with open(os.path.join(output, 'benchmark.md'), 'w') as f:
        f.write(markdown(results))


def run(cfg, name, output, names, batch, train_batch, repeats, checkout, sides, with_curves):
    """Measures the parts, writes the tables; returns the results."""
    os.makedirs(output, exist_ok=True)
    results = {
        'config': name, 'tokens': build.build_ar(cfg).num_tokens, 'batch': batch, 'train_batch': train_batch,
        'machine': _describe(cfg), 'parts': {},
    }  # fmt: skip
    sides = ['ours', *(sides if checkout else [])]
    with tempfile.TemporaryDirectory() as directory:
        weights = None
        if checkout:
            weights = os.path.join(directory, 'weights.npz')
            tensors = {}
            for seed, model in ((1, build.build_ar(cfg)), (2, build.build_vae(cfg))):
                tensors |= torch_names.to_torch(our_parts.random_params(model, seed))
            np.savez(weights, **tensors)
        for part in names:
            print(f'{part}: {our_parts.PARTS[part]}', flush=True)
            size = train_batch if part.startswith('train') else batch
            found = measure(cfg, part, size, sides, repeats, weights, checkout)
            results['parts'][part] = found
            for side in sides:
                r = found[side]
                print(
                    f'  {side}: {r["error"] if "error" in r else format(r["seconds"], ".4g") + " s"}',
                    flush=True,
                )
            _write(results, output)
    if with_curves:
        results['curves'] = curves(cfg, batch, repeats)
    _write(results, output)
    print('\n' + markdown(results))
    return results
