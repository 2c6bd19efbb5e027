"""Heads of mean velocities, distilled from others: one or two evaluations a token.

See `docs/method.md`, "Mean-velocity distillation".

Dimensions:
  B  images
  L  tokens of an image
  N  rows, B·L
  d  latent dimension
  D  width of the AR model
  M  width of the head
  P  segments of the time axis
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.flow import paths, solvers
from sphere_ar_jax.flow.guidance import guide
from sphere_ar_jax.models.heads.flow import ZERO, FlowHead, time_sinusoid
from sphere_ar_jax.models.heads.riemannian import Riemannian
from sphere_ar_jax.models.transformer import INIT
from sphere_ar_jax.runtime.types import PyTree


class Segments(NamedTuple):
    """Parts of a flow's trajectories, with the mean velocity over each.

    Attributes:
      x: (P, N, d), the points where the segments begin.
      t: (P,) times when they begin.
      h: (P,) their widths in time.
      u: (P, N, d), the mean velocities.
    """

    x: jax.Array
    t: jax.Array
    h: jax.Array
    u: jax.Array


def segment_steps(
    levels: Sequence[int], num_steps: int, shift: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the steps of a solver at which the segments [i/n, (i + 1)/n] begin and end.

    Args:
      levels: the numbers n.
      num_steps: steps of the solver.
      shift: warp of its times, see `solvers.grid`.

    Returns:
      (start, end), both (P,) int: numbers of the solver's times, level by level.

    Raises:
      ValueError: the solver has no step at one of these times; one line.
    """
    times = solvers.grid(num_steps, shift)
    start = []
    end = []
    for n in levels:
        wanted = np.arange(n + 1) / n
        found = np.abs(times[:, None] - wanted).argmin(axis=0)
        missed = np.abs(times[found] - wanted) > 1e-6
        if missed.any():
            warp = '' if shift == 1 else f' with shift {shift:g}'
            raise ValueError(
                f'level {n} needs a step of the teacher at t = {wanted[missed.argmax()]:.3g}, '
                f'but {num_steps} steps{warp} have none'
            )
        start.append(found[:-1])
        end.append(found[1:])
    return np.concatenate(start), np.concatenate(end)


class MeanVelocity(FlowHead):
    """A flow head that gives the mean velocity over [t, t + h], u(x_t, t, h, c).

    The embedding of h is added to that of t. It starts at zero, so that a head begins as the one it
    is distilled from. The mean velocity is that of MeanFlow (arXiv 2505.13447).

    Attributes:
      TEACHER: the class of the head that it is distilled from.
    """

    TEACHER: ClassVar[type[FlowHead]] = FlowHead

    def setup(self) -> None:
        super().setup()
        self.span1 = nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype)
        self.span2 = nn.Dense(self.width, kernel_init=ZERO, dtype=self.dtype)

    def teacher(self) -> FlowHead:
        """The head `TEACHER` of the same sizes. This head learns the means of its velocities."""
        names = [field.name for field in dataclasses.fields(self.TEACHER) if field.init]
        fields = {name: getattr(self, name) for name in names if name not in ('parent', 'name')}
        return self.TEACHER(**fields, parent=None)

    def embed_time(self, *times: jax.Array) -> jax.Array:
        """Embedding (..., M) of a step.

        Args:
          *times: t (...) in [0, 1], and the width h (...) of the step.
        """
        t, h = times
        return super().embed_time(t) + self.span2(nn.silu(self.span1(time_sinusoid(h))))

    def _times(self, tables: solvers.Table) -> tuple[jax.Array, ...]:
        """The arguments of `embed_time` for all evaluations of solver tables."""
        return jnp.asarray(tables.t), jnp.asarray(tables.h)

    def draws(self, keys: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Starts of trajectories, from which a teacher makes the `Segments` of `loss`.

        Args:
          keys: (B,) PRNG keys, one for each image.
          shape: (1, L, d).

        Returns:
          (B, L, d) standard normal.
        """

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, shape[1:])

        return jax.vmap(draw)(keys)

    def example(self, shape: tuple[int, int, int]) -> Segments:
        """One segment for one image, all zero.

        Args:
          shape: (1, L, d).
        """
        x = jnp.zeros((1, *shape[1:]))
        return Segments(x, jnp.zeros(1), jnp.zeros(1), x)

    def loss(
        self, c: jax.Array, z: jax.Array, draws: Segments
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Error of the mean velocities: mean (u(x, t, h, c) − u)² over segments.

        It has the weight that the path gives an error.

        Args:
          c: (B, L, D) conditions.
          z: (B, L, d) tokens, which are not read.
          draws: segments of a teacher's trajectories.

        Returns:
          (loss, scalars): the loss () float32. The scalar one_step is the mean error of the
            longest segments. They reach from noise to data where 1 is among the levels.
        """
        del z
        P, N = draws.u.shape[:2]
        x = draws.x.reshape(P * N, -1)
        c = jnp.tile(c.reshape(N, -1), (P, 1))
        predicted = self.velocity(x, c, jnp.repeat(draws.t, N), jnp.repeat(draws.h, N))
        path = self.path()
        predicted = path.along(draws.x, predicted.reshape(draws.u.shape))
        squares = jnp.square(predicted - draws.u)
        errors = path.weighted(jnp.mean(squares, axis=(1, 2)))
        one_step = jnp.mean(errors, where=draws.h == jnp.max(draws.h))
        return jnp.mean(errors), {'one_step': one_step}

    def targets(
        self,
        velocity: Callable[[jax.Array, jax.Array], jax.Array],
        noise: jax.Array,
        levels: Sequence[int],
        num_steps: int,
        shift: float = 1.0,
    ) -> Segments:
        """Solves a flow, and takes its mean velocities over the steps of samplers of few steps.

        For every n of `levels` and every segment [i/n, (i + 1)/n], u is the velocity that leads
        from its start to its end. On straight paths u = (x at its end − x at its start)·n. All
        segments lie on one trajectory from x₀, which `noise` gives, solved by Adams–Bashforth.
        Source: u of MeanFlow (arXiv 2505.13447, eq. 3).

        Args:
          velocity: function (x (N, d), t ()) → (N, d).
          noise: (N, d) standard normal.
          levels: numbers n of a sampler's steps.
          num_steps: steps of the teacher's solver. Some of them are at the times i/n.
          shift: warp of that solver's times, see `solvers.grid`.

        Returns:
          `Segments`; there are P = Σ levels of them.

        Raises:
          ValueError: see `segment_steps`.
        """
        start, end = segment_steps(levels, num_steps, shift)
        table = solvers.table('ab2', num_steps, shift)
        path = self.path()
        x_0 = path.start(noise)

        def advance(state, row):
            x, memory = state
            t, _ = row
            x, memory = path.step(row, x, memory, velocity(x, t))
            return (x, memory), x

        rows = (jnp.asarray(table.t), jnp.asarray(table.weights))
        _, points = jax.lax.scan(advance, (x_0, jnp.zeros_like(x_0)), rows)
        points = jnp.concatenate([x_0[None], points])
        starts = np.concatenate([np.arange(n) / n for n in levels])
        t = jnp.asarray(starts, jnp.float32)
        h = jnp.asarray(np.repeat([1 / n for n in levels], levels), jnp.float32)
        u = path.between(points[start], points[end]) / h[:, None, None]
        return Segments(points[start], t, h, u)


class GeodesicMeanVelocity(MeanVelocity):
    """A head of mean velocities on the sphere, distilled from `Riemannian`.

    The mean velocity over [t, t + h] is the one of the geodesic from x_t to x_{t+h}:
    u = log_x(x_{t+h})/h, so that exp_x(h·u) is x_{t+h}.
    """

    TEACHER: ClassVar[type[FlowHead]] = Riemannian
    PATH: ClassVar[type[paths.Straight | paths.Geodesic]] = Riemannian.PATH


def distillation_loss(
    ar: nn.Module,
    student: PyTree,
    teacher: PyTree,
    labels: PyTree,
    z: jax.Array,
    noise: jax.Array,
    scales: jax.Array,
    levels: Sequence[int],
    num_steps: int,
    *,
    shift: float = 1.0,
    transformer: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a head that learns the mean velocity of a teacher's guided flow.

    It is the mean of (u(x, t, h, c) − target)², with the head's own `targets`. The teacher's
    guidance, s_k at token k, becomes part of the student, which therefore needs no null rows. What
    the null rows know of the past is lost to a head that reads the teacher's conditions. A
    transformer that is trained, too, can put it into its own.

    Args:
      ar: an `ar.AR` with a `MeanVelocity` head.
      student: its parameters. No gradient reaches those beside the head without `transformer`,
        where they are the teacher's.
      teacher: parameters of the same AR model with the head `MeanVelocity.teacher`.
      labels: labels of B images, see `conditions`.
      z: (B, L, d) tokens.
      noise: (B, L, d) standard normal.
      scales: (L,) s_k.
      levels: see `MeanVelocity.targets`.
      num_steps: see `MeanVelocity.targets`.
      shift: see `MeanVelocity.targets`.
      transformer: whether the conditions c are the student's own.

    Returns:
      (loss, scalars) of `MeanVelocity.loss`.
    """
    B, L, d = z.shape
    teacher_head = ar.head.teacher()
    both = jax.tree.map(
        lambda a, null: jnp.concatenate([a, null]), labels, ar.condition.null(labels)
    )
    model = ar.clone(head=teacher_head)
    c = model.apply({'params': teacher}, both, jnp.concatenate([z, z]), method='conditions')
    rows = c.reshape(2 * B * L, -1)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        """The teacher's guided velocity of all tokens, (B·L, d)."""
        arguments = (jnp.concatenate([x, x]), rows, jnp.full(len(rows), t))
        v = teacher_head.apply({'params': teacher['head']}, *arguments, method='velocity')
        v_cond, v_null = jnp.split(v, 2)
        return guide(v_cond, v_null, jnp.tile(scales, B)[:, None])

    targets = ar.head.targets(guided, noise.reshape(B * L, d), levels, num_steps, shift)
    c, targets = jax.lax.stop_gradient((c[:B], targets))
    if transformer:
        c = ar.apply({'params': student}, labels, z, method='conditions')
    return ar.head.apply({'params': student['head']}, c, z, targets, method='loss')
