"""The sampler's own kernels for GPUs: interpreted, and their plain twins in the whole sampler."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.config import build, checks
from sphere_ar_jax.models import attention, transformer
from sphere_ar_jax.models.ar import unstacked
from sphere_ar_jax.models.cache import HeadsFirst
from sphere_ar_jax.models.fused import flow_head
from sphere_ar_jax.models.fused.blocks import transformer_block
from sphere_ar_jax.models.fused.cached_attention import attend_cached
from sphere_ar_jax.models.fused.products import (
    MULTIPROCESSORS,
    Modulations,
    Norm,
    added_product,
    choose_tile,
    normed_product,
)
from sphere_ar_jax.models.heads.flow import FlowHead
from sphere_ar_jax.sampling.tokens import sample_tokens
from tests import tiny_config
from tests.tiny_config import random_arrays


def _arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _close(found, expected, dtype=jnp.float32):
    chex.assert_equal_shape((found, expected))
    assert found.dtype == dtype
    assert expected.dtype == dtype
    chex.assert_tree_all_finite(found)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    largest = np.abs(np.asarray(expected, np.float32)).max()
    difference = np.asarray(found, np.float32) - np.asarray(expected, np.float32)
    np.testing.assert_allclose(difference / largest, 0, atol=tolerance)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('centred', [False, True])
def test_a_normalised_product_is_numpys(dtype, centred):
    """The kernel and its plain twin against the formula in float64, on several tiles."""
    R, D, F, Q = 32, 96, 32, 5
    x, scale, bias, kernel, b = _arrays((R, D), (D,), (D,), (D, 2, F), (2, F), dtype=dtype)
    (table,) = _arrays((3, R, Q, D), dtype=dtype)
    arguments = (x, Norm(scale, bias), Modulations(table, jnp.array([2])), kernel, b)

    wide = [np.asarray(a, np.float64) for a in (x, scale, bias, kernel, b, table[2])]
    rows, norm_scale, norm_bias, weights, shifts, modulation = wide
    rows = rows - rows.mean(-1, keepdims=True) * centred
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * norm_scale + norm_bias
    rows = rows * (1 + modulation[:, 1]) + modulation[:, 2]
    gate, up = (rows @ weights[:, i] + shifts[i] for i in range(2))
    expected = jnp.asarray(gate / (1 + np.exp(-gate)) * up, dtype)
    for interpret in (True, False):
        found = normed_product(*arguments, centred=centred, first=1, interpret=interpret)
        _close(found, expected, dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_what_a_normalised_product_can_be_without(dtype):
    """A transformer's has neither modulation nor bias, a head's last layer no learned norm.

    The table of modulations may have more rows than x.
    """
    R, D, F = 16, 32, 16
    x, scale, one, two, b = _arrays((R, D), (D,), (D, 1, F), (D, 2, F), (1, F), dtype=dtype)
    (table,) = _arrays((2, 2 * R, 2, D), dtype=dtype)
    wide = [np.asarray(a, np.float64) for a in (x, scale, one, two, b, table[1, :R])]
    rows, norm_scale, weights, pair, shift, modulation = wide
    rms = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * norm_scale
    gate, up = (rms @ pair[:, i] for i in range(2))
    centred = rows - rows.mean(-1, keepdims=True)
    centred = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    last = (centred * (1 + modulation[:, 0]) + modulation[:, 1]) @ weights[:, 0] + shift
    modulations = Modulations(table, jnp.array([1]))
    for interpret in (True, False):
        found = normed_product(x, Norm(scale), None, two, centred=False, interpret=interpret)
        _close(found, jnp.asarray(gate / (1 + np.exp(-gate)) * up, dtype), dtype)
        found = normed_product(x, Norm(), modulations, one, b, centred=True, interpret=interpret)
        _close(found, jnp.asarray(last, dtype), dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_an_added_product_is_numpys(dtype):
    R, D, F, Q = 32, 96, 64, 3
    h, kernel, bias, x = _arrays((R, D), (D, F), (F,), (R, F), dtype=dtype)
    (table,) = _arrays((2, R, Q, F), dtype=dtype)
    wide = [np.asarray(a, np.float64) for a in (h, kernel, bias, x, table[1, :, 2])]
    rows, weights, shift, start, gate = wide
    expected = jnp.asarray(start + gate * (rows @ weights + shift), dtype)
    plain_expected = jnp.asarray(rows @ weights, jnp.float32)
    modulations = Modulations(table, jnp.array([1]))
    for interpret in (True, False):
        found = added_product(
            h, kernel, bias, modulations, x, dtype=dtype, gate=2, interpret=interpret
        )
        _close(found, expected, dtype)
        found = added_product(h, kernel, dtype=jnp.float32, interpret=interpret)
        _close(found, plain_expected)


def test_tiles_divide_their_sizes_and_keep_half_the_card_busy():
    for R, D, F in ((16, 768, 1152), (128, 768, 1152), (512, 1280, 3840)):
        tile = choose_tile(R, D, F, reads=5, parts=2)
        assert R % tile.rows == D % tile.depth == F % tile.columns == 0
        if R >= 128:
            assert (R // tile.rows) * (F // tile.columns) >= MULTIPROCESSORS / 2
    assert choose_tile(24, 768, 1152, reads=5) is None
    # Where there is no tile, the plain formula runs.
    x, kernel = _arrays((24, 16), (16, 16))
    _close(added_product(x, kernel, dtype=jnp.float32), x @ kernel)


@pytest.mark.parametrize(
    ('start', 'dtype'),
    [(start, jnp.float32) for start in (0, 1, 64, 129, 130)] + [(129, jnp.bfloat16)],
)
def test_attention_to_a_cache_is_that_of_the_transformer(start, dtype):
    """The sampler also feeds the last token, for which the cache (S = 130) has no place."""
    B, N, S, K = 2, 3, 130, 16
    shapes = ((B, 3, N, K), (B, N, S, K), (B, N, S, K))
    qkv, keys, values = _arrays(*shapes, dtype=dtype)
    (angles,) = _arrays((K // 2,))
    q, k = (attention.apply_rope(qkv[:, i][:, None], angles[None]) for i in range(2))
    cache = HeadsFirst(keys, values).written(k, qkv[:, 2][:, None], start)
    expected = (cache.attended(q, start)[:, 0], *cache)
    at = jnp.int32(start)
    for interpret in (True, False):
        found = attend_cached(qkv, keys, values, angles, at, interpret=interpret)
        for one, other in zip(found, expected, strict=True):
            _close(one, other, dtype)


def test_a_fused_block_is_the_transformers():
    B, N, S, K = 4, 2, 5, 8
    x, keys, values, angles = _arrays((B, N * K), (B, N, S, K), (B, N, S, K), (1, K // 2))
    block = transformer.Block(N, causal=True)
    arguments = (x[:, None], angles, HeadsFirst(keys, values), 3)
    shapes = jax.eval_shape(block.init, jax.random.key(0), *arguments)['params']
    params = random_arrays(shapes)
    expected, cache = block.apply({'params': params}, *arguments)
    at = jnp.int32(3)
    found, own = transformer_block(params, x, angles[0], HeadsFirst(keys, values), at)
    _close(found, expected[:, 0])
    for one, other in zip(own, cache, strict=True):
        _close(one, other)


def _tiny(head, fused, **sampling):
    cfg = tiny_config.get_config()
    cfg.ar.update(head=head, fused=fused)
    if head == 'direction_magnitude':
        cfg.vae.posterior = 'gaussian'
        cfg.ar.token_space = 'polar'
    cfg.sampling.update(sampling)
    return checks.check(cfg)


GUIDED = {'guidance': 'constant', 'guidance_scale': 2.0}


@pytest.mark.parametrize(
    ('head', 'sampling'),
    [
        pytest.param('flow', {'solver': 'ab2', **GUIDED}, marks=pytest.mark.slow),
        ('flow', {'solver': 'ab2', 'guidance_interval': (0.3, 0.8), **GUIDED}),
        pytest.param('flow', {'guidance': None, 'guidance_scale': None}, marks=pytest.mark.slow),
        pytest.param(
            'mean_velocity',
            {'solver': 'euler', 'guidance': None, 'guidance_scale': None},
            marks=pytest.mark.slow,
        ),
        pytest.param('riemannian', {'solver': 'ab2', **GUIDED}, marks=pytest.mark.slow),
        pytest.param('direction_magnitude', {'solver': 'ab2', **GUIDED}, marks=pytest.mark.slow),
    ],
)
def test_the_sampler_draws_the_same_tokens(head, sampling):
    """Away from GPUs the plain twins run, which the tests above compare with the kernels."""
    drawn = []
    for fused in (False, True):
        cfg = _tiny(head, fused, num_steps=4, **sampling)
        ar = build.build_ar(cfg)
        assert ar.fused is fused
        assert ar.head.fused is fused
        ar, params = unstacked(ar, tiny_config.random_params(ar))
        options = build.build_sampler(cfg).options
        scale = cfg.sampling.guidance_scale
        keys = jax.random.split(jax.random.key(0), 3)
        drawn.append(sample_tokens(ar, params, jnp.arange(3), keys, options, scale))
    chex.assert_shape(drawn, (3, 16, 9 if head == 'direction_magnitude' else 8))
    _close(drawn[1], drawn[0])


def test_gradients_flow_through_the_kernels_plain_twins():
    """A velocity's tangents and gradients by x are those of the head's modules."""
    head = FlowHead(16, width=32, depth=2, groups=2, scan=False)
    R = 16
    x, tangent, t_emb, c_emb = _arrays((R, 16), (R, 16), (1, 32), (R, 32))

    def init(key):
        return head.init(key, x, jnp.zeros((R, 12)), jnp.zeros(R), method='velocity')['params']

    params = random_arrays(jax.eval_shape(init, jax.random.key(0)))
    variables = {'params': params}
    table = flow_head.modulation_table(flow_head.join(params), t_emb, c_emb)
    chex.assert_shape(table, (1, R, 8, 32))

    def fused(x):
        return flow_head.velocity(params, x, Modulations(table, jnp.array([0])))

    def plain(x):
        modulation = head.apply(variables, t_emb, c_emb, method='modulation')
        modulation = jax.tree.map(lambda a: a[0], modulation)
        return head.apply(variables, x, modulation, method='modulated')

    for one, other in zip(
        jax.jvp(fused, (x,), (tangent,)), jax.jvp(plain, (x,), (tangent,)), strict=True
    ):
        _close(one, other)
    gradients = [jax.grad(lambda x, f=f: jnp.sum(f(x) * tangent))(x) for f in (fused, plain)]
    _close(*gradients)
