"""Captions as a condition of the AR model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.conditions import Text
from sphere_ar_jax.models.heads import FlowHead
from sphere_ar_jax.runtime.console import UserError

TEXT = Text(vocabulary_size=7, length=5, width=16)
LABELS = np.array([[1, 2, 3, 0, 0], [6, 6, 6, 6, 6], [0, 0, 0, 0, 0]], np.int32)


@pytest.fixture(scope='module')
def params():
    return TEXT.init(jax.random.key(0), LABELS, method='embed')['params']


def test_tokens_are_those_of_numbers_and_places(params):
    found = TEXT.apply({'params': params}, LABELS, method='embed')
    chex.assert_shape(found, (3, 5, 16))
    chex.assert_type(found, jnp.float32)
    chex.assert_shape(params['text_embedding'], (8, 16))
    expected = params['text_embedding'][6] + params['text_positions'][4]
    np.testing.assert_array_equal(found[1, 4], expected)


def test_no_caption_is_a_number_of_its_own(params):
    null = TEXT.null(LABELS)
    chex.assert_trees_all_equal(null, np.full((3, 5), 7, np.int32))
    found = TEXT.apply({'params': params}, null, method='embed')
    expected = params['text_embedding'][7:] + params['text_positions']
    np.testing.assert_array_equal(found[0], expected)
    # It is no empty caption, and nobody may ask for it.
    assert not np.allclose(found[0], TEXT.apply({'params': params}, LABELS, method='embed')[2])
    with pytest.raises(UserError, match='labels must lie between 0 and 6'):
        TEXT.check(null)


def test_an_encoder_reads_in_both_directions():
    """With it each place depends on all numbers, without it on its own."""
    text = TEXT.clone(encoder_depth=2, heads=2)
    params = text.init(jax.random.key(0), LABELS, method='embed')['params']
    other = LABELS.copy()
    other[:, 4] = 3
    embed = functools.partial(text.apply, {'params': params}, method='embed')
    change = np.abs(embed(LABELS) - embed(other)).max(-1)
    assert change.shape == (3, 5)
    assert change.min() > 1e-5
    without = TEXT.apply({'params': params}, LABELS, method='embed')
    unchanged = TEXT.apply({'params': params}, other, method='embed')
    np.testing.assert_array_equal(without[:, :4], unchanged[:, :4])


def test_whole_captions_are_dropped():
    keys = jax.random.split(jax.random.key(0), 4000)
    labels = jnp.tile(LABELS[:1], (4000, 1))
    dropped = np.asarray(TEXT.drop(keys, labels, 0.1))
    is_null = (dropped == 7).all(1)
    np.testing.assert_array_equal(dropped[~is_null], np.asarray(labels)[~is_null])
    # Three standard deviations of the share of 4,000 draws.
    assert abs(is_null.mean() - 0.1) < 3 * np.sqrt(0.1 * 0.9 / 4000)
    # Each image has a draw of its own key.
    alone = TEXT.drop(keys[:7], labels[:7], 0.1)
    np.testing.assert_array_equal(alone, dropped[:7])


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (np.zeros((2, 4), np.int32), r'give texts, or \(n, 5\) numbers of them, not \(2, 4\)'),
        (np.zeros(5, np.int32), r'not \(5,\)'),
        (np.zeros((0, 5), np.int32), r'not \(0, 5\)'),
        (np.full((1, 5), -1), 'labels must lie between 0 and 6'),
        (np.zeros((1, 5)), 'labels must be whole numbers'),
        ([['a', 'b']], r'give texts, or \(n, 5\) numbers of them, not \(1, 2\)'),
        (None, r'give texts, .* not \(\)'),
        (['a', None], r'give texts, .* not \(2,\)'),
    ],
)
def test_what_is_no_caption_is_refused(labels, message):
    with pytest.raises(UserError, match=message):
        TEXT.check(labels)


@pytest.mark.parametrize('encoder_depth', [0, 2])
def test_cached_decoding_reads_captions_as_the_full_pass_does(encoder_depth):
    head = FlowHead(4, 16, 1, 1)
    text = TEXT.clone(encoder_depth=encoder_depth, heads=2)
    ar = AR(2, 2, 16, text, head, grid=(2, 2), latent_dim=4)
    params = ar.init_params(jax.random.key(1))
    z = jax.random.normal(jax.random.key(2), (3, 4, 4))
    conditions = jax.jit(functools.partial(ar.apply, method='conditions'))
    full = conditions({'params': params}, LABELS, z)
    chex.assert_shape(full, (3, 4, 16))
    apart, apart_params = unstacked(ar, params)
    prefill = jax.jit(functools.partial(apart.apply, method='prefill'))
    decode = jax.jit(functools.partial(apart.apply, method='decode_step'))
    c, cache = prefill({'params': apart_params}, LABELS)
    found = [c]
    for k in range(1, 4):
        c, cache = decode({'params': apart_params}, z[:, k - 1], k, cache)
        found.append(c)
    np.testing.assert_allclose(np.stack(found, 1), full, atol=1e-5)
    # Another caption gives another condition.
    other = conditions({'params': params}, LABELS[::-1], z)
    assert np.abs(np.asarray(other - full)[0]).max() > 1e-3
