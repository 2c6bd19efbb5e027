"""Composed digits drawn for captions: what reads back right over guidance scales (docs/text.md)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build
from sphere_ar_jax.data import small
from sphere_ar_jax.evaluation import tokenizer
from sphere_ar_jax.evaluation.captioned import composed_digits
from sphere_ar_jax.evaluation.captioned.composed_digits import GROUPS
from sphere_ar_jax.evaluation.pictures import legend_below, save_figure, subplots
from sphere_ar_jax.experiments import report, runs
from sphere_ar_jax.experiments.kinds import comparison
from sphere_ar_jax.sampling import autoencoding, on_mesh


def measure(config: ConfigDict, cfg: ConfigDict, cache: str, mesh: Mesh) -> list[Any]:
    """Scores one row and seed: its tokenizer, and samples at each guidance scale.

    Args:
      config: the experiment's config.
      cfg: the config of its run, on composed digits.
      cache: directory of the trained models.
      mesh: the devices.

    Returns:
      A line for the tokenizer and for real images (`guidance` None), and one for each scale. They
      have the shares of `composed_digits.floor` and of `composed_digits.scores`, those of samples
      without the word 'samples/', and for models that write those of
      `composed_digits.score_captions`.
    """
    run = runs.load(cfg, cache, mesh)
    data = build.open_data_set(cfg)
    reader = runs.reader(cfg, cache)
    heldout = small.first_images(data.heldout, config.num_images)
    key = on_mesh.sampling_key(cfg.seed)
    batch_size = cfg.sampling.batch_size
    recon, found = autoencoding.reconstruct(run.vae, run.vae_params, heldout, key, batch_size, mesh)
    real = composed_digits.real_images(data)
    lines: list[dict[str, Any]] = [
        {
            'guidance': None,
            'psnr': tokenizer.psnr(recon, heldout),
            **{name: float(value) for name, value in found.items()},
            **composed_digits.floor(reader, real),
        }
    ]
    if build.writes_texts(cfg):
        lines[0] |= composed_digits.score_captions(run, real, mesh)
    wishes = composed_digits.asked(data, config.num_images)
    labels = build.encode_captions(cfg, [wish.caption for wish in wishes])
    sampler = build.build_sampler(cfg)
    for scale in config.guidance_scales:
        images, _ = on_mesh.draw_images(
            run,
            sampler._replace(guidance_scale=scale),
            labels,
            seed=cfg.seed,
            batch_size=batch_size,
            mesh=mesh,
        )
        scores = composed_digits.scores(reader, data, images, wishes)
        shares = {name.removeprefix('samples/'): share for name, share in scores.items()}
        lines.append({'guidance': scale} | shares)
    return lines


def summarize(config: ConfigDict, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The scores of one row and seed that a claim may be about (`experiments.SCORES`).

    The best guidance scale is the one with the largest mean of the shares of seen and held-out
    pairs.

    Args:
      config: the experiment's config, with the scale at which all rows are compared.
      lines: what `measure` returned.
    """
    first, *samples = lines
    best = max(samples, key=lambda line: line['seen'] + line['held_out'])
    common = next(line for line in samples if line['guidance'] == config.common_guidance)
    scores = {'psnr': first['psnr'], 'kl': first['kl'], 'best_guidance_read': best['guidance']}
    for group in GROUPS:
        scores[f'{group}_best'] = best[group]
        scores[f'{group}_common'] = common[group]
        scores[f'{group}_real'] = first[f'real/{group}']
    for name, value in first.items():
        if name.startswith('captions/'):
            scores[name.replace('/', '_')] = value
    return scores


def _plots(config: ConfigDict, found: Mapping[str, Any], directory: str) -> dict[str, str]:
    """Plots the shares over the guidance scale, one line for each row, and those of real images."""
    del config
    figure, grid = subplots(1, len(GROUPS), (4.2 * len(GROUPS), 3.6), sharey=True)
    axes = grid[0]
    for axis, group in zip(axes, GROUPS, strict=True):
        for row in found['rows']:
            scales, intervals = comparison.curves(found['measured'], row, group)
            comparison.band(axis, scales, intervals, label=row)
        real = [scores[f'{group}_real']['mean'] for scores in found['rows'].values()]
        axis.axhline(float(np.mean(real)), color='black', ls='--', label='real images')
        axis.set_xlabel('guidance scale')
        axis.set_title(group.replace('_', ' '))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('share of images read back right')
    legend_below(figure, axes[0], 4)
    figure.tight_layout()
    save_figure(figure, f'{directory}/captions.png')
    return {'captions.png': 'shares of images read back right over the guidance scale'}


KIND = report.Kind(
    measured_by=('num_images', 'guidance_scales'),
    measure=measure,
    summarize=summarize,
    plots=_plots,
)
