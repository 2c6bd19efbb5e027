"""How fast tokens leave the training set behind prefixes unlike it (check 2; docs/shifted.md).

The first tokens of held-out images, clean and corrupted, are kept, and the run draws the others.
Those that it draws are compared with the training images' tokens at the same position.

Dimensions:
  n  images     L  tokens of an image     d  latent dimension
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build
from sphere_ar_jax.data import small
from sphere_ar_jax.data.shifted import corruptions
from sphere_ar_jax.evaluation.pictures import save_figure, subplots
from sphere_ar_jax.experiments import report, runs, statistics
from sphere_ar_jax.experiments.kinds import comparison
from sphere_ar_jax.sampling import inputs, on_mesh
from sphere_ar_jax.sampling.model import Model
from sphere_ar_jax.sampling.tokens import Prefix

# The word of images that are not corrupted.
CLEAN = 'clean'


def nearest(tokens: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The distance of each token to the nearest one at its position.

    Args:
      tokens: (n, L, d).
      seen: tokens of training images (·, L, d).

    Returns:
      (n, L).
    """
    # SciPy's trees take a while to import.
    from scipy.spatial import cKDTree

    columns = [cKDTree(seen[:, k]).query(tokens[:, k])[0] for k in range(tokens.shape[1])]
    return np.stack(columns, axis=1)


def _originals(config: ConfigDict, images: np.ndarray, seed: int) -> Iterator[tuple[Any, ...]]:
    """Yields (word, severity, images (n, H, W, c) in [−1, 1]), first of the clean images."""
    yield CLEAN, 0, images
    for text in config.shifts:
        shift = corruptions.parse(text)
        yield *shift, corruptions.corrupt_floats(images, shift, seed)


def measure(config: ConfigDict, cfg: ConfigDict, cache: str, mesh: Mesh) -> list[Any]:
    """Measures the tokens that one row and seed draws behind prefixes.

    Tokens are those that the AR model reads, drawn from the posterior as in its training, so that
    the corruption alone is new to it.

    Args:
      config: the experiment's config.
      cfg: the config of its run.
      cache: directory of the trained models.
      mesh: the devices.

    Returns:
      A line for each corruption, 'clean' included, and each prefix, a dictionary. It has L numbers
      in each of
        distance: the mean distance to the nearest training token, over that of clean held-out
          tokens; those of the prefix are the prefix's own.
        raw_norm_mean, raw_norm_std: mean and spread over images of the norm before projection, over
          the training tokens' mean norm.
      And `collapsed` is the share of images whose drawn part has next to no contrast, see
      `comparison.collapsed_share`.
    """
    run = runs.load(cfg, cache, mesh)
    model = Model(run, mesh=mesh)
    _, train, heldout = build.open_data_set(cfg)
    real = small.first_images(train, comparison.MOST_IMAGES)
    originals = small.first_images(heldout, config.num_images)
    labels = heldout.labels[: len(originals)]
    seen = model.encode(real, seed=cfg.seed + 2)
    seen_norm = np.linalg.norm(seen, axis=-1).mean(axis=0, dtype=np.float64)
    sampler = build.build_sampler(cfg)._replace(guidance_scale=config.common_guidance)
    clean = model.encode(originals, seed=cfg.seed + 3)
    unit = nearest(clean, seen).mean(axis=0)
    lines = []
    for word, severity, images in _originals(config, originals, cfg.seed):
        tokens = model.encode(images, seed=cfg.seed + 3)
        for share in config.prefixes:
            kept = inputs.kept(share, model.vae.grid)
            drawn_images, drawn = on_mesh.draw_images(
                run,
                sampler,
                labels,
                seed=cfg.seed,
                prefix=Prefix(tokens, kept),
                batch_size=cfg.sampling.batch_size,
                mesh=mesh,
            )
            norms = np.linalg.norm(drawn.raw, axis=-1) / seen_norm
            is_drawn = ~inputs.kept_pixels(kept, tuple(cfg.vae.grid), model.image_shape)
            line = {
                'part': 'shifted',
                'corruption': word,
                'severity': severity,
                'kept': kept,
                'distance': (nearest(np.asarray(drawn.z), seen).mean(axis=0) / unit).tolist(),
                'raw_norm_mean': norms.mean(axis=0).tolist(),
                'raw_norm_std': norms.std(axis=0).tolist(),
                'collapsed': comparison.collapsed_share(
                    drawn_images[:, is_drawn], real[:, is_drawn]
                ),
            }
            lines.append(line)
    return lines


def _beyond(name: str, line: dict[str, Any], clean: dict[str, Any]) -> np.ndarray:
    """What the drawn tokens of a line have beyond those of the line of clean prefixes."""
    return np.subtract(line[name], clean[name])[line['kept'] :]


def beyond_clean(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the drawn tokens behind corrupted prefixes have beyond those behind clean ones.

    Args:
      lines: what `measure` returned.

    Returns:
      For each line of a corruption: corruption, severity, kept, and
        distance: the difference of the distances, a mean over the drawn tokens.
        slope: what a straight line through these differences gains from token to token.
        norm: the absolute difference of the norms, a mean over the drawn tokens.
        collapsed: the difference of the shares.
    """
    clean = {line['kept']: line for line in lines if line['corruption'] == CLEAN}
    found = []
    for line in lines:
        if line['corruption'] == CLEAN:
            continue
        kept = line['kept']
        without = clean[kept]
        distance = _beyond('distance', line, without)
        norm = _beyond('raw_norm_mean', line, without)
        found.append(
            {
                'corruption': line['corruption'],
                'severity': line['severity'],
                'kept': kept,
                'distance': float(distance.mean()),
                'slope': float(np.polyfit(np.arange(len(distance)), distance, 1)[0]),
                'norm': float(np.abs(norm).mean()),
                'collapsed': line['collapsed'] - without['collapsed'],
            }
        )
    return found


def summarize(config: ConfigDict, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The scores of one row and seed.

    Args:
      config: the experiment's config, which is not asked.
      lines: what `measure` returned.

    Returns:
      The means over corruptions, severities and prefixes of the numbers of `beyond_clean`, as
      shifted_distance, shifted_slope, shifted_norm and shifted_collapsed; and clean_distance, the
      mean distance of the tokens drawn behind clean prefixes.
    """
    del config
    found = beyond_clean(lines)
    scores = {
        f'shifted_{name}': float(np.mean([line[name] for line in found]))
        for name in ('distance', 'slope', 'norm', 'collapsed')
    }
    clean = [
        np.mean(line['distance'][line['kept'] :]) for line in lines if line['corruption'] == CLEAN
    ]
    return scores | {'clean_distance': float(np.mean(clean))}


def _plots(config: ConfigDict, found: Mapping[str, Any], directory: str) -> dict[str, str]:
    """Plots distances and norms by position, of the shortest prefix and the largest severities."""
    del config
    rows = list(found['rows'])
    size = (4.2 * len(rows), 6.4)
    figure, axes = subplots(2, len(rows), size, sharey='row')
    for column, row in zip(axes.T, rows, strict=True):
        lines = report.of_part(found['measured'], row, 'shifted')
        kept = min(line['kept'] for line in lines)
        for word in dict.fromkeys(line['corruption'] for line in lines):
            most = max(line['severity'] for line in lines if line['corruption'] == word)
            mine = [
                line
                for line in lines
                if (line['corruption'], line['severity'], line['kept']) == (word, most, kept)
            ]
            distance = report.mean(mine, 'distance')
            column[0].plot(distance, label=word)
            x = np.arange(kept, len(distance))
            column[1].plot(x, report.mean(mine, 'raw_norm_mean')[kept:])
        for axis in column:
            axis.axvspan(-0.5, kept - 0.5, color='0.9')
            axis.grid(alpha=0.3)
        column[0].set_title(row)
        column[1].set_xlabel('position of the token (grey: prefix)')
    axes[0, 0].set_ylabel('distance to training tokens')
    axes[1, 0].set_ylabel('norm before projection')
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, f'{directory}/shifted.png')
    return {'shifted.png': 'distances and norms of tokens behind corrupted prefixes'}


def _tables(measured: report.MeasuredParts) -> dict[str, report.Table]:
    """The table of corruptions, as `beyond_clean` has them."""
    heads = ['row', 'corruption', 'kept tokens', 'distance', 'per token', 'norm', 'collapsed']
    values: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for unit in measured:
        for line in beyond_clean(unit['lines']):
            corruption = f'{line["corruption"]} {line["severity"]}'
            values.setdefault((unit['row'], corruption, str(line['kept'])), []).append(line)
    cells = []
    for names, lines in values.items():
        shown = [
            str(statistics.interval([line[name] for line in lines]))
            for name in ('distance', 'slope', 'norm', 'collapsed')
        ]
        cells.append([*names, *shown])
    return {'Each corruption, beyond clean prefixes': (heads, cells)}


KIND = report.Kind(
    measured_by=('num_images', 'common_guidance', 'shifts', 'prefixes'),
    measure=measure,
    summarize=summarize,
    plots=_plots,
    tables=_tables,
)
