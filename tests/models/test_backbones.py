"""The backbones of the tokenizer beside each other: sizes, values, gradients, and refusals."""

import dataclasses
import functools
import json
import math
import re

import chex
import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from sphere_ar_jax.commands import checkpoints
from sphere_ar_jax.commands.inputs import origins
from sphere_ar_jax.config import build, checks, recipes, schema
from sphere_ar_jax.data import digits
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.models import vae
from sphere_ar_jax.models.backbones import BACKBONES, cnn, vit
from sphere_ar_jax.runtime import files, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import loop, run, workdir
from sphere_ar_jax.training.stages import tokenizer_stage
from tests import tiny_config
from tests.config.test_config import _load
from tests.conftest import GOLDENS, libraries_promote

WORDS = ('hybrid', 'cnn', 'vit')
# Parameters of the tokenizer with each backbone, by the config.
COUNTS = {
    'vae': {'hybrid': 75_393_297, 'cnn': 76_364_049, 'vit': 76_066_321},
    'digits': {'hybrid': 673_225, 'cnn': 653_785, 'vit': 686_457},
}


def _config(word):
    cfg = tiny_config.get_config()
    cfg.vae.backbone = word
    return checks.check(cfg)


def _shapes(cfg):
    return jax.eval_shape(build.build_vae(cfg).init_params, jax.random.key(0))


def _paths(tree):
    return traverse.flatten_dict(tree, sep='/')


@functools.cache
def _tokenizer(word, dtype='float32'):
    """A tiny tokenizer of 2×2 tokens with random parameters."""
    cfg = _config(word)
    cfg.vae.update(grid=(2, 2), channels=(4, 8))
    cfg.dtype = dtype
    model = build.build_vae(cfg)
    return model, tiny_config.random_arrays(_shapes(cfg))


# The tokens of three images.
Z = np.random.default_rng(1).standard_normal((3, 4, 8)).astype(np.float32)


def _images(model):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (3, *model.image_shape)).astype(np.float32)


@pytest.mark.parametrize('name', COUNTS)
def test_parameters_are_matched(name):
    """Pinned, and within 5% of the hybrid's; images have the hybrid's shape."""
    found = {}
    for word in WORDS:
        cfg = checks.check(_load(name, '' if word == 'hybrid' else word))
        assert cfg.vae.backbone == word
        assert build.build_vae(cfg).image_shape == build.build_vae(_load(name, '')).image_shape
        found[word] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes(cfg)))
    assert found == COUNTS[name]
    for count in found.values():
        assert abs(count / found['hybrid'] - 1) < 0.05


def test_defaults_are_the_matched_sizes():
    for word, backbone in BACKBONES.items():
        argument = '' if word == 'hybrid' else word
        assert build.build_vae(_load('vae', argument)) == vae.VAE(backbone=backbone())


def test_words_of_the_configs():
    smoke = checks.check(_load('digits', 'cnn,smoke'))
    assert smoke.vae.backbone == 'cnn'
    assert smoke.tokenizer_training.steps == 12
    assert checks.check(_load('ar_b', 'vit,tpu')).vae == _load('vae', 'vit').vae
    for name in ('digits', 'vae', 'ar_b'):
        with pytest.raises(ValueError, match='has one backbone: use one of cnn, vit'):
            _load(name, 'cnn,vit')


@functools.cache
def _measured(word):
    """(images reconstructed from Z, hidden states, posterior) of random images, and the gradient of
    a loss of them all.
    """
    model, params = _tokenizer(word)
    images = _images(model)

    def value(params):
        decoded, q = model.apply({'params': params}, images, Z)
        hidden = model.backbone.apply({'params': params}, images, method='encode')
        weights = np.cos(np.arange(q.mu.size, dtype=np.float32)).reshape(q.mu.shape)
        loss = jnp.sum(decoded**2) + jnp.sum(q.mu * weights) + jnp.sum(q.kappa)
        return loss, (decoded, hidden, q)

    (_, results), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    return results, gradient


@pytest.mark.parametrize(
    'word', [pytest.param(w, marks=pytest.mark.slow if w == 'cnn' else ()) for w in WORDS]
)
def test_shapes_and_gradients(word):
    """Everything is finite, and the gradient of every parameter is not 0."""
    (decoded, hidden, q), gradient = _measured(word)
    chex.assert_shape([decoded, hidden, q.mu], [(3, 4, 4, 1), (3, 4, 8), (3, 4, 8)])
    chex.assert_type([decoded, hidden, q.mu, q.kappa], jnp.float32)
    chex.assert_tree_all_finite((decoded, hidden, q, gradient))
    for path, leaf in _paths(gradient).items():
        assert np.abs(leaf).max() > 1e-8, path


@pytest.mark.parametrize('word', [pytest.param('cnn', marks=pytest.mark.slow), 'vit'])
@libraries_promote()
def test_bfloat16_computes_near_float32(word):
    """Within 5% root mean square; parameters stay float32."""
    model, params = _tokenizer(word)
    half, _ = _tokenizer(word, 'bfloat16')
    assert half.backbone.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_dtypes(jax.eval_shape(half.init_params, jax.random.key(0)), params)

    @jax.jit
    def run(params, images):
        hidden = half.backbone.apply({'params': params}, images, method='encode')
        return hidden, half.apply({'params': params}, Z, method='decode')

    hidden, decoded = run(params, _images(model))
    assert hidden.dtype == jnp.bfloat16
    assert decoded.dtype == jnp.float32
    (true_decoded, true_hidden, _), _ = _measured(word)
    for ours, truth in ((hidden, true_hidden), (decoded, true_decoded)):
        error = np.asarray(ours, np.float64) - np.asarray(truth, np.float64)
        relative = np.sqrt(np.mean(error**2) / np.mean(np.asarray(truth, np.float64) ** 2))
        assert 1e-5 < relative < 0.05


def _group_norm(x, scale, bias):
    """GroupNorm over groups of four channels, in float64."""
    B, H, W, c = x.shape
    groups = x.reshape(B, H * W, c // 4, 4)
    mean = groups.mean((1, 3), keepdims=True)
    normal = (groups - mean) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    return normal.reshape(x.shape) * scale + bias


def test_the_attention_of_cnn_is_written_out():
    """softmax(QKᵀ/√D)·V with one head over the grid, in NumPy's float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 2.0, (2, 3, 5, 16)).astype(np.float32)
    module = cnn.GridAttention()
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
    params = tiny_config.random_arrays(shapes, seed=3)
    params = jax.tree.map(lambda a: 2 * a, params)  # attention that is not nearly uniform
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    normal = _group_norm(x.astype(np.float64), **exact['norm']).reshape(2, 15, 16)
    q = normal @ exact['q']['kernel']
    k = normal @ exact['k']['kernel']
    v = normal @ exact['v']['kernel']
    weights = np.exp(q @ k.swapaxes(1, 2) / 4)  # √D = 4
    weights /= weights.sum(-1, keepdims=True)
    assert weights.max() > 0.3
    truth = x + (weights @ v @ exact['proj']['kernel']).reshape(x.shape)
    out = jax.jit(module.apply)({'params': params}, x)
    np.testing.assert_allclose(out, truth, rtol=1e-4, atol=1e-4)


def test_patches_are_where_the_layout_says():
    """Patch (i, j) has pixel (a, b) and channel k at (a·p + b)·c + k; unpatchify inverts it."""
    p = 3
    images = np.random.default_rng(0).normal(size=(2, 6, 9, 2)).astype(np.float32)
    patches = np.asarray(jax.jit(vit.patchify, static_argnums=1)(images, p))
    assert patches.shape == (2, 2, 3, 18)
    for i, j, a, b, k in np.ndindex(2, 3, p, p, 2):
        pixel = images[:, i * p + a, j * p + b, k]
        np.testing.assert_array_equal(patches[:, i, j, (a * p + b) * 2 + k], pixel)
    again = jax.jit(vit.unpatchify, static_argnums=1)(patches, p)
    np.testing.assert_array_equal(again, images)


def test_the_embedding_of_vit_is_a_strided_convolution():
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, 8, 4, 3)).astype(np.float32)
    kernel = rng.normal(size=(48, 5)).astype(np.float32)
    truth = jax.lax.conv_general_dilated(
        images,
        kernel.reshape(4, 4, 3, 5),
        (4, 4),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    found = jax.jit(lambda images: vit.patchify(images, 4) @ kernel)(images)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5)


# Parameters that are replicated on every device on purpose: convolutions, norms, registers, linear
# layers between pixels, tokens and hidden states, and the one attention of `cnn`.
WHOLE = (
    'conv', 'shortcut', 'norm', 'registers', 'embed', 'output', 'pixels', 'quant_proj',
    'middle/attention',
)  # fmt: skip


@pytest.mark.parametrize('word', WORDS)
def test_the_layout_of_every_parameter(word):
    """The transformers are split as the AR model is, and all else is replicated."""
    shapes = _shapes(_load('vae', '' if word == 'hybrid' else word))
    mesh = AbstractMesh((2, 8, 4), sharding.AXES)
    assert sharding.describe_not_split(mesh, shapes) == ''
    split = {}
    for path, layout in _paths(sharding.tree_shardings(mesh, shapes)).items():
        if set(layout.spec) == {None}:
            assert any(part in path for part in WHOLE), path
        else:
            split[path] = layout.spec
    blocks = {
        'attention/out/kernel': P(None, 'tensor', None, 'fsdp'),
        'attention/qkv/kernel': P(None, 'fsdp', None, 'tensor', None),
        'mlp/w1/kernel': P(None, 'fsdp', None, 'tensor'),
        'mlp/w2/kernel': P(None, 'tensor', 'fsdp'),
    }
    parts = () if word == 'cnn' else ('encoder', 'decoder')
    assert split == {
        f'{part}/vit/stack/blocks/{name}': spec for part in parts for name, spec in blocks.items()
    }


def test_keys_that_a_backbone_does_not_read():
    """They are said, never refused, and change no model."""
    unread = {word: build.unread_keys(_config(word)) for word in WORDS}
    depths = ['encoder_depth', 'decoder_depth', 'heads', 'remat', 'unroll']
    assert {word: sorted(keys) for word, keys in unread.items()} == {
        'hybrid': [], 'cnn': sorted(depths), 'vit': ['stem'],
    }  # fmt: skip
    first, *_ = checks.advice(_config('vit'), 64)
    assert first == 'vae: the backbone vit does not read stem'
    for word, key, value in (
        ('cnn', 'heads', 3),
        ('vit', 'stem', 3),
        ('vit', 'channels', (1, 2, 16)),
    ):
        cfg = _config(word)
        other = checks.check(schema.changed(cfg, {f'vae.{key}': value}))
        assert build.build_vae(other) == build.build_vae(cfg)


@pytest.mark.parametrize(
    ('word', 'key', 'value', 'message'),
    [
        ('cnn', 'stem', 3, 'cannot be normalised'),
        ('vit', 'heads', 3, '3 heads do not divide the width 16'),
        ('vit', 'channels', (4, 0), 'at least 1 each'),
        ('vit', 'channels', (16,), 'at least two stages'),
        ('hybrid', 'backbone', 'unet', 'vae.backbone'),
    ],
)
def test_values_that_a_backbone_cannot_have(word, key, value, message):
    cfg = schema.changed(_config(word), {f'vae.{key}': value})
    with pytest.raises(UserError, match=message) as caught:
        checks.check(cfg)
    assert '\n' not in str(caught.value)


def _begun(cfg, directory):
    """A workdir as a training begins it, without a checkpoint."""
    files.write_json(f'{directory}/config.json', schema.as_dict(cfg))
    return str(directory)


def test_backbones_refuse_each_others_workdirs(tmp_path):
    """In the same workdir, and as the tokenizer of another one."""
    old = _begun(_config('hybrid'), tmp_path)
    cfg = _config('cnn')
    with pytest.raises(UserError, match=r'another config \(vae.backbone hybrid → cnn\): use anoth'):
        workdir.claim(cfg, old)
    cfg.tokenizer = old
    refusal = rf'^{old} has another tokenizer \(vae.backbone hybrid → cnn\) than this config$'
    mesh = sharding.make_mesh(1)
    with pytest.raises(UserError, match=refusal):
        run.load_tokenizer(cfg, mesh)
    with pytest.raises(UserError, match=f'^{old} names itself as the run that has its tokenizer'):
        run.load_run(old, mesh, tokenizer_only=True, cfg=cfg)
    with pytest.raises(UserError, match=refusal):
        run.load_run(tmp_path / 'other', mesh, tokenizer_only=True, cfg=cfg)
    with pytest.raises(UserError, match=f'^tokenizer: {refusal[1:]}'):
        origins.read_tokenizer(cfg, mesh)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'vae.posterior': 'vmf'}, r'vae.posterior power_spherical → vmf'),
        (
            {'vae.posterior': 'gaussian', 'ar.token_space': 'standardised'},
            r'vae.posterior power_spherical → gaussian',
        ),
        (
            {
                'vae.posterior': 'sigma_vae',
                'vae.decoder_input': 'projected',
                'ar.token_space': 'projected',
            },
            r'vae.posterior power_spherical → sigma_vae; vae.decoder_input latents → projected',
        ),
    ],
)
def test_latent_families_refuse_each_others_tokenizers(changes, words, tmp_path):
    old = _begun(_config('hybrid'), tmp_path)
    cfg = checks.check(schema.changed(_config('hybrid'), changes))
    cfg.tokenizer = old
    with pytest.raises(UserError) as caught:
        run.load_tokenizer(cfg, sharding.make_mesh(1))
    assert '\n' not in str(caught.value)
    assert re.search(rf'has another tokenizer \(.*{words}', str(caught.value))


def test_token_spaces_refuse_each_others_workdirs(tmp_path):
    """The same tokenizer gives a Gaussian run and its normalised twin their tokens."""
    gaussian = schema.changed(
        _config('hybrid'), {'vae.posterior': 'gaussian', 'ar.token_space': 'standardised'}
    )
    old = _begun(gaussian, tmp_path)
    projected = checks.check(schema.changed(gaussian, {'ar.token_space': 'projected'}))
    with pytest.raises(UserError, match='token_space standardised → projected') as caught:
        workdir.claim(projected, old)
    assert '\n' not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class _OtherPosterior:
    """A posterior that the public code does not have."""


@pytest.mark.parametrize('word', ['cnn', 'vit'])
def test_the_public_format_has_the_hybrid_alone(word, tmp_path):
    model, params = _tokenizer(word)
    name = type(model.backbone).__name__
    with pytest.raises(UserError, match=f'the vae.backbone Hybrid alone, not {name}:') as caught:
        torch_names.export(tmp_path / 'model.safetensors', model, params)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())
    model, params = _tokenizer('hybrid')
    other = model.clone(posterior=_OtherPosterior())
    with pytest.raises(UserError, match='posterior PowerSpherical alone, not _OtherPosterior:'):
        torch_names.export(tmp_path / 'model.safetensors', other, params)
    like = recipes.published_vae(word)
    with pytest.raises(
        UserError, match=rf'than --config \(.*vae.backbone {word} → hybrid'
    ) as caught:
        checkpoints.convert_checkpoint(
            str(GOLDENS / 'tiny.pt'), str(tmp_path / 'w'), heads=2, like=like
        )
    assert '\n' not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize('word', ['cnn', 'vit'])
def test_each_trains_by_the_loop(word, tmp_path):
    """The loss falls, and the run is read back bit for bit."""
    cfg = _config(word)
    cfg.tokenizer_training.update(steps=30, checkpoint_every=30, log_every=1)
    stage = tokenizer_stage(build.build_vae(cfg), cfg.tokenizer_training)
    source = digits.Digits('train', cfg.seed, cfg.data.holdout)
    _begun(cfg, tmp_path)
    mesh = sharding.make_mesh(1)
    with libraries_promote():
        state, _ = loop.train(stage, source, str(tmp_path / 'tokenizer'), seed=0, mesh=mesh)
    log = (tmp_path / 'tokenizer' / 'metrics.jsonl').read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    read = run.load_run(str(tmp_path), mesh, tokenizer_only=True)
    chex.assert_trees_all_equal(read.vae_params, state.eval_params)
