"""Runs that go on from another run's weights, with other classes."""

import json
import time

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from sphere_ar_jax.commands import checkpoints, train
from sphere_ar_jax.commands.inputs import origins
from sphere_ar_jax.config import checks, packaged, schema
from sphere_ar_jax.data import small
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.run import load_run
from tests import tiny_config
from tests.conftest import libraries_promote

EIGHT = tuple(range(8))


def _config(**values):
    cfg = tiny_config.get_config()
    cfg.update_from_flattened_dict({name.replace('__', '.'): v for name, v in values.items()})
    return checks.check(cfg)


def _train(cfg, workdir):
    with libraries_promote():
        return train.train(cfg, str(workdir), 'the command', time.perf_counter())


@pytest.fixture(scope='module')
def eight(tmp_path_factory):
    """The workdir of a run on the digits 0 to 7."""
    workdir = tmp_path_factory.mktemp('eight') / 'w'
    _train(_config(data__classes=EIGHT), workdir)
    return workdir


@pytest.mark.slow
def test_two_classes_more(eight, tmp_path, capsys):
    """Names carry the rows over, the tokenizer is kept, and the run stands alone afterwards."""
    before = load_run(str(eight))
    cfg = _config(fine_tuning__init_from=str(eight), tokenizer_training__steps=0)
    metrics = _train(cfg, tmp_path / 'w')
    assert '8 of 10 classes keep theirs, 2 begin with the mean' in capsys.readouterr().out
    assert np.isfinite(metrics['samples/frechet'])
    after = load_run(str(tmp_path / 'w'))
    chex.assert_trees_all_equal(after.vae_params, before.vae_params)
    moved = np.abs(after.ar_params['cls_embedding'][:8] - before.ar_params['cls_embedding'][:8])
    assert after.ar_params['cls_embedding'].shape[0] == 11
    assert 0 < moved.max() < 0.02  # six steps of 1e-3
    eight.rename(eight.with_name('moved'))
    try:
        assert _train(cfg, tmp_path / 'w')['samples/frechet'] == metrics['samples/frechet']
    finally:
        eight.with_name('moved').rename(eight)
    with pytest.raises(UserError, match='is this --workdir'):
        _train(cfg, eight)
    other = _config(fine_tuning__init_from=str(eight), tokenizer_training__steps=0, seed=1)
    with pytest.raises(UserError, match='seed 0 → 1'):
        _train(other, tmp_path / 'w')


@pytest.mark.slow
def test_factors_and_a_tokenizer_that_is_trained_on(eight, tmp_path):
    """What is read, sampled and exported has the factors merged; checkpoints hold them alone."""
    workdir = tmp_path / 'w'
    cfg = _config(
        fine_tuning__init_from=str(eight),
        fine_tuning__lora_rank=2,
        fine_tuning__multipliers=('lora_b=4',),
        tokenizer_training__steps=2,
    )
    _train(cfg, workdir)
    before = load_run(str(eight))
    after = load_run(str(workdir))
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), after.vae_params, before.vae_params
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # two steps of 1e-3
    flat = flatten_dict(before.ar_params, sep='/')
    changed = {
        path
        for path, leaf in flatten_dict(after.ar_params, sep='/').items()
        if leaf.shape != flat[path].shape or not np.array_equal(leaf, flat[path])
    }
    kernels = ('attention/out/kernel', 'attention/qkv/kernel', 'mlp/w1/kernel', 'mlp/w2/kernel')
    assert changed == {'cls_embedding', *(f'stack/blocks/{kernel}' for kernel in kernels)}

    def size(place):
        return sum(f.stat().st_size for f in place.rglob('*') if f.is_file())

    assert size(workdir / 'ar/checkpoints/6') < size(eight / 'ar/checkpoints/6') / 2
    checkpoints.export_checkpoint(str(workdir), str(tmp_path / 'model.safetensors'))
    tensors = load_file(tmp_path / 'model.safetensors')
    w2 = np.asarray(after.ar_params['stack']['blocks']['mlp']['w2']['kernel'])[0]
    assert any(t.shape == w2.T.shape and np.array_equal(t, w2.T) for t in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'fine_tuning__init_from': '{eight}/none'}, 'fine_tuning.init_from: there is no run in'),
        (
            {'ar__width': 32},
            r'other models \(ar.width 16 → 32\): only the classes may differ, '
            r'give --config.ar.width=16$',
        ),
        ({'fine_tuning__freeze': ('hed',)}, "'hed' is found in no path"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(eight, tmp_path, values, message):
    given = {'fine_tuning__init_from': str(eight), 'tokenizer_training__steps': 0} | values
    given = {k: v.format(eight=eight) if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises(UserError, match=message) as refused:
        _train(_config(**given), tmp_path / 'w')
    assert '\n' not in str(refused.value)
    assert not (tmp_path / 'w' / 'config.json').exists()  # the workdir is still free


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    cfg = _config(data__classes=EIGHT)
    (tmp_path / 'begun').mkdir()
    (tmp_path / 'begun' / 'config.json').write_text(json.dumps(cfg.to_dict(), default=list))
    ours = _config(fine_tuning__init_from=str(tmp_path / 'begun'), tokenizer_training__steps=0)
    with pytest.raises(UserError, match='is not finished: run its own command to the end first'):
        _train(ours, tmp_path / 'w')


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        # The models agree, so that the next thing that is wrong is named.
        ({'ar.text_weight': 0.2, 'ar.alone_weight': 0.5}, 'has no checkpoint of the stage'),
        ({'ar.text_weight': None}, r'other models \(.*ar.text_weight 0.05 → None'),
    ],
)
def test_weights_of_a_loss_may_differ_from_those_of_the_run(tmp_path, values, message):
    cfg = packaged.load('composed:joint')
    (tmp_path / 'begun').mkdir()
    (tmp_path / 'begun' / 'config.json').write_text(json.dumps(cfg.to_dict(), default=list))
    changes = {'fine_tuning.init_from': str(tmp_path / 'begun'), 'ar.alone_weight': 1.0} | values
    changed = schema.changed(cfg, changes)
    with pytest.raises(UserError, match=message):
        origins.read_base(changed, str(tmp_path / 'w'), None, sharding.make_mesh())


def test_some_classes_of_the_digits():
    whole = small.open_data_set('digits', None, 0, 0.2)
    some = small.open_data_set('digits', None, 0, 0.2, (3, 8))
    labels = whole.train.labels
    assert len(some.train) == np.isin(labels, (3, 8)).sum()
    assert some.train.num_classes == 2
    assert some.train.class_names == ('3', '8')
    numbers = np.flatnonzero(labels == 8)
    of_eight = np.flatnonzero(some.train.labels == 1)
    chex.assert_trees_all_equal(some.train.pixels[of_eight], whole.train.pixels[numbers])
    record = some.train[int(of_eight[0])]
    np.testing.assert_array_equal(record['image'], whole.train[int(numbers[0])]['image'])
    assert record['label'] == 1
    assert record['label'].dtype == np.int32
    with pytest.raises(UserError, match=r'data\.classes has 10'):
        small.open_data_set('digits', None, 0, 0.2, (3, 10))
    for wrong in ((3, 3), (8, 3), (-1,), (0.5,)):
        with pytest.raises(UserError, match='ascending whole numbers'):
            _config(data__classes=wrong)
