import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.flow import guidance, path


def test_path_and_velocity():
    """x_t runs straight from noise to data, and its derivative in t is the target velocity."""
    noise = jnp.asarray([[1.0, 2.0]])
    z = jnp.asarray([[3.0, -2.0]])
    np.testing.assert_array_equal(path.interpolate(noise, z, jnp.zeros(1)), noise)
    np.testing.assert_array_equal(path.interpolate(noise, z, jnp.ones(1)), z)
    _, slope = jax.jvp(lambda t: path.interpolate(noise, z, t), (jnp.full(1, 0.3),), (jnp.ones(1),))
    np.testing.assert_allclose(slope, path.target_velocity(noise, z), rtol=1e-6)


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
    assert guidance.guide(v_cond, v_null, 1.0) == 2 and guidance.guide(v_cond, v_null, 0.0) == 1
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
