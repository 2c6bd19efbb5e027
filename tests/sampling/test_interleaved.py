"""Sequences of texts and images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.conditions import Text
from sphere_ar_jax.models.heads import FlowHead
from sphere_ar_jax.models.joint import Joint, cross_entropy
from sphere_ar_jax.sampling import interleaved, tokens
from sphere_ar_jax.sampling.interleaved import Segment, Writing, interleave
from tests import tiny_config

MODEL = Joint(
    depth=2,
    heads=2,
    width=16,
    condition=Text(7, 5, 16),
    head=FlowHead(4, 16, 2, 1),
    grid=(2, 3),
    latent_dim=4,
)
LABELS = np.array([[1, 2, 3, 0, 0], [6, 6, 6, 6, 6]], np.int32)
KEYS = jax.random.split(jax.random.key(3), 2)
OPTIONS = Options(solver='ab2', num_steps=3, guidance='constant')


@pytest.fixture(scope='module')
def params():
    found = tiny_config.random_params(MODEL)
    # Texts depend more on what precedes them.
    found['text_head']['kernel'] = 10 * found['text_head']['kernel']
    return found


@pytest.fixture(scope='module')
def z():
    return jax.random.normal(jax.random.key(1), (2, 6, 4))


@pytest.mark.parametrize('top_p', [1e-50, 1e-6, 0.3, 0.5, 0.9, 1.0])
def test_the_likeliest_numbers_are_kept(top_p):
    logits = 2 * jax.random.normal(jax.random.key(0), (50, 9))
    kept = np.isfinite(interleaved.keep_top(logits, top_p))
    for row, p in zip(kept, np.asarray(jax.nn.softmax(logits)), strict=True):
        fewest = next((n for n in range(1, 9) if np.sort(p)[-n:].sum() >= top_p), 9)
        assert set(np.flatnonzero(row)) == set(np.argsort(p)[-fewest:])


@pytest.mark.parametrize('temperature', [1e-37, 1e-10, 1e-9, 1e-6])
def test_a_small_temperature_takes_the_likeliest_number(temperature):
    logits = 5 * jax.random.normal(jax.random.key(3), (64, 50))
    keys = jax.random.split(jax.random.key(4), 64)
    choose = jax.jit(lambda a: interleaved._choose(a, keys, Writing(0.9, temperature)))
    np.testing.assert_array_equal(choose(logits), logits.argmax(-1))


def test_all_numbers_are_drawn_from_with_a_top_p_of_1():
    """Rounded sums of 50,257 probabilities reach 1 before the last of them."""
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 50_257))
    assert np.isfinite(interleaved.keep_top(logits, 1.0)).all()


@pytest.mark.parametrize('top_p', [None, 0.9, 1.0])
def test_nothing_is_chosen_where_logits_are_not_finite(top_p):
    logits = jnp.zeros((3, 5)).at[1, 2].set(jnp.nan).at[2, 0].set(jnp.inf)
    keys = jax.random.split(jax.random.key(0), 3)
    chosen = interleaved._choose(logits, keys, Writing(top_p))
    assert chosen.dtype == jnp.int32
    assert chosen[0] >= 0
    np.testing.assert_array_equal(chosen[1:], interleaved.NONE)


def test_an_image_for_a_text_is_that_of_the_sampler(params):
    segments = [Segment('text', LABELS), Segment('image')]
    texts, drawn = interleave(MODEL, params, segments, KEYS, OPTIONS, 2.0)
    np.testing.assert_array_equal(texts, LABELS)
    folded = jax.vmap(jax.random.fold_in, (0, None))(KEYS, 1)
    expected = tokens.sample_tokens(MODEL, params, LABELS, folded, OPTIONS, 2.0)
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 2, rtol=1e-5)


def test_a_caption_has_the_likeliest_numbers(params, z):
    """Each number is the likeliest one of the pass that reads the caption, up to its end."""
    _, caption = interleave(MODEL, params, [Segment('image', z), Segment('text')], KEYS)
    outputs = MODEL.apply({'params': params}, caption, z, method='image_first')
    likeliest = np.argmax(outputs.logits, axis=-1)
    for row, wanted in zip(np.asarray(caption), likeliest, strict=True):
        ends = list(row).index(0) + 1 if 0 in row else 5
        np.testing.assert_array_equal(row[:ends], wanted[:ends])
        assert not row[ends:].any()


def test_captions_are_drawn_with_their_probabilities(params, z):
    """Numbers of many captions of one image against the probabilities that the model gives."""
    count = 3000
    many = jnp.broadcast_to(z[:1], (count, 6, 4))
    keys = jax.random.split(jax.random.key(5), count)
    segments = [Segment('image', many), Segment('text')]
    draw = jax.jit(
        lambda params: interleave(MODEL, params, segments, keys, writing=Writing(1.0))[1]
    )
    captions = np.asarray(draw(params))
    outputs = MODEL.apply({'params': params}, captions, many, method='image_first')
    first = np.asarray(jax.nn.softmax(outputs.logits[0, 0]))
    shares = np.bincount(captions[:, 0], minlength=7) / count
    np.testing.assert_allclose(shares, first, atol=4 * np.sqrt(0.25 / count))
    nats, _ = cross_entropy(outputs.logits, captions)
    distinct, index = np.unique(captions, axis=0, return_index=True)
    p = np.exp(-np.asarray(nats))[index]
    shares = [(captions == caption).all(1).mean() for caption in distinct]
    np.testing.assert_allclose(shares, p, atol=4 * np.sqrt(0.25 / count))
    # Top-p draws no number beyond.
    few = interleave(MODEL, params, segments, keys, writing=Writing(0.5))[1]
    kept = np.isfinite(interleaved.keep_top(outputs.logits[0, 0], 0.5))
    assert set(np.unique(few[:, 0])) <= set(np.flatnonzero(kept))


def test_longer_sequences_go_on_from_the_same_cache(params, z):
    """The third segment is what it is where the drawn second one is given."""
    drawn = interleave(
        MODEL,
        params,
        [Segment('text', LABELS), Segment('image'), Segment('text')],
        KEYS,
        OPTIONS,
        2.0,
        writing=Writing(1.0),
    )
    given = [Segment('text', LABELS), Segment('image', drawn[1]), Segment('text')]
    again = interleave(MODEL, params, given, KEYS, writing=Writing(1.0))
    np.testing.assert_array_equal(again[2], drawn[2])
    other = [Segment('text', LABELS[::-1]), Segment('image', z), Segment('text')]
    changed = interleave(MODEL, params, other, KEYS, writing=Writing(1.0))
    assert not np.array_equal(changed[2], drawn[2])
    # An image is drawn from all segments before it, not from the last text alone.
    twice = [Segment('image', z), Segment('text', LABELS), Segment('image')]
    behind = interleave(MODEL, params, twice, KEYS, OPTIONS, 2.0)[2]
    without = interleave(MODEL, params, [Segment('image', -z), *twice[1:]], KEYS, OPTIONS, 2.0)[2]
    assert np.abs(behind - without).max() > 1e-2


def test_null_rows_read_the_image_that_was_drawn(params):
    """Linear guidance draws them another first token, which what follows must not see."""
    options = Options(solver='ab2', num_steps=3, guidance='linear')
    assert options.splits_first_token
    segments = [Segment('text', LABELS), Segment('image'), Segment('image')]
    drawn = interleave(MODEL, params, segments, KEYS, options, 4.0)
    segments[1] = Segment('image', drawn[1])
    again = interleave(MODEL, params, segments, KEYS, options, 4.0)
    np.testing.assert_allclose(again[2], drawn[2], atol=1e-4)


def test_a_sequence_does_not_depend_on_the_others(params, z):
    segments = [Segment('image', z), Segment('text')]
    both = interleave(MODEL, params, segments, KEYS, writing=Writing(0.9))[1]
    alone = [Segment('image', z[1:]), Segment('text')]
    np.testing.assert_array_equal(
        interleave(MODEL, params, alone, KEYS[1:], writing=Writing(0.9))[1], both[1:]
    )


def test_segments_that_cannot_be(params, z):
    for segment, message in (
        (Segment('video'), "segment 0 is 'video': a segment is 'text' or 'image'"),
        (Segment('text', LABELS[:, :-1]), 'segment 0, text, has the shape'),
        (Segment('text', LABELS[:1]), 'segment 0, text, has the shape'),
        (Segment('image', z[..., :-1]), 'segment 0, image, has the shape'),
    ):
        with pytest.raises(ValueError, match=message):
            interleave(MODEL, params, [segment, Segment('text')], KEYS)


def test_a_model_that_learned_nothing_that_comes_first_draws_nothing_first(params):
    model = MODEL.clone(alone_weight=0.0)
    with pytest.raises(ValueError, match=r'give segment 0: with ar\.alone_weight=0'):
        interleave(model, params, [Segment('text')], KEYS)
    found = interleave(model, params, [Segment('text', LABELS), Segment('text')], KEYS)
    assert [text.shape for text in found] == [LABELS.shape] * 2


def test_an_image_needs_options(params):
    segments = [Segment('text', LABELS), Segment('image')]
    with pytest.raises(ValueError, match='give options where an image is drawn'):
        interleave(MODEL, params, segments, KEYS)
    with pytest.raises(ValueError, match='and only there'):
        interleave(MODEL, params, segments[:1], KEYS, OPTIONS, 2.0)
