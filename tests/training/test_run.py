"""Runs that are read from their workdirs."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from sphere_ar_jax.commands.inputs import origins
from sphere_ar_jax.config import checks, packaged, schema
from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import run, state, workdir
from tests.conftest import libraries_promote
from tests.tiny_config import get_config, random_arrays

HOSTILE = {
    'brackets': b'[' * 100_000,
    'braces': b'{"a":' * 100_000,
    'no text': bytes(range(256)),
    'nothing': b'',
    'half': b'{"vae": {"grid": [4,',
    'a list': b'[1, 2]',
    'a number': b'1' * 10_000,
    'not a number': b'NaN',
    'other sections': b'{"vae": 7}',
    'a flipped key': b'{"vaf": {}}',
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_config_that_is_none_is_one_line(tmp_path, name):
    (tmp_path / 'config.json').write_bytes(HOSTILE[name])
    for read in (run.load_config, lambda path: workdir.claim(get_config(), path)):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 1000


def _stage():
    """A stage whose model is two arrays, with two EMAs."""
    options = ConfigDict({'ema_decay': 0.9, 'more_ema_decays': (0.5,)})

    def init(key):
        params = {'a': jax.random.normal(key, (30, 40)), 'b': jnp.zeros(7)}
        moments = optax.adam(0.1).init(params)
        ema = state.copies(params, 2)
        return state.TrainState(jnp.int32(0), params, moments, ema)

    return state.Stage('ar', options, init, None, {}, ())


@pytest.mark.parametrize('rate', [None, 0.9, 0.5, 0.0])
def test_sampling_reads_the_chosen_parameters_and_nothing_else(tmp_path, monkeypatch, rate):
    """An EMA by its rate, the first one, or the weights themselves."""
    mesh = sharding.make_mesh()
    like = state.abstract_state(_stage(), mesh)
    arrays = random_arrays(like).replace(step=np.int32(6))
    arrays = jax.tree.map(lambda x, a: jax.device_put(a.astype(x.dtype), x.sharding), like, arrays)
    checkpoints = checkpoint.Checkpoints(tmp_path / 'ar' / 'checkpoints')
    checkpoints.save(6, arrays, {}, 1.0)
    checkpoints.close()
    read = checkpoint.Checkpoints._read
    seen = []

    def reading(self, step, like):
        found = read(self, step, like)
        seen.append(sum(a.nbytes for a in jax.tree.leaves(found[0]) if a is not ...))
        return found

    monkeypatch.setattr(checkpoint.Checkpoints, '_read', reading)
    stage = _stage()
    params = run._restore(stage, tmp_path, mesh, rate)
    first, second = arrays.ema
    expected = {None: first, 0.9: first, 0.5: second, 0.0: arrays.params}[rate]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert seen == [4 * (30 * 40 + 7) + 4]  # with the step


def _begun(directory, steps=8, **options):
    """The config of a run whose AR model has trained so many steps; the tokenizer is finished."""
    cfg = get_config()
    cfg.ar_training.update(steps=8, warmup_steps=3, **options)
    workdir.claim(cfg, directory)
    for stage, done in (('tokenizer', 6), ('ar', steps)):
        (directory / stage / 'checkpoints' / str(done)).mkdir(parents=True)
    return cfg


def _longer(cfg, **options):
    other = cfg.copy_and_resolve_references()
    other.ar_training.update({'steps': 20} | options)
    return other


@pytest.mark.parametrize(
    ('steps', 'options', 'more'),
    [
        (8, {'final_learning_rate': 1e-3}, {}),  # constant after the warm-up
        (3, {}, {}),  # at the end of the warm-up
        (8, {}, {'restarts': (8,)}),
        (5, {}, {'restarts': (8,)}),
    ],
)
def test_a_run_is_prolonged(tmp_path, capsys, steps, options, more):
    """And its rates so far are those of both configs, so that nothing that was done changes."""
    cfg = _begun(tmp_path, steps, **options)
    longer = checks.check(_longer(cfg, **more))
    workdir.claim(longer, tmp_path)
    said = capsys.readouterr().out
    assert said.startswith('ar_training: prolonged from 8 to 20 steps')
    assert ('rises and falls anew from step 8 on' in said) == bool(more)
    assert 'Heads that were distilled from it must be distilled again' in said
    assert run.load_config(tmp_path).ar_training.steps == 20
    with libraries_promote():
        before, _ = state.build_optimizer(cfg.ar_training)
        after, _ = state.build_optimizer(longer.ar_training)
        for step in range(steps):
            np.testing.assert_allclose(before(step), after(step), rtol=1e-6)
    # The next restart comes after the first one.
    if more:
        again = _longer(longer, steps=40, restarts=(8, 20))
        workdir.claim(checks.check(again), tmp_path)


def test_a_rate_that_has_begun_to_fall_is_not_stretched(tmp_path):
    """The refusal says how to restart it, and that is then accepted."""
    cfg = _begun(tmp_path, 4)
    with pytest.raises(UserError, match='steps 8 → 20') as refusal:
        workdir.claim(_longer(cfg), tmp_path)
    advice = re.search(r"add --config\.ar_training\.restarts='(.*)'$", str(refusal.value))
    assert '\n' not in str(refusal.value)
    workdir.claim(_longer(cfg, restarts=ast.literal_eval(advice[1])), tmp_path)


def test_what_is_no_prolonging_is_refused(tmp_path):
    cfg = _begun(tmp_path, 3)
    for options in ({'steps': 5}, {'restarts': (7,)}, {'steps': 8, 'restarts': (4,)}):
        with pytest.raises(UserError, match='begun with another config'):
            workdir.claim(_longer(cfg, **options), tmp_path)
    other = _longer(cfg)
    other.ar_training.copies = 3
    with pytest.raises(UserError, match=r'\(ar_training.copies 2 → 3\): to train another AR model'):
        workdir.claim(other, tmp_path)
    tokenizer = cfg.copy_and_resolve_references()
    tokenizer.tokenizer_training.update(steps=12, restarts=(6,))
    with pytest.raises(UserError, match='use another --workdir'):
        workdir.claim(tokenizer, tmp_path)
    tokenizer.tokenizer_training.restarts = ()
    with pytest.raises(UserError, match='AR model in it was trained on this tokenizer'):
        workdir.claim(tokenizer, tmp_path)
    # Weights that a run began with must not be lost by the advice.
    (tmp_path / 'ar' / 'weights').mkdir()
    for options, remedy in (
        ({'ar_training.copies': 3}, r'use another --workdir, and convert the weights into it'),
        ({'distillation_training.teacher_steps': 8, 'init_from': '/x'}, 'use another --workdir$'),
        ({'fine_tuning.init_from': '/x', 'fine_tuning.lora_rank': 4}, 'use another --workdir$'),
    ):
        other = cfg.copy_and_resolve_references()
        other.update_from_flattened_dict(options)
        with pytest.raises(UserError, match=remedy):
            workdir.check_claim(other, tmp_path)
    assert run.load_config(tmp_path).ar_training.steps == 8


def test_other_weights_of_losses_are_no_other_model():
    """They decide how a model is trained, so that a run's samples need no config with its own."""
    joint = packaged.load('composed:joint')
    weights = schema.changed(joint, {'ar.text_weight': 0.2, 'ar.alone_weight': 1.0})
    assert workdir.other_model(joint, weights) == []
    deeper = schema.changed(weights, {'ar.depth': 7})
    assert workdir.other_model(joint, deeper) == ['ar.depth 6 → 7']
    # A model that writes no texts has no parameters for them.
    assert workdir.other_model(joint, packaged.load('composed')) == [
        'ar.text_weight 0.05 → None',
        'ar.alone_weight 0.0 → 1.0',
    ]


def test_the_tokenizer_of_another_workdir_is_not_trained_here(tmp_path, capsys):
    """So how one would be trained may change, and is not said to be prolonged."""
    cfg = get_config()
    cfg.tokenizer = '/elsewhere'
    workdir.claim(cfg, tmp_path)
    cfg.tokenizer_training.update(steps=12, restarts=(6,), kl_weight=0.5)
    workdir.claim(cfg, tmp_path)
    assert capsys.readouterr().out == ''


def test_a_converted_model_keeps_its_tokenizer(tmp_path):
    """An AR model that was converted has seen no tokens but those of its own tokenizer."""
    cfg = get_config()
    workdir.claim(cfg, tmp_path)
    for stage in ('tokenizer', 'ar'):
        (tmp_path / stage / 'weights').mkdir(parents=True)
    assert workdir.check_claim(cfg, tmp_path) == []
    cfg.tokenizer = '/elsewhere'
    with pytest.raises(UserError, match='was converted with its tokenizer: leave'):
        workdir.check_claim(cfg, tmp_path)
    # A converted tokenizer alone is no such model.
    (tmp_path / 'ar' / 'weights').rmdir()
    assert workdir.check_claim(cfg, tmp_path) == []


def test_converted_weights_that_are_damaged_are_not_to_be_moved_away(tmp_path):
    """A training would begin with random ones in their place."""
    like = {'a': jax.ShapeDtypeStruct((3,), jnp.float32)}
    weights = checkpoint.Checkpoints(tmp_path / 'weights')
    weights.save(0, {'a': jnp.ones(3)}, {}, 0.0)
    weights.close()
    mesh = sharding.make_mesh()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.whole(mesh)), like
    )
    np.testing.assert_array_equal(state.converted(tmp_path, like)['a'], np.ones(3))
    for file in (tmp_path / 'weights').rglob('*'):
        if file.is_file() and 'array_metadatas' not in str(file):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r'can be read: convert the weights, .* another --workdir$'):
        state.converted(tmp_path, like)


def test_where_a_tokenizer_comes_from(tmp_path):
    """Through several workdirs to the first one. One that comes back is refused in one line."""
    for name, other in (('a', None), ('b', 'a'), ('c', 'b')):
        cfg = get_config()
        cfg.tokenizer = None if other is None else str(tmp_path / other)
        (tmp_path / name).mkdir()
        workdir.claim(cfg, tmp_path / name)
    found = [place for place, _ in run.tokenizer_chain(tmp_path / 'c')]
    assert found == [str(tmp_path / name) for name in 'cba']
    with pytest.raises(UserError, match=r'tokenizer: .*/c takes its tokenizer from this --workdir'):
        origins._check_origin('tokenizer', str(tmp_path / 'c'), str(tmp_path / 'a'))
    (tmp_path / 'a' / 'config.json').write_bytes((tmp_path / 'c' / 'config.json').read_bytes())
    with pytest.raises(UserError, match=r'/b takes its tokenizer from itself, by .*/a'):
        list(run.tokenizer_chain(tmp_path / 'b'))
