"""A head of mean velocities, distilled from a flow head: one or two evaluations a token.

Dimensions:
  B  images     L  tokens of an image     N  rows, B·L     d  latent dimension
  P  segments of the time axis
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.flow import solvers
from sphere_ar_jax.flow.guidance import guide
from sphere_ar_jax.models.heads.flow import ZERO, FlowHead, time_sinusoid
from sphere_ar_jax.models.transformer import INIT


class Segments(NamedTuple):
    """Parts of a flow's trajectories, with the mean velocity over each.

    Attributes:
      x: (P, N, d) where a segment begins. t: (P,) when. h: (P,) its width in time. u: (P, N, d) its
        mean velocity.
    """

    x: jax.Array
    t: jax.Array
    h: jax.Array
    u: jax.Array


class MeanVelocity(FlowHead):
    """A flow head that gives the mean velocity over [t, t + h] and takes h as well (MeanFlow, arXiv
    2505.13447).

    The embedding of h is added to that of t and starts at zero, so that a head begins as the one it
    is distilled from.
    """

    def setup(self):
        super().setup()
        self.span1 = nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype)
        self.span2 = nn.Dense(self.width, kernel_init=ZERO, dtype=self.dtype)

    def teacher(self) -> FlowHead:
        """The flow head of the same sizes, whose velocities this one learns the means of."""
        fields = (
            self.latent_dim,
            self.width,
            self.depth,
            self.groups,
            self.remat,
            self.unroll,
            self.dtype,
            self.scan,
        )
        return FlowHead(*fields, parent=None)

    def embed_time(self, t: jax.Array, h: jax.Array) -> jax.Array:
        """t (...) in [0, 1] and the step's width h (...) → (..., M)."""
        return super().embed_time(t) + self.span2(nn.silu(self.span1(time_sinusoid(h))))

    def _times(self, tables: solvers.Table) -> tuple[jax.Array, ...]:
        """The arguments of `embed_time` that belong to solver tables."""
        return jnp.asarray(tables.t), jnp.asarray(tables.h)

    def draws(self, keys: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Starts of trajectories, one key for each image: keys (B,), shape (1, L, d) → (B, L, d)
        standard normal.
        """

        def draw(key):
            return jax.random.normal(key, shape[1:])

        return jax.vmap(draw)(keys)

    def example(self, shape: tuple[int, int, int]) -> Segments:
        """One segment for one image, all zero; shape (1, L, d)."""
        x = jnp.zeros((1, *shape[1:]))
        return Segments(x, jnp.zeros(1), jnp.zeros(1), x)

    def loss(
        self, c: jax.Array, z: jax.Array, draws: Segments
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Error of the mean velocities: mean (u(x, t, h, c) − u)² over segments.

        Args:
          c: (B, L, D) conditions. z: (B, L, d) tokens, of which only the shape is read. draws:
            `Segments` of a teacher.
        Returns:
          (loss, scalars): loss () float32; scalars one_step, the part of the steps from noise to
            data in one.
        """
        del z
        P, N = draws.u.shape[:2]
        x = draws.x.reshape(P * N, -1)
        c = jnp.tile(c.reshape(N, -1), (P, 1))
        predicted = self.velocity(x, c, jnp.repeat(draws.t, N), jnp.repeat(draws.h, N))
        errors = jnp.mean(jnp.square(predicted.reshape(draws.u.shape) - draws.u), axis=(1, 2))
        whole = draws.h == 1
        one_step = jnp.sum(jnp.where(whole, errors, 0.0)) / jnp.maximum(
            jnp.sum(whole.astype(jnp.float32)), 1
        )
        return jnp.mean(errors), {'one_step': one_step}


def mean_velocity_targets(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    levels: Sequence[int],
    num_steps: int,
) -> Segments:
    """Mean velocities of a flow over the segments that samplers of few steps take, by solving it.

    For every n of `levels` and every segment [i/n, (i + 1)/n]: u = (x at its end − x at its
    start)·n, along one trajectory from x₀ = noise, solved by Adams–Bashforth in num_steps equal
    steps.

    Args:
      velocity: function (x (N, d), t ()) → (N, d). noise: (N, d). levels: ints that divide
        num_steps.
    Returns:
      `Segments`, P = Σ levels of them.
    Raises ValueError where a level does not divide num_steps. Source: u of MeanFlow (arXiv
    2505.13447, eq. 3).
    """
    if any(num_steps % n for n in levels):
        raise ValueError(f'levels {tuple(levels)} must divide the {num_steps} steps of the teacher')
    table = solvers.table('ab2', num_steps)

    def advance(state, inputs):
        t, w = inputs
        state = solvers.step(w, *state, velocity(state[0], t))
        return state, state[0]

    start_state = (noise, jnp.zeros_like(noise))
    _, path = jax.lax.scan(advance, start_state, (jnp.asarray(table.t), jnp.asarray(table.weights)))
    path = jnp.concatenate([noise[None], path])
    ends = [(i * num_steps // n, (i + 1) * num_steps // n) for n in levels for i in range(n)]
    start = jnp.array([first for first, _ in ends])
    end = jnp.array([last for _, last in ends])
    h = (end - start).astype(jnp.float32) / num_steps
    u = (path[end] - path[start]) / h[:, None, None]
    return Segments(path[start], start.astype(jnp.float32) / num_steps, h, u)


def distillation_loss(
    ar: Any,
    head: Any,
    teacher: Any,
    labels: Any,
    z: jax.Array,
    noise: jax.Array,
    scales: jax.Array,
    levels: Sequence[int],
    num_steps: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Teach a head the mean velocity of a teacher's guided flow: mean (u(x, t, h, c) − its
    targets)².

    The AR model is frozen. The teacher's guidance, s_k at token k, becomes part of the head, which
    needs no null rows.

    Args:
      ar: `ar.AR` with a `MeanVelocity` head. head: that head's parameters, the only ones trained.
        teacher: parameters
      of the same AR model with the head `MeanVelocity.teacher`. labels: of B images. z: (B, L, d)
        tokens.
      noise: (B, L, d). scales: (L,) s_k. levels, num_steps: see `mean_velocity_targets`.
    Returns:
      (loss, scalars) of `MeanVelocity.loss`.
    """
    B, L, d = z.shape
    flow_head = ar.head.teacher()
    both = jax.tree.map(
        lambda a, null: jnp.concatenate([a, null]), labels, ar.condition.null(labels)
    )
    c = ar.clone(head=flow_head).apply(
        {'params': teacher}, both, jnp.concatenate([z, z]), method='conditions'
    )
    rows = c.reshape(2 * B * L, -1)

    def guided(x, t):
        arguments = (jnp.concatenate([x, x]), rows, jnp.full(len(rows), t))
        v = flow_head.apply({'params': teacher['head']}, *arguments, method='velocity')
        return guide(*jnp.split(v, 2), jnp.tile(scales, B)[:, None])

    targets = mean_velocity_targets(guided, noise.reshape(B * L, d), levels, num_steps)
    frozen = jax.lax.stop_gradient((c[:B], z, targets))
    return ar.head.apply({'params': head}, *frozen, method='loss')
