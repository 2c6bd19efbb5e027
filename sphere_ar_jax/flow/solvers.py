"""Solvers of the flow from noise (t = 0) to data (t = 1), each one a table of numbers.

Every solver here is linear in what it knows: at evaluation i it has the point x, one remembered
array m, the velocity v = v(x, t_i) and fresh noise ε, and goes on from

    (x, m) ← W_i · (x, m, v, ε),   W_i of shape (2, 4).

A solver on a grid of times is therefore (t_i, W_i), and one loop, `integrate`, runs them all: with
another table it needs no other program, and the number of evaluations may differ from token to
token.

Dimensions:
  n    steps of the grid, n + 1 times     E    evaluations of the velocity
  N    rows, i.e. tokens integrated at once, each of d numbers
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LAST_STEP = 0.04


class Table(NamedTuple):
    """Times t (E,) of the evaluations, widths h (E,) of the steps they belong to, weights W (E, 2,
    4), all float32.
    """

    t: Any
    h: Any
    weights: Any


def grid(num_steps, shift=1.0):
    """n + 1 times from 0 to 1: uniform u warped to t = u/(u + s·(1 − u)).

    shift: s > 0. s > 1 puts more steps near noise, s < 1 near data, 1 keeps them equal (the
    "timestep shift" of Stable Diffusion 3, arXiv 2403.03206, eq. 23, for a time that runs from
    noise to data). Returns (n + 1,) float64. Raises ValueError for impossible numbers.
    """
    if num_steps < 1:
        raise ValueError(f'num_steps is {num_steps}, but a solver needs at least one step')
    if not 0 < shift < math.inf:
        raise ValueError(f'shift is {shift}, but must be above 0')
    u = np.arange(num_steps + 1) / num_steps
    return u / (u + shift * (1 - u))


def _table(t, h, rows):
    return Table(np.asarray(t, np.float32), np.asarray(h, np.float32), np.asarray(rows, np.float32))


def _steps(times):
    """(t, h) of a grid's steps. t is a running float32 sum, as published: the head sees 1000·t,
    where that shows.
    """
    h = np.diff(times).astype(np.float32)
    return np.cumsum(np.append(np.float32(0), h[:-1]), dtype=np.float32), h


def euler(times):
    """x ← x + h·v. First order, one evaluation per step."""
    t, h = _steps(times)
    return _table(t, h, [[[1, 0, h, 0], [0, 0, 0, 0]] for h in h])


def heun(times):
    """The trapezoid: x_e = x + h·v, then x + h·(v(x, t) + v(x_e, t + h))/2. Second order, two
    evaluations a step.
    """
    t, h = _steps(times)
    rows = []
    for step in h:
        rows += [[[1, 0, step, 0], [1, 0, step / 2, 0]], [[0, 1, step / 2, 0], [0, 0, 0, 0]]]
    end = np.append(t[1:], np.float32(1))
    return _table(np.stack([t, end], 1).ravel(), np.repeat(h, 2), rows)


def ab2(times):
    """Adams–Bashforth in the velocity: x + h·[(1 + r/2)·v − (r/2)·v_before], r = h/h_before; the
    first step is Euler's.

    Second order, one evaluation per step.
    """
    t, h = _steps(times)
    ratio = np.append(0, h[1:] / h[:-1])
    return _table(
        t,
        h,
        [
            [[1, -h * r / 2, h * (1 + r / 2), 0], [0, 0, 1, 0]]
            for h, r in zip(h, ratio, strict=True)
        ],
    )


def dpmpp_2m(times):
    """DPM-Solver++(2M): multistep in the predicted data D = x + (1 − t)·v, linear in λ = log(t/(1 −
    t)).

    From t to s: x ← (1 − s)/(1 − t)·x + (s − t·(1 − s)/(1 − t))·[D + (D −
    D_before)·Δλ/(2·Δλ_before)]. The first step, the second (whose Δλ_before is infinite) and the
    last (Δλ infinite) are of first order, which keeps the second order of the whole. One evaluation
    per step. Source: arXiv 2211.01095, algorithm 2, with α = t, σ = 1 − t.
    """
    t, h = _steps(times)
    with np.errstate(divide='ignore'):
        steps = np.diff(np.log(times) - np.log1p(-times))  # Δλ, the first and the last infinite
    rows = []
    for i, (t_i, h_i) in enumerate(zip(t.astype(np.float64), h.astype(np.float64), strict=True)):
        end = 1.0 if i == len(t) - 1 else t_i + h_i
        keep = (1 - end) / (1 - t_i)
        move = end - t_i * keep
        a = steps[i] / steps[i - 1] / 2 if 2 <= i < len(t) - 1 else 0.0
        gain = move * (1 + a)
        rows.append([[keep + gain, -move * a, gain * (1 - t_i), 0], [1, 0, 1 - t_i, 0]])
    return _table(t, h, rows)


def euler_maruyama(times, noise_scale=1.0, last_step=LAST_STEP):
    """Stochastic steps over [0, 1 − last_step], then one plain Euler step of `last_step`.

    A stochastic step: x + [v + γ(1−t)·∇log p_t]·h + √(2γ(1−t)·h)·ε with (1−t)·∇log p_t = t·v − x.
    Any γ = noise_scale ≥ 0 has the flow's marginals; γ = 1 with 100 equal steps and 0.04 is the
    published sampler (101 evaluations).
    """
    if not 0 < last_step < 1:
        raise ValueError(f'last_step is {last_step}, but must lie between 0 and 1')
    if not 0 <= noise_scale < math.inf:
        raise ValueError(f'noise_scale is {noise_scale}, but must not be negative')
    t, h = _steps((1 - last_step) * times)
    rows = []
    for t_i, h_i in zip(t.astype(np.float64), h.astype(np.float64), strict=True):
        drift, spread = h_i * (1 + noise_scale * t_i), math.sqrt(2 * noise_scale * (1 - t_i) * h_i)
        rows.append([[1 - noise_scale * h_i, 0, drift, spread], [0, 0, 0, 0]])
    rows.append([[1, 0, last_step, 0], [0, 0, 0, 0]])
    return _table(np.append(t, 1 - last_step), np.append(h, last_step), rows)


SOLVERS = {f.__name__: f for f in (euler, heun, ab2, dpmpp_2m, euler_maruyama)}


def table(solver, num_steps, shift=1.0, **arguments):
    """The `Table` of a solver by name, on the grid of n steps with the given shift.

    arguments: noise_scale and last_step, for 'euler_maruyama' only. Raises ValueError for what no
    solver has.
    """
    if solver not in SOLVERS:
        raise ValueError(f'solver {solver!r} is not one of {", ".join(SOLVERS)}')
    if arguments and solver != 'euler_maruyama':
        raise ValueError(
            f'{" and ".join(arguments)}: only for the solver euler_maruyama; leave it out'
        )
    return SOLVERS[solver](grid(num_steps, shift), **arguments)


def is_stochastic(table):
    """Whether any step of the table takes noise."""
    return bool(np.any(table.weights[..., 3]))


def pad(tables):
    """Tables of different lengths as one: (Table with a leading axis of tables, number of
    evaluations of each).

    What is added behind the shorter ones is never evaluated; it repeats the last time, so that
    nothing there is out of range.
    """
    longest = max(len(a.t) for a in tables)
    mode = lambda a: np.pad(a, [(0, longest - len(a))] + [(0, 0)] * (a.ndim - 1), 'edge')
    return Table(
        *(np.stack([mode(a) for a in column]) for column in zip(*tables, strict=True))
    ), np.array([len(a.t) for a in tables])


def step(w, *known):
    """One step of a table: w (2, 4) and what is known, x, m, v and perhaps ε, each (N, d) → the
    next (x, m).
    """
    return tuple(sum(w[row, j] * a for j, a in enumerate(known)) for row in range(2))


def integrate(velocity, x, weights, noise=None, *, count=None, prepare=lambda i: i, chunk=1):
    """Runs a table from x at t = 0 to t = 1.

    Args:
      velocity: function (x, prepared) → v of x's shape; `prepared` is one element of what `prepare`
        returned.
      x: (N, d) float32, the start. weights: (E, 2, 4), of a `Table`; it may be traced.
      noise: (m, N, d) float32, the ε of the evaluations 0 to m − 1 (later ones, which have none,
        read the last), or None for a table without noise.
      count: () int, the evaluations to make, E if None.
      prepare: function indices (chunk,) int → a tree of arrays (chunk, …): whatever an evaluation
        needs that does not depend on x. It is computed for `chunk` evaluations at a time, so that
        large products can be made of small ones; indices may run past the last evaluation by less
        than a chunk.
    Returns:
      (N, d) float32.
    """
    weights = jnp.asarray(weights)
    count = len(weights) if count is None else count

    def advance(i, prepared, state):
        x, memory = state
        known = [x, memory, velocity(x, prepared)]
        if noise is not None:
            known.append(
                jax.lax.dynamic_index_in_dim(noise, jnp.minimum(i, len(noise) - 1), keepdims=False)
            )
        return step(jax.lax.dynamic_index_in_dim(weights, i, keepdims=False), *known)

    def run_chunk(j, state):
        start = j * chunk
        prepared = prepare(start + jnp.arange(chunk))
        take = lambda i: jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), prepared
        )
        return jax.lax.fori_loop(
            0,
            jnp.minimum(chunk, count - start),
            lambda i, state: advance(start + i, take(i), state),
            state,
        )

    x, _ = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, run_chunk, (x, jnp.zeros_like(x)))
    return x
