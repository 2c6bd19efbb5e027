"""Heads of mean velocities: their targets, and how they begin."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from sphere_ar_jax.models.heads import HEADS
from sphere_ar_jax.models.heads.mean_velocity import Segments
from sphere_ar_jax.sampling.tokens import Options
from sphere_ar_jax.sphere import geodesics, geometry
from tests import tiny_config


# With shift 3 the times 0.25, 0.5 and 0.75 are steps 40, 60 and 72 of 80.
@pytest.mark.parametrize(('steps', 'shift'), [(64, 1.0), (80, 3.0)])
def test_mean_velocities_of_a_known_flow(steps, shift):
    """Between normal distributions the flow has a closed form.

    It is x_t = t·m + x₀·√((1 − t)² + t²s²).
    """
    mean = 0.7
    std = 0.4

    def spread(t):
        return np.sqrt((1 - t) ** 2 + (t * std) ** 2)

    def velocity(x, t):
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    noise = np.linspace(-2, 2, 5, dtype=np.float32)[:, None]
    head = HEADS['mean_velocity'](1, 4, 1, 1)
    targets = jax.jit(lambda noise: head.targets(velocity, noise, (1, 2, 4), steps, shift))
    x, t, h, u = jax.tree.map(np.asarray, targets(noise))
    chex.assert_shape((x, u), (7, 5, 1))
    np.testing.assert_allclose(t, [0, 0, 0.5, 0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(h, [1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25])
    for i in range(7):

        def at(t):
            return t * mean + noise * spread(t)

        start = float(t[i])
        end = float(t[i] + h[i])
        np.testing.assert_allclose(x[i], at(start), atol=1e-3)
        np.testing.assert_allclose(u[i], (at(end) - at(start)) / (end - start), atol=3e-3)
    with pytest.raises(ValueError, match=r'level 7 needs a step .* at t = 0\.143, but'):
        head.targets(velocity, noise, (7,), steps, shift)


@pytest.mark.parametrize('radius', [None, 2.0])
def test_mean_velocities_of_a_turning_sphere(radius):
    """A sphere that turns about an axis takes every point along a circle of known angle.

    The mean velocity is the geodesic to the end of the arc, by SciPy's rotations.
    """
    axis = np.array([0.3, -0.5, 0.8])

    def velocity(x, t):
        return jnp.cross(jnp.asarray(axis, x.dtype), x)

    noise = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    R = radius or 3**0.5
    start = R * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    head = HEADS['geodesic_mean_velocity'](3, 4, 1, 1, radius=radius)
    found = jax.jit(lambda noise: head.targets(velocity, noise, (1, 2), 64))(noise)
    x, t, h, u = jax.tree.map(np.asarray, found)
    chex.assert_shape((x, u), (3, 5, 3))
    for i in range(3):
        first = Rotation.from_rotvec(float(t[i]) * axis).apply(start)
        last = Rotation.from_rotvec(float(t[i] + h[i]) * axis).apply(start)
        np.testing.assert_allclose(x[i], first, atol=1e-3)
        cosine = np.sum(first * last, axis=-1, keepdims=True) / R**2
        across = last - cosine * first
        length = R * np.arccos(cosine) / h[i]
        across *= length / np.linalg.norm(across, axis=-1, keepdims=True)
        np.testing.assert_allclose(u[i], across, atol=3e-3)


def test_a_head_of_mean_velocities_on_the_sphere_begins_as_its_teacher():
    """One step of both gives the same token: the width of the step does not count yet."""
    head = HEADS['geodesic_mean_velocity'](4, 8, 2, 1, scan=False)
    teacher = head.teacher()
    assert isinstance(teacher, HEADS['riemannian'])
    assert teacher.scan is False
    rng = np.random.default_rng(1)
    c = rng.standard_normal((3, 6)).astype(np.float32)
    noise = rng.standard_normal((1, 3, 4)).astype(np.float32)
    example = head.example((1, 1, 4))
    shapes = jax.eval_shape(
        functools.partial(head.init, method='loss'),
        jax.random.key(0), jnp.zeros((1, 1, 6)), jnp.zeros((1, 1, 4)), example,
    )['params']  # fmt: skip
    params = tiny_config.random_arrays(shapes)
    params['span2'] = jax.tree.map(jnp.zeros_like, params['span2'])
    plan = Options('euler', 1, guidance=None).plan(1)
    tokens = []
    for one in (head, teacher):
        solver = jax.tree.map(lambda a: a[0], one.prepare(params, plan))
        tokens.append(one.draw_token(params, c, noise, solver, None))
    chex.assert_trees_all_close(*tokens, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(tokens[0], axis=-1), 2, rtol=1e-6)
    # Beside a target of 0 the loss is the squared length of what one step walks.
    u = tokens[0]
    zero = Segments(noise, np.zeros(1, np.float32), np.ones(1, np.float32), np.zeros_like(noise))
    # Without a segment of one step the error of the longest ones is shown.
    shorter = zero._replace(h=np.full(1, 0.5, np.float32))
    loss, scalars = head.apply({'params': params}, c[:, None], u[:, None], shorter, method='loss')
    assert loss > 0
    np.testing.assert_allclose(scalars['one_step'], loss, rtol=1e-6)
    start = geometry.project(noise)
    segments = zero._replace(x=start)
    value, _ = head.apply({'params': params}, c[:, None], u[:, None], segments, method='loss')
    length = jnp.square(geodesics.distance(start[0], u))
    np.testing.assert_allclose(value, np.mean(length) / 4, rtol=1e-4)
