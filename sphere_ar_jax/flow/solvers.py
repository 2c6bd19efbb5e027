"""Solvers of the flow from noise (t = 0) to data (t = 1), each one a table of numbers.

Every solver here is linear in what it knows. At evaluation i it knows the point x, one remembered
array m, the velocity v = v(x, t_i) and fresh noise ε. Its step is

    (x, m) ← W_i · (x, m, v, ε),   W_i of shape (2, 4).

A solver on a grid of times is therefore (t_i, W_i), and one loop, `integrate`, runs them all.
So another table needs no new program, and tokens may differ in their number of evaluations.
A path on the sphere reads the same tables by a step of its own, see `paths.Geodesic`.
See `docs/method.md`, "Solvers".

Dimensions:
  n  steps of the grid, n + 1 times
  E  evaluations of the velocity
  N  rows, i.e. tokens integrated at once, each of d numbers
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

LAST_STEP = 0.04


class Table(NamedTuple):
    """A solver on a grid of times; all arrays are float32.

    Attributes:
      t: (E,) times of the evaluations.
      h: (E,) widths of the steps that the evaluations belong to.
      weights: (E, 2, 4), the matrices W.
    """

    t: np.ndarray
    h: np.ndarray
    weights: np.ndarray


def grid(num_steps: int, shift: float = 1.0) -> np.ndarray:
    """Times from 0 to 1: a uniform grid u, warped to t = u/(u + s·(1 − u)).

    This is the "timestep shift" of Stable Diffusion 3 (arXiv 2403.03206, eq. 23), for a time that
    runs from noise to data.

    Args:
      num_steps: n.
      shift: s > 0. Above 1 it puts more steps near noise, below 1 near data; 1 keeps them equal.

    Returns:
      (n + 1,) float64.

    Raises:
      ValueError: there is no step, or the shift is not above 0.
    """
    if num_steps < 1:
        raise ValueError(f'num_steps is {num_steps}, but a solver needs at least one step')
    if not 0 < shift < math.inf:
        raise ValueError(f'shift is {shift}, but must be a finite number above 0')
    u = np.arange(num_steps + 1) / num_steps
    return u / (u + shift * (1 - u))


def _table(t: ArrayLike, h: ArrayLike, rows: list | np.ndarray) -> Table:
    """A table of float32 arrays."""
    return Table(np.asarray(t, np.float32), np.asarray(h, np.float32), np.asarray(rows, np.float32))


def _steps(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times t and widths h of a grid's steps, each (n,).

    t is a running float32 sum, as published: the head sees 1000·t, where its rounding shows.
    """
    h = np.diff(times).astype(np.float32)
    t = np.cumsum(np.append(np.float32(0), h[:-1]), dtype=np.float32)
    return t, h


def euler(times: np.ndarray) -> Table:
    """Euler's method, x ← x + h·v.

    It is of first order and makes one evaluation per step.

    Args:
      times: (n + 1,), see `grid`.
    """
    t, h = _steps(times)
    rows = [[[1, 0, step, 0], [0, 0, 0, 0]] for step in h]
    return _table(t, h, rows)


def heun(times: np.ndarray) -> Table:
    """Heun's method: x_e = x + h·v, then x ← x + h·(v(x, t) + v(x_e, t + h))/2.

    It is of second order and makes two evaluations per step.

    Args:
      times: (n + 1,), see `grid`.
    """
    t, h = _steps(times)
    rows = []
    for step in h:
        rows.append([[1, 0, step, 0], [1, 0, step / 2, 0]])
        rows.append([[0, 1, step / 2, 0], [0, 0, 0, 0]])
    end = np.append(t[1:], np.float32(1))
    return _table(np.stack([t, end], 1).ravel(), np.repeat(h, 2), rows)


def ab2(times: np.ndarray) -> Table:
    """Adams–Bashforth in the velocity: x ← x + h·[(1 + r/2)·v − (r/2)·v_before].

    Here r = h/h_before; the first step is Euler's. The method is of second order and makes one
    evaluation per step.

    Args:
      times: (n + 1,), see `grid`.
    """
    t, h = _steps(times)
    ratios = np.append(0, h[1:] / h[:-1])
    rows = []
    for step, r in zip(h, ratios, strict=True):
        rows.append([[1, -step * r / 2, step * (1 + r / 2), 0], [0, 0, 1, 0]])
    return _table(t, h, rows)


def dpmpp_2m(times: np.ndarray) -> Table:
    """DPM-Solver++(2M), a multistep method in the predicted data D = x + (1 − t)·v.

    It is linear in λ = log(t/(1 − t)). A step from t to s is

        x ← (1 − s)/(1 − t)·x + (s − t·(1 − s)/(1 − t))·[D + (D − D_before)·Δλ/(2·Δλ_before)].

    The first step, the second (whose Δλ_before is infinite) and the last (whose Δλ is infinite) are
    of first order. There is one evaluation per step.

    On a part of the path where λ is finite, the method is of second order. On the whole path its
    error falls as log(n)/n²: λ is infinite at both ends, and beside them Δλ/Δλ_before stays away
    from 1 however small the steps are, as in any method that is linear in λ. For data of a normal
    distribution, twice 64 steps divide the error by 3.1 and twice 256 steps by 3.5, not by 4.
    Source: arXiv 2211.01095, algorithm 2, with α = t and σ = 1 − t.

    Args:
      times: (n + 1,), see `grid`.
    """
    t, h = _steps(times)
    with np.errstate(divide='ignore'):
        steps = np.diff(np.log(times) - np.log1p(-times))  # Δλ; the first and last are infinite.
    rows = []
    for i, (t_i, h_i) in enumerate(zip(t.astype(np.float64), h.astype(np.float64), strict=True)):
        end = 1.0 if i == len(t) - 1 else t_i + h_i
        keep = (1 - end) / (1 - t_i)
        move = end - t_i * keep
        a = steps[i] / steps[i - 1] / 2 if 2 <= i < len(t) - 1 else 0.0
        gain = move * (1 + a)
        rows.append([[keep + gain, -move * a, gain * (1 - t_i), 0], [1, 0, 1 - t_i, 0]])
    return _table(t, h, rows)


def euler_maruyama(
    times: np.ndarray, noise_scale: float = 1.0, last_step: float = LAST_STEP
) -> Table:
    """Stochastic steps over [0, 1 − last_step], then one plain Euler step of `last_step`.

    A stochastic step is x ← x + [v + γ(1−t)·∇log p_t]·h + √(2γ(1−t)·h)·ε, with (1−t)·∇log p_t =
    t·v − x. Any γ ≥ 0 keeps the flow's marginals. The published sampler has γ = 1, 100 equal steps
    and a last step of 0.04, so 101 evaluations.

    Args:
      times: (n + 1,), see `grid`.
      noise_scale: γ.
      last_step: width of the last step, between 0 and 1.

    Raises:
      ValueError: `noise_scale` or `last_step` is out of range.
    """
    if not 0 < last_step < 1:
        raise ValueError(f'last_step is {last_step}, but must lie between 0 and 1')
    if not 0 <= noise_scale < math.inf:
        raise ValueError(f'noise_scale is {noise_scale}, but must be finite and not negative')
    t, h = _steps((1 - last_step) * times)
    rows: list[list[list[float]]] = []
    for t_i, h_i in zip(t.astype(np.float64), h.astype(np.float64), strict=True):
        drift = h_i * (1 + noise_scale * t_i)
        spread = math.sqrt(2 * noise_scale * (1 - t_i) * h_i)
        rows.append([[1 - noise_scale * h_i, 0, drift, spread], [0, 0, 0, 0]])
    rows.append([[1, 0, last_step, 0], [0, 0, 0, 0]])
    return _table(np.append(t, 1 - last_step), np.append(h, last_step), rows)


def mixing(times: np.ndarray, noise_scale: float = 1.0) -> Table:
    """Steps along a geodesic whose start is mixed with fresh noise; for geodesics alone.

    A step estimates the end x̂₁ and the start x̂₀ of the geodesic through x, mixes x̂₀ with a
    uniform point by the weight η, and goes to t + h on the geodesic from there to x̂₁. It is
    Euler's for η = 0. The last step reaches x̂₁ and takes no noise. A velocity longer than πR, as
    guidance may make it, goes more than half way round: the geodesic to x̂₁ is then the other, the
    shorter one. See `docs/method.md`, "Riemannian head".

    Args:
      times: (n + 1,), see `grid`.
      noise_scale: η, between 0 and 1.

    Raises:
      ValueError: `noise_scale` is out of range.
    """
    if not 0 <= noise_scale <= 1:
        raise ValueError(f'noise_scale is {noise_scale}, but must lie between 0 and 1')
    t, h = _steps(times)
    rows = [[[1, 0, step, noise_scale], [0, 0, 0, 0]] for step in h]
    rows[-1][0][3] = 0
    return _table(t, h, rows)


SOLVERS: dict[str, Callable[..., Table]] = {
    'euler': euler,
    'heun': heun,
    'ab2': ab2,
    'dpmpp_2m': dpmpp_2m,
    'euler_maruyama': euler_maruyama,
    'mixing': mixing,
}
# The solvers of straight paths, and those of geodesics.
STRAIGHT = ('euler', 'heun', 'ab2', 'dpmpp_2m', 'euler_maruyama')
GEODESIC = ('euler', 'ab2', 'mixing')
# The arguments of a solver besides its times.
_ARGUMENTS = {'euler_maruyama': ('noise_scale', 'last_step'), 'mixing': ('noise_scale',)}


def table(solver: str, num_steps: int, shift: float = 1.0, **arguments: float) -> Table:
    """The table of a solver, by its name, on the grid of n steps.

    Args:
      solver: one of `SOLVERS`.
      num_steps: n.
      shift: see `grid`.
      **arguments: noise_scale of 'euler_maruyama' and 'mixing', last_step of the first.

    Raises:
      ValueError: there is no such solver, it does not take an argument, or a value is out of range.
    """
    if solver not in SOLVERS:
        raise ValueError(f'solver {solver!r} is not one of {", ".join(SOLVERS)}')
    for name in arguments:
        takers = [other for other, known in _ARGUMENTS.items() if name in known]
        if solver not in takers:
            raise ValueError(f'{name}: only for the solver {" or ".join(takers)}; leave it out')
    return SOLVERS[solver](grid(num_steps, shift), **arguments)


def is_stochastic(table: Table) -> bool:
    """Whether any step of the table takes noise."""
    return bool(np.any(table.weights[..., 3]))


def pad(tables: Sequence[Table]) -> tuple[Table, np.ndarray]:
    """Stacks tables of different lengths.

    Shorter ones are filled up with copies of their last row. These are never evaluated; their times
    are in range all the same.

    Args:
      tables: at least one table.

    Returns:
      (table, count): arrays with a leading axis of tables, and the number of evaluations of each
        table.
    """
    longest = max(len(one.t) for one in tables)

    def extend(a: np.ndarray) -> np.ndarray:
        return np.pad(a, [(0, longest - len(a))] + [(0, 0)] * (a.ndim - 1), 'edge')

    t = np.stack([extend(one.t) for one in tables])
    h = np.stack([extend(one.h) for one in tables])
    weights = np.stack([extend(one.weights) for one in tables])
    return Table(t, h, weights), np.array([len(one.t) for one in tables])


def step(w: jax.Array, *known: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of a table.

    Args:
      w: (2, 4), the weights W of the step.
      *known: x, m, v and, where the table takes noise, ε; each (N, d).

    Returns:
      The next (x, m).
    """

    def combine(row: int) -> jax.Array:
        terms = (w[row, j] * a for j, a in enumerate(known))
        return sum(terms)  # type: ignore[return-value]  # There are terms, so this is no int.

    return combine(0), combine(1)


def _itself(index: jax.Array) -> jax.Array:
    """Prepares nothing: returns the indices of the evaluations themselves."""
    return index


def element(tree: Any, i: jax.Array) -> Any:
    """Element i of every array of a tree."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def integrate(
    velocity: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    weights: Any,
    noise: jax.Array | None = None,
    *,
    count: jax.Array | int | None = None,
    prepare: Callable[[jax.Array], Any] = _itself,
    chunk: int = 1,
    take: Callable[[Any, jax.Array], Any] = element,
    advance: Callable[..., tuple[jax.Array, jax.Array]] = step,
) -> jax.Array:
    """Runs a table from x at t = 0 to t = 1.

    Args:
      velocity: function (x, prepared) → v of x's shape; `prepared` is what `take` returned.
      x: (N, d) float32, the start.
      weights: (E, 2, 4) of a `Table`, or what else `advance` reads, a tree of arrays (E, …). It
        may be traced.
      noise: (E', N, d) float32, the ε of the first E' evaluations, or None for a table without
        noise. The weights of ε must be 0 at later evaluations, which read the last ε.
      count: () int, the evaluations to make; None stands for E.
      prepare: function indices (chunk,) int → a tree of arrays (chunk, …), whatever the evaluations
        need that does not depend on x. Calling it for `chunk` evaluations at a time makes one large
        product of many small ones. Indices may run past the last evaluation by less than a chunk.
      chunk: evaluations that are prepared together.
      take: function (what `prepare` returned, i) → what evaluation i of the chunk needs of it.
      advance: function (one element of weights, x, m, v, ε) → the next (x, m), see `step`. Without
        noise it gets no ε.

    Returns:
      (N, d) float32.
    """
    weights = jax.tree.map(jnp.asarray, weights)
    evaluations = len(jax.tree.leaves(weights)[0]) if count is None else count

    def evaluate(i, prepared, state):
        """Evaluation i: (x, m) → the next (x, m)."""
        x, memory = state
        known = [x, memory, velocity(x, prepared)]
        if noise is not None:
            row = jnp.minimum(i, len(noise) - 1)
            known.append(element(noise, row))
        return advance(element(weights, i), *known)

    def run_chunk(j, state):
        """The evaluations of chunk j: (x, m) → the next (x, m)."""
        start = j * chunk
        prepared = prepare(start + jnp.arange(chunk))

        def evaluate_inside(i, state):
            return evaluate(start + i, take(prepared, i), state)

        length = jnp.minimum(chunk, evaluations - start)
        return jax.lax.fori_loop(0, length, evaluate_inside, state)

    chunks = (evaluations + chunk - 1) // chunk
    x, _ = jax.lax.fori_loop(0, chunks, run_chunk, (x, jnp.zeros_like(x)))
    return x
