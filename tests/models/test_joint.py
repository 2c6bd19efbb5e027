"""Texts and images in one sequence."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.models.ar import unstacked
from sphere_ar_jax.models.conditions import Text
from sphere_ar_jax.models.heads import FlowHead
from sphere_ar_jax.models.joint import Joint, cross_entropy
from tests import tiny_config

V = 7
T = 5
MODEL = Joint(
    depth=2,
    heads=2,
    width=16,
    condition=Text(V, T, 16),
    head=FlowHead(4, 16, 2, 1),
    grid=(2, 3),
    latent_dim=4,
)
L = MODEL.num_tokens
LABELS = np.array([[1, 2, 3, 0, 0], [6, 6, 6, 6, 6], [0, 0, 0, 0, 0]], np.int32)


@pytest.fixture(scope='module')
def params():
    return tiny_config.random_params(MODEL)


@pytest.fixture(scope='module')
def z():
    return jax.random.normal(jax.random.key(1), (3, L, 4))


def _outputs(params, labels, z, order):
    outputs = MODEL.apply({'params': params}, labels, z, method=order)
    chex.assert_shape(outputs.c, (3, L, 16))
    chex.assert_shape(outputs.logits, (3, T, V))
    chex.assert_type(list(outputs), jnp.float32)
    chex.assert_tree_all_finite(outputs)
    return outputs


def test_cross_entropy_counts_up_to_the_end():
    logits = np.random.default_rng(0).normal(size=(4, T, V)).astype(np.float32)
    labels = np.concatenate([LABELS, np.full((1, T), V, np.int32)])
    nats, counts = cross_entropy(logits, labels)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [
        -sum(log_p[0, i, n] for i, n in enumerate([1, 2, 3, 0])),
        -sum(log_p[1, i, 6] for i in range(T)),
        -log_p[2, 0, 0],
        0.0,
    ]
    np.testing.assert_array_equal(counts, [4, 5, 1, 0])
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_probabilities_of_all_captions_sum_to_one(z):
    """p(text | image), and p(text), over all captions of two numbers of a vocabulary of three."""
    model = MODEL.clone(condition=Text(3, 2, 16))
    params = tiny_config.random_params(model)
    captions = np.array([[0, 0], *([a, b] for a in (1, 2) for b in (0, 1, 2))], np.int32)
    images = jnp.broadcast_to(z[:1], (len(captions), L, 4))
    for nats in model.apply({'params': params}, captions, images, method='nats'):
        p = np.exp(-np.asarray(nats, np.float64))
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
        assert p.std() > 1e-3


@pytest.mark.parametrize(('order', 'first'), [('text_first', 'text'), ('image_first', 'image')])
def test_outputs_depend_on_what_precedes_alone(params, z, order, first):
    before = _outputs(params, LABELS, z, order)
    labels = LABELS.copy()
    labels[:, 2] = (labels[:, 2] + 1) % V
    of_text = _outputs(params, labels, z, order)
    np.testing.assert_allclose(of_text.logits[:, :3], before.logits[:, :3], atol=1e-5)
    changed = np.abs(of_text.logits[:, 3:] - before.logits[:, 3:]).max((0, 2))
    assert changed.min() > 1e-3
    of_image = _outputs(params, LABELS, z.at[:, 3].add(1), order)
    np.testing.assert_allclose(of_image.c[:, :4], before.c[:, :4], atol=1e-5)
    assert np.abs(of_image.c[:, 4:] - before.c[:, 4:]).max((0, 2)).min() > 1e-3
    # What comes second depends on all that comes first, and not the other way round.
    if first == 'text':
        second, unread = of_text.c - before.c, of_image.logits - before.logits
    else:
        second, unread = of_image.logits - before.logits, of_text.c - before.c
    assert np.abs(second).max((0, 2)).min() > 1e-3
    np.testing.assert_allclose(unread, 0, atol=1e-5)


def test_a_cache_gives_what_one_pass_gives(params, z):
    apart, own = unstacked(MODEL, params)
    call = functools.partial(apart.apply, {'params': own})
    outputs = _outputs(params, LABELS, z, 'text_first')
    c, cache = call(LABELS, method='prefill')
    found = [c]
    for k in range(1, L):
        c, cache = call(z[:, k - 1], k, cache, method='decode_step')
        found.append(c)
    np.testing.assert_allclose(np.stack(found, 1), outputs.c, atol=2e-5)

    outputs = _outputs(params, LABELS, z, 'image_first')
    cache = call(3, T + L + 2, method='cache')
    cache = call(z, cache, 0, method='read_image')
    logits, cache = call(3, cache, L + 1, method='begin_text')
    found = [logits]
    for k in range(T - 1):
        logits, cache = call(LABELS[:, k], k, cache, L + 1, method='write_step')
        found.append(logits)
    np.testing.assert_allclose(np.stack(found, 1), outputs.logits, atol=2e-5)


def test_the_loss_is_the_mean_of_both_orders(params, z):
    draws = MODEL.head.draws(jax.random.split(jax.random.key(2), 3), (2, L, 4))
    loss, scalars = MODEL.apply({'params': params}, LABELS, z, draws, method='loss')
    chex.assert_shape(loss, ())
    flows = []
    texts = []
    for order in ('text_first', 'image_first'):
        outputs = _outputs(params, LABELS, z, order)
        head = MODEL.head.apply({'params': params['head']}, outputs.c, z, draws, method='loss')
        flows.append(head[0])
        nats, counts = cross_entropy(outputs.logits, LABELS)
        texts.append(np.mean(np.asarray(nats) / np.asarray(counts)))
    expected = np.mean(flows) + 0.2 * np.mean(texts)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # What comes first, the image of flows[1] or the text of texts[0], has a weight of its own.
    for weight in (0.0, 0.3):
        model = MODEL.clone(text_weight=0.5, alone_weight=weight)
        weighted, of_weighted = model.apply({'params': params}, LABELS, z, draws, method='loss')
        behind = flows[0] + 0.5 * texts[1]
        alone = flows[1] + 0.5 * texts[0]
        np.testing.assert_allclose(weighted, (behind + weight * alone) / 2, rtol=1e-5)
        chex.assert_trees_all_close(of_weighted, scalars, rtol=1e-6)
    np.testing.assert_allclose(scalars['flow_loss'], flows[0], rtol=1e-5)
    np.testing.assert_allclose(scalars['text_loss'], texts[1], rtol=1e-5)
    # Captions that were dropped are left out of the mean.
    dropped = LABELS.copy()
    dropped[1] = V
    _, scalars = MODEL.apply({'params': params}, dropped, z, draws, method='loss')
    nats, counts = cross_entropy(outputs.logits, LABELS)
    each = np.asarray(nats) / np.asarray(counts)
    np.testing.assert_allclose(scalars['text_loss'], (each[0] + each[2]) / 2, rtol=1e-5)
    null = MODEL.condition.null(LABELS)
    _, scalars = MODEL.apply({'params': params}, null, z, draws, method='loss')
    assert scalars['text_loss'] == 0
