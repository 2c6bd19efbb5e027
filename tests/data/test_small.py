"""Variants of the small data sets."""

import chex
import numpy as np
from scipy import stats

from sphere_ar_jax.data import small
from sphere_ar_jax.data.batches import batches


def _digits(**options):
    return small.open_data_set('digits', None, 3, 0.2, **options)


def test_each_image_has_a_brightness_of_its_own():
    """Factors are uniform, of the seed and the index alone, and scale what lies above black."""
    plain = _digits()
    bright = _digits(brightness=(0.2, 1.0))
    factors = bright.train.factors
    assert stats.kstest(factors, stats.uniform(0.2, 0.8).cdf).pvalue > 0.05
    fewer = small.Brightened(plain.heldout, (0.2, 1.0), 3, 0)
    np.testing.assert_array_equal(fewer.factors, factors[: len(plain.heldout)])
    first = slice(len(plain.heldout))
    correlation = stats.pearsonr(bright.heldout.factors, factors[first])
    assert correlation.pvalue > 0.05
    for before, after in ((plain.train, bright.train), (plain.heldout, bright.heldout)):
        expected = before.pixels * after.factors[:, None, None]
        np.testing.assert_array_equal(after.pixels, expected)
        record = after[5]
        chex.assert_type(record['image'], np.float32)
        shown = after.to_pixels(record['image'][None])[0]
        np.testing.assert_allclose(shown, expected[5], atol=1e-6)
        assert record['label'] == before[5]['label']
    assert not np.array_equal(_digits(brightness=(0.0, 1.0)).train.factors, factors)


def test_brightness_does_not_depend_on_batches_and_classes():
    bright = _digits(brightness=(0.2, 1.0))
    some = _digits(brightness=(0.2, 1.0), classes=(3, 8))
    numbers = np.flatnonzero(np.isin(bright.train.labels, (3, 8)))
    np.testing.assert_array_equal(some.train.pixels, bright.train.pixels[numbers])
    drawn = []
    for size in (8, 24):
        with batches(bright.train, batch_size=size, seed=1) as reading:
            parts = [next(reading)['image'] for _ in range(48 // size)]
        drawn.append(np.concatenate(parts))
    np.testing.assert_array_equal(*drawn)
