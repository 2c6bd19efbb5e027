"""Small data sets whose images are enlarged for the models."""

import chex
import numpy as np

from sphere_ar_jax.config import build, checks
from sphere_ar_jax.data import small
from tests import tiny_config


def test_enlarged_digits_are_scored_on_the_pixels_of_the_scans():
    cfg = tiny_config.get_config()
    cfg.data.enlarge = 3
    cfg.vae.grid = (12, 12)
    checks.check(cfg)
    plain = small.open_data_set('digits', None, cfg.seed, cfg.data.holdout)
    assert small.enlarged(plain, 1) is plain
    data = build.open_data_set(cfg)
    assert (data.kind, len(data.train), len(data.heldout)) == ('digits', 1438, 359)
    assert data.train.image_shape == build.build_vae(cfg).image_shape == (48, 48, 1)
    for part, of in ((data.train, plain.train), (data.heldout, plain.heldout)):
        record = part[7]
        chex.assert_shape(record['image'], (48, 48, 1))
        assert record['image'].dtype == np.float32
        assert record['label'] == of.labels[7]
        np.testing.assert_array_equal(record['image'], np.kron(of[7]['image'], np.ones((3, 3, 1))))
        images = small.first_images(part, 4)
        np.testing.assert_allclose(part.to_pixels(images), of.pixels[:4], atol=1e-6)
        np.testing.assert_array_equal(part.pixels, of.pixels)
    # Pixels beyond the range count as its ends, before they are averaged.
    images = np.full((1, 48, 48, 1), -1.0)
    images[:, ::2] = 3
    np.testing.assert_allclose(data.train.to_pixels(images), 0.5)
