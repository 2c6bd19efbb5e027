"""The head of a direction and a length, on tokens of the space 'polar'."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.flow import solvers
from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.flow.plan import Options
from tests import tiny_config
from tests.tiny_config import random_arrays

D = 8
CHANGES = {
    'vae.posterior': 'gaussian',
    'ar.token_space': 'polar',
    'ar.head': 'direction_magnitude',
    'ar.magnitude_weight': 0.25,
}


@pytest.fixture(scope='module')
def parts():
    """(VAE, AR, parameters of the AR model) of the tiny config, for sampling."""
    cfg = schema.changed(tiny_config.get_config(), CHANGES)
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg).apart()
    return vae, ar, random_arrays(jax.eval_shape(ar.init_params, jax.random.key(0)))


def test_loss_weighs_the_length_apart(parts):
    """Against NumPy in float64, from the head's own velocities."""
    _, ar, params = parts
    rng = np.random.default_rng(0)
    c = rng.normal(size=(2, 3, 16)).astype(np.float32)
    z = rng.normal(size=(2, 3, D + 1)).astype(np.float32)
    t_normal = rng.normal(size=(4, 2, 3)).astype(np.float32)
    noise = rng.normal(size=(4, 2, 3, D + 1)).astype(np.float32)
    t = 1 / (1 + np.exp(-t_normal.astype(np.float64)))
    x_t = (1 - t[..., None]) * noise + t[..., None] * z

    @jax.jit
    def run(x_t, t):
        variables = {'params': params['head']}
        v = ar.head.apply(variables, x_t, c, t, method='velocities')
        return v, ar.head.apply(variables, c, z, (t_normal, noise), method='loss')

    v, (loss, scalars) = run(np.float32(x_t), np.float32(t))
    chex.assert_shape(v, (4, 2, 3, D + 1))
    error = (np.asarray(v, np.float64) - (z - noise)) ** 2
    magnitude = error[..., -1].mean()
    np.testing.assert_allclose(loss, error[..., :-1].mean() + 0.25 * magnitude, rtol=1e-5)
    np.testing.assert_allclose(scalars['magnitude_loss'], magnitude, rtol=1e-5)
    predicted = (x_t + (1 - t[..., None]) * v)[..., :-1]
    norm = np.linalg.norm(predicted, axis=-1).mean()
    np.testing.assert_allclose(scalars['token_norm'], norm, rtol=1e-5)


def test_a_token_is_drawn_by_guided_steps_and_then_projected(parts):
    """`draw_token` and the projection against a loop in Python over the head's own velocities.

    Guidance acts on all d + 1 numbers, and the projection on the first d.
    """
    vae, ar, params = parts
    rng = np.random.default_rng(1)
    c = rng.normal(size=(4, 16)).astype(np.float32)
    start = rng.normal(size=(2, D + 1)).astype(np.float32)
    noise = np.concatenate([start, start])[None]
    options = Options('ab2', 3, guidance='constant')
    scale = 1.5

    @jax.jit
    def draw(c, noise):
        head = params['head']
        solver = jax.tree.map(lambda a: a[0], ar.head.prepare(head, options.plan(4)))
        guidance = Guidance(jnp.float32(scale), jnp.asarray(False))
        return vae.project(ar.head.draw_token(head, c, noise, solver, guidance))

    @jax.jit
    def velocities(x, c, t):
        both = jnp.concatenate([x, x])
        v = ar.head.apply({'params': params['head']}, both, c, jnp.full(4, t), method='velocity')
        return v[2:] + scale * (v[:2] - v[2:])

    x = start
    before = None
    for t in solvers.table('ab2', 3).t:
        v = np.asarray(velocities(x, c, t))
        x = x + (v if before is None else 1.5 * v - 0.5 * before) / 3
        before = v
    norm = np.linalg.norm(x[:, :D], axis=-1, keepdims=True)
    expected = np.concatenate([np.sqrt(D) * x[:, :D] / norm, x[:, D:]], axis=-1)
    z = np.asarray(draw(c, noise))
    chex.assert_shape(z, (4, D + 1))
    np.testing.assert_array_equal(z[:2], z[2:])
    np.testing.assert_allclose(z[:2], expected, atol=2e-5)
