"""Features of texts as a condition of the AR model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.conditions import Features
from sphere_ar_jax.models.heads import FlowHead
from sphere_ar_jax.runtime.console import UserError

FEATURES = Features(length=3, features=5, width=16)
LABELS = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
LABELS[1, 2] = 0  # a text of two places


@pytest.fixture(scope='module')
def params():
    found = FEATURES.init(jax.random.key(0), LABELS, method='embed')['params']
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda a: noise.normal(size=a.shape).astype(np.float32), found)


def test_tokens_are_linear_in_unit_features(params):
    found = FEATURES.apply({'params': params}, LABELS, method='embed')
    chex.assert_shape(found, (4, 3, 16))
    chex.assert_type(found, jnp.float32)
    unit = LABELS / np.sqrt(np.mean(LABELS.astype(np.float64) ** 2, -1, keepdims=True) + 1e-300)
    dense = params['features_proj']
    expected = unit @ dense['kernel'] + dense['bias']
    expected[1, 2] = params['features_empty']
    np.testing.assert_allclose(found, expected + params['features_positions'], rtol=1e-4, atol=1e-5)
    # The size of features says nothing.
    for factor in (np.float32(8), np.float32(1e-25), np.float32(1e25)):
        other = FEATURES.apply({'params': params}, factor * LABELS, method='embed')
        np.testing.assert_allclose(other, found, rtol=1e-5, atol=1e-6)


def test_no_text_is_three_empty_places(params):
    null = FEATURES.null(LABELS)
    chex.assert_trees_all_equal(null, np.zeros_like(LABELS))
    found = FEATURES.apply({'params': params}, null, method='embed')
    expected = params['features_empty'] + params['features_positions']
    np.testing.assert_allclose(found, np.tile(expected, (4, 1, 1)), rtol=1e-6)
    with pytest.raises(UserError, match='all 0 or not finite, which stands for no text'):
        FEATURES.check(null)


def test_whole_texts_are_dropped():
    keys = jax.random.split(jax.random.key(0), 4000)
    labels = jnp.tile(LABELS[:1], (4000, 1, 1))
    dropped = np.asarray(FEATURES.drop(keys, labels, 0.1))
    is_null = ~dropped.any((1, 2))
    np.testing.assert_array_equal(dropped[~is_null], np.asarray(labels)[~is_null])
    # Three standard deviations of the share of 4,000 draws.
    assert abs(is_null.mean() - 0.1) < 3 * np.sqrt(0.1 * 0.9 / 4000)


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (np.zeros((2, 3), np.float32), r'give floats \(n, 3, 5\), or texts .* not \(2, 3\)'),
        (np.zeros((0, 3, 5), np.float32), r'not \(0, 3, 5\)'),
        (np.ones((1, 3, 5), np.int32), r'give floats \(n, 3, 5\)'),
        (np.full((1, 3, 5), np.nan), 'all 0 or not finite'),
        ('a cat', r'not \(\)'),
    ],
)
def test_what_are_no_features_is_refused(labels, message):
    with pytest.raises(UserError, match=message):
        FEATURES.check(labels)


def test_cached_decoding_reads_features_as_the_full_pass_does():
    ar = AR(2, 2, 16, FEATURES, FlowHead(4, 16, 1, 1), grid=(2, 2), latent_dim=4)
    params = ar.init_params(jax.random.key(1))
    z = jax.random.normal(jax.random.key(2), (4, 4, 4))
    full = jax.jit(functools.partial(ar.apply, method='conditions'))({'params': params}, LABELS, z)
    chex.assert_shape(full, (4, 4, 16))
    apart, apart_params = unstacked(ar, params)
    decode = jax.jit(functools.partial(apart.apply, method='decode_step'))
    c, cache = apart.apply({'params': apart_params}, LABELS, method='prefill')
    found = [c]
    for k in range(1, 4):
        c, cache = decode({'params': apart_params}, z[:, k - 1], k, cache)
        found.append(c)
    np.testing.assert_allclose(np.stack(found, 1), full, atol=1e-5)
    assert np.abs(np.asarray(full)[0] - np.asarray(full)[2]).max() > 1e-3
