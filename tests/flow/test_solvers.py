import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.flow import solvers

# Deterministic solvers, and the bounds of the order that is seen from 256 to 512 steps. The error
# of DPM-Solver++ falls as log(n)/n², which is the order 2 − 1/log n.
DETERMINISTIC = {
    'euler': (0.9, 1.1),
    'heun': (1.8, 2.2),
    'ab2': (1.85, 2.2),
    'dpmpp_2m': (1.6, 2.1),
}
MEAN = 0.7
STD = 0.4
# A mixture of two normal distributions in one dimension: weights, means, standard deviations.
MIXTURE = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.2, 0.5])


def gaussian_velocity(x, t):
    """The exact velocity E[z − noise | x_t] for data N(MEAN, STD²): x_t has variance (1−t)² +
    t²·STD².
    """
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


@jax.jit
def mixture_velocity(x, t):
    """The same for `MIXTURE`.

    It is the mean of the components' velocities, weighted by their posterior probabilities.
    """
    parts = []
    logits = []
    for weight, mean, std in zip(*MIXTURE, strict=True):
        variance = (1 - t) ** 2 + (t * std) ** 2
        parts.append(mean + (t * std**2 - (1 - t)) / variance * (x - t * mean))
        logits.append(
            np.log(weight) - (x - t * mean) ** 2 / (2 * variance) - 0.5 * jnp.log(variance)
        )
    probabilities = jax.nn.softmax(jnp.stack(logits), axis=0)
    return jnp.sum(probabilities * jnp.stack(parts), axis=0)


def mixture_flow(x):
    """Where the mixture's flow takes x: in one dimension it keeps quantiles, by SciPy's normal
    distributions.
    """
    from scipy import optimize, stats

    weights, means, stds = MIXTURE

    def cdf(z):
        return float(np.sum(weights * stats.norm.cdf(z, means, stds)))

    return np.array(
        [optimize.brentq(lambda z, q=q: cdf(z) - q, -20, 20, xtol=1e-14) for q in stats.norm.cdf(x)]
    )


def _integrate(velocity, x, t, weights, noise=None, **options):
    def prepare(index):
        return t[jnp.minimum(index, len(t) - 1)]

    return solvers.integrate(velocity, x, weights, noise, prepare=prepare, **options)


_program = jax.jit(_integrate, static_argnums=0)


def run(velocity, x, table, noise):
    return np.asarray(_program(velocity, x, table.t, table.weights, noise))


@functools.cache
def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run64(velocity, x, table):
    """A table by the definition of `solvers`, in float64 and plain Python."""
    x = np.asarray(x, np.float64)
    memory = 0.0
    for t, w in zip(table.t.astype(np.float64), table.weights.astype(np.float64), strict=True):
        v = np.asarray(velocity(x, t), np.float64)
        x, memory = (w[row, 0] * x + w[row, 1] * memory + w[row, 2] * v for row in range(2))
    return x


@pytest.mark.parametrize('shift', [1.0, 0.5])
@pytest.mark.parametrize('solver', DETERMINISTIC)
def test_order_of_convergence(solver, shift):
    """Against flows known in closed form, halving the steps divides the error by 2 to the order's
    power.
    """
    x = np.linspace(-2, 2, 9)[:, None]
    for velocity, truth in (
        (gaussian_velocity, MEAN + STD * x),
        (mixture_velocity, mixture_flow(x.ravel())[:, None]),
    ):
        with jax.enable_x64(True):
            error = [
                np.abs(run64(velocity, x, solvers.table(solver, n, shift)) - truth).max()
                for n in (256, 512)
            ]
        low, high = DETERMINISTIC[solver]
        assert low < np.log2(error[0] / error[1]) < high, error
        assert error[1] < (1e-2 if solver == 'euler' else 3e-4)


def gaussian_flow(x, t):
    """Where the flow of `gaussian_velocity` takes x until t."""
    return t * MEAN + np.sqrt((1 - t) ** 2 + (t * STD) ** 2) * x


def test_dpm_solver_is_of_second_order_where_lambda_is_finite():
    """From t = ¼ to ¾, with a memory of the exact flow: its error is divided by 4."""
    start = np.linspace(-2, 2, 9)
    errors = []
    for n in (32, 64, 128):
        table = solvers.dpmpp_2m(solvers.grid(n))
        before = (n // 4 - 1) / n
        x = gaussian_flow(start, before)
        memory = x + (1 - before) * gaussian_velocity(x, before)
        x = gaussian_flow(start, 0.25)
        for i in range(n // 4, 3 * n // 4):
            v = np.asarray(gaussian_velocity(x, i / n), np.float64)
            x, memory = table.weights[i, :, :3].astype(np.float64) @ np.stack([x, memory, v])
        errors.append(np.abs(x - gaussian_flow(start, 0.75)).max())
    first, second = np.log2(np.divide(errors[:-1], errors[1:]))
    assert 1.98 < second < first < 2.25


def test_the_error_of_dpm_solver_falls_as_the_docstring_says():
    """log(n)/n² on the whole path, and not n⁻²: the constant of the second would grow."""
    x = np.linspace(-2, 2, 9)
    n = np.array([64, 128, 256, 512])
    with jax.enable_x64(True):
        ends = [run64(gaussian_velocity, x, solvers.table('dpmpp_2m', int(k))) for k in n]
    error = np.abs(np.stack(ends) - gaussian_flow(x, 1.0)).max(axis=1)
    constant = error * n**2 / np.log(n)
    np.testing.assert_allclose(constant[1:], constant[-1], rtol=0.1)
    assert (error * n**2)[-1] > 1.5 * (error * n**2)[0]
    np.testing.assert_allclose(error[:2] / error[1:3], [3.14, 3.35], atol=0.02)


@pytest.mark.parametrize('solver', [*DETERMINISTIC, 'euler_maruyama'])
def test_the_loop_is_the_definition(solver):
    """The compiled loop gives what the table says, whatever the chunk, the padding or the count."""
    x = np.linspace(-2, 2, 9, dtype=np.float32)[:, None]
    arguments = {'noise_scale': 0.0} if solver == 'euler_maruyama' else {}
    table, longer = (solvers.table(solver, n, 1.7, **arguments) for n in (7, 12))
    padded, counts = solvers.pad([longer, table])
    assert counts.tolist() == [len(longer.t), len(table.t)]
    chunks = (1, 3, len(table.t), 40)
    integrate = functools.partial(_integrate, gaussian_velocity, x)

    @jax.jit
    def in_chunks(t, weights):
        return [integrate(t, weights, chunk=chunk) for chunk in chunks]

    expected = run64(gaussian_velocity, x, table)
    for chunk, out in zip(chunks, in_chunks(table.t, table.weights), strict=True):
        np.testing.assert_allclose(out, expected, atol=2e-6, err_msg=f'chunks of {chunk}')

    counted = jax.jit(functools.partial(integrate, chunk=5))
    for i, truth in enumerate((run64(gaussian_velocity, x, longer), expected)):
        out = counted(padded.t[i], padded.weights[i], count=counts[i])
        np.testing.assert_allclose(out, truth, atol=2e-6)


def test_two_lines_of_dpm_solver():
    """Its second-order step against the exponential integrator of its paper, written in λ."""
    times = solvers.grid(4)
    table = solvers.dpmpp_2m(times)

    def lam(t):
        return np.log(t / (1 - t))

    x = 0.3
    before = -0.2
    v = 0.5
    s, t, u = times[1:4]  # step from t to u; s is the time before t
    h = lam(u) - lam(t)
    h_before = lam(t) - lam(s)
    data = x + (1 - t) * v
    data_2m = (1 + h / (2 * h_before)) * data - h / (2 * h_before) * before
    expected = (1 - u) / (1 - t) * x - u * np.expm1(-h) * data_2m
    np.testing.assert_allclose(table.weights[2] @ [x, before, v, 0], [expected, data], rtol=1e-6)


@pytest.mark.parametrize('noise_scale', [0.3, 1.0, 2.0])
def test_euler_maruyama_has_the_law_of_the_data(noise_scale):
    """Whatever the scale of the noise: mean and standard deviation of the stationary law, here of
    the data.
    """
    n = 40_000
    table = solvers.table('euler_maruyama', 200, noise_scale=noise_scale)
    draws = normal(0, (201, n, 1))
    x = run(gaussian_velocity, draws[0], table, draws[1:])
    assert abs(x.mean() - MEAN) < 5 * STD / np.sqrt(n) + 2e-3
    assert abs(x.std() / STD - 1) < 0.02
    start = draws[0].ravel()
    # The flow without noise keeps all of it; dx = −γx near t = 0 forgets it.
    kept = np.corrcoef(start, x.ravel())[0, 1]
    assert kept < np.exp(-0.8 * noise_scale)


@pytest.mark.parametrize('noise_scale', [0.5, 1.0, 2.0])
def test_euler_maruyama_is_of_weak_order_one(noise_scale):
    """Between normal distributions every step is affine in x: the mean and variance of its law
    follow without sampling, and their errors halve with the steps.
    """

    def moments(n):
        table = solvers.table('euler_maruyama', n, noise_scale=noise_scale, last_step=1 / n)
        mean = 0.0
        variance = 1.0
        for t, w in zip(table.t.astype(np.float64), table.weights.astype(np.float64), strict=True):
            at_zero, at_one = (float(gaussian_velocity(np.float64(x), t)) for x in (0.0, 1.0))
            slope = w[0, 0] + w[0, 2] * (at_one - at_zero)
            mean = slope * mean + w[0, 2] * at_zero
            variance = slope**2 * variance + w[0, 3] ** 2
        return np.array([mean - MEAN, variance - STD**2])

    coarse = moments(400)
    fine = moments(800)
    assert (np.abs(fine) < 5e-3).all()
    assert 0.85 < np.log2(np.linalg.norm(coarse) / np.linalg.norm(fine)) < 1.15


@pytest.mark.parametrize('shift', [1.0, 0.5])
def test_euler_maruyama_has_the_law_of_a_mixture(shift):
    """On equal and on warped grids: the largest distance to the mixture's distribution function, as
    Kolmogorov's.
    """
    from scipy import stats

    n = 20_000
    table = solvers.table('euler_maruyama', 200, shift, last_step=0.01)
    draws = normal(1, (201, n, 1))
    x = run(mixture_velocity, draws[0], table, draws[1:]).ravel()
    weights, means, stds = MIXTURE

    def cdf(z):
        return np.sum(weights * stats.norm.cdf(z[:, None], means, stds), axis=1)

    # 1% of exact samples are farther than the first term; the second one is for the step's bias.
    assert stats.kstest(x, cdf).statistic < 1.63 / np.sqrt(n) + 0.01


def test_published_euler_maruyama():
    """One noisy step and the last one against the published formulas, and the times of the
    published sampler.
    """
    table = solvers.table('euler_maruyama', 100)
    chex.assert_shape(table.weights, (101, 2, 4))
    np.testing.assert_allclose(table.t[:-1], np.arange(100) * 0.0096, atol=1e-6)
    np.testing.assert_allclose(
        [table.t[-1], table.h[-1], table.h.sum()], [0.96, 0.04, 1], rtol=1e-6
    )
    x, v, eps = (np.random.default_rng(i).normal(size=5).astype(np.float32) for i in range(3))
    t = table.t[60]
    h = table.h[60]
    score = (t * v - x) / (1 - t)  # ∇log p_t, since t(1−t) + (1−t)² = 1 − t
    drift = v + (1 - t) * score
    expected = x + drift * h + np.sqrt(2 * (1 - t) * h) * eps
    np.testing.assert_allclose(
        table.weights[60, 0] @ [x, 0 * x, v, eps], expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(table.weights[100, 0] @ [x, 0 * x, v, eps], x + 0.04 * v, rtol=1e-6)
    assert solvers.is_stochastic(table)
    assert not solvers.is_stochastic(solvers.table('heun', 3))


def test_grids():
    np.testing.assert_allclose(solvers.grid(8), np.arange(9) / 8)
    for shift in (0.5, 3.0):
        times = solvers.grid(8, shift)
        assert times[0] == 0
        assert times[-1] == 1
        assert (np.diff(times) > 0).all()
        np.testing.assert_allclose(times[4], 1 / (1 + shift))
        # This is the same warp as written for a noise level: s·σ/(1 + (s − 1)·σ).
        noise = 1 - solvers.grid(8)
        np.testing.assert_allclose(1 - times, shift * noise / (1 + (shift - 1) * noise))
    assert np.diff(solvers.grid(8, 3.0))[0] < 1 / 8 < np.diff(solvers.grid(8, 3.0))[-1]


def test_what_no_solver_has_is_refused():
    for wrong in (
        ('midpoint', 8), ('euler', 0), ('euler', 8, 0.0), ('euler', 8, -1.0), ('euler', 8, np.inf),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            solvers.table(*wrong)
    for wrong in (
        dict(solver='heun', last_step=0.1), dict(solver='euler_maruyama', last_step=1.5),
        dict(solver='euler_maruyama', noise_scale=-1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            solvers.table(num_steps=8, **wrong)
