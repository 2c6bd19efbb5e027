"""Training curves and report.html, one self-contained page."""

import base64
import html
import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from etils import epath

from sphere_ar_jax import __version__
from sphere_ar_jax.evaluation.pictures import save_figure, subplots
from sphere_ar_jax.models.posteriors import Posterior
from sphere_ar_jax.runtime import files, metric_writer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Curve(NamedTuple):
    """A scalar of a stage that is plotted against the training step.

    Attributes:
      stage: directory of the stage in the workdir.
      name: the scalar in the stage's metrics.jsonl.
      label: title of the plot.
      logarithmic: whether its axis is logarithmic.
    """

    stage: str
    name: str
    label: str
    logarithmic: bool


_TOKENIZER_CURVES = (
    _Curve('tokenizer', 'l1', 'tokenizer: mean |error|', True),
    _Curve('tokenizer', 'psnr', 'tokenizer: PSNR of the batch, dB', False),
)
_LATER_CURVES = (
    _Curve('ar', 'loss', 'AR: loss', True),
    _Curve('ar', 'grad_norm', 'AR: gradient norm before the clip', True),
    _Curve('ar', 'token_norm', 'AR: norm of predicted tokens before N_R', False),
    _Curve('ar', 'magnitude_loss', 'AR: loss of the log norms', True),
    _Curve('ar', 'angle', 'AR: angle from predicted tokens to real ones', False),
    _Curve('ar', 'flow_loss', "AR: the head's loss behind a text", True),
    _Curve('ar', 'text_loss', 'AR: cross-entropy of a text behind its image, nats/token', True),
    _Curve('ar', 'learning_rate', 'AR: learning rate', False),
    _Curve('distillation', 'loss', 'distillation: error of mean velocities', True),
    _Curve('distillation', 'one_step', 'distillation: error of one step', True),
)


def _curves(posterior: Posterior) -> tuple[_Curve, ...]:
    """The curves of a run, those of its posterior among them."""
    latents = (
        _Curve('tokenizer', name, f'tokenizer: {label}', name in posterior.logarithmic)
        for name, label in posterior.labels.items()
    )
    return (*_TOKENIZER_CURVES, *latents, *_LATER_CURVES)


def _has(line: Mapping[str, Any], curve: _Curve) -> bool:
    """Whether a line of metrics.jsonl has a number for a curve."""
    return isinstance(line.get(curve.name), int | float)


def _plot(axis: 'Axes', curve: _Curve, lines: list[dict[str, float]]) -> None:
    """Plots a curve from the lines of its stage's metrics.jsonl, and that of held-out images."""
    points = [(line['step'], line[curve.name]) for line in lines if _has(line, curve)]
    axis.plot(*zip(*points, strict=True))
    held_out = curve._replace(name=f'heldout_{curve.name}')
    looks = [(line['step'], line[held_out.name]) for line in lines if _has(line, held_out)]
    if looks:
        axis.plot(*zip(*looks, strict=True), marker='.', label='held out')
        axis.legend(fontsize=8)
    axis.set_title(curve.label, fontsize=9)
    axis.set_xlabel('step', fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if curve.logarithmic:
        axis.set_yscale('log')


def _columns(curves: int) -> int:
    """The number of columns for so many plots: one that leaves no gap in the last row, or 4."""
    fitting = (n for n in (4, 3, 5) if curves % n == 0)
    return min(curves, next(fitting, 4))


def save_curves(path: str | os.PathLike[str], workdir: str, posterior: Posterior) -> None:
    """Plots the training curves of the stages that a workdir has; no PNG where there are none.

    Args:
      path: the PNG.
      workdir: directory of the run. The curves come from the metrics.jsonl of each stage.
      posterior: the family of the tokenizer's posterior; its `labels` are plotted.
    """
    curves = _curves(posterior)
    lines = {
        stage: metric_writer.read_scalars(f'{workdir}/{stage}/metrics.jsonl')
        for stage in {curve.stage for curve in curves}
    }
    curves = tuple(c for c in curves if any(_has(line, c) for line in lines[c.stage]))
    if not curves:
        return
    columns = _columns(len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = subplots(rows, columns, (3.75 * columns, 3 * rows))
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, curve in zip(axes.flat, curves, strict=False):
        _plot(axis, curve, lines[curve.stage])
    figure.tight_layout()
    save_figure(figure, path)


_PAGE_WIDTH = 992  # pixels: the 62rem below
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title><style>
:root {{
  color-scheme: light dark;
  --ground: #fff; --text: #222; --line: #ddd; --code: #f5f5f5;
}}
@media (prefers-color-scheme: dark) {{
  :root {{ --ground: #16181c; --text: #e4e4e6; --line: #3c4048; --code: #23262c; }}
}}
body {{
  font: 16px/1.5 system-ui, sans-serif;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--ground);
}}
img {{ max-width: 100%; height: auto; background: #fff; }}
img.pixels {{ image-rendering: pixelated; }}
.wide {{ overflow-x: auto; }}
@media (max-width: 62rem) {{
  img {{ max-width: none; }}
  img.plot {{ width: 56rem; }}
}}
table {{ border-collapse: collapse; }}
td, th {{
  padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line);
}}
td:first-child {{ min-width: 9rem; overflow-wrap: anywhere; }}
td:last-child {{ min-width: 12rem; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
pre {{ background: var(--code); padding: .8rem; overflow-x: auto; font-size: 13px; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
_REPORT = """<p>{summary}</p>
{pictures}
<h2>Numbers</h2>
{seconds}<div class="wide"><table>{rows}</table></div>
{curves}
<h2>Again</h2>
<p>The same command in an empty directory gives the same result on the same machine.</p>
<pre>pip install -e . && {command}</pre>
<p>This page was made with sphere_ar_jax {version} and JAX {jax}, on {platform}.</p>
<h2>Configuration</h2><pre>{config}</pre>
"""

# Name of a metric → what tables say about it.
MEANING = {
    'vae/psnr': 'reconstruction of held-out images, or of training images if none are, dB',
    'classifier/accuracy': "an independent classifier's accuracy on held-out real images",
    'samples/accuracy': 'share of samples that it reads as the class asked for',
    'samples/classes_drawn': 'classes among the samples, as it reads them',
    'samples/frechet': 'Fréchet distance of samples to all real images, in pixels',
    'samples/frechet_heldout': 'Fréchet distance of samples to the held-out images, in pixels',
    'real/frechet': 'Fréchet distance of training to held-out images, in pixels: the floor',
    'samples/feature_frechet': "Fréchet distance to all real images, in the classifier's features",
    'samples/feature_frechet_heldout': (
        "Fréchet distance to the held-out images, in the classifier's features"
    ),
    'real/feature_frechet': (
        "Fréchet distance of training to held-out images, in the classifier's features: the floor"
    ),
    'real/frechet_as_many': (
        'Fréchet distance of as many held-out images as samples to all real ones, in pixels'
    ),
    'real/feature_frechet_as_many': (
        "Fréchet distance of as many held-out images as samples, in the classifier's features"
    ),
    'samples/seen': 'share of images read back right: pairs of digits that were trained on',
    'samples/held_out': 'share of images read back right: pairs of digits that were held out',
    'samples/rows': 'share of images read back right: two rows of digits',
    'samples/seen_digits': 'share of images of which the digits are right: pairs trained on',
    'samples/held_out_digits': 'share of images of which the digits are right: pairs held out',
    'samples/rows_digits': 'share of images of which the digits are right: two rows of digits',
    'real/seen': 'samples/seen of real images, which shows what the reader can do',
    'real/held_out': 'samples/held_out of real images',
    'real/rows': 'samples/rows of real images',
    'real/seen_digits': 'samples/seen_digits of real images',
    'real/held_out_digits': 'samples/held_out_digits of real images',
    'real/rows_digits': 'samples/rows_digits of real images',
    'captions/seen': 'share of captions that are right: real images of pairs trained on',
    'captions/held_out': 'share of captions that are right: real images of pairs held out',
    'captions/rows': 'share of captions that are right: real images of two rows of digits',
    'captions/nats': '−log p of the own caption of a real image, nats',
    'captions/nats_held_out': '−log p of the own caption of a real image of held-out pairs, nats',
    'captions/nats_alone': '−log p of these captions without the image',
    'samples/precision': 'share of samples on the real manifold (k = 3)',
    'samples/recall': "share of real images on the samples' manifold (k = 3)",
    'memorisation/samples_to_train': 'median distance of a sample to the nearest training image',
    'memorisation/heldout_to_train': (
        'median distance of a held-out real image to the nearest training image'
    ),
    'memorisation/nearer_than_5pct_of_heldout': (
        'share of samples nearer than the nearest 5% of held-out images'
    ),
    'wall_s/start': 'opening the data and the devices, s',
    'wall_s/tokenizer': "the tokenizer's training, s",
    'wall_s/ar': "the AR model's training, s",
    'wall_s/distillation': 'the training of the distilled head, s',
    'wall_s/reconstruction': 'reconstructing images, s',
    'wall_s/sampling': 'drawing the samples, s',
    'wall_s/scoring': 'computing the scores, and training the classifier, s',
    'wall_s/curves': 'plotting the curves, s',
    'wall_s/total': 'the sum of these parts, s',
    'peak_rss_mb': 'largest memory of the process, MiB',
}
# What the page says where its table has numbers of `wall_s`.
_SECONDS = (
    '<p><code>wall_s/…</code> is time on the clock in seconds, compilation included. That of a '
    'training adds up all its starts, each up to its last checkpoint; the other parts are those of '
    'the last start.</p>\n'
)
# What the page says of the axes of its curves.
_UNITS = (
    '<p>All curves are over training steps. Losses, gradient norms and norms of tokens have no '
    'unit. Pixels lie in [−1, 1] for the mean |error|. Each point is a mean since the point '
    'before; a line with dots is that of held-out images.</p>'
)


def _section(heading: str, alt: str, path: str, kind: str) -> str:
    """A picture with its heading as HTML, or an empty string where there is no picture.

    The kind is 'pixels' for a grid of small images, whose pixels stay squares, or 'plot' for what
    has thin lines and letters. A grid that is wider than the page is shrunk as a plot is.
    """
    if not epath.Path(path).exists():
        return ''
    content = epath.Path(path).read_bytes()
    width = int.from_bytes(content[16:20], 'big')  # as the header of a PNG says
    if width > _PAGE_WIDTH:
        kind = 'plot'
    source = f'data:image/png;base64,{base64.b64encode(content).decode()}'
    image = f'<img class="{kind}" alt="{alt}" src="{source}">'
    return f'<h2>{heading}</h2><div class="wide">{image}</div>'


def _row(name: str, value: float, meanings: Mapping[str, str]) -> str:
    """A row of the table of metrics as HTML."""
    return (
        f'<tr><td><code>{name}</code></td>'
        f'<td class="n">{value:.4g}</td>'
        f'<td>{meanings.get(name, "")}</td></tr>'
    )


def document(title: str, body: str) -> str:
    """A page as HTML.

    Args:
      title: its heading, as text.
      body: what stands below, as HTML.
    """
    return _PAGE.format(title=html.escape(title), body=body)


def save_page(
    workdir: str,
    title: str,
    summary: str,
    metrics: Mapping[str, float],
    config: str,
    command: str,
    posterior: Posterior,
) -> None:
    """Writes WORKDIR/report.html.

    Args:
      workdir: directory of the run. The page holds those of samples.png, reconstructions.png and
        curves.png that are there.
      title: what the run was trained on.
      summary: a sentence or two about the result.
      metrics: the numbers by name.
      config: the config as text.
      command: the command that made the run.
      posterior: the family of the tokenizer's posterior; its `shown` explains its numbers.
    """
    meanings = MEANING | {f'vae/{name}': text for name, text in posterior.shown.items()}
    samples = _section('Samples', 'a grid of samples', f'{workdir}/samples.png', 'pixels')
    reconstructions = _section(
        'Images, and below each what the tokenizer makes of it',
        'originals and reconstructions',
        f'{workdir}/reconstructions.png',
        'pixels',
    )
    curves = _section('Training curves', 'training curves', f'{workdir}/curves.png', 'plot')
    has_seconds = any(name.startswith('wall_s/') for name in metrics)
    report = _REPORT.format(
        summary=html.escape(summary),
        seconds=_SECONDS if has_seconds else '',
        rows=''.join(_row(name, value, meanings) for name, value in metrics.items()),
        pictures=samples + reconstructions,
        curves=curves + _UNITS if curves else '',
        command=html.escape(command),
        version=__version__,
        jax=jax.__version__,
        platform=html.escape(platform.platform()),
        config=html.escape(config),
    )
    page = document(f'SphereAR on {title}', report)
    files.write_bytes(f'{workdir}/report.html', page.encode())
