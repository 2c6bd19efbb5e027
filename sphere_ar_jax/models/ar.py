"""The autoregressive model: a causal transformer and a head that draws tokens.

The transformer reads the condition's tokens and past tokens (paper §3.3; `docs/method.md`,
"Autoregressive model").

Dimensions:
  B    images                       L    tokens of an image (grid H × W, raster order)
  C    tokens of the condition      D    width, N heads of K = D/N
  d    latent dimension             S = C + L − 1, the length of the sequence and of the cache
"""

import functools
from typing import Any, Self, TypeAlias, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.cache import Cache, empty_caches
from sphere_ar_jax.models.conditions import Classes, Condition, Labels
from sphere_ar_jax.models.heads import Draws, FlowHead, Head
from sphere_ar_jax.models.sizes import VARIANTS
from sphere_ar_jax.runtime.types import PyTree

__all__ = ['AR', 'VARIANTS', 'sphere_ar', 'unstacked']

_Model = TypeVar('_Model', bound='AR')
Caches: TypeAlias = tuple[Cache, ...]  # one for each block


class AR(nn.Module):
    """SphereAR without its tokenizer.

    `sphere_ar(**VARIANTS['L'])` is the published L at 256×256 pixels.

    Attributes:
      depth: blocks of the transformer.
      heads: N.
      width: D.
      condition: see `conditions`.
      head: see `heads`.
      grid: (H, W) tokens.
      latent_dim: d, the numbers of a token, see `vae.VAE.token_dim`.
      remat: see `transformer.Stack`.
      unroll: see `transformer.Stack`.
      dtype: dtype of the computation; parameters are float32.
      scan: see `transformer.Stack`.
      fused: see `transformer.Stack`.
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
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    fused: bool = False

    def setup(self) -> None:
        nn.share_scope(self, self.condition)
        self.proj_in = nn.Dense(self.width, kernel_init=transformer.INIT, dtype=self.dtype)
        self.emb_norm = transformer.RMSNorm()
        self.stack = transformer.Stack(
            self.depth,
            self.heads,
            True,
            self.remat,
            self.unroll,
            self.dtype,
            self.scan,
            self.fused,
        )
        self.norm = transformer.RMSNorm()

    @nn.compact
    def positions(self) -> jax.Array:
        """Returns the learned embedding (L, D) that tells a head which token it draws."""
        return self.param('pos_for_diff', transformer.INIT, (self.num_tokens, self.width))

    @property
    def num_tokens(self) -> int:
        """Number L = H·W of an image's tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        """The head dimension K."""
        return transformer.head_dim(self.width, self.heads)

    @property
    def front(self) -> int:
        """Number C of the inputs in front of an image's tokens."""
        return self.condition.length

    def _angles(self) -> jax.Array:
        """Computes the rotary angles of the sequence, (S, K/2)."""
        table = transformer.rope_table(*self.grid, self.front, self.head_dim)
        return jnp.asarray(table[:-1])  # the last token is never an input

    def embed(self, labels: Labels, z: jax.Array) -> jax.Array:
        """Joins the condition's tokens and those of the images, and normalises them by `emb_norm`.

        Args:
          labels: labels of B images.
          z: (B, T, d) tokens.

        Returns:
          (B, C + T, D) float32.
        """
        past = self.proj_in(z).astype(jnp.float32)
        return self.emb_norm(jnp.concatenate([self.condition.embed(labels), past], axis=1))

    def conditions(self, labels: Labels, z: jax.Array) -> jax.Array:
        """Computes the conditions c of all tokens in one pass.

        The condition of a token depends on the labels and the tokens before it.

        Args:
          labels: labels of B images.
          z: (B, L, d) tokens. The last one is not read.

        Returns:
          (B, L, D) float32.
        """
        x, _ = self.stack(self.embed(labels, z[:, :-1]), self._angles())
        return self.norm(x[:, -self.num_tokens :]) + self.positions()[None]

    def cache(self, rows: int, length: int) -> Caches:
        """Makes an empty cache for sequences of `length` inputs."""
        return empty_caches(self.depth, rows, length, self.heads, self.head_dim, self.dtype)

    def prefill(self, labels: Labels) -> tuple[jax.Array, Caches]:
        """Reads the condition into a new cache. It needs scan=False.

        Args:
          labels: labels of B images.

        Returns:
          The condition of token 0, (B, D) float32, and the cache.
        """
        B = len(jax.tree.leaves(labels)[0])
        cache = self.cache(B, self.front + self.num_tokens - 1)
        x = self.embed(labels, jnp.zeros((B, 0, self.latent_dim)))
        x, cache = self.stack(x, self._angles()[: self.front], cache, 0, prefill=True)
        return self.norm(x[:, -1]) + self.positions()[:1], cache

    def decode_step(
        self, z: jax.Array, k: jax.Array | int, cache: Caches
    ) -> tuple[jax.Array, Caches]:
        """Feeds token k − 1 and returns the condition of token k. It needs scan=False.

        Args:
          z: token k − 1 of each image, (B, d).
          k: () int, 1 ≤ k < L; it is clamped, not checked.
          cache: the cache after token k − 2, or after `prefill`.

        Returns:
          The condition of token k, (B, D) float32, and the updated cache.
        """
        start = self.front + k - 1
        angles = jax.lax.dynamic_slice_in_dim(self._angles(), start, 1)
        x, cache = self.stack(self.emb_norm(self.proj_in(z[:, None])), angles, cache, start)
        position = jnp.take(self.positions(), jnp.asarray(k)[None], axis=0, mode='clip')
        c = self.norm(x[:, 0]) + position
        return c, cache

    def loss(
        self, labels: Labels, z: jax.Array, draws: Draws
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the head's loss of tokens, each given the labels and the tokens before it.

        Args:
          labels: labels of B images.
          z: (B, L, d) clean tokens.
          draws: the random draws of the head's loss.

        Returns:
          The loss () float32, and scalars () by their names.
        """
        return self.head.loss(self.conditions(labels, z), z, draws)

    def __call__(
        self, labels: Labels, z: jax.Array, x_t: jax.Array, *times: jax.Array
    ) -> jax.Array:
        """Computes velocities of m noisy copies of every token.

        The head must be a `FlowHead`, or another that has `FlowHead.velocities`.

        Args:
          labels: labels of B images.
          z: (B, L, d) clean tokens.
          x_t: (m, B, L, d) noisy tokens.
          *times: t in [0, 1], (m, B, L), and for mean velocities the widths h of the steps, (m, B,
            L).

        Returns:
          v (m, B, L, d) float32.
        """
        head = cast(FlowHead, self.head)
        return head.velocities(x_t, self.conditions(labels, z), *times)

    def apart(self) -> Self:
        """Returns the same model with scan=False, as sampling needs it."""
        return self.clone(scan=False, head=self.head.clone(scan=False))

    def keeping_activations(self) -> 'AR':
        """Returns the same model with remat=False."""
        head = self.head
        if hasattr(head, 'remat'):
            head = head.clone(remat=False)
        return self.clone(remat=False, head=head)

    def cast(self, params: PyTree) -> PyTree:
        """Returns the parameters with kernels in `dtype`, as dense layers read them.

        No result changes. A loop over tokens and evaluations reads them from memory each time, and
        XLA's compiler for GPUs leaves casts of float32 kernels within the loop. The condition's
        parameters stay as they are, and so do those of a head that is no `FlowHead`.
        """
        dtypes = {'proj_in': self.dtype, 'stack': self.dtype}
        if isinstance(self.head, FlowHead):
            dtypes['head'] = self.head.dtype
        own = {name: transformer.cast_kernels(params[name], dtypes[name]) for name in dtypes}
        return {**params, **own}

    def init_params(self, key: jax.Array) -> PyTree:
        """Makes fresh parameters from a PRNG key."""
        return _fresh(self, key)


# A run needs the shapes and the values of parameters in several places; JAX keeps what it traced.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _fresh(model: AR, key: jax.Array) -> PyTree:
    """The parameters of `AR.init_params`."""
    shape = (1, model.num_tokens, model.latent_dim)
    draws = model.head.example(shape)
    example = model.condition.example()
    return model.init(key, example, jnp.zeros(shape), draws, method='loss')['params']


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
    dtype: DTypeLike = jnp.float32,
) -> AR:
    """Makes the published composition: class tokens in front, and a flow head.

    Args:
      depth: see `AR`.
      heads: see `AR`.
      width: see `AR`.
      head_depth: residual blocks of the flow head.
      head_width: width of the flow head.
      head_groups: adaLN groups of the flow head.
      num_classes: number of the data's classes.
      class_tokens: C.
      grid: see `AR`.
      latent_dim: see `AR`.
      remat: see `transformer.Stack`.
      unroll: see `transformer.Stack`.
      dtype: see `AR`.

    Returns:
      The Flax module. The sizes of the published ones are in `VARIANTS`.
    """
    speed: dict[str, Any] = {'remat': remat, 'unroll': unroll, 'dtype': dtype}
    condition = Classes(num_classes, class_tokens, width)
    head = FlowHead(latent_dim, head_width, head_depth, head_groups, **speed)
    return AR(depth, heads, width, condition, head, tuple(grid), latent_dim, **speed)


def unstacked(ar: _Model, params: PyTree) -> tuple[_Model, PyTree]:
    """Brings the model and its parameters into the layout that sampling needs, scan=False.

    A model with scan=False and its parameters stay as they are. Under jit the program would copy
    the parameters each time it runs, so call this once, outside, where many batches are drawn.

    Args:
      ar: the model.
      params: its parameters.

    Returns:
      The model with scan=False, and its parameters after `transformer.unstack`.
    """
    if not ar.scan:
        return ar, params
    return ar.apart(), jax.jit(transformer.unstack)(params)
