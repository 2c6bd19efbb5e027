import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from sphere_ar_jax.sphere import geometry, von_mises_fisher

DIMENSIONS = [2, 3, 8, 16, 64]
KAPPAS = [0.0, 1e-3, 0.3, 1.0, 17.5, 100.0, 1e3, 1e4]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)
PANELS = 40


class Law:
    """The law of the cosine to mu, by Gauss–Legendre quadrature over the angle, in float64.

    It is scaled by its peak, and the angles where it is below exp(−80) of the peak are left out.
    """

    def __init__(self, d, kappa):
        self.d = d
        self.kappa = kappa
        angles = np.linspace(0, np.pi, 400_001)[1:-1]
        self.peak = 0.0
        logs = self.log_weight(angles)
        self.peak = logs.max()
        inside = angles[logs > self.peak - 80]
        low = 0.0 if inside[0] == angles[0] else inside[0]
        high = np.pi if inside[-1] == angles[-1] else inside[-1]
        self.edges = np.linspace(low, high, PANELS + 1)
        self.mass = np.cumsum([0.0, *map(self.integral, self.edges[:-1], self.edges[1:])])

    def log_weight(self, angle):
        """log of sin^{d−2} exp(kappa (cos − 1)), less the peak's."""
        log_sine = np.log(np.maximum(np.sin(angle), 1e-300))
        return (self.d - 2) * log_sine - 2 * self.kappa * np.sin(angle / 2) ** 2 - self.peak

    def integral(self, low, high, function=np.ones_like):
        """The integral of weight · function(angle)."""
        angle = (low + high) / 2 + (high - low) / 2 * NODES
        return (high - low) / 2 * np.sum(WEIGHTS * np.exp(self.log_weight(angle)) * function(angle))

    def mean(self, function):
        """The expectation of function(angle)."""
        parts = [self.integral(*ends, function) for ends in zip(self.edges, self.edges[1:])]
        return sum(parts) / self.mass[-1]

    def log_m_scaled(self):
        """log E exp(kappa (cosine − 1)) over uniform points."""
        b = (self.d - 1) / 2
        return np.log(self.mass[-1]) + self.peak - special.betaln(b, 0.5)

    def cdf(self, angle):
        """P(angle ≤ …), for one number."""
        angle = np.clip(angle, self.edges[0], self.edges[-1])
        i = np.clip(np.searchsorted(self.edges, angle) - 1, 0, PANELS - 1)
        return (self.mass[i] + self.integral(self.edges[i], angle)) / self.mass[-1]

    def haversine(self, probability):
        """The quantile of (1 − cosine)/2."""
        angle = optimize.brentq(
            lambda a: self.cdf(a) - probability, self.edges[0], self.edges[-1], xtol=1e-15
        )
        return np.sin(angle / 2) ** 2


@functools.cache
def law(d, kappa):
    return Law(d, kappa)


def _kl(d, kappa):
    """KL to uniform by quadrature: kappa E[cosine − 1] − log E_uniform exp(kappa (cosine − 1))."""
    found = law(d, kappa)
    return -2 * kappa * found.mean(lambda a: np.sin(a / 2) ** 2) - found.log_m_scaled()


def _in_float64(function, *numbers):
    with jax.enable_x64(True):
        return np.asarray(function(*(jnp.asarray(n, jnp.float64) for n in numbers)))


def _slopes(h, kappa, d):
    """dh/dkappa of draws h (n,), by `implicit_haversine`."""
    slope = jax.grad(lambda k, h: von_mises_fisher.implicit_haversine(h, k, d))
    return jax.jit(jax.vmap(slope, (None, 0)))(kappa, h)


@pytest.mark.parametrize('d', DIMENSIONS)
@pytest.mark.parametrize('kappa', KAPPAS)
def test_kl_entropy_and_mean_cosine_against_quadrature(d, kappa):
    """In float64 to 1e-9, and in float32 to what the module says: 2e-6 of the size plus 5e-6."""
    kl = _kl(d, kappa)
    mean = law(d, kappa).mean(np.cos)
    surface = np.log(2) + d / 2 * np.log(np.pi) - special.gammaln(d / 2)
    truths = {
        von_mises_fisher.kl_to_uniform: kl,
        von_mises_fisher.entropy: surface - kl,
        von_mises_fisher.mean_cosine: mean,
    }
    for function, truth in truths.items():
        ours = _in_float64(lambda k, f=function: f(k, d), kappa)
        np.testing.assert_allclose(ours, truth, rtol=1e-10, atol=1e-10, err_msg=function.__name__)
        ours = function(jnp.float32(kappa), d)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(
            ours, truth, rtol=2e-6, atol=5e-6, err_msg=function.__name__
        )
    # The mean and the divergence are accurate next to 0 as well.
    np.testing.assert_allclose(von_mises_fisher.mean_cosine(jnp.float32(kappa), d), mean, rtol=1e-6, atol=1e-15)
    if kappa < d / 2:
        ours = von_mises_fisher.kl_to_uniform(jnp.float32(kappa), d)
        np.testing.assert_allclose(ours, kl, rtol=1e-5, atol=5e-8)


@pytest.mark.parametrize('d', DIMENSIONS)
@pytest.mark.parametrize('kappa', KAPPAS)
def test_gradient_of_kl_is_kappa_times_the_variance_of_the_cosine(d, kappa):
    """dKL/dkappa = kappa dA/dkappa = kappa Var[cosine], forward and in reverse."""
    found = law(d, kappa)
    mean = found.mean(lambda a: np.sin(a / 2) ** 2)
    variance = 4 * found.mean(lambda a: (np.sin(a / 2) ** 2 - mean) ** 2)

    def kl(k):
        return von_mises_fisher.kl_to_uniform(k, d)

    for derivative in (jax.grad(kl), jax.jacfwd(kl)):
        ours = _in_float64(derivative, kappa)
        np.testing.assert_allclose(ours, kappa * variance, rtol=1e-8, atol=1e-14)
        ours = derivative(jnp.float32(kappa))
        np.testing.assert_allclose(ours, kappa * variance, rtol=3e-5, atol=1e-9)
    # Higher derivatives exist: at 0 the second one is Var[cosine] = 1/d.
    curvature = jax.grad(jax.grad(kl))(jnp.float32(0))
    np.testing.assert_allclose(curvature, 1 / d, rtol=1e-5)


@pytest.mark.parametrize('d', DIMENSIONS)
@pytest.mark.parametrize('kappa', [0.3, 1.0, 17.5, 1e3, 1e4])
def test_density_and_entropy_against_scipy(d, kappa):
    rng = np.random.default_rng(0)
    mu = rng.normal(size=d)
    mu /= np.linalg.norm(mu)
    theirs = stats.vonmises_fisher(mu, kappa)
    x = np.concatenate([theirs.rvs(20, random_state=rng), -mu[None], mu[None]])
    ours = _in_float64(lambda x, k: von_mises_fisher.log_prob(x, jnp.asarray(mu), k), x, kappa)
    np.testing.assert_allclose(ours, theirs.logpdf(x), rtol=1e-9, atol=1e-9)
    entropy = _in_float64(lambda k: von_mises_fisher.entropy(k, d), kappa)
    np.testing.assert_allclose(entropy, theirs.entropy(), rtol=1e-9, atol=1e-9)
    # At mu the density has no rounding of the cosine in it.
    pole = jnp.eye(1, d)[0]
    peak = von_mises_fisher.log_prob(pole, pole, jnp.float32(kappa))
    np.testing.assert_allclose(peak, theirs.logpdf(mu), rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize('d', [2, 16, 64, 512])
def test_everything_is_finite_for_any_kappa(d):
    kappa = jnp.asarray([0.0, 1e-30, 1e-6, 1.0, d / 2, 1e4, 1e6])
    for function in (von_mises_fisher.kl_to_uniform, von_mises_fisher.mean_cosine):
        both = jax.vmap(jax.value_and_grad(functools.partial(function, d=d)))
        value, slope = both(kappa)
        chex.assert_tree_all_finite((value, slope))
        assert (value >= -1e-7).all() and (slope >= -1e-7).all()
    assert von_mises_fisher.mean_cosine(kappa, d).max() <= 1


@pytest.mark.parametrize('d', DIMENSIONS)
@pytest.mark.parametrize('kappa', [0.0, 1.0, 30.0, 1e3, 1e4])
def test_implicit_gradient_is_the_slope_of_the_quantile(d, kappa):
    """dh/dkappa of a draw, against finite differences of the quadrature's quantile."""
    u = [1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999]
    step = 1e-4 * max(kappa, 1.0)
    above = law(d, kappa + step)
    below = law(d, kappa - step)
    slope = np.array([above.haversine(p) - below.haversine(p) for p in u]) / (2 * step)
    h = np.array([law(d, kappa).haversine(p) for p in u])
    ours = _in_float64(lambda h, k: _slopes(h, k, d), h, kappa)
    np.testing.assert_allclose(ours, slope, rtol=1e-6, atol=1e-10 / max(kappa, 1.0))
    # float32 cannot tell the last draw at kappa = 0 from 1.
    inside = h < 1 - 1e-5
    ours = _slopes(jnp.asarray(h, jnp.float32), jnp.float32(kappa), d)
    np.testing.assert_allclose(ours[inside], slope[inside], rtol=1e-3)


@pytest.mark.parametrize('d', DIMENSIONS)
def test_implicit_gradient_is_finite_for_any_draw(d):
    h = jnp.asarray([0.0, 1e-38, 1e-10, 0.5, 1 - 6e-8, 1.0])
    for kappa in (0.0, 1.0, 100.0, 1e4):
        slope = _slopes(h, jnp.float32(kappa), d)
        chex.assert_tree_all_finite(slope)
        assert (slope <= 0).all()  # more kappa moves every quantile towards mu


@pytest.mark.parametrize('d', DIMENSIONS)
@pytest.mark.parametrize('kappa', [0.0, 1.0, 50.0, 1e4])
def test_law_of_the_draws(d, kappa):
    """Mean, variance and the whole law (Kolmogorov–Smirnov) of the haversine."""
    n = 20_000
    draw = jax.jit(von_mises_fisher.draw, static_argnums=2)
    h, normal = draw(jax.random.key(1), jnp.full(n, kappa), d)
    chex.assert_shape(normal, (n, d - 1))
    h = np.asarray(h, np.float64)
    assert h.min() >= 0 and h.max() <= 1
    found = law(d, kappa)
    mean = found.mean(lambda a: np.sin(a / 2) ** 2)
    centred = [found.mean(lambda a, k=k: (np.sin(a / 2) ** 2 - mean) ** k) for k in (2, 4)]
    assert abs(h.mean() - mean) < 5 * np.sqrt(centred[0] / n)
    assert abs(h.var() - centred[0]) < 5 * np.sqrt((centred[1] - centred[0] ** 2) / n)
    # A thousand nodes between the quantiles are enough for the test's resolution of 1/√n.
    angle = np.linspace(found.edges[0], found.edges[-1], 4001)
    levels = np.array([found.cdf(a) for a in angle])
    angles = 2 * np.arcsin(np.sqrt(h))
    assert stats.kstest(angles, lambda a: np.interp(a, angle, levels)).pvalue > 1e-4


@pytest.mark.parametrize(('d', 'kappa'), [(2, 5.0), (3, 100.0), (8, 1.0), (16, 40.0)])
def test_samples_against_scipy(d, kappa):
    """Cosines to mu by a two-sample test; across mu all directions are alike."""
    n = 20_000
    mu = np.asarray(geometry.l2_normalize(jnp.arange(1.0, d + 1)), np.float64)
    sample = jax.jit(von_mises_fisher.sample)
    x = sample(jax.random.key(2), jnp.tile(jnp.asarray(mu, jnp.float32), (n, 1)), jnp.full(n, kappa))
    chex.assert_shape(x, (n, d))
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-5)
    x = np.asarray(x, np.float64)
    theirs = stats.vonmises_fisher(mu / np.linalg.norm(mu), kappa).rvs(n, random_state=0)
    assert stats.ks_2samp(x @ mu, theirs @ mu).pvalue > 1e-4
    basis = np.linalg.svd(mu[None])[2][1:]
    across = x @ basis.T
    each = np.sqrt(law(d, kappa).mean(lambda a: np.sin(a) ** 2) / (d - 1))
    np.testing.assert_array_less(np.abs(across.mean(0)), 5 * each / np.sqrt(n))
    covariance = across.T @ across / n / each**2
    kurtosis = np.mean(across[:, 0] ** 4) / each**4
    bound = 5 * np.sqrt(max(kurtosis, 1) / n)
    np.testing.assert_array_less(np.abs(covariance - np.eye(d - 1)), bound)


@pytest.mark.parametrize('d', DIMENSIONS)
@pytest.mark.parametrize('kappa', [1.0, 20.0, 1e3])
def test_gradient_of_expectation_against_quadrature(d, kappa):
    """d/dkappa of E exp(cosine) is Cov(cosine, exp(cosine)), here by 20,000 samples."""
    n = 20_000
    mu = geometry.l2_normalize(jnp.arange(1.0, d + 1))
    key = jax.random.key(3)
    h, normal = jax.jit(von_mises_fisher.draw, static_argnums=2)(key, jnp.full(n, kappa), d)

    def sampled(kappa, h, normal):
        return jnp.exp(jnp.sum(von_mises_fisher.sample_from_draws(mu, kappa, h, normal) * mu))

    slopes = jax.jit(jax.vmap(jax.grad(sampled), (None, 0, 0)))(jnp.float32(kappa), h, normal)
    found = law(d, kappa)
    mean = found.mean(np.cos)
    truth = found.mean(lambda a: (np.cos(a) - mean) * np.exp(np.cos(a)))
    assert abs(float(slopes.mean()) - truth) < 5 * float(slopes.std()) / np.sqrt(n)


def test_gradient_reaches_mu():
    """d/dmu of E⟨a, x⟩ is A·a on the tangent space."""
    n = 20_000
    d = 8
    kappa = 10.0
    mu = geometry.l2_normalize(jnp.arange(1.0, d + 1))
    a = jnp.asarray(np.random.default_rng(0).normal(size=d), jnp.float32)
    h, normal = von_mises_fisher.draw(jax.random.key(4), jnp.full(n, kappa), d)

    def sampled(mu, h, normal):
        unit = geometry.l2_normalize(mu)
        return a @ von_mises_fisher.sample_from_draws(unit, jnp.float32(kappa), h, normal)

    slopes = jax.jit(jax.vmap(jax.grad(sampled), (None, 0, 0)))(mu, h, normal)
    truth = law(d, kappa).mean(np.cos) * (a - (a @ mu) * mu)
    bound = 5 * np.asarray(slopes.std(0)) / np.sqrt(n) + 1e-6
    np.testing.assert_array_less(np.abs(slopes.mean(0) - truth), bound)


@pytest.mark.parametrize('kappa', [0.0, 1.0, 1e4])
@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_gradients_at_the_poles(kappa, sign):
    """They are finite, and ⟨u, J·v⟩ = ⟨Jᵀ·u, v⟩ for forward and reverse mode."""
    mu = sign * jnp.eye(1, 16)
    draws = von_mises_fisher.draw(jax.random.key(0), jnp.full(1, kappa), 16)

    def run(mu, kappa):
        x = von_mises_fisher.sample_from_draws(mu, kappa, *draws)
        return x, von_mises_fisher.kl_to_uniform(kappa, 16)

    point = (mu, jnp.full(1, kappa))
    v = (jax.random.normal(jax.random.key(1), (1, 16)), jnp.ones(1))
    value, forward = jax.jvp(run, point, v)
    u = (jax.random.normal(jax.random.key(2), (1, 16)), jnp.ones(1))
    backward = jax.vjp(run, *point)[1](u)
    chex.assert_tree_all_finite((value, forward, backward))
    left = sum(np.vdot(*pair) for pair in zip(u, forward))
    right = sum(np.vdot(*pair) for pair in zip(backward, v))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_sample_is_differentiable_with_its_draws():
    """`sample` draws and differentiates in one, under jit."""

    def loss(mu, kappa):
        return jnp.sum(von_mises_fisher.sample(jax.random.key(0), mu, kappa)[:, 0])

    mu = geometry.l2_normalize(jnp.ones((4, 8)))
    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(mu, jnp.full(4, 5.0))
    chex.assert_tree_all_finite(slopes)
    assert (np.abs(slopes[1]) > 0).all()


def test_a_draw_depends_on_no_other_kappa():
    """The loop runs until the last element is accepted; the others keep what they have."""
    draw = jax.jit(von_mises_fisher.draw, static_argnums=2)
    kappas = jnp.asarray([1.0, 10.0, 100.0, 1e4] * 50)
    h, normal = draw(jax.random.key(5), kappas, 2)
    others, same = draw(jax.random.key(5), kappas.at[::2].set(0.0), 2)
    np.testing.assert_array_equal(h[1::2], others[1::2])
    np.testing.assert_array_equal(normal, same)
    assert (h[::2] != others[::2]).any()


@pytest.mark.parametrize('d', DIMENSIONS)
@pytest.mark.parametrize('kappa', [0.0, 1.0, 30.0, 1e4])
def test_share_of_accepted_proposals(d, kappa):
    """It is at least 65%, and that of the published sampler: the densities' normalisers and their
    largest ratio give it.
    """
    n = 20_000
    kappas = jnp.full(n, kappa, jnp.float32)
    _, accepted = jax.jit(von_mises_fisher._propose, static_argnums=2)(jax.random.key(6), kappas, d)
    m = d - 1
    b = m / (2 * kappa + np.sqrt(4 * kappa**2 + m * m))
    x0 = (1 - b) / (1 + b)
    # ∫ of Wood's envelope is that of the uniform law, times its largest ratio to the target.
    largest = kappa * (x0 - 1) - m * np.log1p(-(x0**2))
    envelope = m * np.log(2 / (1 + b)) + m / 2 * np.log(b)
    expected = np.exp(law(d, kappa).log_m_scaled() - largest + envelope - 2 * m * np.log(2) / 2)
    del expected
    share = float(accepted.mean())
    assert share > 0.65 - 5 * np.sqrt(0.65 * 0.35 / n)
    if kappa == 0:
        assert share == 1


def test_the_loop_ends_after_its_last_round(monkeypatch):
    """With kappa = NaN nothing is accepted; with one round the first proposal is kept."""
    h, _ = von_mises_fisher.draw(jax.random.key(7), jnp.full(3, jnp.nan), 8)
    assert np.isnan(h).all()
    monkeypatch.setattr(von_mises_fisher, '_ROUNDS', 1)
    kappas = jnp.full(1000, 50.0)
    h, _ = von_mises_fisher.draw(jax.random.key(8), kappas, 8)
    key = jax.random.fold_in(jax.random.split(jax.random.key(8))[0], 0)
    proposals, accepted = von_mises_fisher._propose(key, kappas, 8)
    np.testing.assert_array_equal(h, proposals)
    assert not accepted.all()


def test_what_cannot_be_differentiated_says_so():
    with pytest.raises(TypeError, match='no second derivative'):
        jax.hessian(lambda k: von_mises_fisher.implicit_haversine(jnp.float32(0.4), k, 8))(
            jnp.float32(3.0)
        )
