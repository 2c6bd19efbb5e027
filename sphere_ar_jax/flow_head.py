"""The flow head: an MLP that gives the velocity v(x_t, t, c) of one token's rectified flow (spec §6).

Dimensions:
  N    rows, i.e. tokens (of any images)      d    latent dimension
  D    width of the condition                 M    width of the head
  G    adaLN groups, each of n residual blocks that share one (scale, shift, gate)
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.transformer import EPS, INIT

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
        h = nn.LayerNorm(EPS, use_fast_variance=False, dtype=self.dtype, name='norm')(x) * (1 + scale) + shift
        h = nn.DenseGeneral((2, int(1.5 * M)), kernel_init=XAVIER, dtype=self.dtype, name='w1')(h)
        h = nn.silu(h[..., 0, :]) * h[..., 1, :]
        return x + gate * nn.Dense(M, kernel_init=XAVIER, dtype=self.dtype, name='w2')(h), None


class Group(nn.Module):
    """n residual blocks under one adaLN modulation, a linear M → (scale, shift, gate) of y."""

    blocks: int
    unroll: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, y):
        M = x.shape[-1]
        modulation = nn.DenseGeneral((3, M), kernel_init=ZERO, dtype=self.dtype, name='ada')(y)
        scanned = nn.scan(
            ResBlock, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=nn.broadcast,
            length=self.blocks, unroll=min(self.unroll, self.blocks), metadata_params={nn.PARTITION_NAME: 'layers'},
        )  # fmt: skip
        return scanned(self.dtype, name='blocks')(x, tuple(modulation[..., i, :] for i in range(3)))


class FlowHead(nn.Module):
    """Velocity of the flow: v(x_t, t, c). `embed_time` and `embed_condition` are apart from `__call__` so that a
    sampler computes them once per step and once per token, not at every evaluation.

    Attributes:
      latent_dim: d. width: M. depth: residual blocks in all. groups: G, divides depth. unroll: scanned groups and
      blocks per iteration (speed only). dtype: of the computation; parameters and the returned velocity are float32.
    Raises ValueError where groups does not divide depth. Source: spec §6.
    """

    latent_dim: int
    width: int
    depth: int
    groups: int
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32

    def setup(self):
        if self.depth % self.groups:
            raise ValueError(f'{self.groups} adaLN groups do not divide the {self.depth} blocks of the flow head')
        dense = dict(dtype=self.dtype)
        self.time1 = nn.Dense(self.width, kernel_init=INIT, **dense)
        self.time2 = nn.Dense(self.width, kernel_init=INIT, **dense)
        self.cond_embed = nn.Dense(self.width, kernel_init=XAVIER, **dense)
        self.input_proj = nn.Dense(self.width, kernel_init=XAVIER, **dense)
        group = nn.remat(Group, prevent_cse=False) if self.remat else Group
        self.res_groups = nn.scan(
            group, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=nn.broadcast,
            length=self.groups, unroll=min(self.unroll, self.groups), metadata_params={nn.PARTITION_NAME: 'groups'},
        )(self.depth // self.groups, self.unroll, self.dtype)  # fmt: skip
        self.final_ada = nn.DenseGeneral((2, self.width), kernel_init=ZERO, **dense)
        self.final_norm = nn.LayerNorm(EPS, use_scale=False, use_bias=False, use_fast_variance=False, **dense)
        self.final_linear = nn.Dense(self.latent_dim, kernel_init=ZERO, **dense)

    def embed_time(self, t):
        """t (...) in [0, 1] → (..., M)."""
        return self.time2(nn.silu(self.time1(time_sinusoid(t))))

    def embed_condition(self, c):
        """c (N, D) → (N, M)."""
        return self.cond_embed(c)

    def __call__(self, x, t_emb, c_emb):
        """x (N, d) float32, t_emb (N, M) or (M,), c_emb (N, M) → velocity (N, d) float32."""
        y = nn.silu(jnp.broadcast_to(t_emb, c_emb.shape) + c_emb)
        h, _ = self.res_groups(self.input_proj(x), y)
        modulation = self.final_ada(y)
        h = self.final_norm(h) * (1 + modulation[..., 0, :]) + modulation[..., 1, :]
        return self.final_linear(h).astype(jnp.float32)

    def velocity(self, x, t, c):
        """v(x_t, t, c) in one call: x (N, d), t (N,), c (N, D) → (N, d) float32."""
        return self(x, self.embed_time(t), self.embed_condition(c))
