"""The bidirectional transformer of the tokenizer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sphere_ar_jax.models import transformer

NUM_REGISTERS = 4


class ViT(nn.Module):
    """Bidirectional transformer over the grid with 4 learned register tokens in front. (B, H, W, D)
    → same, float32.
    """

    depth: int
    heads: int
    remat: bool
    unroll: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        B, H, W, D = x.shape
        registers = self.param('registers', transformer.INIT, (NUM_REGISTERS, D))
        x = x.reshape(B, H * W, D).astype(jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(registers, (B, NUM_REGISTERS, D)), x], axis=1)
        angles = transformer.rope_table(H, W, NUM_REGISTERS, transformer.head_dim(D, self.heads))
        x, _ = transformer.Stack(
            self.depth, self.heads, False, self.remat, self.unroll, self.dtype, name='stack'
        )(x, angles)
        return x[:, NUM_REGISTERS:].reshape(B, H, W, D)
