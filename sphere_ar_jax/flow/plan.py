"""What every token's solver does: the options of a sampler, and the solver tables they stand for.

See `docs/method.md`, "Sampling".

Dimensions:
  L  tokens of an image
  E  evaluations of the flow head for a token, at most
  U  different solver tables among the tokens
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from sphere_ar_jax.flow import solvers
from sphere_ar_jax.flow.guidance import guidance_scales

ANNEALING = ('linear', 'cosine', 'two_stage')


def annealed_steps(first: int, last: int, num_tokens: int, shape: str) -> np.ndarray:
    """Solver steps of every token, from those of token 0 to those of token L − 1.

    The shape 'linear' is linear in k. The shape 'cosine' is last + (first − last)·(1 + cos πu)/2
    with u = k/(L − 1). The shape 'two_stage' is `first` for the first half of the tokens and `last`
    for the others. DiSA (arXiv 2505.20297) anneals MAR's steps in these ways.

    Args:
      first: steps of token 0.
      last: steps of token L − 1; they may be fewer or more.
      num_tokens: L.
      shape: one of `ANNEALING`.

    Returns:
      (L,) int.
    """
    u = np.arange(num_tokens) / max(num_tokens - 1, 1)
    weights = {
        'linear': 1 - u,
        'cosine': (1 + np.cos(np.pi * u)) / 2,
        'two_stage': u < 0.5,
    }
    return np.rint(last + (first - last) * weights[shape]).astype(int)


class Plan(NamedTuple):
    """What every token's solver does.

    Attributes:
      tables: the different solver tables; every array has a leading axis U.
      count: (U,) int, the number of evaluations of each table.
      which: (L,) int, the index of each token's table.
    """

    tables: solvers.Table
    count: np.ndarray  # type: ignore[assignment]  # It hides the method `tuple.count`.
    which: np.ndarray

    @property
    def evaluations(self) -> float:
        """Mean number of evaluations per token."""
        return float(self.count[self.which].mean())


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled into a sampler.

    The defaults are the published sampler. The constructor refuses an option that has no use.

    Attributes:
      solver: one of `solvers.SOLVERS`.
      num_steps: steps of the solver, at token 0 if they are annealed. Heun makes two evaluations in
        each step.
      last_step: width of the last step, see `solvers.euler_maruyama`; None stands for 0.04. No
        other solver has it.
      guidance: schedule of the guidance scale over the tokens, 'linear' or 'constant'; None samples
        without null rows.
      first_token_apart: whether guidance is off at token 0 where its scale is exactly 1, as it
        always is in the linear schedule. Conditional and null rows then draw different noise and
        go on from different first tokens. This is a quirk of the published sampler. False lets both
        go on from the conditional token. None stands for True. Only the linear schedule has this
        option. See `docs/method.md`, "First token".
      noise_scale: γ of `solvers.euler_maruyama`, or η of `solvers.mixing`; None stands for 1. No
        other solver has it.
      shift: warp of the time grid, see `solvers.grid`; None stands for 1, equal steps.
      final_steps: steps of the last token; None gives every token `num_steps`.
      annealing: how the steps go from `num_steps` to `final_steps`, see `annealed_steps`. The two
        are given together or not at all.
      guidance_interval: (low, high). Only evaluations at times low ≤ t < high (t ≤ 1 if high is 1)
        are guided. At the others the head does not evaluate null rows (arXiv 2404.07724). None
        guides all evaluations.

    Raises:
      ValueError: an option has no use, or a value is not possible.
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
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.final_steps is None) != (self.annealing is None):
            raise ValueError('final_steps and annealing are given together or not at all')
        if self.annealing not in (None, *ANNEALING):
            raise ValueError(f'annealing {self.annealing!r} is not one of {", ".join(ANNEALING)}')
        for steps in {self.num_steps, self._last_steps}:
            self._table(steps)  # Raises ValueError for what the solver cannot do.
        self._check_guidance()

    def _check_guidance(self) -> None:
        """Raises ValueError for an option of guidance that has no use or is not possible."""
        if self.guidance is not None:
            guidance_scales(1.0, 1, self.guidance)
        if self.guidance != 'linear' and self.first_token_apart is not None:
            raise ValueError('first_token_apart is only used with linear guidance: leave it out')
        if self.guidance_interval is None:
            return
        if self.guidance is None:
            raise ValueError('guidance_interval is only used with guidance: leave it out')
        ends = self.guidance_interval
        are_two = len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
        if not are_two or not 0 <= ends[0] < ends[1] <= 1:
            raise ValueError(f'guidance_interval is {ends}, but must be 0 ≤ low < high ≤ 1')

    @property
    def splits_first_token(self) -> bool:
        """Whether conditional and null rows draw different first tokens, see the class."""
        return self.guidance == 'linear' and self.first_token_apart is not False

    @property
    def _last_steps(self) -> int:
        """Steps of the last token."""
        return self.num_steps if self.final_steps is None else self.final_steps

    def _table(self, steps: int) -> solvers.Table:
        """The solver's table for a number of steps."""
        shift = 1.0 if self.shift is None else self.shift
        arguments = {'noise_scale': self.noise_scale, 'last_step': self.last_step}
        given = {name: value for name, value in arguments.items() if value is not None}
        return solvers.table(self.solver, steps, shift, **given)

    @functools.cache  # noqa: B019, a handful of frozen objects
    def plan(self, num_tokens: int) -> Plan:
        """The `Plan` of L tokens, in NumPy arrays."""
        shape = 'linear' if self.annealing is None else self.annealing
        steps = annealed_steps(self.num_steps, self._last_steps, num_tokens, shape)
        different, which = np.unique(steps, return_inverse=True)
        tables, count = solvers.pad([self._table(int(n)) for n in different])
        return Plan(tables, count, which)

    def num_draws(self, num_tokens: int) -> int:
        """The number of standard normal draws per token.

        The first is x₀. The others belong to the evaluations 0 to i, where i is the last noisy
        evaluation of any table.
        """
        plan = self.plan(num_tokens)
        if not solvers.is_stochastic(plan.tables):
            return 1
        noisy = np.nonzero(plan.tables.weights[..., 3])[1]
        return 2 + int(noisy.max())
