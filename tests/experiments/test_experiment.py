"""Experiments: their configs, what they do once, what they resume, and what they say."""

import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib import axes
from PIL import Image

from sphere_ar_jax.commands import experiment as command
from sphere_ar_jax.config import build, checks, experiments, packaged
from sphere_ar_jax.data.captions import composed
from sphere_ar_jax.experiments import experiment, report, runs, speed, statistics
from sphere_ar_jax.experiments.kinds import KINDS, comparison
from sphere_ar_jax.runtime.console import UserError
from tests import tiny_config
from tests.conftest import GOLDENS, libraries_promote
from tests.data import test_idx as idx

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs' / 'experiments'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))


def small(**changes):
    """An experiment of two rows on the tiny run."""
    c = experiments.default(tiny_config.get_config())
    c.title = 'Two rows'
    c.claim = 'A claim.'
    c.rows = experiments.rows(
        power_spherical={}, gaussian_norm={'ar': {'token_space': 'projected'}}
    )
    c.seeds = (0, 1, 2)
    c.guidance_scales = (1.5, 8.0)
    c.num_images = 20
    c.followed_images = 2
    c.positions = (0.0,)
    c.update(changes)
    return c


@pytest.mark.parametrize('name', NAMES)
def test_packaged_experiments_are_whole(name):
    """Every row is a config that passes the checks, on both data sets and sizes."""
    captioned = packaged.load(f'experiments/{name}').kind == 'captions'
    for words in ('', ':smoke') if captioned else ('', ':smoke', ':fashion', ':fashion,smoke'):
        word = f'experiments/{name}{words}'
        c = experiments.check(packaged.load(word))
        for row in c.rows:
            cfg = experiments.row(c, row, 7)
            assert cfg.seed == 7
            t = cfg.ar_training
            if 'smoke' not in words:
                share = checks.share_of_start(t.ema_decay, t.steps)
                assert share < 0.05, f'{word}, {row}: the average is {share:.0%} initialisation'
        assert c.comparisons
        assert c.claim
        assert c.method
    with pytest.raises(ValueError, match='has no variant'):
        packaged.load(f'experiments/{name}:quick')


def test_short_trainings_forget_their_start():
    """Their averages do, even where the memory of the whole training would be too long."""
    training = tiny_config.get_config().ar_training
    training.update(steps=2000, warmup_steps=100, log_every=50, ema_decay=0.995)
    half = training.copy_and_resolve_references()
    experiments.shorten(half, 0.5)
    assert (half.steps, half.warmup_steps, half.ema_decay) == (1000, 50, 0.995)
    fifth = training.copy_and_resolve_references()
    experiments.shorten(fifth, 0.2)
    assert (fifth.steps, fifth.warmup_steps) == (400, 20)
    assert np.isclose(fifth.ema_decay, 0.975)
    assert fifth.ema_decay**400 < 0.05 < 0.995**400
    tokenizer = training.copy_and_resolve_references()
    tokenizer.ema_decay = 0.0
    experiments.shorten(tokenizer, 0.01)
    assert (tokenizer.steps, tokenizer.log_every, tokenizer.ema_decay) == (20, 20, 0.0)


def test_rows_are_the_papers():
    rows = {row: experiments.flat(changes) for row, changes in experiments.LATENTS.items()}
    assert rows['power_spherical'] == 'nothing'
    assert rows['gaussian'] == 'vae.posterior=gaussian, ar.token_space=standardised'
    assert rows['gaussian_decoder_norm'] == (
        'vae.posterior=gaussian, vae.decoder_input=projected, ar.token_space=standardised'
    )
    assert rows['gaussian_norm'] == (
        'vae.posterior=gaussian, vae.decoder_input=projected, ar.token_space=projected'
    )


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'kind': 'a'}, "kind is 'a': use comparison or propagation or shifted"),
        ({'seeds': ()}, r'seeds are \(\), but must be'),
        ({'seeds': (1, 1)}, 'different numbers'),
        ({'guidance_scales': (1.0,)}, 'must have common_guidance 1.5'),
        ({'comparisons': ('power_spherical vmf frechet_best',)}, 'is not BETTER WORSE SCORE'),
        ({'comparisons': ('power_spherical gaussian_norm beauty',)}, 'is not BETTER WORSE SCORE'),
        (
            {'comparisons': ('power_spherical gaussian_norm radial_growth',)},
            'is not BETTER WORSE SCORE',
        ),
        ({'map': ('power_spherical vmf',)}, 'map: .* is not BETTER WORSE, two of the rows'),
        ({'shifts': ('noisy:9',)}, "'noisy:9' is no corruption: write WORD:SEVERITY"),
        ({'prefixes': (0.5, 1.0)}, r'prefixes are \(0.5, 1.0\), but must be shares'),
        ({'variants': {'power_spherical': ('a',)}}, 'there is no row a'),
        (
            {'kind': 'shifted', 'variants': {'power_spherical': ('gaussian_norm',)}},
            'variants are for kind comparison, not for shifted',
        ),
        ({'prefixes': ()}, r'prefixes are \(\), but must be one or more numbers'),
        ({'guidance_scales': ('a', 1.5)}, 'guidance_scales are .* numbers'),
        ({'disturbances': (0.0,)}, 'must be above 0'),
        ({'num_images': 0}, 'num_images is 0 and followed_images'),
        (
            {'kind': 'captions', 'num_images': 2},
            'num_images is 2, but must be at least 3',
        ),
        ({'kind': 'propagation', 'positions': (0.99,)}, 'leave one of 16 tokens behind'),
        ({'kind': 'shifted', 'map': ('power_spherical gaussian_norm',)}, 'map are for kind comp'),
        (
            {
                'curves': {'power_spherical': ('gaussian_norm',)},
                'curves_at': (1.0,),
                'map': ('power_spherical gaussian_norm',),
            },
            'curves replace the plot that map would change',
        ),
        (
            {'rows': experiments.rows(a={'sampling': {'guidance': None, 'guidance_scale': None}})},
            'the row a: experiments vary the guidance',
        ),
        ({'kind': 'captions'}, 'kind captions does not go with data digits'),
        (
            {'rows': experiments.rows(a={'fine_tuning': {'init_from': '/x', 'lora_rank': 2}})},
            'the row a: experiments train all from the start',
        ),
        (
            {'rows': experiments.rows(a={'tokenizer': '/x'})},
            'the row a: experiments train all from the start',
        ),
        ({'rows': experiments.rows(a={'vae': {'grid': (3, 3)}})}, 'the row a: vae makes images of'),
        (
            {
                'kind': 'propagation',
                'rows': experiments.rows(
                    a={
                        'vae': {'posterior': 'gaussian'},
                        'ar': {'token_space': 'polar', 'head': 'direction_magnitude'},
                    }
                ),
            },
            'the row a: propagation needs tokens with a norm',
        ),
    ],
)
def test_impossible_experiments_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        experiments.check(small(**changes))


def test_captions_are_compared_of_rows_that_write_them():
    c = packaged.load('experiments/text:smoke')
    c.comparisons = ('joint_power_spherical power_spherical captions_held_out',)
    c.rows = experiments.rows(
        power_spherical={}, joint_power_spherical={'ar': {'text_weight': 0.2}}
    )
    with pytest.raises(UserError, match=r'needs two rows with ar\.text_weight'):
        experiments.check(c)


def test_an_experiment_is_on_data_in_memory():
    rows = experiments.rows(a={'data': {'name': 'folder', 'path': '/nowhere'}})
    with pytest.raises(UserError, match=r'the row a: .*folder'):
        experiments.check(small(rows=rows))


def test_the_command_refuses_what_is_no_experiment(tmp_path):
    with pytest.raises(UserError, match='this is the config of a run'):
        command.experiment(tiny_config.get_config(), 'a', str(tmp_path), '')
    with pytest.raises(UserError, match='--seeds is 0,x, but must be whole numbers'):
        command.experiment(small(), 'a', str(tmp_path), '', seeds=['0', 'x'])


def test_models_are_shared_where_their_configs_agree():
    """The tokenizer knows nothing of the AR model's token space."""
    c = small()
    first = experiments.row(c, 'power_spherical', 0)
    second = experiments.row(c, 'gaussian_norm', 0)
    other_seed = experiments.row(c, 'power_spherical', 1)
    tokenizers = [runs.tokenizer_directory('', cfg) for cfg in (first, second, other_seed)]
    models = [runs.ar_directory('', cfg) for cfg in (first, second, other_seed)]
    assert tokenizers[0] == tokenizers[1] != tokenizers[2]
    assert len(set(models)) == 3
    first.sampling.guidance_scale = 9.0
    assert runs.ar_directory('', first) == models[0]


def test_a_shared_model_is_sampled_as_each_row_asks(monkeypatch):
    """The config of the workdir is that of the row that came first."""
    first = experiments.row(packaged.load('experiments/riemannian'), 'flow_1', 0)
    second = experiments.row(packaged.load('experiments/propagation'), 'power_spherical', 0)
    second.sampling.ema_decay = 0.0
    assert runs.ar_directory('', first) == runs.ar_directory('', second)
    assert first.sampling != second.sampling
    monkeypatch.setattr(runs, 'load_config', lambda directory: first)
    monkeypatch.setattr(runs, 'load_run', lambda directory, mesh, cfg: cfg)
    assert runs.load(second, '', None).sampling == second.sampling


def test_models_are_shared_by_checkouts(tmp_path):
    """The content of a vocabulary counts, and not where it lies."""
    c = packaged.load('experiments/text')
    name, *_ = c.rows
    found = []
    for place in ('a', 'b'):
        (tmp_path / place).mkdir()
        path = tmp_path / place / 'words.txt'
        path.write_bytes(pathlib.Path(c.base.ar.vocabulary).read_bytes())
        c.base.ar.vocabulary = str(path)
        found.append(runs.ar_directory('', experiments.row(c, name, 0)))
    path.write_text(f'{path.read_text()}another\n')
    found.append(runs.ar_directory('', experiments.row(c, name, 0)))
    assert found[0] == found[1] != found[2]


def test_the_cache_keeps_the_vocabulary_of_texts(tmp_path):
    """A tokenizer of the cache can be read where the list of words is gone."""
    words = tmp_path / 'words.txt'
    cfg = packaged.load('composed')
    words.write_bytes(pathlib.Path(cfg.ar.vocabulary).read_bytes())
    cfg.ar.vocabulary = str(words)
    (tmp_path / 'w').mkdir()
    runs._claim(cfg, str(tmp_path / 'w'))
    words.unlink()
    assert runs.load_config(str(tmp_path / 'w')).ar.vocabulary != str(words)


def test_every_kind_of_the_configs_is_known():
    assert set(KINDS) == set(experiments.KINDS)


def fake_lines(row, seed):
    """What `comparison.measure` returns, with chosen numbers."""
    worse = 1.0 if row == 'gaussian_norm' else 0.0
    lines = [
        {
            'guidance': None,
            'psnr': 20 - worse,
            'rfrechet': 0.1,
            'kl': 5.0,
            # Tokens of training images have a larger norm at the end of the sequence, too.
            'real_norm_mean': [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.25, 1.5],
        }
    ]
    for scale in (1.5, 8.0):
        lines.append(
            {
                'guidance': scale,
                'frechet': (scale + worse) * (1 + 0.01 * seed),
                'accuracy': 0.9,
                'raw_norm_mean': [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.5, 3.0],
                'seconds_per_image': 0.1 + worse + seed + scale,
                'collapsed': 0.0,
                'precision': 0.8,
                'recall': 0.7,
            }
        )
    return lines


def test_each_degradation_has_its_own_reference():
    """The least distance, the most accurate scale, and the scale of the least distance."""
    lines = fake_lines('power_spherical', 0)
    tokenizer, first, last = lines
    first |= {'frechet': 1.0, 'accuracy': 0.7, 'collapsed': 0.1}
    middle = first | {'guidance': 3.0, 'frechet': 2.0, 'accuracy': 0.9, 'collapsed': 0.0}
    last |= {'frechet': 5.0, 'accuracy': 0.85, 'collapsed': 0.4}
    c = small(common_guidance=1.5)
    scores = comparison.summarize(c, [tokenizer, last, middle, first])
    assert scores['best_guidance'] == 1.5
    expected = {'frechet': 5 - 1, 'accuracy': 0.9 - 0.85, 'collapsed': 0.4 - 0.1}
    found = {name: scores[f'{name}_degradation'] for name in expected}
    assert found == pytest.approx(expected)


def _measure_by(monkeypatch, measure):
    """Lets comparisons call `measure`, and draw no plots."""
    kind = comparison.KIND._replace(measure=measure, plots=lambda *arguments: {})
    monkeypatch.setitem(KINDS, 'comparison', kind)


@pytest.fixture
def faked(monkeypatch):
    """Trainings and measurements that take no time; returns the list of what was done."""
    done = []

    def train(stage):
        def mark(cfg, cache, mesh):
            directory = {'tokenizer': runs.tokenizer_directory, 'ar': runs.ar_directory}[stage]
            done.append((stage, directory(cache, cfg)))
            finished.add(directory(cache, cfg))

        return mark

    finished = set()
    monkeypatch.setattr(runs, 'train_tokenizer', train('tokenizer'))
    monkeypatch.setattr(runs, 'train_ar', train('ar'))
    monkeypatch.setattr(runs, 'is_finished', lambda directory: directory in finished)
    monkeypatch.setattr(runs, 'seconds', lambda directory: 60.0)

    def measure(config, cfg, cache, mesh):
        row = 'gaussian_norm' if cfg.ar.token_space == 'projected' else 'power_spherical'
        done.append(('measure', row, cfg.seed))
        return fake_lines(row, cfg.seed)

    _measure_by(monkeypatch, measure)
    return done


def test_what_is_done_is_not_done_again(tmp_path, faked, capsys, monkeypatch):
    c = small(comparisons=('power_spherical gaussian_norm frechet_best',))
    found = experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    # Two rows share a tokenizer, so that three seeds train three.
    assert [unit[0] for unit in faked].count('tokenizer') == 3
    assert [unit[0] for unit in faked].count('ar') == 6
    assert [unit[0] for unit in faked].count('measure') == 6
    assert list(found['rows']) == ['power_spherical', 'gaussian_norm']
    assert '[4/18]' not in capsys.readouterr().out  # the shared tokenizer of the second row

    # A kill left half a line, and took the last measurement with it.
    path = tmp_path / 'measured.jsonl'
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    faked.clear()
    again = experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    assert faked == [('measure', 'gaussian_norm', 2)]
    assert json.loads((tmp_path / 'two' / 'results.json').read_text()) == again
    # The measurement that was made again took another time.
    assert again.pop('seconds')['training'] == found['seconds']['training']
    assert again == {name: value for name, value in found.items() if name != 'seconds'}

    # Three tokenizers and six AR models of a minute each.
    assert found['seconds']['training'] == 9 * 60
    assert 'The trainings took 9 min' in (tmp_path / 'two' / 'page.md').read_text()

    # What is missing is named.
    assert 'Not measured yet' not in (tmp_path / 'two' / 'page.md').read_text()
    monkeypatch.setattr(experiment, '_do', lambda todo, after: None)
    more = small(seeds=(0, 1, 2, 3))
    more.rows['vmf'] = {'vae': {'posterior': 'vmf'}}
    experiment.run(more, 'two', str(tmp_path), 'COMMAND')
    said = 'Not measured yet: vmf, power_spherical with seed 3, gaussian_norm with seed 3.'
    for name in ('page.md', 'page.html'):
        assert said in (tmp_path / 'two' / name).read_text()

    # Fewer seeds are a part of the same experiment.
    faked.clear()
    c.seeds = (1, 2)
    part = experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    assert not faked
    assert {unit['seed'] for unit in part['measured']} == {1, 2}


def test_measurements_of_several_machines_are_joined(tmp_path, faked):
    """Each seed in a workdir of its own; nothing is trained to write the whole page."""
    lines = b''
    for seed in (0, 1, 2):
        own = tmp_path / str(seed)
        experiment.run(small(seeds=(seed,)), 'two', str(own), 'COMMAND')
        lines += (own / 'measured.jsonl').read_bytes()
    together = tmp_path / 'together'
    together.mkdir()
    (together / 'measured.jsonl').write_bytes(lines)
    faked.clear()
    joined = experiment.run(small(), 'two', str(together), 'COMMAND')
    assert not faked
    alone = experiment.run(small(), 'two', str(tmp_path / 'alone'), 'COMMAND')
    assert joined['rows'] == alone['rows']
    assert joined['seconds']['training'] == alone['seconds']['training'] == 9 * 60


@pytest.mark.parametrize(
    'name',
    [
        'guidance',
        'guidance:fashion',
        'ablation',
        'ablation:fashion',
        'backbones',
        'collapse',
        'propagation',
        'riemannian',
        'riemannian:fashion',
        'sequences',
        'sequences:fashion',
        'shifted',
        'magnitude',
        'radius',
    ],
)
def test_published_results_follow_from_the_published_measurements(name, tmp_path):
    """A copy of measured.jsonl is all that a new workdir needs to go on from them."""
    documents = GOLDENS.parent.parent / 'docs' / 'experiments'
    shutil.copy(documents / 'measured.jsonl', tmp_path)
    directory = documents / name.replace(':', '_')
    published = json.loads((directory / 'results.json').read_text())
    c = packaged.load(f'experiments/{name}')
    if name.endswith(':fashion'):
        c.base.data.num_classes = 10  # which a run counts in the data
    results = experiment._Results(str(tmp_path / 'measured.jsonl'))
    by_row = experiment._summaries(c, experiment.parts(c), results)
    rows = report.table(c, by_row)
    for row, scores in published['rows'].items():
        for score, interval in scores.items():
            assert rows[row][score] == pytest.approx(interval), (row, score)
    leads = {(lead['better'], lead['worse'], lead['score']): lead for lead in published['verdicts']}
    found = {
        (lead['better'], lead['worse'], lead['score']): lead for lead in report.verdicts(c, by_row)
    }
    for words, lead in leads.items():
        assert found[words]['verdict'] == lead['verdict']
        assert found[words]['advantage'] == pytest.approx(lead['advantage'])
    page = (directory / 'page.md').read_text()
    plots = {file: alt for alt, file in re.findall(r'^!\[(.*)\]\((.*)\)$', page, re.MULTILINE)}
    assert plots
    assert report._markdown(KINDS[c.kind], c, published, plots) == page


def test_experiments_share_what_they_measure(tmp_path, faked):
    """The second one has the same models, sampler and scales under another name of a row."""
    first = experiment.run(small(), 'one', str(tmp_path), 'COMMAND')
    faked.clear()
    c = small()
    c.rows = experiments.rows(hybrid={})
    second = experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    assert not faked
    assert second['rows']['hybrid'] == first['rows']['power_spherical']
    assert first['seconds']['training'] == 2 * second['seconds']['training'] - 3 * 60
    c.num_images = 21
    experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    assert faked == [('measure', 'power_spherical', seed) for seed in c.seeds]


def test_speeds_are_measured_in_turns_once_a_seed(tmp_path, faked, monkeypatch):
    """A row counts when its speed is measured, too; the lead is that of the measured speeds."""

    def speeds(config, seed, mesh):
        faked.append(('speed', seed))
        return {'power_spherical': 3.0 + seed, 'gaussian_norm': 2.0}

    monkeypatch.setattr(speed, 'measure', speeds)
    c = small(
        seeds=(0, 1),
        comparisons=('power_spherical gaussian_norm tokenizer_steps_per_second',),
    )
    found = experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    assert [unit for unit in faked if unit[0] == 'speed'] == [('speed', 0), ('speed', 1)]
    lead = found['verdicts'][0]['advantage']
    assert lead['mean'] == 1.5
    assert lead['seeds'] == 2
    assert found['measured'][0]['lines'][-1] == {'tokenizer_steps_per_second': 3.0}
    faked.clear()
    assert experiment.run(c, 'two', str(tmp_path), 'COMMAND')['rows'] == found['rows']
    assert not faked


def _without_pages(do, todo, after):
    """Does the work without writing pages after each measurement."""
    del after
    do(todo, lambda: None)


def test_results_say_rows_verdicts_and_versions(tmp_path, faked, monkeypatch):
    c = small(
        comparisons=(
            'power_spherical gaussian_norm frechet_best',
            'power_spherical gaussian_norm psnr',
            'gaussian_norm power_spherical frechet_best',
            'power_spherical gaussian_norm accuracy_best',
        )
    )
    monkeypatch.setattr(experiment, '_do', functools.partial(_without_pages, experiment._do))
    with_plots = KINDS['comparison']._replace(plots=comparison.KIND.plots)
    monkeypatch.setitem(KINDS, 'comparison', with_plots)
    found = experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    assert [v['verdict'] for v in found['verdicts']] == [
        'reproduced',
        'reproduced',
        'contradicted',
        'undecided',
    ]
    # Leads are 1, 1.01, 1.02: their mean and t-interval.
    lead = found['verdicts'][0]['advantage']
    np.testing.assert_allclose(lead['mean'], 1.01)
    half = 4.302652729911275 * 0.01 / np.sqrt(3)
    np.testing.assert_allclose([lead['low'], lead['high']], [1.01 - half, 1.01 + half], rtol=1e-9)
    row = found['rows']['power_spherical']
    assert row['best_guidance']['mean'] == 1.5
    np.testing.assert_allclose(row['frechet_degradation']['mean'], 6.5 * 1.01)
    np.testing.assert_allclose(row['norm_drift']['mean'], 2 / 1.5 - 1)
    np.testing.assert_allclose(row['seconds_per_image']['mean'], 0.1 + 1 + 1.5)
    assert found['written_with']['version']
    assert found['measured'][0]['made_with'] == found['written_with']
    assert found['config']['seeds'] == [0, 1, 2]
    directory = tmp_path / 'two'
    assert (directory / 'guidance.png').stat().st_size > 5000
    page = (directory / 'page.html').read_text()
    text = (directory / 'page.md').read_text()
    for said in (page, text):
        for words in ('Two rows', 'A claim.', 'COMMAND', 'reproduced', 'contradicted', '3 seeds'):
            assert words in said
    assert '![scores of samples over the guidance scale' in text


def test_the_best_variant_stands_for_its_row():
    c = small(variants={'power_spherical': ('gaussian_norm',)})
    scores = {
        'power_spherical': {0: {'frechet_best': 2.0}, 1: {'frechet_best': 1.0}},
        'gaussian_norm': {0: {'frechet_best': 1.0}, 1: {'frechet_best': 1.5}},
    }
    chosen = report.best_of_variants(c, scores)
    assert chosen == {'power_spherical': 'gaussian_norm', 'gaussian_norm': 'gaussian_norm'}
    # A variant whose seeds are not all measured yet does not stand for it.
    scores['gaussian_norm'] = {0: {'frechet_best': 0.5}}
    assert report.best_of_variants(c, scores)['power_spherical'] == 'power_spherical'


def test_kl_weights_make_variants():
    c = small()
    names = experiments.add_kl_weights(c, 'gaussian_norm', (0.001, 0.00025))
    assert names == ('gaussian_norm_kl_1e-3', 'gaussian_norm_kl_250e-6')
    cfg = experiments.row(c, names[1], 0)
    assert cfg.tokenizer_training.kl_weight == 0.00025
    assert cfg.ar.token_space == 'projected'


def test_the_time_left_is_that_of_like_units():
    def unit(kind):
        return experiment.Unit(kind, '', lambda: False, lambda: None)

    todo = [unit('ar'), unit('measure'), unit('ar')]
    assert experiment.time_left(todo, {'ar': [10.0, 20.0], 'measure': [5.0]}) == 35.0
    assert experiment.time_left(todo, {'ar': [10.0]}) is None
    assert report.spoken(7265) == '2 h 1 min'
    assert report.spoken(150) == '2 min'
    assert report.spoken(42.4) == '42 s'


def test_collapsed_samples_have_no_contrast():
    rng = np.random.default_rng(0)
    real = rng.uniform(-1, 1, (200, 8, 8, 1))
    flat = 0.01 * rng.uniform(-1, 1, (30, 8, 8, 1))
    assert comparison.collapsed_share(real, real) == 0
    assert comparison.collapsed_share(np.concatenate([real[:70], flat]), real) == 0.3


def test_the_distance_of_the_brightness_is_that_of_the_means():
    """Images whose means are shifted by 0.1 lie 0.1 apart, however many there are."""
    real = np.random.default_rng(0).uniform(0, 0.5, (300, 4, 4))
    shifted = np.concatenate([real, real]) + 0.1
    np.testing.assert_allclose(comparison.brightness_distance(shifted, real), 0.1, rtol=1e-6)
    mirrored = real[:, ::-1, ::-1]
    np.testing.assert_allclose(comparison.brightness_distance(mirrored, real), 0, atol=1e-12)


def test_a_score_is_measured_anew_where_old_lines_lack_it(tmp_path, faked, monkeypatch):
    """Lines without the brightness serve experiments that do not ask for it."""
    experiment.run(small(seeds=(0,)), 'one', str(tmp_path), 'COMMAND')
    faked.clear()

    def measure(config, cfg, cache, mesh):
        row = 'gaussian_norm' if cfg.ar.token_space == 'projected' else 'power_spherical'
        lines = fake_lines(row, cfg.seed)
        distance = 0.5 if row == 'gaussian_norm' else 0.25
        return [line | {'brightness_distance': distance} for line in lines]

    _measure_by(monkeypatch, measure)
    comparisons = ('power_spherical gaussian_norm brightness_distance',)
    c = small(seeds=(0,), comparisons=comparisons)
    found = experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    assert found['verdicts'][0]['advantage']['mean'] == 0.25
    # The first seed was measured before the score existed, and the second one after it.
    both = experiment.run(small(seeds=(1, 0)), 'one', str(tmp_path), 'COMMAND')
    assert 'brightness_distance' not in both['rows']['power_spherical']
    assert both['rows']['power_spherical']['frechet_best']['seeds'] == 2


def test_variants_are_drawn_in_the_colour_of_their_row():
    """No two rows are drawn alike."""
    styles = comparison._styles(packaged.load('experiments/ablation'))
    assert styles['gaussian_kl_1e-3']['color'] == styles['gaussian']['color']
    assert styles['gaussian']['ls'] == '-' != styles['gaussian_kl_1e-3']['ls']
    assert len({tuple(style.items()) for style in styles.values()}) == len(styles) == 13


def test_a_variant_alone_is_drawn(tmp_path):
    c = packaged.load('experiments/ablation')
    line = {'guidance': 1.0, 'frechet': 0.5, 'accuracy': 1.0, 'recall': 0.5, 'collapsed': 0.0}
    measured = [{'row': 'gaussian_kl_1e-3', 'seed': 0, 'lines': [line]}]
    found = {'rows': {'gaussian_kl_1e-3': {}}, 'measured': measured}
    said = comparison.KIND.plots(c, found, str(tmp_path))
    assert 'variants' in said['guidance.png']
    with Image.open(tmp_path / 'guidance.png') as picture:
        assert picture.width > picture.height > 100


def test_a_map_has_the_leads_of_each_pair(tmp_path, monkeypatch):
    """Differences are taken seed by seed, and a seed that one row lacks does not count."""

    def part(row, seed, *values):
        lines = [{'guidance': None, 'psnr': 30.0}]
        lines += [
            {'guidance': scale, 'frechet': value}
            for scale, value in zip((1.5, 8.0), values, strict=False)
        ]
        return {'row': row, 'seed': seed, 'lines': lines}

    measured = [
        part('sphere', 0, 0.5, 1.0),
        part('sphere', 1, 0.25, 1.0),
        part('plane', 0, 0.5, 3.0),
        part('plane', 1, 0.75, 3.5),
        part('plane', 2, 9.0, 9.0),
        part('other', 0, 9.0),
    ]
    leads = comparison._leads(measured, 'sphere plane', 'frechet')
    assert list(leads) == [1.5, 8.0]
    assert leads[1.5] == statistics.interval([0.0, 0.5])
    assert leads[8.0] == statistics.interval([2.0, 2.5])
    assert list(comparison._leads(measured, 'sphere other', 'frechet')) == [1.5]
    assert comparison._leads(measured, 'sphere nothing', 'frechet') == {}
    weights = []
    text = axes.Axes.text
    monkeypatch.setattr(
        axes.Axes, 'text', lambda *a, **k: weights.append(k['weight']) or text(*a, **k)
    )
    comparison._plot_map(str(tmp_path / 'one.png'), ('sphere other',), measured)
    assert weights == ['normal']  # one seed decides nothing
    path = tmp_path / 'map.png'
    comparison._plot_map(str(path), ('sphere plane', 'sphere nothing'), measured)
    with Image.open(path) as picture:
        assert len(picture.convert('RGB').getcolors(100_000)) > 10


def test_rows_are_drawn_as_curves_over_a_number(tmp_path, faked, monkeypatch):
    """The plot over guidance gives way to that of the curves, also while rows are missing."""
    c = small(seeds=(0, 1))
    c.curves = {'line': ('power_spherical', 'gaussian_norm')}
    c.curves_at = (1, 4)
    c.curves_over = 'number of things'
    experiments.check(c)
    with_plots = KINDS['comparison']._replace(plots=comparison.KIND.plots)
    monkeypatch.setitem(KINDS, 'comparison', with_plots)
    drawn = []
    band = comparison.band
    monkeypatch.setattr(
        comparison,
        'band',
        lambda *words, **style: drawn.append(words[1:]) or band(*words, **style),
    )
    experiment.run(c, 'two', str(tmp_path), 'COMMAND')
    # The first row of the first seed alone, and in the end both rows with both seeds.
    assert drawn[0][0] == [1]
    assert drawn[0][1][0].seeds == 1
    x, found = drawn[-1]
    assert x == [1, 4]
    assert [interval.seeds for interval in found] == [2, 2]
    np.testing.assert_allclose([interval.mean for interval in found], [1.5 * 1.005, 2.5 * 1.005])
    assert (tmp_path / 'two' / 'curves.png').stat().st_size > 5000
    assert not (tmp_path / 'two' / 'guidance.png').exists()
    assert '](curves.png)' in (tmp_path / 'two' / 'page.md').read_text()
    c.curves_at = (1, 2, 4)
    with pytest.raises(UserError, match='curves: line needs a row for each of curves_at'):
        experiments.check(c)


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """A workdir of several experiments, which share trained models."""
    return tmp_path_factory.mktemp('experiments')


@pytest.fixture(scope='module')
def shared_idx(tmp_path_factory):
    """The same for experiments on IDX files."""
    return tmp_path_factory.mktemp('idx_experiments')


def _on_idx_files(c, directory):
    """The same experiment on IDX files of 14×14 pixels, which become 16×16."""
    idx.write(directory, shape=(14, 14))
    c.base.data.update(name='idx', path=str(directory), num_classes=None, classifier_steps=3)
    return experiments.check(c)


def test_idx_files_say_how_many_classes_there_are(tmp_path, faked, monkeypatch):
    """Every row's model knows them, and the experiment's record says so."""
    c = _on_idx_files(small(seeds=(0,)), tmp_path / 'data')
    found = experiment.run(c, 'two', str(tmp_path / 'w'), 'COMMAND')
    assert found['config']['base']['data']['num_classes'] == 3
    for row in c.rows:
        assert build.build_ar(experiments.row(c, row, 0)).condition.num_classes == 3
    c.base.data.num_classes = 2
    with pytest.raises(UserError, match='has 3 classes, but the model 2'):
        experiment.run(c, 'two', str(tmp_path / 'w'), 'COMMAND')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ablation', 'propagation', 'shifted'])
@libraries_promote()
def test_every_kind_runs_on_idx_files(shared_idx, name):
    """Two rows with the scores of the classifier's features."""
    c = packaged.load(f'experiments/{name}:fashion,smoke')
    c.base.vae.grid = (4, 4)
    c.seeds = (0,)
    c.num_images = 18
    _on_idx_files(c, shared_idx / 'data')
    found = experiment.run(c, name, str(shared_idx / 'w'), 'COMMAND')
    assert set(found['rows']) == set(c.rows)
    assert len(c.rows) == 2
    for scores in found['rows'].values():
        assert all(np.isfinite(score['mean']) for score in scores.values())


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
@libraries_promote()
def test_every_experiment_runs(shared, name, monkeypatch):
    """Two of its rows, trained in a few steps; what it measures is finite."""
    monkeypatch.setattr(speed, 'STEPS', 2)
    monkeypatch.setattr(speed, 'TURNS', 3)
    # Composing all images takes a while.
    monkeypatch.setattr(composed, '_COUNTS', (400, 60))
    c = experiments.check(packaged.load(f'experiments/{name}:smoke'))
    c.seeds = (0,)
    found = experiment.run(c, name, str(shared), 'COMMAND')
    assert set(found['rows']) == set(c.rows)
    assert len(c.rows) == 2
    for scores in found['rows'].values():
        assert all(np.isfinite(score['mean']) for score in scores.values())
    assert {v['verdict'] for v in found['verdicts']} == {'one seed'}
    if c.kind == 'propagation':
        (unit, _) = found['measured']
        assert {line['part'] for line in unit['lines']} == {'norms', 'jacobian', 'disturbance'}
        page = (shared / name / 'page.md').read_text()
        assert '## Scores with and without projection' in page
        assert page.count('| after each token |') == 1  # of the spherical row
    if c.kind == 'shifted':
        page = (shared / name / 'page.md').read_text()
        assert '| power_spherical | noisy 5 | 8 |' in page
        assert '(shifted.png)' in page
    if c.kind == 'captions':
        page = (shared / name / 'page.md').read_text()
        assert '## Share of images read back right' in page
        assert '(captions.png)' in page
    assert (shared / name / 'page.html').exists()


@pytest.mark.slow
def test_an_experiment_goes_on_after_kill_9(shared, tmp_path):
    """What was measured before stays as it is, and the second start measures the rest."""
    # Another experiment may have trained the models.
    if (shared / 'models').exists():
        shutil.copytree(shared / 'models', tmp_path / 'models')
    command = [
        sys.executable,
        '-m',
        'sphere_ar_jax.main',
        '--mode=experiment',
        '--config=experiments/guidance:smoke',
        f'--workdir={tmp_path}',
        '--seeds=0',
    ]
    measured = tmp_path / 'measured.jsonl'
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while not (measured.exists() and measured.read_bytes().endswith(b'\n')):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        process.kill()
    before = measured.read_bytes()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert re.search(r'guidance-smoke: [1-9]\d* of 6 parts are done', finished.stdout)
    after = measured.read_bytes()
    assert after.startswith(before)
    assert after.count(b'\n') == 2
    results = json.loads(next(tmp_path.glob('guidance*/results.json')).read_text())
    assert len(results['rows']) == 2
