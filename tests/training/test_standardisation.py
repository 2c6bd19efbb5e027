"""The AR model's token spaces: latents, projected, standardised and polar."""

import json
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.config import build, experiments, schema
from sphere_ar_jax.data.batches import batches
from sphere_ar_jax.models import vae as vae_module
from sphere_ar_jax.models.posteriors import Gaussian, PowerSpherical
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sphere import geometry
from sphere_ar_jax.training import standardisation
from tests import tiny_config

MEAN = np.linspace(-1, 2, 8)
STD = np.linspace(0.5, 3, 8)


def build_tiny(**changes):
    """The tiny tokenizer with other values of its keys."""
    return build.build_vae(schema.changed(tiny_config.get_config(), changes))


@pytest.fixture(scope='module')
def z():
    """Latents of two images that lie on no sphere."""
    return jnp.float32(np.random.default_rng(0).normal(size=(2, 16, 8)) * STD + MEAN)


def apply(vae, z, method):
    """A method of the tokenizer that reads no trained parameters."""
    return vae.apply({'params': vae.with_statistics({}, MEAN, STD)}, z, method=method)


def test_latents_are_tokens_as_they_are(z):
    vae = build_tiny()
    chex.assert_trees_all_equal(apply(vae, z, 'to_tokens'), z)
    chex.assert_trees_all_equal(apply(vae, z, 'from_tokens'), z)
    chex.assert_trees_all_equal(vae.project(z), PowerSpherical().project(z))
    assert vae.with_statistics({'a': 1}) == {'a': 1}


def test_projected_tokens_have_the_norm_of_the_sphere(z):
    vae = build_tiny(**{'ar.token_space': 'projected'})
    tokens = apply(vae, z, 'to_tokens')
    norms = np.linalg.norm(np.asarray(z), axis=-1, keepdims=True)
    np.testing.assert_allclose(tokens, np.sqrt(8) * z / norms, rtol=1e-6)
    chex.assert_trees_all_equal(vae.project(z), tokens)
    chex.assert_trees_all_equal(apply(vae, tokens, 'from_tokens'), tokens)


def test_standardised_tokens_have_mean_0_and_spread_1(z):
    vae = build_tiny(**{'ar.token_space': 'standardised'})
    tokens = apply(vae, z, 'to_tokens')
    np.testing.assert_allclose(tokens, (np.asarray(z) - MEAN) / STD, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(vae, tokens, 'from_tokens'), z, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(vae.project(tokens), tokens)


def test_polar_tokens_are_a_direction_and_a_length(z):
    """Against NumPy; the inverse, the projection of drawn tokens, and latents next to 0."""
    changes = {'vae.posterior': 'gaussian', 'ar.token_space': 'polar'}
    vae = build_tiny(**changes, **{'ar.head': 'direction_magnitude'})
    assert (vae.token_dim, vae.num_statistics) == (9, 1)
    variables = {'params': vae.with_statistics({}, [0.7], [0.2])}

    @jax.jit
    def run(z):
        tokens = vae.apply(variables, z, method='to_tokens')
        drawn = jnp.concatenate([3 * tokens[..., :8], tokens[..., 8:] + 5], axis=-1)
        back = vae.apply(variables, tokens, method='from_tokens')
        slopes = jax.grad(lambda z: jnp.sum(vae.measured(z)))(z)
        return tokens, vae.project(drawn), back, slopes

    tokens, projected, back, slopes = run(z)
    norms = np.linalg.norm(np.asarray(z, np.float64), axis=-1, keepdims=True)
    expected = np.concatenate([np.sqrt(8) * z / norms, (np.log(norms) - 0.7) / 0.2], axis=-1)
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back, z, rtol=2e-5)
    np.testing.assert_allclose(projected[..., :8], tokens[..., :8], rtol=1e-5)
    np.testing.assert_array_equal(projected[..., 8:], tokens[..., 8:] + 5)
    np.testing.assert_allclose(slopes, z / norms**2, rtol=1e-4)

    sizes = np.float32([0, 1e-30, 1e-9, 1e-5, 1e5, 1e30]).repeat(6)[:32].reshape(2, 16, 1)
    ends = run(z / norms.astype(np.float32) * sizes)
    chex.assert_tree_all_finite(ends)
    expected = (np.log(np.maximum(sizes.astype(np.float64), 1e-7)) - 0.7) / 0.2
    np.testing.assert_allclose(ends[0][..., 8:], expected, rtol=1e-5)


class Copying(nn.Module):
    """A backbone whose hidden states are the pixels, so that nothing takes time to compile."""

    width: int = 8
    patch_size: int = 1
    image_channels: int = 8
    dtype: Any = jnp.float32

    def encode(self, images):
        return images.reshape(len(images), -1, self.width)

    def decode(self, x):
        return x


def copying(**fields):
    """A tokenizer of 4×4 tokens with that backbone, and its parameters."""
    vae = vae_module.VAE((4, 4), 8, Copying(), **fields)
    return vae, vae.init_params(jax.random.key(1))


@pytest.mark.slow
def test_the_decoder_may_read_projected_latents(z):
    plain, params = copying()
    projecting, _ = copying(decoder_input='projected')

    def decode(vae, z):
        return vae.apply({'params': params}, z, method='decode')

    decoded = decode(projecting, z)
    chex.assert_shape(decoded, (2, 4, 4, 8))
    chex.assert_tree_all_finite(decoded)
    by_hand = np.sqrt(8) * z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    np.testing.assert_allclose(decoded, decode(plain, by_hand), atol=1e-5)
    assert np.abs(decoded - decode(plain, z)).max() > 1e-3


def test_normalised_gaussian_and_power_spherical_tokens_differ_in_the_posterior_alone(z):
    """The paper's last step of claim 2 changes nothing else: decoder, tokens, AR model, loss."""
    configs = {
        row: schema.changed(tiny_config.get_config(), _dotted(experiments.LATENTS[row]))
        for row in ('gaussian_norm', 'power_spherical')
    }
    assert build.build_ar(configs['gaussian_norm']) == build.build_ar(configs['power_spherical'])
    gaussian, spherical = (
        build.build_vae(cfg).clone(grid=(4, 4), backbone=Copying()) for cfg in configs.values()
    )
    same = {
        'posterior': spherical.posterior,
        'decoder_input': spherical.decoder_input,
        'token_space': spherical.token_space,
    }
    assert gaussian.posterior != spherical.posterior
    assert gaussian.clone(**same) == spherical
    params = spherical.init_params(jax.random.key(1))
    on_sphere = geometry.project(z)
    for method in ('decode', 'decode_tokens', 'to_tokens', 'from_tokens'):
        theirs, ours = (
            vae.apply({'params': params}, on_sphere, method=method) for vae in (gaussian, spherical)
        )
        chex.assert_equal_shape([theirs, ours])
        np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-6, err_msg=method)
    chex.assert_trees_all_equal(gaussian.project(3 * z), spherical.project(3 * z))


def _dotted(changes):
    """Nested changes of a config as {'section.key': value}."""
    return {f'{section}.{key}': v for section, keys in changes.items() for key, v in keys.items()}


def test_decoding_tokens_decodes_their_latents(z):
    vae, params = copying(token_space='standardised')
    params = vae.with_statistics(params, MEAN, STD)
    tokens = vae.apply({'params': params}, z, method='to_tokens')
    images = vae.apply({'params': params}, tokens, method='decode_tokens')
    np.testing.assert_allclose(images, vae.apply({'params': params}, z, method='decode'), atol=1e-4)


class Images:
    """50 images of 4×4 pixels with 8 channels."""

    pixels = np.random.default_rng(2).normal(size=(50, 4, 4, 8)).astype(np.float32)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {'image': self.pixels[index], 'label': 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('space', 'batch_size'), [('standardised', 8), ('standardised', 64), ('polar', 8)]
)
def test_statistics_are_those_of_all_images_in_any_batches(space, batch_size):
    """Batches that do not divide the images, and one that is larger than all of them."""
    posterior = Gaussian() if space == 'polar' else PowerSpherical()
    vae, params = copying(token_space=space, posterior=posterior)
    found = standardisation.measure(
        vae, params, Images(), seed=3, batch_size=batch_size, mesh=sharding.make_mesh()
    )
    assert found['images'] == 50
    # The same draws by hand, in the order of the first epoch.
    with batches(Images(), batch_size=50, seed=3) as all_images:
        images = next(all_images)['image']
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(50))
    z, _ = vae_module.draw_latents(vae, params, images, keys)
    rows = np.asarray(z, np.float64).reshape(-1, 8)
    if space == 'polar':
        rows = np.log(np.linalg.norm(rows, axis=-1, keepdims=True))
    np.testing.assert_allclose(found['mean'], rows.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found['std'], rows.std(axis=0), rtol=1e-4)


def test_statistics_are_kept_with_the_tokenizer_and_measured_once(tmp_path, monkeypatch):
    vae = build_tiny(**{'ar.token_space': 'standardised'})
    params = {'a': jnp.ones(3)}
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return {'images': 2, 'mean': MEAN.tolist(), 'std': STD.tolist()}

    monkeypatch.setattr(standardisation, 'measure', counted)
    with pytest.raises(FileNotFoundError, match='no statistics of the latents yet'):
        standardisation.read(vae, params, tmp_path)
    added = standardisation.add(vae, params, None, tmp_path, seed=0)
    np.testing.assert_array_equal(added['statistics']['mean'], np.float32(MEAN))
    np.testing.assert_array_equal(added['statistics']['std'], np.float32(STD))
    chex.assert_trees_all_equal(standardisation.read(vae, params, tmp_path), added)
    standardisation.add(vae, params, None, tmp_path, seed=0)
    assert len(calls) == 1
    # Where one process has not got the file, all measure again, and none needs to find it.
    with monkeypatch.context() as patched:
        patched.setattr(standardisation.hosts, 'largest', lambda number: 1)
        patched.setattr(standardisation, 'read', None)
        chex.assert_trees_all_equal(standardisation.add(vae, params, None, tmp_path, seed=0), added)
    assert len(calls) == 2
    other = jax.tree.map(lambda a: a + 1, params)
    standardisation.add(vae, other, None, tmp_path, seed=0)
    assert len(calls) == 3


@pytest.mark.parametrize('damage', [{'std': [0.0] * 8}, {'mean': [1.0]}, {'std': ['a'] * 8}])
def test_damaged_statistics_are_refused_in_one_line(tmp_path, damage):
    vae = build_tiny(**{'ar.token_space': 'standardised'})
    file = standardisation.path(tmp_path)
    file.parent.mkdir()
    file.write_text(json.dumps({'mean': MEAN.tolist(), 'std': STD.tolist()} | damage))
    with pytest.raises(UserError, match='does not hold the statistics of 8 numbers'):
        standardisation.read(vae, {}, tmp_path)


@pytest.mark.parametrize(
    ('key', 'value'), [('ar.token_space', 'sphere'), ('vae.decoder_input', 'z')]
)
def test_unknown_words_are_refused(key, value):
    from sphere_ar_jax.config import checks

    cfg = schema.changed(tiny_config.get_config(), {key: value})
    with pytest.raises(UserError, match=f"{key} is '{value}': use latents, projected"):
        checks.check(cfg)
