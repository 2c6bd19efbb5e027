import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.models.judges import discriminators
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.state import quickly_compiled
from tests import torch_gan
from tests.conftest import GOLDENS


def _variables(name, side):
    """(discriminator, parameters by formula) for side × side pixels."""
    model = discriminators.build(name, (side, side, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    modules = torch_gan.PATCHGAN if name == 'patchgan' else torch_gan.stylegan(side)
    return model, torch_gan.by_formula(shapes['params'], modules)


@pytest.fixture(scope='module')
def gan():
    """Goldens of the public code; images NHWC."""
    golden = dict(np.load(GOLDENS / 'gan.npz')) | dict(np.load(GOLDENS / 'lpips.npz'))
    for name in ('real_nchw', 'fake_nchw', 'patchgan_hinge_gen_dfake'):
        golden[name.removesuffix('_nchw')] = golden[name].transpose(0, 2, 3, 1)
    return golden


@pytest.fixture(scope='module')
def patchgan():
    return _variables('patchgan', 64)


@pytest.fixture(scope='module')
def judged(gan, patchgan):
    """((generator's hinge loss, logits), images' gradient) for the real images and for the fake."""
    model, params = patchgan

    def loss(images, params):
        logits = model.apply({'params': params}, images)
        return discriminators.ADVERSARIAL['hinge'][1](logits), logits

    judge = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return judge(gan['real'], params), judge(gan['fake'], params)


def test_patchgan(gan, judged):
    """Logits, losses and the generator's gradient, of real and of fake images."""
    ((_, real), _), ((value, fake), gradient) = judged
    np.testing.assert_allclose(real, gan['patchgan_logits_real'][:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fake, gan['patchgan_logits_fake'][:, 0], rtol=1e-4, atol=1e-5)
    for name in ('hinge', 'vanilla'):
        of_discriminator = jax.jit(discriminators.ADVERSARIAL[name][0])(real, fake)
        np.testing.assert_allclose(of_discriminator, gan[f'd_{name}'], rtol=1e-5)
    np.testing.assert_allclose(value, gan['patchgan_hinge_gen'], rtol=1e-4)
    scale = np.abs(gan['patchgan_hinge_gen_dfake']).max()
    np.testing.assert_allclose(
        np.asarray(gradient) / scale, gan['patchgan_hinge_gen_dfake'] / scale, atol=1e-4
    )


@pytest.mark.slow
def test_stylegan(gan):
    model, params = _variables('stylegan', 64)
    judge = jax.jit(lambda images: model.apply({'params': params}, images))
    for name in ('real', 'fake'):
        logits = judge(gan[name])
        np.testing.assert_allclose(
            logits, gan[f'stylegan_logits_{name}'][:, 0], rtol=1e-4, atol=1e-5
        )


def test_batch_norm_by_hand():
    """By the mean and the biased variance of the batch, in float64."""
    x = np.random.default_rng(0).normal(3, 2, (2, 2, 3, 5)).astype(np.float32)
    scale = np.linspace(0.5, 1.5, 5, dtype=np.float32)
    bias = np.arange(5, dtype=np.float32)
    norm = discriminators.BatchNorm()
    params = {'scale': scale, 'bias': bias}
    rows = x.reshape(-1, 5).astype(np.float64)
    y = jax.jit(norm.apply)({'params': params}, x)
    expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_statistics_of_a_sharded_batch(patchgan):
    """Those of the whole batch (a real check only where there are several devices)."""
    model, params = patchgan
    images = np.random.default_rng(0).uniform(-1, 1, (8, 32, 32, 3)).astype(np.float32)
    # The rows are unlike each other.
    images *= np.linspace(0.2, 1, 8, dtype=np.float32)[:, None, None, None]
    judge = functools.partial(jax.jit(model.apply), {'params': params})
    one, every = (
        jax.device_get(judge(sharding.place_batch(sharding.make_mesh(n), images))) for n in (1, -1)
    )
    chex.assert_trees_all_close(one, every, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16(gan, patchgan, judged):
    """Convolutions are rounded; logits remain float32."""
    model, params = patchgan
    half = model.clone(dtype=jnp.bfloat16)
    rounded = jax.jit(half.apply)({'params': params}, gan['real'])
    ((_, exact), _), _ = judged
    chex.assert_type([rounded, exact], jnp.float32)
    assert 1e-4 < np.abs(np.asarray(rounded) - np.asarray(exact)).max() < 0.05 * np.std(exact)


@pytest.mark.slow
def test_initialisation():
    """As published: sizes (counted on the public modules), distributions and their widths."""
    for name, count in (('patchgan', 2_765_633), ('stylegan', 36_500_225)):
        model = discriminators.build(name, (256, 256, 3))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))[
            'params'
        ]
        assert sum(np.prod(s.shape) for s in jax.tree.leaves(shapes)) == count

    def init(name, side):
        model = discriminators.build(name, (side, side, 3))
        start = jax.jit(model.init, **quickly_compiled())
        return start(jax.random.key(0), jnp.zeros((1, side, side, 3)))

    variables = init('patchgan', 32)
    for name, module in variables['params'].items():
        if 'kernel' in module:
            np.testing.assert_allclose(np.std(module['kernel']), 0.02, rtol=0.05)
            assert abs(np.mean(module['kernel'])) < 1e-3
            assert ('bias' in module) == (name in ('conv0', 'conv_out'))
        else:
            np.testing.assert_allclose(np.std(module['scale']), 0.02, rtol=0.2)
            assert abs(np.mean(module['scale']) - 1) < 0.01
            assert not np.any(module['bias'])
    bias = np.abs(variables['params']['conv0']['bias'])
    assert 0.9 * 48**-0.5 < bias.max() <= 48**-0.5
    assert set(variables) == {'params'}  # no running statistics
    for path, leaf in jax.tree_util.tree_leaves_with_path(init('stylegan', 8)['params']):
        module = {'conv_in': 27, 'shortcut': 512, 'dense1': 8192, 'dense2': 512}
        bound = module.get(path[-2].key, 9 * 512) ** -0.5
        if leaf.size > 1:
            assert 0.98 * bound < np.abs(leaf).max() <= bound, path
            np.testing.assert_allclose(np.std(leaf), bound / 3**0.5, rtol=0.1)


def test_what_cannot_be_judged():
    for name, shape, message in (
        ('gan', (64, 64, 3), "'gan', but must be one of patchgan, stylegan"),
        ('patchgan', (16, 64, 1), '24×24 pixels, not 16×64'),
        ('stylegan', (48, 48, 3), 'not 48×48'), ('stylegan', (64, 32, 3), 'not 64×32'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            discriminators.build(name, shape)
        assert '\n' not in str(error.value)
    model = discriminators.build('patchgan', (24, 30, 1))
    assert jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, 24, 30, 1)))[
        0
    ].shape == (2, 1, 1)
