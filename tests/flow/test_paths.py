import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.flow import guidance, paths, solvers


def _points(seed, path):
    """Starts and tokens of a path, (6, 8)."""
    rng = np.random.default_rng(seed)
    noise = np.float32(rng.normal(size=(6, 8)))
    length = path.radius or np.sqrt(8)
    token = rng.normal(size=(6, 8))
    token *= length / np.linalg.norm(token, axis=-1, keepdims=True)
    return path.start(noise), np.float32(token)


PATHS = [paths.Straight(8), paths.Straight(8, 5.0, 0.5), paths.Geodesic(8), paths.Geodesic(8, 5.0)]


@pytest.mark.parametrize('path', PATHS, ids=str)
def test_path_and_velocity(path):
    """x_t runs from start to token; u_t is its derivative in t, and leads to the token."""
    start, z = _points(0, path)
    t = jnp.full(6, 0.3)
    x_0, _ = path.interpolate(start, z, jnp.zeros(6))
    x_1, _ = path.interpolate(start, z, jnp.ones(6))
    np.testing.assert_allclose(x_0, start, atol=1e-5)
    np.testing.assert_allclose(x_1, z, atol=1e-5)
    ones = jnp.ones(6)
    (x_t, u_t), (slope, _) = jax.jvp(lambda t: path.interpolate(start, z, t), (t,), (ones,))
    np.testing.assert_allclose(slope, u_t, atol=1e-5)
    np.testing.assert_allclose(path.along(x_t, u_t), u_t, atol=1e-5)
    np.testing.assert_allclose(path.move(x_t, (1 - t[:, None]) * u_t), z, atol=1e-5)
    np.testing.assert_allclose(path.move(x_t, path.between(x_t, z)), z, atol=1e-5)
    chex.assert_type([x_t, u_t], jnp.float32)


@pytest.mark.parametrize('path', PATHS, ids=str)
def test_solvers_follow_a_path_exactly(path):
    """A step along a path's own velocity, of Euler or of the second order, stays on the path."""
    start, z = _points(1, path)
    for solver in ('euler', 'ab2'):
        table = solvers.table(solver, 4)
        x = start
        memory = jnp.zeros_like(start)
        for t, w in zip(table.t, table.weights, strict=True):
            _, u = path.interpolate(start, z, jnp.full(6, t))
            x, memory = path.step((t, w), x, memory, u)
        np.testing.assert_allclose(x, z, atol=2e-5)


def test_a_start_is_as_long_as_its_path_says():
    noise = np.float32(np.random.default_rng(2).normal(size=(5, 8)))
    np.testing.assert_array_equal(paths.Straight(8).start(noise), noise)
    np.testing.assert_array_equal(paths.Straight(8, prior_scale=0.5).start(noise), noise / 2)
    norms = np.linalg.norm(paths.Geodesic(8, 5.0).start(noise), axis=-1)
    np.testing.assert_allclose(norms, 5, rtol=1e-6)


@pytest.mark.parametrize('path', [paths.Straight, paths.Geodesic])
def test_impossible_paths_are_refused(path):
    with pytest.raises(ValueError, match='radius'):
        path(8, 0.0)
    with pytest.raises(ValueError, match='prior_scale'):
        path(8, None, 0.0)


def _gaussian_velocity(mean, std):
    """The exact velocity E[z − noise | x_t] for data N(mean, std²): x_t has variance (1−t)² +
    t²·std².
    """

    def velocity(x, t):
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def test_guidance():
    v_cond = jnp.asarray([[2.0]])
    v_null = jnp.asarray([[1.0]])
    assert guidance.guide(v_cond, v_null, 1.0) == 2
    assert guidance.guide(v_cond, v_null, 0.0) == 1
    assert guidance.guide(v_cond, v_null, 4.5) == 5.5
    linear = guidance.guidance_scales(4.5, 16, 'linear')
    chex.assert_shape(linear, (16,))
    np.testing.assert_allclose(linear, [1 + 3.5 * k / 16 for k in range(16)], rtol=1e-6)
    assert linear[0] == 1  # exactly: the quirk of token 0 hangs on it
    np.testing.assert_array_equal(guidance.guidance_scales(3.0, 4, 'constant'), [3, 3, 3, 3])
    with pytest.raises(ValueError, match='cosine'):
        guidance.guidance_scales(3.0, 4, 'cosine')
    scales = np.float32([1.0, 4.5])
    for schedule in guidance.SCHEDULES:
        each = np.stack([guidance.guidance_scales(s, 16, schedule) for s in scales], axis=1)
        np.testing.assert_array_equal(guidance.guidance_scales(scales, 16, schedule), each)


def test_guidance_of_each_image():
    """Rows of several images are combined as those of each image alone are."""
    v = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
    scales = jnp.asarray([2.0, 1.0, 4.5])
    apart = scales == 1
    together = guidance.Guidance(scales, apart).combine(v)
    for i in range(3):
        rows = jnp.array([i, 3 + i])
        alone = guidance.Guidance(scales[i], apart[i]).combine(v[rows])
        np.testing.assert_array_equal(together[rows], alone)
