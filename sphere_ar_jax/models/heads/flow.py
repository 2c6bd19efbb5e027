"""The flow head: an MLP that gives the velocity v(x_t, t, c) of one token's rectified flow (paper
§3.3).

Dimensions:
  B    images        L    tokens of an image           m    noisy copies of every token while
  training N    rows, i.e. tokens (of any images)               R    rows of the sampler d    latent
  dimension      D    width of the condition      M    width of the head G    adaLN groups, each of
  n residual blocks that share one (scale, shift, gate) U    different solver tables      E
  evaluations of the head for a token, at most
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.flow import path, solvers
from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.flow.plan import Plan
from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.transformer import EPS, INIT

# Rows that one product of the head should have at least: below, it waits for its weights rather
# than computes.
PRODUCT_ROWS = 256
XAVIER = nn.initializers.xavier_uniform()
ZERO = nn.initializers.zeros
TIME_DIM = 256


def time_sinusoid(t, dim=TIME_DIM, period=10000.0):
    """[cos, sin] of t·1000 at the dim/2 frequencies period^(−i/(dim/2)). (...) → (..., dim)
    float32.
    """
    # exp of a float32 exponent, as the published weights were trained with: at 1000 rad its
    # rounding shows
    freqs = np.exp(
        np.float32(-math.log(period)) * np.arange(dim // 2, dtype=np.float32) / (dim // 2)
    )
    angles = 1000 * t.astype(jnp.float32)[..., None] * freqs.reshape(*(1,) * t.ndim, -1)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ResBlock(nn.Module):
    """x + gate · MLP(LayerNorm(x)·(1 + scale) + shift), the MLP a SwiGLU M → 1.5M → M with biases.
    (N, M) → (N, M).
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, modulation):
        scale, shift, gate = modulation
        M = x.shape[-1]
        dense = dict(kernel_init=XAVIER, dtype=self.dtype, dot_general=transformer.product)
        h = (
            nn.LayerNorm(EPS, use_fast_variance=False, dtype=self.dtype, name='norm')(x)
            * (1 + scale)
            + shift
        )
        h = nn.DenseGeneral((2, int(1.5 * M)), name='w1', **dense)(h)
        h = nn.silu(h[..., 0, :]) * h[..., 1, :]
        return x + gate * nn.Dense(M, name='w2', **dense)(h), None


def _parts(ada):
    """(…, p, M) → p arrays (…, M)."""
    return tuple(ada[..., i, :] for i in range(ada.shape[-2]))


class Group(nn.Module):
    """n residual blocks under one adaLN modulation, a linear M → (scale, shift, gate) of y. (N, M)
    → (N, M).
    """

    width: int
    depth: int
    unroll: int
    dtype: Any = jnp.float32
    scan: bool = True

    def setup(self):
        self.ada = nn.DenseGeneral(
            (3, self.width), kernel_init=ZERO, dtype=self.dtype, dot_general=transformer.product
        )
        if self.scan:
            self.blocks = transformer.scanned(ResBlock, self.depth, self.unroll, 'layers')(
                self.dtype
            )
        else:
            self.blocks = [ResBlock(self.dtype) for _ in range(self.depth)]

    def modulation(self, y):
        """y (…, M) → (scale, shift, gate), each (…, M)."""
        return _parts(self.ada(y))

    def modulated(self, x, modulation):
        """The blocks under a given modulation."""
        for block in [self.blocks] if self.scan else self.blocks:
            x, _ = block(x, modulation)
        return x

    def __call__(self, x, y):
        return self.modulated(x, self.modulation(y)), None


class Solver(NamedTuple):
    """What a sampler computes once for all tokens: the solver tables with the embeddings of their
    times.

    Attributes:
      t: (U, E) times. weights: (U, E, 2, 4). count: (U,) evaluations. t_emb: (U, E, M).
    """

    t: jax.Array
    weights: jax.Array
    count: jax.Array
    t_emb: jax.Array


def chunk_size(evaluations: int, rows: int) -> int:
    """Evaluations of a token whose modulations are one product, for so many rows of the sampler on
    a device.
    """
    products = -(-evaluations // max(1, PRODUCT_ROWS // rows))
    return -(-evaluations // products)


class FlowHead(nn.Module):
    """Velocity of the flow: v(x_t, t, c).

    What depends on time or condition alone has methods of its own. A sampler thereby computes the
    embeddings once per step or token, and with scan=False the adaLN modulations of many steps in
    one large product.

    Attributes:
      latent_dim: d. width: M. depth: residual blocks in all. groups: G, divides depth. unroll:
        scanned groups and
      blocks per iteration (speed only). dtype: of the computation; parameters and the returned
        velocity are float32.
      scan: see `transformer.Stack`.
    Raises ValueError where groups does not divide depth.
    """

    latent_dim: int
    width: int
    depth: int
    groups: int
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32
    scan: bool = True

    def setup(self):
        if self.depth % self.groups:
            raise ValueError(
                f'{self.groups} adaLN groups do not divide the {self.depth} blocks of the flow head'
            )
        self.time1 = nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype)
        self.time2 = nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype)
        self.cond_embed = nn.Dense(self.width, kernel_init=XAVIER, dtype=self.dtype)
        self.input_proj = nn.Dense(self.width, kernel_init=XAVIER, dtype=self.dtype)
        group = nn.remat(Group, prevent_cse=False) if self.remat else Group
        arguments = (self.width, self.depth // self.groups, self.unroll, self.dtype, self.scan)
        if self.scan:
            self.res_groups = transformer.scanned(group, self.groups, self.unroll, 'groups')(
                *arguments
            )
        else:
            self.res_groups = [Group(*arguments) for _ in range(self.groups)]
        self.final_ada = nn.DenseGeneral((2, self.width), kernel_init=ZERO, dtype=self.dtype)
        self.final_norm = nn.LayerNorm(
            EPS, use_scale=False, use_bias=False, use_fast_variance=False, dtype=self.dtype
        )
        self.final_linear = nn.Dense(self.latent_dim, kernel_init=ZERO, dtype=self.dtype)

    def embed_time(self, t: jax.Array) -> jax.Array:
        """t (...) in [0, 1] → (..., M)."""
        return self.time2(nn.silu(self.time1(time_sinusoid(t))))

    def embed_condition(self, c: jax.Array) -> jax.Array:
        """c (N, D) → (N, M)."""
        return self.cond_embed(c)

    def _output(self, x, modulation):
        scale, shift = modulation
        return self.final_linear(self.final_norm(x) * (1 + scale) + shift).astype(jnp.float32)

    def __call__(self, x: jax.Array, t_emb: jax.Array, c_emb: jax.Array) -> jax.Array:
        """x (N, d) float32, t_emb (N, M) or (M,), c_emb (N, M) → velocity (N, d) float32."""
        y = nn.silu(jnp.broadcast_to(t_emb, c_emb.shape) + c_emb)
        x = self.input_proj(x)
        for group in [self.res_groups] if self.scan else self.res_groups:
            x, _ = group(x, y)
        return self._output(x, _parts(self.final_ada(y)))

    def modulation(self, t_emb: jax.Array, c_emb: jax.Array) -> Any:
        """All that x is modulated by: t_emb (E, M), c_emb (N, M) → a tree of arrays (E, N, M).
        Needs scan=False.
        """
        y = nn.silu(t_emb[:, None] + c_emb[None])
        return tuple(group.modulation(y) for group in self.res_groups), _parts(self.final_ada(y))

    def modulated(self, x: jax.Array, modulation: Any) -> jax.Array:
        """`__call__` under one element of `modulation`: x (N, d), arrays (N, M) → velocity (N, d).
        Needs scan=False.
        """
        groups, final = modulation
        x = self.input_proj(x)
        for group, part in zip(self.res_groups, groups, strict=True):
            x = group.modulated(x, part)
        return self._output(x, final)

    def velocity(self, x: jax.Array, c: jax.Array, *times: jax.Array) -> jax.Array:
        """v(x_t, t, c) in one call: x (N, d), c (N, D), and the arguments (N,) of `embed_time` →
        (N, d) float32.
        """
        return self(x, self.embed_time(*times), self.embed_condition(c))

    def velocities(self, x_t: jax.Array, c: jax.Array, *times: jax.Array) -> jax.Array:
        """Velocities of m noisy copies of every token; each condition is embedded once and used m
        times.

        Args:
          x_t: (m, B, L, d). c: (B, L, D). times: the arguments of `embed_time`, each (m, B, L).
        Returns:
          v (m, B, L, d) float32.
        """
        c_emb = self.embed_condition(c)[:, None]
        x_t = x_t.swapaxes(0, 1)  # images first: so a batch stays split
        times = [t.swapaxes(0, 1) for t in times]
        rows = x_t.shape[:-1]
        c_emb = jnp.broadcast_to(c_emb, (*rows, c_emb.shape[-1])).reshape(-1, c_emb.shape[-1])
        t_emb = self.embed_time(*(t.reshape(-1) for t in times))
        v = self(x_t.reshape(-1, self.latent_dim), t_emb, c_emb)
        return v.reshape(x_t.shape).swapaxes(0, 1)

    def draws(self, keys: jax.Array, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
        """The draws of `loss`, one key for each image: keys (B,).

        Args:
          shape: (m, L, d).
        Returns:
          (t_normal (m, B, L), noise (m, B, L, d)), standard normal.
        """

        def draw(key):
            key_t, key_noise = jax.random.split(key)
            return jax.random.normal(key_t, shape[:-1]), jax.random.normal(key_noise, shape)

        return jax.vmap(draw, out_axes=1)(keys)

    def example(self, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
        """Draws of one image, all zero; shape (m, L, d)."""
        m, L, d = shape
        return jnp.zeros((m, 1, L)), jnp.zeros((m, 1, L, d))

    def loss(
        self, c: jax.Array, z: jax.Array, draws: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rectified-flow loss of every token given its condition: mean (v(x_t, t, c) − (z −
        noise))².

        t = sigmoid(t_normal) and x_t = (1 − t)·noise + t·z; each condition is used for m noisy
        copies.

        Args:
          c: (B, L, D) conditions. z: (B, L, d) tokens; no gradient flows into them. draws: see
            `draws`.
        Returns:
          (loss, scalars): loss () float32; scalars token_norm, the mean norm of the predicted data
            point
          x_t + (1 − t)·v before projection (a mean over possible tokens: within the sphere).
        """
        t_normal, noise = draws
        z = jax.lax.stop_gradient(z)
        t = jax.nn.sigmoid(t_normal)
        copies = jnp.broadcast_to(z, noise.shape)
        x_t = path.interpolate(noise, copies, t)
        v = self.velocities(x_t, c, t)
        loss = jnp.mean(jnp.square(v - path.target_velocity(noise, copies)))
        predicted = x_t + (1 - t[..., None]) * v
        return loss, {'token_norm': jnp.mean(jnp.linalg.norm(predicted, axis=-1))}

    def _times(self, tables: solvers.Table) -> tuple[jax.Array, ...]:
        """The arguments of `embed_time` that belong to solver tables."""
        return (jnp.asarray(tables.t),)

    def prepare(self, params: Any, plan: Plan) -> Solver:
        """What `draw_token` needs of a plan and does not depend on the token, with a leading axis
        of tables.
        """
        tables = plan.tables
        t_emb = self.apply({'params': params}, *self._times(tables), method='embed_time')
        return Solver(
            jnp.asarray(tables.t), jnp.asarray(tables.weights), jnp.asarray(plan.count), t_emb
        )

    def draw_token(
        self, params: Any, c: jax.Array, noise: jax.Array, solver: Solver, guidance: Guidance | None
    ) -> jax.Array:
        """Integrate the flow of one token for every row; the sampler projects the result. Needs
        scan=False.

        Args:
          params: of this head. c: (R, D) conditions; with guidance conditional rows, then null
            rows.
          noise: (n, R, d) standard normal, x₀ and the noise of a stochastic solver's steps.
          solver: one table of `prepare`, without the leading axis. guidance: None evaluates all
            rows alike.
        Returns:
          z (R, d) float32.
        """
        variables = {'params': params}
        half = len(c) // 2
        E = len(solver.t)
        c_emb = self.apply(variables, c, method='embed_condition')
        low, high = (
            (0.0, 1.0) if guidance is None or guidance.interval is None else guidance.interval
        )
        end = high if high < 1 else math.inf  # Heun's last evaluation is at t = 1

        def evaluate(x, modulation):
            return self.apply(variables, x, modulation, method='modulated')

        def prepare(index):
            index = jnp.minimum(index, E - 1)
            modulation = self.apply(variables, solver.t_emb[index], c_emb, method='modulation')
            return modulation, (low <= solver.t[index]) & (solver.t[index] < end)

        def guided(x, modulation):
            return guidance.combine(evaluate(x, modulation))

        def unguided(x, modulation):
            v = evaluate(x[:half], jax.tree.map(lambda a: a[:half], modulation))
            return jnp.concatenate([v, v])

        def velocity(x, prepared):
            modulation, inside = prepared
            if guidance is None:
                return evaluate(x, modulation)
            if guidance.interval is None:
                return guided(x, modulation)
            return jax.lax.cond(inside | guidance.apart, guided, unguided, x, modulation)

        return solvers.integrate(
            velocity,
            noise[0],
            solver.weights,
            noise[1:] if len(noise) > 1 else None,
            count=solver.count,
            prepare=prepare,
            chunk=chunk_size(E, len(c)),
        )
