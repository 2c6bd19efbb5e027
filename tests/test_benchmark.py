"""The benchmark on the smallest models: that it runs, counts and reports; no time is asserted."""

import json
import os
import pathlib
import subprocess
import sys

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import get_config as digits_config
from sphere_ar_jax import benchmark
from sphere_ar_jax.config import build, checks
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.measure import compare, our_parts
from sphere_ar_jax.runtime.console import UserError
from tests.conftest import libraries_promote
from tests.tiny_config import get_config, random_params

ROOT = pathlib.Path(__file__).parent.parent


def _run(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'sphere_ar_jax.benchmark', *map(str, arguments)], cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def drawn_params(monkeypatch):
    """Parameters whose initialisation is not compiled for each part anew."""
    monkeypatch.setattr(
        our_parts,
        'random_params',
        lambda model, seed: jax.tree.map(jnp.asarray, random_params(model, seed)),
    )


@pytest.mark.slow
@libraries_promote()
def test_every_part_runs_and_is_counted():
    """Each part gives finite numbers of its shape, twice the same where nothing is trained."""
    cfg = checks.check(get_config())
    batch = 4
    d = 8
    shapes = {
        'prefill': (8, 16), 'transformer': (8, 8, 16), 'head': (8, d), 'decode': (batch, 16, 16, 1),
        'encode': (batch, 16, d), 'train_tokenizer': (1,), 'train_ar': (1,),
        'sample': (batch, 16, 16, 1), 'cold': (8, d),
    }  # fmt: skip
    assert {*shapes, 'cached'} == set(our_parts.PARTS)  # which is `cold` twice
    for name, shape in shapes.items():
        part = our_parts.Part(cfg, name, batch)
        first = part.run()
        second = part.run()
        assert first.shape == shape, name
        assert np.isfinite(first).all(), name
        assert np.isfinite(second).all(), name
        if name.startswith('train'):
            assert first != second
        elif name != 'transformer':  # whose cache goes on
            np.testing.assert_array_equal(first, second)
        assert (part.flops > 0) == (name not in ('sample', *our_parts.STARTS))


@pytest.mark.slow
@libraries_promote()
@pytest.mark.parametrize('text_weight', [None, 0.2])
def test_parts_of_models_of_texts(tmp_path, text_weight):
    """With and without guidance, as for classes."""
    cfg = get_config()
    cfg.data.name = 'composed'
    cfg.vae.channels = (4, 4, 8, 16)
    cfg.ar.update(condition='text', text_tokens=5, text_weight=text_weight)
    for guidance, scale, rows in (('constant', 2.0, 8), (None, None, 4)):
        cfg.sampling.update(guidance=guidance, guidance_scale=scale)
        checked = checks.check(cfg)
        for name, shape in (('prefill', (rows, 16)), ('transformer', (rows, 8, 16))):
            part = our_parts.Part(checked, name, 4)
            found = part.run()
            assert found.shape == shape, name
            assert np.isfinite(found).all(), name
    part = our_parts.Part(checked, 'train_ar', 4)
    assert part.run() != part.run()
    (tmp_path / 'SphereAR').mkdir()
    with pytest.raises(UserError, match=r'has the ar\.condition classes alone, not text'):
        benchmark._check_against(str(tmp_path), checked)


@pytest.mark.slow
@libraries_promote()
def test_the_head_of_geodesics_is_a_part():
    """A step along geodesics costs the products of the flow head's, and its tokens lie on R."""
    cfg = get_config()
    cfg.sampling.update(solver='ab2')
    flow = our_parts.Part(checks.check(cfg), 'head', 4)
    cfg.ar.head = 'riemannian'
    geodesic = our_parts.Part(checks.check(cfg), 'head', 4)
    tokens = np.asarray(geodesic.run())
    assert tokens.shape == (8, 8)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), np.sqrt(8), rtol=1e-5)
    np.testing.assert_allclose(geodesic.flops, flow.flops, rtol=0.05)


@pytest.mark.slow
def test_a_token_costs_what_its_matrices_cost():
    """Operations of the head's part by hand: two for every weight that x, its modulation, c or t
    meets.
    """
    part = our_parts.Part(checks.check(get_config()), 'head', 4)
    head = jax.eval_shape(part.ar.init_params, jax.random.key(0))['head']
    kernels = {
        path: leaf.size
        for path, leaf in traverse.flatten_dict(head, sep='/').items()
        if path.endswith('kernel')
    }
    met = sum(size for path, size in kernels.items() if not path.startswith(('time', 'cond_embed')))
    rows = 8
    evaluations = 3
    time = sum(size for path, size in kernels.items() if path.startswith('time'))
    assert (
        part.flops
        == 2 * rows * (evaluations * met + kernels['cond_embed/kernel']) + 2 * evaluations * time
    )
    blocks = sum(
        leaf.size for path, leaf in traverse.flatten_dict(head['res_groups']['blocks']).items()
    )
    assert part.bytes == 4 * evaluations * blocks


@pytest.mark.skipif(
    'SPHERE_AR_PUBLIC' not in os.environ,
    reason='needs SPHERE_AR_PUBLIC=CHECKOUT of the public code, and torch',
)
def test_the_public_code_gives_the_same(tmp_path):
    """What the benchmark times on both sides is the same work: equal results from equal weights and
    inputs.
    """
    cfg = checks.check(digits_config())
    weights = str(tmp_path / 'weights.npz')
    tensors = {}
    for seed, model in ((1, build.build_ar(cfg)), (2, build.build_vae(cfg))):
        tensors |= torch_names.to_torch(our_parts.random_params(model, seed))
    np.savez(weights, **tensors)
    for part in ('prefill', 'transformer', 'decode'):
        found = compare.measure(
            cfg, part, 2, ['ours', 'eager'], 1, weights, os.environ['SPHERE_AR_PUBLIC']
        )
        assert found['eager']['difference'] < 1e-5


@pytest.mark.slow
def test_the_least_time_is_that_of_the_slower_resource():
    machine = {'matrix_flops': 100.0, 'bytes_per_second': 10.0}
    assert compare.floor_seconds({'flops': 300.0, 'bytes': 20.0}, machine) == 3
    assert compare.floor_seconds({'flops': 300.0, 'bytes': 50.0}, machine) == 5


def test_the_command(tmp_path):
    """A part in a process of its own, its table and its numbers; then a wrong flag, in one line."""
    result = _run(
        '--config=tests/tiny_config.py', f'--output={tmp_path}', '--parts=head', '--batch_size=2',
        '--repeats=2'
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / 'benchmark.json').read_text())
    head = results['parts']['head']['ours']
    assert head['repeats'] == 2
    assert 0 < head['seconds'] < head['start_seconds']
    assert head['peak_bytes'] > 2**27
    assert compare.floor_seconds(head, results['parts']['head']['machine']) > 0
    table = (tmp_path / 'benchmark.md').read_text()
    assert '| head | ours |' in table
    assert table in result.stdout
    assert head['compile_seconds'] > 0
    sums = compare.sampling_seconds(
        {'prefill': 1.0, 'transformer': 0.1, 'head': 0.01, 'decode': 2.0}, 16
    )
    np.testing.assert_allclose(sums, 1 + 15 * 0.1 + 16 * 0.01 + 2)
    refused = _run('--config=tests/tiny_config.py', '--no_such_flag')
    assert refused.returncode != 0
    assert 'error: Unknown command line flag' in refused.stderr
    assert 'Traceback' not in refused.stderr


@pytest.mark.slow
def test_what_cannot_be_run_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # as the command sets it
    whole = ('--config=tests/tiny_config.py', f'--output={tmp_path}')
    for arguments, message in (
        ((), 'give --config=configs/NAME.py and --output=DIR'),
        ((*whole, '--parts=tail'), 'no part tail'),
        ((*whole, f'--against={tmp_path}'), f'{tmp_path} is no checkout'),
        (
            (*whole, '--train_batch_size=0'),
            'flag --train_batch_size=0: 0 is not a positive integer',
        ),
        (('--config=experiments/text', whole[1]), 'this is the config of an experiment: give'),
    ):
        with pytest.raises(UserError, match=f'^{message}') as refused:
            benchmark.main(['benchmark', *arguments])
        assert '\n' not in str(refused.value)
