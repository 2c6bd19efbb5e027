"""How errors of one token go on to later tokens (claim 3; docs/method.md, "Propagation of errors").

A token of a drawn sequence is disturbed by a share ε of its norm, along itself (radially) or across
(tangentially). The sampler goes on behind it with the same noise. Derivatives by forward mode say
what the change is to first order.

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build
from sphere_ar_jax.evaluation.pictures import legend_below, save_figure, subplots
from sphere_ar_jax.experiments import report, runs, statistics
from sphere_ar_jax.experiments.kinds import comparison
from sphere_ar_jax.models.ar import unstacked
from sphere_ar_jax.models.vae import image_keys
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.sampling.model import sphere_radius
from sphere_ar_jax.sampling.tokens import Drawn, Prefix, draw
from sphere_ar_jax.training.run import Run

DIRECTIONS = ('radial', 'tangential')


def _unit(x: np.ndarray) -> np.ndarray:
    """Vectors (…, d) divided by their norms."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def directions(tokens: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """A radial and a random tangential unit vector at each token.

    Args:
      tokens: (B, d).
      seed: seed of the tangential ones.

    Returns:
      (B, d) by the words of `DIRECTIONS`.
    """
    radial = _unit(tokens)
    other = np.random.default_rng(seed).standard_normal(tokens.shape)
    across = other - np.sum(other * radial, axis=-1, keepdims=True) * radial
    return {'radial': radial, 'tangential': _unit(across).astype(tokens.dtype)}


def split(jacobian: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """Splits Jacobians of one token by another into radial and tangential parts.

    With the unit vectors r of the token before, s of the token after, and the projections
    P = I − r rᵀ, Q = I − s sᵀ onto their tangent spaces, these are the spectral norms of the four
    blocks: |sᵀ J r|, ‖Q J r‖, ‖sᵀ J P‖ and ‖Q J P‖.

    Args:
      jacobian: J (B, d, d), output before input.
      before: the token that is varied, (B, d).
      after: the token that follows, (B, d).

    Returns:
      (B,) by the names radial_to_radial, radial_to_tangential, tangential_to_radial and
      tangential_to_tangential.
    """
    r = _unit(before)
    s = _unit(after)
    along = np.einsum('bij,bj->bi', jacobian, r)
    onto = np.einsum('bi,bij->bj', s, jacobian)
    corner = np.einsum('bi,bi->b', s, along)
    across = along - corner[:, None] * s
    from_across = onto - corner[:, None] * r
    rest = jacobian - along[:, :, None] * r[:, None, :] - s[:, :, None] * from_across[:, None, :]
    return {
        'radial_to_radial': np.abs(corner),
        'radial_to_tangential': np.linalg.norm(across, axis=-1),
        'tangential_to_radial': np.linalg.norm(from_across, axis=-1),
        'tangential_to_tangential': np.linalg.norm(rest, ord=2, axis=(1, 2)),
    }


class Sequences:
    """Sequences that a run draws, with others that begin by given tokens.

    Attributes:
      z: the tokens that the run draws without interference, (B, L, d).
      raw: the same before projection.
    """

    def __init__(self, run: Run, labels: np.ndarray, scale: float) -> None:
        """Draws the sequences.

        Args:
          run: a trained run, whose sampler has constant guidance.
          labels: (B,).
          scale: the guidance scale.
        """
        sampler = build.build_sampler(run.config)
        ar, params = unstacked(run.ar, run.ar_params)
        keys = image_keys(on_mesh.sampling_key(run.config.seed), jnp.arange(len(labels)))

        def continued(tokens: jax.Array, count: jax.Array) -> Drawn:
            prefix = Prefix(tokens, count)
            arguments = (ar, params, labels, keys, sampler.options, scale, sampler.temperature)
            return draw(*arguments, project=run.vae.project, prefix=prefix)

        def jacobians(tokens: jax.Array, position: jax.Array) -> Drawn:
            def varied(token: jax.Array) -> Drawn:
                return continued(tokens.at[:, position].set(token), position + 1)

            def along(axis: jax.Array) -> Drawn:
                tangent = jnp.broadcast_to(axis, tokens[:, position].shape)
                _, change = jax.jvp(varied, (tokens[:, position],), (tangent,))
                return change

            return jax.vmap(along, out_axes=-1)(jnp.eye(tokens.shape[-1]))

        self._continued = jax.jit(continued)
        self._jacobians = jax.jit(jacobians)
        nothing = jnp.zeros((len(labels), ar.num_tokens, ar.latent_dim))
        drawn = self._continued(nothing, 0)
        self.z = np.asarray(drawn.z)
        self.raw = np.asarray(drawn.raw)

    def after(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """The tokens (B, L, d) that follow the first position + 1 of the given ones (B, L, d)."""
        return np.asarray(self._continued(tokens, position + 1).z)

    def jacobians(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The derivatives of all tokens by the token at a position.

        Returns:
          (those of z, those of raw), each (B, L, d, d), output before input.
        """
        found = self._jacobians(self.z, position)
        return np.asarray(found.z), np.asarray(found.raw)


def _root_mean_square(changes: np.ndarray) -> list[float]:
    """The root over images of the mean squared norms of changes (B, L, d), L numbers."""
    return np.sqrt(np.mean(np.sum(changes**2, axis=-1), axis=0)).tolist()


def follow(
    sequences: Sequences, position: int, disturbances: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """Disturbs the tokens at a position, and measures and predicts the changes behind it.

    All sizes are in units of the root mean square norm of the disturbed tokens.

    Args:
      sequences: what was drawn.
      position: of the disturbed token, below L − 1.
      disturbances: ε, shares of a token's norm.
      seed: seed of the tangential directions.

    Returns:
      A line of the part 'jacobian': the means over images of the four parts of `split`, of the
      derivative of the next token before its projection. Then a line of the part 'disturbance' for
      each direction and ε, with L numbers in each of `change`, as measured, and `predicted`, to
      first order.
    """
    z = sequences.z
    of_z, of_raw = sequences.jacobians(position)
    behind = position + 1
    parts = split(of_raw[:, behind], z[:, position], sequences.raw[:, behind])
    means = {name: float(np.mean(values)) for name, values in parts.items()}
    lines: list[dict[str, Any]] = [{'part': 'jacobian', 'position': position} | means]
    norms = np.linalg.norm(z[:, position], axis=-1, keepdims=True)
    unit = float(np.sqrt(np.mean(norms**2)))
    for direction, vectors in directions(z[:, position], seed).items():
        first_order = np.einsum('blij,bj->bli', of_z, norms * vectors) / unit
        for size in disturbances:
            tokens = z.copy()
            tokens[:, position] += size * norms * vectors
            change = (sequences.after(tokens, position) - z) / unit
            line = {
                'part': 'disturbance',
                'position': position,
                'direction': direction,
                'size': size,
                'change': _root_mean_square(change),
                'predicted': _root_mean_square(size * first_order),
            }
            lines.append(line)
    return lines


def _modes(run: Run) -> dict[str, Run]:
    """The run with its projection after each token, never, and only before decoding.

    A run whose tokens are not projected at all has one mode. One whose decoder projects by itself
    has no 'never', since its decoder knows no other latents.
    """
    if sphere_radius(run.vae) is None:
        return {'never': run}
    # Standardised by mean 0 and deviation 1, tokens are latents that nothing projects.
    free = run.vae.clone(token_space='standardised')
    params = free.with_statistics(run.vae_params)
    decoded = free.clone(decoder_input='projected')
    modes = {'after each token': run}
    if run.vae.decoder_input != 'projected':
        modes['never'] = run._replace(vae=free, vae_params=params)
    modes['before decoding'] = run._replace(vae=decoded, vae_params=params)
    return modes


def _norms(config: ConfigDict, run: Run, cache: str, mesh: Mesh) -> list[dict[str, Any]]:
    """Norms before projection by position, and scores, for each of `_modes`.

    The norms are those of the tokens that the AR model reads. Where these are standardised they
    differ from those of the latents, which `comparison` takes.
    """
    cfg = run.config
    labels = np.arange(config.num_images) % build.open_data_set(cfg).train.num_classes
    judge = runs.judge(cfg, cache)
    sampler = build.build_sampler(cfg)._replace(guidance_scale=config.common_guidance)
    lines = []
    for mode, changed in _modes(run).items():
        images, drawn = on_mesh.draw_images(
            changed, sampler, labels, seed=cfg.seed, batch_size=cfg.sampling.batch_size, mesh=mesh
        )
        norms = np.linalg.norm(drawn.raw, axis=-1)
        scores = comparison.sample_scores(judge, images, labels)
        line = {
            'part': 'norms',
            'mode': mode,
            'raw_norm_mean': norms.mean(axis=0).tolist(),
            'raw_norm_std': norms.std(axis=0).tolist(),
            'accuracy': scores['accuracy'],
            'frechet': scores['frechet'],
        }
        lines.append(line)
    return lines


def measure(config: ConfigDict, cfg: ConfigDict, cache: str, mesh: Mesh) -> list[Any]:
    """Measures the norms and the propagation of errors of one row and seed.

    Args:
      config: the experiment's config.
      cfg: the config of its run.
      cache: directory of the trained models.
      mesh: the devices that draw the scored images.

    Returns:
      The lines of the parts 'norms', 'jacobian' and 'disturbance', each a dictionary.
    """
    run = runs.load(cfg, cache, mesh)
    lines = _norms(config, run, cache, mesh)
    labels = np.arange(config.followed_images) % build.open_data_set(cfg).train.num_classes
    sequences = Sequences(run, labels, config.common_guidance)
    for share in config.positions:
        position = int(share * run.ar.num_tokens)
        lines += follow(sequences, position, config.disturbances, cfg.seed)
    return lines


def summarize(config: ConfigDict, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The growth of small errors, for one row and seed.

    It is the root mean square change of the tokens behind the disturbed one, divided by the size of
    the smallest disturbance, and averaged over the positions.

    Args:
      config: the experiment's config, which is not asked.
      lines: what `measure` returned.

    Returns:
      radial_growth, tangential_growth, the same as predicted to first order, and the means of the
      four parts of the Jacobian.
    """
    del config
    disturbed = [line for line in lines if line['part'] == 'disturbance']
    least = min(line['size'] for line in disturbed)
    found: dict[str, float] = {}

    def growth(direction: str, name: str) -> float:
        return float(
            np.mean(
                [
                    _behind(line[name], line['position']) / least
                    for line in disturbed
                    if line['size'] == least and line['direction'] == direction
                ]
            )
        )

    for direction in DIRECTIONS:
        found[f'{direction}_growth'] = growth(direction, 'change')
        found[f'{direction}_growth_predicted'] = growth(direction, 'predicted')
    jacobians = [line for line in lines if line['part'] == 'jacobian']
    for name in jacobians[0]:
        if '_to_' in name:
            found[name] = float(np.mean([line[name] for line in jacobians]))
    return found


def _behind(changes: Sequence[float], position: int) -> float:
    """The root mean square of the numbers behind a position."""
    behind = np.asarray(changes[position + 1 :])
    return float(np.sqrt(np.mean(behind**2)))


def _plot_norms(path: str, rows: Sequence[str], measured: report.MeasuredParts) -> None:
    """Plots the norms of tokens before projection against their position."""
    figure, axes = subplots(1, len(rows), (4.2 * len(rows), 3.6))
    for axis, row in zip(axes[0], rows, strict=True):
        lines = report.of_part(measured, row, 'norms')
        modes = dict.fromkeys(line['mode'] for line in lines)
        for mode, dashes in zip(modes, ('-', '--', ':'), strict=False):
            mine = [line for line in lines if line['mode'] == mode]
            mean = report.mean(mine, 'raw_norm_mean')
            spread = report.mean(mine, 'raw_norm_std')
            (line,) = axis.plot(mean, dashes, label=f'projected {mode}')
            x = np.arange(len(mean))
            axis.fill_between(x, mean - spread, mean + spread, alpha=0.15, color=line.get_color())
        axis.set_title(row)
        axis.set_xlabel('position of the token')
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0, 0].set_ylabel('norm before projection, mean ± spread')
    figure.tight_layout()
    save_figure(figure, path)


def _plot_changes(path: str, rows: Sequence[str], measured: report.MeasuredParts) -> None:
    """Plots changes of later tokens against their distance from the disturbed one."""
    figure, axes = subplots(1, len(rows), (4.2 * len(rows), 3.6))
    for axis, row in zip(axes[0], rows, strict=True):
        lines = report.of_part(measured, row, 'disturbance')
        position = min(line['position'] for line in lines)
        for i, direction in enumerate(('radial', 'tangential')):
            for size in sorted({line['size'] for line in lines}):
                mine = [
                    line
                    for line in lines
                    if line['direction'] == direction
                    and line['size'] == size
                    and line['position'] == position
                ]
                change = report.mean(mine, 'change')[position + 1 :]
                predicted = report.mean(mine, 'predicted')[position + 1 :]
                x = np.arange(1, len(change) + 1)
                label = f'{direction}, ε = {size:g}'
                alpha = min(1, 0.3 + size * 6)
                axis.plot(x, change, color=f'C{i}', alpha=alpha, label=label)
                axis.plot(x, predicted, ':', color=f'C{i}', alpha=alpha)
        axis.set_yscale('log')
        axis.set_title(row)
        axis.set_xlabel('tokens after the disturbed one')
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel('change / norm (dotted: to first order)')
    legend_below(figure, axes[0, 0], 6)
    figure.tight_layout()
    save_figure(figure, path)


def _plots(config: ConfigDict, found: Mapping[str, Any], directory: str) -> dict[str, str]:
    """Writes both plots."""
    del config
    rows = list(found['rows'])
    _plot_norms(f'{directory}/norms.png', rows, found['measured'])
    _plot_changes(f'{directory}/changes.png', rows, found['measured'])
    return {
        'norms.png': 'norms of tokens before projection',
        'changes.png': 'changes of later tokens after a disturbance of one',
    }


def _tables(measured: report.MeasuredParts) -> dict[str, report.Table]:
    """The table of the ways in which tokens are projected."""
    heads = ['row', 'projected', 'accuracy', 'Fréchet', 'norm of token 0', 'of the last one']
    cells = []
    for row in dict.fromkeys(unit['row'] for unit in measured):
        lines = report.of_part(measured, row, 'norms')
        for mode in dict.fromkeys(line['mode'] for line in lines):
            mine = [line for line in lines if line['mode'] == mode]
            numbers = [
                [line['accuracy'] for line in mine],
                [line['frechet'] for line in mine],
                [line['raw_norm_mean'][0] for line in mine],
                [line['raw_norm_mean'][-1] for line in mine],
            ]
            shown = [str(statistics.interval(values)) for values in numbers]
            cells.append([row, mode, *shown])
    return {'Scores with and without projection': (heads, cells)}


KIND = report.Kind(
    measured_by=(
        'num_images',
        'common_guidance',
        'disturbances',
        'positions',
        'followed_images',
    ),
    measure=measure,
    summarize=summarize,
    plots=_plots,
    tables=_tables,
)
