import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.config import build
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.measure import costs, programs
from sphere_ar_jax.models import ar, convolutions, transformer
from tests import tiny_config
from tests.conftest import libraries_promote

SIZE = dict(
    depth=3,
    heads=4,
    width=64,
    head_depth=4,
    head_width=32,
    head_groups=2,
    num_classes=10,
    class_tokens=4,
)


def test_products_and_convolutions_by_hand():
    x = jnp.ones((5, 7))
    w = jnp.ones((7, 11))
    assert costs.flops(lambda x, w: x @ w, x, w) == 2 * 5 * 7 * 11
    # forward, and in the backward pass one product for each operand
    assert (
        costs.flops(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), (0, 1)), x, w)
        == 3 * 2 * 5 * 7 * 11
    )

    def repeated(x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.ones((6, 7, 7)))[0]

    assert costs.flops(jax.jit(repeated), x) == 6 * 2 * 5 * 7 * 7
    image = jnp.ones((2, 8, 8, 3))
    kernel = jnp.ones((3, 3, 3, 5))

    def conv(x, k, **kw):
        return jax.lax.conv_general_dilated(
            x, k, dimension_numbers=convolutions.NHWC, padding=((1, 1), (1, 1)), **kw
        )

    assert (
        costs.flops(lambda x, k: conv(x, k, window_strides=(2, 2)), image, kernel)
        == 2 * 2 * 4 * 4 * 9 * 3 * 5
    )

    def dilated(x, k):
        return conv(x, k, window_strides=(1, 1), lhs_dilation=(2, 2))

    assert costs.flops(dilated, image, kernel) == pytest.approx(2 * 2 * 15 * 15 * 9 * 3 * 5 / 4)

    def either(i, x, w):
        return jax.lax.switch(i, [lambda x, w: x @ w, lambda x, w: 0 * (x @ w) @ w.T @ w], x, w)

    assert costs.flops(either, 0, x, w) == 2 * 2 * 5 * 7 * 11
    with pytest.raises(ValueError, match='unknown length'):
        costs.flops(lambda n, x: jax.lax.fori_loop(0, n, lambda i, x: x @ x.T @ x, x), 3, x)


def test_a_conditional_costs_what_its_branches_cost_as_often_as_they_are_taken():
    x = jnp.ones((5, 7))
    w = jnp.ones((7, 7))
    once = 2 * 5 * 7 * 7

    def either(inside, x, w):
        return jax.lax.cond(inside, lambda: x @ w @ w @ w, lambda: x @ w)

    for taken, products in ((0, 1), (0.25, 1.5), (1, 3)):
        assert costs.flops(either, True, x, w, taken=taken) == products * once

    def one_of_three(i, x, w):
        return jax.lax.switch(i, [lambda: x @ w, lambda: x @ w @ w, lambda: x @ w @ w @ w])

    assert costs.flops(one_of_three, 0, x, w, taken=0.5) == (1.5 / 2 + 3 / 2) * once


INTERVALS = [
    # Ten Euler steps are at 0, 0.1, …, 0.9.
    (dict(guidance='constant'), 10.0),
    (dict(guidance='constant', guidance_interval=(0.0, 1.0)), 10.0),
    (dict(guidance='constant', guidance_interval=(0.2, 0.5)), 3.0),
    # Null rows of token 0 go apart where its scale is 1.
    (dict(guidance='linear', guidance_interval=(0.2, 0.5)), (10 + 3 * 3) / 4),
    (dict(guidance='linear', guidance_interval=(0.2, 0.5), first_token_apart=False), 3.0),
]


@pytest.mark.parametrize(('options', 'mean'), INTERVALS)
def test_evaluations_outside_of_the_interval_read_no_null_rows(options, mean):
    found = costs.guided_evaluations(Options(solver='euler', num_steps=10, **options), 4)
    chex.assert_shape(found, (4,))
    assert found.mean() == mean


def test_annealed_steps_are_guided_in_their_own_number():
    options = Options(
        'euler',
        8,
        guidance='constant',
        guidance_interval=(0.0, 0.5),
        final_steps=4,
        annealing='two_stage',
    )
    np.testing.assert_array_equal(costs.guided_evaluations(options, 4), [4, 4, 2, 2])


@libraries_promote()
def test_an_interval_without_an_end_costs_what_guidance_at_all_times_costs():
    cfg = tiny_config.get_config()
    ar = build.build_ar(cfg).apart()
    params = jax.eval_shape(
        lambda key: transformer.unstack(build.build_ar(cfg).init_params(key)), jax.random.key(0)
    )
    flops = [
        programs._tokens_flops(ar, params, 4, Options('euler', 10, guidance_interval=interval))
        for interval in (None, (0.0, 1.0), (0.0, 0.5))
    ]
    assert flops[0] == pytest.approx(flops[1])
    assert flops[2] < 0.9 * flops[0]


@libraries_promote()
def test_the_model_costs_what_its_matrices_cost():
    """The AR model's pass: two operations for each weight and token, and those of attention,
    counted by hand.
    """
    model = ar.sphere_ar(**SIZE, grid=(4, 4), latent_dim=8)
    params = jax.eval_shape(model.init_params, jax.random.key(0))
    z = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32)
    counted = costs.flops(
        lambda p, z: model.apply({'params': p}, jnp.zeros(2, jnp.int32), z, method='conditions'),
        params, z
    )  # fmt: skip
    S = 19
    weights = sum(np.prod(w.shape) for w in jax.tree.leaves(params['stack']) if w.ndim > 2)
    by_hand = 2 * 2 * S * weights + 2 * 2 * 15 * 8 * 64 + 3 * 2 * 2 * 2 * S * S * 64
    assert counted == by_hand


def test_tree_bytes_and_machine():
    assert (
        costs.tree_bytes({'a': jnp.zeros((3, 4)), 'b': jax.ShapeDtypeStruct((5,), jnp.bfloat16)})
        == 58
    )
    rates = costs.machine(rows=4, size=64, width=32)
    assert set(rates) == {'matrix_flops', 'matrix_flops_rows', 'bytes_per_second'}
    assert all(np.isfinite(rate) and rate > 0 for rate in rates.values())
