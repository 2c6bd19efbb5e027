"""The kernels of `attention`: their numbers by float64 and by the plain one, and what is lowered
and compiled for whom.

The TPU's kernel runs interpreted here. No GPU's does: that cuDNN is called is all that is seen of
it.
"""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.measure import costs
from sphere_ar_jax.models import attention
from sphere_ar_jax.runtime import sharding
from tests.conftest import libraries_promote

# Largest difference from float64, as a share of the largest entry: a few roundings of 2⁻²⁴, and of
# 2⁻⁹.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2**-7}
NONE = jax.sharding.AbstractMesh((), ())


def abstract_mesh(*sizes):
    """With the axis types of `sharding.make_mesh`: what they are by default differs between JAX
    0.10 and 0.11.
    """
    return jax.sharding.AbstractMesh(
        sizes, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )


ONE = abstract_mesh(1, 1, 1)
KERNELS = {
    'plain': attention._plain,
    'splash': functools.partial(attention._splash, interpret=True),
}


def arrays(T, dtype, n=4, B=2, N=2, K=64):
    """q, k, v and a gradient, with logits of a standard deviation around 2."""
    normal = (
        np.random.default_rng(T).normal(size=(n, B, T, N, K))
        * np.array([2, 1, 1, 1])[:n, None, None, None, None]
    )
    return tuple(x.astype(dtype) for x in normal)


def float64(q, k, v, g, causal):
    """The output, and the gradients of q, k and v for the gradient g of the output, in NumPy's
    float64.
    """
    q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, g))
    T = q.shape[2]
    scale = q.shape[3] ** -0.5
    logits = q @ k.swapaxes(2, 3) * scale
    logits = np.where(np.tri(T, dtype=bool) | (not causal), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = g @ v.swapaxes(2, 3)
    d_logits = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) * scale
    out = weights @ v, d_logits @ k, d_logits.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ g
    return [x.swapaxes(1, 2) for x in out]


def distance(a, b):
    """Largest difference as a share of the largest entry."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


@libraries_promote()
def both(kernel, q, k, v, g):
    """The output and the gradients of q, k and v."""
    out, vjp = jax.vjp(kernel, q, k, v)
    return [out, *vjp(g)]


@functools.cache
def program(name, causal):
    """`both` of one of KERNELS, compiled once for all tests."""
    return jax.jit(functools.partial(both, functools.partial(KERNELS[name], causal=causal)))


# Positions in two blocks of splash attention, the second of which is filled up.
BLOCKS = 641


@pytest.mark.parametrize(
    ('T', 'B', 'dtype'),
    [(20, 2, jnp.float32), (BLOCKS, 1, jnp.float32), (BLOCKS, 1, jnp.bfloat16)],
)
@pytest.mark.parametrize('causal', [True, False])
@libraries_promote()
def test_numbers(T, B, causal, dtype):
    """The output and all gradients, plain and splash, agree with float64 and with each other."""
    inputs = arrays(T, dtype, B=B)
    truth = float64(*inputs, causal)
    found = {name: program(name, causal)(*inputs) for name in KERNELS}
    for name, results in found.items():
        for what, result, true in zip(('out', 'dq', 'dk', 'dv'), results, truth, strict=True):
            assert result.dtype == dtype
            assert distance(result, true) < TOLERANCE[dtype], (name, what)
    for splash, plain in zip(found['splash'], found['plain'], strict=True):
        assert distance(splash, plain) < TOLERANCE[dtype]


@pytest.mark.parametrize('causal', [True, False])
@libraries_promote()
def test_splash_is_causal(causal):
    """Where a position's output depends on k and v: on itself and those before it, across the
    borders of blocks.
    """
    at = 400
    last = at if causal else BLOCKS - 1
    q, k, v, g = arrays(BLOCKS, jnp.float32, B=1)
    g[:, np.arange(BLOCKS) != at] = 0
    _, _, *gradients = program('splash', causal)(q, k, v, g)
    for gradient in gradients:
        seen = np.flatnonzero(np.abs(np.asarray(gradient)).max((0, 2, 3)))
        np.testing.assert_array_equal(seen, np.arange(last + 1))


@pytest.mark.parametrize('causal', [True, False])
@libraries_promote()
def test_on_a_cpu_nothing_changes(causal):
    """In float32 the very program of `jax.nn.dot_product_attention`; in bfloat16 its numbers, bit
    for bit.
    """
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    inputs = arrays(20, jnp.float32)
    ours = functools.partial(attention.attend, causal=causal)
    assert str(jax.make_jaxpr(ours)(*inputs[:3])) == str(jax.make_jaxpr(plain)(*inputs[:3]))
    inputs = arrays(600, jnp.bfloat16, B=1)
    pair = (jax.jit(lambda *x, f=f: both(f, *x))(*inputs) for f in (ours, plain))
    for a, b in zip(*pair, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@libraries_promote()
def test_no_weights_are_kept():
    """Nothing larger than q outlives a bfloat16 call until the backward pass.

    The plain one keeps the weights.
    """
    q, k, v = arrays(600, jnp.bfloat16, 3)

    def largest(f):
        return max(
            x.size for x in jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(f, *x)[1], q, k, v))
        )

    assert largest(functools.partial(attention.attend, causal=True)) == q.size
    assert largest(functools.partial(attention._plain, causal=True)) >= 2 * 2 * 600**2


@libraries_promote()
def traced(T, dtype=jnp.bfloat16, K=64, N=4, B=2, causal=True, mesh=NONE):
    """The program of the gradients, where `mesh` is named, or none."""

    def gradients(*x):
        with jax.sharding.use_abstract_mesh(mesh):
            return both(functools.partial(attention.attend, causal=causal), *x)

    x = jax.ShapeDtypeStruct((B, T, N, K), dtype)
    return jax.jit(gradients).trace(x, x, x, x)


@libraries_promote()
def lowered(program, platform):
    """The text of a traced program, lowered for a platform."""
    return program.lower(lowering_platforms=(platform,)).as_text()


def test_tpus_get_splash_where_it_pays():
    def kernels(program):
        return lowered(program, 'tpu').count('@tpu_custom_call')

    long = traced(1039, mesh=ONE)
    # The forward kernel, and the same again with the two of the backward pass.
    assert kernels(long) == kernels(traced(512, mesh=ONE)) == 4
    for other in (
        traced(271, mesh=ONE),
        traced(511, mesh=ONE),
        traced(1039, K=32, mesh=ONE),
        traced(1039, jnp.float32, mesh=ONE),
        # two devices for three heads
        traced(1039, mesh=abstract_mesh(1, 1, 2), N=3),
        # no mesh, so that nobody knows how a program for several devices is split
        traced(1039),
    ):
        assert kernels(other) == 0
    for platform in 'cpu', 'rocm', 'cuda':
        assert 'tpu_custom_call' not in lowered(long, platform)


def test_gpus_get_cudnn_where_it_can(monkeypatch):
    def calls(program):
        return re.findall(r'@__cudnn\$(\w+)', lowered(program, 'cuda'))

    assert calls(traced(271)) == []  # there is no cuDNN on this machine
    monkeypatch.setattr(
        'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91000
    )
    long = traced(1039, mesh=ONE)
    for able in (
        traced(271),
        traced(1039),
        traced(271, mesh=ONE),
        long,
        traced(260, causal=False),
    ):
        assert set(calls(able)) == {'fmhaSoftmax', 'fmhaSoftmaxBackward'}
    for other in (
        traced(271, causal=False),
        traced(271, K=36),
        traced(271, K=136),
        traced(271, jnp.float32),
    ):
        assert calls(other) == []
    for platform in 'cpu', 'rocm', 'tpu':
        assert 'cudnn' not in lowered(long, platform)


def test_rows_and_heads_are_split_as_the_mesh_says():
    mesh = abstract_mesh(2, 4, 2)
    with jax.sharding.use_abstract_mesh(mesh):
        axes, spec = attention._automatic_split(16, 6)
        assert axes == {'data', 'fsdp', 'tensor'}
        assert spec == sharding.P(*sharding.BATCH, None, ('tensor',), None)
        assert attention._automatic_split(12, 6) is attention._automatic_split(16, 3) is None
    assert attention._automatic_split(16, 6) is None


def test_what_is_split_already_is_not_split_again():
    """Within the sampler each device has rows of its own, and heads are left to split."""
    mesh = abstract_mesh(2, 4, 2)
    seen = []

    def look(x):
        seen.append((attention._automatic_split(15, 6), attention._automatic_split(16, 3)))
        return x

    for axes in ({'data', 'fsdp'}, {'data', 'fsdp', 'tensor'}):
        rows = sharding.P(tuple(sorted(axes)))
        whole = jax.shard_map(look, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=axes)
        jax.eval_shape(whole, jax.ShapeDtypeStruct((16,), jnp.float32))
    (heads, odd), nothing_left = seen
    assert heads == (frozenset({'tensor'}), sharding.P(None, None, ('tensor',), None))
    assert odd is None
    assert nothing_left == (None, None)


@libraries_promote()
def test_operations_are_those_of_the_plain_one():
    """One platform counts: two products over all T² pairs, and in reverse the first again and four
    more.
    """
    x = jax.ShapeDtypeStruct((2, 600, 4, 64), jnp.bfloat16)
    attend = functools.partial(attention.attend, causal=True)
    pairs = 2 * 2 * 4 * 600**2 * 64
    for mesh in NONE, ONE:  # on the latter there is a TPU's kernel too
        with jax.sharding.use_abstract_mesh(mesh):
            assert costs.flops(attend, x, x, x) == 2 * pairs
            assert costs.flops(functools.partial(both, attend), x, x, x, x) == 7 * pairs


AHEAD = """
import functools, re
import flax.linen as nn, jax, jax.numpy as jnp
from jax.experimental import topologies
from sphere_ar_jax.models import attention
from sphere_ar_jax.runtime import sharding

devices = topologies.get_topology_desc(platform='tpu', topology_name='v6e:4x4').devices
mesh = sharding.make_mesh(2, 4, 2, devices)

class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (
            x * self.param(name, nn.initializers.ones, (64,), jnp.bfloat16) for name in 'qkv'
        )
        return x + attention.attend(q, k, v, CAUSAL), None

class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        blocks = nn.scan(block, variable_axes={'params': 0}, split_rngs={'params': True}, length=4)
        return blocks()(x)[0]

def loss(params, x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jnp.sum(Stack().apply({'params': params}, x).astype(jnp.float32) ** 2)

example = jnp.zeros((8, T, 2, 64), jnp.bfloat16)
params = jax.eval_shape(Stack().init, jax.random.key(0), example)['params']
on = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))
params = jax.tree.map(lambda a: on(a, sharding.P()), params)
x = on(
    jax.ShapeDtypeStruct((48, T, 6, 64), jnp.bfloat16),
    sharding.P(('data', 'fsdp'), None, 'tensor'),
)
print(jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='needs libtpu, the compiler for TPUs'
)
@pytest.mark.parametrize('causal, T', [(True, 1039), (False, 1028), (True, 271)])
def test_compiled_for_16_tpus(causal, T):
    """Scanned, rematerialised, on a mesh (2, 4, 2): each device has its 6 rows and 3 heads, nothing
    is gathered.
    """
    place = str(pathlib.Path(importlib.util.find_spec('libtpu').origin).parent.parent)
    env = os.environ | dict(
        TPU_SKIP_MDS_QUERY='1', JAX_PLATFORMS='cpu', ALLOW_MULTIPLE_LIBTPU_LOAD='1'
    )
    env['PYTHONPATH'] = f'{pathlib.Path(sharding.__file__).parent.parent}:{place}'
    code = f'CAUSAL, T = {causal}, {T}\n{AHEAD}'
    text = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True
    ).stdout
    # forward once in the scan and once, merged with the backward pass's own, in the scan of the
    # gradients
    assert text.count('"tpu_custom_call"') == (4 if T >= attention.LONG else 0)
    assert not re.search(r'\b(all-gather|all-to-all|collective-permute)', text)
    sizes = {int(n) for n in re.findall(rf'\w+\[(?:\d+,)*(\d+),{T},', text)} | {
        int(n) for n in re.findall(rf'\w+\[(\d+),(?:\d+,)*{T}[,\]]', text)
    }
    assert 6 in sizes
    assert not sizes & {48, 24, 12}
