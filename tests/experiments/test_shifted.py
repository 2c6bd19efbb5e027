"""Distances to training tokens, and what corrupted prefixes change."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.spatial.distance import cdist

from sphere_ar_jax.config import build, experiments
from sphere_ar_jax.data import pixels, small
from sphere_ar_jax.experiments import runs
from sphere_ar_jax.experiments.kinds import comparison, shifted
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.sampling.model import Model
from sphere_ar_jax.sampling.tokens import Drawn
from tests import tiny_config


def test_nearest_tokens_are_those_of_all_distances():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(7, 3, 4)).astype(np.float32)
    seen = rng.normal(size=(50, 3, 4)).astype(np.float32)
    found = shifted.nearest(tokens, seen)
    expected = [cdist(tokens[:, k], seen[:, k]).min(axis=1) for k in range(3)]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-6)


def test_lines_are_of_drawn_tokens_and_pixels(monkeypatch):
    """A tiny tokenizer, and a sampler that goes on with zeros: clean and inverted prefixes of four.

    Half of the samples have no contrast behind the prefix, and norms before projection are known.
    """
    run = tiny_config.random_run(guidance='constant', guidance_scale=1.5, solver='euler')
    monkeypatch.setattr(runs, 'load', lambda *arguments: run)
    monkeypatch.setattr(comparison, 'MOST_IMAGES', 64)
    norms = np.linspace(1, 2, 16, dtype=np.float32)
    prefixes = []

    def draw_images(models, sampler, labels, *, seed, prefix, batch_size, mesh):
        assert models is run
        assert sampler.guidance_scale == 2.5
        prefixes.append(prefix.tokens)
        z = prefix.tokens.copy()
        z[:, prefix.length :] = 0
        raw = np.zeros_like(z)
        raw[..., 0] = norms
        images = originals.copy()
        images[:8, 4:] = -1
        return images, Drawn(z, raw)

    monkeypatch.setattr(on_mesh, 'draw_images', draw_images)
    config = experiments.default(run.config)
    config.update(kind='shifted', num_images=16, shifts=('inverted:5',), prefixes=(0.25,))
    config.common_guidance = 2.5
    mesh = sharding.make_mesh()
    _, train, heldout = build.open_data_set(run.config)
    originals = small.first_images(heldout, 16)
    clean, inverted = shifted.measure(config, run.config, '', mesh)
    assert (clean['corruption'], clean['severity'], clean['kept']) == ('clean', 0, 4)
    assert (inverted['corruption'], inverted['severity'], inverted['kept']) == ('inverted', 5, 4)

    model = Model(run, mesh=mesh)
    turned = pixels.to_float(255 - np.asarray(pixels.to_uint8(originals)))
    for tokens, images in zip(prefixes, (originals, turned), strict=True):
        np.testing.assert_allclose(tokens, model.encode(images, seed=run.config.seed + 3))
    seen = model.encode(small.first_images(train, 64), seed=run.config.seed + 2)
    # The tokens lie on a sphere of radius √8, so that all of them are that far from 0.
    unit = shifted.nearest(prefixes[0], seen).mean(axis=0)
    own = shifted.nearest(prefixes[1], seen).mean(axis=0)
    assert not np.allclose(own, unit, rtol=1e-3)
    expected = np.where(np.arange(16) < 4, own, 8**0.5) / unit
    np.testing.assert_allclose(inverted['distance'], expected, rtol=1e-5)
    np.testing.assert_allclose(clean['distance'][:4], 1, rtol=1e-5)
    np.testing.assert_allclose(clean['distance'][4:], inverted['distance'][4:], rtol=1e-5)
    for line in (clean, inverted):
        np.testing.assert_allclose(line['raw_norm_mean'], norms / 8**0.5, rtol=1e-5)
        np.testing.assert_allclose(line['raw_norm_std'], 0, atol=1e-6)
        assert line['collapsed'] == 0.5


def _line(corruption, kept, distance, norm, collapsed):
    return {
        'part': 'shifted',
        'corruption': corruption,
        'severity': 0 if corruption == 'clean' else 3,
        'kept': kept,
        'distance': distance,
        'raw_norm_mean': norm,
        'raw_norm_std': [0.1] * 4,
        'collapsed': collapsed,
    }


def test_the_summary_is_what_corruption_adds():
    """Only drawn tokens count, each prefix against the clean one of its length."""
    lines = [
        _line('clean', 1, [1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], 0.1),
        _line('clean', 2, [1.0, 1.0, 1.5, 1.5], [1.0, 1.0, 1.0, 1.0], 0.0),
        _line('noisy', 1, [9.0, 1.5, 2.0, 3.5], [9.0, 0.8, 1.0, 1.2], 0.4),
        _line('noisy', 2, [9.0, 9.0, 2.5, 2.0], [9.0, 9.0, 1.1, 1.3], 0.1),
    ]
    first, second = shifted.beyond_clean(lines)
    assert (first['corruption'], first['severity'], first['kept']) == ('noisy', 3, 1)
    for found, expected in ((first, (1.0, 0.5, 0.4 / 3, 0.3)), (second, (0.75, -0.5, 0.2, 0.1))):
        names = ('distance', 'slope', 'norm', 'collapsed')
        np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-12)
    scores = shifted.summarize(ConfigDict(), lines)
    assert set(scores) - {'clean_distance'} <= set(experiments.SCORES)
    assert scores['shifted_distance'] == pytest.approx(0.875)
    assert scores['shifted_slope'] == pytest.approx(0.0)
    assert scores['clean_distance'] == pytest.approx((4 / 3 + 1.5) / 2)
