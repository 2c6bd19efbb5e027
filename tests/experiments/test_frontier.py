import json
import re

import numpy as np
import pytest
from PIL import Image

from sphere_ar_jax.config import checks, schema
from sphere_ar_jax.experiments import frontier, runs
from sphere_ar_jax.flow import plan, solvers
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.run import load_run
from tests.tiny_config import get_config, random_run


def test_settings_cover_every_solver_and_can_be_built():
    """Every setting's options are accepted, and its name says how many evaluations it makes."""
    found = frontier.settings()
    assert frontier.REFERENCE in found
    assert {options['solver'] for options, _ in found.values()} == set(solvers.STRAIGHT)
    assert {scale for _, scale in found.values()} == {1.0, 1.5, 2.0, 3.0, 4.5}
    # No setting occurs twice.
    assert len({(str(sorted(o.items())), s) for o, s in found.values()}) == len(found)
    plans = {
        name: plan.Options(**options).plan(16).evaluations for name, (options, _) in found.items()
    }
    assert plans[frontier.REFERENCE] == 101
    assert plans['heun 5, guidance 1.5'] == plans['ab2 10, guidance 1.5'] == 10
    distilled = frontier.settings((1, 2))
    assert [plan.Options(**options).plan(16).evaluations for options, _ in distilled.values()] == [
        1,
        2,
    ]


def _rows():
    rng = np.random.default_rng(0)
    return [
        {'setting': name, 'workdir': str(seed), 'evaluations': n}
        | {score: float(rng.uniform()) for score in frontier.SCORES}
        for name, n in ((frontier.REFERENCE, 101), ('ab2 10, guidance 1.5', 10), ('distilled 1', 1))
        for seed in range(3)
    ]


def test_summary_and_table(tmp_path):
    rows = _rows()
    summary = frontier.summarize(rows)
    values = [row['samples/frechet'] for row in rows[:3]]
    reference = summary[frontier.REFERENCE]
    assert reference['runs'] == 3
    assert reference['evaluations'] == 101
    np.testing.assert_allclose(reference['samples/frechet']['mean'], sum(values) / 3)
    np.testing.assert_allclose(reference['samples/frechet']['std'], np.std(values, ddof=1))
    lines = frontier.markdown(summary).splitlines()
    assert [line.split(' | ')[0] for line in lines[2:]] == [
        '| distilled 1',
        '| ab2 10, guidance 1.5',
        f'| {frontier.REFERENCE}',
    ]
    assert f'{sum(values) / 3:.4f}' in lines[4]
    frontier.save_frontier(str(tmp_path / 'f.png'), json.loads(json.dumps(summary)))
    picture = np.asarray(Image.open(tmp_path / 'f.png').convert('L'))
    assert picture.shape[0] > 500
    assert picture.std() > 10


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, old_runs):
    """A setting that was measured is not measured again, and a line that was cut off is."""
    asked = []
    judges = []

    def measure(run, judge, options, scale, num_images, batch_size):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append((options.num_steps, num_images))
        assert judge is runs
        return {'evaluations': options.num_steps} | dict.fromkeys(frontier.SCORES, 0.5)

    def judge(config, cache):
        judges.append(cache)
        return runs

    monkeypatch.setattr(frontier, '_measure', measure)
    monkeypatch.setattr(runs, 'judge', judge)
    # Its head is distilled for 1 and 2 steps.
    workdir = str(old_runs / 'distilled')
    output = str(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        frontier.run([workdir], output, 20, 10)
    scores = tmp_path / 'scores.jsonl'
    first = scores.read_text()
    # A line of an earlier version does not note the weights. It stays in the file.
    line = json.loads(first)
    del line['parameters']
    old = json.dumps(line | {'setting': 'distilled 2'}) + '\n'
    assert json.loads(first)['setting'] == 'distilled 1'
    scores.write_text(old + first + first[:20])
    asked.clear()
    # A workdir that is named twice is one run.
    summary = frontier.run([workdir, f'{workdir}/'], output, 20, 10)
    assert asked == [(2, 20)]
    assert summary['distilled 1']['runs'] == 1
    assert list(summary) == ['distilled 1', 'distilled 2']
    lines = scores.read_text().splitlines()
    settings = ['distilled 2', 'distilled 1', 'distilled 2']
    assert [json.loads(line)['setting'] for line in lines] == settings
    assert set(judges) == {output}
    asked.clear()
    # Scores of other weights at the same place are others, and so are those of more images.
    with monkeypatch.context() as patched:
        patched.setattr(frontier.generation, 'parameters_crc', lambda run: 1)
        with pytest.raises(KeyboardInterrupt):
            frontier.run([workdir], output, 20, 10)
    assert asked == [(1, 20)]
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        frontier.run([workdir], output, 30, 10)
    assert asked == [(1, 30)]
    asked.clear()
    # Some settings alone.
    summary = frontier.run([workdir], output, 40, 10, 'distilled [23]')
    assert asked == [(2, 40)]
    assert list(summary) == ['distilled 2']
    for pattern, message in (
        ('guidance 1.5', "--settings=guidance 1.5 names no setting of these runs: 'distilled 2'"),
        ('(', '--settings=(: '),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            frontier.run([workdir], output, 40, 10, pattern)


def test_runs_that_no_setting_fits_are_one_line():
    cfg = get_config()
    run = random_run(checks.check(cfg))
    frontier._check_run('/w', run)
    cfg.ar.head = 'riemannian'
    cfg.sampling.solver = 'euler'
    riemannian = random_run(checks.check(cfg))
    with pytest.raises(UserError, match="/w: this head has no solver 'heun': use"):
        frontier._check_run('/w', riemannian)
    texts = run._replace(config=schema.changed(run.config, {'ar.condition': 'text'}))
    with pytest.raises(UserError, match='/w draws for texts'):
        frontier._check_run('/w', texts)
    files = run._replace(config=schema.changed(run.config, {'data.name': 'folder'}))
    with pytest.raises(UserError, match=r'/w is of folder: .* draw with --mode=sample'):
        frontier._check_run('/w', files)


def test_scores_of_another_temperature_or_classifier_do_not_count():
    made_of = {'parameters': 1, 'temperature': 1.0, 'classifier_steps': 600}
    assert frontier._is_made_of(made_of | {'samples/accuracy': 0.5}, made_of)
    # An earlier version noted the weights alone.
    assert frontier._is_made_of({'parameters': 1}, made_of)
    for other in ({'parameters': 2}, {'temperature': 0.9}, {'classifier_steps': 60}):
        assert not frontier._is_made_of(made_of | other, made_of)
    assert not frontier._is_made_of({'temperature': 1.0}, made_of)


def test_the_frechet_distance_is_that_of_the_features(monkeypatch, old_runs):
    """A classifier with features gives a distance in pixels, too, which is not shown."""

    class Judge:
        def scores(self, images, labels):
            assert len(images) == len(labels) == 4
            found = dict.fromkeys(frontier.SCORES, 0.5)
            return found | {'samples/frechet': 90.0, 'samples/feature_frechet': 0.25}

    run = load_run(str(old_runs / 'distilled'))
    options = plan.Options(solver='euler', num_steps=1, guidance=None)
    found = frontier._measure(run, Judge(), options, None, 4, 4)
    assert found == dict.fromkeys(frontier.SCORES, 0.5) | {
        'samples/frechet': 0.25,
        'evaluations': 1,
    }
