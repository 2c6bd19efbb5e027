import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, spatial, stats

from sphere_ar_jax.flow import paths, solvers
from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.heads import check_solver
from sphere_ar_jax.models.heads.riemannian import Riemannian
from sphere_ar_jax.sphere import geodesics, geometry
from tests.tiny_config import random_arrays

D = 8
HEAD = Riemannian(D, width=16, depth=2, groups=1, scan=False)


@pytest.fixture(scope='module')
def params():
    arguments = (jnp.zeros((2, D)), jnp.zeros((2, 12)), jnp.zeros(2))

    def init(key):
        return HEAD.init(key, *arguments, method='velocity')['params']

    return random_arrays(jax.eval_shape(init, jax.random.key(0)))


def _sphere(seed, *shape):
    points = np.random.default_rng(seed).normal(size=shape)
    return points / np.linalg.norm(points, axis=-1, keepdims=True) * np.sqrt(shape[-1])


@functools.partial(jax.jit, static_argnums=(0, 4))
def _solve(velocity, x, t, weights, has_noise, noise=None):
    """The end of a table from x."""

    def advance(row, x, memory, v, *noise):
        return paths.Geodesic(x.shape[-1]).step(row, x, memory, geodesics.tangent(x, v), *noise)

    t = t.astype(x.dtype)
    return solvers.integrate(
        lambda x, i: velocity(x, t[jnp.minimum(i, len(t) - 1)]),
        x,
        (t, weights.astype(x.dtype)),
        noise if has_noise else None,
        advance=advance,
    )


def _follow(velocity, x, table, noise=None):
    return np.asarray(_solve(velocity, x, table.t, table.weights, noise is not None, noise))


def test_loss_is_that_of_scipys_great_circles(params):
    """Against points of `geometric_slerp` and the closed form of their velocities, in float64."""
    rng = np.random.default_rng(0)
    c = rng.normal(size=(2, 3, 12)).astype(np.float32)
    z = _sphere(1, 2, 3, D)
    t_normal = rng.normal(size=(4, 2, 3)).astype(np.float32)
    noise = rng.normal(size=(4, 2, 3, D)).astype(np.float32)
    R = np.sqrt(D)
    t = 1 / (1 + np.exp(-t_normal.astype(np.float64)))
    x_t = np.zeros(noise.shape)
    u_t = np.zeros(noise.shape)
    for index in np.ndindex(t.shape):
        x0 = noise[index].astype(np.float64)
        x0 /= np.linalg.norm(x0)
        x1 = z[index[1:]] / R
        theta = np.arccos(x0 @ x1)
        x_t[index] = R * spatial.geometric_slerp(x0, x1, t[index])
        slope = np.cos(t[index] * theta) * x1 - np.cos((1 - t[index]) * theta) * x0
        u_t[index] = R * theta / np.sin(theta) * slope

    @jax.jit
    def run(x_t, t):
        variables = {'params': params}
        v = HEAD.apply(variables, x_t, c, t, method='velocities')
        return v, HEAD.apply(variables, c, np.float32(z), (t_normal, noise), method='loss')

    v, (loss, scalars) = run(np.float32(x_t), np.float32(t))
    chex.assert_shape((loss, scalars['angle']), ())
    v = np.asarray(v, np.float64)
    v -= np.sum(v * x_t, -1, keepdims=True) * x_t / D
    np.testing.assert_allclose(loss, np.mean((v - u_t) ** 2), rtol=1e-5)
    length = np.linalg.norm(v, axis=-1, keepdims=True) / R * (1 - t[..., None])
    end = np.cos(length) * x_t / R + np.sin(length) * v / np.linalg.norm(v, axis=-1, keepdims=True)
    angle = np.arccos(np.sum(end * z[None], -1) / R)
    np.testing.assert_allclose(scalars['angle'], angle.mean(), rtol=1e-5)


def to_a_point(x, t):
    """The flow whose data are one point."""
    z = jnp.sqrt(x.shape[-1]) * jax.nn.one_hot(jnp.zeros(len(x), int), x.shape[-1])
    return geodesics.log(x, z) / (1 - t)


@pytest.mark.parametrize('solver', solvers.GEODESIC)
def test_one_point_is_reached_from_anywhere(solver):
    """Every solver follows the geodesic exactly; with noise the last step still ends there."""
    x = _sphere(2, 50, D).astype(np.float32)
    table = solvers.table(solver, 7)
    noise = None
    if solvers.is_stochastic(table):
        noise = np.random.default_rng(3).normal(size=(6, 50, D)).astype(np.float32)
    end = _follow(to_a_point, x, table, noise)
    np.testing.assert_allclose(end, np.sqrt(D) * np.eye(1, D).repeat(50, 0), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(end, axis=-1), np.sqrt(D), rtol=1e-6)


def whirl(x, t):
    """A field on S² that turns, and changes with time."""
    axis = jnp.stack([jnp.cos(3 * t), jnp.sin(3 * t), 1 + t])
    return jnp.cross(jnp.broadcast_to(axis, x.shape), x) + jnp.sin(x[:, ::-1]) * 2


@pytest.mark.parametrize(('solver', 'order'), [('euler', 1), ('ab2', 2)])
def test_orders_of_the_solvers(solver, order):
    """Against SciPy's Runge–Kutta method in ℝ³; twice the steps divide the error by 2^order."""
    x = _sphere(4, 6, 3)

    def slope(t, flat):
        x = flat.reshape(6, 3)
        axis = np.array([np.cos(3 * t), np.sin(3 * t), 1 + t])
        v = np.cross(axis, x) + np.sin(x[:, ::-1]) * 2
        return (v - np.sum(v * x, -1, keepdims=True) * x / 3).ravel()

    exact = integrate.solve_ivp(slope, (0, 1), x.ravel(), rtol=1e-10, atol=1e-10).y[:, -1]
    with jax.enable_x64(True):
        ends = [_follow(whirl, x, solvers.table(solver, n)) for n in (64, 128)]
    errors = [np.abs(end.ravel() - exact).max() for end in ends]
    assert order - 0.15 < np.log2(errors[0] / errors[1]) < order + 0.15


def test_mixing_without_noise_is_eulers_method():
    x = _sphere(4, 6, 3).astype(np.float32)
    noise = np.random.default_rng(5).normal(size=(1, 6, 3)).astype(np.float32)
    table = solvers.table('mixing', 16, noise_scale=0.0)
    assert not solvers.is_stochastic(table)
    mixed = _follow(whirl, x, table, noise)
    np.testing.assert_allclose(mixed, _follow(whirl, x, solvers.table('euler', 16)), atol=2e-5)


def towards(ends, shares):
    """The flow from uniform on the sphere in ℝᵈ to shares (n,) of the mass at ends (n, d).

    It is the mean of the velocities to each, weighted by the probability of having come from it.
    At time t a uniform start lies φ = (1 − t)θ from its end, with the density
    [sin(φ/(1 − t))/sin φ]^(d−2) for φ < (1 − t)π, up to a constant.
    """
    n, d = ends.shape

    def velocity(x, t):
        shape = (n, *x.shape)
        points = jnp.broadcast_to(jnp.asarray(ends, x.dtype)[:, None], shape)
        logs = geodesics.log(jnp.broadcast_to(x[None], shape), points)
        phi = jnp.linalg.norm(logs, axis=-1) / jnp.sqrt(jnp.asarray(d, x.dtype))
        inside = phi < (1 - t) * jnp.pi
        density = jnp.sin(jnp.where(inside, phi, 0) / (1 - t)) / jnp.maximum(jnp.sin(phi), 1e-3)
        weights = jnp.asarray(shares, x.dtype)[:, None] * jnp.where(inside, density ** (d - 2), 0)
        weights = weights + 1e-12 / n
        weights = weights / jnp.sum(weights, axis=0, keepdims=True)
        return jnp.sum(weights[..., None] * logs, axis=0) / (1 - t)

    return velocity


POINTS = np.array([[1.0, 0, 0], [0, 0.6, 0.8], [-0.8, 0.6, 0]]) * np.sqrt(3)
SHARES = np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize('solver', ['euler', 'ab2'])
def test_mass_is_transported_from_uniform_to_the_data(solver):
    """Uniform starts on S² arrive at three points in the shares that the field was made for."""
    n = 4_000
    x = _sphere(6, n, 3).astype(np.float32)
    end = _follow(towards(POINTS, SHARES), x, solvers.table(solver, 100))
    distances = np.linalg.norm(end[:, None] - POINTS, axis=-1)
    assert np.mean(distances.min(axis=1) < 0.05) > 0.99
    shares = np.bincount(distances.argmin(axis=1), minlength=3) / n
    np.testing.assert_array_less(np.abs(shares - SHARES), 3 * np.sqrt(SHARES / n) + 0.005)


def _middles(n):
    """n shares of the mass, (i + ½)/n."""
    return (np.arange(n) + 0.5) / n


def _on_circle(angles):
    """Points (n, 2) of norm √2."""
    return np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _spiral(cosines):
    """Points (n, 3) of norm √3 with these first coordinates, evenly spread about the first axis."""
    angles = np.pi * (1 + np.sqrt(5)) * np.arange(len(cosines))
    across = np.sqrt(1 - cosines**2)
    points = np.stack([cosines, across * np.cos(angles), across * np.sin(angles)], axis=-1)
    return np.sqrt(3) * points


@pytest.mark.parametrize('kappa', [1.0, 8.0])
def test_uniform_becomes_von_mises_on_the_circle(kappa):
    """On S¹, by SciPy's distribution function; starts are evenly spread, data are quantiles."""
    target = stats.vonmises(kappa)
    ends = _on_circle(target.ppf(_middles(256)))
    x = _on_circle(2 * np.pi * _middles(399)).astype(np.float32)
    end = _follow(towards(ends, np.full(256, 1 / 256)), x, solvers.table('ab2', 48))
    chex.assert_tree_all_finite(end)
    angles = np.sort(np.arctan2(end[:, 1], end[:, 0]))
    np.testing.assert_allclose(target.cdf(angles), _middles(399), atol=0.01)


@pytest.mark.parametrize('kappa', [1.0, 8.0])
def test_uniform_becomes_von_mises_fisher_on_the_sphere(kappa):
    """On S², by the distribution of the cosine to the mean in closed form."""
    quantiles = np.log1p(_middles(1024) * np.expm1(2 * kappa)) / kappa - 1
    ends = _spiral(quantiles)
    x = np.roll(_spiral(2 * _middles(251) - 1), 1, axis=1).astype(np.float32)
    end = _follow(towards(ends, np.full(1024, 1 / 1024)), x, solvers.table('ab2', 32))
    chex.assert_tree_all_finite(end)
    cosines = np.sort(end[:, 0]) / np.sqrt(3)
    found = np.expm1(kappa * (cosines + 1)) / np.expm1(2 * kappa)
    np.testing.assert_allclose(found, _middles(251), atol=0.03)
    np.testing.assert_allclose(np.mean(end[:, 1:], axis=0), 0, atol=0.03)


def test_a_token_is_drawn_by_the_steps_of_its_table(params):
    """`draw_token` with guidance against a loop in Python over the head's own velocities."""
    rng = np.random.default_rng(7)
    c = rng.normal(size=(4, 12)).astype(np.float32)
    start = rng.normal(size=(2, D)).astype(np.float32)
    noise = np.concatenate([start, start])[None]
    options = Options('ab2', 3, guidance='constant')
    table = solvers.table('ab2', 3)
    scale = 1.5

    @jax.jit
    def draw(c, noise):
        solver = jax.tree.map(lambda a: a[0], HEAD.prepare(params, options.plan(4)))
        guidance = Guidance(jnp.float32(scale), jnp.asarray(False))
        return HEAD.draw_token(params, c, noise, solver, guidance)

    @jax.jit
    def expected(c, x):
        before = jnp.zeros_like(x)
        for i in range(3):
            t = jnp.full(4, table.t[i])
            both = jnp.concatenate([x, x])
            v = HEAD.apply({'params': params}, both, c, t, method='velocity')
            tangents = geodesics.tangent(both, v)
            v = tangents[2:] + scale * (tangents[:2] - tangents[2:])
            way = v if i == 0 else 1.5 * v - 0.5 * before
            following = geodesics.exp(x, way / 3)
            before = geodesics.transport(x, following, v)
            x = following
        return x

    z = np.asarray(draw(c, noise))
    chex.assert_shape(z, (4, D))
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), np.sqrt(D), rtol=1e-6)
    np.testing.assert_array_equal(z[:2], z[2:])
    np.testing.assert_allclose(z[:2], expected(c, geometry.project(start)), atol=2e-5)


def test_solvers_of_straight_paths_are_refused():
    for solver in ('heun', 'dpmpp_2m', 'euler_maruyama'):
        with pytest.raises(ValueError, match='use euler, ab2, mixing'):
            check_solver(HEAD, solver)
    with pytest.raises(ValueError, match="no solver 'mixing': use euler, heun"):
        check_solver(HEAD.__class__.__base__, 'mixing')
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match='between 0 and 1'):
            solvers.table('mixing', 4, noise_scale=wrong)
