"""A head of mean velocities, distilled from a flow head: one or two evaluations a token.

Dimensions:
  B  images     L  tokens of an image     d  latent dimension
"""

import jax
import jax.numpy as jnp

from sphere_ar_jax.flow import guidance, solvers


def mean_velocity_targets(velocity, noise, levels, num_steps):
    """Mean velocities of a flow over the segments that samplers of few steps take, by solving it.

    For every n of `levels` and every segment [i/n, (i + 1)/n]: u = (x at its end − x at its start)·n, along one
    trajectory from x₀ = noise, solved by Adams–Bashforth in num_steps equal steps.

    Args:
      velocity: function (x (N, d), t ()) → (N, d). noise: (N, d). levels: ints that divide num_steps.
    Returns:
      (x (P, N, d), t (P,), h (P,), u (P, N, d)) for P = Σ levels segments: start, time, width, mean velocity.
    Raises ValueError where a level does not divide num_steps. Source: u of MeanFlow (arXiv 2505.13447, eq. 3).
    """
    if any(num_steps % n for n in levels):
        raise ValueError(f'levels {tuple(levels)} must divide the {num_steps} steps of the teacher')
    table = solvers.table('ab2', num_steps)

    def advance(state, inputs):
        t, w = inputs
        state = solvers.step(w, *state, velocity(state[0], t))
        return state, state[0]

    _, path = jax.lax.scan(advance, (noise, jnp.zeros_like(noise)), (jnp.asarray(table.t), jnp.asarray(table.weights)))
    path = jnp.concatenate([noise[None], path])
    ends = [(i * num_steps // n, (i + 1) * num_steps // n) for n in levels for i in range(n)]
    start, end = (jnp.array(column) for column in zip(*ends, strict=True))
    h = (end - start).astype(jnp.float32) / num_steps
    u = (path[end] - path[start]) / h[:, None, None]
    return path[start], start.astype(jnp.float32) / num_steps, h, u


def distillation_loss(ar, head, teacher, class_id, z, noise, scales, levels, num_steps):
    """Teaches a flow head the mean velocity of a teacher's guided flow: mean (u(x, t, h, c) − its targets)².

    The AR model is frozen; the teacher's guidance, s_k at token k, becomes part of the head, which needs no null rows.

    Args:
      ar: `ar.AR` with average=True. head: its flow head's parameters, the only ones trained. teacher: parameters of the
      same model with average=False. class_id: (B,) int32. z: (B, L, d) tokens. noise: (B, L, d). scales: (L,) s_k.
      levels, num_steps: see `mean_velocity_targets`.
    Returns:
      (loss, scalars): loss () float32; scalars one_step, the part of the loss of the step from noise to data in one.
    """
    B, L, d = z.shape
    null = jnp.full_like(class_id, ar.num_classes)
    c = ar.clone(average=False).apply(
        {'params': teacher}, jnp.append(class_id, null), jnp.concatenate([z, z]), method='condition'
    )
    c = c.reshape(2 * B * L, -1)
    evaluate = lambda model, params, *arguments: model.apply(
        {'params': teacher | {'head': params}}, *arguments, method=lambda m, *a: m.head.velocity(*a)
    )

    def guided(x, t):
        v = evaluate(ar.clone(average=False), teacher['head'], jnp.concatenate([x, x]), jnp.full(len(c), t), c)
        return guidance.guide(*jnp.split(v, 2), jnp.tile(scales, B)[:, None])

    targets = mean_velocity_targets(guided, noise.reshape(B * L, d), levels, num_steps)
    x, t, h, u = jax.lax.stop_gradient(targets)
    P, N = u.shape[:2]
    rows = lambda a: jnp.repeat(a, N)
    predicted = evaluate(
        ar, head, x.reshape(P * N, d), rows(t), jnp.tile(jax.lax.stop_gradient(c[:N]), (P, 1)), rows(h)
    )
    errors = jnp.mean(jnp.square(predicted.reshape(u.shape) - u), axis=(1, 2))
    whole = jnp.asarray([n == 1 for n in levels for _ in range(n)])
    return jnp.mean(errors), dict(one_step=jnp.sum(jnp.where(whole, errors, 0.0)) / max(1, sum(n == 1 for n in levels)))
