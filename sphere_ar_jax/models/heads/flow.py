"""The flow head: an MLP for the velocity v(x_t, t, c) of one token's rectified flow (paper §3.3).

See `docs/method.md`, "Flow head".

Dimensions:
  B  images
  L  tokens of an image
  m  noisy copies of every token while training
  N  rows, i.e. tokens (of any images)
  R  rows of the sampler
  d  latent dimension
  D  width of the condition
  M  width of the head
  G  adaLN groups, each of n residual blocks that share one (scale, shift, gate)
  U  different solver tables
  E  evaluations of the head for a token, at most
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sphere_ar_jax.flow import paths, solvers
from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.flow.plan import Plan
from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.fused import flow_head
from sphere_ar_jax.models.fused.products import Modulations
from sphere_ar_jax.models.sizes import EPS
from sphere_ar_jax.models.transformer import INIT
from sphere_ar_jax.runtime.types import PyTree

# The least number of rows that a product of the head should have. A product of fewer rows spends
# its time on reading weights, not on computing.
PRODUCT_ROWS = 256
# The same with `FlowHead.fused`. Starting a kernel takes a GPU as long as many rows do.
FUSED_PRODUCT_ROWS = 2048
XAVIER = nn.initializers.xavier_uniform()
ZERO = nn.initializers.zeros
TIME_DIM = 256
# (scale, shift, gate) of residual blocks, or (scale, shift) of the last layer, each (..., M).
Modulation = tuple[jax.Array, ...]


def time_sinusoid(t: jax.Array, dim: int = TIME_DIM, period: float = 10000.0) -> jax.Array:
    """[cos, sin] of t·1000 at the dim/2 frequencies period^(−i/(dim/2)).

    Args:
      t: (...) times in [0, 1].
      dim: even number of outputs.
      period: the frequencies fall from 1 to nearly 1/period.

    Returns:
      (..., dim) float32.
    """
    # The frequencies are the exp of a float32 exponent, as the published weights were trained with.
    # At 1000 rad its rounding shows.
    exponents = np.float32(-math.log(period)) * np.arange(dim // 2, dtype=np.float32) / (dim // 2)
    freqs = np.exp(exponents)
    angles = 1000 * t.astype(jnp.float32)[..., None] * freqs.reshape(*(1,) * t.ndim, -1)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ResBlock(nn.Module):
    """A residual block, x + gate · MLP(LayerNorm(x)·(1 + scale) + shift).

    The MLP is a SwiGLU M → 1.5M → M with biases.

    Attributes:
      dtype: dtype of the computation; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, modulation: Modulation) -> tuple[jax.Array, None]:
        """The pair (output (N, M), None), as a scan needs it, for x (N, M)."""
        scale, shift, gate = modulation
        M = x.shape[-1]
        dense = dict(kernel_init=XAVIER, dtype=self.dtype, dot_general=transformer.product)
        norm = nn.LayerNorm(EPS, use_fast_variance=False, dtype=self.dtype, name='norm')
        h = norm(x) * (1 + scale) + shift
        h = nn.DenseGeneral((2, int(1.5 * M)), name='w1', **dense)(h)
        h = nn.silu(h[..., 0, :]) * h[..., 1, :]
        return x + gate * nn.Dense(M, name='w2', **dense)(h), None


def _parts(ada: jax.Array) -> Modulation:
    """Splits (…, p, M) into p arrays (…, M)."""
    return tuple(ada[..., i, :] for i in range(ada.shape[-2]))


class Group(nn.Module):
    """Residual blocks under one adaLN modulation, a linear M → (scale, shift, gate) of y.

    Attributes:
      width: M.
      depth: n, the number of blocks.
      unroll: blocks per iteration of the scan (speed only).
      dtype: dtype of the computation; parameters are float32.
      scan: see `transformer.Stack`.
    """

    width: int
    depth: int
    unroll: int
    dtype: DTypeLike = jnp.float32
    scan: bool = True

    def setup(self) -> None:
        self.ada = nn.DenseGeneral(
            (3, self.width), kernel_init=ZERO, dtype=self.dtype, dot_general=transformer.product
        )
        if self.scan:
            blocks = transformer.scanned(ResBlock, self.depth, self.unroll, 'layers')
            self.blocks = blocks(self.dtype)
        else:
            self.blocks = [ResBlock(self.dtype) for _ in range(self.depth)]

    def modulation(self, y: jax.Array) -> Modulation:
        """(scale, shift, gate), each (…, M), for y (…, M)."""
        return _parts(self.ada(y))

    def modulated(self, x: jax.Array, modulation: Modulation) -> jax.Array:
        """Runs the blocks under a given modulation: x (N, M) → (N, M)."""
        blocks = [self.blocks] if self.scan else self.blocks
        for block in blocks:
            x, _ = block(x, modulation)
        return x

    def __call__(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
        """The pair (output (N, M), None), as a scan needs it, for x (N, M) and y (N, M)."""
        return self.modulated(x, self.modulation(y)), None


class Solver(NamedTuple):
    """What a sampler computes once for all tokens: solver tables and the embeddings of their times.

    Attributes:
      t: (U, E) times.
      weights: (U, E, 2, 4), see `solvers.Table`.
      count: (U,) evaluations.
      t_emb: (U, E, M).
    """

    t: jax.Array
    weights: jax.Array
    count: jax.Array  # type: ignore[assignment]  # It hides the method `tuple.count`.
    t_emb: jax.Array


def chunk_size(evaluations: int, rows: int, fused: bool = False) -> int:
    """Number of evaluations of a token whose modulations are computed in one product.

    It is ⌈E/P⌉ with P = ⌈E/max(1, ⌊least/R⌋)⌉: chunks of equal size, whose products have about
    `least` rows each.

    Args:
      evaluations: E.
      rows: R, rows of the sampler on a device.
      fused: see `FlowHead`.
    """
    least = FUSED_PRODUCT_ROWS if fused else PRODUCT_ROWS
    products = -(-evaluations // max(1, least // rows))
    return -(-evaluations // products)


class Evaluator(NamedTuple):
    """How a head is evaluated for one token of R rows.

    Attributes:
      modulate: function (E, M) embeddings of times → modulations of all rows at all times.
      take: function (modulations, i) → those of time i.
      evaluate: function (x (R', d), those of a time) → velocity (R', d) of the first R' rows.
    """

    modulate: Callable[[jax.Array], PyTree]
    take: Callable[[PyTree, jax.Array], PyTree]
    evaluate: Callable[[jax.Array, PyTree], jax.Array]


class FlowHead(nn.Module):
    """Velocity of the flow, v(x_t, t, c), with its loss and the steps of its sampler.

    The embeddings of time and of condition have methods of their own, so that a sampler computes
    each once per step or token. With scan=False it can also compute the adaLN modulations of many
    steps in one large product.

    `draws` and `loss` are typed for any tree, since a head that extends this one may draw others.

    Attributes:
      PATH: the paths that tokens follow, made of latent_dim, radius and prior_scale.
      latent_dim: d.
      width: M.
      depth: residual blocks in all.
      groups: G, which divides depth.
      remat: recompute each group's activations in the backward pass instead of keeping them.
      unroll: groups, and blocks of a group, per iteration of their scans (speed only).
      dtype: dtype of the computation; parameters and the returned velocity are float32.
      scan: see `transformer.Stack`.
      fused: whether the sampler's evaluations run the kernels of `models.fused` (speed only).
      radius: R of the sphere of the tokens; None stands for √d, and for tokens on no sphere.
      prior_scale: s, the standard deviation of x₀ and of all noise of a solver.

    Raises:
      ValueError: groups does not divide depth, or the path refuses radius or prior_scale.
    """

    PATH: ClassVar[type[paths.Straight | paths.Geodesic]] = paths.Straight

    latent_dim: int
    width: int
    depth: int
    groups: int
    remat: bool = False
    unroll: int = 1
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    fused: bool = False
    radius: float | None = None
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        self.path()
        if self.depth % self.groups:
            raise ValueError(
                f'{self.groups} adaLN groups do not divide the {self.depth} blocks of the flow head'
            )
        super().__post_init__()

    @nn.nowrap
    def path(self) -> paths.Path:
        """Makes the paths from noise to tokens."""
        return self.PATH(self.latent_dim, self.radius, self.prior_scale)

    def setup(self) -> None:
        self.time1 = nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype)
        self.time2 = nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype)
        self.cond_embed = nn.Dense(self.width, kernel_init=XAVIER, dtype=self.dtype)
        self.input_proj = nn.Dense(self.width, kernel_init=XAVIER, dtype=self.dtype)
        arguments = (self.width, self.depth // self.groups, self.unroll, self.dtype, self.scan)
        if self.scan:
            group = nn.remat(Group, prevent_cse=False) if self.remat else Group
            groups = transformer.scanned(group, self.groups, self.unroll, 'groups')
            self.res_groups = groups(*arguments)
        else:
            self.res_groups = [Group(*arguments) for _ in range(self.groups)]
        self.final_ada = nn.DenseGeneral((2, self.width), kernel_init=ZERO, dtype=self.dtype)
        self.final_norm = nn.LayerNorm(
            EPS, use_scale=False, use_bias=False, use_fast_variance=False, dtype=self.dtype
        )
        self.final_linear = nn.Dense(self.latent_dim, kernel_init=ZERO, dtype=self.dtype)

    def embed_time(self, *times: jax.Array) -> jax.Array:
        """Embedding (..., M) of the time t.

        Args:
          *times: t (...) in [0, 1] alone; a head that extends this one may take more.
        """
        (t,) = times
        return self.time2(nn.silu(self.time1(time_sinusoid(t))))

    def embed_condition(self, c: jax.Array) -> jax.Array:
        """Embedding (N, M) of the condition c (N, D)."""
        return self.cond_embed(c)

    def _output(self, x: jax.Array, modulation: Modulation) -> jax.Array:
        """The last layer: x (N, M) → velocity (N, d) float32."""
        scale, shift = modulation
        return self.final_linear(self.final_norm(x) * (1 + scale) + shift).astype(jnp.float32)

    def __call__(self, x: jax.Array, t_emb: jax.Array, c_emb: jax.Array) -> jax.Array:
        """Velocity (N, d) float32 from embeddings.

        Args:
          x: (N, d) float32.
          t_emb: (N, M) or (M,), see `embed_time`.
          c_emb: (N, M), see `embed_condition`.
        """
        y = nn.silu(jnp.broadcast_to(t_emb, c_emb.shape) + c_emb)
        x = self.input_proj(x)
        groups = [self.res_groups] if self.scan else self.res_groups
        for group in groups:
            x, _ = group(x, y)
        return self._output(x, _parts(self.final_ada(y)))

    def modulation(self, t_emb: jax.Array, c_emb: jax.Array) -> PyTree:
        """Computes all adaLN modulations, for every pair of a time and a condition.

        It needs scan=False.

        Args:
          t_emb: (E, M), see `embed_time`.
          c_emb: (N, M), see `embed_condition`.

        Returns:
          A tree of arrays (E, N, M).
        """
        y = nn.silu(t_emb[:, None] + c_emb[None])
        groups = tuple(group.modulation(y) for group in self.res_groups)
        return groups, _parts(self.final_ada(y))

    def modulated(self, x: jax.Array, modulation: PyTree) -> jax.Array:
        """Computes the velocity under given modulations. It needs scan=False.

        Args:
          x: (N', d) float32, the first N' ≤ N rows.
          modulation: a tree of arrays (N, M), one time of what the method `modulation` returned.

        Returns:
          Velocity (N', d) float32.
        """
        groups, final = jax.tree.map(lambda a: a[: len(x)], modulation)
        x = self.input_proj(x)
        for group, part in zip(self.res_groups, groups, strict=True):
            x = group.modulated(x, part)
        return self._output(x, final)

    def velocity(self, x: jax.Array, c: jax.Array, *times: jax.Array) -> jax.Array:
        """v(x_t, t, c) in one call, (N, d) float32.

        Args:
          x: (N, d) float32.
          c: (N, D).
          *times: the arguments of `embed_time`, each (N,).
        """
        return self(x, self.embed_time(*times), self.embed_condition(c))

    def velocities(self, x_t: jax.Array, c: jax.Array, *times: jax.Array) -> jax.Array:
        """Velocities of m noisy copies of every token, (m, B, L, d) float32.

        Each condition is embedded once and used m times.

        Args:
          x_t: (m, B, L, d) float32.
          c: (B, L, D).
          *times: the arguments of `embed_time`, each (m, B, L).
        """
        c_emb = self.embed_condition(c)[:, None]
        # Images come first, so that a batch that is split over devices stays split.
        x_t = x_t.swapaxes(0, 1)
        by_image = [t.swapaxes(0, 1) for t in times]
        rows = x_t.shape[:-1]
        c_emb = jnp.broadcast_to(c_emb, (*rows, c_emb.shape[-1])).reshape(-1, c_emb.shape[-1])
        t_emb = self.embed_time(*(t.reshape(-1) for t in by_image))
        v = self(x_t.reshape(-1, self.latent_dim), t_emb, c_emb)
        return v.reshape(x_t.shape).swapaxes(0, 1)

    def draws(self, keys: jax.Array, shape: tuple[int, int, int]) -> PyTree:
        """The random draws of `loss`.

        Args:
          keys: (B,) PRNG keys, one for each image.
          shape: (m, L, d).

        Returns:
          (t_normal (m, B, L), noise (m, B, L, d)), standard normal.
        """

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            key_t, key_noise = jax.random.split(key)
            return jax.random.normal(key_t, shape[:-1]), jax.random.normal(key_noise, shape)

        return jax.vmap(draw, out_axes=1)(keys)

    def example(self, shape: tuple[int, int, int]) -> PyTree:
        """Draws of one image, all zero.

        Args:
          shape: (m, L, d).
        """
        m, L, d = shape
        return jnp.zeros((m, 1, L)), jnp.zeros((m, 1, L, d))

    def loss(
        self, c: jax.Array, z: jax.Array, draws: PyTree
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Flow-matching loss of every token given its condition: mean (v(x_t, t, c) − u_t)².

        Here t = sigmoid(t_normal), and x_t and u_t are point and velocity of the head's path from
        x₀ to z. A straight path has x_t = (1 − t)·ε + t·z and u_t = z − ε. Every token has m noisy
        copies, which share its condition. The path gives the loss its weight. See
        `docs/method.md`, "Flow loss".

        Args:
          c: (B, L, D) conditions.
          z: (B, L, d) tokens; no gradient flows into them.
          draws: (t_normal, ε) of the method `draws`.

        Returns:
          (loss, scalars): the loss () float32, and the path's scalars of the predicted ends.
        """
        path = self.path()
        t_normal, noise = draws
        z = jax.lax.stop_gradient(z)
        t = jax.nn.sigmoid(t_normal)
        copies = jnp.broadcast_to(z, noise.shape)
        x_t, u_t = path.interpolate(path.start(noise), copies, t)
        v = path.along(x_t, self.velocities(x_t, c, t))
        end = path.move(x_t, (1 - t[..., None]) * v)
        loss, scalars = self._scored(jnp.square(v - u_t), end, copies)
        return path.weighted(loss), scalars

    def _scored(
        self, error: jax.Array, end: jax.Array, z: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss, not weighted yet, and scalars for the log.

        Args:
          error: squared errors of the velocities (m, B, L, d).
          end: predicted tokens (m, B, L, d).
          z: the tokens, in the same shape.
        """
        return jnp.mean(error), self.path().scalars(end, z)

    def _times(self, tables: solvers.Table) -> tuple[jax.Array, ...]:
        """The arguments of `embed_time` for all evaluations of solver tables."""
        return (jnp.asarray(tables.t),)

    def prepare(self, params: PyTree, plan: Plan) -> Solver:
        """What `draw_token` needs of a plan and does not depend on the token.

        Args:
          params: parameters of this head.
          plan: what every token's solver does.

        Returns:
          The solver, in which every array has a leading axis of the plan's tables.
        """
        tables = plan.tables
        t_emb = self.apply({'params': params}, *self._times(tables), method='embed_time')
        return Solver(
            jnp.asarray(tables.t), jnp.asarray(tables.weights), jnp.asarray(plan.count), t_emb
        )

    @nn.nowrap
    def evaluator(self, params: PyTree, c_emb: jax.Array) -> Evaluator:
        """Makes the functions that evaluate the head in the sampler; needs scan=False.

        With `fused` they compute the network of this class by the kernels of `models.fused`. A head
        with another network overrides this method.

        Args:
          params: parameters of this head.
          c_emb: (R, M), see `embed_condition`.
        """
        variables = {'params': params}

        def modulate(t_emb: jax.Array) -> PyTree:
            return self.apply(variables, t_emb, c_emb, method='modulation')

        def evaluate(x: jax.Array, modulation: PyTree) -> jax.Array:
            return self.apply(variables, x, modulation, method='modulated')

        if not self.fused:
            return Evaluator(modulate, solvers.element, evaluate)
        params = transformer.cast_kernels(params, self.dtype)
        joined = flow_head.join(params)

        def modulate_all(t_emb: jax.Array) -> jax.Array:
            return flow_head.modulation_table(joined, t_emb, c_emb)

        def take(table: jax.Array, i: jax.Array) -> Modulations:
            return Modulations(table, jnp.reshape(i, (1,)).astype(jnp.int32))

        def evaluate_fused(x: jax.Array, modulations: Modulations) -> jax.Array:
            return flow_head.velocity(params, x, modulations)

        return Evaluator(modulate_all, take, evaluate_fused)

    def draw_token(
        self,
        params: PyTree,
        c: jax.Array,
        noise: jax.Array,
        solver: Solver,
        guidance: Guidance | None,
    ) -> jax.Array:
        """Integrates the flow of one token for every row; needs scan=False.

        The sampler projects the result. See `docs/method.md`, "Sampling".

        Args:
          params: parameters of this head.
          c: (R, D) conditions; with guidance, conditional rows come first, then null rows.
          noise: (n, R, d) standard normal, for x₀ and for the steps of a stochastic solver.
          solver: one table of `prepare`, without the leading axis.
          guidance: how the two kinds of rows act together; None evaluates all rows alike.

        Returns:
          z (R, d) float32.
        """
        variables = {'params': params}
        path = self.path()
        E = len(solver.t)
        c_emb = self.apply(variables, c, method='embed_condition')
        modulate, take_modulation, evaluate = self.evaluator(params, c_emb)

        def prepare(index: jax.Array) -> tuple[PyTree, jax.Array]:
            """Modulations of the evaluations, and whether they are guided."""
            index = jnp.minimum(index, E - 1)
            t = solver.t[index]
            inside = jnp.zeros_like(t, bool) if guidance is None else guidance.guides_at(t)
            return modulate(solver.t_emb[index]), inside

        def take(prepared: tuple[PyTree, jax.Array], i: jax.Array) -> tuple[PyTree, jax.Array]:
            modulations, inside = prepared
            return take_modulation(modulations, i), solvers.element(inside, i)

        def velocity(x: jax.Array, prepared: tuple[PyTree, jax.Array]) -> jax.Array:
            modulation, inside = prepared
            if guidance is None:
                return evaluate(x, modulation)
            return _guided_velocity(evaluate, guidance, inside, x, modulation)

        return solvers.integrate(
            velocity,
            path.start(noise[0]),
            (solver.t, solver.weights),
            noise[1:] if len(noise) > 1 else None,
            count=solver.count,
            prepare=prepare,
            chunk=chunk_size(E, len(c), self.fused),
            take=take,
            advance=path.step,
        )


def _guided_velocity(
    evaluate: Callable[[jax.Array, PyTree], jax.Array],
    guidance: Guidance,
    inside: jax.Array,
    x: jax.Array,
    modulation: PyTree,
) -> jax.Array:
    """The velocities (R, d) that conditional and null rows follow at one evaluation.

    `evaluate` is a function (x, modulation) → velocity of the first rows, given by x. `inside` ()
    bool says whether the evaluation's time lies in the interval of the guidance.
    """

    def guided(x: jax.Array, modulation: PyTree) -> jax.Array:
        return guidance.combine(evaluate(x, modulation))

    def unguided(x: jax.Array, modulation: PyTree) -> jax.Array:
        """Null rows follow the conditional ones, without an evaluation of their own."""
        v = evaluate(x[: len(x) // 2], modulation)
        return jnp.concatenate([v, v])

    if guidance.interval is None:
        return guided(x, modulation)
    # Outside the interval this branch runs because some image goes apart. Scale 1 leaves the others
    # without guidance.
    guidance = guidance._replace(scale=jnp.where(inside, guidance.scale, 1.0))
    return jax.lax.cond(inside | jnp.any(guidance.apart), guided, unguided, x, modulation)
