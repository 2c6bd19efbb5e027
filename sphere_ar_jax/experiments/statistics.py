"""Means, intervals and verdicts over seeds.

An experiment repeats each row with several seeds. A difference of two rows is taken seed by seed,
since both have the same data, order and noise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The share of repetitions of the whole experiment whose interval holds the true mean.
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over seeds with its confidence interval.

    Attributes:
      mean: the mean.
      low: lower end, −∞ for one seed.
      high: upper end, ∞ for one seed.
      seeds: number of the seeds.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        """'0.123 [0.100, 0.146]', and the mean alone for one seed."""
        if self.seeds < 2:
            return f'{self.mean:.3g}'
        return f'{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]'


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of independent values and its t-interval, mean ± t·std/√n.

    Args:
      values: n numbers, one for each seed.
      level: the interval's coverage for normal values.

    Raises:
      ValueError: there are no values.
    """
    n = len(values)
    if not n:
        raise ValueError('there are no values to take a mean of')
    # SciPy's statistics take a second to import.
    from scipy import stats

    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return Interval(mean, mean - half, mean + half, n)


def paired(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Interval:
    """The interval of first − second, seed by seed.

    Raises:
      ValueError: the two have not the same number of values.
    """
    if len(first) != len(second):
        raise ValueError(f'{len(first)} values cannot be paired with {len(second)}')
    return interval(np.subtract(first, second).tolist(), level)


def verdict(advantage: Interval) -> str:
    """What an interval says of a claim that the difference is above 0.

    Args:
      advantage: the interval of a difference, positive on the claimed side.

    Returns:
      'one seed' where there is no interval, 'reproduced' where it lies above 0, 'contradicted'
      where it lies below, else 'undecided'.
    """
    if advantage.seeds < 2:
        return 'one seed'
    if advantage.low > 0:
        return 'reproduced'
    if advantage.high < 0:
        return 'contradicted'
    return 'undecided'
