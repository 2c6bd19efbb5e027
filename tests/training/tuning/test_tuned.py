"""Parts of a model that stay frozen, learning rates by pattern, and factors of low rank."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from sphere_ar_jax.config import build, checks, fine_tuning, schema
from sphere_ar_jax.config.fine_tuning import Tuning
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import optimizer, state
from sphere_ar_jax.training.stages import ar_stage
from sphere_ar_jax.training.tuning import lora, tuned
from tests import tiny_config
from tests.conftest import libraries_promote

OPTIONS = tiny_config.get_config().ar_training
BATCH = {'image': np.ones((8, 3), np.float32)}
BASE = {
    'stack': {
        'a': {'kernel': np.full((3, 2), 0.5, np.float32)},
        'b': {'kernel': np.full((2, 2), -1.0, np.float32)},
    },
    'head': {'kernel': np.full((2, 1), 2.0, np.float32), 'bias': np.zeros(1, np.float32)},
}


def _stage():
    """A stage that trains three products."""

    def loss(params, frozen, batch, keys):
        del keys
        x = batch['image'] @ params['stack']['a']['kernel'] @ params['stack']['b']['kernel']
        y = x @ params['head']['kernel'] + params['head']['bias'][None]
        return jnp.mean((y - frozen) ** 2), {}

    def init(key):
        return jax.tree.map(lambda x: jax.random.normal(key, x.shape), BASE)

    return state.make_stage('ar', OPTIONS, init, loss, np.float32(3), (), about='tokenizer')


@libraries_promote()
def test_what_is_trained_is_trained_as_optax_would_alone():
    """AdamW by hand on the trained leaves: their norm clips, their moments are kept, and no more.

    A leaf with a multiplier moves by that many times the update.
    """
    tuning = Tuning(freeze=('stack/a', 'bias$'), multipliers=(('head', 0.25), ('kernel', 2.0)))
    stage = tuned.tuned_stage(_stage(), tuning, BASE)
    began = jax.jit(stage.init)(jax.random.key(0))
    began = began.replace(params=stage.begin(began.params))
    paths = {'stack/b/kernel', 'head/kernel'}
    assert set(flatten_dict(began.params, sep='/')) == paths
    moments = [x for x in jax.tree.leaves(began.opt_state) if x.ndim]
    assert sorted(x.shape for x in moments) == [(2, 1), (2, 1), (2, 2), (2, 2)]
    assert set(flatten_dict(began.ema[0], sep='/')) == paths
    chex.assert_trees_all_equal(stage.to_model(began.params), BASE)

    def loss(trained):
        params = BASE | {
            'stack': BASE['stack'] | {'b': {'kernel': trained['b']}},
            'head': {'kernel': trained['c'], 'bias': BASE['head']['bias']},
        }
        return _stage().loss(params, np.float32(3), BATCH, None)[0]

    by_hand = {'b': BASE['stack']['b']['kernel'], 'c': BASE['head']['kernel']}
    rate = optimizer.learning_rate(1e-3, 2, 6, OPTIONS.final_learning_rate)
    adamw = optax.adamw(rate, b1=OPTIONS.b1, b2=OPTIONS.b2, weight_decay=OPTIONS.weight_decay)
    tx = optax.chain(optax.clip_by_global_norm(OPTIONS.clip_norm), adamw)
    moments = jax.jit(tx.init)(by_hand)

    @jax.jit
    def step_by_hand(by_hand, moments):
        grads = jax.grad(loss)(by_hand)
        updates, moments = tx.update(grads, moments, by_hand)
        by_hand = {'b': by_hand['b'] + 2.0 * updates['b'], 'c': by_hand['c'] + 0.25 * updates['c']}
        return by_hand, moments, optax.tree.norm(grads)

    step = jax.jit(stage.step)
    now = began
    for _ in range(3):
        now, scalars = step(now, stage.frozen, BATCH, 0)
        by_hand, moments, norm = step_by_hand(by_hand, moments)
        np.testing.assert_allclose(scalars['grad_norm'], norm, rtol=1e-5)
    whole = stage.to_model(now.params)
    np.testing.assert_allclose(whole['stack']['b']['kernel'], by_hand['b'], rtol=1e-5)
    np.testing.assert_allclose(whole['head']['kernel'], by_hand['c'], rtol=1e-5)
    assert np.abs(np.asarray(whole['head']['kernel']) - 2.0).max() > 1e-4
    chex.assert_trees_all_equal(whole['stack']['a'], BASE['stack']['a'])
    chex.assert_trees_all_equal(whole['head']['bias'], BASE['head']['bias'])


def test_without_wishes_the_stage_is_the_very_same(tmp_path):
    stage = _stage()
    mesh = sharding.make_mesh()
    assert tuned.of_workdir(stage, Tuning(), str(tmp_path), mesh) is stage
    with pytest.raises(FileNotFoundError, match='no weights to begin with'):
        tuned.of_workdir(stage, Tuning(freeze=('head',)), str(tmp_path), mesh)


@pytest.mark.parametrize(
    ('tuning', 'message'),
    [
        (Tuning(freeze=('hed',)), r"freeze: 'hed' is found in no path .* as head/bias, "),
        (Tuning(freeze=('.',)), 'leaves nothing to train'),
        (Tuning(freeze=('head',), multipliers=(('head', 0.1),)), 'multipliers: .* stack/a/kernel'),
        (Tuning(lora_rank=2), 'leaves nothing to train'),  # none of these is a transformer's
    ],
)
def test_patterns_that_match_nothing_are_named(tuning, message):
    with pytest.raises(UserError, match=message) as refused:
        tuned.select(BASE, tuning)
    assert '\n' not in str(refused.value)


@pytest.fixture(scope='module')
def low_rank():
    """(the tiny AR stage, the one with factors of rank 2, the base's parameters)."""
    cfg = tiny_config.get_config()
    vae = build.build_vae(cfg)
    model = build.build_ar(cfg)
    vae_params = tiny_config.random_params(vae)
    stage = ar_stage(model, vae, vae_params, cfg.ar_training)
    base = tiny_config.random_params(model, seed=3)
    return stage, tuned.tuned_stage(stage, Tuning(lora_rank=2), base), base


def _batch():
    images = np.random.default_rng(0).uniform(-1, 1, (16, 16, 16, 1)).astype(np.float32)
    return {'image': images, 'label': np.arange(16, dtype=np.int32) % 10}


@pytest.mark.slow
def test_factors_of_low_rank(low_rank):
    """They begin as the base; factors and the class table alone are trained; W + A·B is what the
    model is applied with, and what it is exported with.
    """
    stage, factored, base = low_rank
    now = jax.jit(factored.init)(jax.random.key(0))
    now = now.replace(params=factored.begin(now.params))
    chex.assert_trees_all_equal(factored.to_model(now.params), base)  # bit for bit: A·0 = 0
    kernels = [path for path in flatten_dict(base, sep='/') if lora.is_product(path)]
    assert len(kernels) == 4
    names = {f'{path}/{name}' for path in kernels for name in ('lora_a', 'lora_b')}
    assert set(flatten_dict(now.params, sep='/')) == {*names, 'cls_embedding'}

    keys = jax.random.split(jax.random.key(5), 16)
    loss = jax.jit(stage.loss)
    with libraries_promote():
        step = jax.jit(factored.step)
        first = jax.jit(factored.loss)(now.params, factored.frozen, _batch(), keys)[0]
        np.testing.assert_allclose(first, loss(base, stage.frozen, _batch(), keys)[0], rtol=1e-6)
        for _ in range(3):
            now, scalars = step(now, factored.frozen, _batch(), 0)
    chex.assert_tree_all_finite((now, scalars))

    trained = flatten_dict(now.params, sep='/')
    whole = flatten_dict(factored.to_model(now.params), sep='/')
    for path, before in flatten_dict(base, sep='/').items():
        if path not in kernels:
            assert np.array_equal(whole[path], before) == (path != 'cls_embedding'), path
            continue
        a = np.asarray(trained[f'{path}/lora_a'], np.float64)
        b = np.asarray(trained[f'{path}/lora_b'], np.float64)
        n = len(before)
        product = a.reshape(n, -1, 2) @ b.reshape(n, 2, -1)
        assert np.abs(product).max() > 1e-5
        np.testing.assert_allclose(whole[path], before + product.reshape(before.shape), atol=1e-6)


def test_the_layout_of_factors_is_that_of_their_kernels(low_rank):
    """On a mesh that splits all axes, A has the specs of the kernel's inputs and B of its outputs,
    as have their moments.
    """
    _, factored, base = low_rank
    mesh = AbstractMesh((1, 2, 2), sharding.AXES)
    shapes = jax.eval_shape(factored.init, jax.random.key(0))
    kernels = flatten_dict(sharding.tree_shardings(mesh, base), sep='/')
    moments = optax.tree_utils.tree_get(shapes.opt_state, 'mu')
    for tree in (shapes.params, moments):
        found = flatten_dict(sharding.tree_shardings(mesh, tree), sep='/')
        for path in kernels:
            if lora.is_product(path):
                a = found[f'{path}/lora_a'].spec
                b = found[f'{path}/lora_b'].spec
                assert a[-1] is None
                assert tuple(b[:2]) == (None, None)
                assert P(*a[:-1], *b[2:]) == kernels[path].spec


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'freeze': ('(',)}, 'no regular expression'),
        ({'multipliers': ('head',)}, 'must have PATTERN=FACTOR'),
        ({'multipliers': ('head=0',)}, 'belongs into fine_tuning.freeze'),
        ({'lora_rank': -1}, 'at least 0'),
        ({'init_from': ''}, 'give --config.fine_tuning.init_from=DIR'),
        ({'init_from': None, 'lora_rank': 2}, 'nothing to begin with'),
    ],
)
def test_impossible_wishes_are_one_line(values, message):
    wishes = {f'fine_tuning.{key}': value for key, value in values.items()}
    cfg = schema.changed(tiny_config.get_config(), {'fine_tuning.init_from': '/a'} | wishes)
    with pytest.raises(UserError, match=message) as refused:
        checks.check(cfg)
    assert '\n' not in str(refused.value)


def test_the_section_is_read():
    cfg = schema.changed(
        tiny_config.get_config(),
        {'fine_tuning.freeze': ('head/',), 'fine_tuning.multipliers': ('a=b=0.5', 'norm=2')},
    )
    expected = Tuning(('head/',), (('a=b', 0.5), ('norm', 2.0)), 0)
    assert fine_tuning.read(cfg.fine_tuning) == expected
    assert fine_tuning.read(schema.default().fine_tuning) == Tuning()
