"""The transformer on the token grid, shared by `Hybrid` and `ViT` (`docs/method.md`, "Backbone").

Dimensions:
  B  images     H, W  token grid     D  width
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models import transformer

NUM_REGISTERS = 4


class GridTransformer(nn.Module):
    """Bidirectional transformer over the grid, with 4 learned register tokens in front.

    Attributes:
      depth: number of blocks.
      heads: number of heads; D/heads must be a multiple of 4 for the 2-D RoPE.
      remat: see `transformer.Stack`.
      unroll: see `transformer.Stack`.
      dtype: see `transformer.Block`.
    """

    depth: int
    heads: int
    remat: bool
    unroll: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, D) → (B, H, W, D) float32."""
        B, H, W, D = x.shape
        registers = self.param('registers', transformer.INIT, (NUM_REGISTERS, D))
        x = x.reshape(B, H * W, D).astype(jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(registers, (B, NUM_REGISTERS, D)), x], axis=1)
        angles = transformer.rope_table(H, W, NUM_REGISTERS, transformer.head_dim(D, self.heads))
        stack = transformer.Stack(
            self.depth, self.heads, False, self.remat, self.unroll, self.dtype, name='stack'
        )
        x, _ = stack(x, angles)
        return x[:, NUM_REGISTERS:].reshape(B, H, W, D)
