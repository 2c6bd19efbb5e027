"""Directions, blocks of Jacobians, and changes behind a disturbed token."""

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, checks
from sphere_ar_jax.experiments.kinds import propagation
from sphere_ar_jax.models.ar import unstacked
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.sampling.tokens import sample_tokens
from tests import tiny_config


def test_directions_are_radial_and_tangential():
    tokens = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    found = propagation.directions(tokens, 3)
    assert set(found) == set(propagation.DIRECTIONS)
    for vectors in found.values():
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)
    along = np.sum(found['radial'] * tokens, axis=-1)
    np.testing.assert_allclose(along, np.linalg.norm(tokens, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(np.sum(found['tangential'] * tokens, axis=-1), 0, atol=1e-5)


def test_blocks_are_those_of_an_orthonormal_basis():
    """The blocks of J in bases whose first vectors are the radial ones."""
    rng = np.random.default_rng(1)
    jacobian = rng.normal(size=(3, 6, 6))
    before = rng.normal(size=(3, 6))
    after = rng.normal(size=(3, 6))
    found = propagation.split(jacobian, before, after)
    for i in range(3):
        # QR makes an orthonormal basis whose first vector is ±the first column.
        into, _ = np.linalg.qr(np.column_stack([before[i], rng.normal(size=(6, 5))]))
        out, _ = np.linalg.qr(np.column_stack([after[i], rng.normal(size=(6, 5))]))
        block = out.T @ jacobian[i] @ into
        expected = {
            'radial_to_radial': abs(block[0, 0]),
            'radial_to_tangential': np.linalg.norm(block[1:, 0]),
            'tangential_to_radial': np.linalg.norm(block[0, 1:]),
            'tangential_to_tangential': np.linalg.norm(block[1:, 1:], ord=2),
        }
        chex.assert_trees_all_close({k: v[i] for k, v in found.items()}, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ('options', 'modes'),
    [
        ({}, ['after each token', 'never', 'before decoding']),
        ({'decoder_input': 'projected'}, ['after each token', 'before decoding']),
        ({'token_space': 'standardised', 'posterior': 'gaussian'}, ['never']),
        ({'token_space': 'latents', 'posterior': 'gaussian'}, ['never']),
    ],
)
def test_no_two_modes_are_the_same(options, modes):
    cfg = tiny_config.get_config()
    options = dict(options)
    cfg.ar.token_space = options.pop('token_space', cfg.ar.token_space)
    cfg.vae.update(options)
    run = tiny_config.random_run(checks.check(cfg))
    found = propagation._modes(run)
    assert list(found) == modes
    models = {(one.vae.token_space, one.vae.decoder_input) for one in found.values()}
    assert len(models) == len(modes)
    for one in found.values():
        x = np.full((2, one.vae.token_dim), 3.0, np.float32)
        is_projected = not np.allclose(one.vae.project(x), x)
        assert is_projected == (one is run and len(modes) > 1)


@pytest.fixture(scope='module')
def followed():
    """A tiny run with random weights, its sequences, and what `follow` finds at token 5."""
    run = tiny_config.random_run(guidance='constant', guidance_scale=1.5, solver='euler')
    sequences = propagation.Sequences(run, np.arange(3), 1.5)
    return run, sequences, propagation.follow(sequences, 5, (1e-3, 0.1), 0)


@pytest.mark.slow
def test_sequences_are_what_the_sampler_draws(followed):
    run, sequences, _ = followed
    ar, params = unstacked(run.ar, run.ar_params)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        on_mesh.sampling_key(run.config.seed), np.arange(3)
    )
    options = build.build_sampler(run.config).options
    z = sample_tokens(ar, params, np.arange(3), keys, options, 1.5)
    np.testing.assert_allclose(sequences.z, z, atol=1e-3)


@pytest.mark.slow
def test_changes_begin_behind_the_disturbed_token(followed):
    _, sequences, lines = followed
    L = sequences.z.shape[1]
    disturbed = [line for line in lines if line['part'] == 'disturbance']
    assert {(line['direction'], line['size']) for line in disturbed} == {
        (direction, size) for direction in propagation.DIRECTIONS for size in (1e-3, 0.1)
    }
    for line in disturbed:
        assert len(line['change']) == len(line['predicted']) == L
        np.testing.assert_allclose(line['change'][:5], 0, atol=1e-6)
        np.testing.assert_allclose(line['change'][5], line['size'], rtol=1e-3)
        np.testing.assert_allclose(line['predicted'][:5], 0, atol=1e-6)
        assert np.all(np.array(line['change'][6:]) > 0)


@pytest.mark.slow
def test_small_changes_are_as_the_derivatives_say(followed):
    """Forward mode against differences, on every later token."""
    _, _, lines = followed
    small = [line for line in lines if line['part'] == 'disturbance' and line['size'] == 1e-3]
    for line in small:
        np.testing.assert_allclose(line['change'][6:], line['predicted'][6:], rtol=0.05, atol=5e-7)


@pytest.mark.slow
def test_the_summary_is_the_growth_of_the_smallest_disturbance(followed):
    _, _, lines = followed
    found = propagation.summarize(ConfigDict(), lines)
    for direction in propagation.DIRECTIONS:
        (line,) = (
            line for line in lines if line.get('direction') == direction and line['size'] == 1e-3
        )
        behind = np.array(line['change'][6:])
        np.testing.assert_allclose(
            found[f'{direction}_growth'], np.sqrt(np.mean(behind**2)) / 1e-3, rtol=1e-6
        )
    (jacobian,) = (line for line in lines if line['part'] == 'jacobian')
    assert found['tangential_to_tangential'] == jacobian['tangential_to_tangential']
