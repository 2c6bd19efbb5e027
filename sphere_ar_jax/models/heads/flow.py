"""The flow head: an MLP that gives the velocity v(x_t, t, c) of one token's rectified flow (spec §6).

Dimensions:
  N    rows, i.e. tokens (of any images)      d    latent dimension
  D    width of the condition                 M    width of the head
  G    adaLN groups, each of n residual blocks that share one (scale, shift, gate)
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.flow import path
from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.transformer import EPS, INIT

XAVIER = nn.initializers.xavier_uniform()
ZERO = nn.initializers.zeros
TIME_DIM = 256


def time_sinusoid(t, dim=TIME_DIM, period=10000.0):
    """[cos, sin] of t·1000 at the dim/2 frequencies period^(−i/(dim/2)). (...) → (..., dim) float32. Spec §6."""
    # exp of a float32 exponent, as the published weights were trained with: at 1000 rad its rounding shows
    freqs = np.exp(np.float32(-math.log(period)) * np.arange(dim // 2, dtype=np.float32) / (dim // 2))
    angles = 1000 * t.astype(jnp.float32)[..., None] * freqs.reshape(*(1,) * t.ndim, -1)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ResBlock(nn.Module):
    """x + gate · MLP(LayerNorm(x)·(1 + scale) + shift), the MLP a SwiGLU M → 1.5M → M with biases. (N, M) → (N, M)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, modulation):
        scale, shift, gate = modulation
        M = x.shape[-1]
        dense = dict(kernel_init=XAVIER, dtype=self.dtype, dot_general=transformer.product)
        h = nn.LayerNorm(EPS, use_fast_variance=False, dtype=self.dtype, name='norm')(x) * (1 + scale) + shift
        h = nn.DenseGeneral((2, int(1.5 * M)), name='w1', **dense)(h)
        h = nn.silu(h[..., 0, :]) * h[..., 1, :]
        return x + gate * nn.Dense(M, name='w2', **dense)(h), None


def _parts(ada):
    """(…, p, M) → p arrays (…, M)."""
    return tuple(ada[..., i, :] for i in range(ada.shape[-2]))


class Group(nn.Module):
    """n residual blocks under one adaLN modulation, a linear M → (scale, shift, gate) of y. (N, M) → (N, M)."""

    width: int
    depth: int
    unroll: int
    dtype: Any = jnp.float32
    scan: bool = True

    def setup(self):
        self.ada = nn.DenseGeneral((3, self.width), kernel_init=ZERO, dtype=self.dtype, dot_general=transformer.product)
        if self.scan:
            self.blocks = nn.scan(
                ResBlock, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=nn.broadcast,
                length=self.depth, unroll=min(self.unroll, self.depth), metadata_params={nn.PARTITION_NAME: 'layers'},
            )(self.dtype)  # fmt: skip
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


class FlowHead(nn.Module):
    """Velocity of the flow: v(x_t, t, c). What depends on time or condition alone has methods of its own, so that a
    sampler computes the embeddings once per step or token, and with scan=False the adaLN modulations of many
    steps in one large product.

    Attributes:
      latent_dim: d. width: M. depth: residual blocks in all. groups: G, divides depth. unroll: scanned groups and
      blocks per iteration (speed only). dtype: of the computation; parameters and the returned velocity are float32.
      scan: see `transformer.Stack`. average: the head gives the mean velocity over [t, t + h] and takes h as well, as
      a distilled one does (MeanFlow, arXiv 2505.13447); h's embedding is added to t's and starts at zero.
    Raises ValueError where groups does not divide depth. Source: spec §6.
    """

    latent_dim: int
    width: int
    depth: int
    groups: int
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32
    scan: bool = True
    average: bool = False

    def setup(self):
        if self.depth % self.groups:
            raise ValueError(f'{self.groups} adaLN groups do not divide the {self.depth} blocks of the flow head')
        dense = dict(dtype=self.dtype)
        self.time1 = nn.Dense(self.width, kernel_init=INIT, **dense)
        self.time2 = nn.Dense(self.width, kernel_init=INIT, **dense)
        if self.average:
            self.span1 = nn.Dense(self.width, kernel_init=INIT, **dense)
            self.span2 = nn.Dense(self.width, kernel_init=ZERO, **dense)
        self.cond_embed = nn.Dense(self.width, kernel_init=XAVIER, **dense)
        self.input_proj = nn.Dense(self.width, kernel_init=XAVIER, **dense)
        group = nn.remat(Group, prevent_cse=False) if self.remat else Group
        arguments = (self.width, self.depth // self.groups, self.unroll, self.dtype, self.scan)
        if self.scan:
            self.res_groups = nn.scan(
                group, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=nn.broadcast,
                length=self.groups, unroll=min(self.unroll, self.groups), metadata_params={nn.PARTITION_NAME: 'groups'},
            )(*arguments)  # fmt: skip
        else:
            self.res_groups = [Group(*arguments) for _ in range(self.groups)]
        self.final_ada = nn.DenseGeneral((2, self.width), kernel_init=ZERO, **dense)
        self.final_norm = nn.LayerNorm(EPS, use_scale=False, use_bias=False, use_fast_variance=False, **dense)
        self.final_linear = nn.Dense(self.latent_dim, kernel_init=ZERO, **dense)

    def embed_time(self, t, h=None):
        """t (...) in [0, 1], and with `average` the step's width h (...), → (..., M)."""
        if self.average != (h is not None):
            raise ValueError('the width h of the step is needed by a head of average velocity, and only by one')
        embedded = self.time2(nn.silu(self.time1(time_sinusoid(t))))
        return embedded + self.span2(nn.silu(self.span1(time_sinusoid(h)))) if self.average else embedded

    def embed_condition(self, c):
        """c (N, D) → (N, M)."""
        return self.cond_embed(c)

    def _output(self, x, modulation):
        scale, shift = modulation
        return self.final_linear(self.final_norm(x) * (1 + scale) + shift).astype(jnp.float32)

    def __call__(self, x, t_emb, c_emb):
        """x (N, d) float32, t_emb (N, M) or (M,), c_emb (N, M) → velocity (N, d) float32."""
        y = nn.silu(jnp.broadcast_to(t_emb, c_emb.shape) + c_emb)
        x = self.input_proj(x)
        for group in [self.res_groups] if self.scan else self.res_groups:
            x, _ = group(x, y)
        return self._output(x, _parts(self.final_ada(y)))

    def modulation(self, t_emb, c_emb):
        """All that x is modulated by: t_emb (E, M), c_emb (N, M) → a tree of arrays (E, N, M). Needs scan=False."""
        y = nn.silu(t_emb[:, None] + c_emb[None])
        return tuple(group.modulation(y) for group in self.res_groups), _parts(self.final_ada(y))

    def modulated(self, x, modulation):
        """`__call__` under one element of `modulation`: x (N, d), arrays (N, M) → velocity (N, d). Needs scan=False."""
        groups, final = modulation
        x = self.input_proj(x)
        for group, part in zip(self.res_groups, groups, strict=True):
            x = group.modulated(x, part)
        return self._output(x, final)

    def velocity(self, x, t, c, h=None):
        """v(x_t, t, c) in one call: x (N, d), t (N,), c (N, D), h (N,) with `average` → (N, d) float32."""
        return self(x, self.embed_time(t, h), self.embed_condition(c))


def flow_draws(keys, copies, num_tokens, d):
    """The draws of `flow_loss`, one key per image: (t_normal (m, B, L), noise (m, B, L, d)), standard normal."""

    def draw(key):
        key_t, key_noise = jax.random.split(key)
        return (
            jax.random.normal(key_t, (copies, num_tokens)),
            jax.random.normal(key_noise, (copies, num_tokens, d)),
        )

    return jax.vmap(draw, out_axes=1)(keys)


def flow_loss(ar, params, class_id, z, t_normal, noise):
    """Rectified-flow loss of every token given the ones before it: mean (v(x_t, t, c) − (z − noise))², float32.

    t = sigmoid(t_normal), x_t = (1 − t)·noise + t·z; each condition c is used for m noisy copies.

    Args:
      ar: `ar.AR`. params: its parameters. class_id: (B,) int32, labels already dropped. z: (B, L, d) tokens, no
      gradient flows into them. t_normal: (m, B, L), noise: (m, B, L, d): see `flow_draws`.
    Returns:
      (loss, scalars): loss () float32; scalars token_norm, the mean norm of the predicted data point
      x_t + (1 − t)·v before projection (a mean over possible tokens: within the sphere).
    Source: spec §6.
    """
    z = jax.lax.stop_gradient(z)
    t = jax.nn.sigmoid(t_normal)
    copies = jnp.broadcast_to(z, noise.shape)
    x_t = path.interpolate(noise, copies, t)
    v = ar.apply({'params': params}, class_id, z, x_t, t)
    loss = jnp.mean(jnp.square(v - path.target_velocity(noise, copies)))
    predicted = x_t + (1 - t[..., None]) * v
    return loss, dict(token_norm=jnp.mean(jnp.linalg.norm(predicted, axis=-1)))
