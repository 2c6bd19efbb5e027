"""The causal transformer over the condition's tokens and past tokens, and its head (paper §3.3).

Dimensions:
  B    images                       L    tokens of an image (grid H × W, raster order)
  C    tokens of the condition      D    width, N heads of K = D/N
  d    latent dimension             S = C + L − 1, the length of the sequence and of the cache
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.conditions import Classes, Condition, Labels
from sphere_ar_jax.models.heads import Draws, FlowHead, Head
from sphere_ar_jax.models.sizes import VARIANTS

__all__ = ['AR', 'VARIANTS', 'sphere_ar', 'unstacked']


class Positions(nn.Module):
    """The learned embedding (L, D) that tells a head which token it draws; its parameter stands
    beside the model's.
    """

    num_tokens: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param('pos_for_diff', transformer.INIT, (self.num_tokens, self.width))


class AR(nn.Module):
    """SphereAR without its tokenizer. `sphere_ar(**VARIANTS['L'])` is the published L at 256×256.

    Attributes:
      depth, heads, width: of the transformer. condition: see `conditions`. head: see `heads`. grid:
        (H, W).
      latent_dim: d. remat, unroll, scan: see `transformer.Stack`. dtype: of the computation;
        parameters are float32.
    """

    depth: int
    heads: int
    width: int
    condition: Condition
    head: Head
    grid: tuple[int, int] = (16, 16)
    latent_dim: int = 16
    remat: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32
    scan: bool = True

    def setup(self):
        nn.share_scope(self, self.condition)
        self.proj_in = nn.Dense(self.width, kernel_init=transformer.INIT, dtype=self.dtype)
        self.emb_norm = transformer.RMSNorm()
        self.stack = transformer.Stack(
            self.depth, self.heads, True, self.remat, self.unroll, self.dtype, self.scan
        )
        self.norm = transformer.RMSNorm()
        self.positions = Positions(self.num_tokens, self.width)
        nn.share_scope(self, self.positions)

    @property
    def num_tokens(self) -> int:
        """L = H·W."""
        return self.grid[0] * self.grid[1]

    def _angles(self):
        head_dim = transformer.head_dim(self.width, self.heads)
        return jnp.asarray(transformer.rope_table(*self.grid, self.condition.length, head_dim)[:-1])

    def embed(self, labels: Labels, z: jax.Array) -> jax.Array:
        """The joint sequence after `emb_norm`: the condition's tokens, then z (B, T, d) → (B, C +
        T, D) float32.
        """
        past = self.proj_in(z).astype(jnp.float32)
        return self.emb_norm(jnp.concatenate([self.condition.embed(labels), past], axis=1))

    def conditions(self, labels: Labels, z: jax.Array) -> jax.Array:
        """Conditions c of all tokens in one pass, each from the labels and the tokens before it.

        Args:
          labels: of B images. z: (B, L, d) tokens; the last one is not read.
        Returns:
          (B, L, D) float32.
        """
        x, _ = self.stack(self.embed(labels, z[:, :-1]), self._angles())
        return self.norm(x[:, -self.num_tokens :]) + self.positions()[None]

    def prefill(self, labels: Labels) -> tuple[jax.Array, Any]:
        """Read the condition: labels of B images → condition of token 0 (B, D), the filled cache.
        Needs scan=False.
        """
        B = len(jax.tree.leaves(labels)[0])
        length = self.condition.length + self.num_tokens - 1
        cache = transformer.empty_cache(
            self.depth, B, length, self.heads, self.width // self.heads, self.dtype
        )
        x = self.embed(labels, jnp.zeros((B, 0, self.latent_dim)))
        x, cache = self.stack(x, self._angles()[: self.condition.length], cache, 0, prefill=True)
        return self.norm(x[:, -1]) + self.positions()[:1], cache

    def decode_step(self, z: jax.Array, k: jax.Array | int, cache: Any) -> tuple[jax.Array, Any]:
        """Feed token k − 1, z (B, d), and return the condition of token k (B, D) with the updated
        cache.

        Args:
          k: () int, 1 ≤ k < L; it is clamped, not checked. Needs scan=False.
        """
        start = self.condition.length + k - 1
        angles = jax.lax.dynamic_slice_in_dim(self._angles(), start, 1)
        x, cache = self.stack(self.emb_norm(self.proj_in(z[:, None])), angles, cache, start)
        return self.norm(x[:, 0]) + jnp.take(self.positions(), jnp.asarray(k)[None], axis=0), cache

    def loss(
        self, labels: Labels, z: jax.Array, draws: Draws
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The head's (loss, scalars) of clean tokens z (B, L, d), each given the labels and the
        tokens before it.
        """
        return self.head.loss(self.conditions(labels, z), z, draws)

    def __call__(
        self, labels: Labels, z: jax.Array, x_t: jax.Array, *times: jax.Array
    ) -> jax.Array:
        """Velocities of m noisy copies of every token, from a head that has them
        (`FlowHead.velocities`).

        Args:
          labels: of B images. z: (B, L, d) clean tokens. x_t: (m, B, L, d) noisy tokens. times:
            each (m, B, L), t in
          [0, 1], and for mean velocities the widths h of the steps.
        Returns:
          v (m, B, L, d) float32.
        """
        return self.head.velocities(x_t, self.conditions(labels, z), *times)

    def apart(self) -> 'AR':
        """The same model with scan=False, as sampling needs it."""
        return self.clone(scan=False, head=self.head.clone(scan=False))

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters from a PRNG key."""
        z = jnp.zeros((1, self.num_tokens, self.latent_dim))
        draws = self.head.example((1, self.num_tokens, self.latent_dim))
        return self.init(key, self.condition.example(), z, draws, method='loss')['params']


def sphere_ar(
    depth: int,
    heads: int,
    width: int,
    head_depth: int,
    head_width: int,
    head_groups: int,
    num_classes: int = 1000,
    class_tokens: int = 16,
    grid: tuple[int, int] = (16, 16),
    latent_dim: int = 16,
    remat: bool = False,
    unroll: int = 1,
    dtype: Any = jnp.float32,
) -> AR:
    """The published composition, class tokens in front and a flow head, from flat sizes such as
    `VARIANTS['B']`.
    """
    speed = {'remat': remat, 'unroll': unroll, 'dtype': dtype}
    condition = Classes(num_classes, class_tokens, width)
    head = FlowHead(latent_dim, head_width, head_depth, head_groups, **speed)
    return AR(depth, heads, width, condition, head, tuple(grid), latent_dim, **speed)


def unstacked(ar: AR, params: Any) -> tuple[AR, Any]:
    """The model and its parameters as sampling uses them: scan=False, `transformer.unstack` of the
    parameters.

    Parameters that are so already stay as they are. Under jit the program copies them each time it
    runs; call this once, outside, where many batches are drawn.
    """
    if not ar.scan:
        return ar, params
    return ar.apart(), jax.jit(transformer.unstack)(params)
