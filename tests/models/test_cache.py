"""Both layouts of a cache give what plain attention gives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.models.cache import HeadsFirst, RowsLast, empty_caches

B, S, N, K = 3, 7, 2, 4


def _normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('layout', [HeadsFirst, RowsLast])
def test_positions_one_by_one_are_causal_attention(layout, dtype):
    """`jax.nn.dot_product_attention` is the outside truth, of the whole sequence at once."""
    q, k, v = (_normal(seed, B, S, N, K, dtype=dtype) for seed in range(3))
    (cache,) = empty_caches(1, B, S, N, K, dtype)
    if layout is RowsLast:
        cache = cache.rows_last()
        chex.assert_shape(cache, (S, K, B * N))

    @jax.jit
    def step(cache, q, k, v, start):
        cache = cache.written(k, v, start)
        return cache, cache.attended(q, start)

    outs = []
    for i in range(S):
        one = slice(i, i + 1)
        cache, out = step(cache, q[:, one], k[:, one], v[:, one], jnp.int32(i))
        outs.append(out)
        assert isinstance(cache, layout)
    found = jnp.concatenate(outs, axis=1)
    assert found.dtype == dtype
    exact = (a.astype(jnp.float32) for a in (q, k, v))
    expected = jax.nn.dot_product_attention(*exact, is_causal=True)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=tolerance)


def test_a_position_behind_the_end_takes_the_last_place_in_both_layouts():
    """The sampler also feeds the last token, for which a cache has no place."""
    (cache,) = empty_caches(1, B, S, N, K)
    filled = cache.written(_normal(0, B, S, N, K), _normal(1, B, S, N, K), 0)
    q, k, v = (_normal(seed, B, 1, N, K) for seed in (2, 3, 4))
    heads_first = filled.written(k, v, S)
    rows_last = filled.rows_last().written(k, v, S)
    chex.assert_trees_all_equal(heads_first.rows_last(), rows_last)
    np.testing.assert_allclose(heads_first.attended(q, S), rows_last.attended(q, S), atol=1e-6)
