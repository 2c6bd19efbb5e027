import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from sphere_ar_jax.sphere import geometry, power_spherical

# As one program for each shape, which serves all numbers
log_prob = jax.jit(power_spherical.log_prob)
entropy = jax.jit(power_spherical.entropy, static_argnums=1)
kl_to_uniform = jax.jit(power_spherical.kl_to_uniform, static_argnums=1)

# {kappa: divergence} for d = 16, from the closed form
KL_TABLE = {1.0: 0.0322247, 10.0: 1.3929067, 100.0: 10.8717478, 1000.0: 26.8112195}


def _log_normalizer(kappa, d):
    """log N by SciPy, from the paper's formula."""
    b = (d - 1) / 2
    alpha = kappa + b
    return -(
        (alpha + b) * np.log(2)
        + b * np.log(np.pi)
        + special.gammaln(alpha)
        - special.gammaln(alpha + b)
    )


@functools.partial(jax.jit, static_argnums=2)
def _slopes(s, alpha, beta):
    """d s/d alpha of draws s (n,), by `implicit_beta`."""
    slope = jax.grad(lambda s, a: power_spherical.implicit_beta(s, a, beta), argnums=1)
    return jax.vmap(slope, (0, None))(s, alpha)


def _cosine_density(kappa, d):
    """The density of ⟨mu, x⟩, by `log_prob` and the area of the parallel at that cosine."""

    def density(c):
        x = np.zeros(d)
        x[:2] = c, np.sqrt(1 - c * c)
        mu = np.eye(d)[0]
        with jax.enable_x64(True):
            log_p = float(log_prob(x, mu, np.float64(kappa)))
        return np.exp(log_p + power_spherical.log_surface(d - 1)) * (1 - c * c) ** ((d - 3) / 2)

    return density


@pytest.mark.parametrize('kappa', KL_TABLE)
def test_kl_table(kappa):
    np.testing.assert_allclose(
        kl_to_uniform(jnp.float32(kappa), 16), KL_TABLE[kappa], rtol=1e-6, atol=5e-6
    )
    with jax.enable_x64(True):
        exact = kl_to_uniform(jnp.asarray(kappa, jnp.float64), 16)
    np.testing.assert_allclose(exact, KL_TABLE[kappa], atol=5.1e-8)  # the table's last digit


def test_goldens(golden):
    mu = golden['mu']
    kappa = golden['kappa']
    d = 8
    np.testing.assert_allclose(entropy(kappa, d), golden['entropy'], atol=1e-5)
    np.testing.assert_allclose(kl_to_uniform(kappa, d), golden['kl'], atol=1e-5)
    np.testing.assert_allclose(log_prob(mu, mu, kappa), golden['log_prob_mu'], atol=1e-5)
    found = log_prob(golden['psd_x'], mu, kappa)
    chex.assert_equal_shape([found, kappa])
    np.testing.assert_allclose(found, golden['psd_log_prob_x'], atol=1e-5)
    x = power_spherical.sample_from_draws(mu, kappa, golden['beta_draw'], golden['tangent_draw'])
    np.testing.assert_allclose(np.sqrt(8) * x, golden['z'], atol=1e-5)


@pytest.mark.parametrize('d', [2, 3, 8, 16, 64])
@pytest.mark.parametrize('kappa', [0.0, 0.3, 1.0, 17.5, 1e3, 1e4])
def test_normaliser_entropy_and_kl_against_scipy(kappa, d):
    """In float64 to 1e-9, and in float32 to 1e-5 of their size: no cancellation at large kappa."""
    b = (d - 1) / 2
    peak = _log_normalizer(kappa, d) + kappa * np.log(2)
    spread = -_log_normalizer(kappa, d) - kappa * (
        np.log(2) + special.digamma(kappa + b) - special.digamma(kappa + 2 * b)
    )
    mu = np.eye(d)[0]
    with jax.enable_x64(True):
        kappa64 = jnp.asarray(kappa, jnp.float64)
        np.testing.assert_allclose(
            log_prob(jnp.asarray(mu), jnp.asarray(mu), kappa64),
            peak,
            rtol=1e-9,
            atol=1e-8,
        )
        np.testing.assert_allclose(entropy(kappa64, d), spread, rtol=1e-9, atol=1e-8)
    mu = jnp.asarray(mu, jnp.float32)
    np.testing.assert_allclose(log_prob(mu, mu, jnp.float32(kappa)), peak, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy(jnp.float32(kappa), d), spread, rtol=1e-5, atol=1e-5)
    kl = kl_to_uniform(jnp.float32(kappa), d)
    # The truth is a small difference of numbers of the size of the entropy.
    truth = power_spherical.log_surface(d) - spread
    np.testing.assert_allclose(kl, truth, rtol=1e-5, atol=1e-5 + 5e-7 * abs(spread))


@pytest.mark.parametrize('d', [3, 8, 16])
@pytest.mark.parametrize('kappa', [0.0, 1.0, 30.0, 1e3, 1e4])
def test_density_integrates_to_one(kappa, d):
    density = _cosine_density(kappa, d)
    b = (d - 1) / 2
    mode = 2 * stats.beta.mean(kappa + b, b) - 1
    total = integrate.quad(density, -1, 1, points=[mode], limit=200, epsabs=1e-10)[0]
    np.testing.assert_allclose(total, 1, rtol=1e-7)


def test_uniform_at_kappa_zero():
    x = geometry.l2_normalize(jax.random.normal(jax.random.key(0), (100, 16)))
    mu = jnp.broadcast_to(jnp.eye(1, 16), (100, 16))
    expected = -power_spherical.log_surface(16)
    np.testing.assert_allclose(log_prob(x, mu, jnp.zeros(100)), expected, rtol=1e-6)
    np.testing.assert_allclose(log_prob(-mu, mu, jnp.zeros(100)), expected, rtol=1e-6)
    np.testing.assert_allclose(kl_to_uniform(jnp.float32(0), 16), 0, atol=1e-5)


@pytest.mark.parametrize('kappa', [0.0, 1.0, 50.0, 1e4])
@pytest.mark.parametrize('pole', ['random', 'e1', '-e1'])
def test_sample_moments(kappa, pole):
    """The mean along mu, its variance, no mean across, and the whole law of the cosine
    (Kolmogorov–Smirnov).
    """
    n = 20_000
    d = 8
    mu = {'e1': jnp.eye(1, d)[0], '-e1': -jnp.eye(1, d)[0]}.get(
        pole, geometry.l2_normalize(jnp.arange(1.0, d + 1))
    )
    sample = jax.jit(power_spherical.sample)
    x = sample(jax.random.key(1), jnp.broadcast_to(mu, (n, d)), jnp.full(n, kappa))
    chex.assert_shape(x, (n, d))
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-5)
    cosine = np.asarray(x, np.float64) @ np.asarray(mu, np.float64)
    b = (d - 1) / 2
    law = stats.beta(kappa + b, b, loc=-1, scale=2)
    assert abs(cosine.mean() - law.mean()) < 5 * law.std() / np.sqrt(n)
    spread = np.sqrt((law.stats('k') + 2) / n)  # relative standard error of a variance
    assert abs(cosine.var() / law.var() - 1) < 5 * spread
    assert stats.kstest(cosine, law.cdf).pvalue > 1e-4
    # Across mu every direction is alike: mean 0 and covariance E[sin²]/(d − 1) on the tangent
    # space.
    basis = np.linalg.svd(np.asarray(mu, np.float64)[None])[2][1:]
    across = np.asarray(x, np.float64) @ basis.T
    sine_squared = 1 - law.moment(2)
    each = np.sqrt(sine_squared / (d - 1))
    np.testing.assert_array_less(np.abs(across.mean(0)), 5 * each / np.sqrt(n))
    covariance = across.T @ across / n / each**2
    kurtosis = np.mean(across[:, 0] ** 4) / each**4
    np.testing.assert_array_less(
        np.abs(covariance - np.eye(d - 1)), 5 * np.sqrt(max(kurtosis, 1) / n) + 1e-5
    )


@pytest.mark.parametrize('d', [2, 3, 8, 16, 64])
@pytest.mark.parametrize('kappa', [0.0, 1.0, 30.0, 1e3, 1e4])
def test_implicit_gradient_is_the_slope_of_the_quantile(kappa, d):
    """d s/d alpha of a draw, against finite differences of SciPy's Beta quantile, over the whole
    range of draws.
    """
    b = (d - 1) / 2
    alpha = kappa + b
    u = np.array([1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
    h = 1e-4 * alpha
    slope = (special.betaincinv(alpha + h, b, u) - special.betaincinv(alpha - h, b, u)) / (2 * h)
    with jax.enable_x64(True):
        s = jnp.asarray(special.betaincinv(alpha, b, u))
        ours = _slopes(s, alpha, b)
        np.testing.assert_allclose(ours, slope, rtol=2e-5, atol=1e-13)
    s32 = jnp.asarray(s, jnp.float32)
    ours = _slopes(s32, jnp.float32(alpha), b)
    # float32 cannot tell a draw from its neighbours: hold it to the slope's change over that
    # rounding
    np.testing.assert_allclose(ours, slope, rtol=2e-3, atol=2e-7)


def test_implicit_gradient_is_finite_for_any_draw():
    s = jnp.asarray([0.0, 1e-38, 1e-10, 0.5, 1 - 6e-8, 1.0])
    for alpha in (0.5, 1.0, 8.5, 1e4):
        slope = _slopes(s, jnp.float32(alpha), 7.5)
        chex.assert_tree_all_finite(slope)
        assert (slope >= 0).all()  # more alpha moves every quantile up


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, None, 0))
@jax.grad
def _slopes_of_a_sample(kappa, mu, key):
    """d/d kappa of exp(⟨mu, x⟩) of the sample x by each of n keys (n,)."""
    x = power_spherical.sample(key, mu[None], kappa[None])
    return jnp.exp(jnp.sum(x[0] * mu))


@pytest.mark.parametrize('kappa', [1.0, 20.0, 500.0])
def test_gradient_of_expectation_against_quadrature(kappa):
    """d/d kappa of E[exp(⟨mu, x⟩)] by 20,000 reparameterised samples and by quadrature."""
    n = 20_000
    d = 8
    mu = geometry.l2_normalize(jnp.arange(1.0, d + 1))
    b = (d - 1) / 2
    keys = jax.random.split(jax.random.key(2), n)
    slopes = np.asarray(_slopes_of_a_sample(jnp.float32(kappa), mu, keys))

    def expectation(kappa):
        return stats.beta(kappa + b, b).expect(lambda s: np.exp(2 * s - 1), epsabs=1e-12)

    h = 1e-3 * kappa
    truth = (expectation(kappa + h) - expectation(kappa - h)) / (2 * h)
    assert abs(float(slopes.mean()) - truth) < 5 * float(slopes.std()) / np.sqrt(n)


def test_gradient_reaches_mu():
    """d/d mu of E⟨a, x⟩ = E[cosine]·a on the tangent space: the sample mean of gradients against
    the closed form.
    """
    n = 20_000
    d = 8
    kappa = 10.0
    mu = geometry.l2_normalize(jnp.arange(1.0, d + 1))
    a = jnp.asarray(np.random.default_rng(0).normal(size=d), jnp.float32)

    def sampled(mu, key):
        x = power_spherical.sample(key, geometry.l2_normalize(mu)[None], jnp.full(1, kappa))
        return jnp.sum(a * x[0])

    slopes = jax.jit(jax.vmap(jax.grad(sampled), (None, 0)))(
        mu, jax.random.split(jax.random.key(3), n)
    )
    b = (d - 1) / 2
    mean_cosine = 2 * (kappa + b) / (kappa + 2 * b) - 1
    truth = mean_cosine * (a - jnp.sum(a * mu) * mu)
    np.testing.assert_array_less(
        np.abs(slopes.mean(0) - truth), 5 * np.asarray(slopes.std(0)) / np.sqrt(n) + 1e-6
    )


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def _value_and_slopes(mu, kappa):
    """A loss of a sample and of the divergence, with its gradients for mu and kappa."""
    x = power_spherical.sample(jax.random.key(0), mu, kappa)
    return jnp.sum(x * x[:, ::-1]) + jnp.sum(power_spherical.kl_to_uniform(kappa, 16))


@pytest.mark.parametrize('kappa', [0.0, 1.0, 1e4])
@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_gradients_are_finite_at_the_poles(kappa, sign):
    mu = sign * jnp.eye(1, 16)

    value, slopes = _value_and_slopes(mu, jnp.full(1, kappa))
    chex.assert_tree_all_finite((value, slopes))


@pytest.mark.slow
def test_implicit_gradient_has_less_variance_than_jax_random_beta():
    """Both are unbiased for E[s]; the implicit one spreads less (the reason for having it)."""
    n = 20_000
    alpha = 8.0
    beta = 7.5
    keys = jax.random.split(jax.random.key(4), n)
    direct = jax.jit(jax.vmap(jax.grad(lambda a, key: jax.random.beta(key, a, beta)), (None, 0)))(
        alpha, keys
    )
    s = jax.jit(jax.vmap(lambda key: jax.random.beta(key, alpha, beta)))(keys)
    implicit = _slopes(s, jnp.float32(alpha), beta)
    truth = beta / (alpha + beta) ** 2
    for slopes in (direct, implicit):
        assert abs(float(slopes.mean()) - truth) < 5 * float(slopes.std()) / np.sqrt(n)
    assert implicit.std() < 0.85 * direct.std()


def test_what_cannot_be_differentiated_says_so():
    with pytest.raises(TypeError, match='no second derivative'):
        jax.hessian(lambda a: power_spherical.implicit_beta(jnp.float32(0.4), a, 7.5))(
            jnp.float32(3.0)
        )
