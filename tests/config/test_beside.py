"""Which values of a config that is given beside a trained run count."""

import pytest

from sphere_ar_jax.config import beside, packaged, schema
from sphere_ar_jax.data.captions import vocabulary
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError

MOVED = {'data.path': '/new', 'data.captions': '/new/texts.tsv', 'data.data_dir': '/sets'}


def _config(**values):
    return schema.changed(packaged.load('digits'), values)


def test_what_computes_a_run_is_taken_and_the_model_stays():
    own = _config()
    other = {'sampling.num_steps': 7, 'mesh.tensor': 2, 'seed': 5, 'dtype': 'bfloat16'}
    like = _config(
        **other, **{'ar.fused': True, 'ar.width': 8, 'vae.heads': 1, 'data.holdout': 0.5}
    )
    found = beside.for_the_model(own, like)
    expected = schema.changed(own, other | {'ar.fused': True})
    assert found.to_json_best_effort() == expected.to_json_best_effort()


def test_the_vocabulary_that_a_run_keeps_stands_in_for_a_file_that_is_gone(tmp_path):
    words = tmp_path / 'words.txt'
    words.write_text('left\nright\n')
    workdir = tmp_path / 'run'
    workdir.mkdir()
    vocabulary.keep(str(words), str(workdir))
    cfg = _config(**{'ar.condition': 'text', 'ar.vocabulary': str(words)})
    assert beside.with_kept_vocabulary(cfg, str(workdir)) is cfg
    words.unlink()
    found = beside.with_kept_vocabulary(cfg, str(workdir))
    assert found.ar.vocabulary == str(workdir / 'vocabulary.txt')
    # A workdir that keeps none leaves the path for the message of the checks.
    missing = beside.with_kept_vocabulary(cfg, str(tmp_path / 'other'))
    assert missing.ar.vocabulary == str(words)


def test_files_that_have_moved_are_taken_from_the_root():
    own = _config(**{'tokenizer': '/old', 'ar.features': '/old.npz'})
    kept = beside.for_the_model(own, _config())
    assert (kept.tokenizer, kept.ar.features) == ('/old', '/old.npz')
    moved = beside.for_the_model(
        own, _config(**{'tokenizer': 'new', 'ar.features': 'gs://b/f.npz'})
    )
    assert (moved.tokenizer, moved.ar.features) == (files.absolute('new'), 'gs://b/f.npz')


def test_the_teacher_of_a_distilled_run_may_have_moved():
    like = _config(init_from='new')
    assert beside.for_the_model(_config(init_from='/old'), like).init_from == files.absolute('new')
    assert beside.for_the_model(_config(init_from='/old'), _config()).init_from == '/old'
    assert beside.for_the_model(_config(), like).init_from is None


def test_the_images_of_a_run_may_have_moved():
    own = _config()
    found = beside.for_the_images(own, _config(**MOVED, **{'data.holdout': 0.5, 'seed': 5}))
    assert found.to_json_best_effort() == schema.changed(own, MOVED).to_json_best_effort()


def test_images_of_another_kind_are_no_images_of_the_run():
    own = _config()
    other = _config(**MOVED, **{'data.name': 'idx'})
    with pytest.raises(UserError, match='was trained on data digits, but --config names data idx'):
        beside.for_the_images(own, other)
    nowhere = schema.changed(other, {'data.path': None})
    assert beside.for_the_images(own, nowhere) is own


def test_their_judge_is_trained_as_the_command_says_for_images_of_the_run_alone():
    own = _config()
    steps = {'data.classifier_steps': 7}
    assert beside.for_the_images(own, _config(**steps)).data.classifier_steps == 7
    assert beside.for_the_images(own, _config(**steps, **{'data.name': 'idx'})) is own
    assert beside.for_the_images(own, None) is own


def test_a_config_file_names_no_images_of_a_run():
    """Those that it names by itself need not be the run's. Those of the command line are."""
    own = _config()
    file = _config(**MOVED)
    places = beside.without_other_images(file, own, (), False).data
    assert (places.path, places.captions, places.data_dir) == (None, None, None)
    places = beside.without_other_images(file, own, ('data.path',), False).data
    assert (places.path, places.captions, places.data_dir) == ('/new', None, None)
    assert beside.without_other_images(file, None, (), True) is file


def test_an_override_of_the_images_that_a_run_was_trained_on_is_refused():
    own = _config(**{'data.holdout': 0.2})
    key = 'data.holdout'
    with pytest.raises(UserError, match='is that of the run, 0'):
        beside.without_other_images(_config(**{key: 0.5}), own, (key,), False)
    found = beside.without_other_images(_config(**{key: 0.2}), own, (key,), False)
    assert found.data.holdout == 0.2


def test_values_that_a_caller_gives_change_how_a_run_computes():
    own = _config(tokenizer='/old')
    values = {'dtype': 'bfloat16', 'sampling.num_steps': 7, 'tokenizer': 'new'}
    found = beside.with_values(own, values)
    expected = schema.changed(own, values | {'tokenizer': files.absolute('new')})
    assert found.to_json_best_effort() == expected.to_json_best_effort()
    assert own.tokenizer == '/old'
    assert beside.with_values(own, {'dtype': 'bfloat16'}).tokenizer == '/old'
    # As on the command line: None leaves a place, and a run that is no distillation has no teacher.
    assert beside.with_values(own, {'tokenizer': None}).tokenizer == '/old'
    assert beside.with_values(own, {'init_from': '/other'}).init_from is None
    assert beside.with_values(_config(init_from='/a'), {'init_from': '/b'}).init_from == '/b'


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'sampling.steps': 7}, 'the config has no key sampling.steps; did you mean sampling.num_'),
        ({'ar.width': 8}, 'ar.width is fixed here: only these change, sampling, dtype, ar.fused'),
        ({'mesh.fsdp': 2}, 'mesh.fsdp is fixed here'),
        ({'sampling.num_steps': 'ten'}, 'num_steps'),
        ({'tokenizer': ''}, 'tokenizer is empty: give a value'),
    ],
)
def test_other_values_that_a_caller_gives_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        beside.with_values(_config(), values)
