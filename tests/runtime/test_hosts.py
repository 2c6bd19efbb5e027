"""Several processes as one run: real ones, on this machine, over loopback (CPUs, Gloo)."""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from sphere_ar_jax.runtime import checkpoint, files, joining
from sphere_ar_jax.training.run import load_config, load_run
from tests.conftest import forced_devices, noted_fingerprint
from tests.tiny_config import get_config, random_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
TINY = '--config=tests/tiny_config.py'
STEPS = 24
ABORTED = -signal.SIGABRT  # how JAX ends a process where another one is lost
# What Gloo prints, whose threads may interrupt each other in the middle of a line
GLOO = re.compile(
    r'\[Gloo\] Rank|is connected to|peer ranks\.|'
    r'Expected number of connected peer ranks is :|[\d\s]'
)


def free_port():
    """A port below those that systems give to whoever asks for any."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as s:
            port = random.randrange(20000, 30000)
            s.bind(('localhost', port))
            return port


@pytest.fixture(scope='module')
def server():
    """A process of `tests.hosts_main`."""
    environ = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'PYTHONFAULTHANDLER': '1',
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_SHARE_BINARY_BETWEEN_HOSTS': '1',  # the first process compiles for all
    }  # fmt: skip
    command = [sys.executable, '-m', 'tests.hosts_main']
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        yield process


class Process:
    """A process that the server starts. Its files begin with `path`."""

    def __init__(self, server, path, environ, words):
        self._path = path
        self._server = server
        order = {'path': str(path), 'environ': environ, 'words': words}
        server.stdin.write(json.dumps(order) + '\n')
        server.stdin.flush()

    def _read(self, name):
        """The contents of a file, '' if it is not there yet."""
        path = pathlib.Path(f'{self._path}.{name}')
        return path.read_text() if path.exists() else ''

    @property
    def out(self):
        return self._read('out')

    @property
    def err(self):
        return self._read('err')

    def poll(self):
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        code = self._read('code')
        return int(code) if code else None

    def wait(self, timeout):
        """The exit code. Raises TimeoutError after so many seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f'{self._path}: {self.err}')
            time.sleep(0.02)
        return self.poll()

    def send_signal(self, number):
        while not self._read('pid'):
            assert self._server.poll() is None
            time.sleep(0.02)
        if self.poll() is None:
            os.kill(int(self._read('pid')), number)


class Processes:
    """So many processes, of so many devices each, as one run.

    words: what each is to do, see `tests.hosts_main`. of_last: more words for the last one alone.
    out, err: what each has printed so far.
    """

    def __init__(self, server, directory, count, devices, *words, of_last=()):
        directory.mkdir(exist_ok=True)
        port = free_port()
        self.started = []
        for i in range(count):
            environ = {'XLA_FLAGS': forced_devices(devices)}
            if count > 1:
                environ |= {
                    'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': str(count),
                    'JAX_PROCESS_ID': str(i),
                }  # fmt: skip
            mine = [str(word) for word in (*words, *(of_last if i == count - 1 else ()))]
            self.started.append(Process(server, directory / f'{i}-{port}', environ, mine))

    @property
    def out(self):
        return [process.out for process in self.started]

    @property
    def err(self):
        return [process.err for process in self.started]

    def wait_for(self, text):
        """Until the first process has printed a text."""
        end = time.monotonic() + 900
        while True:
            ended = self.started[0].poll() is not None
            if text in self.out[0]:
                return
            assert time.monotonic() < end, (text, self.out, self.err)
            assert not ended, (text, self.out, self.err)
            time.sleep(0.02)

    def end(self, timeout=900):
        """Waits for all of them, of whom only the first may print. Returns their exit codes."""
        codes = [process.wait(timeout) for process in self.started]
        for text in self.out[1:]:
            assert not GLOO.sub('', text)
        return codes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.started:
            process.send_signal(signal.SIGKILL)
            process.wait(60)


@pytest.fixture(scope='module')
def start(server):
    """`Processes` of this server."""
    return functools.partial(Processes, server)


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """The words of a training of the AR model on a tokenizer with weights at random, which needs no
    training.
    """
    tokenizer = random_tokenizer(get_config(), tmp_path_factory.mktemp('tokenizer'))
    return (
        TINY, f'--config.tokenizer={tokenizer}', '--config.tokenizer_training.steps=0',
        f'--config.ar_training.steps={STEPS}', '--config.ar_training.checkpoint_every=4',
        '--config.ar_training.log_every=1',
    )  # fmt: skip


def _fingerprint(workdir, stage='ar', step=STEPS):
    """The fingerprint of every bit of the state."""
    return noted_fingerprint(workdir / stage, step)


def _scores(workdir):
    scores = json.loads((workdir / 'metrics.json').read_text())
    return {
        name: value for name, value in scores.items() if not name.startswith(('wall_s', 'peak'))
    }


@pytest.fixture(scope='module')
def alone(start, words, tmp_path_factory):
    """Workdir of the undisturbed run of one process with two devices."""
    workdir = tmp_path_factory.mktemp('alone')
    with start(workdir / 'said', 1, 2, f'--workdir={workdir}', *words) as run:
        assert run.end() == [0], run.err
    return workdir


@pytest.mark.slow
def test_two_processes_killed_told_to_stop_and_going_on_are_one(start, words, alone, tmp_path):
    """Two processes: one is killed, and the other is aborted; one gets SIGTERM, and both save the
    same step. What they train and draw in the end is, bit for bit, what one process with two
    devices does.

    They name the tokenizer by different paths. The config names that of the first process, and all
    of them check it at the next start.
    """
    tokenizer = words[1].removeprefix('--config.tokenizer=')
    copied = tmp_path / 'copied'
    shutil.copytree(tokenizer, copied)
    start = functools.partial(start, of_last=[f'--config.tokenizer={copied}'])
    words = f'--workdir={tmp_path / "w"}', *words
    with start(tmp_path / 'killed', 2, 1, *words) as run:
        run.wait_for(f'ar 10/{STEPS}')
        run.started[1].send_signal(signal.SIGKILL)
        assert run.end(120) == [ABORTED, -signal.SIGKILL], run.err
    checkpoints = tmp_path / 'w' / 'ar' / 'checkpoints'
    with start(tmp_path / 'told', 2, 1, *words) as run:
        run.wait_for('ar: goes on from step ')
        before = int(run.out[0].split('goes on from step ')[1].split()[0])
        assert before % 4 == 0
        assert 0 < before < STEPS
        run.wait_for(f'ar {before + 2}/{STEPS}')
        run.started[1].send_signal(signal.SIGTERM)
        assert run.end(120) == [143, 143], run.err
        step = int(run.err[0].split('SIGTERM: saved at step ')[1].split()[0])
        assert before < step < STEPS
        assert (checkpoints / str(step)).is_dir()
        assert 'Traceback' not in ''.join(run.err)
    with start(tmp_path / 'last', 2, 1, *words) as run:
        assert run.end() == [0, 0], run.err
        assert f'ar: goes on from step {step}\n' in run.out[0]
        assert not list(checkpoints.glob('damaged-*'))
    assert load_config(tmp_path / 'w').tokenizer == tokenizer
    assert _fingerprint(tmp_path / 'w') == _fingerprint(alone)
    assert (tmp_path / 'w' / 'samples.png').read_bytes() == (alone / 'samples.png').read_bytes()
    assert _scores(tmp_path / 'w') == _scores(alone)
    logged = [
        json.loads(line)['step']
        for line in (tmp_path / 'w' / 'ar' / 'metrics.jsonl').read_text().splitlines()
    ]
    assert logged == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    'where, how, culprit, code, line',
    [
        ('collective', 'mistake', 1, 2, 'error: a mistake'),
        ('barrier', 'mistake', 0, 2, 'error: a mistake'),
        ('exit', 'mistake', 2, 2, 'error: a mistake'),
        ('saving', 'mistake', 1, 2, 'error: a mistake'),
        ('collective', 'SIGINT', 0, 128 + signal.SIGINT, 'interrupted; the same command goes on'),
    ],
)
def test_what_stops_one_process_ends_all(start, tmp_path, where, how, culprit, code, line):
    """They end wherever they are.

    The first process, through which they hear it, does not end too soon.
    """
    words = (tmp_path / 'w', where, how, culprit, joining.SILENCE)
    with start(tmp_path / 'said', 3, 1, *words) as run:
        assert run.end(120) == [code] * 3, run.err
        for said in run.err:
            assert said == f'process {culprit} of 3 ({socket.gethostname()}): {line}\n'


@pytest.mark.parametrize(
    'where, how, culprit, silence',
    [
        (
            'collective',
            'SIGKILL',
            0,
            joining.SILENCE,
        ),  # its end takes JAX's coordination service away
        pytest.param('closing', 'SIGKILL', 1, 5, marks=pytest.mark.slow),
        pytest.param('closing', 'SIGKILL', 1, joining.SILENCE, marks=pytest.mark.slow),
        pytest.param('exit', 'SIGKILL', 1, joining.SILENCE, marks=pytest.mark.slow),
        pytest.param('collective', 'SIGSTOP', 1, joining.SILENCE, marks=pytest.mark.slow),
    ],
)
def test_nobody_waits_for_a_lost_process(start, capsys, tmp_path, where, how, culprit, silence):
    """Nor does the clean-up in which a save waits for it. There is no half step afterwards."""
    words = (tmp_path / 'w', where, how, culprit, silence)
    with start(tmp_path / 'said', 3, 1, *words) as run:
        others = [process for i, process in enumerate(run.started) if i != culprit]
        assert [process.wait(120) for process in others] == [ABORTED] * 2, run.err
        if where == 'closing':
            # When JAX aborted, the main threads were inside it, or told the others that the save
            # had failed, which they had heard from the connection that broke.
            inside = re.compile(
                r'/runtime/(checkpoint\.py", line \d+ in close|ending\.py", line \d+ in tell)\n'
            )
            assert all(inside.search(process.err) for process in others), run.err
    checkpoints = checkpoint.Checkpoints(tmp_path / 'w', read_only=True)
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, _, _ = checkpoints.restore({'a': jax.ShapeDtypeStruct((8,), np.float32, sharding=whole)})
    np.testing.assert_array_equal(state['a'], checkpoints.steps()[-1] * np.arange(8))
    assert capsys.readouterr().err == ''  # the newest step was read


def test_a_mistake_of_the_command_line_ends_both(start, tmp_path):
    """The first process waits in a collective for the last one, whose mesh is not possible."""
    wrong = ['--config.mesh.data=999']
    with start(tmp_path / 'said', 2, 1, TINY, f'--workdir={tmp_path / "w"}', of_last=wrong) as run:
        assert run.end(120) == [2, 2], run.err
        reason = 'mesh.data 999, mesh.fsdp 1, mesh.tensor 1: not possible with 2 device(s)'
        line = f'process 1 of 2 ({socket.gethostname()}): error: {reason}'
        for said in run.err:
            assert said.splitlines()[-1] == line
    assert not (tmp_path / 'w' / 'config.json').exists()  # the workdir stays free


@pytest.mark.slow
def test_processes_of_another_config_do_not_train_together(start, tmp_path):
    """Both name what they differ in, and the workdir stays free."""
    words = (TINY, f'--workdir={tmp_path / "w"}')
    others = ('--config.seed=5', '--config.ar_training.learning_rate=0.5')
    with start(tmp_path / 'said', 2, 1, *words, of_last=others) as run:
        assert run.end(120) == [2, 2], run.err
        reason = 'the processes of this run differ in ar_training.learning_rate, seed: start'
        for said in run.err:
            assert reason in said
            assert 'Traceback' not in said
    assert not (tmp_path / 'w' / 'config.json').exists()


def test_a_workdir_in_use_is_refused_in_all_processes(start, tmp_path):
    """The first process alone looks at the lock, and tells the other one."""
    with files.owned(str(tmp_path / 'w'), 'a training'):
        before = sorted(os.listdir(tmp_path / 'w'))
        with start(tmp_path / 'said', 2, 1, TINY, f'--workdir={tmp_path / "w"}') as run:
            assert run.end(120) == [2, 2], run.err
            for said in run.err:
                line = said.splitlines()[-1]
                assert line.startswith(f'process 0 of 2 ({socket.gethostname()}): error: ')
                assert f'in use by a training, process {os.getpid()} on ' in line
        assert sorted(os.listdir(tmp_path / 'w')) == before


def test_a_mesh_without_a_process_is_refused(start, tmp_path):
    """Both processes say so at the same time."""
    words = (TINY, f'--workdir={tmp_path / "w"}', '--config.mesh.data=1')
    with start(tmp_path / 'said', 2, 1, *words) as run:
        assert run.end(120) == [2, 2], run.err
        for said in run.err:
            assert 'leaves out all devices of 1 process(es), start fewer of them' in said
            assert 'Traceback' not in said


@pytest.mark.parametrize(
    'environ, count',
    [
        ({}, None),
        ({'JAX_NUM_PROCESSES': '4'}, 4),
        (  # A process that was set apart by hand inside a step of SLURM.
            {'JAX_NUM_PROCESSES': '1', 'SLURM_STEP_NODELIST': 'a,b', 'SLURM_NTASKS': '4'},
            1,
        ),
        ({'SLURM_STEP_NODELIST': 'a,b', 'SLURM_NTASKS': '16'}, 16),
        ({'SLURM_NTASKS': '16'}, None),  # sbatch, not srun
        ({'OMPI_COMM_WORLD_SIZE': '3'}, 3),
        ({'TPU_WORKER_HOSTNAMES': 'a,b,c,d'}, 4),
        ({'TPU_WORKER_HOSTNAMES': 'a,b', 'MEGASCALE_NUM_SLICES': '2'}, 4),
    ],
)
def test_how_many_are_expected(environ, count):
    assert joining.expected(environ)[0] == count


@pytest.mark.slow
def test_on_other_numbers_of_processes_and_other_meshes(start, words, alone, tmp_path):
    """On 2, 4 and 1 processes and meshes of all kinds: to rounding the state of one process alone.

    Between two starts the newest checkpoint is damaged: both processes skip it.
    """
    words = *words, f'--workdir={tmp_path / "w"}', '--config.ar_training.checkpoint_every=2'
    checkpoints = tmp_path / 'w' / 'ar' / 'checkpoints'

    def part(count, devices, until, *mesh):
        with start(tmp_path, count, devices, *words, *mesh) as run:
            if until is not None:
                run.wait_for(until)
                run.started[-1].send_signal(signal.SIGTERM)
            assert set(run.end()) == {0 if until is None else 143}, run.err
            return run.out[0], run.err

    part(2, 2, f'ar 5/{STEPS}', '--config.mesh.fsdp=4', '--config.mesh.data=1')
    newest = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    largest = max(
        (p for p in (newest / 'state').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    said, errors = part(2, 2, f'ar 10/{STEPS}', '--config.mesh.fsdp=2', '--config.mesh.tensor=2')
    assert f'{newest} cannot be read' in errors[0]
    assert f'{newest} cannot be read' in errors[1]
    assert int(said.split('goes on from step ')[1].split()[0]) < int(newest.name)
    assert (checkpoints / f'damaged-{newest.name}').is_dir()
    part(4, 1, f'ar 15/{STEPS}', '--config.mesh.fsdp=2')
    part(1, 2, None)
    runs = [load_run(str(workdir)) for workdir in (alone, tmp_path / 'w')]
    chex.assert_trees_all_close(
        *(jax.device_get(run.ar_params) for run in runs), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_a_tokenizer_of_two_processes(start, tmp_path):
    """Its state is, bit for bit, that of one process with as many devices."""
    words = (TINY, '--config.ar_training.steps=0')
    for name, count, devices in (('one', 1, 2), ('two', 2, 1)):
        with start(tmp_path, count, devices, *words, f'--workdir={tmp_path / name}') as run:
            assert set(run.end()) == {0}, run.err
    one, two = (_fingerprint(tmp_path / name, 'tokenizer', 6) for name in ('one', 'two'))
    assert one == two


@pytest.mark.slow
def test_samples_and_scores_of_any_number_of_processes(start, alone, tmp_path):
    """They are those of one process with as many devices. Others have other batches, hence other
    roundings.
    """

    def job(count, devices, *words):
        with start(tmp_path, count, devices, TINY, f'--workdir={alone}', *words) as run:
            assert set(run.end()) == {0}, run.err

    for count, devices in (1, 2), (2, 1), (4, 1):
        job(count, devices, '--mode=sample', f'--output={tmp_path}/{count}.npz')
    one, two, four = (np.load(f'{tmp_path}/{count}.npz') for count in (1, 2, 4))
    assert one['arr_0'].shape == (40, 16, 16, 1)
    np.testing.assert_array_equal(one['arr_0'], two['arr_0'])
    assert np.abs(one['arr_0'].astype(int) - four['arr_0']).max() <= 1
    for other in two, four:
        np.testing.assert_array_equal(one['arr_1'], other['arr_1'])
    job(2, 1, '--mode=evaluate')
    scores = json.loads((alone / 'evaluation.json').read_text())
    trained = _scores(alone)
    assert scores['samples/classes_drawn'] > 0
    drawn = json.loads((tmp_path / '2.npz.json').read_text())
    assert scores.pop('parameters') == drawn['parameters']
    numbers = {
        name: value for name, value in scores.items() if name not in ('seed', 'sampling', 'dtype')
    }
    assert numbers == {name: trained[name] for name in numbers}
    assert scores['seed'] == get_config().seed
    assert scores['dtype'] == 'float32'
