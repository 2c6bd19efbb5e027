"""Texts and images in one causal sequence, in either order (`docs/text.md`, "Both directions").

The sequence draws an image for a text, and it writes a text for an image:

  text first    b_t w_1 … w_T b_i z_1 … z_{L−1}
  image first   b_i z_1 … z_L b_t w_1 … w_{T−1}

The output at each input is for what follows it. Both orders have T + L + 1 inputs.

Dimensions:
  B    images                       L    tokens z of an image (grid H × W, raster order)
  T    numbers w of a caption       D    width, N heads of K = D/N
  V    size of the vocabulary       d    latent dimension
"""

from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.data.captions.vocabulary import END
from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.ar import AR, Caches
from sphere_ar_jax.models.conditions import Labels, Text
from sphere_ar_jax.models.heads import Draws


class _Outputs(NamedTuple):
    """What the transformer says of a sequence.

    Attributes:
      c: conditions of the image's tokens, (B, L, D).
      logits: of the caption's numbers, (B, T, V).
    """

    c: jax.Array
    logits: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes −log p of captions, and how many numbers of each count.

    A caption ends with its first END. What fills it up after that does not count. Captions that
    stand for none do not count either.

    Args:
      logits: (B, T, V) float32.
      labels: (B, T) int32, of which V stands for no caption.

    Returns:
      The sums over the numbers of each caption, in nats, and their counts; both (B,) float32.
    """
    V = logits.shape[-1]
    labels = jnp.asarray(labels)
    numbers = jnp.minimum(labels, V - 1)
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, numbers[..., None], axis=-1)[..., 0]
    ends = (labels == END).astype(jnp.int32)
    ended_before = jnp.cumsum(ends, axis=1) - ends
    counts = (ended_before == 0) & (labels < V)
    counted = counts.astype(jnp.float32)
    return -jnp.sum(counted * chosen, axis=1), jnp.sum(counted, axis=1)


def _per_number(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over captions of their numbers' cross-entropy, without dropped captions, ()."""
    nats, counts = cross_entropy(logits, labels)
    captions = jnp.sum((counts > 0).astype(jnp.float32))
    return jnp.sum(nats / jnp.maximum(counts, 1)) / jnp.maximum(captions, 1)


class Joint(AR):
    """An AR model that writes texts, too. Its condition must be `Text`.

    The first text input sits at x = y = max(H, W) + 1½ of the rotary embedding, and each of the
    following ones by 1 further along both axes. So texts have a 1-D rotary embedding beyond the 2-D
    one of the image's tokens. The input in front of an image sits at 0.

    Attributes:
      text_weight: weight of the texts' cross-entropy, in nats for each number, in the loss.
      alone_weight: weight of the losses of what comes first in a sequence, an image without a text
        or a text without an image.
      image_start: the place in the cache of the input in front of the image that is drawn, which
        `interleaved` sets. None stands for the sequence of a text and an image.
    """

    text_weight: float = 0.2
    alone_weight: float = 1.0
    image_start: int | None = None

    def setup(self) -> None:
        super().setup()
        self.begin_tokens = self.param('begin_tokens', transformer.INIT, (2, self.width))
        size = self._text.vocabulary_size
        self.text_head = nn.Dense(size, kernel_init=transformer.INIT)

    @property
    def _text(self) -> Text:
        """The condition."""
        return cast(Text, self.condition)

    @property
    def text_inputs(self) -> int:
        """Number T + 1 of the inputs of a text."""
        return self.condition.length + 1

    @property
    def image_inputs(self) -> int:
        """Number L + 1 of the inputs of an image."""
        return self.num_tokens + 1

    @property
    def front(self) -> int:
        """Number T + 2 of the inputs in front of an image's tokens, where the text comes first."""
        return self.text_inputs + 1

    def _text_angles(self) -> jax.Array:
        """Computes the rotary angles of b_t, w_1, …, w_T: (T + 1, K/2)."""
        places = max(self.grid) + 1.5 + np.arange(self.text_inputs)
        positions = np.stack([places, places], axis=-1)
        return jnp.asarray(transformer.rotary_angles(positions, self.head_dim))

    def _image_angles(self) -> jax.Array:
        """Computes the rotary angles of b_i, z_1, …, z_L: (L + 1, K/2)."""
        return jnp.asarray(transformer.rope_table(*self.grid, 1, self.head_dim))

    def _angles(self) -> jax.Array:
        """Computes the rotary angles where the text comes first, (T + L + 1, K/2)."""
        return jnp.concatenate([self._text_angles(), self._image_angles()[:-1]])

    def _begun(self, which: int, following: jax.Array) -> jax.Array:
        """Puts b_t (which = 0) or b_i (1) in front of inputs (B, n, D) → (B, n + 1, D)."""
        first = jnp.broadcast_to(self.begin_tokens[which], (len(following), 1, self.width))
        return jnp.concatenate([first, following], axis=1)

    def _text_inputs(self, labels: Labels) -> jax.Array:
        """Embeds b_t and captions (B, T) → (B, T + 1, D)."""
        return self._begun(0, self._text.embed(labels))

    def _image_inputs(self, z: jax.Array) -> jax.Array:
        """Embeds b_i and tokens (B, n, d) → (B, n + 1, D)."""
        return self._begun(1, self.proj_in(z).astype(jnp.float32))

    def embed(self, labels: Labels, z: jax.Array) -> jax.Array:
        """Embeds texts and images behind them.

        Args:
          labels: captions (B, T).
          z: (B, n, d) tokens.

        Returns:
          (B, T + n + 2, D) float32.
        """
        parts = [self._text_inputs(labels), self._image_inputs(z)]
        return self.emb_norm(jnp.concatenate(parts, axis=1))

    def text_first(self, labels: Labels, z: jax.Array) -> _Outputs:
        """Reads captions (B, T), and images (B, L, d) behind them."""
        x, _ = self.stack(self.embed(labels, z[:, :-1]), self._angles())
        x = self.norm(x)
        c = x[:, -self.num_tokens :] + self.positions()[None]
        return _Outputs(c, self.text_head(x[:, : self.condition.length]))

    def image_first(self, labels: Labels, z: jax.Array) -> _Outputs:
        """Reads images (B, L, d), and captions (B, T) behind them."""
        parts = [self._image_inputs(z), self._text_inputs(labels)[:, :-1]]
        angles = jnp.concatenate([self._image_angles(), self._text_angles()[:-1]])
        x, _ = self.stack(self.emb_norm(jnp.concatenate(parts, axis=1)), angles)
        x = self.norm(x)
        c = x[:, : self.num_tokens] + self.positions()[None]
        return _Outputs(c, self.text_head(x[:, self.image_inputs :]))

    def loss(
        self, labels: Labels, z: jax.Array, draws: Draws
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes half the loss of both orders together.

        Each order has the head's loss + text_weight · the cross-entropy of its text. Whichever of
        the two is of what comes first has the factor alone_weight. The cross-entropy is the mean
        over captions of that of their numbers. Captions that were dropped are left out of it. Both
        orders have the same draws.

        Args:
          labels: captions (B, T).
          z: (B, L, d) clean tokens.
          draws: the random draws of the head's loss.

        Returns:
          The loss () float32, and scalars () by their names: those of the head where the text comes
            first, flow_loss, which is its loss there, and text_loss, the cross-entropy where the
            image comes first.
        """
        image_first = self.image_first(labels, z)
        text_first = self.text_first(labels, z)
        flow_behind, scalars = self.head.loss(text_first.c, z, draws)
        text_behind = _per_number(image_first.logits, labels)
        loss = flow_behind + self.text_weight * text_behind
        if self.alone_weight:
            flow_alone, _ = self.head.loss(image_first.c, z, draws)
            text_alone = _per_number(text_first.logits, labels)
            loss += self.alone_weight * (flow_alone + self.text_weight * text_alone)
        return loss / 2, scalars | {'flow_loss': flow_behind, 'text_loss': text_behind}

    def nats(self, labels: Labels, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes −log p(text | image) and −log p(text) of captions.

        The number that ends a caption is included. A caption of T numbers has none.

        Args:
          labels: captions (B, T).
          z: (B, L, d) tokens.

        Returns:
          Both (B,) float32, in nats.
        """
        given, _ = cross_entropy(self.image_first(labels, z).logits, labels)
        alone, _ = cross_entropy(self.text_first(labels, z).logits, labels)
        return given, alone

    # ---- sampling, which needs scan=False

    def _read(
        self, x: jax.Array, angles: jax.Array, cache: Caches, start: jax.Array | int
    ) -> tuple[jax.Array, Caches]:
        """Feeds inputs (B, n, D), and returns the output (B, D) at the last one and the cache."""
        x, cache = self.stack(self.emb_norm(x), angles, cache, start)
        return self.norm(x[:, -1]), cache

    def read_text(self, labels: Labels, cache: Caches, start: int) -> Caches:
        """Feeds b_t and captions (B, T) from place `start` of the cache on."""
        return self._read(self._text_inputs(labels), self._text_angles(), cache, start)[1]

    def read_image(self, z: jax.Array, cache: Caches, start: int) -> Caches:
        """Feeds b_i and the tokens (B, L, d) of images from place `start` of the cache on."""
        return self._read(self._image_inputs(z), self._image_angles(), cache, start)[1]

    def begin_image(self, rows: int, cache: Caches, start: int) -> tuple[jax.Array, Caches]:
        """Feeds b_i, and returns the condition (B, D) of token 0 and the cache."""
        x = self._image_inputs(jnp.zeros((rows, 0, self.latent_dim)))
        x, cache = self._read(x, self._image_angles()[:1], cache, start)
        return x + self.positions()[:1], cache

    def begin_text(self, rows: int, cache: Caches, start: int) -> tuple[jax.Array, Caches]:
        """Feeds b_t, and returns the logits (B, V) of the caption's first number and the cache."""
        x = self._begun(0, jnp.zeros((rows, 0, self.width)))
        x, cache = self._read(x, self._text_angles()[:1], cache, start)
        return self.text_head(x), cache

    def write_step(
        self, numbers: jax.Array, k: jax.Array, cache: Caches, start: int
    ) -> tuple[jax.Array, Caches]:
        """Feeds number k of captions, and returns the logits of the next one.

        Args:
          numbers: (B,) int32.
          k: () int, 0 ≤ k < T.
          cache: the cache after what precedes it.
          start: the place of the text's first input in the cache.

        Returns:
          The logits (B, V) float32, which have no use after number T − 1, and the cache.
        """
        angles = jax.lax.dynamic_slice_in_dim(self._text_angles(), k + 1, 1)
        x = self._text.embed_at(numbers, k)[:, None]
        x, cache = self._read(x, angles, cache, start + k + 1)
        return self.text_head(x), cache

    def decode_step(
        self, z: jax.Array, k: jax.Array | int, cache: Caches
    ) -> tuple[jax.Array, Caches]:
        """Feeds token k − 1 and returns the condition of token k, as `AR.decode_step`.

        After k = L the cache holds the whole image, if it is long enough, and the condition has no
        use.
        """
        image_start = self.front - 1 if self.image_start is None else self.image_start
        angles = jax.lax.dynamic_slice_in_dim(self._image_angles(), k, 1)
        x = self.proj_in(z[:, None]).astype(jnp.float32)
        x, cache = self._read(x, angles, cache, image_start + k)
        position = jnp.take(self.positions(), jnp.asarray(k)[None], axis=0, mode='clip')
        return x + position, cache
