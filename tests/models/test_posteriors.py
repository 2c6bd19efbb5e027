"""Every family of posteriors keeps the Protocol, and its numbers are those of closed forms and of
SciPy.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from scipy import integrate, special, stats

from sphere_ar_jax.models.posteriors import (
    POSTERIORS,
    Gaussian,
    PowerSpherical,
    SigmaVAE,
    VonMisesFisher,
    from_parameters,
    parameters,
)
from sphere_ar_jax.runtime import sharding

WORDS = sorted(POSTERIORS)
# Most tests have one shape, with which moments are exact enough, so that programs are shared.
B = 200
# The batches that gradients are taken of, and whose draws are compared with those of B images.
LARGER = 208
L = 100
D = 8


def _encoded(family, scale=1.0, shape=(B, L)):
    """Normal numbers in the place of the encoder's output."""
    numbers = np.random.default_rng(0).normal(size=(*shape, family.outputs(D)))
    return (scale * numbers).astype(np.float32)


@functools.cache
def _keys(seed, count=B):
    return jax.random.split(jax.random.key(seed), count)


@functools.cache
def _tokens(family):
    """(encoder's output, keys) → (tokens, draws), compiled."""

    def run(x, keys):
        q = family(x)
        draws = q.draws(keys)
        return q.sample(draws), draws

    return jax.jit(run)


@functools.cache
def _numbers(family):
    """Encoder's output → (distribution, KL, statistics), compiled."""

    def run(x):
        q = family(x)
        return q, q.kl(), q.statistics()

    return jax.jit(run)


@pytest.mark.parametrize('word', WORDS)
def test_protocol(word):
    family = POSTERIORS[word]()
    x = _encoded(family)
    z, draws = _tokens(family)(x, _keys(0))
    q, kl, scalars = _numbers(family)(x)
    chex.assert_shape(z, (B, L, D))
    chex.assert_shape(kl, (B, L))
    chex.assert_shape(list(scalars.values()), ())
    chex.assert_trees_all_equal_dtypes(*jax.tree.leaves((z, draws, kl, scalars)), np.float32(0))
    chex.assert_tree_all_finite((z, draws, kl, scalars))
    assert (np.asarray(kl) >= 0).all()
    np.testing.assert_allclose(scalars['kl'], np.mean(kl), rtol=1e-6)
    # Logs, plots and pages find every name.
    assert set(family.shown) <= set(scalars)
    assert set(family.labels) <= set(scalars)
    assert family.logarithmic <= set(family.labels)
    # The leaves are those of images and tokens, so that batches can be joined and rows taken.
    for leaf in jax.tree.leaves(q):
        assert leaf.shape[:2] == (B, L)
    # The distribution is made again from its parameters, which files keep by their names.
    again = from_parameters(family, D, parameters(q) | {'label': 0})
    assert type(again) is type(q)
    chex.assert_trees_all_equal(again, q)
    assert family == POSTERIORS[word]()
    assert hash(family) == hash(POSTERIORS[word]())


# What makes draws concentrate, in the place of the encoder's outputs beside the mean.
NARROW = {'gaussian': -30.0, 'power_spherical': 1e4, 'vmf': 1e4, 'sigma_vae': 0.0}


@pytest.mark.parametrize('word', WORDS)
def test_draws_concentrate_about_the_mode(word):
    family = POSTERIORS[word]()
    x = _encoded(family)
    x[..., D:] = NARROW[word]
    z, draws = _tokens(family)(x, _keys(0))
    q, _, _ = _numbers(family)(x)
    mode = q.mode()
    chex.assert_shape(mode, (B, L, D))
    np.testing.assert_allclose(jax.jit(family.project)(mode), mode, rtol=1e-6)
    if word == 'sigma_vae':
        z = np.asarray(z) - family.sigma * np.asarray(draws)
    np.testing.assert_allclose(z, mode, atol=0.2)  # points on the sphere are some 4 apart


@pytest.mark.parametrize('word', WORDS)
def test_statistics_of_joined_batches(word):
    """Arrays of NumPy that were joined, as an evaluation joins them, have the same statistics."""
    family = POSTERIORS[word]()
    q = jax.jit(family)(_encoded(family, shape=(3, 4)))
    rows = [jax.tree.map(lambda a, i=i: np.asarray(a)[i : i + 1], q) for i in range(3)]
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
    scalars = jax.jit(q.statistics)()
    for name, value in jax.jit(joined.statistics)().items():
        np.testing.assert_allclose(value, scalars[name], rtol=1e-6, err_msg=name)


@functools.cache
def _gradients(family):
    """(encoder's output, keys, a, weight) → ((value, (tokens, draws)), gradient), compiled.

    The value is Σ ‖z − a‖² + weight · Σ KL.
    """

    def value(x, keys, a, weight):
        q = family(x)
        draws = q.draws(keys)
        z = q.sample(draws)
        return jnp.sum((z - a[None, None]) ** 2) + weight * jnp.sum(q.kl()), (z, draws)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@pytest.mark.parametrize('word', WORDS)
def test_draws_of_an_image_do_not_depend_on_the_batch(word):
    """The same numbers beside other images, and in a batch of another size."""
    family = POSTERIORS[word]()
    more = _encoded(family, shape=(LARGER, L))
    keys = _keys(1, LARGER)
    x = more[:B]

    def first(results):
        return jax.tree.map(lambda a: np.asarray(a)[:1], results)

    z, draws = first(_tokens(family)(x, keys[:B]))
    others = np.concatenate([x[:1], 30 * x[1:]])
    z_beside, draws_beside = first(_tokens(family)(others, keys[:B]))
    (_, with_more), _ = _gradients(family)(more, keys, x[0, 0, :D], np.float32(1))
    z_with_more, draws_with_more = first(with_more)
    chex.assert_trees_all_equal(draws_beside, draws)
    chex.assert_trees_all_close(draws_with_more, draws, rtol=1e-5)
    np.testing.assert_array_equal(z_beside, z)
    np.testing.assert_allclose(z_with_more, z, rtol=1e-4, atol=1e-5)
    # Images of the same numbers have draws of their own.
    _, twins = _tokens(family)(np.tile(x[:1], (B, 1, 1)), keys[:B])
    for leaf in jax.tree.leaves(twins):
        assert (np.asarray(leaf[0]) != np.asarray(leaf[1])).all()


@pytest.mark.parametrize('word', WORDS)
def test_draws_do_not_depend_on_the_devices(word):
    """An image has the same draws and the same token where each device has images of its own."""
    mesh = sharding.make_mesh()
    if mesh.size == 1:
        pytest.skip('one device')
    family = POSTERIORS[word]()
    count = 2 * mesh.size
    x = _encoded(family, shape=(count, L))
    keys = _keys(1, count)
    expected = _tokens(family)(x, keys), _numbers(family)(x)
    x, keys = jax.device_put((x, keys), NamedSharding(mesh, sharding.BATCH))
    found = _tokens(family)(x, keys), _numbers(family)(x)
    for part in jax.tree.leaves(found[0]):
        assert len(part.sharding.device_set) == mesh.size
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('word', WORDS)
def test_gradients_are_finite_where_the_encoder_is_extreme(word):
    family = POSTERIORS[word]()
    a = np.arange(D, dtype=np.float32)
    for scale in (0.0, 1.0, 1e3):
        x = _encoded(family, scale, (LARGER, L))
        chex.assert_tree_all_finite(_gradients(family)(x, _keys(0, LARGER), a, np.float32(1)))


@pytest.mark.parametrize(
    ('word', 'projected'),
    [('gaussian', False), ('sigma_vae', False), ('power_spherical', True), ('vmf', True)],
)
def test_projection(word, projected):
    z = np.array([[3, 4, 0, 0], [0, 0.1, 0, 0]], np.float32)
    found = jax.jit(POSTERIORS[word]().project)(z)
    expected = [[1.2, 1.6, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]] if projected else z
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def _gaussian_kl(mean, std):
    """KL(N(mean, std²) ‖ N(0, 1)) by quadrature over its density."""
    q = stats.norm(mean, std)

    def integrand(z):
        return q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z))

    ends = (mean - 12 * std, mean + 12 * std)
    return integrate.quad(integrand, *ends, epsabs=1e-12, limit=200)[0]


def test_gaussian_kl_against_quadrature():
    mean = np.array([0.0, 1.5, -3.0])
    std = np.array([1.0, 0.2, 2.5])
    x = np.concatenate([mean, 2 * np.log(std)])[None, None].astype(np.float32)
    truth = sum(_gaussian_kl(*pair) for pair in zip(mean, std, strict=True))
    kl = jax.jit(lambda x: Gaussian()(x).kl())
    np.testing.assert_allclose(kl(x), [[truth]], rtol=1e-6)
    np.testing.assert_array_equal(kl(np.zeros_like(x)), [[0.0]])


def test_log_variances_are_clipped():
    """To [−30, 20], as LDM clips them; beyond, the gradient is 0."""
    x = np.array([[[0, 0, 0, -1e4, 1, 1e4]]], np.float32)

    @jax.jit
    def measure(x):
        slope = jax.grad(lambda x: jnp.sum(Gaussian()(x).kl()))(x)
        return Gaussian()(x).log_variance, slope

    log_variance, slope = measure(x)
    np.testing.assert_array_equal(log_variance, [[[-30.0, 1.0, 20.0]]])
    np.testing.assert_array_equal(np.asarray(slope[0, 0, 3:]) != 0, [False, True, False])


def test_sigma_kl_against_quadrature():
    """It is KL(N(mu, sigma²) ‖ N(0, 1)) less its value at mu = 0."""
    mu = np.array([0.5, -2.0, 3.0])
    x = mu[None, None].astype(np.float32)
    for sigma in (0.5, 1.0):
        constant = mu.size * _gaussian_kl(0.0, sigma)
        whole = sum(_gaussian_kl(m, sigma) for m in mu)
        kl = jax.jit(SigmaVAE(sigma)(x).kl)()
        np.testing.assert_allclose(kl, [[whole - constant]], rtol=1e-6)


def test_vmf_kl_is_that_of_scipy():
    family = VonMisesFisher()
    x = _encoded(family, scale=20.0)
    q, kl, _ = _numbers(family)(x)
    kappa = np.log1p(np.exp(np.asarray(x[..., -1], np.float64))) + 1
    np.testing.assert_allclose(q.kappa, kappa, rtol=1e-6)
    some = slice(12)
    surface = np.log(2) + D / 2 * np.log(np.pi) - special.gammaln(D / 2)
    pole = np.eye(1, D)[0]
    truth = [surface - stats.vonmises_fisher(pole, k).entropy() for k in kappa[0, some]]
    np.testing.assert_allclose(kl[0, some], truth, rtol=1e-5, atol=5e-6)


def _samples(family, x):
    """Samples (B·L, D) of one token's distribution x (outputs,), in float64."""
    rows = np.tile(x.astype(np.float32), (B, L, 1))
    z, _ = _tokens(family)(rows, _keys(2))
    return np.asarray(z, np.float64).reshape(-1, D)


@pytest.mark.parametrize('word', ['gaussian', 'sigma_vae'])
def test_moments_of_gaussian_samples(word):
    family = POSTERIORS[word]()
    mean = np.array([1.0, -2.0, 0.0, 0.5, 3.0, -0.1, 10.0, -1.0])
    std = np.full(D, 0.5)
    x = mean
    if word == 'gaussian':
        std = np.array([0.1, 1.0, 3.0, 0.5, 2.0, 0.01, 1.0, 10.0])
        x = np.concatenate([mean, 2 * np.log(std)])
    z = _samples(family, x)
    n = len(z)
    error = (z - mean) / std
    np.testing.assert_array_less(np.abs(error.mean(0)), 5 / np.sqrt(n))
    covariance = error.T @ error / n  # of standard normal numbers, with errors √2/√n or 1/√n
    np.testing.assert_array_less(np.abs(covariance - np.eye(D)), 5 * np.sqrt(2 / n))
    for column in error.T:
        assert stats.kstest(column, 'norm').pvalue > 1e-4


def _mean_cosine(kappa):
    """E⟨mu, x⟩ of von Mises-Fisher's distribution in D dimensions, by SciPy's Bessel functions."""
    return special.ive(D / 2, kappa) / special.ive(D / 2 - 1, kappa)


def test_moments_of_vmf_samples():
    """Tokens have norm √d, and their mean is √d A mu with A by SciPy's Bessel functions."""
    z = _samples(VonMisesFisher(), np.arange(1.0, D + 2))
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), np.sqrt(D), rtol=1e-5)
    kappa = np.log1p(np.exp(D + 1.0)) + 1
    mu = np.arange(1.0, D + 1) / np.linalg.norm(np.arange(1.0, D + 1))
    error = np.abs(z.mean(0) - np.sqrt(D) * _mean_cosine(kappa) * mu)
    np.testing.assert_array_less(error, 5 * z.std(0) / np.sqrt(len(z)))


@pytest.mark.parametrize('word', WORDS)
def test_gradients_of_an_expectation(word):
    """The mean of the samples' gradients, against the gradient of the expectation.

    E ‖z − a‖² is Σ (mean − a)² + std² for the Gaussians. On the sphere it is 2R² − 2R ⟨a, E x⟩ for
    ‖a‖ = R, with E x = A(kappa) mu.
    """
    family = POSTERIORS[word]()
    x = np.array(
        [0.5, -1.0, 0.3, 0.2, -0.7, 0.4, 0.1, -0.2, 3.0, 0.6, -1.0, 0, -0.4, 0.8, 1.0, -2.0]
    )
    x = x[: family.outputs(D)]
    a = np.array([1.0, 2.0, -1.0, 0.5, 1.5, -0.5, 0.3, 0.9])
    a *= np.sqrt(D) / np.linalg.norm(a)

    def expectation(x):
        if word == 'gaussian':
            return np.sum((x[:D] - a) ** 2 + np.exp(x[D:]))
        if word == 'sigma_vae':
            return np.sum((x - a) ** 2) + D * 0.25
        kappa = np.log1p(np.exp(x[-1])) + 1
        mean_cosine = _mean_cosine(kappa) if word == 'vmf' else kappa / (kappa + D - 1)
        mu = x[:D] / np.linalg.norm(x[:D])
        return 2 * D - 2 * np.sqrt(D) * mean_cosine * np.sum(a * mu)

    rows = np.tile(x.astype(np.float32), (LARGER, L, 1))
    _, slopes = _gradients(family)(rows, _keys(2, LARGER), a.astype(np.float32), np.float32(0))
    slopes = np.asarray(slopes, np.float64).reshape(LARGER * L, -1)
    steps = 1e-5 * np.eye(len(x))
    truth = [(expectation(x + step) - expectation(x - step)) / 2e-5 for step in steps]
    bound = 5 * slopes.std(0) / np.sqrt(len(slopes)) + 1e-5
    np.testing.assert_array_less(np.abs(slopes.mean(0) - truth), bound)


def _floats(family, x):
    """The statistics of an encoder's output."""
    _, _, scalars = _numbers(family)(x.astype(np.float32))
    return {name: float(value) for name, value in scalars.items()}


def test_statistics_of_gaussian_latents():
    """Means of N(0, 0.8²) with std 0.6 make tokens like the prior's; two dimensions are dead."""
    rng = np.random.default_rng(0)
    mean = 0.8 * rng.normal(size=(40, 64, 16))
    mean[..., :2] *= 0.01
    x = np.concatenate([mean, np.full_like(mean, 2 * np.log(0.6))], -1)
    scalars = _floats(Gaussian(), x)
    np.testing.assert_allclose(scalars['std'], 0.6, rtol=1e-6)
    np.testing.assert_allclose(scalars['dead_share'], 2 / 16)
    np.testing.assert_allclose(scalars['spread_mean'], mean.std((0, 1)).mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars['spread_min'], mean.std((0, 1)).min(), rtol=1e-5)
    np.testing.assert_allclose(
        scalars['mean_norm'], np.linalg.norm(mean, axis=-1).mean(), rtol=1e-5
    )
    said = Gaussian().faults(scalars)
    assert said.startswith('12% of the dimensions are dead')
    well = scalars | {'dead_share': 0.0}
    assert Gaussian().faults(well) is None
    assert 'KL is 0.050' in Gaussian().faults(well | {'kl': 0.05})
    assert Gaussian().faults(well | {'std': float('nan')}) == 'the latents are not finite'


def test_statistics_of_sigma_latents():
    """Means that spread by 1 beside sigma = 0.5 have the ratio that LatentLM's σ has."""
    mu = np.random.default_rng(0).normal(size=(40, 64, 16))
    scalars = _floats(SigmaVAE(0.5), mu)
    np.testing.assert_allclose(scalars['sigma_to_spread'], 0.5 / mu.std((0, 1)).mean(), rtol=1e-5)
    assert scalars['dead_share'] == 0
    assert SigmaVAE().faults(scalars) is None
    small = _floats(SigmaVAE(0.5), 0.1 * mu)
    assert 'sigma is 5 times the spread of the means' in SigmaVAE().faults(small)
    alike = _floats(SigmaVAE(0.5), np.ones_like(mu))
    assert '100% of the dimensions are dead' in SigmaVAE().faults(alike)
    assert SigmaVAE().faults(scalars | {'kl': float('inf')}) == 'the latents are not finite'


@pytest.mark.parametrize('sigma', [0.0, -1.0, float('nan'), float('inf')])
def test_sigma_must_be_above_zero(sigma):
    with pytest.raises(ValueError, match='sigma must be a number above 0'):
        SigmaVAE(sigma)


@pytest.mark.parametrize('family', [PowerSpherical, VonMisesFisher])
def test_kappa_scale_multiplies_the_number_of_kappa(family):
    x = _encoded(family())
    q, _, _ = _numbers(family(kappa_scale=8.0))(x)
    published, _, _ = _numbers(family())(x)
    chex.assert_equal_shape((q.kappa, published.kappa))
    number = np.asarray(x[..., -1], np.float64)
    np.testing.assert_allclose(q.kappa, np.logaddexp(0, 8 * number) + 1, rtol=1e-6)
    np.testing.assert_allclose(published.kappa, np.logaddexp(0, number) + 1, rtol=1e-6)
    np.testing.assert_array_equal(q.mu, published.mu)


@pytest.mark.parametrize('wrong', [0.0, -1.0, float('nan'), float('inf')])
def test_kappa_scale_must_be_above_zero(wrong):
    for family in (PowerSpherical, VonMisesFisher):
        with pytest.raises(ValueError, match=r'^kappa_scale must be a number above 0, not .*$'):
            family(kappa_scale=wrong)


def test_vmf_says_what_power_spherical_says():
    """Both have a direction and a concentration, and the same statistics, faults and words."""
    x = _encoded(VonMisesFisher())
    ours, _, _ = _numbers(VonMisesFisher())(x)
    other = POSTERIORS['power_spherical']()
    others, _, _ = _numbers(other)(x)
    np.testing.assert_array_equal(ours.mu, others.mu)
    np.testing.assert_array_equal(ours.kappa, others.kappa)
    scalars = _floats(VonMisesFisher(), x)
    for name, value in _floats(other, x).items():
        assert name == 'kl' or scalars[name] == value
    bad = scalars | {'kappa': 1.0, 'mean_direction': 1.0}
    assert VonMisesFisher().faults(bad) == other.faults(bad)
    assert VonMisesFisher().shown == other.shown
