"""What `comparison` measures of one row and seed, by a sampler and a tokenizer of known values."""

import numpy as np
import pytest

from sphere_ar_jax.config import build, experiments
from sphere_ar_jax.data import small
from sphere_ar_jax.experiments import runs
from sphere_ar_jax.experiments.kinds import comparison
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.sampling import autoencoding, on_mesh
from sphere_ar_jax.sampling.tokens import Drawn
from tests import tiny_config

RADIUS = 8**0.5  # of the sphere that the tokens of the tiny tokenizer lie on


def test_measured_values_are_those_of_the_samples(monkeypatch):
    """Real images as samples; one token of every second image lies off the sphere."""
    run = tiny_config.random_run(guidance='constant', guidance_scale=1.5, solver='euler')
    monkeypatch.setattr(runs, 'load', lambda *arguments: run)
    monkeypatch.setattr(comparison, 'MOST_IMAGES', 512)
    _, train, heldout = build.open_data_set(run.config)
    by_class = [np.flatnonzero(train.labels == label)[:2] for label in range(10)]
    samples = small.first_images(train, len(train))[np.stack(by_class, axis=1).ravel()]

    def draw_images(models, sampler, labels, *, seed, batch_size, mesh):
        assert models is run
        np.testing.assert_array_equal(labels, np.arange(20) % 10)
        z = np.zeros((20, 16, 8), np.float32)
        z[..., 0] = RADIUS
        z[::2, 3, 0] *= 1.01
        return samples, Drawn(z, z * sampler.guidance_scale)

    def reconstruct(vae, params, images, *arguments):
        # Next to nothing is lost, which leaves the PSNR finite.
        return images + 1e-4, {'kl': np.float32(2.0)}

    monkeypatch.setattr(on_mesh, 'draw_images', draw_images)
    monkeypatch.setattr(autoencoding, 'reconstruct', reconstruct)
    config = experiments.default(run.config)
    config.update(num_images=20, guidance_scales=(1.5, 3.0), common_guidance=1.5)
    tokenizer, first, second = comparison.measure(config, run.config, '', sharding.make_mesh())
    assert tokenizer['guidance'] is None
    assert tokenizer['kl'] == 2.0
    assert tokenizer['norm_low'] == pytest.approx(RADIUS, rel=1e-5)
    assert tokenizer['norm_high'] == pytest.approx(RADIUS, rel=1e-5)
    np.testing.assert_allclose(tokenizer['real_norm_mean'], np.full(16, RADIUS), rtol=1e-5)
    # All held-out images are reconstructed, and hardly changed.
    assert len(heldout) < 512
    assert tokenizer['rfrechet'] == pytest.approx(0, abs=1e-4)
    assert tokenizer['psnr'] == pytest.approx(20 * np.log10(2 / 1e-4), abs=0.1)
    for line, scale in ((first, 1.5), (second, 3.0)):
        assert line['guidance'] == scale
        assert line['outside_norms'] == 0.5
        expected = np.full(16, RADIUS * scale)
        expected[3] *= 1.005
        np.testing.assert_allclose(line['raw_norm_mean'], expected, rtol=1e-5)
        # They are images that the classifier was trained on.
        assert line['accuracy'] == 1.0
        assert line['collapsed'] == 0.0
