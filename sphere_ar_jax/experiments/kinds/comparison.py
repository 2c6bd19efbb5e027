"""Scores of trained rows: reconstruction, and samples over guidance scales (claims 1, 2 and 4).

Dimensions:
  n  samples     L  tokens of an image     d  latent dimension
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from sphere_ar_jax.config import build
from sphere_ar_jax.data import small
from sphere_ar_jax.data.small import Split
from sphere_ar_jax.evaluation import tokenizer
from sphere_ar_jax.evaluation.pictures import legend_below, save_figure, subplots
from sphere_ar_jax.evaluation.small_images import Judge
from sphere_ar_jax.experiments import report, runs, statistics
from sphere_ar_jax.sampling import autoencoding, on_mesh
from sphere_ar_jax.sampling.model import Model
from sphere_ar_jax.training.run import Run

# The most images of a split whose latents or reconstructions are looked at.
MOST_IMAGES = 5000
# The quantiles of the training images' norms between which a sample's tokens should lie. Of L
# independent tokens one lies outside by chance in a share 1 − 0.998^L of the samples, so that the
# shares of models with other numbers of tokens do not compare.
RANGE = (0.001, 0.999)


def _latents(run: Run, tokens: jax.Array | np.ndarray) -> np.ndarray:
    """The latents (n, L, d) that tokens of the AR model stand for."""
    return np.asarray(run.vae.apply({'params': run.vae_params}, tokens, method='from_tokens'))


def _norms(latents: np.ndarray) -> np.ndarray:
    """The norms (n, L) of latents."""
    return np.linalg.norm(latents, axis=-1)


def collapsed_share(samples: np.ndarray, real: np.ndarray) -> float:
    """The share of samples that have next to no contrast.

    Args:
      samples: (n, …) pixels.
      real: real images (·, …).

    Returns:
      The share whose standard deviation over pixels lies below a quarter of the 1% quantile of the
      real images'.
    """
    least = np.quantile(real.reshape(len(real), -1).std(axis=1), 0.01) / 4
    return float(np.mean(samples.reshape(len(samples), -1).std(axis=1) < least))


def brightness_distance(samples: np.ndarray, real: np.ndarray) -> float:
    """The 1-D Wasserstein distance between the brightness of samples and that of real images.

    The brightness of an image is the mean of its pixels.

    Args:
      samples: (n, h, w) in [0, 1].
      real: (·, h, w) in [0, 1].
    """
    # SciPy's statistics are slow to import.
    from scipy import stats

    means = (samples.mean(axis=(1, 2)), real.mean(axis=(1, 2)))
    return float(stats.wasserstein_distance(*means))


def sample_scores(judge: Judge, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The scores of samples (n, H, W, c), without the word 'samples/' of their names.

    `frechet` is the distance in the classifier's features where it has any, else in pixels.
    """
    found = judge.scores(images, labels)
    scores = {name.removeprefix('samples/'): float(value) for name, value in found.items()}
    for end in ('', '_heldout'):
        if f'feature_frechet{end}' in scores:
            scores[f'pixel_frechet{end}'] = scores[f'frechet{end}']
            scores[f'frechet{end}'] = scores.pop(f'feature_frechet{end}')
    return scores


def _reconstruction(run: Run, heldout: Split, judge: Judge, mesh: Mesh) -> dict[str, float]:
    """PSNR and Fréchet distance of reconstructions of held-out images, and the posterior's KL.

    The first `MOST_IMAGES` are reconstructed. Where there are more, their distance is to all of
    them, and perfect reconstructions would not score 0.
    """
    cfg = run.config
    key = on_mesh.sampling_key(cfg.seed)
    images = small.first_images(heldout, MOST_IMAGES)
    recon, found = autoencoding.reconstruct(
        run.vae, run.vae_params, images, key, cfg.sampling.batch_size, mesh
    )
    scores = sample_scores(judge, recon, heldout.labels[: len(images)])
    return {
        'psnr': tokenizer.psnr(recon, images),
        'rfrechet': scores['frechet_heldout'],
        **{name: float(value) for name, value in found.items()},
    }


def measure(config: ConfigDict, cfg: ConfigDict, cache: str, mesh: Mesh) -> list[Any]:
    """Scores one row and seed: its tokenizer, and samples at each guidance scale.

    Args:
      config: the experiment's config.
      cfg: the config of its run.
      cache: directory of the trained models.
      mesh: the devices.

    Returns:
      A line for the tokenizer (`guidance` None), and one for each scale, each a dictionary. The
      lines of samples hold `raw_norm_mean` and `raw_norm_std`, which have L numbers, of the latents
      before projection. The tokenizer's line has `real_norm_mean`, those of training images.
    """
    run = runs.load(cfg, cache, mesh)
    _, train, heldout = build.open_data_set(cfg)
    judge = runs.judge(cfg, cache)
    real = small.first_images(train, MOST_IMAGES)
    bright = heldout.pixels
    tokens = Model(run, mesh=mesh).encode(real, seed=cfg.seed + 2)
    norms = _norms(_latents(run, tokens))
    low, high = np.quantile(norms, RANGE)
    first: dict[str, Any] = {'guidance': None} | _reconstruction(run, heldout, judge, mesh)
    first['norm_low'] = float(low)
    first['norm_high'] = float(high)
    first['real_norm_mean'] = norms.mean(axis=0).tolist()
    lines = [first]
    labels = np.arange(config.num_images) % train.num_classes
    sampler = build.build_sampler(cfg)
    for scale in config.guidance_scales:
        started = time.perf_counter()
        images, drawn = on_mesh.draw_images(
            run,
            sampler._replace(guidance_scale=scale),
            labels,
            seed=cfg.seed,
            batch_size=cfg.sampling.batch_size,
            mesh=mesh,
        )
        seconds = time.perf_counter() - started
        raw = _norms(_latents(run, drawn.raw))
        final = _norms(_latents(run, drawn.z))
        # Rounding moves a norm off the sphere, where low and high are the same.
        outside = (final < low * (1 - 1e-4)) | (final > high * (1 + 1e-4))
        lines.append(
            {'guidance': scale}
            | sample_scores(judge, images, labels)
            | {
                'collapsed': collapsed_share(images, real),
                'brightness_distance': brightness_distance(train.to_pixels(images), bright),
                'outside_norms': float(np.mean(outside.any(axis=1))),
                'raw_norm_mean': raw.mean(axis=0).tolist(),
                'raw_norm_std': raw.std(axis=0).tolist(),
                'seconds_per_image': seconds / len(images),
            }
        )
    return lines


def norm_drift(norms: Sequence[float], real: Sequence[float]) -> float:
    """How much norms change over a sequence, beyond those of training images.

    A Gaussian token's norm depends on what the image shows at its place. Each norm is therefore
    divided by that of training images at the same position.

    Args:
      norms: mean norms before projection, one for each position.
      real: mean norms of the tokens of training images.

    Returns:
      |the mean of norms / real over the last quarter of the positions / that over the first − 1|.
    """
    quarter = max(1, len(norms) // 4)
    ratios = np.divide(norms, real)
    return abs(float(np.mean(ratios[-quarter:]) / np.mean(ratios[:quarter])) - 1)


def summarize(config: ConfigDict, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The scores of one row and seed that a claim may be about (`experiments.SCORES`).

    A degradation is what the largest guidance scale costs: Fréchet distance against the scale of
    the least, accuracy against the scale of the most, and collapsed samples against the scale of
    the least Fréchet distance.

    Args:
      config: the experiment's config, with the scale at which all rows are compared.
      lines: what `measure` returned, and a line of `tokenizer_steps_per_second` where an experiment
        compares speeds.
    """
    tokenizer_line = next(line for line in lines if 'psnr' in line)
    timed = next((line for line in lines if 'guidance' not in line), {})
    scales = {line['guidance']: line for line in lines if line.get('guidance') is not None}
    samples = [scales[scale] for scale in sorted(scales)]
    best = min(samples, key=lambda line: line['frechet'])
    common = scales[config.common_guidance]
    last = samples[-1]
    # What was measured before a score existed does not have it.
    new = {}
    if 'brightness_distance' in best:
        new['brightness_distance'] = best['brightness_distance']
    if 'real_norm_mean' in tokenizer_line:
        new['norm_drift'] = norm_drift(common['raw_norm_mean'], tokenizer_line['real_norm_mean'])
    if 'seconds_per_image' in common:
        # The first scale has the compilation in its time.
        new['seconds_per_image'] = min(line['seconds_per_image'] for line in samples)
    return {
        'psnr': tokenizer_line['psnr'],
        'rfrechet': tokenizer_line['rfrechet'],
        'kl': tokenizer_line['kl'],
        'best_guidance': best['guidance'],
        'frechet_best': best['frechet'],
        'frechet_common': common['frechet'],
        'frechet_degradation': last['frechet'] - best['frechet'],
        'accuracy_best': best['accuracy'],
        'accuracy_common': common['accuracy'],
        'accuracy_degradation': max(line['accuracy'] for line in samples) - last['accuracy'],
        'collapsed_degradation': last['collapsed'] - best['collapsed'],
        'precision_best': best['precision'],
        'recall_best': best['recall'],
        **new,
        **timed,
    }


def _over_guidance(
    measured: report.MeasuredParts, row: str, name: str
) -> dict[float, dict[int, float]]:
    """{guidance scale: {seed: a score of the row's samples}}."""
    values: dict[float, dict[int, float]] = {}
    for unit in measured:
        if unit['row'] != row:
            continue
        for line in unit['lines']:
            if line.get('guidance') is not None:
                values.setdefault(line['guidance'], {})[unit['seed']] = line[name]
    return values


def curves(
    measured: report.MeasuredParts, row: str, name: str
) -> tuple[np.ndarray, list[statistics.Interval]]:
    """The guidance scales of a row, and the interval of a score over seeds at each of them."""
    values = _over_guidance(measured, row, name)
    scales = sorted(values)
    found = [statistics.interval(list(values[scale].values())) for scale in scales]
    return np.array(scales), found


def band(
    axis: Axes,
    x: Sequence[float] | np.ndarray,
    found: list[statistics.Interval],
    marker: str = 'o',
    **style: Any,
) -> None:
    """Draws means as a line and their intervals as a band."""
    (line,) = axis.plot(x, [interval.mean for interval in found], marker=marker, ms=3, **style)
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


def _styles(config: ConfigDict) -> dict[str, dict[str, str]]:
    """How the line of each row of the config is drawn, whatever rows are measured.

    A variant has the colour of the row that it varies, and is dashed. Beyond ten rows colours come
    again with other markers.
    """
    varied = {other: name for name, others in config.variants.items() for other in others}
    own = [row for row in config.rows if row not in varied]
    found = {}
    for place, name in enumerate(own):
        style = {'color': f'C{place % 10}', 'marker': 'os^'[place // 10 % 3]}
        found[name] = {**style, 'ls': '-'}
        for i, other in enumerate(config.variants.get(name, ())):
            found[other] = {**style, 'ls': ('--', ':', '-.')[i % 3]}
    return found


def _plot_guidance(
    path: str, config: ConfigDict, rows: Sequence[str], measured: report.MeasuredParts
) -> None:
    """Plots scores of samples against the guidance scale, one line for each row."""
    figure, grid = subplots(1, len(_GUIDED), (4.2 * len(_GUIDED), 3.6))
    axes = grid[0]
    styles = _styles(config)
    for axis, (name, label) in zip(axes, _GUIDED.items(), strict=True):
        for row in rows:
            scales, found = curves(measured, row, name)
            if len(scales):
                band(axis, scales, found, label=row, **styles[row])
        axis.set_xlabel('guidance scale')
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale('log')
    # The share of collapsed samples is 0 in most experiments.
    axes[-1].set_ylim(0, max(0.1, axes[-1].get_ylim()[1]))
    legend_below(figure, axes[0], 5)
    figure.tight_layout()
    save_figure(figure, path)


def _plot_rows(path: str, config: ConfigDict, scores: Mapping[str, Any]) -> None:
    """Plots the Fréchet distance at the best guidance over the numbers of `curves_at`.

    `scores` are the rows of results.json.
    """
    figure, grid = subplots(1, 1, (5.6, 3.8))
    axis = grid[0, 0]
    for line, rows in config.curves.items():
        shown = [(x, row) for x, row in zip(config.curves_at, rows, strict=True) if row in scores]
        found = [report.interval(scores[row]['frechet_best']) for _, row in shown]
        if shown:
            band(axis, [x for x, _ in shown], found, label=line)
    axis.set_xscale('log', base=2)
    axis.set_xticks(config.curves_at, [f'{x:g}' for x in config.curves_at])
    axis.set_yscale('log')
    axis.set_xlabel(config.curves_over)
    axis.set_ylabel('Fréchet distance, best guidance')
    axis.grid(alpha=0.3, which='both')
    axis.legend()
    figure.tight_layout()
    save_figure(figure, path)


def _leads(
    measured: report.MeasuredParts, pair: str, name: str
) -> dict[float, statistics.Interval]:
    """{guidance scale: the interval of one row's lead over another, paired by seed}.

    Args:
      measured: all parts that are measured.
      pair: the two rows, 'BETTER WORSE'.
      name: of the score, of which less is better.
    """
    better, worse = (_over_guidance(measured, row, name) for row in pair.split())
    found = {}
    for scale in sorted(better.keys() & worse.keys()):
        seeds = sorted(better[scale].keys() & worse[scale].keys())
        if seeds:
            behind = [worse[scale][seed] for seed in seeds]
            ahead = [better[scale][seed] for seed in seeds]
            found[scale] = statistics.paired(behind, ahead)
    return found


def _plot_map(path: str, pairs: Sequence[str], measured: report.MeasuredParts) -> None:
    """Plots leads in Fréchet distance as cells, a line for each pair of rows.

    A cell has the mean and, below it, the 95% interval. It is bold and coloured where the interval
    excludes 0: blue where the first row of the pair has the lead, red where the second has it.
    """
    lines = {pair: _leads(measured, pair, 'frechet') for pair in pairs}
    lines = {pair: leads for pair, leads in lines.items() if leads}
    scales = sorted({scale for leads in lines.values() for scale in leads})
    colours = np.full((len(lines), len(scales)), np.nan)
    figure, grid = subplots(1, 1, (2.8 + 1.4 * len(scales), 1.2 + 0.75 * len(lines)))
    axis = grid[0, 0]
    for y, leads in enumerate(lines.values()):
        for x, scale in enumerate(scales):
            lead = leads.get(scale)
            if lead is None:
                continue
            decided = lead.low > 0 or lead.high < 0
            words = f'{lead.mean:+.2f}'
            if lead.seeds > 1:
                words += f'\n[{lead.low:.2f}, {lead.high:.2f}]'
            weight = 'bold' if decided else 'normal'
            axis.text(x, y, words, ha='center', va='center', fontsize=8, weight=weight)
            colours[y, x] = np.sign(lead.mean) * math.log1p(abs(lead.mean)) if decided else 0.0
    axis.imshow(colours, cmap='RdBu', vmin=-3, vmax=3, aspect='auto')
    axis.set_xticks(range(len(scales)), [f'{scale:g}' for scale in scales])
    names = [pair.replace(' ', '\nbetter than ') for pair in lines]
    axis.set_yticks(range(len(lines)), names, fontsize=8)
    axis.set_xlabel('guidance scale')
    axis.set_title('Fréchet distance: lead of the first row over the second')
    figure.tight_layout()
    save_figure(figure, path)


def _plots(config: ConfigDict, found: Mapping[str, Any], directory: str) -> dict[str, str]:
    """Writes the plots that the config asks for.

    Its `curves` replace the plot over guidance, and its `map` stands before that.
    """
    if config.curves:
        _plot_rows(f'{directory}/curves.png', config, found['rows'])
        words = f'Fréchet distance of samples over the {config.curves_over}, with 95% intervals'
        return {'curves.png': words}
    plots = {}
    if config.map:
        _plot_map(f'{directory}/map.png', config.map, found['measured'])
        plots['map.png'] = (
            'leads in Fréchet distance, seed by seed, with 95% intervals; a cell is blue where the '
            'first row has the lead, red where the second has it, and white where 0 lies in the '
            'interval'
        )
    _plot_guidance(f'{directory}/guidance.png', config, list(found['rows']), found['measured'])
    words = 'scores of samples over the guidance scale, with 95% intervals'
    if config.variants:
        words += '; variants of a row have its colour'
    plots['guidance.png'] = words
    return plots


KIND = report.Kind(
    measured_by=('num_images', 'guidance_scales'),
    measure=measure,
    summarize=summarize,
    plots=_plots,
)
