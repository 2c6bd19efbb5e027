"""What holds for every input of the geometry and the distribution, on inputs that hypothesis looks
for.
"""

import chex
import jax
import numpy as np
import scipy.integrate
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sphere_ar_jax.sphere import geometry, power_spherical

D = 5
WIDE = st.floats(-(2.0**96), 2.0**96, width=32)
project = jax.jit(geometry.project)
householder = jax.jit(geometry.householder)
kl_to_uniform = jax.jit(power_spherical.kl_to_uniform, static_argnums=1)
log_prob = jax.jit(power_spherical.log_prob)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (3, D), elements=WIDE))
def test_projected_points_lie_on_the_sphere_and_stay(z):
    """‖N_R(z)‖ = √d where ‖z‖ ≥ 1e-7, in the direction of z.

    A second projection changes nothing.
    """
    once = np.asarray(project(z))
    chex.assert_tree_all_finite(once)
    exact = z.astype(np.float64)
    norm = np.linalg.norm(exact, axis=-1, keepdims=True)
    far = norm[:, 0] >= 1e-6
    np.testing.assert_allclose(
        once[far], (exact / np.maximum(norm, 1e-7) * D**0.5)[far], rtol=2e-6, atol=2e-6
    )
    np.testing.assert_allclose(project(once)[far], once[far], rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (2, D), elements=st.floats(-1, 1, width=32)))
def test_a_reflection_keeps_lengths_and_takes_e1_to_mu(points):
    mu, y = points
    mu = mu + np.float32(0.01) * (np.abs(mu).max() < 0.01)
    mu = (mu / np.linalg.norm(mu)).astype(np.float32)
    first = np.eye(D, dtype=np.float32)[0]
    x = np.asarray(householder(y, mu))
    np.testing.assert_allclose(np.linalg.norm(x), np.linalg.norm(y), atol=2e-5)
    if np.abs(first - mu).sum() > 1e-2:
        np.testing.assert_allclose(householder(first, mu), mu, atol=2e-4)
        np.testing.assert_allclose(householder(x, mu), y, atol=2e-4)  # twice is nothing


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 2000, width=32))
def test_kl_against_scipy(kappa):
    """KL to uniform by De Cao & Aziz' formula in float64; it is never negative."""
    b = (D - 1) / 2
    a = kappa + b
    log_norm = -(
        (a + b) * np.log(2)
        + b * np.log(np.pi)
        + scipy.special.gammaln(a)
        - scipy.special.gammaln(a + b)
    )
    entropy = -(
        log_norm + kappa * (np.log(2) + scipy.special.digamma(a) - scipy.special.digamma(a + b))
    )
    surface = np.log(2) + D / 2 * np.log(np.pi) - scipy.special.gammaln(D / 2)
    ours = float(kl_to_uniform(np.float32(kappa), D))
    np.testing.assert_allclose(ours, surface - entropy, rtol=1e-5, atol=2e-6)
    assert ours > -2e-6


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 200, width=32))
def test_the_density_integrates_to_one(kappa):
    """Over the sphere S^{d−1}, by the angle to mu: the area of a circle of latitude is |S^{d−2}|
    sin^{d−2}.
    """
    mu = np.eye(D, dtype=np.float32)[0]
    angle = np.linspace(0, np.pi, 4001)
    x = np.zeros((len(angle), D), np.float32)
    x[:, 0] = np.cos(angle)
    x[:, 1] = np.sin(angle)
    area = 2 * np.pi ** ((D - 1) / 2) / scipy.special.gamma((D - 1) / 2)
    density = np.exp(
        np.asarray(
            log_prob(x, np.broadcast_to(mu, x.shape), np.full(len(x), kappa, np.float32)), float
        )
    )
    whole = scipy.integrate.simpson(density * area * np.sin(angle) ** (D - 2), x=angle)
    np.testing.assert_allclose(whole, 1, rtol=2e-4)
