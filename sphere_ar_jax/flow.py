"""Rectified flow between noise (t = 0) and data (t = 1): path, target, guidance, solvers (spec §6–§7).

Dimensions:
  N    rows, i.e. tokens that are integrated at once
  d    latent dimension
  n    solver steps; a solver evaluates the velocity at `num_evaluations(...)` times
"""

import jax
import jax.numpy as jnp
import numpy as np

SOLVERS = ('euler', 'euler_maruyama')
SCHEDULES = ('linear', 'constant')


def interpolate(noise, z, t):
    """x_t = (1 − t)·noise + t·z, the straight path of spec §6. noise, z: (..., d); t: (...) in [0, 1]. → (..., d)."""
    t = t[..., None]
    return (1 - t) * noise + t * z


def target_velocity(noise, z):
    """The velocity of `interpolate`, v = z − noise, (..., d). Spec §6."""
    return z - noise


def score(v, x, t):
    """∇log p_t(x) = (t·v − x)/(1 − t), since t(1−t) + (1−t)² = 1 − t. v, x: (..., d); t scalar < 1. Spec §7."""
    return (t * v - x) / (1 - t)


def guide(v_cond, v_null, scale):
    """Classifier-free guidance on the velocity: v_null + scale·(v_cond − v_null), (..., d). Spec §7."""
    return v_null + scale * (v_cond - v_null)


def guidance_scales(scale, num_tokens, schedule):
    """The scale s_k of every token k of L: 'linear' 1 + (scale − 1)·k/L, 'constant' scale.

    Args:
      scale: float or scalar array, ≥ 1 in normal use. num_tokens: L. schedule: one of `SCHEDULES`.
    Returns:
      (L,) float32. Source: spec §7.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'guidance schedule {schedule!r} is not one of {", ".join(SCHEDULES)}')
    scale = jnp.asarray(scale, jnp.float32)
    if schedule == 'constant':
        return jnp.broadcast_to(scale, (num_tokens,))
    return 1 + (scale - 1) * jnp.arange(num_tokens, dtype=jnp.float32) / num_tokens


def solver_times(solver, num_steps, last_step=0.04):
    """The times t at which the velocity is evaluated and the step widths dt, float32.

    'euler': n equal steps over [0, 1]. 'euler_maruyama': n equal stochastic steps over [0, 1 − last_step] and
    one plain Euler step of `last_step`; with 100 steps and 0.04 the published sampler (101 evaluations).

    Returns:
      (t, dt), each (num_evaluations,). Raises ValueError for an unknown solver or impossible numbers.
    """
    if solver not in SOLVERS:
        raise ValueError(f'solver {solver!r} is not one of {", ".join(SOLVERS)}')
    if num_steps < 1:
        raise ValueError(f'num_steps is {num_steps}, but a solver needs at least one step')
    if solver == 'euler':
        return jnp.arange(num_steps, dtype=jnp.float32) / num_steps, jnp.full(num_steps, 1 / num_steps)
    if not 0 < last_step < 1:
        raise ValueError(f'last_step is {last_step}, but must lie between 0 and 1')
    dt = np.full(num_steps + 1, (1 - last_step) / num_steps, np.float32)
    # t is a running sum in float32, as published: the head sees t·1000, where its rounding shows
    t = np.cumsum(np.append(np.float32(0), dt[:-1]), dtype=np.float32)
    t[-1], dt[-1] = 1 - last_step, last_step
    return jnp.asarray(t), jnp.asarray(dt)


def num_draws(solver, num_steps):
    """Standard normal draws per token: the start x₀, and one for each stochastic step."""
    return 1 if solver == 'euler' else num_steps + 1


def integrate(velocity, x, noise, times, per_step=()):
    """Integrates dx = v dt (Euler), or the SDE with the same marginals (Euler–Maruyama), from t = 0 to 1.

    A stochastic step: x += [v + (1−t)·score]·dt + √(2(1−t)·dt)·ε. Euler–Maruyama's last step is a plain one.

    Args:
      velocity: function (x, t, per_step element) → v of x's shape.
      x: (N, d) float32, the start.
      noise: (m, N, d) float32, the ε of the stochastic steps: m = 0 is Euler, m = evaluations − 1 is
        Euler–Maruyama, whose last step is plain.
      times: (t, dt) of `solver_times`.
      per_step: a tree of arrays with leading axis `evaluations`: what depends on the step alone (time
        embeddings), computed once by the caller.
    Returns:
      (N, d) float32, at t = 1. Source: spec §7. Raises ValueError for another number of draws.
    """
    t, dt = times
    m = noise.shape[0]
    if m not in (0, len(t) - 1):
        raise ValueError(f'{m} draws for {len(t)} evaluations: Euler takes none, Euler–Maruyama {len(t) - 1}')

    def stochastic_step(x, step):
        t, dt, extra, noise = step
        v = velocity(x, t, extra)
        drift = v + (1 - t) * score(v, x, t)
        return x + drift * dt + jnp.sqrt(2 * (1 - t) * dt) * noise, None

    def euler_step(x, step):
        t, dt, extra = step
        return x + velocity(x, t, extra) * dt, None

    split = lambda stop, tree: jax.tree.map(lambda a: a[:m] if stop else a[m:], tree)
    steps = (t, dt, per_step)
    if m:
        x, _ = jax.lax.scan(stochastic_step, x, (*split(True, steps), noise))
    x, _ = jax.lax.scan(euler_step, x, split(False, steps))
    return x
