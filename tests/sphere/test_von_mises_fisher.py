import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from sphere_ar_jax.sphere import geometry, von_mises_fisher

DIMENSIONS = [2, 3, 8, 16, 64]
# The least dimension and that of the published tokens; the others take as long.
FAST = (2, 16)
FEW_ARE_FAST = [pytest.param(d, marks=() if d in FAST else pytest.mark.slow) for d in DIMENSIONS]
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
        parts = [
            self.integral(*ends, function)
            for ends in zip(self.edges[:-1], self.edges[1:], strict=True)
        ]
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
        found = jax.jit(function)(*(jnp.asarray(n, jnp.float64) for n in numbers))
        return jax.tree.map(np.asarray, found)


def _in_float32(function, *numbers):
    found = jax.jit(function)(*(jnp.asarray(n, jnp.float32) for n in numbers))
    chex.assert_trees_all_equal_dtypes(*jax.tree.leaves(found), jnp.float32(0))
    return found


def _slopes(h, kappa, d):
    """dh/dkappa of draws h (k, n) at kappa (k,), by `implicit_haversine`."""
    slope = jax.grad(lambda k, h: von_mises_fisher.implicit_haversine(h, k, d))
    return jax.vmap(jax.vmap(slope, (None, 0)))(kappa, h)


@pytest.mark.parametrize('d', FEW_ARE_FAST)
def test_kl_entropy_and_mean_cosine_against_quadrature(d):
    """In float64 to 1e-10, and in float32 to what the module says: 2e-6 of the size plus 5e-6."""
    kl = np.array([_kl(d, kappa) for kappa in KAPPAS])
    mean = np.array([law(d, kappa).mean(np.cos) for kappa in KAPPAS])
    surface = np.log(2) + d / 2 * np.log(np.pi) - special.gammaln(d / 2)
    truths = (kl, surface - kl, mean)

    def all_three(kappa):
        return (
            von_mises_fisher.kl_to_uniform(kappa, d),
            von_mises_fisher.entropy(kappa, d),
            von_mises_fisher.mean_cosine(kappa, d),
        )

    for ours, truth in zip(_in_float64(all_three, KAPPAS), truths, strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-10, atol=1e-10)
    single = _in_float32(all_three, KAPPAS)
    for ours, truth in zip(single, truths, strict=True):
        np.testing.assert_allclose(ours, truth, rtol=2e-6, atol=5e-6)
    # The mean and the divergence are accurate next to 0 as well.
    np.testing.assert_allclose(single[2], mean, rtol=1e-6, atol=1e-15)
    small = np.array(KAPPAS) < d / 2
    np.testing.assert_allclose(single[0][small], kl[small], rtol=1e-5, atol=5e-8)


@pytest.mark.parametrize('d', FEW_ARE_FAST)
def test_gradient_of_kl_is_kappa_times_the_variance_of_the_cosine(d):
    """dKL/dkappa = kappa dA/dkappa = kappa Var[cosine], forward and in reverse."""

    def truth(kappa):
        found = law(d, kappa)
        mean = found.mean(lambda a: np.sin(a / 2) ** 2)
        return kappa * 4 * found.mean(lambda a: (np.sin(a / 2) ** 2 - mean) ** 2)

    def both(kappa):
        function = functools.partial(von_mises_fisher.kl_to_uniform, d=d)
        return jax.vmap(jax.grad(function))(kappa), jax.vmap(jax.jacfwd(function))(kappa)

    truths = [truth(kappa) for kappa in KAPPAS]
    for ours in _in_float64(both, KAPPAS):
        np.testing.assert_allclose(ours, truths, rtol=1e-8, atol=1e-14)
    for ours in _in_float32(both, KAPPAS):
        np.testing.assert_allclose(ours, truths, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize('d', FEW_ARE_FAST)
def test_density_and_entropy_against_scipy(d):
    rng = np.random.default_rng(0)
    mu = rng.normal(size=d)
    mu /= np.linalg.norm(mu)
    kappas = [0.3, 1.0, 17.5, 1e3, 1e4]
    theirs = [stats.vonmises_fisher(mu, kappa) for kappa in kappas]
    poles = np.stack([-mu, mu])
    x = [np.concatenate([law.rvs(20, random_state=rng), poles]) for law in theirs]

    def log_prob(x, mu, kappa):
        return jax.vmap(jax.vmap(von_mises_fisher.log_prob, (0, None, None)), (0, None, 0))(
            x, mu, kappa
        )

    ours = _in_float64(log_prob, x, mu, kappas)
    truths = [law.logpdf(points) for law, points in zip(theirs, x, strict=True)]
    np.testing.assert_allclose(ours, truths, rtol=1e-9, atol=1e-9)
    ours = _in_float64(lambda k: von_mises_fisher.entropy(k, d), kappas)
    np.testing.assert_allclose(ours, [law.entropy() for law in theirs], rtol=1e-9, atol=1e-9)
    # At mu the density has no rounding of the cosine in it.
    pole = np.eye(1, d)
    peaks = _in_float32(log_prob, np.repeat(pole[None], len(kappas), 0), pole[0], kappas)
    truths = [law.logpdf(mu) for law in theirs]
    np.testing.assert_allclose(peaks[:, 0], truths, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize('d', [2, 16, 512])
def test_everything_is_finite_for_any_kappa(d):
    """At kappa = 0 the second derivative of the divergence is Var[cosine] = 1/d."""
    kappas = [0.0, 1e-30, 1e-6, 1.0, d / 2, 1e4, 1e6]

    def run(kappa):
        kl = functools.partial(von_mises_fisher.kl_to_uniform, d=d)
        mean = functools.partial(von_mises_fisher.mean_cosine, d=d)
        return (
            *jax.vmap(jax.value_and_grad(kl))(kappa),
            *jax.vmap(jax.value_and_grad(mean))(kappa),
            jax.vmap(jax.grad(jax.grad(kl)))(kappa),
        )

    found = _in_float32(run, kappas)
    chex.assert_tree_all_finite(found)
    for values in found[:4]:
        assert (values >= -1e-7).all()
    assert found[2].max() <= 1
    np.testing.assert_allclose(found[4][0], 1 / d, rtol=1e-5)


@pytest.mark.parametrize('d', FEW_ARE_FAST)
def test_implicit_gradient_is_the_slope_of_the_quantile(d):
    """dh/dkappa of a draw, against finite differences of the quadrature's quantile."""
    kappas = np.array([0.0, 1.0, 30.0, 1e3, 1e4])
    u = [1e-4, 0.01, 0.3, 0.5, 0.7, 0.99, 0.9999]
    steps = 1e-4 * np.maximum(kappas, 1)
    above = np.array([[law(d, kappa).haversine(p) for p in u] for kappa in kappas + steps])
    below = np.array([[law(d, kappa).haversine(p) for p in u] for kappa in kappas - steps])
    slope = (above - below) / (2 * steps[:, None])
    h = np.array([[law(d, kappa).haversine(p) for p in u] for kappa in kappas])
    ours = _in_float64(lambda h, k: _slopes(h, k, d), h, kappas)
    # Differences of quantiles next to 1 have an error of their rounding over the step, 1e-12.
    np.testing.assert_allclose(ours, slope, rtol=2e-6, atol=1e-12)
    ours = _in_float32(lambda h, k: _slopes(h, k, d), h, kappas)
    # float32 cannot tell the last draw at kappa = 0 from 1.
    inside = h < 1 - 1e-5
    np.testing.assert_allclose(ours[inside], slope[inside], rtol=1e-3)


def test_implicit_gradient_of_the_closed_form():
    """At d = 3 the haversine is a truncated exponential: F(h) = (1 − e^{−2κh})/(1 − e^{−2κ})."""

    def quantile(kappa, u):
        return -jnp.log1p(u * jnp.expm1(-2 * kappa)) / (2 * kappa)

    def run(kappa, u):
        h = quantile(kappa, u)
        exact = jax.grad(quantile)(kappa, u)
        return exact, jax.grad(lambda k: von_mises_fisher.implicit_haversine(h, k, 3))(kappa)

    u = np.linspace(0.01, 0.99, 50)
    for kappa in (0.1, 3.0, 2000.0):
        exact, ours = _in_float64(jax.vmap(run), np.full(50, kappa), u)
        np.testing.assert_allclose(ours, exact, rtol=1e-9)


@pytest.mark.parametrize('d', [2, 16])
def test_implicit_gradient_is_finite_for_any_draw(d):
    kappas = [0.0, 1.0, 100.0, 1e4]
    h = np.tile([0.0, 1e-38, 1e-10, 0.5, 1 - 6e-8, 1.0], (len(kappas), 1))
    slope = _in_float32(lambda h, k: _slopes(h, k, d), h, kappas)
    chex.assert_tree_all_finite(slope)
    assert (slope <= 0).all()  # more kappa moves every quantile towards mu


@pytest.mark.parametrize('d', FEW_ARE_FAST)
def test_law_of_the_draws(d):
    """Mean, variance and the whole law (Kolmogorov–Smirnov) of the haversine."""
    n = 20_000
    kappas = [0.0, 1.0, 50.0, 1e4]
    draw = jax.jit(von_mises_fisher.draw, static_argnums=2)
    rows, normal = draw(jax.random.key(1), jnp.tile(jnp.asarray(kappas)[:, None], (1, n)), d)
    chex.assert_shape(normal, (len(kappas), n, d - 1))
    assert rows.min() >= 0
    assert rows.max() <= 1
    for kappa, h in zip(kappas, np.asarray(rows, np.float64), strict=True):
        found = law(d, kappa)
        mean = found.mean(lambda a: np.sin(a / 2) ** 2)
        second, fourth = (
            found.mean(lambda a, k=k: (np.sin(a / 2) ** 2 - mean) ** k) for k in (2, 4)
        )
        assert abs(h.mean() - mean) < 5 * np.sqrt(second / n)
        assert abs(h.var() - second) < 5 * np.sqrt((fourth - second**2) / n)
        # So many nodes between the quantiles are enough for the test's resolution of 1/√n.
        angle = np.linspace(found.edges[0], found.edges[-1], 2001)
        levels = np.array([found.cdf(a) for a in angle])
        angles = 2 * np.arcsin(np.sqrt(h))
        test = stats.kstest(angles, lambda a, x=angle, y=levels: np.interp(a, x, y))
        assert test.pvalue > 1e-4


@pytest.mark.parametrize(('d', 'kappa'), [(2, 5.0), (3, 100.0), (16, 40.0)])
def test_samples_against_scipy(d, kappa):
    """Cosines to mu by a two-sample test; across mu all directions are alike."""
    n = 20_000
    mu = np.asarray(geometry.l2_normalize(jnp.arange(1.0, d + 1)), np.float64)
    sample = jax.jit(von_mises_fisher.sample)
    x = sample(
        jax.random.key(2), jnp.tile(jnp.asarray(mu, jnp.float32), (n, 1)), jnp.full(n, kappa)
    )
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


@pytest.mark.parametrize('d', FEW_ARE_FAST)
def test_gradient_of_expectation_against_quadrature(d):
    """d/dkappa of E exp(cosine) is Cov(cosine, exp(cosine)), here by 20,000 samples."""
    n = 20_000
    mu = geometry.l2_normalize(jnp.arange(1.0, d + 1))
    draw = jax.jit(von_mises_fisher.draw, static_argnums=2)

    def sampled(kappa, h, normal):
        return jnp.exp(jnp.sum(von_mises_fisher.sample_from_draws(mu, kappa, h, normal) * mu))

    gradient = jax.jit(jax.vmap(jax.grad(sampled)))
    for kappa in (1.0, 20.0, 1e3):
        kappas = np.full(n, kappa, np.float32)
        slopes = np.asarray(gradient(kappas, *draw(jax.random.key(3), kappas, d)))
        found = law(d, kappa)
        mean = found.mean(np.cos)
        truth = found.mean(lambda a, mean=mean: (np.cos(a) - mean) * np.exp(np.cos(a)))
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


def test_gradients_at_the_poles():
    """They are finite, and ⟨u, J·v⟩ = ⟨Jᵀ·u, v⟩ for forward and reverse mode."""

    def run(mu, kappa, draws):
        x = von_mises_fisher.sample_from_draws(mu, kappa, *draws)
        return x, von_mises_fisher.kl_to_uniform(kappa, 16)

    @jax.jit
    def derivatives(mu, kappa):
        draws = von_mises_fisher.draw(jax.random.key(0), kappa, 16)
        point = functools.partial(run, draws=draws)
        v = (jax.random.normal(jax.random.key(1), (1, 16)), jnp.ones(1))
        u = (jax.random.normal(jax.random.key(2), (1, 16)), jnp.ones(1))
        value, forward = jax.jvp(point, (mu, kappa), v)
        backward = jax.vjp(point, mu, kappa)[1](u)
        return value, forward, backward, u, v

    for sign in (1.0, -1.0):
        for kappa in (0.0, 1.0, 1e4):
            found = derivatives(sign * jnp.eye(1, 16), jnp.full(1, kappa))
            chex.assert_tree_all_finite(found)
            _, forward, backward, u, v = found
            left = sum(np.vdot(*pair) for pair in zip(u, forward, strict=True))
            right = sum(np.vdot(*pair) for pair in zip(backward, v, strict=True))
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


@pytest.mark.parametrize('d', FEW_ARE_FAST)
def test_share_of_accepted_proposals(d):
    """It is that of Wood's own formulas, in float64, and at least 65%."""
    n = 20_000
    m = d - 1
    kappas = np.array([0.0, 1.0, 30.0, 1e4])
    rows = jnp.tile(jnp.asarray(kappas, jnp.float32)[:, None], (1, n))
    _, accepted = jax.jit(von_mises_fisher._propose, static_argnums=2)(jax.random.key(6), rows, d)
    for kappa, share in zip(kappas, accepted.mean(1), strict=True):
        b = (-2 * kappa + np.sqrt(4 * kappa**2 + m * m)) / m
        x0 = (1 - b) / (1 + b)
        c = kappa * x0 + m * np.log1p(-(x0**2))

        def accepts(angle, b=b, x0=x0, c=c, kappa=kappa):
            z = np.sin(angle / 2) ** 2
            w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
            weight = np.sin(angle) ** (m - 1)  # of z ~ Beta(m/2, m/2)
            return weight * np.exp(kappa * w + m * np.log1p(-x0 * w) - c)

        whole = np.exp(special.betaln(m / 2, 0.5))
        expected = integrate.quad(accepts, 0, np.pi, limit=200)[0] / whole
        assert 0.65 < expected <= 1 + 1e-9
        assert abs(share - expected) <= 5 * np.sqrt(max(expected * (1 - expected), 0) / n) + 1e-6


def test_the_loop_ends_after_its_last_round(monkeypatch):
    """With kappa = NaN nothing is accepted; with one round the first proposal is kept."""
    h, _ = von_mises_fisher.draw(jax.random.key(7), jnp.full(3, jnp.nan), 8)
    assert np.isnan(h).all()
    monkeypatch.setattr(von_mises_fisher, '_ROUNDS', 1)
    kappas = jnp.full(1000, 50.0)
    h, _ = von_mises_fisher.draw(jax.random.key(8), kappas, 8)
    key = jax.random.fold_in(jax.random.split(jax.random.key(8))[0], 0)
    proposals, accepted = von_mises_fisher._propose(key, kappas, 8)
    # Within a loop, XLA rounds the same operations otherwise.
    np.testing.assert_allclose(h, proposals, rtol=2e-6)
    assert not accepted.all()


def test_what_cannot_be_differentiated_says_so():
    with pytest.raises(TypeError, match='no second derivative'):
        jax.hessian(lambda k: von_mises_fisher.implicit_haversine(jnp.float32(0.4), k, 8))(
            jnp.float32(3.0)
        )
