import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import spatial

from sphere_ar_jax.sphere import geometry

project = jax.jit(geometry.project, static_argnames='radius')
l2_normalize = jax.jit(geometry.l2_normalize)
householder = jax.jit(geometry.householder)
slerp = jax.jit(geometry.slerp)


@jax.jit
def derivative(z, z_dot):
    """The derivative of the projection at z along z_dot."""
    return jax.jvp(geometry.project, (z,), (z_dot,))[1]


def _points(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_projection_has_the_radius_and_the_direction():
    z = _points((5, 3, 16))
    projected = project(z)
    chex.assert_shape(projected, (5, 3, 16))
    np.testing.assert_allclose(np.linalg.norm(projected, axis=-1), 4.0, rtol=1e-6)
    np.testing.assert_allclose(projected, 4 * _unit(z), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(project(z, radius=2.5), axis=-1), 2.5, rtol=1e-6)


def test_derivative_is_the_tangent_projection():
    """Against finite differences and against (R/‖z‖)(I − uuᵀ), in float64."""
    with jax.enable_x64(True):
        z = _points((7, 16), np.float64)
        z_dot = _points((7, 16), np.float64, 1)
        tangent = derivative(z, z_dot)
        h = 1e-6
        above = np.asarray(project(z + h * z_dot))
        difference = (above - np.asarray(project(z - h * z_dot))) / (2 * h)
        np.testing.assert_allclose(tangent, difference, atol=1e-8)
        norm = np.linalg.norm(z, axis=-1)[:, None, None]
        u = z[:, :, None] / norm
        matrix = 4 / norm * (np.eye(16) - u @ u.swapaxes(1, 2))
        np.testing.assert_allclose(tangent, (matrix @ z_dot[:, :, None])[..., 0], atol=1e-13)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
@pytest.mark.parametrize('scale', [1.0, 1e-9, 1e-30, 1e30])
def test_radial_tangent_gives_exactly_zero(dtype, scale):
    z = _points((200, 16), dtype) * np.asarray(scale, dtype)
    for factor in (1.0, -4.0):  # powers of two, so that the tangent itself is exactly radial
        tangent = derivative(z, np.asarray(factor, dtype) * z)
        np.testing.assert_array_equal(np.asarray(tangent, np.float32), 0)


@jax.jit
def _value_and_slope(z):
    def loss(z):
        return jnp.sum(geometry.project(z).astype(jnp.float32))

    return geometry.project(z), jax.grad(loss)(z)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize('scale', [0.0, 1e-30, 1e-20, 1e20, 1e30])
def test_finite_everywhere(dtype, scale):
    z = _points((4, 16)) * np.float32(scale)
    if dtype == np.float16:
        z = np.clip(z, -6e4, 6e4)
    value, slope = _value_and_slope(z.astype(dtype))
    assert value.dtype == dtype
    value = np.asarray(value, np.float32)
    assert np.isfinite(value).all()
    if dtype != np.float16:  # the slope R/1e-7 at 0 is beyond float16
        assert np.isfinite(np.asarray(slope, np.float32)).all()
    if scale == 1e30 and dtype != np.float16:
        np.testing.assert_allclose(np.linalg.norm(value, axis=-1), 4, rtol=1e-2)


def test_below_eps_the_value_is_the_clamped_quotient():
    z = np.float32([[1e-8, 0, 0, 0]])
    np.testing.assert_allclose(np.asarray(l2_normalize(z))[0, 0], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(l2_normalize(np.zeros((1, 4), np.float32)), 0)


def test_reverse_and_second_derivatives():
    """Reverse mode is the transpose of forward mode, and the Hessian matches finite differences."""
    with jax.enable_x64(True):
        z = _points((8,), np.float64)
        w = _points((8,), np.float64, 1)

        def loss(z):
            return jnp.sum(w * geometry.project(z) ** 3)

        @jax.jit
        def derivatives(z):
            jacobians = [jax.jacfwd(geometry.project)(z), jax.jacrev(geometry.project)(z)]
            return *jacobians, jax.hessian(loss)(z)

        forward, reverse, hessian = map(np.asarray, derivatives(z))
        np.testing.assert_allclose(forward, reverse, atol=1e-14)
        slopes = jax.jit(jax.vmap(jax.grad(loss)))
        h = 1e-6
        above = np.asarray(slopes(z + h * np.eye(8)))
        rows = (above - np.asarray(slopes(z - h * np.eye(8)))) / (2 * h)
        np.testing.assert_allclose(hessian, rows, atol=1e-6)
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)


@jax.jit
def _hessian_vector_products(z, directions):
    def loss(z):
        return jnp.sum(geometry.project(z).astype(jnp.float32) ** 2 * jnp.arange(16.0))

    def product(z, direction):
        return jax.jvp(jax.grad(loss), (z,), (direction,))[1]

    return jax.vmap(product)(z, directions)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
@pytest.mark.parametrize('scale', [0.0, 1e-37, 1e-32, 1e-30, 1e-8, 1.0, 1e30])
def test_second_derivatives_are_finite_everywhere(dtype, scale):
    """Hessian-vector products along ordinary directions, also under vmap."""
    z = (_points((3, 16)) * np.float32(scale)).astype(dtype)
    found = _hessian_vector_products(z, _points((3, 16), dtype, 1))
    assert np.isfinite(np.asarray(found, np.float32)).all()


def test_vmap_and_jit_agree_with_the_plain_call():
    z = _points((6, 16))
    np.testing.assert_array_equal(jax.vmap(geometry.project)(z), geometry.project(z))
    np.testing.assert_allclose(project(z), geometry.project(z), rtol=1e-6)
    slope = jax.grad(lambda z: jnp.sum(geometry.project(z) ** 3))
    np.testing.assert_allclose(jax.jit(jax.vmap(slope))(z), slope(z), rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_once():
    z = _points((50, 8), jnp.bfloat16)
    for function in (l2_normalize, project, functools.partial(project, radius=2.3)):
        exact = np.asarray(function(z.astype(np.float32))).astype(jnp.bfloat16)
        np.testing.assert_array_equal(
            np.asarray(function(z), np.float32), np.asarray(exact, np.float32)
        )


def test_householder_takes_e1_to_mu_and_keeps_lengths():
    mu = _unit(_points((20, 5)))
    e1 = np.tile(np.eye(1, 5, dtype=np.float32), (20, 1))
    np.testing.assert_allclose(householder(e1, mu), mu, atol=1e-6)
    y = _points((20, 5), seed=1)
    reflected = np.asarray(householder(y, mu))
    np.testing.assert_allclose(
        np.linalg.norm(reflected, axis=-1), np.linalg.norm(y, axis=-1), rtol=1e-5
    )
    np.testing.assert_allclose(householder(reflected, mu), y, atol=1e-5)  # an involution


def test_householder_at_the_poles():
    e1 = np.eye(1, 5, dtype=np.float32)
    y = _points((1, 5))
    np.testing.assert_array_equal(householder(y, e1), y)
    np.testing.assert_allclose(householder(y, -e1), y * [[-1.0, 1, 1, 1, 1]], atol=1e-7)
    gradient = jax.jit(jax.grad(lambda mu: jnp.sum(geometry.householder(y, mu))))
    chex.assert_tree_all_finite((gradient(e1), gradient(-e1)))


@pytest.mark.parametrize('d', [1, 2, 16])
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_the_largest_numbers_are_projected(d, dtype):
    """Also where their norm is beyond the largest number."""
    z = np.full(d, jnp.finfo(dtype).max, dtype)
    z[0] = -z[0]
    expected = np.full(d, 1.0)
    expected[0] = -1
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float64(project(z)), expected, rtol=tolerance)
    np.testing.assert_allclose(np.float64(l2_normalize(z)), expected / np.sqrt(d), rtol=tolerance)


def test_derivatives_at_the_largest_numbers_are_finite():
    z = np.float32([3.4e38, -3.4e38])

    @jax.jit
    def derivatives(z):
        return [one(geometry.project)(z) for one in (jax.jacfwd, jax.jacrev, jax.hessian)]

    chex.assert_tree_all_finite(derivatives(z))


def test_the_tangent_at_the_largest_numbers():
    """R (I − uuᵀ) ż / ‖z‖ in float64, with ż as large as z."""
    largest = 3.4e38
    z = np.array([largest, largest, -largest / 2, 0])
    z_dot = np.array([largest, 0, 0, largest])
    u = z / np.linalg.norm(z / largest) / largest
    ratio = z_dot / largest / np.linalg.norm(z / largest)
    expected = 2 * (ratio - u * (u @ ratio))
    found = derivative(np.float32(z), np.float32(z_dot))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_scaling_by_a_power_of_two_changes_no_bit():
    """The direction of z has no size; only subnormal numbers lose bits."""
    z = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    expected = np.asarray(project(z))
    for power in (-20, 1, 60, 120):
        np.testing.assert_array_equal(project(z * np.float32(2.0**power)), expected)


def test_great_circles():
    """Against SciPy in float64, at angles from 1e-3 to next to π; both ends are exact."""
    rng = np.random.default_rng(0)
    a, across = np.linalg.qr(rng.normal(size=(8, 2)))[0].T
    t = np.linspace(0, 1, 7)
    for angle in (1e-3, 0.5, 2.0, 3.1):
        b = np.cos(angle) * a + np.sin(angle) * across
        expected = 3 * spatial.geometric_slerp(a, b, t)
        ends = np.float32(3 * np.stack([a, b]))
        found = np.asarray(slerp(ends[:1], ends[1:], np.float32(t[:, None])))
        np.testing.assert_allclose(found, expected, atol=2e-5)
        np.testing.assert_array_equal(found[[0, 6]], ends)


def test_great_circles_between_equal_and_opposite_points_are_finite():
    a = _points((4, 8))
    t = np.linspace(0, 1, 5, dtype=np.float32)[:, None, None]
    np.testing.assert_allclose(slerp(a[None], a[None], t), np.tile(a, (5, 1, 1)), rtol=1e-6)
    opposite = np.asarray(slerp(a[None], -a[None], t))
    np.testing.assert_array_equal(opposite[[0, 4]], [a, -a])
    assert np.isfinite(opposite).all()
