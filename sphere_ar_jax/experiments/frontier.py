"""Quality against evaluations of the flow head, for trained runs of the digits: a table and a plot.

    python -m sphere_ar_jax.experiments.frontier --workdir=/tmp/digits0 --workdir=/tmp/digits1
    --output=/tmp/frontier

Every setting of `settings` samples --num_images digits from every run and scores them by the
digits' protocol. Results are added to OUTPUT/scores.jsonl one by one: started again, the command
goes on. Workdirs of a distilled head are sampled with the settings that such a head has.
"""

import argparse
import json
import os
import sys
import time

import numpy as np
from matplotlib import pyplot as plt
from tqdm import tqdm

from sphere_ar_jax.config import build
from sphere_ar_jax.data import digits
from sphere_ar_jax.evaluation import pictures
from sphere_ar_jax.evaluation.digits import digit_pixels, score_digits
from sphere_ar_jax.flow import plan
from sphere_ar_jax.runtime import console, files, metric_writer
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.training.run import load_run

REFERENCE = 'euler_maruyama 100, guidance 1.5'
SCORES = ('samples/accuracy', 'samples/frechet', 'samples/precision', 'samples/recall')


def settings(levels=None):
    """{name: (keyword arguments of `plan.Options`, guidance scale)} of what is compared.

    levels: numbers of steps of a distilled head, which knows its guidance itself; None for a plain
    one.
    """
    if levels is not None:
        return {
            f'distilled {n}': (dict(solver='euler', num_steps=n, guidance=None), None)
            for n in levels
        }
    found = {}

    def add(scale, solver, num_steps, **options):
        extra = ''.join(f', {name} {value}' for name, value in options.items())
        options |= dict(solver=solver, num_steps=num_steps, guidance='constant')
        found[f'{solver} {num_steps}, guidance {scale}{extra}'] = options, scale

    def add_all(scale, evaluations, last=None, **options):
        """Every solver, with steps for so many evaluations; last: of the last token."""
        for solver in ('euler', 'ab2', 'dpmpp_2m', 'heun', 'euler_maruyama'):
            steps = {'heun': lambda n: n // 2, 'euler_maruyama': lambda n: max(n - 1, 1)}.get(
                solver, lambda n: n
            )
            final = {} if last is None else {'final_steps': steps(last)}
            add(scale, solver, steps(evaluations), **final, **options)

    for scale in (1.5, 1.0, 2.0, 3.0, 4.5):
        add(scale, 'euler_maruyama', 100)
        add_all(scale, 10)
    for evaluations in (2, 4, 6, 8, 16, 32):
        add_all(1.5, evaluations)
    for first, last, shape in (
        (12, 4, 'linear'),
        (16, 4, 'linear'),
        (12, 4, 'cosine'),
        (12, 4, 'two_stage'),
    ):
        add_all(1.5, first, last, annealing=shape)
    for shift in (0.5, 0.7, 1.5, 2.0):
        for solver in ('ab2', 'dpmpp_2m'):
            add(1.5, solver, 10, shift=shift)
        add(1.5, 'euler_maruyama', 9, shift=shift)
    for noise_scale in (0.25, 0.5, 2.0):
        add(1.5, 'euler_maruyama', 9, noise_scale=noise_scale)
    for interval in ((0.0, 0.7), (0.2, 1.0), (0.2, 0.7)):
        for scale in (1.5, 2.0):
            add(scale, 'ab2', 10, guidance_interval=interval)
    return found


def _measure(run, options, scale, num_images, batch_size):
    """Scores of one setting on one run, with its mean evaluations per token."""
    cfg = run.config
    train, heldout = digits.splits(cfg.seed, cfg.data.holdout)
    labels = np.arange(num_images) % 10
    sampler = build.Sampler(options, scale, cfg.sampling.temperature)
    images, _ = on_mesh.sample_images(run, sampler, labels, seed=cfg.seed, batch_size=batch_size)
    scores = score_digits(digit_pixels(images), labels, train, heldout)
    return {name: float(scores[name]) for name in SCORES} | {
        'evaluations': options.plan(run.ar.num_tokens).evaluations
    }


def summarize(rows):
    """{setting: mean and std over runs of each score, evaluations, number of runs} of the rows of
    scores.jsonl.
    """
    summary = {}
    for name in dict.fromkeys(row['setting'] for row in rows):
        mine = [row for row in rows if row['setting'] == name]
        values = {score: [row[score] for row in mine] for score in SCORES}
        summary[name] = {'evaluations': mine[0]['evaluations'], 'runs': len(mine)} | {
            score: {
                'mean': float(np.mean(v)),
                'std': float(np.std(v, ddof=1)) if len(v) > 1 else 0.0,
            }
            for score, v in values.items()
        }
    return summary


def markdown(summary):
    """The summary as a table, sorted by evaluations and Fréchet distance."""
    rows = []
    for name, row in sorted(
        summary.items(), key=lambda kv: (kv[1]['evaluations'], kv[1]['samples/frechet']['mean'])
    ):
        scores = (f'{row[score]["mean"]:.4f} ± {row[score]["std"]:.4f}' for score in SCORES)
        rows.append([name, f'{row["evaluations"]:g}', *scores])
    columns = ('setting', 'evaluations', 'accuracy', 'Fréchet', 'precision', 'recall')
    return '\n'.join(console.markdown(columns, rows)) + '\n'


def save_frontier(path, summary):
    """Scores, a column each: above against evaluations per token at guidance 1.5, below against
    guidance.

    summary: of `summarize`. The mean ± standard deviation of `REFERENCE` is drawn as a band.
    """
    figure, axes = plt.subplots(2, len(SCORES), figsize=(4.6 * len(SCORES), 9))
    parts = {name: name.replace(', guidance', ' guidance').split(', ') for name in summary}
    plain = {
        name: key[0].split() for name, key in parts.items() if len(key) == 1
    }  # solver, steps, 'guidance', scale
    evaluations = lambda name: summary[name]['evaluations']
    scale = lambda name: float(plain[name][3])

    def draw(axis, score, names, x, **style):
        names = sorted(names, key=x)
        mean, std = ([summary[n][score][k] for n in names] for k in ('mean', 'std'))
        axis.errorbar([x(n) for n in names], mean, std, capsize=2, **style)

    for score, above, below in zip(SCORES, *axes, strict=True):
        for i, solver in enumerate(dict.fromkeys(words[0] for words in plain.values())):
            mine = [name for name, words in plain.items() if words[0] == solver]
            style = dict(color=f'C{i}', marker='*' if solver == 'distilled' else 'o')
            at = [n for n in mine if n.endswith('guidance 1.5') or solver == 'distilled']
            draw(above, score, at, evaluations, label=solver, **style)
            annealed = [
                n
                for n, key in parts.items()
                if key[0].startswith(f'{solver} ') and 'annealing' in n
            ]
            y = [summary[n][score]['mean'] for n in annealed]
            above.plot([evaluations(n) for n in annealed], y, '+', color=f'C{i}', markersize=9)
            for count, line in ((10, '-'), (101, '--')):
                at = [n for n in mine if evaluations(n) == count and len(plain[n]) == 4]
                if at:
                    label = f'{solver}, {count} evaluations'
                    draw(below, score, at, scale, linestyle=line, label=label, **style)
        if REFERENCE in summary:
            mean, std = (summary[REFERENCE][score][k] for k in ('mean', 'std'))
            above.axhspan(
                mean - std, mean + std, color='0.85', label=f'{REFERENCE},\nmean ± std of the runs'
            )
            limits = (
                (0, 3 * mean)
                if score.endswith('frechet')
                else (max(0, mean - 0.15), min(1, mean + 0.12))
            )
            above.set_ylim(*limits)
        above.set_xscale('log', base=2)
        above.xaxis.set_major_formatter('{x:g}')
        above.set_title(score.removeprefix('samples/'))
        above.set_xlabel('evaluations of the flow head per token (+: annealed)')
        below.set_xlabel('guidance scale')
        above.grid(alpha=0.3)
        below.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    pictures.save_figure(figure, path)


def run(workdirs, output, num_images, batch_size):
    """Measures what is not measured yet; writes the table and the plot. Returns the summary."""
    os.makedirs(output, exist_ok=True)
    workdirs, path = (
        [os.path.abspath(workdir) for workdir in workdirs],
        os.path.join(output, 'scores.jsonl'),
    )
    rows = metric_writer.read_scalars(path)
    with open(path, 'w') as f:  # without a line that a kill cut off
        f.writelines(json.dumps(row) + '\n' for row in rows)
    done = {(row['workdir'], row['setting'], row['num_images']) for row in rows}
    runs = {workdir: load_run(workdir) for workdir in workdirs}
    levels = lambda run: run.config.distillation_training.levels if run.config.init_from else None
    todo = [
        (name, options, scale, workdir)
        for workdir in workdirs
        for name, (options, scale) in settings(levels(runs[workdir])).items()
        if (workdir, name, num_images) not in done
    ]
    for name, options, scale, workdir in tqdm(
        todo, desc='settings × runs', disable=not sys.stderr.isatty()
    ):
        started = time.perf_counter()
        row = _measure(runs[workdir], plan.Options(**options), scale, num_images, batch_size)
        row |= {
            'setting': name,
            'workdir': workdir,
            'num_images': num_images,
            'seconds': time.perf_counter() - started,
        }
        rows.append(row)
        with open(path, 'a') as f:
            f.write(json.dumps(row) + '\n')
    summary = summarize(
        [row for row in rows if row['workdir'] in workdirs and row['num_images'] == num_images]
    )
    files.write_json(os.path.join(output, 'frontier.json'), summary)
    with open(os.path.join(output, 'frontier.md'), 'w') as f:
        f.write(markdown(summary))
    save_frontier(os.path.join(output, 'frontier.png'), summary)
    return summary


def main():
    """Parses the command line and measures; what the user can put right ends it with one line."""
    parser = argparse.ArgumentParser('python -m sphere_ar_jax.experiments.frontier')
    parser.add_argument(
        '--workdir', action='append', required=True, help='a finished run; give one for each seed'
    )
    parser.add_argument(
        '--output', required=True, help='directory for scores.jsonl, frontier.json, .md and .png'
    )
    parser.add_argument(
        '--num_images', type=int, default=2000, help='digits drawn for each setting and run'
    )
    parser.add_argument('--batch_size', type=int, default=500, help='images drawn at a time')
    arguments = parser.parse_args()
    try:
        run(arguments.workdir, arguments.output, arguments.num_images, arguments.batch_size)
    except (OSError, console.UserError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
