"""Derivatives of the models and of their quick kernels, forward and in reverse.

Tangents are held to differences of values, and gradients to tangents: ⟨u, J·v⟩ = ⟨Jᵀ·u, v⟩. Values
and derivatives by quick kernels are held to those by plain ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sphere_ar_jax.models import ar, attention, convolutions, kernels, transformer, vae
from sphere_ar_jax.models.conditions import Classes
from sphere_ar_jax.models.heads import MeanVelocity
from tests.conftest import libraries_promote

STENCIL = np.array([-2, -1, 1, 2], np.float32)
WEIGHTS = np.array([1, -8, 8, -1]) / 12  # of the values there: a derivative to fourth order

VAE = vae.s_vae(
    grid=(2, 2),
    latent_dim=4,
    image_channels=1,
    stem=4,
    channels=(4, 8),
    encoder_depth=1,
    decoder_depth=1,
    heads=1,
)
AR = ar.AR(
    depth=2,
    heads=2,
    width=16,
    condition=Classes(num_classes=3, length=2, width=16),
    head=MeanVelocity(latent_dim=4, width=16, depth=2, groups=1, remat=True),
    grid=(2, 2),
    latent_dim=4,
    remat=True,
)


def draw(tree, seed=0, scale=1.0):
    """Normal numbers in the shapes and dtypes of a tree of arrays, abstract or not."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: (scale * rng.normal(size=a.shape)).astype(a.dtype), tree)


def normal(*shape, seed=0):
    return draw(jax.ShapeDtypeStruct(shape, jnp.float32), seed)


def parameters(model):
    """Parameters none of which is zero."""
    return draw(jax.eval_shape(model.init_params, jax.random.key(0)), 7, 0.3)


def inner(a, b):
    """⟨a, b⟩ of two trees, in float64."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.vdot(np.asarray(x, float), np.asarray(y, float)) for x, y in pairs)


def assert_close(a, b, tolerance):
    """Hold the distance of two trees of arrays to a share of the norm of b."""
    distance = jax.tree.map(lambda x, y: np.asarray(x, float) - np.asarray(y, float), a, b)
    assert inner(b, b) > 0
    assert inner(distance, distance) ** 0.5 < tolerance * inner(b, b) ** 0.5


def directions(function, arguments):
    """A tangent of the arguments and a cotangent of the value."""
    return draw(arguments, 1), draw(jax.eval_shape(function, *arguments), 2)


def derivatives(function, arguments, tangents, cotangent):
    """Value, tangent and gradients."""
    value, tangent = jax.jvp(function, arguments, tangents)
    _, pull = jax.vjp(function, *arguments)
    return value, tangent, pull(cotangent)


def check_forward(function, arguments, step, tolerance):
    """Tangents against differences of values and against gradients; returns all derivatives."""
    tangents, cotangent = directions(function, arguments)

    @jax.jit
    def measure(arguments, tangents, cotangent):
        def along(h):
            moved = jax.tree.map(lambda a, t: a + h * t, arguments, tangents)
            return function(*moved)

        values = jax.lax.map(along, STENCIL * np.float32(step))
        return derivatives(function, arguments, tangents, cotangent), values

    found, values = measure(arguments, tangents, cotangent)
    _, tangent, gradients = found
    difference = jax.tree.map(lambda v: np.tensordot(WEIGHTS / step, np.asarray(v), 1), values)
    assert_close(tangent, difference, tolerance)
    check_transposed(tangent, gradients, tangents, cotangent, 1e-5)
    return found


def check_transposed(tangent, gradients, tangents, cotangent, tolerance):
    """⟨u, J·v⟩ = ⟨Jᵀ·u, v⟩."""
    size = (inner(cotangent, cotangent) * inner(tangent, tangent)) ** 0.5
    assert size > 0
    assert abs(inner(cotangent, tangent) - inner(gradients, tangents)) < tolerance * size


def check_twins(function, arguments, tolerance, found=None):
    """Value, tangent and gradients by quick kernels, if not found yet, against plain ones."""
    tangents, cotangent = directions(function, arguments)

    measure = jax.jit(functools.partial(derivatives, function))
    if found is None:
        found = measure(arguments, tangents, cotangent)
    with kernels.plain():
        plain = measure(arguments, tangents, cotangent)
    for a, b in zip(found, plain, strict=True):
        assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
        assert_close(a, b, tolerance)


def test_the_door():
    """Values by `forward`, gradients by `backward`, all else by `plain`; within `plain()` all."""
    function = kernels.fast(
        plain=lambda x, y: x * y,
        backward=lambda arrays, g: (2 * g, arrays[0] + 3 * g),
        forward=lambda x, y: x + y,
    )
    x = np.float32(5)
    y = np.float32(7)
    assert function(x, y) == 12

    @jax.jit
    def all_derivatives(x, y):
        gradients = jax.grad(function, (0, 1))
        second = jax.jacfwd(gradients, (0, 1))
        only_y = jax.grad(function, 1)
        return gradients(x, y), only_y(x, y), jax.jvp(function, (x, y), (x, y)), second(x, y)

    assert all_derivatives(x, y) == ((2, 8), 8, (12, 70), ((0, 1), (1, 0)))
    compiled = jax.jit(function)
    assert compiled(x, y) == 12
    with kernels.plain():
        assert function(x, y) == compiled(x, y) == 35
        assert jax.grad(function, (0, 1))(x, y) == (7, 5)
    assert compiled(x, y) == 12


@pytest.fixture
def in_pieces(monkeypatch):
    """Gradients of kernels as products with patches, in several pieces, for images of any size."""
    monkeypatch.setattr(convolutions, '_LARGE', 1)
    monkeypatch.setattr(convolutions, '_PATCHES', 2000)


def product(n):
    """`transformer.product` over the last n axes of x."""

    def function(x, kernel):
        axes = tuple(range(x.ndim - n, x.ndim))
        return transformer.product(x, kernel, ((axes, tuple(range(n))), ((), ())))

    return function


STRIDED = functools.partial(convolutions.conv3, stride=2)
BILINEAR = {
    'conv3': (convolutions.conv3, (2, 8, 6, 3), (3, 3, 3, 5)),
    'conv3 to fewer channels': (convolutions.conv3, (1, 4, 4, 6), (3, 3, 6, 2)),
    'conv3 of stride 2': (STRIDED, (2, 8, 6, 3), (3, 3, 3, 5)),
    'conv3 of stride 2 from 1': (STRIDED, (3, 4, 4, 1), (3, 3, 1, 4)),
    'conv_transpose 2': (convolutions.conv_transpose, (2, 5, 7, 3), (2, 2, 3, 6)),
    'conv_transpose 4': (convolutions.conv_transpose, (2, 5, 7, 3), (4, 4, 3, 6)),
    'conv_transpose 4 to 1': (convolutions.conv_transpose, (1, 2, 2, 4), (4, 4, 4, 1)),
    'product': (product(1), (4, 3, 6), (6, 2, 5)),
    'product of two axes': (product(2), (4, 3, 2, 5), (2, 5, 7)),
}


@pytest.mark.usefixtures('in_pieces')
@pytest.mark.parametrize('name', BILINEAR)
def test_kernels(name):
    """Their values are bilinear, so that differences have no error but rounding."""
    function, x, kernel = BILINEAR[name]
    arguments = normal(*x), normal(*kernel, seed=3)
    found = check_forward(function, arguments, 0.5, 1e-5)
    check_twins(function, arguments, 1e-5, found)


@pytest.mark.parametrize('causal', [True, False])
@libraries_promote()
def test_attention_in_half_precision(causal):
    """Tangents are those of float32, to bfloat16's rounding, and gradients fit them."""

    def attend(q, k, v):
        return attention.attend(q, k, v, causal)

    exact = tuple(normal(2, 6, 2, 8, seed=seed) for seed in range(3))
    half = tuple(x.astype(jnp.bfloat16) for x in exact)
    exact = tuple(x.astype(jnp.float32) for x in half)
    tangents, cotangent = directions(attend, half)
    run = jax.jit(derivatives, static_argnums=0)
    found = run(attend, half, tangents, cotangent)
    _, tangent, gradients = found
    assert tangent.dtype == jnp.bfloat16
    wide = tuple(t.astype(jnp.float32) for t in tangents)
    _, truth = jax.jit(lambda x, t: jax.jvp(attend, x, t))(exact, wide)
    assert_close(tangent, truth, 2**-7)
    check_transposed(tangent, gradients, tangents, cotangent, 2**-7)
    check_twins(attend, half, 2**-7, found)


@libraries_promote()
def test_forward_mode_runs_the_platforms_attention_for_the_value_alone():
    """TPUs: one kernel for the value, none for its tangent."""
    axes = ('data', 'fsdp', 'tensor')
    mesh = jax.sharding.AbstractMesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def tangent(*x):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.jvp(functools.partial(attention.attend, causal=True), x, x)

    x = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
    text = jax.jit(tangent).trace(x, x, x).lower(lowering_platforms=('tpu',)).as_text()
    assert text.count('@tpu_custom_call') == 1


@jax.jit
def encode(params, images):
    posterior = VAE.apply({'params': params}, images, method='encode')
    return posterior.mu, jnp.log(posterior.kappa)


@jax.jit
def decode(params, z):
    return VAE.apply({'params': params}, z, method='decode')


@jax.jit
def condition(params, z):
    return AR.apply({'params': params}, jnp.array([2, 0]), z, method='conditions')


@jax.jit
def velocity(params, x, t, h, c):
    """The head's velocity at t and h in thousandths, by which the embeddings of time turn by one
    radian.
    """
    return AR.head.apply({'params': params['head']}, x, c, t / 1000, h / 1000, method='velocity')


IMAGES = 0.5 * normal(2, *VAE.image_shape)
TOKENS = normal(2, 4, 4)
TIME = np.array([2, 3, 7], np.float32)
MODELS = {
    'encode': (encode, VAE, (IMAGES,)),
    'decode': (decode, VAE, (TOKENS,)),
    'condition': (condition, AR, (TOKENS,)),
    'velocity': (velocity, AR, (normal(3, 4), TIME, TIME / 10, normal(3, 16))),
}


@pytest.mark.usefixtures('in_pieces')
@pytest.mark.parametrize(
    'name',
    [pytest.param(name, marks=() if name == 'velocity' else pytest.mark.slow) for name in MODELS],
)
def test_models(name):
    """In parameters and inputs, through scans and recomputed blocks."""
    function, model, inputs = MODELS[name]
    arguments = parameters(model), *inputs
    found = check_forward(function, arguments, 3e-3, 1e-3)
    check_twins(function, arguments, 1e-4, found)


@pytest.mark.usefixtures('in_pieces')
def test_tokens_drawn_by_the_posterior():
    """Gradients fit tangents through the implicit derivative of the Beta draw too."""
    draws = jnp.full((2, 4), 0.9), normal(2, 4, 3, seed=4)

    def sample(params, images):
        return VAE.apply({'params': params}, images, method='encode').sample(draws)

    arguments = parameters(VAE), IMAGES
    tangents, cotangent = directions(sample, arguments)
    run = jax.jit(derivatives, static_argnums=0)
    _, tangent, gradients = run(sample, arguments, tangents, cotangent)
    check_transposed(tangent, gradients, tangents, cotangent, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures('in_pieces')
def test_jacobians():
    """Forward mode and reverse mode, under `vmap`, give one Jacobian of the decoder."""

    @jax.jit
    def both(params, z):
        return jax.jacfwd(decode, 1)(params, z), jax.jacrev(decode, 1)(params, z)

    forward, reverse = both(parameters(VAE), TOKENS[:1])
    assert forward.shape == (1, *VAE.image_shape, 1, 4, 4)
    assert_close(forward, reverse, 1e-5)


@pytest.mark.slow
def test_a_loss_of_tangents():
    """A loss of a velocity's derivative, as those of mean velocities are, has gradients."""
    _, model, inputs = MODELS['velocity']

    def loss(params):
        value, tangent = jax.jvp(functools.partial(velocity, params), inputs, inputs)
        return jnp.sum(jnp.square(value + tangent))

    check_forward(loss, (parameters(model),), 1e-3, 1e-2)


def mapped(x, kernel):
    kernels = jnp.stack([kernel, 2 * kernel], axis=3)
    return jax.vmap(convolutions.conv3, (None, 3))(x, kernels)


def scanned(x, kernel):
    def body(x, _):
        return jnp.tanh(convolutions.conv3(x, kernel)), x

    return jax.lax.scan(body, x, length=3)


def on_a_mesh(x, kernel):
    rows = PartitionSpec('data')
    whole = PartitionSpec()
    mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    options = dict(mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=False)
    return jax.shard_map(convolutions.conv3, **options)(x, kernel)


TRANSFORMED = {
    'jit': jax.jit(convolutions.conv3),
    'checkpoint': jax.checkpoint(convolutions.conv3),
    'vmap': mapped,
    'scan': scanned,
    'shard_map': on_a_mesh,
}


@pytest.mark.usefixtures('in_pieces')
@pytest.mark.parametrize('name', TRANSFORMED)
def test_transformations(name):
    """Derivatives of transformed convolutions, and derivatives of their gradients."""
    function = TRANSFORMED[name]
    arguments = normal(2, 4, 4, 3), normal(3, 3, 3, 3, seed=3)

    def gradients(x, kernel):
        def loss(x, kernel):
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(function(x, kernel)))

        return jax.grad(loss, (0, 1))(x, kernel)

    check_twins(function, arguments, 1e-5)
    check_twins(gradients, arguments, 1e-4)
