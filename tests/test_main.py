"""The command line, as people use it: in processes of its own."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest
from PIL import Image

from sphere_ar_jax.commands import train
from sphere_ar_jax.config import checks, schema
from sphere_ar_jax.models.heads import HEADS
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.run import load_run
from tests.tiny_config import get_config

ROOT = pathlib.Path(__file__).parent.parent
TINY = '--config=tests/tiny_config.py'


@pytest.fixture(scope='module')
def environment():
    return os.environ | {'PYTHONPATH': str(ROOT)}


@pytest.fixture(scope='module')
def optimised(environment):
    """The environment without the tests' own flags for XLA, since whole trainings run longer than
    they compile.
    """
    return environment | {'XLA_FLAGS': ''}


def _command(*arguments):
    return [sys.executable, '-m', 'sphere_ar_jax.main', *map(str, arguments)]


def _run(environment, *arguments, timeout=300):
    return subprocess.run(
        _command(*arguments),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


WRONG = {
    (): 'give --config=configs/NAME.py and --workdir=DIR',
    ('--config=configs/nope.py', '--workdir=W'): 'there is no config file configs/nope.py',
    ('--config=configs/digits.py:huge', '--workdir=W'): "no variant 'huge'",
    (TINY, '--workdir=W', '--config.ar.widht=3'): 'no key ar.widht; did you mean ar.width?',
    (TINY, '--workdir=W', '--config.zzz=3'): 'no key zzz; its sections are ar,',
    (
        TINY,
        '--workdir=W',
        '--config.ar.width=wide',
    ): 'config.ar.width=wide: invalid literal for int()',
    (TINY, '--workdir=W', '--config.ar.heads=3'): '3 heads do not divide the width 16',
    (TINY, '--workdri=W'): 'Did you mean: workdir',
    (TINY, '--workdir='): '--workdir is empty: give a value, or leave it out',
    ('--mode=pack', '--data=folder:D', '--output='): '--output is empty: give a value',
    (
        TINY,
        '--workdir=W',
        '--config.data.name=folder',
        '--config.data.path=',
    ): 'give --config.data.path, of the folder data',
    (TINY, '--workdir=W', '--config.tokenizer='): 'tokenizer is empty: give a value',
    (TINY, '--workdir=/dev/null/x'): 'Not a directory',
    (TINY, '--workdir=BAD'): 'which is a file: give a directory',
    (TINY, '--workdir=W', '--config.sampling.guidance_scale=nan'): 'is nan, but must be finite',
    (TINY, '--workdir=W', '--config.ar_training.learning_rate=inf'): 'is inf, but must be finite',
    (TINY, '--workdir=W', "--config.distillation_training.levels=(float('inf'),)"): 'levels',
    ('--workdir=W', '--config.seed=1'): 'give --config=configs/NAME.py: --config.seed=1 changes',
    ('--mode=sample', '--workdir=W', '--config.seed=1'): 'has no run: train one',
    ('--mode=sample', '--workdir=gs://bucket/run'): '--workdir is gs://bucket/run: samples are put',
    (
        '--mode=sample',
        '--workdir=RUN',
        '--png=gs://bucket/png',
    ): '--png is gs://bucket/png: pictures are written to a local disk',
    ('--mode=sample', '--workdir=~/RUN', '--labels=~/x'): 'has no run: train one',
    ('--mode=sample', '--workdir=RUN', '--config.sampling.scale=1'): 'no key sampling.scale',
    ('--mode=sample', '--workdir=RUN', '--config.sampling.num_steps=0'): 'num_steps',
    (
        TINY,
        '--workdir=W',
        'config.seed=1',
    ): 'config.seed=1 is no flag: overrides are written --config.KEY=VALUE',
    ('--config', 'configs/nope.py', '--workdir', 'W'): 'there is no config file configs/nope.py',
    ('--config=BAD', '--workdir=W'): 'Did you mean "width" instead of "widht"?',
    (
        TINY,
        '--workdir=W',
        '--config.mesh.data=999',
    ): 'mesh.data 999, mesh.fsdp 1, mesh.tensor 1: not possible with',
}


@pytest.fixture(scope='module')
def run_directory(tmp_path_factory):
    """A workdir that holds the config of a run, and nothing else."""
    workdir = tmp_path_factory.mktemp('run')
    files.write_json(workdir / 'config.json', schema.as_dict(get_config()))
    return workdir


@pytest.fixture(scope='module')
def answers(environment, run_directory, tmp_path_factory):
    """How each command line of `WRONG` ended: (exit code, stdout, stderr)."""
    directory = tmp_path_factory.mktemp('wrong')
    bad = directory / 'bad.py'
    bad.write_text(
        'from tests.tiny_config import get_config as tiny\n'
        'def get_config():\n c = tiny()\n c.ar.widht = 3\n return c'
    )
    names = {'=W': f'={directory}/w', '=RUN': f'={run_directory}', 'BAD': str(bad)}

    def named(word):
        for name, path in names.items():
            word = word.replace(name, path)
        return word

    cases = [[named(word) for word in words] for words in WRONG]
    done = subprocess.run(
        [sys.executable, '-m', 'tests.answers'],
        cwd=ROOT,
        env=environment,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return dict(zip(WRONG, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize('arguments', WRONG, ids=[' '.join(a) or 'nothing' for a in WRONG])
def test_bad_input_is_one_line(answers, arguments):
    code, out, err = answers[arguments]
    assert code == 2, err
    lines = [line for line in err.splitlines() if line]
    assert lines[-1].startswith('error: ')
    assert WRONG[arguments] in lines[-1]
    assert 'Traceback' not in err
    assert out == ''


def _config_says(environment, words, expression):
    """What an expression of the config (c) prints after the flags `words`."""
    code = (
        'import sys\nfrom sphere_ar_jax import main\n'
        f'sys.argv = {["main", *words]!r}\nmain._parse_flags(sys.argv)\n'
        f'c = main._CONFIG.value\nprint({expression})'
    )
    out = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=300
    )
    return out.stdout, out.stderr


def test_an_override_changes_the_runs_own_config(environment, run_directory):
    """What draws and scores a run needs no config file for that."""
    words = ['--mode=sample', f'--workdir={run_directory}', '--config.sampling.guidance_scale=3']
    out, err = _config_says(environment, words, 'c.sampling.guidance_scale, c.ar.width')
    assert out == '3.0 16\n', err


def test_a_command_for_a_run_takes_no_images_of_a_config_file(environment, run_directory):
    """Those that a config names by itself need not be the run's. Those of the command line are."""
    words = ['--mode=evaluate', f'--workdir={run_directory}']
    said = f'main._beside_run(c, "{run_directory}").data'
    for own, path in (
        ('--config=fashion', None),
        ('--config=fashion:data=idx:/other', '/other'),
    ):
        out, err = _config_says(environment, [*words, own], f'{said}.path')
        assert out == f'{path}\n', err
    out, err = _config_says(environment, [*words, '--config.data.path=/new'], f'{said}.path')
    assert out == '/new\n', err


def test_the_users_own_directory_in_flags(environment, run_directory):
    """Shells leave ~ as it is behind a flag: --workdir, --config.… with it, and other paths."""
    home = environment | {'HOME': str(run_directory.parent)}
    words = [
        '--mode=sample',
        f'--workdir=~/{run_directory.name}',
        '--output=~/a.npz',
        '--labels=uniform',
        '--prompt=~',
        '--config.seed=3',
    ]
    out, err = _config_says(home, words, 'c.ar.width, c.seed, main._given()')
    given = {'output': f'{run_directory.parent}/a.npz', 'labels': 'uniform', 'prompt': ['~']}
    assert out == f'16 3 {given}\n', err


@pytest.mark.parametrize(('text', 'value'), [('False', 'False'), ('True', 'True')])
def test_what_the_memory_would_decide_can_be_said(environment, text, value):
    """`ar.remat` of the published AR models is None, and takes a truth value all the same."""
    words = ['--config=configs/ar_b.py', '--workdir=W', f'--config.ar.remat={text}']
    out, err = _config_says(environment, words, 'c.ar.remat')
    assert out == f'{value}\n', err


QUICK_DOORS = ('main', 'doctor', 'data.stand_in')
DOORS = ('benchmark', 'fidelity', 'experiments.frontier', 'measure.data_speed')


@pytest.mark.parametrize(
    'door', [*QUICK_DOORS, *(pytest.param(door, marks=pytest.mark.slow) for door in DOORS)]
)
def test_help_of_every_program(environment, door):
    """It ends with 0 on a terminal that knows ASCII alone, and in silence where nobody reads it."""
    command = [sys.executable, '-m', f'sphere_ar_jax.{door}', '--help']
    ascii_only = environment | {'PYTHONIOENCODING': 'ascii'}
    said = subprocess.run(command, env=ascii_only, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0
    assert not said.stderr
    assert f'sphere_ar_jax.{door}' in said.stdout
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'wb') as unread:
        unheard = subprocess.run(command, env=environment, stdout=unread, stderr=subprocess.PIPE)
    assert unheard.returncode == 128 + signal.SIGPIPE
    assert not unheard.stderr


@pytest.fixture(scope='module')
def finished(environment, tmp_path_factory):
    """The workdir of the tiny job, run whole, and its metrics."""
    workdir = tmp_path_factory.mktemp('finished')
    result = _run(environment, TINY, f'--workdir={workdir}')
    assert result.returncode == 0, result.stderr
    return workdir, json.loads((workdir / 'metrics.json').read_text())


def test_the_whole_job(finished):
    """Trains, samples, scores and reports."""
    workdir, metrics = finished
    assert {
        'vae/psnr', 'vae/kl', 'samples/accuracy', 'classifier/accuracy', 'samples/frechet',
        'samples/frechet_heldout', 'real/frechet', 'samples/precision', 'samples/recall',
        'memorisation/samples_to_train', 'memorisation/heldout_to_train', 'wall_s/tokenizer',
        'wall_s/ar', 'wall_s/sampling', 'peak_rss_mb',
    } <= set(metrics)  # fmt: skip
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics['classifier/accuracy'] > 0.97
    for name in ('samples', 'reconstructions', 'curves'):
        picture = np.asarray(Image.open(workdir / f'{name}.png').convert('L'))
        assert picture.shape[0] > 100
        assert picture.shape[1] > 100
        assert picture.std() > 10
    page = (workdir / 'report.html').read_text()
    assert page.count('data:image/png;base64,') == 3
    assert 'src="http' not in page
    assert 'tests/tiny_config.py' in page
    assert 'samples/frechet' in page
    assert 'latent_dim: 8' in page

    # The README's lines, as they stand there.
    snippet = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL).group(
        1
    )
    seen = {}
    exec(snippet.replace('/tmp/digits', str(workdir)), seen)
    chex.assert_shape(seen['images'], (6, 16, 16, 1))
    tokens = seen['run'].sample_tokens([3, 1, 4, 1, 5, 9], seed=0).z
    chex.assert_shape(tokens, (6, 16, 8))
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), np.sqrt(8), rtol=1e-5)


@pytest.mark.slow
def test_the_job_again_distilled_and_with_another_config(environment, finished, tmp_path):
    """A second run only evaluates; a head is distilled from it; a changed model is refused."""
    workdir, metrics = finished
    again = _run(environment, TINY, f'--workdir={workdir}')
    assert again.returncode == 0, again.stderr
    second = json.loads((workdir / 'metrics.json').read_text())
    same = [name for name in metrics if not name.startswith(('wall_s', 'peak'))]
    assert {name: metrics[name] for name in same} == {name: second[name] for name in same}

    distil = (f'{TINY}:distilled', f'--workdir={tmp_path}/distilled')
    result = _run(environment, *distil, f'--config.init_from={workdir}')
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'distilled' / 'samples.png').exists()
    assert not (tmp_path / 'distilled' / 'ar').exists()
    run = load_run(str(tmp_path / 'distilled'))
    teacher = load_run(str(workdir))
    assert isinstance(run.ar.head, HEADS['mean_velocity'])
    assert set(run.ar_params['head']) - set(teacher.ar_params['head']) == {'span1', 'span2'}
    chex.assert_trees_all_equal(run.ar_params['stack'], teacher.ar_params['stack'])
    for wrong, message in (
        ({}, 'give --config.init_from=DIR'),
        ({'init_from': f'{workdir}/none'}, 'init_from: there is no run in '),
        ({'init_from': f'{workdir}', 'ar.width': 32}, 'ar.width 16 → 32'),
        ({'init_from': f'{workdir}', 'sampling.num_steps': 3}, r'knows equal steps of \(1, 2\)'),
        ({'init_from': f'{tmp_path}/distilled'}, 'has a distilled head'),
    ):
        cfg = get_config('distilled')
        cfg.update_from_flattened_dict(wrong)
        with pytest.raises((UserError, OSError), match=message) as refused:
            train.train(checks.check(cfg), f'{tmp_path}/other', 'command', 0.0)
        assert '\n' not in str(refused.value)
        assert not (tmp_path / 'other' / 'config.json').exists()  # the workdir is still free

    other = _run(environment, TINY, f'--workdir={workdir}', '--config.ar.width=32')
    assert other.returncode == 2
    assert 'ar.width 16 → 32' in other.stderr
    assert json.loads((workdir / 'metrics.json').read_text()) == second


def test_compiled_programs_are_kept_for_each_processor(tmp_path):
    path = files.compilation_cache({'XDG_CACHE_HOME': str(tmp_path)})
    assert re.fullmatch(rf'{tmp_path}/sphere_ar_jax/[a-z0-9_]+-[0-9a-f]{{8}}', path)
    assert files.compilation_cache({'XDG_CACHE_HOME': str(tmp_path)}) == path
    assert files.compilation_cache({'JAX_COMPILATION_CACHE_DIR': '/elsewhere'}) is None


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(environment, tmp_path, number):
    arguments = (TINY, f'--workdir={tmp_path}', '--config.tokenizer_training.steps=100000')
    with subprocess.Popen(
        _command(*arguments),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if '/100000,' in line:
                break
        time.sleep(0.3)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert 'Traceback' not in errors
    step = int(errors.split('saved at step ')[1].split()[0])
    assert (tmp_path / 'tokenizer' / 'checkpoints' / str(step)).is_dir()
    assert 'the same command goes on' in errors


@pytest.mark.slow
def test_digits_smoke(environment, tmp_path):
    """configs/digits.py:smoke runs through.

    Its time stands in docs/speed.md and is not asserted.
    """
    result = _run(
        environment, '--config=configs/digits.py:smoke', f'--workdir={tmp_path}', timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / 'metrics.json').read_text())['samples/classes_drawn'] >= 5


@pytest.mark.slow
def test_digits_quality(optimised, tmp_path):
    """The main job reaches its quality, within the spread of one seed (docs/evaluation.md has the
    mean of three).
    """
    result = _run(optimised, '--config=configs/digits.py', f'--workdir={tmp_path}', timeout=1800)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['samples/accuracy'] >= 0.98
    assert metrics['samples/frechet'] <= 0.25
    assert metrics['samples/classes_drawn'] == 10
    assert metrics['vae/psnr'] > 26
    assert metrics['peak_rss_mb'] < 4096
