"""What every token's solver does: the options of a sampler and the tables they stand for.

Dimensions:
  L  tokens     E  evaluations of the flow head for a token, at most     U  different solver tables
  among the tokens
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from sphere_ar_jax.flow import solvers
from sphere_ar_jax.flow.guidance import guidance_scales

ANNEALING = ('linear', 'cosine', 'two_stage')


def annealed_steps(first, last, num_tokens, shape):
    """Solver steps of every token, from `first` (token 0) down or up to `last` (token L − 1), (L,)
    int.

    'linear' in k; 'cosine', last + (first − last)·(1 + cos πu)/2 with u = k/(L − 1); 'two_stage',
    `first` for the first half of the tokens and `last` for the others. Source: DiSA (arXiv
    2505.20297), where these anneal MAR's steps.
    """
    u = np.arange(num_tokens) / max(num_tokens - 1, 1)
    weight = {'linear': 1 - u, 'cosine': (1 + np.cos(np.pi * u)) / 2, 'two_stage': u < 0.5}[shape]
    return np.rint(last + (first - last) * weight).astype(int)


class Plan(NamedTuple):
    """What every token's solver does: tables (U, E, …), count (U,) of their evaluations, which (L,)
    of them it is.
    """

    tables: solvers.Table
    count: Any
    which: Any

    @property
    def evaluations(self):
        """Mean number of evaluations per token."""
        return float(self.count[self.which].mean())


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled into a sampler. The defaults are the published sampler. An option without
    use is an error.

    Attributes:
      solver: one of `solvers.SOLVERS`. num_steps: its steps (Heun makes two evaluations in each).
      last_step, noise_scale: of 'euler_maruyama' alone (0.04 and 1 if None): see
        `solvers.euler_maruyama`.
      shift: warp of the time grid, see `solvers.grid` (1 if None: equal steps).
      final_steps, annealing: steps of the last token, and how they go there from num_steps at the
        first; see `annealed_steps`. None: as many for every token.
      guidance: schedule of the guidance scale over tokens, 'linear' or 'constant'; None samples
        without null rows.
      guidance_interval: (low, high): guidance only at evaluations with low ≤ t < high (≤ 1 if high
        is 1); elsewhere the null rows' head is not evaluated (arXiv 2404.07724). None: everywhere.
      first_token_apart: the published quirk, True if None. Where token 0's scale is exactly 1
        (always so in the linear schedule) guidance is off: conditional and null rows then draw
        their own noise, and feed their own, different, first tokens back. False: both continue from
        the conditional token. Only with the linear schedule.
    """

    solver: str = 'euler_maruyama'
    num_steps: int = 100
    last_step: float | None = None
    guidance: str | None = 'linear'
    first_token_apart: bool | None = None
    noise_scale: float | None = None
    shift: float | None = None
    final_steps: int | None = None
    annealing: str | None = None
    guidance_interval: tuple | None = None

    def __post_init__(self):
        if (self.final_steps is None) != (self.annealing is None):
            raise ValueError('final_steps and annealing are given together or not at all')
        if self.annealing not in (None, *ANNEALING):
            raise ValueError(f'annealing {self.annealing!r} is not one of {", ".join(ANNEALING)}')
        for steps in {
            self.num_steps,
            self.num_steps if self.final_steps is None else self.final_steps,
        }:
            self._table(steps)  # refuses what the solver cannot do
        if self.guidance is not None:
            guidance_scales(1.0, 1, self.guidance)
        if self.guidance != 'linear' and self.first_token_apart is not None:
            raise ValueError('first_token_apart is only used with linear guidance: leave it out')
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if self.guidance is None:
                raise ValueError('guidance_interval is only used with guidance: leave it out')
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f'guidance_interval is {self.guidance_interval}, but must be 0 ≤ low < high ≤ 1'
                )

    def _table(self, steps):
        arguments = {'noise_scale': self.noise_scale, 'last_step': self.last_step}
        given = {name: value for name, value in arguments.items() if value is not None}
        return solvers.table(self.solver, steps, 1.0 if self.shift is None else self.shift, **given)

    @functools.cache  # noqa: B019, a handful of frozen objects
    def plan(self, num_tokens):
        """The `Plan` of L tokens, in NumPy arrays."""
        last = self.num_steps if self.final_steps is None else self.final_steps
        steps = annealed_steps(self.num_steps, last, num_tokens, self.annealing or 'linear')
        different, which = np.unique(steps, return_inverse=True)
        return Plan(*solvers.pad([self._table(int(n)) for n in different]), which)

    def num_draws(self, num_tokens):
        """m, the standard normal draws per token."""
        plan = self.plan(num_tokens)
        if not solvers.is_stochastic(plan.tables):
            return 1
        return 2 + int(np.nonzero(plan.tables.weights[..., 3])[1].max())
