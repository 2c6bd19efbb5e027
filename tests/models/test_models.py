import functools

import chex
import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.config import build
from sphere_ar_jax.models import ar, convolutions, transformer, vae
from sphere_ar_jax.models.backbones import convolutional
from sphere_ar_jax.models.cache import empty_caches
from sphere_ar_jax.models.heads import HEADS, flow
from sphere_ar_jax.training.state import quickly_compiled
from tests import tiny_config
from tests.conftest import compiled, libraries_promote

COUNTS = {'B': 204_499_216, 'L': 476_380_176, 'H': 943_854_096}


def _count(model):
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def _norm(tensors):
    return {
        name: np.linalg.norm(np.asarray(tensor, np.float64)) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize('variant', COUNTS)
def test_parameter_counts(variant):
    assert _count(ar.sphere_ar(**ar.VARIANTS[variant])) == COUNTS[variant]


def test_vae_parameter_count_and_shapes():
    assert _count(vae.VAE()) == 75_393_297
    assert vae.VAE().backbone.patch_size == 16
    assert vae.VAE().image_shape == (256, 256, 3)


def test_rope_table(golden):
    angles = transformer.rope_table(4, 4, 4, 32)[:-1]
    chex.assert_shape(angles, (19, 16))
    np.testing.assert_allclose(np.cos(angles), golden['freqs_cis'][..., 0], atol=1e-6)
    np.testing.assert_allclose(np.sin(angles), golden['freqs_cis'][..., 1], atol=1e-6)


@pytest.fixture(scope='module')
def encoded(golden, tiny_vae):
    """(hidden states, posterior, its KL, tokens) of the golden images, and the images' gradient of
    the sum of the first token's mu.
    """
    model, params = tiny_vae
    draws = golden['beta_draw'], golden['tangent_draw']

    @jax.jit
    def measure(images, params):
        def first(images):
            posterior = model.apply({'params': params}, images, method='encode')
            return posterior.mu[0, 0].sum(), posterior

        gradient, posterior = jax.grad(first, has_aux=True)(images)
        hidden = model.backbone.apply({'params': params}, images, method='encode')
        return (hidden, posterior, posterior.kl(), posterior.sample(draws)), gradient

    return measure(golden['images'], params)


def test_encoder_and_decoder(golden, tiny_vae, encoded):
    (hidden, posterior, kl, z), _ = encoded
    np.testing.assert_allclose(hidden, golden['enc_hidden'], rtol=1e-4, atol=1e-4)
    chex.assert_shape([posterior.mu, posterior.kappa], [(3, 16, 8), (3, 16)])
    np.testing.assert_allclose(posterior.mu, golden['mu'], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(posterior.kappa, golden['kappa'], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kl, golden['kl'], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.mean(kl), golden['kl_mean'], rtol=1e-4)
    np.testing.assert_allclose(z, golden['z'], rtol=1e-4, atol=1e-4)
    decoded = compiled(*tiny_vae, 'decode')(golden['z'])
    np.testing.assert_allclose(decoded, golden['decoded'], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def conditions(tiny_ar):
    """(class, tokens) → conditions of the golden AR model."""
    return compiled(*tiny_ar, 'conditions')


def test_ar_and_head(golden, tiny_ar, conditions):
    model, params = tiny_ar
    angles = np.arctan2(golden['freqs_cis'][..., 1], golden['freqs_cis'][..., 0])
    c = golden['ar_cond'].reshape(48, -1)

    @jax.jit
    def measure(params):
        variables = {'params': params}
        tokens = golden['z'][:, :-1]
        embedded = model.apply(variables, golden['class_id'], tokens, method='embed')
        first = jax.tree.map(lambda a: a[:1], params['stack'])
        stack = transformer.Stack(1, model.heads, True)
        block, _ = stack.apply({'params': first}, embedded, angles)
        v = model.apply(
            variables,
            golden['head_x'],
            golden['head_t'],
            c,
            method=lambda m, x, t, c: m.head.velocity(x, c, t),
        )
        return embedded, block, v

    embedded, block, v = measure(params)
    np.testing.assert_allclose(embedded, golden['ar_in'], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(block, golden['ar_block0'], rtol=1e-4, atol=1e-4)
    found = conditions(golden['class_id'], golden['z'])
    np.testing.assert_allclose(found, golden['ar_cond'], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(v, golden['head_v'], rtol=1e-4, atol=1e-4)


def test_causality_by_gradients(golden, conditions):
    """Condition k depends on every token before k, on none from k on, and on the class."""
    jacobian = jax.jit(jax.jacrev(lambda z: conditions(golden['class_id'][:1], z[None])[0].sum(-1)))
    influence = np.abs(jacobian(golden['z'][0])).sum(-1)  # (condition, token)
    chex.assert_shape(influence, (16, 16))
    seen = np.tril(np.ones((16, 16)), -1)
    np.testing.assert_array_equal(influence * (1 - seen), 0)
    assert (influence[seen == 1] > 1e-6).all()
    other = conditions((golden['class_id'] + 1) % 10, golden['z'])
    assert (np.abs(other - golden['ar_cond']).max(-1) > 1e-3).all()


def test_bidirectional_encoder_sees_everything(encoded):
    """The first token's mu has a gradient in every patch of its image."""
    _, gradient = encoded
    patches = np.abs(gradient[0]).reshape(4, 16, 4, 16, 3).sum((1, 3, 4))
    assert (patches > 0).all()


def test_cached_decoding_equals_the_full_pass(golden, tiny_ar, conditions):
    model, params = ar.unstacked(*tiny_ar)
    c, cache = compiled(model, params, 'prefill')(golden['class_id'])
    cached = [c]
    decode = compiled(model, params, 'decode_step')
    for k in range(1, 16):
        c, cache = decode(golden['z'][:, k - 1], k, cache)
        cached.append(c)
    cached = np.stack(cached, 1)
    np.testing.assert_allclose(cached, golden['ar_cond'].reshape(3, 16, -1), rtol=1e-4, atol=1e-4)
    # Behind the last token its position is clamped, so that what nobody reads is finite, too.
    chex.assert_tree_all_finite(decode(golden['z'][:, 15], 16, cache)[0])
    for full in (conditions, compiled(model, params, 'conditions')):
        found = full(golden['class_id'], golden['z'])
        np.testing.assert_allclose(cached, found, rtol=1e-5, atol=1e-5)


def _value_and_gradients(function):
    """(x, kernel, gradient of the value) → (value, gradients of x and the kernel), compiled."""

    def run(x, kernel, g):
        value, transpose = jax.vjp(function, x, kernel)
        return value, transpose(g)

    return jax.jit(run)


@pytest.mark.parametrize('k', [2, 4])
def test_conv_transpose_is_the_dilated_convolution(k):
    """Values and both gradients against the definition: a convolution over the input filled up with
    zeros.
    """
    rng = np.random.default_rng(k)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    x = draw(2, 5, 7, 3)
    kernel = draw(k, k, 3, 6)
    g = draw(2, 10, 14, 6)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            ((k // 2, k // 2),) * 2,
            lhs_dilation=(2, 2),
            dimension_numbers=convolutions.NHWC,
        )

    value, gradients = _value_and_gradients(convolutions.conv_transpose)(x, kernel, g)
    truth, true_gradients = _value_and_gradients(plain)(x, kernel, g)
    for ours, true in zip(gradients, true_gradients, strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(value, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('channels', 'stride', 'piece', 'large'),
    [(5, 1, 10**6, 1), (5, 1, 1, 1), (2, 1, 1, 1), (5, 2, 10**6, 1), (2, 2, 1, 1), (5, 1, 1, 49)],
)
def test_gradients_of_a_convolution_are_xlas(channels, stride, piece, large, monkeypatch):
    """In one piece and in many, with more channels and with fewer, and of images too small for
    pieces (fewer pixels than `large`); XLA's own gradients are the truth.
    """
    monkeypatch.setattr(convolutions, '_LARGE', large)
    monkeypatch.setattr(convolutions, '_PATCHES', piece)
    rng = np.random.default_rng(channels)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    x = draw(2, 8, 6, 3)
    kernel = draw(3, 3, 3, channels)
    g = draw(2, 8 // stride, 6 // stride, channels)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=convolutions.NHWC
        )

    def ours(x, kernel):
        return convolutions.conv3(x, kernel, stride)

    value, gradients = _value_and_gradients(ours)(x, kernel, g)
    truth, true_gradients = _value_and_gradients(plain)(x, kernel, g)
    np.testing.assert_allclose(value, truth, rtol=1e-5, atol=1e-5)
    for mine, true in zip(gradients, true_gradients, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-4)


def test_a_product_of_patches_is_a_convolution():
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.normal(size=shape).astype(np.float32) for shape in ((2, 4, 6, 3), (2, 2, 3, 5))
    )
    truth = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), 'VALID', dimension_numbers=convolutions.NHWC
    )
    found = jax.jit(convolutions.conv2)(x, kernel)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('inner', 'outer'), [((6,), (2, 5)), ((2, 3), (5,))])
def test_product_is_dot_general(inner, outer):
    """Values and gradients, as NumPy's tensordot has them."""
    rng = np.random.default_rng(0)
    x, kernel, g = (
        rng.normal(size=s).astype(np.float32)
        for s in ((4, 3, *inner), (*inner, *outer), (4, 3, *outer))
    )
    n = len(inner)
    dimensions = ((tuple(range(2, 2 + n)), tuple(range(n))), ((), ()))

    def product(x, kernel):
        return transformer.product(x, kernel, dimensions)

    y, (dx, dkernel) = _value_and_gradients(product)(x, kernel, g)
    np.testing.assert_allclose(y, np.tensordot(x, kernel, n), rtol=1e-5, atol=1e-5)
    axes = (list(range(2, g.ndim)), list(range(n, kernel.ndim)))
    np.testing.assert_allclose(dx, np.tensordot(g, kernel, axes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dkernel, np.tensordot(x, g, ([0, 1], [0, 1])), rtol=1e-5, atol=1e-5)


def test_norm_silu_is_group_norm_and_silu():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, size=(2, 4, 6, 96)).astype(np.float32)  # 24 groups of 4
    module = convolutional.NormSiLU()
    variables = {'params': {n: rng.normal(size=96).astype(np.float32) for n in ('scale', 'bias')}}
    groups = np.asarray(x, np.float64).reshape(2, 24, 24, 4)
    mean = groups.mean((1, 3), keepdims=True)
    variance = groups.var((1, 3), keepdims=True)
    normal = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    scale, bias = (np.asarray(variables['params'][n], np.float64) for n in ('scale', 'bias'))
    y = normal * scale + bias
    found = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(found, y / (1 + np.exp(-y)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_long_cache_is_read_to_where_it_is_filled():
    """Every position of a cache of many lengths gives what plain causal attention gives.

    So does a few at a time.
    """
    attention = transformer.Attention(heads=2, causal=True)
    x = jax.random.normal(jax.random.key(0), (2, 700, 16))
    angles = jax.random.uniform(jax.random.key(1), (700, 4))
    variables = attention.init(jax.random.key(2), x[:, :2], angles[:2])
    variables = jax.tree.map(lambda a: 10 * a, variables)  # attention that is not nearly uniform
    full, _ = attention.apply(variables, x, angles)
    (cache,) = empty_caches(1, 2, 700, 2, 8)
    prefill = transformer.Attention(heads=2, causal=True, prefill=True)
    _, cache = prefill.apply(variables, x[:, :60], angles[:60], cache, 0)

    @functools.partial(jax.jit, static_argnums=1)
    def feed(start, T, cache):
        def part(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, start, T, axis)

        return attention.apply(variables, part(x, 1), part(angles, 0), cache, start)

    start = 60
    for T in (*(1,) * 40, 80, 1, *(200,) * 2, 1, 118):
        out, cache = feed(start, T, cache)
        np.testing.assert_allclose(
            out, full[:, start : start + T], rtol=1e-4, atol=1e-5, err_msg=f'{T} from {start}'
        )
        start += T
    assert start == 700


def _with(model, **changes):
    """The same model with other values of dtype, remat or unroll, its parts too."""
    if isinstance(model, vae.VAE):
        of_both = {name: value for name, value in changes.items() if name == 'dtype'}
        return model.clone(backbone=model.backbone.clone(**changes), **of_both)
    return model.clone(head=model.head.clone(**changes), **changes)


@pytest.mark.slow
def test_unrolling_and_rematerialisation_change_nothing(golden, tiny_ar):
    """Same parameters, same losses and gradients, whether blocks are scanned, unrolled or
    recomputed.
    """
    small = vae.s_vae(
        grid=(2, 2),
        latent_dim=8,
        image_channels=1,
        stem=4,
        channels=(8, 16),
        heads=1,
        encoder_depth=1,
        decoder_depth=2,
    )
    small_params = tiny_config.random_params(small)
    for (model, params), run in (
        (
            tiny_ar,
            lambda m, p: m.apply(
                {'params': p},
                golden['class_id'],
                golden['z'],
                golden['z'][None],
                jnp.full((1, 3, 16), 0.4),
            ),
        ),
        (
            (small, small_params),
            lambda m, p: m.apply({'params': p}, golden['z'][:1, :4], method='decode'),
        ),
    ):

        def value(m):
            return jax.jit(jax.value_and_grad(lambda p: jnp.sum(run(m, p) ** 2)))(params)

        plain = value(model)
        shapes = jax.eval_shape(model.init_params, jax.random.key(0))
        for changed in (_with(model, unroll=2), _with(model, remat=True)):
            chex.assert_trees_all_equal_shapes(
                shapes, jax.eval_shape(changed.init_params, jax.random.key(0))
            )
            chex.assert_trees_all_close(value(changed), plain, rtol=1e-4, atol=1e-4)


def _relative_error(ours, truth):
    ours = np.asarray(ours, np.float64)
    truth = np.asarray(truth, np.float64)
    return np.sqrt(np.mean((ours - truth) ** 2) / np.mean(truth**2))


@pytest.mark.slow
@libraries_promote()
def test_bfloat16_computes_near_float32_with_float32_parameters(golden, tiny_ar, tiny_vae):
    """Within 1.5% root mean square of the goldens.

    Parameters, gradients and what the spec wants so are float32.
    """
    model, params = tiny_ar
    half = _with(model, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal_dtypes(jax.eval_shape(half.init_params, jax.random.key(0)), params)
    variables = {'params': params}
    conditions = jax.jit(
        lambda z: half.apply(variables, golden['class_id'], z, method='conditions')
    )(golden['z'])
    assert conditions.dtype == np.float32
    assert 1e-5 < _relative_error(conditions, golden['ar_cond']) < 0.015
    decoder, apart = ar.unstacked(half, params)
    _, cache = decoder.apply({'params': apart}, golden['class_id'], method='prefill')
    assert {a.dtype for a in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    cached, _ = decoder.apply({'params': apart}, golden['z'][:, 0], 1, cache, method='decode_step')
    assert _relative_error(cached, golden['ar_cond'][:, 1]) < 0.015
    arguments = golden['head_x'], golden['head_t'], golden['ar_cond'].reshape(48, -1)
    v = half.apply(variables, *arguments, method=lambda m, x, t, c: m.head.velocity(x, c, t))
    assert v.dtype == np.float32
    assert 1e-5 < _relative_error(v, golden['head_v']) < 0.02
    example = golden['class_id'], golden['z'], golden['z'][None], jnp.full((1, 3, 16), 0.4)

    def run(m):
        return jax.jit(jax.grad(lambda p: jnp.sum(m.apply({'params': p}, *example))))(params)

    gradient = run(half)
    exact = run(model)
    chex.assert_trees_all_equal_dtypes(gradient, params)
    assert _relative_error(gradient['proj_in']['kernel'], exact['proj_in']['kernel']) < 0.05

    model, params = tiny_vae
    half = _with(model, dtype=jnp.bfloat16)
    posterior = jax.jit(lambda x: half.apply({'params': params}, x, method='encode'))(
        golden['images']
    )
    assert posterior.mu.dtype == posterior.kappa.dtype == np.float32
    np.testing.assert_allclose(jnp.linalg.norm(posterior.mu, axis=-1), 1, rtol=1e-5)
    assert _relative_error(posterior.mu, golden['mu']) < 0.03
    decoded = jax.jit(lambda z: half.apply({'params': params}, z, method='decode'))(golden['z'])
    assert decoded.dtype == np.float32
    assert _relative_error(decoded, golden['decoded']) < 0.03


@libraries_promote()
def test_norms_and_rope_compute_in_float32():
    """With bfloat16 inputs: the float32 result, rounded once."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 8), jnp.bfloat16)
    angles = transformer.rope_table(1, 3, 2, 8) * 100
    rotated = transformer.apply_rope(x, angles)
    exact = transformer.apply_rope(x.astype(jnp.float32), angles).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rotated, np.float32), np.asarray(exact, np.float32))
    variables = {'params': {'scale': jnp.linspace(0.5, 2, 8)}}
    exact = transformer.RMSNorm().apply(variables, x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        np.asarray(transformer.RMSNorm(jnp.bfloat16).apply(variables, x), np.float32),
        np.asarray(exact, np.float32),
    )


def test_size_of_the_program_does_not_grow_with_depth():
    def lines(depth):
        model = ar.sphere_ar(
            depth=depth,
            heads=2,
            width=16,
            head_depth=depth,
            head_width=16,
            head_groups=2,
            grid=(2, 2),
        )
        params = jax.eval_shape(model.init_params, jax.random.key(0))
        example = (
            np.zeros(1, np.int32),
            np.zeros((1, 4, 16), np.float32),
            np.zeros((1, 1, 4, 16), np.float32),
            np.zeros((1, 1, 4), np.float32),
        )

        def loss(p):
            return jnp.sum(model.apply({'params': p}, *example))

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count('\n')

    assert lines(2) == lines(12)


def test_impossible_sizes_are_refused():
    sizes = dict(
        depth=1, heads=2, width=16, head_depth=4, head_width=16, head_groups=2, grid=(2, 2)
    )
    for wrong, message in (
        (dict(head_depth=5), '2 adaLN groups do not divide the 5 blocks'),
        (dict(heads=3), '3 heads do not divide the width 16'),
        (dict(heads=8), 'head dimension 16/8 = 2 must be a multiple of 4'),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(ar.sphere_ar(**(sizes | wrong)).init_params, jax.random.key(0))


def test_time_sinusoid():
    t = np.array([0, 0.25], np.float32)
    features = np.asarray(jax.jit(flow.time_sinusoid)(t))
    chex.assert_shape(features, (2, 256))
    np.testing.assert_array_equal(features[0], [1] * 128 + [0] * 128)
    np.testing.assert_allclose(features[1, [0, 128]], [np.cos(250), np.sin(250)], atol=1e-5)


@pytest.mark.slow
def test_initialisation():
    """The published initialisation, by the moments of what is drawn."""
    model = ar.sphere_ar(
        depth=2,
        heads=4,
        width=128,
        head_depth=4,
        head_width=128,
        head_groups=2,
        grid=(4, 4),
        num_classes=50,
    )
    params = traverse.flatten_dict(
        jax.jit(model.init_params, **quickly_compiled())(jax.random.key(0)), sep='/'
    )
    zero = {n for n, p in params.items() if not np.any(np.asarray(p))}
    biases = {n for n in params if n.endswith('bias')}
    assert zero == biases | {
        'head/res_groups/ada/kernel',
        'head/final_ada/kernel',
        'head/final_linear/kernel',
    }
    for name in (
        'stack/blocks/mlp/w1/kernel',
        'stack/blocks/attention/qkv/kernel',
        'cls_embedding',
        'pos_for_diff',
        'head/time1/kernel',
        'proj_in/kernel',
    ):
        np.testing.assert_allclose(np.std(params[name]), 0.02, rtol=0.06)
    w1 = np.asarray(params['head/res_groups/blocks/w1/kernel'])  # fused: fan_out counts both halves
    bound = np.sqrt(6 / (128 + 2 * 192))
    assert 0.97 * bound < np.abs(w1).max() <= bound
    assert not np.allclose(w1[0, 0], w1[0, 1])  # each block has its own draw
    model = vae.s_vae(
        grid=(4, 4), channels=(64, 64, 128), heads=4, encoder_depth=1, decoder_depth=1
    )
    params = traverse.flatten_dict(
        jax.jit(model.init_params, **quickly_compiled())(jax.random.key(0)), sep='/'
    )
    fan_in = {
        'encoder/down0/conv1/kernel': 64 * 9, 'decoder/up1/conv1/kernel': 64 * 16,
        'quant_proj/kernel': 128, 'quant_proj/bias': 128, 'post_quant_proj/kernel': 16,
        'encoder/output/kernel': 128,
    }  # fmt: skip
    for name, fan in fan_in.items():
        largest = np.abs(params[name]).max()
        assert 0.8 * fan**-0.5 < largest <= fan**-0.5, name
    np.testing.assert_allclose(
        np.std(params['decoder/vit/stack/blocks/mlp/w2/kernel']), 0.02, rtol=0.06
    )


@pytest.mark.parametrize(
    'name',
    [name if name == 'flow' else pytest.param(name, marks=pytest.mark.slow) for name in HEADS],
)
@libraries_promote()
def test_kernels_that_are_cast_before_a_loop_change_nothing(name):
    """In bfloat16 each head computes the same, bit for bit, from kernels that are cast already."""
    cfg = tiny_config.get_config()
    cfg.dtype = 'bfloat16'
    cfg.ar.head = name
    if name == 'direction_magnitude':
        cfg.ar.token_space = 'polar'
        cfg.vae.posterior = 'gaussian'
    model = build.build_ar(cfg).apart()
    params = tiny_config.random_params(model)
    cast = model.cast(params)
    chex.assert_trees_all_equal_shapes(cast, params)
    dtypes = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
    }
    assert dtypes["['stack']['blocks_0']['attention']['qkv']['kernel']"] == jnp.bfloat16
    assert dtypes["['head']['input_proj']['bias']"] == jnp.bfloat16
    assert dtypes["['norm']['scale']"] == dtypes["['cls_embedding']"] == jnp.float32

    shape = (1, model.num_tokens, model.latent_dim)
    z = jax.random.normal(jax.random.key(1), shape)
    rng = np.random.default_rng(2)
    draws = jax.tree.map(lambda a: rng.random(a.shape, dtype=np.float32), model.head.example(shape))

    @jax.jit
    def loss(params):
        return model.apply({'params': params}, jnp.array([1]), z, draws, method='loss')

    chex.assert_trees_all_equal(loss(cast), loss(params))
    chex.assert_tree_all_finite(loss(cast))
    # Nothing is cast where layers compute in float32.
    chex.assert_trees_all_equal_dtypes(
        build.build_ar(tiny_config.get_config()).apart().cast(params), params
    )
