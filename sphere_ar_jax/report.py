"""Pictures of a run and report.html, one self-contained page. Of several processes, the first alone writes files.

Images are (n, H, W, c) float in [−1, 1].
"""

import base64
import html
import io
import json
import platform

import jax
import matplotlib
import numpy as np
from etils import epath

from sphere_ar_jax import __version__, hosts, metric_writer, sampling

matplotlib.use('Agg')
from matplotlib import pyplot as plt

DPI = 110  # dots per inch of all pictures


def replace(path, write):
    """Calls write(file) on a temporary file that then becomes `path`: the old file or the new one, never half of it."""
    if not hosts.is_first():
        return
    temporary = epath.Path(f'{path}.tmp')
    with temporary.open('wb') as f:
        write(f)
    temporary.replace(path)


def _write(path, content):
    """Writes bytes to a path at once."""
    replace(path, lambda f: f.write(content))


def write_json(path, values):
    """Writes a dictionary as an indented JSON file, at once."""
    _write(path, (json.dumps(values, indent=2) + '\n').encode())


def tile(images, columns, scale=3, gap=4):
    """Images in a grid, row by row: uint8 (height, width, c), each pixel `scale` wide, on grey."""
    pixels = np.asarray(sampling.to_uint8(images)).repeat(scale, 1).repeat(scale, 2)
    n, H, W, c = pixels.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, c), 96, np.uint8)
    for i, image in enumerate(pixels):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        canvas[y : y + H, x : x + W] = image
    return canvas


def _save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, bbox_inches='tight')
    plt.close(figure)
    _write(path, buffer.getvalue())


def _save_grid(path, images, columns, row_labels, title, axis_label='', scale=3):
    """A grid of images with a label at each row."""
    grid = tile(images, columns, scale)
    size = grid.shape[1] / DPI, grid.shape[0] / DPI
    figure = plt.figure(figsize=size)
    axis = figure.add_axes((0, 0, 1, 1))  # a dot for each pixel; labels go outside, which the tight box takes in
    axis.imshow(np.broadcast_to(grid, (*grid.shape[:2], 3)), interpolation='none')  # a colour map rounds greys
    height = grid.shape[0] / len(row_labels)
    axis.set_yticks([(i + 0.5) * height for i in range(len(row_labels))], row_labels)
    axis.set_xticks([])
    axis.set_ylabel(axis_label)
    axis.set_title(title)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    _save_figure(figure, path)


def save_samples(path, images, labels, per_class=16):
    """A labelled grid: one row per class, the first `per_class` images drawn for it."""
    labels = np.asarray(labels)
    classes = np.unique(labels)
    per_class = min(per_class, *(np.sum(labels == c) for c in classes))
    chosen = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in classes])
    title = f'drawn by the model: the first {per_class} of each class'
    scale = max(1, 48 // images.shape[1])
    _save_grid(path, images[chosen], per_class, [str(c) for c in classes], title, 'class asked for', scale)


def save_classes(path, images, columns, titles):
    """Rows of `columns` images, a row for each title; large images as they are, small ones enlarged."""
    scale = max(1, 128 // images.shape[1])
    _save_grid(path, images, columns, titles, '', scale=scale)


def save_reconstructions(path, images, reconstructions, columns=16, pairs=3, title='held-out images, decoded'):
    """Rows of images, each row above its reconstructions; full rows only, so at least `columns` images."""
    pairs = min(pairs, len(images) // columns)
    rows = [x[i * columns : (i + 1) * columns] for i in range(pairs) for x in (images, reconstructions)]
    scale = max(1, 48 // images.shape[1])
    _save_grid(path, np.concatenate(rows), columns, ['real', 'decoded'] * pairs, title, scale=scale)


# (stage directory, scalar, label, logarithmic axis)
_CURVES = (
    ('tokenizer', 'l1', 'tokenizer: mean |error|', True),
    ('tokenizer', 'psnr', 'tokenizer: PSNR of the batch, dB', False),
    ('tokenizer', 'kl', 'tokenizer: KL, nats per token', False),
    ('tokenizer', 'kappa', 'tokenizer: mean κ', True),
    ('ar', 'loss', 'AR: flow loss', True),
    ('ar', 'grad_norm', 'AR: gradient norm before the clip', True),
    ('ar', 'token_norm', 'AR: norm of predicted tokens before N_R', False),
    ('ar', 'learning_rate', 'AR: learning rate', False),
    ('distillation', 'loss', 'distillation: error of mean velocities', True),
    ('distillation', 'one_step', 'distillation: error of one step', True),
)


def save_curves(path, workdir):
    """The training curves of the stages that the workdir has, from each one's metrics.jsonl."""
    stages = {stage: metric_writer.read_scalars(f'{workdir}/{stage}/metrics.jsonl') for stage, *_ in _CURVES}
    curves = [curve for curve in _CURVES if any(curve[1] in line for line in stages[curve[0]])]
    columns = min(len(curves), next((n for n in (4, 3, 5) if len(curves) % n == 0), 4))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.75 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (stage, name, label, logarithmic) in zip(axes.flat, curves, strict=False):
        lines = stages[stage]
        points = [(line['step'], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True))
        axis.set_title(label, fontsize=9)
        axis.set_xlabel('step', fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if logarithmic:
            axis.set_yscale('log')
    figure.tight_layout()
    _save_figure(figure, path)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SphereAR: {title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100%; image-rendering: pixelated }} table {{ border-collapse: collapse }}
td, th {{ padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid #ddd }} td.n {{ text-align: right;
font-variant-numeric: tabular-nums }} pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px }}
</style></head><body>
<h1>SphereAR on {title}</h1>
<p>{summary}</p>
{pictures}
<h2>Numbers</h2><table>{rows}</table>
{curves}
<h2>Again</h2><p>The same command in an empty directory gives the same result on the same machine.</p>
<pre>pip install -e . && {command}</pre>
<p>This page was made with sphere_ar_jax {version} and JAX {jax}, on {platform}.</p>
<h2>Configuration</h2><pre>{config}</pre>
</body></html>
"""

_MEANING = {
    'vae/psnr': 'reconstruction of held-out digits, or of training images, dB',
    'vae/kl': 'KL of the posterior to the uniform distribution, nats per token',
    'vae/kappa': 'mean concentration of the posterior',
    'classifier/accuracy': "the judge: an SVC's accuracy on held-out real digits",
    'samples/accuracy': 'share of samples that it reads as the class asked for',
    'samples/classes_drawn': 'classes among the samples, as it reads them',
    'samples/frechet': 'Fréchet distance of samples to all real digits',
    'samples/frechet_heldout': 'Fréchet distance of samples to the held-out digits',
    'real/frechet': 'Fréchet distance of training to held-out digits',
    'samples/precision': 'share of samples on the real manifold (k = 3)',
    'samples/recall': "share of real digits on the samples' manifold (k = 3)",
    'memorisation/samples_to_train': 'median distance of a sample to the nearest training digit',
    'memorisation/heldout_to_train': 'the same of a held-out real digit',
    'memorisation/nearer_than_5pct_of_heldout': 'share of samples nearer than the nearest 5% of held-out digits',
    'peak_rss_mb': 'largest memory of the process, MiB',
}


def _section(heading, alt, path):
    """A picture with its heading, '' where there is none."""
    if not epath.Path(path).exists():
        return ''
    source = 'data:image/png;base64,' + base64.b64encode(epath.Path(path).read_bytes()).decode()
    return f'<h2>{heading}</h2><img alt="{alt}" src="{source}">'


def save_page(workdir, title, summary, metrics, config, command):
    """Writes WORKDIR/report.html from the pictures that are in WORKDIR and a dict of metrics."""
    rows = ''.join(
        f'<tr><td><code>{name}</code></td><td class="n">{value:.4g}</td><td>{_MEANING.get(name, "")}</td></tr>'
        for name, value in metrics.items()
    )
    pictures = _section('Samples', 'a grid of samples, one row per class', f'{workdir}/samples.png') + _section(
        'Images, and below each what the tokenizer makes of it', 'originals and reconstructions',
        f'{workdir}/reconstructions.png',
    )  # fmt: skip
    page = _PAGE.format(
        title=html.escape(title), summary=html.escape(summary), rows=rows, pictures=pictures,
        curves=_section('Training curves', 'training curves', f'{workdir}/curves.png'), command=html.escape(command),
        version=__version__, jax=jax.__version__, platform=html.escape(platform.platform()), config=html.escape(config),
    )  # fmt: skip
    _write(f'{workdir}/report.html', page.encode())


def save_frontier(path, summary, scores, reference):
    """Scores, a column each: above against evaluations per token at guidance 1.5, below against guidance.

    summary: of `frontier.summarize`. reference: the setting whose mean ± standard deviation is drawn as a band.
    """
    figure, axes = plt.subplots(2, len(scores), figsize=(4.6 * len(scores), 9))
    parts = {name: name.replace(', guidance', ' guidance').split(', ') for name in summary}
    plain = {name: key[0].split() for name, key in parts.items() if len(key) == 1}  # solver, steps, 'guidance', scale
    solvers = list(dict.fromkeys(words[0] for words in plain.values()))

    def draw(axis, score, names, x, **style):
        names = sorted(names, key=x)
        mean, std = ([summary[n][score][k] for n in names] for k in ('mean', 'std'))
        axis.errorbar([x(n) for n in names], mean, std, capsize=2, **style)

    evaluations = lambda name: summary[name]['evaluations']
    for score, above, below in zip(scores, *axes, strict=True):
        for i, solver in enumerate(solvers):
            mine = [name for name, words in plain.items() if words[0] == solver]
            style = dict(color=f'C{i}', marker='*' if solver == 'distilled' else 'o', label=solver)
            draw(
                above,
                score,
                [n for n in mine if n.endswith('guidance 1.5') or solver == 'distilled'],
                evaluations,
                **style,
            )
            annealed = [n for n, key in parts.items() if key[0].startswith(f'{solver} ') and 'annealing' in n]
            y = [summary[n][score]['mean'] for n in annealed]
            above.plot([evaluations(n) for n in annealed], y, '+', color=f'C{i}', markersize=9)
            for count, line in ((10, '-'), (101, '--')):
                at = [n for n in mine if evaluations(n) == count and len(plain[n]) == 4]
                label = f'{solver}, {count} evaluations'
                if at:
                    draw(
                        below,
                        score,
                        at,
                        lambda n: float(plain[n][3]),
                        color=f'C{i}',
                        marker='o',
                        linestyle=line,
                        label=label,
                    )
        if reference in summary:
            mean, std = (summary[reference][score][k] for k in ('mean', 'std'))
            above.axhspan(mean - std, mean + std, color='0.85', label=f'{reference},\nmean ± std of the runs')
            above.set_ylim(
                *((0, 3 * mean) if score.endswith('frechet') else (max(0, mean - 0.15), min(1, mean + 0.12)))
            )
        above.set_xscale('log', base=2)
        above.xaxis.set_major_formatter('{x:g}')
        above.set_title(score.removeprefix('samples/'))
        above.set_xlabel('evaluations of the flow head per token (+: annealed)')
        below.set_xlabel('guidance scale')
        for axis in (above, below):
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    _save_figure(figure, path)
