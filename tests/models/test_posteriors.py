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
    SigmaVAE,
    VonMisesFisher,
    from_parameters,
    parameters,
)
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.sphere import geometry

WORDS = sorted(POSTERIORS)
B = 3
L = 4
D = 8


def _encoded(family, scale=1.0, shape=(B, L), d=D):
    """Normal numbers in the place of the encoder's output."""
    numbers = np.random.default_rng(0).normal(size=(*shape, family.outputs(d)))
    return jnp.asarray(scale * numbers, jnp.float32)


@functools.cache
def _program(family):
    """(encoder's output, keys) → (tokens, draws, KL, statistics), compiled."""

    def run(x, keys):
        q = family(x)
        draws = q.draws(keys)
        return q.sample(draws), draws, q.kl(), q.statistics()

    return jax.jit(run)


@pytest.mark.parametrize('word', WORDS)
def test_protocol(word):
    family = POSTERIORS[word]()
    x = _encoded(family)
    z, draws, kl, scalars = _program(family)(x, jax.random.split(jax.random.key(0), B))
    chex.assert_shape(z, (B, L, D))
    chex.assert_shape(kl, (B, L))
    chex.assert_shape(list(scalars.values()), ())
    chex.assert_trees_all_equal_dtypes(*jax.tree.leaves((z, draws, kl, scalars)), jnp.float32(0))
    chex.assert_tree_all_finite((z, draws, kl, scalars))
    assert (kl >= 0).all()
    np.testing.assert_allclose(scalars['kl'], kl.mean(), rtol=1e-6)
    # Logs, plots and pages find every name.
    assert set(family.shown) <= set(scalars)
    assert set(family.labels) <= set(scalars)
    assert family.logarithmic <= set(family.labels)
    # The leaves are those of images and tokens, so that batches can be joined and rows taken.
    for leaf in jax.tree.leaves(family(x)):
        assert leaf.shape[:2] == (B, L)
    # The distribution is made again from its parameters, which files keep by their names.
    again = from_parameters(family, D, parameters(family(x)) | {'label': 0})
    assert type(again) is type(family(x))
    chex.assert_trees_all_equal(again, family(x))
    assert family == POSTERIORS[word]() and hash(family) == hash(POSTERIORS[word]())


# What makes draws concentrate, in the place of the encoder's outputs beside the mean.
NARROW = {'gaussian': -30.0, 'power_spherical': 1e4, 'vmf': 1e4, 'sigma_vae': 0.0}


@pytest.mark.parametrize('word', WORDS)
def test_draws_concentrate_about_the_mode(word):
    family = POSTERIORS[word]()
    x = _encoded(family).at[..., D:].set(NARROW[word])
    z, draws, _, _ = _program(family)(x, jax.random.split(jax.random.key(0), B))
    mode = family(x).mode()
    chex.assert_shape(mode, (B, L, D))
    np.testing.assert_allclose(family.project(mode), mode, rtol=1e-6)
    if word == 'sigma_vae':
        z = z - family.sigma * draws
    np.testing.assert_allclose(z, mode, atol=0.2)  # points on the sphere are some 4 apart


@pytest.mark.parametrize('word', WORDS)
def test_statistics_of_joined_batches(word):
    """Arrays of NumPy that were joined, as an evaluation joins them, have the same statistics."""
    family = POSTERIORS[word]()
    q = family(_encoded(family))
    rows = [jax.tree.map(lambda a, i=i: np.asarray(a[i : i + 1]), q) for i in range(B)]
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
    for name, value in joined.statistics().items():
        np.testing.assert_allclose(value, q.statistics()[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('word', WORDS)
def test_draws_of_an_image_do_not_depend_on_the_batch(word):
    """The same numbers beside other images, and in a batch of another size."""
    family = POSTERIORS[word]()
    x = _encoded(family)
    keys = jax.random.split(jax.random.key(1), B)
    run = _program(family)
    z, draws, _, _ = run(x, keys)
    others = x.at[1:].multiply(30.0)
    z_beside, draws_beside, _, _ = run(others, keys)
    z_alone, draws_alone, _, _ = run(x[:1], keys[:1])
    first = jax.tree.map(lambda a: a[:1], draws)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[:1], draws_beside), first)
    chex.assert_trees_all_close(draws_alone, first, rtol=1e-5)
    np.testing.assert_array_equal(z_beside[0], z[0])
    np.testing.assert_allclose(z_alone[0], z[0], rtol=1e-4, atol=1e-5)
    # Images of the same numbers have draws of their own.
    _, twins, _, _ = run(jnp.tile(x[:1], (B, 1, 1)), keys)
    for leaf in jax.tree.leaves(twins):
        assert (leaf[0] != leaf[1]).all()


@pytest.mark.parametrize('word', WORDS)
def test_draws_do_not_depend_on_the_devices(word):
    """An image has the same draws and the same token where each device has images of its own."""
    mesh = sharding.make_mesh()
    if mesh.size == 1:
        pytest.skip('one device')
    family = POSTERIORS[word]()
    count = 2 * mesh.size
    x = _encoded(family, shape=(count, L))
    keys = jax.random.split(jax.random.key(1), count)
    expected = _program(family)(x, keys)
    place = NamedSharding(mesh, sharding.BATCH)
    found = _program(family)(*jax.device_put((x, keys), place))
    for part in jax.tree.leaves(found[:2]):
        assert len(part.sharding.device_set) == mesh.size
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('word', WORDS)
def test_gradients_are_finite_where_the_encoder_is_extreme(word):
    family = POSTERIORS[word]()

    @jax.jit
    def gradient(x):
        def loss(x):
            q = family(x)
            z = q.sample(q.draws(jax.random.split(jax.random.key(0), B)))
            return jnp.sum(jnp.sin(z)) + jnp.sum(q.kl())

        return jax.value_and_grad(loss)(x)

    for scale in (0.0, 1.0, 1e3):
        chex.assert_tree_all_finite(gradient(_encoded(family, scale)))


@pytest.mark.parametrize(
    ('word', 'projected'),
    [('gaussian', False), ('sigma_vae', False), ('power_spherical', True), ('vmf', True)],
)
def test_projection(word, projected):
    z = jnp.asarray([[3.0, 4.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]])
    found = POSTERIORS[word]().project(z)
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
    x = jnp.asarray(np.concatenate([mean, 2 * np.log(std)])[None, None], jnp.float32)
    truth = sum(_gaussian_kl(*pair) for pair in zip(mean, std, strict=True))
    np.testing.assert_allclose(Gaussian()(x).kl(), [[truth]], rtol=1e-6)
    at_prior = Gaussian()(jnp.zeros((1, 1, 2 * D)))
    np.testing.assert_array_equal(at_prior.kl(), [[0.0]])


def test_log_variances_are_clipped():
    """To [−30, 20], as LDM clips them; beyond, the gradient is 0."""
    x = jnp.asarray([[[0.0, 0.0, 0.0, -1e4, 1.0, 1e4]]])
    np.testing.assert_array_equal(Gaussian()(x).log_variance, [[[-30.0, 1.0, 20.0]]])
    slope = jax.grad(lambda x: jnp.sum(Gaussian()(x).kl()))(x)
    np.testing.assert_array_equal(np.asarray(slope[0, 0, 3:]) != 0, [False, True, False])


def test_sigma_kl_against_quadrature():
    """It is KL(N(mu, sigma²) ‖ N(0, 1)) less its value at mu = 0."""
    mu = np.array([0.5, -2.0, 3.0])
    x = jnp.asarray(mu[None, None], jnp.float32)
    for sigma in (0.5, 1.0):
        constant = mu.size * _gaussian_kl(0.0, sigma)
        whole = sum(_gaussian_kl(m, sigma) for m in mu)
        np.testing.assert_allclose(SigmaVAE(sigma)(x).kl(), [[whole - constant]], rtol=1e-6)


def test_vmf_kl_is_that_of_scipy():
    family = VonMisesFisher()
    x = _encoded(family, scale=20.0)
    q = family(x)
    kappa = np.log1p(np.exp(np.asarray(x[..., -1], np.float64))) + 1
    np.testing.assert_allclose(q.kappa, kappa, rtol=1e-6)
    surface = np.log(2) + D / 2 * np.log(np.pi) - special.gammaln(D / 2)
    pole = np.eye(1, D)[0]
    truth = [surface - stats.vonmises_fisher(pole, k).entropy() for k in kappa.ravel()]
    np.testing.assert_allclose(q.kl().ravel(), truth, rtol=1e-5, atol=5e-6)


def _repeated(family, x, n):
    """n samples of one token's distribution: x (outputs,) → z (n, d), and the program's inputs."""
    rows = jnp.tile(x[None, None], (n // 100, 100, 1))
    keys = jax.random.split(jax.random.key(2), n // 100)
    return rows, keys


@pytest.mark.parametrize('word', ['gaussian', 'sigma_vae'])
def test_moments_of_gaussian_samples(word):
    n = 20_000
    d = 3
    family = POSTERIORS[word]()
    mean = np.array([1.0, -2.0, 0.0])
    std = np.array([0.1, 1.0, 3.0]) if word == 'gaussian' else np.full(d, 0.5)
    numbers = [mean, 2 * np.log(std)] if word == 'gaussian' else [mean]
    x = jnp.asarray(np.concatenate(numbers), jnp.float32)
    z = np.asarray(_program(family)(*_repeated(family, x, n))[0], np.float64).reshape(n, d)
    error = (z - mean) / std
    np.testing.assert_array_less(np.abs(error.mean(0)), 5 / np.sqrt(n))
    covariance = error.T @ error / n  # of standard normal numbers, with errors √2/√n or 1/√n
    np.testing.assert_array_less(np.abs(covariance - np.eye(d)), 5 * np.sqrt(2 / n))
    for column in error.T:
        assert stats.kstest(column, 'norm').pvalue > 1e-4


def test_moments_of_vmf_samples():
    """Tokens have norm √d, and their mean is √d A mu with A by SciPy's Bessel functions."""
    n = 20_000
    family = VonMisesFisher()
    x = jnp.arange(1.0, D + 2)
    z = np.asarray(_program(family)(*_repeated(family, x, n))[0], np.float64).reshape(n, D)
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), np.sqrt(D), rtol=1e-5)
    kappa = np.log1p(np.exp(D + 1.0)) + 1
    mean_cosine = special.ive(D / 2, kappa) / special.ive(D / 2 - 1, kappa)
    mu = np.arange(1.0, D + 1) / np.linalg.norm(np.arange(1.0, D + 1))
    error = np.abs(z.mean(0) - np.sqrt(D) * mean_cosine * mu)
    np.testing.assert_array_less(error, 5 * z.std(0) / np.sqrt(n))


@pytest.mark.parametrize('word', WORDS)
def test_gradients_of_an_expectation(word):
    """The mean of the samples' gradients, against the gradient of the expectation.

    E ‖z − a‖² is Σ (mean − a)² + std² for the Gaussians. On the sphere it is 2R² − 2R ⟨a, E x⟩ for
    ‖a‖ = R, with E x = A(kappa) mu.
    """
    n = 20_000
    d = 3
    family = POSTERIORS[word]()
    x = jnp.asarray([0.5, -1.0, 0.3, 0.2, -0.7, 0.4][: family.outputs(d)])
    a = geometry.project(jnp.asarray([1.0, 2.0, -1.0]))

    def expectation(x):
        if word == 'gaussian':
            return jnp.sum((x[:d] - a) ** 2 + jnp.exp(x[d:]))
        if word == 'sigma_vae':
            return jnp.sum((x - a) ** 2) + d * 0.25
        kappa = jax.nn.softplus(x[-1]) + 1
        # E⟨mu, x⟩ at d = 3, in closed form
        langevin = 1 / jnp.tanh(kappa) - 1 / kappa
        mean_cosine = langevin if word == 'vmf' else kappa / (kappa + 2)
        mu = x[:d] / jnp.linalg.norm(x[:d])
        return 2 * d - 2 * jnp.sqrt(1.0 * d) * mean_cosine * jnp.sum(a * mu)

    rows, keys = _repeated(family, x, n)

    @jax.jit
    def gradients(rows, keys):
        q = family(rows)
        draws = q.draws(keys)

        def loss(rows):
            return jnp.sum((family(rows).sample(draws) - a[None, None]) ** 2)

        return jax.grad(loss)(rows)

    slopes = np.asarray(gradients(rows, keys), np.float64).reshape(n, -1)
    truth = jax.grad(expectation)(x)
    bound = 5 * slopes.std(0) / np.sqrt(n) + 1e-5
    np.testing.assert_array_less(np.abs(slopes.mean(0) - truth), bound)


def _floats(q):
    return {name: float(value) for name, value in q.statistics().items()}


def test_statistics_of_gaussian_latents():
    """Means of N(0, 0.8²) with std 0.6 make tokens like the prior's; two dimensions are dead."""
    rng = np.random.default_rng(0)
    mean = 0.8 * rng.normal(size=(40, 64, 16))
    mean[..., :2] *= 0.01
    x = jnp.asarray(np.concatenate([mean, np.full_like(mean, 2 * np.log(0.6))], -1), jnp.float32)
    scalars = _floats(Gaussian()(x))
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
    assert Gaussian().faults(well | {'std': float('nan')}) == 'the latents are no numbers'


def test_statistics_of_sigma_latents():
    """Means that spread by 1 beside sigma = 0.5 have the ratio that LatentLM's σ has."""
    mu = np.random.default_rng(0).normal(size=(40, 64, 16))
    scalars = _floats(SigmaVAE(0.5)(jnp.asarray(mu, jnp.float32)))
    np.testing.assert_allclose(scalars['sigma_to_spread'], 0.5 / mu.std((0, 1)).mean(), rtol=1e-5)
    assert scalars['dead_share'] == 0
    assert SigmaVAE().faults(scalars) is None
    small = SigmaVAE(0.5)(jnp.asarray(0.1 * mu, jnp.float32))
    assert 'sigma is 5 times the spread of the means' in SigmaVAE().faults(_floats(small))
    alike = _floats(SigmaVAE(0.5)(jnp.ones((4, 4, 16))))
    assert '100% of the dimensions are dead' in SigmaVAE().faults(alike)
    assert SigmaVAE().faults(scalars | {'kl': float('inf')}) == 'the latents are no numbers'


@pytest.mark.parametrize('sigma', [0.0, -1.0, float('nan'), float('inf')])
def test_sigma_must_be_above_zero(sigma):
    with pytest.raises(ValueError, match='sigma must be a number above 0'):
        SigmaVAE(sigma)


def test_vmf_says_what_power_spherical_says():
    """Both have a direction and a concentration, and the same statistics, faults and words."""
    x = _encoded(VonMisesFisher())
    ours = VonMisesFisher()(x)
    other = POSTERIORS['power_spherical']()
    np.testing.assert_array_equal(ours.mu, other(x).mu)
    np.testing.assert_array_equal(ours.kappa, other(x).kappa)
    scalars = _floats(ours)
    for name, value in _floats(other(x)).items():
        assert name == 'kl' or scalars[name] == value
    bad = scalars | {'kappa': 1.0, 'mean_direction': 1.0}
    assert VonMisesFisher().faults(bad) == other.faults(bad)
    assert VonMisesFisher().shown == other.shown
