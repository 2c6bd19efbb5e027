"""The causal transformer over class tokens and past tokens, with its flow head (spec §5).

Dimensions:
  B    images               L    tokens of an image (grid H × W, raster order)
  C    class tokens         D    width, N heads of K = D/N
  d    latent dimension     S = C + L − 1, the length of the sequence and of the cache
Class ids run from 0 to num_classes − 1; num_classes itself is the null class.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.heads import flow

# Sizes of the published models; everything else is `AR`'s default.
VARIANTS = {
    'B': dict(depth=24, heads=12, width=768, head_depth=6, head_width=768, head_groups=2),
    'L': dict(depth=32, heads=16, width=1024, head_depth=8, head_width=1024, head_groups=2),
    'H': dict(depth=40, heads=20, width=1280, head_depth=12, head_width=1280, head_groups=3),
}


class AR(nn.Module):
    """SphereAR without its tokenizer. `AR(**VARIANTS['L'])` is the published L at 256×256.

    Attributes:
      depth, heads, width: of the transformer. head_depth, head_width, head_groups: of the flow head.
      num_classes, class_tokens (C), grid (H, W), latent_dim (d).
      remat, unroll, scan: see `transformer.Stack`. average: see `flow.FlowHead`. dtype: of the computation;
      parameters are float32.
    """

    depth: int
    heads: int
    width: int
    head_depth: int
    head_width: int
    head_groups: int
    num_classes: int = 1000
    class_tokens: int = 16
    grid: tuple = (16, 16)
    latent_dim: int = 16
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32
    scan: bool = True
    average: bool = False

    def setup(self):
        shape = (self.num_classes + 1, self.class_tokens, self.width)
        self.cls_embedding = self.param('cls_embedding', transformer.INIT, shape)
        self.proj_in = nn.Dense(self.width, kernel_init=transformer.INIT, dtype=self.dtype)
        self.emb_norm = transformer.RMSNorm()
        self.stack = transformer.Stack(self.depth, self.heads, True, self.remat, self.unroll, self.dtype, self.scan)
        self.norm = transformer.RMSNorm()
        self.pos_for_diff = self.param('pos_for_diff', transformer.INIT, (self.num_tokens, self.width))
        self.head = flow.FlowHead(
            self.latent_dim, self.head_width, self.head_depth, self.head_groups, self.remat, self.unroll, self.dtype,
            self.scan, self.average,
        )  # fmt: skip

    @property
    def num_tokens(self):
        """L = H·W."""
        return self.grid[0] * self.grid[1]

    def _angles(self):
        head_dim = transformer.head_dim(self.width, self.heads)
        return jnp.asarray(transformer.rope_table(*self.grid, self.class_tokens, head_dim)[:-1])

    def embed(self, class_id, z):
        """The joint sequence after `emb_norm`: class tokens of class_id (B,), z (B, T, d) → (B, C + T, D) float32."""
        classes = jnp.take(self.cls_embedding, class_id, axis=0)
        return self.emb_norm(jnp.concatenate([classes, self.proj_in(z).astype(jnp.float32)], axis=1))

    def condition(self, class_id, z):
        """Conditions c of all tokens in one pass, each from the class and the tokens before it.

        Args:
          class_id: (B,) int32. z: (B, L, d) tokens; the last one is not read.
        Returns:
          (B, L, D) float32.
        """
        x, _ = self.stack(self.embed(class_id, z[:, :-1]), self._angles())
        return self.norm(x[:, -self.num_tokens :]) + self.pos_for_diff[None]

    def prefill(self, class_id):
        """Reads the class tokens: class_id (B,) → condition of token 0 (B, D), the filled cache. Needs scan=False."""
        cache = transformer.empty_cache(
            self.depth, class_id.shape[0], self.class_tokens + self.num_tokens - 1, self.heads,
            self.width // self.heads, self.dtype,
        )  # fmt: skip
        x = self.embed(class_id, jnp.zeros((class_id.shape[0], 0, self.latent_dim)))
        x, cache = self.stack(x, self._angles()[: self.class_tokens], cache, 0, prefill=True)
        return self.norm(x[:, -1]) + self.pos_for_diff[:1], cache

    def decode_step(self, z, k, cache):
        """Feeds token k − 1, z (B, d), and returns the condition of token k (B, D) with the updated cache.

        k: () int, 1 ≤ k < L; it is clamped, not checked. Needs scan=False."""
        start = self.class_tokens + k - 1
        angles = jax.lax.dynamic_slice_in_dim(self._angles(), start, 1)
        x, cache = self.stack(self.emb_norm(self.proj_in(z[:, None])), angles, cache, start)
        return self.norm(x[:, 0]) + jnp.take(self.pos_for_diff, jnp.asarray(k)[None], axis=0), cache

    def embed_time(self, t, h=None):
        """`FlowHead.embed_time`."""
        return self.head.embed_time(t, h)

    def embed_condition(self, c):
        """`FlowHead.embed_condition`."""
        return self.head.embed_condition(c)

    def modulation(self, t_emb, c_emb):
        """`FlowHead.modulation`."""
        return self.head.modulation(t_emb, c_emb)

    def velocity(self, x, modulation):
        """`FlowHead.modulated`: the velocity under one element of `modulation`."""
        return self.head.modulated(x, modulation)

    def __call__(self, class_id, z, x_t, t, h=None):
        """Velocities of m noisy copies of every token, for training.

        Args:
          class_id: (B,) int32. z: (B, L, d) clean tokens. x_t: (m, B, L, d) noisy tokens. t: (m, B, L) in [0, 1].
          h: (m, B, L), the widths of the steps, for a head of average velocity and only for one.
        Returns:
          v (m, B, L, d) float32; each condition is computed once and used m times.
        """
        c_emb = self.head.embed_condition(self.condition(class_id, z))
        x_t, t, h = jax.tree.map(lambda a: a.swapaxes(0, 1), (x_t, t, h))  # images first: so a batch stays split
        v = self.head(
            x_t.reshape(-1, self.latent_dim),
            self.head.embed_time(t.reshape(-1), None if h is None else h.reshape(-1)),
            jnp.broadcast_to(c_emb[:, None], (*t.shape, c_emb.shape[-1])).reshape(-1, c_emb.shape[-1]),
        )
        return v.reshape(x_t.shape).swapaxes(0, 1)

    def init_params(self, key):
        """Fresh parameters from a PRNG key."""
        L, d = self.num_tokens, self.latent_dim
        z, t = jnp.zeros((1, L, d)), jnp.zeros((1, 1, L))
        return self.init(key, jnp.zeros(1, jnp.int32), z, z[None], t, t if self.average else None)['params']


def unstacked(ar, params):
    """The model and its parameters as sampling uses them: AR with scan=False, `transformer.unstack` of the parameters.

    Parameters that are so already stay as they are. Under jit the program copies them each time it runs; call this
    once, outside, where many batches are drawn.
    """
    if not ar.scan:
        return ar, params
    return ar.clone(scan=False), jax.jit(transformer.unstack)(params)
