import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import spatial

from sphere_ar_jax.sphere import geodesics

ANGLES = np.array([0.0, 1e-7, 1e-3, 0.5, 1.5, 2.9, np.pi - 1e-4])

log = jax.jit(geodesics.log)
interpolate = jax.jit(geodesics.interpolate)
transport = jax.jit(geodesics.transport)


def _frames(n, d):
    """Two orthonormal vectors (n, d) each, float64."""
    rows = np.random.default_rng(0).normal(size=(n, d, 2))
    frames = np.linalg.qr(rows)[0]
    return frames[..., 0], frames[..., 1]


def _pairs(radius, d=16):
    """Points at each of ANGLES from each other, and unit tangents from the first to the second."""
    a, across = _frames(len(ANGLES), d)
    b = np.cos(ANGLES)[:, None] * a + np.sin(ANGLES)[:, None] * across
    return radius * a, radius * b, across


@functools.partial(jax.jit, static_argnums=3)
def _maps(x, y, way, radius):
    """log and distance, exp with its velocity, and exp of log."""
    found = geodesics.log(x, y, radius)
    between = geodesics.distance(x, y, radius)
    reached, velocity = geodesics.geodesic(x, way, 1.0, radius)
    return found, between, reached, velocity, geodesics.exp(x, found, radius)


def test_exp_log_and_distance_in_closed_form():
    """In float64 on any sphere, at all angles."""
    R = 2.5
    x, y, across = _pairs(R)
    way = R * ANGLES[:, None] * across
    with jax.enable_x64(True):
        found, between, reached, velocity, returned = _maps(x, y, way, R)
    chex.assert_equal_shape([found, reached, velocity, returned, x])
    np.testing.assert_allclose(found, way, atol=1e-11)
    np.testing.assert_allclose(between, R * ANGLES, rtol=1e-8, atol=1e-15)
    np.testing.assert_allclose(reached, y, atol=1e-14)
    at_the_end = np.cos(ANGLES)[:, None] * across - np.sin(ANGLES)[:, None] * x / R
    np.testing.assert_allclose(velocity, R * ANGLES[:, None] * at_the_end, atol=1e-12)
    np.testing.assert_allclose(returned, y, atol=1e-12)


def test_accuracy_in_float32():
    """On the sphere of radius √d = 4. Next to π, rounding the points turns the direction."""
    x, y, across = _pairs(4.0)
    way = 4 * ANGLES[:, None] * across
    found, between, reached, _, returned = _maps(*map(np.float32, (x, y, way)), None)
    chex.assert_type([found, between, reached, returned], jnp.float32)
    np.testing.assert_allclose(between, 4 * ANGLES, atol=2e-6)
    np.testing.assert_allclose(found[:-1], way[:-1], atol=8e-6)
    np.testing.assert_allclose(found[-1], way[-1], atol=4e-2)
    np.testing.assert_allclose(reached, y, atol=4e-6)
    np.testing.assert_allclose(returned, y, atol=4e-6)
    np.testing.assert_allclose(np.linalg.norm(returned, axis=-1), 4, rtol=1e-6)


@pytest.mark.parametrize('d', [3, 16, 256])
def test_small_angles_in_float32(d):
    """Results are as accurate as points rounded to float32 are: 0 in their place would fail."""
    angles = np.logspace(-6, -1, 40)[:, None]
    R = np.sqrt(d)
    a, across = _frames(40, d)
    x = R * a
    y = R * (np.cos(angles) * a + np.sin(angles) * across)
    way = R * angles * across
    found, between, reached, _, returned = _maps(*map(np.float32, (x, y, way)), None)
    np.testing.assert_allclose(found, way, atol=2e-7 * R)
    np.testing.assert_allclose(between, R * angles[:, 0], atol=2e-7 * R)
    np.testing.assert_allclose(reached, y, atol=2e-7 * R)
    np.testing.assert_allclose(returned, y, atol=2e-7 * R)


@pytest.mark.parametrize('d', [3, 16, 256])
def test_transport_in_float32(d):
    """Against float64, with vectors of length 1; next to π rounding the points turns them."""
    angles = np.array([1e-7, 1e-3, 0.5, 1.5, 2.9, np.pi - 1e-2, np.pi - 1e-4])
    a, across = _frames(len(angles), d)
    b = np.cos(angles)[:, None] * a + np.sin(angles)[:, None] * across
    other = np.random.default_rng(3).normal(size=a.shape)
    other -= np.sum(other * a, axis=-1, keepdims=True) * a
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    with jax.enable_x64(True):
        exact = np.asarray(transport(a, b, other))
    found = transport(np.float32(a), np.float32(b), np.float32(other))
    chex.assert_type(found, jnp.float32)
    np.testing.assert_allclose(np.linalg.norm(found[:5], axis=-1), 1, rtol=1e-6)
    lost = np.abs(found - exact).max(axis=-1)
    np.testing.assert_array_less(lost, np.maximum(2e-6, 1e-6 / (np.pi - angles)))


def test_derivatives_for_long_vectors():
    """Velocities that go round the sphere many times have finite derivatives, too."""
    x = np.float32(4 * np.eye(16)[:1]).repeat(4, 0)
    v = np.float32(np.eye(16)[1:2]) * np.float32([[1e2], [1e6], [1e12], [1e18]])

    @jax.jit
    def slopes(x, v):
        return jax.grad(lambda x, v: jnp.sum(jnp.sin(geodesics.exp(x, v))), argnums=(0, 1))(x, v)

    chex.assert_tree_all_finite((jax.jit(geodesics.exp)(x, v), slopes(x, v)))


def test_half_precision_has_finite_derivatives():
    x, y, across = (a.astype(jnp.bfloat16) for a in _pairs(4.0))
    found = _gradients(x, y, across)
    chex.assert_tree_all_finite(found)
    chex.assert_type(found, jnp.bfloat16)


def test_interpolation_against_scipy():
    """Points by `geometric_slerp`, velocities by central differences of those."""
    x, y, _ = _pairs(4.0)
    times = np.linspace(0, 1, 5)
    h = 1e-6
    with jax.enable_x64(True):
        points, velocities = interpolate(x[:, None], y[:, None], times[None, :, None])
    chex.assert_shape((points, velocities), (len(ANGLES), 5, 16))
    for i in range(2, len(ANGLES)):  # SciPy rounds smaller angles to 0
        great_circle = functools.partial(spatial.geometric_slerp, x[i] / 4, y[i] / 4, tol=1e-9)
        np.testing.assert_allclose(points[i], 4 * great_circle(times), atol=1e-8)
        inside = times[1:-1]
        ahead = great_circle(inside + h)
        difference = 4 * (ahead - great_circle(inside - h)) / (2 * h)
        np.testing.assert_allclose(velocities[i, 1:-1], difference, atol=1e-7)
    single, velocity = interpolate(
        np.float32(x[:, None]), np.float32(y[:, None]), np.float32(times[None, :, None])
    )
    np.testing.assert_allclose(np.linalg.norm(single, axis=-1), 4, rtol=1e-6)
    np.testing.assert_allclose(single[:-1], points[:-1], atol=8e-6)
    radial = np.sum(np.asarray(single) * np.asarray(velocity), axis=-1) / 16
    np.testing.assert_allclose(radial, 0, atol=1e-6)


def test_transport_is_the_rotation_from_one_point_to_the_other():
    """On S² by SciPy's rotations; in more dimensions it turns `log` and keeps inner products."""
    rng = np.random.default_rng(1)
    x, y, v = rng.normal(size=(3, 20, 3))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    v -= np.sum(x * v, axis=-1, keepdims=True) * x
    axis = np.cross(x, y)
    angle = np.arctan2(np.linalg.norm(axis, axis=-1), np.sum(x * y, axis=-1))
    axis *= (angle / np.linalg.norm(axis, axis=-1))[:, None]
    rotated = spatial.transform.Rotation.from_rotvec(axis).apply(v)
    x16, y16, across = _pairs(4.0)
    other = rng.normal(size=x16.shape)
    other -= np.sum(other * x16, -1, keepdims=True) * x16 / 16
    vectors = np.stack([across, other])
    with jax.enable_x64(True):
        np.testing.assert_allclose(transport(x, y, v), rotated, atol=1e-13)
        moved = np.asarray(transport(x16[None], y16[None], vectors))
        there = np.asarray(transport(x16[None], y16[None], log(x16, y16)[None]))[0]
        back = -np.asarray(log(y16, x16))
    np.testing.assert_allclose(there, back, atol=1e-9)
    np.testing.assert_allclose(np.sum(moved * y16, -1), 0, atol=1e-11)
    products = np.einsum('and,bnd->abn', moved, moved)
    np.testing.assert_allclose(products, np.einsum('and,bnd->abn', vectors, vectors), atol=1e-13)


def _all(x, y, v):
    """Something of every function, as one number."""
    point, velocity = geodesics.interpolate(x, y, 0.3)
    moved = geodesics.transport(x, y, v)
    parts = [point, velocity, moved, geodesics.exp(x, v), geodesics.log(x, y)]
    weights = jnp.arange(1.0, x.shape[-1] + 1, dtype=x.dtype)
    smooth = sum(jnp.sum(jnp.sin(part) * weights) for part in parts)
    return smooth + jnp.sum(geodesics.distance(x, y))


@jax.jit
def _gradients(x, y, v):
    return jax.vmap(jax.grad(_all, argnums=(0, 1, 2)))(x, y, v)


def test_gradients():
    """Finite where points coincide or lie opposite; against central differences elsewhere."""
    x, y, across = _pairs(4.0)
    x = np.concatenate([x, x[:1]])
    y = np.concatenate([y, -x[:1]])
    v = np.concatenate([0 * across[:4], across[4:], across[:1]])
    chex.assert_tree_all_finite(_gradients(*map(np.float32, (x, y, v))))
    inside = slice(3, 6)
    with jax.enable_x64(True):
        found = _gradients(x, y, v)
        value = jax.jit(jax.vmap(_all))
        rng = np.random.default_rng(2)
        directions = rng.normal(size=(3, *x.shape))
        h = 1e-6
        steps = h * directions
        above = np.asarray(value(x + steps[0], y + steps[1], v + steps[2]))
        below = np.asarray(value(x - steps[0], y - steps[1], v - steps[2]))
    slopes = sum(np.sum(np.asarray(g) * u, -1) for g, u in zip(found, directions, strict=True))
    np.testing.assert_allclose(slopes[inside], ((above - below) / (2 * h))[inside], rtol=1e-6)


def test_log_is_smooth_where_the_points_coincide():
    """d log(x, y)/dy at y = x is the tangent projection, and so is d exp(x, v)/dv at v = 0."""
    x = np.float32(_pairs(4.0)[0][0])
    expected = np.eye(16) - np.outer(x, x) / 16

    @jax.jit
    def jacobians(x):
        return jax.jacfwd(geodesics.log, 1)(x, x), jax.jacrev(geodesics.exp, 1)(x, 0 * x)

    for found in jacobians(x):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_half_precision_is_rounded_once():
    x, y, across = (a.astype(jnp.bfloat16) for a in _pairs(4.0))

    @jax.jit
    def run(x, y, v):
        return (
            *geodesics.interpolate(x, y, 0.4),
            geodesics.log(x, y),
            geodesics.distance(x, y),
            geodesics.exp(x, v),
            geodesics.tangent(x, v),
            geodesics.transport(x, y, v),
        )

    half = run(x, y, across)
    exact = run(*(np.float32(a) for a in (x, y, across)))
    chex.assert_type(half, jnp.bfloat16)
    for ours, truth in zip(half, exact, strict=True):
        np.testing.assert_array_equal(np.float32(ours), np.float32(truth.astype(jnp.bfloat16)))
