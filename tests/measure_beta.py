"""Not a test: measures what the implicit Beta gradient costs and how much it spreads
(BUILD_NOTES.md).

python -m tests.measure_beta
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from sphere_ar_jax.sphere import power_spherical

N = 64 * 16  # the tokens of a digits batch
BETA = 7.5  # d = 16


def _milliseconds(function, *arguments):
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1000 * (time.perf_counter() - start))
    return np.median(times)


def main():
    direct = jax.jit(jax.vmap(jax.grad(lambda a, key: jax.random.beta(key, a, BETA)), (None, 0)))
    draws = jax.jit(jax.vmap(lambda a, key: jax.random.beta(key, a, BETA), (None, 0)))
    slope = jax.jit(
        jax.vmap(
            jax.grad(lambda s, a: power_spherical.implicit_beta(s, a, BETA), argnums=1), (0, None)
        )
    )
    keys = jax.random.split(jax.random.key(0), 200_000)
    print(
        'alpha   exact mean   direct mean   implicit mean   direct std   implicit std   '
        'largest relative error'
    )
    for alpha in (8.0, 20.0, 200.0, 2000.0):
        alpha32 = jnp.float32(alpha)
        s = draws(alpha32, keys)
        a = direct(alpha32, keys)
        b = slope(s, alpha32)
        u = special.betainc(alpha, BETA, np.asarray(s[:2000], np.float64))
        h = 1e-4 * alpha
        u = u[(u > 1e-3) & (u < 0.999)]
        exact = (
            special.betaincinv(alpha + h, BETA, u) - special.betaincinv(alpha - h, BETA, u)
        ) / (2 * h)
        s64 = special.betaincinv(alpha, BETA, u)
        ours = slope(jnp.asarray(s64, jnp.float32), alpha32)
        error = np.max(np.abs(ours / exact - 1))
        truth = BETA / (alpha + BETA) ** 2
        means = f'{truth:.4e}   {a.mean():.4e}    {b.mean():.4e}'
        print(f'{alpha:5.0f}   {means}      {a.std():.3e}    {b.std():.3e}      {error:.1e}')
    s = draws(jnp.float32(20.0), keys[:N])
    alpha32 = jnp.float32(20.0)
    print(f'{N} draws: drawing {_milliseconds(draws, alpha32, keys[:N]):.2f} ms, ', end='')
    print(
        f'drawing with the direct gradient {_milliseconds(direct, alpha32, keys[:N]):.2f} ms, ',
        end='',
    )
    print(f'implicit gradient of given draws {_milliseconds(slope, s, alpha32):.2f} ms')


if __name__ == '__main__':
    main()
