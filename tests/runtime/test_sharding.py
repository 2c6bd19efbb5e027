"""The mesh and the rules: what is laid out how, and that results do not depend on it."""

import os
import pathlib
import re
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from sphere_ar_jax.commands import train
from sphere_ar_jax.config import build, recipes, schema
from sphere_ar_jax.models import ar, transformer
from sphere_ar_jax.runtime import console, sharding
from sphere_ar_jax.sampling import autoencoding, on_mesh
from sphere_ar_jax.training.stages import ar_stage, tokenizer_stage
from sphere_ar_jax.training.state import abstract_state
from tests import tiny_config
from tests.conftest import forced_devices, libraries_promote

ROOT = pathlib.Path(__file__).parents[2]

# Every parameter of L on a mesh where all axes divide: the layout of published checkpoints'
# training is pinned here.
LAYOUT_OF_L = {
    'cls_embedding': P(None, None, 'tensor'),
    'emb_norm/scale': P(None),
    'head/cond_embed/bias': P(None),
    'head/cond_embed/kernel': P('fsdp', None),
    'head/final_ada/bias': P(None, None),
    'head/final_ada/kernel': P('fsdp', None, None),
    'head/final_linear/bias': P(None),
    'head/final_linear/kernel': P(None, None),
    'head/input_proj/bias': P(None),
    'head/input_proj/kernel': P(None, None),
    'head/res_groups/ada/bias': P(None, None, None),
    'head/res_groups/ada/kernel': P(None, 'fsdp', None, None),
    'head/res_groups/blocks/norm/bias': P(None, None, None),
    'head/res_groups/blocks/norm/scale': P(None, None, None),
    'head/res_groups/blocks/w1/bias': P(None, None, None, 'tensor'),
    'head/res_groups/blocks/w1/kernel': P(None, None, 'fsdp', None, 'tensor'),
    'head/res_groups/blocks/w2/bias': P(None, None, None),
    'head/res_groups/blocks/w2/kernel': P(None, None, 'tensor', 'fsdp'),
    'head/time1/bias': P(None),
    'head/time1/kernel': P(None, None),
    'head/time2/bias': P(None),
    'head/time2/kernel': P('fsdp', None),
    'norm/scale': P(None),
    'pos_for_diff': P(None, None),
    'proj_in/bias': P(None),
    'proj_in/kernel': P(None, None),
    'stack/blocks/attention/out/kernel': P(None, 'tensor', None, 'fsdp'),
    'stack/blocks/attention/qkv/kernel': P(None, 'fsdp', None, 'tensor', None),
    'stack/blocks/attention_norm/scale': P(None, None),
    'stack/blocks/mlp/w1/kernel': P(None, 'fsdp', None, 'tensor'),
    'stack/blocks/mlp/w2/kernel': P(None, 'tensor', 'fsdp'),
    'stack/blocks/mlp_norm/scale': P(None, None),
}


def _named(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator='/'): x
        for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _mesh(*sizes):
    return AbstractMesh(sizes, sharding.AXES)


def test_the_layout_of_every_parameter_of_L():
    model = ar.sphere_ar(**ar.VARIANTS['L'])
    key = jax.random.key(0)
    shapes = jax.eval_shape(model.init_params, key)
    found = {
        name: s.spec for name, s in _named(sharding.tree_shardings(_mesh(2, 8, 4), shapes)).items()
    }
    assert found == LAYOUT_OF_L
    assert sharding.describe_not_split(_mesh(2, 8, 4), shapes) == ''


def test_optimizer_and_emas_lie_as_the_parameters_do():
    cfg = recipes.published_ar('L')
    shapes = jax.eval_shape(build.build_vae(cfg).init_params, jax.random.key(0))
    stage = ar_stage(build.build_ar(cfg), build.build_vae(cfg), shapes, cfg.ar_training)
    state = abstract_state(stage, _mesh(2, 8, 4))
    adam = next(
        s
        for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, 'mu'))
        if hasattr(s, 'mu')
    )
    layouts = [
        {n: x.sharding.spec for n, x in _named(tree).items()}
        for tree in (state.ema[0], adam.mu, adam.nu)
    ]
    assert layouts == [LAYOUT_OF_L] * 3


def test_parameters_apart_lie_as_stacked_ones():
    """The layout of what the sampler reads: the same rules, one dimension or two less."""
    shapes = jax.eval_shape(
        transformer.unstack,
        jax.eval_shape(ar.sphere_ar(**ar.VARIANTS['L']).init_params, jax.random.key(0)),
    )
    found = {
        name: tuple(s.spec)
        for name, s in _named(sharding.tree_shardings(_mesh(2, 8, 4), shapes)).items()
    }
    for name, spec in found.items():
        stacked = tuple(LAYOUT_OF_L[re.sub(r'(blocks|res_groups)_\d+', r'\1', name)])
        assert spec == stacked[len(stacked) - len(spec) :], name
    assert len(found) > 32 * 6


def test_what_cannot_be_split_is_whole_and_named():
    shapes = {
        'stack': {
            'attention': {'qkv': {'kernel': jax.ShapeDtypeStruct((6, 12, 3, 3, 4), np.float32)}}
        }
    }
    mesh = _mesh(1, 4, 2)
    spec = sharding.tree_shardings(mesh, shapes)['stack']['attention']['qkv']['kernel'].spec
    assert spec == P(None, 'fsdp', None, None, None)  # 3 heads on 2 devices
    said = sharding.describe_not_split(mesh, shapes)
    assert said == (
        'not split by mesh.tensor, which does not divide: 1 array(s) of 0.0 MB, '
        'as stack/attention/qkv/kernel'
    )
    assert sharding.describe_not_split(_mesh(1, 4, 3), shapes) == ''


@pytest.mark.parametrize(
    'sizes, devices, shape',
    [
        ((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 1), 8, (2, 4, 1)), ((-1, 2, 2), 8, (2, 2, 2)),
        ((1, 1, 1), 8, (1, 1, 1)), ((2, 3, 1), 8, (2, 3, 1)),
    ],
)  # fmt: skip
def test_sizes_of_a_mesh(sizes, devices, shape):
    mesh = sharding.make_mesh(*sizes, devices=[jax.devices()[0]] * devices)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == sharding.AXES


@pytest.mark.parametrize(
    'sizes, devices, message',
    [
        ((3, 1, 1), 2, 'mesh.data 3, mesh.fsdp 1, mesh.tensor 1: not possible with 2 device'),
        ((-1, 4, 1), 2, 'not possible with 2 device'),
        ((-1, 3, 1), 8, '-1 stands for all devices, but 8 are no multiple of 3'),
        ((-1, -1, 1), 4, 'one of them may be -1'),
        ((0, 1, 1), 4, 'sizes must be at least 1'),
        ((1, -2, 1), 4, 'sizes must be at least 1'),
    ],
)
def test_meshes_that_cannot_be(sizes, devices, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        sharding.make_mesh(*sizes, devices=[jax.devices()[0]] * devices)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('stage', ['tokenizer_training', 'ar_training'])
def test_batches_that_do_not_split(tmp_path, stage):
    """16 images on 2 × 2 × 3 devices, of which tensor's do not count, in pieces or not.

    3 × 2 are refused in a line.
    """
    assert sharding.misfit(_mesh(2, 2, 3), 16) == sharding.misfit(_mesh(2, 2, 3), 16, 4) == ''
    assert (
        sharding.misfit(_mesh(3, 2, 1), 16)
        == '16 images are no multiple of 6 devices (mesh.data · mesh.fsdp)'
    )
    assert sharding.misfit(_mesh(2, 2, 3), 16, 8).endswith(
        'of 4 devices (mesh.data · mesh.fsdp) times 8 pieces'
    )
    cfg = tiny_config.get_config()
    for name in 'tokenizer_training', 'ar_training':
        cfg[name].batch_size = 16 if name == stage else 6
    with pytest.raises(
        console.UserError, match=f'{stage}.batch_size: 16 images are no multiple of 6 devices'
    ):
        train._check_parts(cfg, str(tmp_path), _mesh(3, 2, 1))
    cfg[stage].batch_size = 12
    train._check_parts(cfg, str(tmp_path), _mesh(3, 2, 1))


def small_config():
    """Four heads everywhere, for a tensor axis of up to four; both trainings and the sampler in
    little time.
    """
    cfg = tiny_config.get_config()
    cfg.vae.update(heads=4)
    cfg.ar.update(heads=4, width=32, depth=2)
    return cfg


def _state(stage, shardings):
    """A state in its layout: parameters by NumPy, since compiling their initialisation takes longer
    than all else.
    """
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return jax.device_put(zeros.replace(params=tiny_config.random_arrays(shapes.params)), shardings)


# Changes of the AR model, by the word that names them.
MODELS = {
    'flow': {},
    'riemannian': {'ar.head': 'riemannian', 'sampling.solver': 'ab2', 'sampling.num_steps': 4},
    'joint': {'ar.condition': 'text', 'ar.text_tokens': 5, 'ar.text_weight': 0.2},
}


def _run(sizes, word):
    """What a mesh of `sizes` gives for the model `word`, as NumPy arrays: scalars and gradients of
    a step of each stage, and samples.
    """
    cfg = schema.changed(small_config(), MODELS[word])
    mesh = sharding.make_mesh(*sizes)
    rng = np.random.default_rng(0)
    has_texts = build.has_captions(cfg)
    batch = {
        'image': rng.uniform(-1, 1, (16, 16, 16, 1)).astype(np.float32),
        'label': rng.integers(1, 10, (16, 5) if has_texts else 16).astype(np.int32),
    }
    run = tiny_config.random_run(cfg)
    found = {}

    def place(tree):
        return jax.device_put(tree, sharding.tree_shardings(mesh, tree))

    vae_params = place(run.vae_params)
    stages = (
        ar_stage(run.ar, run.vae, vae_params, cfg.ar_training),
        tokenizer_stage(run.vae, cfg.tokenizer_training),
    )
    for stage in stages:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(stage, mesh))
        step = jax.jit(sharding.keep_rows_split(mesh, stage.step), out_shardings=(shardings, None))
        with libraries_promote():
            state, scalars = step(
                _state(stage, shardings), stage.frozen, sharding.place_batch(mesh, batch), 0
            )
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        found |= {f'{stage.name}/scalars/{name}': value for name, value in scalars.items()}
        # After one step its first moments are (1 − b1)·gradients.
        adam = next(s for s in state.opt_state[1] if hasattr(s, 'mu'))
        found |= {
            f'{stage.name}/gradients/{name}': value for name, value in _named(adam.mu).items()
        }
    model, params = ar.unstacked(run.ar, place(run.ar_params))
    labels = batch['label'] if has_texts else np.arange(16, dtype=np.int32) % 10
    arrays = labels, np.arange(16, dtype=np.int32)
    draw = on_mesh.program(model, run.vae, build.build_sampler(cfg).options, mesh)
    found['images'], drawn = draw(
        params, vae_params, *sharding.place_batch(mesh, arrays), jax.random.key(5), 1.5, 1.0
    )
    found['tokens'] = drawn.z
    key = jax.random.key(5)
    images = batch['image']
    recon, statistics = autoencoding.reconstruct(run.vae, vae_params, images, key, 16, mesh)
    found |= {'reconstructions': recon, **statistics}
    return {name: np.asarray(value) for name, value in found.items()}


_EIGHT = """
import sys
import numpy as np
from tests.runtime import test_sharding
directory, word, *names = sys.argv[1:]
for name in names:
    sizes = [int(size) for size in name.split('x')]
    np.savez(f'{directory}/{name}.npz', **test_sharding._run(sizes, word))
"""


def _eight_devices(code, *words):
    """A finished process that ran `code` on 8 forced host devices."""
    # More threads than devices: with as many as this machine has cores, collectives wait for each
    # other for ever
    env = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': forced_devices(8), 'NPROC': '16'}
    command = [sys.executable, '-c', code, *map(str, words)]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=900)
    assert process.returncode == 0, process.stderr.decode()[-2000:]
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ('word', 'meshes'),
    [('flow', ('2x4x1', '2x1x4', '2x2x2')), ('riemannian', ('2x2x2',)), ('joint', ('2x2x2',))],
)
def test_results_are_the_same_on_every_mesh(word, meshes, tmp_path):
    """Losses, gradients and samples of one device, to float32's rounding: sums run in another
    order.
    """
    _eight_devices(_EIGHT, tmp_path, word, '1x1x1', *meshes)
    one, *others = (dict(np.load(tmp_path / f'{name}.npz')) for name in ('1x1x1', *meshes))
    assert sum(np.abs(value).max() > 0 for value in one.values()) > 100
    for found in others:
        assert set(found) == set(one)
        for name, value in one.items():
            chex.assert_tree_all_finite(value)
            scale = max(float(np.abs(value).max()), 1e-6)
            chex.assert_trees_all_close(found[name] / scale, value / scale, atol=2e-5, rtol=0)


_MOVES = """
import sys
import jax, numpy as np
from sphere_ar_jax.runtime import checkpoint
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.training import stages
from sphere_ar_jax.training.state import abstract_state
from tests import tiny_config
from tests.runtime import test_sharding
cfg = test_sharding.small_config()
run = tiny_config.random_run(cfg)
stage = stages.ar_stage(run.ar, run.vae, run.vae_params, cfg.ar_training)
abstract = lambda sizes: abstract_state(stage, sharding.make_mesh(*sizes))
layout = lambda like: jax.tree.map(lambda x: x.sharding, like)
state = test_sharding._state(stage, layout(abstract((2, 4, 1))))
first = jax.tree.map(np.asarray, state)
assert max(len({str(s.index) for s in x.addressable_shards}) for x in jax.tree.leaves(state)) == 4
for step, sizes in enumerate([(2, 1, 2), (1, 1, 1), (1, 2, 4)]):  # devices: 8, 4, 1, 8
    checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=9)
    checkpoints.save(step, state, {'examples': step}, 1.0)
    checkpoints.close()
    like = abstract(sizes)
    state, data, _ = checkpoint.Checkpoints(sys.argv[1], read_only=True).restore(like)
    assert data == {'examples': step} and layout(state) == layout(like)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
print('moved')
"""


@pytest.mark.slow
def test_checkpoints_move_between_meshes(tmp_path):
    """8 → 4 → 1 → 8 devices, every array split as the new mesh says, every bit as it was."""
    process = _eight_devices(_MOVES, tmp_path / 'checkpoints')
    assert process.stdout.decode() == 'moved\n'


_FACTORS = """
import jax, jax.numpy as jnp
from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.training.tuning import lora
path = 'stack/blocks/attention/qkv/kernel'
kernel = jax.random.normal(jax.random.key(0), (3, 96, 3, 4, 24))
factors = lora.init({path: kernel}, 8, jax.random.key(1))
factors[f'{path}/{lora.B}'] = jax.random.normal(jax.random.key(2), (3, 8, 3, 4, 24))
flat = {path: kernel} | factors
for sizes in ((1, 1, 1), (1, 8, 1), (2, 1, 4)):
    mesh = sharding.make_mesh(*sizes)
    layout = sharding.tree_shardings(mesh, {'stack': {'blocks': {'attention': {'qkv': {
        'kernel': kernel}}}}})['stack']['blocks']['attention']['qkv']['kernel']
    placed = jax.device_put(flat, sharding.whole(mesh)) | {path: jax.device_put(kernel, layout)}
    found = lora.merged(placed, whole=True)
    assert found[path].sharding == layout
    print(checkpoint.digest(found))
"""


@pytest.mark.slow
def test_merged_factors_have_the_same_bits_on_every_mesh():
    """A head that is distilled from them notes these bits."""
    digests = _eight_devices(_FACTORS).stdout.decode().split()
    assert len(digests) == 3
    assert len(set(digests)) == 1


_CACHE = """
import re
import jax
from sphere_ar_jax.config import build
from sphere_ar_jax.measure import compile_ahead
from sphere_ar_jax.measure import programs
from sphere_ar_jax.runtime import sharding
from tests import tiny_config
from tests.runtime import test_sharding
cfg = test_sharding.small_config()
tokens, _ = programs.sampling_works(cfg, sharding.make_mesh(2, 2, 2))
_, text = compile_ahead.compile_work(tokens)
ar = build.build_ar(cfg)
length, dim = ar.condition.length + ar.num_tokens - 1, ar.width // ar.heads
assert jax.device_count() == 8 and build.build_sampler(cfg).options.guidance
caches = set(re.findall(rf'f32\\[(\\d+,\\d+),{length},{dim}\\]', text))
print(tokens.images, *caches)
"""


@pytest.mark.slow
def test_the_cache_is_split_by_rows_and_by_heads():
    """The compiled sampler holds no other cache than (2·B/4, N/2, S, K), guided: of data 2, fsdp 2,
    tensor 2.
    """
    images, *caches = _eight_devices(_CACHE).stdout.decode().split()
    assert caches == [f'{2 * int(images) // 4},2']
