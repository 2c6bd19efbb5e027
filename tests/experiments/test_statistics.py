"""Intervals and verdicts over seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from sphere_ar_jax.experiments import statistics
from sphere_ar_jax.experiments.statistics import Interval


@pytest.mark.parametrize('n', [2, 3, 5, 20])
@pytest.mark.parametrize('level', [0.8, 0.95])
def test_intervals_are_those_of_scipy(n, level):
    values = np.random.default_rng(n).normal(3, 2, n)
    found = statistics.interval(values.tolist(), level)
    low, high = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(found[:3], [values.mean(), low, high], rtol=1e-12)
    assert found.seeds == n


@pytest.mark.parametrize('n', [3, 5])
def test_intervals_hold_the_mean_as_often_as_they_say(n):
    """4,000 experiments with normal scores: 95% ± four standard errors."""
    rng = np.random.default_rng(0)
    repetitions = 4000
    held = 0
    for values in rng.normal(0.7, 0.3, (repetitions, n)):
        found = statistics.interval(values.tolist())
        held += found.low <= 0.7 <= found.high
    error = math.sqrt(0.95 * 0.05 / repetitions)
    assert abs(held / repetitions - 0.95) < 4 * error


def test_pairing_removes_what_seeds_share():
    """Two rows with a common part of spread 1 and a difference of 0.1 ± 0.01."""
    rng = np.random.default_rng(1)
    common = rng.normal(size=5)
    first = common + 0.1 + rng.normal(0, 0.01, 5)
    difference = statistics.paired(first.tolist(), common.tolist())
    np.testing.assert_allclose(difference.mean, np.mean(first - common), rtol=1e-12)
    assert statistics.verdict(difference) == 'reproduced'
    apart = statistics.interval(first.tolist())
    assert apart.high - apart.low > 20 * (difference.high - difference.low)


@pytest.mark.parametrize(
    ('low', 'high', 'said'),
    [
        (0.1, 0.3, 'reproduced'),
        (-0.3, -0.1, 'contradicted'),
        (-0.1, 0.3, 'undecided'),
        (0.0, 0.3, 'undecided'),
        (-math.inf, math.inf, 'undecided'),
    ],
)
def test_verdicts(low, high, said):
    assert statistics.verdict(Interval((low + high) / 2, low, high, 5)) == said


def test_one_seed_decides_nothing():
    found = statistics.interval([0.5])
    assert found == Interval(0.5, -math.inf, math.inf, 1)
    assert str(found) == '0.5'
    assert statistics.verdict(found) == 'one seed'


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match='no values'):
        statistics.interval([])
    with pytest.raises(ValueError, match='2 values cannot be paired with 1'):
        statistics.paired([1.0, 2.0], [1.0])
