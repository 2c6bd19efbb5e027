import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax import flow


def test_path_and_velocity():
    """x_t runs straight from noise to data, and its derivative in t is the target velocity."""
    noise, z = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, -2.0]])
    np.testing.assert_array_equal(flow.interpolate(noise, z, jnp.zeros(1)), noise)
    np.testing.assert_array_equal(flow.interpolate(noise, z, jnp.ones(1)), z)
    _, slope = jax.jvp(lambda t: flow.interpolate(noise, z, t), (jnp.full(1, 0.3),), (jnp.ones(1),))
    np.testing.assert_allclose(slope, flow.target_velocity(noise, z), rtol=1e-6)


def _gaussian_velocity(mean, std):
    """The exact velocity E[z − noise | x_t] for data N(mean, std²): x_t has variance (1−t)² + t²·std²."""

    def velocity(x, t, _):
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


@pytest.mark.parametrize('t', [0.0, 0.3, 0.96])
def test_score_of_a_gaussian(t):
    """For data N(m, s²) the score is known in closed form."""
    mean, std, x = 0.7, 0.4, jnp.linspace(-2, 2, 9)[:, None]
    v = _gaussian_velocity(mean, std)(x, t, None)
    variance = (1 - t) ** 2 + (t * std) ** 2
    np.testing.assert_allclose(flow.score(v, x, t), -(x - t * mean) / variance, rtol=1e-3, atol=1e-4)


def test_guidance():
    v_cond, v_null = jnp.asarray([[2.0]]), jnp.asarray([[1.0]])
    assert flow.guide(v_cond, v_null, 1.0) == 2 and flow.guide(v_cond, v_null, 0.0) == 1
    assert flow.guide(v_cond, v_null, 4.5) == 5.5
    linear = flow.guidance_scales(4.5, 16, 'linear')
    chex.assert_shape(linear, (16,))
    np.testing.assert_allclose(linear, [1 + 3.5 * k / 16 for k in range(16)], rtol=1e-6)
    assert linear[0] == 1  # exactly: the quirk of token 0 hangs on it
    np.testing.assert_array_equal(flow.guidance_scales(3.0, 4, 'constant'), [3, 3, 3, 3])
    with pytest.raises(ValueError, match='cosine'):
        flow.guidance_scales(3.0, 4, 'cosine')


def test_solver_times():
    t, dt = flow.solver_times('euler_maruyama', 100)
    chex.assert_shape((t, dt), (101,))
    np.testing.assert_allclose(t[:-1], np.arange(100) * 0.0096, atol=1e-6)
    np.testing.assert_allclose([t[-1], dt[-1], dt.sum()], [0.96, 0.04, 1], rtol=1e-6)
    t, dt = flow.solver_times('euler', 8)
    np.testing.assert_allclose(t, np.arange(8) / 8)
    np.testing.assert_allclose(dt, 1 / 8)
    assert flow.num_draws('euler', 8) == 1 and flow.num_draws('euler_maruyama', 100) == 101
    for arguments in (('heun', 8), ('euler', 0), ('euler_maruyama', 8, 1.5)):
        with pytest.raises(ValueError):
            flow.solver_times(*arguments)


def test_euler_converges_to_the_exact_flow():
    """Between Gaussians the flow is x₁ = mean + std·x₀; Euler's error falls with the first order."""
    mean, std = 0.7, 0.4
    x = jnp.linspace(-2, 2, 9)[:, None]

    def error(steps):
        out = flow.integrate(
            _gaussian_velocity(mean, std), x, jnp.zeros((0, 9, 1)), flow.solver_times('euler', steps), jnp.zeros(steps)
        )
        return np.abs(np.asarray(out) - (mean + std * np.asarray(x))).max()

    assert error(400) < 5e-3
    assert 1.8 < error(50) / error(100) < 2.2


def test_euler_maruyama_has_the_law_of_the_data():
    mean, std, n = 0.7, 0.4, 40_000
    times = flow.solver_times('euler_maruyama', 200)
    draws = jax.random.normal(jax.random.key(0), (201, n, 1))
    x = np.asarray(flow.integrate(_gaussian_velocity(mean, std), draws[0], draws[1:], times, jnp.zeros(201)))
    assert abs(x.mean() - mean) < 5 * std / np.sqrt(n) + 2e-3
    assert abs(x.std() / std - 1) < 0.02
