"""Sequences of texts and images, drawn left to right with one cache (`docs/text.md`).

A caption is the sequence of a given image and a text. Longer sequences, such as a text, an image
and another text, go on from the same cache.

Dimensions:
  B  sequences
  R  rows: B, or 2B with guidance (conditional rows, then null rows)
  T  numbers of a text     V  size of the vocabulary
  L  tokens of an image    d  latent dimension
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sphere_ar_jax.data.captions.vocabulary import END
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.ar import unstacked
from sphere_ar_jax.models.joint import Joint
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling.tokens import Carry, go_on
from sphere_ar_jax.sphere import geometry


class Segment(NamedTuple):
    """A text or an image of a sequence.

    Attributes:
      kind: 'text' or 'image'.
      given: the captions (B, T) or tokens (B, L, d), or None where they are drawn.
    """

    kind: str
    given: jax.Array | None = None


class Writing(NamedTuple):
    """How the numbers of a text are chosen.

    Attributes:
      top_p: the share of the probability that the likeliest numbers need to be drawn from, in
        (0, 1]; 1 draws from all numbers. None takes the likeliest one.
      temperature: what the logits are divided by, above 0.
    """

    top_p: float | None = None
    temperature: float = 1.0


LIKELIEST = Writing()
# Stands in the place of a number that could not be chosen, since logits were not finite.
NONE = -1


def keep_top(logits: jax.Array, top_p: float) -> jax.Array:
    """Keeps the fewest likeliest numbers whose probabilities sum to at least top_p.

    Holtzman et al. 2020, "nucleus sampling". The likeliest number is kept in any case.

    Args:
      logits: (…, V).
      top_p: in (0, 1].

    Returns:
      (…, V), −inf where a number is not kept.
    """
    if top_p >= 1:
        return logits  # Rounding would leave some of the least likely out.
    p = jax.nn.softmax(logits)
    order = jnp.argsort(-p, axis=-1)
    ordered = jnp.take_along_axis(p, order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    ranks = jnp.argsort(order, axis=-1)
    is_kept = (jnp.take_along_axis(before, ranks, axis=-1) < top_p) | (ranks == 0)
    return jnp.where(is_kept, logits, -jnp.inf)


def _choose(logits: jax.Array, keys: jax.Array, writing: Writing) -> jax.Array:
    """Chooses a number for each row of logits (B, V), (B,) int32, `NONE` if they are not finite."""
    if writing.top_p is None:
        chosen = jnp.argmax(logits, axis=-1)
    else:
        # The largest becomes 0, so that no small temperature makes a number infinite that counts.
        shifted = logits - logits.max(axis=-1, keepdims=True)
        kept = keep_top(shifted / writing.temperature, writing.top_p)
        chosen = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.where(jnp.isfinite(logits).all(-1), chosen, NONE).astype(jnp.int32)


def folded(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Folds every key (B,) by a number."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class _Sequences:
    """The sequences of B rows while they are drawn.

    Attributes:
      cache: keys and values of the inputs so far.
      place: number of the inputs so far.
    """

    def __init__(self, ar: Joint, params: PyTree, count: int, guided: bool, length: int) -> None:
        """Begins `count` empty sequences of up to `length` inputs."""
        self._ar = ar
        self._params = params
        self._count = count
        self._guided = guided
        self._rows = 2 * count if guided else count
        self.cache = ar.cache(self._rows, length)
        self.place = 0

    def _apply(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the model."""
        return self._ar.apply({'params': self._params}, *arguments, method=method)

    def _with_null(self, texts: jax.Array) -> jax.Array:
        """Texts of all rows: null rows read numbers that stand for no caption."""
        if not self._guided:
            return texts
        return jnp.concatenate([texts, self._ar.condition.null(texts)])

    def read_text(self, captions: jax.Array) -> None:
        """Feeds captions (B, T)."""
        texts = self._with_null(captions)
        self.cache = self._apply('read_text', texts, self.cache, self.place)
        self.place += self._ar.text_inputs

    def read_image(self, z: jax.Array) -> None:
        """Feeds the tokens (B, L, d) of images."""
        both = jnp.concatenate([z, z]) if self._guided else z
        self.cache = self._apply('read_image', both, self.cache, self.place)
        self.place += self._ar.image_inputs

    def draw_image(
        self,
        keys: jax.Array,
        options: Options,
        guidance_scale: jax.Array | float | None,
        temperature: jax.Array | float,
        project: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """Draws the tokens (B, L, d) of images; see `interleave`."""
        before = self.cache, self.place
        carry = Carry(*self._apply('begin_image', self._rows, self.cache, self.place))
        carry, drawn = go_on(
            self._ar.clone(image_start=self.place),
            self._params,
            carry,
            0,
            self._ar.num_tokens,
            keys,
            options,
            guidance_scale,
            temperature,
            project,
        )
        self.cache = carry.cache
        self.place += self._ar.image_inputs
        if self._guided and options.splits_first_token:
            # Null rows have drawn another first token. What follows reads one image in all rows.
            self.cache, self.place = before
            self.read_image(drawn.z)
        return drawn.z

    def write(self, keys: jax.Array, writing: Writing) -> jax.Array:
        """Draws captions (B, T). What follows a caption's end is END."""
        logits, cache = self._apply('begin_text', self._rows, self.cache, self.place)

        def step(carry: tuple[Any, ...], k: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
            logits, cache, ended = carry
            chosen = _choose(logits[: self._count], folded(keys, k), writing)
            chosen = jnp.where(ended, END, chosen)
            fed = self._with_null(chosen)
            logits, cache = self._apply('write_step', fed, k, cache, self.place)
            return (logits, cache, chosen == END), chosen

        ended = jnp.zeros(self._count, bool)
        places = jnp.arange(self._ar.text_inputs - 1)
        (_, self.cache, _), chosen = jax.lax.scan(step, (logits, cache, ended), places)
        self.place += self._ar.text_inputs
        return chosen.swapaxes(0, 1)


def _check(ar: Joint, segments: Sequence[Segment], count: int) -> None:
    """Checks the kinds of segments, and the shapes of those that are given.

    Raises:
      ValueError: one is of no kind, or has another shape than so many sequences have, or the first
        is not given and the model draws nothing that comes first.
    """
    shapes = {
        'text': (count, ar.text_inputs - 1),
        'image': (count, ar.num_tokens, ar.latent_dim),
    }
    if segments and segments[0].given is None and not ar.alone_weight:
        raise ValueError(
            'give segment 0: with ar.alone_weight=0 the model has not learned what comes first'
        )
    for i, (kind, given) in enumerate(segments):
        if kind not in shapes:
            raise ValueError(f"segment {i} is {kind!r}: a segment is 'text' or 'image'")
        if given is not None and given.shape != shapes[kind]:
            raise ValueError(
                f'segment {i}, {kind}, has the shape {given.shape}, but must have {shapes[kind]}'
            )


def interleave(
    ar: Joint,
    params: PyTree,
    segments: Sequence[Segment],
    keys: jax.Array,
    options: Options | None = None,
    guidance_scale: jax.Array | float | None = None,
    temperature: jax.Array | float = 1.0,
    project: Callable[[jax.Array], jax.Array] = geometry.project,
    writing: Writing = LIKELIEST,
) -> list[jax.Array]:
    """Draws the segments of B sequences that are not given, each from all before it.

    With guidance, null rows read the same images and no texts. Texts are drawn from conditional
    rows alone.

    Args:
      ar: the model.
      params: its parameters; stacked ones are copied apart first, see `ar.unstacked`.
      segments: what the sequences consist of.
      keys: (B,) PRNG keys, one per sequence. Segment i has the keys folded by i.
      options: how images are drawn; None where none is drawn.
      guidance_scale: see `tokens.draw`.
      temperature: see `tokens.draw`.
      project: see `tokens.draw`.
      writing: how texts are drawn.

    Returns:
      All segments, the given ones included: captions (B, T) int32, and tokens (B, L, d) float32.

    Raises:
      ValueError: a segment is of no kind or has another shape, the first is to be drawn by a model
        that has not learned it, an image is drawn without options, or there are options and none
        is; or see `tokens.go_on`.
    """
    _check(ar, segments, len(keys))
    drawn = [segment.kind for segment in segments if segment.given is None]
    if ('image' in drawn) != (options is not None):
        raise ValueError('give options where an image is drawn, and only there')
    ar, params = unstacked(ar, params)
    params = ar.cast(params)
    guided = options is not None and options.guidance is not None
    lengths = {'text': ar.text_inputs, 'image': ar.image_inputs}
    length = sum(lengths[segment.kind] for segment in segments)
    sequences = _Sequences(ar, params, len(keys), guided, length)
    found = []
    for i, (kind, given) in enumerate(segments):
        own = folded(keys, i)
        if given is not None:
            read = sequences.read_text if kind == 'text' else sequences.read_image
            read(given)
            found.append(given)
        elif kind == 'text':
            found.append(sequences.write(own, writing))
        else:
            assert options is not None  # seen above
            found.append(sequences.draw_image(own, options, guidance_scale, temperature, project))
    return found
