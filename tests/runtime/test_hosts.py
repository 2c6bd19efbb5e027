"""Several processes as one run: real ones, on this machine, over loopback (CPUs, Gloo)."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.runtime import checkpoint, files, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.run import load_run
from tests.tiny_config import get_config

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
GONE = 'another process of this run is gone or does not answer: stopped; start all of them again, the run goes on'
# What Gloo prints, whose threads may interrupt each other in the middle of a line
GLOO = re.compile(r'\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|[\d\s]')


def free_port():
    """A port below those that systems give to whoever asks for any."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as s:
            port = random.randrange(20000, 30000)
            s.bind(('localhost', port))
            return port


class Processes:
    """So many processes of `main`, of so many devices each, as one run. out, err: what each has printed so far."""

    def __init__(self, directory, count, devices, *words, of_last=()):
        directory.mkdir(exist_ok=True)
        port = free_port()
        self._paths = [directory / f'{i}-{port}' for i in range(count)]
        self.started = []
        for i, path in enumerate(self._paths):
            joined = {
                'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': str(count),
                'JAX_PROCESS_ID': str(i),
            }  # fmt: skip
            environment = os.environ | (joined if count > 1 else {}) | {
                'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
                'PYTHONPATH': str(ROOT), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            }  # fmt: skip
            mine = [*words, *(of_last if i == count - 1 else ())]
            command = [sys.executable, '-m', 'tests.hosts_main', '--config=tests/tiny_config.py', *map(str, mine)]
            with open(f'{path}.out', 'w') as out, open(f'{path}.err', 'w') as err:
                self.started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err))

    @property
    def out(self):
        return [pathlib.Path(f'{path}.out').read_text() for path in self._paths]

    @property
    def err(self):
        return [pathlib.Path(f'{path}.err').read_text() for path in self._paths]

    def wait_for(self, text):
        """Until the first process has printed a text."""
        end = time.monotonic() + 900
        while True:
            ended = self.started[0].poll() is not None
            if text in self.out[0]:
                return
            assert time.monotonic() < end and not ended, (text, self.out, self.err)
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
            process.kill()
            process.wait()


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """Of a training of the AR model on a tokenizer with weights at random, which needs no training."""
    cfg, tokenizer = get_config(), tmp_path_factory.mktemp('tokenizer')
    weights = checkpoint.Checkpoints(tokenizer / 'tokenizer' / 'weights')
    weights.save(0, jax.jit(build.build_vae(cfg).init_params)(jax.random.key(1)), {}, 0.0)
    weights.close()
    files.write_json(f'{tokenizer}/config.json', schema.as_dict(cfg))
    return (
        f'--config.tokenizer={tokenizer}', '--config.tokenizer_training.steps=0', f'--config.ar_training.steps={STEPS}',
        '--config.ar_training.checkpoint_every=4', '--config.ar_training.log_every=1',
    )  # fmt: skip


def _fingerprint(workdir, stage='ar', step=STEPS):
    """Of every bit of the state."""
    return json.loads((workdir / stage / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text())['fingerprint']


def _scores(workdir):
    scores = json.loads((workdir / 'metrics.json').read_text())
    return {name: value for name, value in scores.items() if not name.startswith(('wall_s', 'peak'))}


@pytest.fixture(scope='module')
def alone(words, tmp_path_factory):
    """Workdir of the undisturbed run of one process with two devices."""
    workdir = tmp_path_factory.mktemp('alone')
    with Processes(workdir / 'said', 1, 2, f'--workdir={workdir}', *words) as run:
        assert run.end() == [0], run.err
    return workdir


@pytest.mark.slow
def test_two_processes_killed_told_to_stop_and_going_on_are_one(words, alone, tmp_path):
    """Two processes: one is killed, and the other stops; one gets SIGTERM, and both save the same step; what they train
    and draw in the end is, bit for bit, what one process with two devices does alone."""
    words = f'--workdir={tmp_path / "w"}', *words
    with Processes(tmp_path / 'killed', 2, 1, *words) as run:
        run.wait_for(f'ar 10/{STEPS}')
        run.started[1].kill()
        killed = time.monotonic()
        assert run.end(60) == [hosts.LOST, -signal.SIGKILL], run.err
        assert time.monotonic() - killed < 60
        said = [line for line in run.err[0].splitlines() if line]
        assert said[-1].startswith(f'process 0 of 2: {GONE}') and 'Traceback' not in run.err[0]
    checkpoints = tmp_path / 'w' / 'ar' / 'checkpoints'
    with Processes(tmp_path / 'told', 2, 1, *words) as run:
        run.wait_for('ar: goes on from step ')
        before = int(run.out[0].split('goes on from step ')[1].split()[0])
        assert before % 4 == 0 and 0 < before < STEPS
        run.wait_for(f'ar {before + 2}/{STEPS}')
        run.started[1].terminate()
        assert run.end(120) == [143, 143], run.err
        step = int(run.err[0].split('SIGTERM: saved at step ')[1].split()[0])
        assert before < step < STEPS and (checkpoints / str(step)).is_dir() and 'Traceback' not in ''.join(run.err)
    with Processes(tmp_path / 'last', 2, 1, *words) as run:
        assert run.end() == [0, 0], run.err
        assert f'ar: goes on from step {step}\n' in run.out[0] and not list(checkpoints.glob('damaged-*'))
    assert _fingerprint(tmp_path / 'w') == _fingerprint(alone)
    assert (tmp_path / 'w' / 'samples.png').read_bytes() == (alone / 'samples.png').read_bytes()
    assert _scores(tmp_path / 'w') == _scores(alone)
    logged = [json.loads(line)['step'] for line in (tmp_path / 'w' / 'ar' / 'metrics.jsonl').read_text().splitlines()]
    assert logged == list(range(1, STEPS + 1))


def test_a_mistake_in_one_process_ends_both(words, tmp_path):
    wrong = ['--config.mesh.data=999']
    with Processes(tmp_path / 'said', 2, 1, f'--workdir={tmp_path / "w"}', *words, of_last=wrong) as run:
        assert run.end(120) == [2, 2], run.err
        reason = 'mesh.data 999, mesh.fsdp 1, mesh.tensor 1: not possible with 2 device(s)'
        assert run.err[1].splitlines()[-1] == f'error: {reason}', run.err
        assert run.err[0].splitlines()[-1] == f'process 1 of 2 ({socket.gethostname()}) ended: {reason}', run.err
    assert not (tmp_path / 'w' / 'config.json').exists()  # the workdir stays free


def test_a_mesh_without_a_process_is_refused(words, tmp_path):
    wrong = '--config.mesh.data=1'
    with Processes(tmp_path / 'said', 2, 1, f'--workdir={tmp_path / "w"}', wrong, *words) as run:
        assert run.end(120) == [2, 2], run.err
        assert 'mesh.tensor 1: leaves out all devices of 1 process(es), start fewer of them' in run.err[0]


@pytest.mark.parametrize(
    'environ, count',
    [
        ({}, None),
        ({'JAX_NUM_PROCESSES': '4'}, 4),
        ({'SLURM_STEP_NODELIST': 'a,b', 'SLURM_NTASKS': '16'}, 16),
        ({'SLURM_NTASKS': '16'}, None),  # sbatch, not srun
        ({'OMPI_COMM_WORLD_SIZE': '3'}, 3),
        ({'TPU_WORKER_HOSTNAMES': 'a,b,c,d'}, 4),
        ({'TPU_WORKER_HOSTNAMES': 'a,b', 'MEGASCALE_NUM_SLICES': '2'}, 4),
    ],
)
def test_how_many_are_expected(environ, count):
    assert hosts.expected(environ)[0] == count


@pytest.mark.parametrize(
    'error, lost',
    [
        ('UNKNOWN: Gloo all-reduce failed: [external/gloo/transport/tcp/pair.cc:547] Connection closed by peer', 1),
        ('UNAVAILABLE: Socket closed', 1),
        ('INVALID_ARGUMENT: Executable expected shape f32[2]', 0),
        ('RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes', 0),
    ],
)
def test_which_errors_say_that_another_is_gone(monkeypatch, error, lost):
    assert not hosts.is_lost(ValueError(error))  # alone
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    assert hosts.is_lost(ValueError(error)) == hosts.is_lost(jax.errors.JaxRuntimeError(error)) == bool(lost)
    assert not hosts.is_lost(UserError(error)) and not hosts.is_lost(OSError(error))  # of this process's own


ABORTED = """
import _thread, ctypes, json, os, sys, time
import jax
from jax._src import distributed
from sphere_ar_jax.runtime import hosts

class Client:  # of a service that goes away while this process waits for the others
    def key_value_set(self, *_): pass
    def blocking_key_value_get(self, *_):
        if sys.argv[1] != 'told':
            time.sleep(60)
        return json.dumps([0, 'there', 3, 'no images'])
    def wait_at_barrier(self, *_):
        self.gone()
    def gone(self):
        _thread.start_new_thread(getattr(ctypes.CDLL(None), 'raise'), (6,))
        time.sleep(60)

def logs_at_the_end(code, leave=os._exit):  # as JAX's threads do that hear of the others' end
    os.write(2, b'Socket closed')
    leave(code)

os._exit = logs_at_the_end
distributed.global_state.client, distributed.global_state.process_id = Client(), 1
distributed.global_state.num_processes = 2
hosts._end_together()
if sys.argv[1] == 'stopping':
    hosts.stop(2, 'a mistake')
elif sys.argv[1] == 'training':
    distributed.global_state.client.gone()
elif sys.argv[1] == 'refused':  # what it waits for fails, while it waits to end with the others
    hosts._settled.append((3, 'process 0 of 2 (there) ended: no images'))
    hosts.end_if_lost(RuntimeError('UNAVAILABLE: Socket closed'))
elif sys.argv[1].startswith('leaving'):  # and waits for the others, of whom one vanishes: JAX aborts or raises
    def shutdown():
        os.write(2, b'fatal errors')
        os.abort() if sys.argv[1] == 'leaving' else distributed.global_state.vanished
    jax.distributed.shutdown = shutdown
    sys.exit()
time.sleep(60)
"""


@pytest.mark.parametrize(
    'state, code, said',
    [
        ('training', hosts.LOST, f'process 1 of 2: {GONE}'),
        ('stopping', 2, ''),
        ('told', 3, 'process 0 of 2 (there) ended: no images'),
        ('refused', 3, 'process 0 of 2 (there) ended: no images'),
        ('leaving', hosts.LOST, f'process 1 of 2: {GONE}'),
        ('leaving, told so', hosts.LOST, f'process 1 of 2: {GONE}'),
    ],
)
def test_the_exit_code_is_that_of_why_all_end(state, code, said):
    """JAX aborts a process whose coordinator is gone, also if it is because all end, and logs it after our line."""
    done = subprocess.run([sys.executable, '-c', ABORTED, state], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.strip()) == (code, said)


@pytest.mark.slow
@pytest.mark.parametrize('victim, number', [(0, signal.SIGKILL), (1, signal.SIGSTOP)], ids=['the first', 'hanging'])
def test_no_process_waits_for_one_that_is_gone(words, tmp_path, victim, number):
    """The first, whose end takes JAX's coordination service away; and one that does not die, but hangs."""
    with Processes(tmp_path / 'said', 2, 1, f'--workdir={tmp_path / "w"}', *words) as run:
        run.wait_for(f'ar 10/{STEPS}')
        run.started[victim].send_signal(number)
        assert run.started[1 - victim].wait(60) == hosts.LOST, run.err
        said = [line for line in run.err[1 - victim].splitlines() if line]
        assert said[-1].startswith(f'process {1 - victim} of 2: {GONE}') and len(said) < 60, said


@pytest.mark.slow
def test_on_other_numbers_of_processes_and_other_meshes(tmp_path):
    """Both stages, on 2, 1 and 4 processes and meshes of all kinds: to rounding the state of one process alone. Between
    two starts the newest checkpoint is damaged: both processes skip it. One of four is killed, and all stop. Then
    samples and scores of any number of processes."""
    steps = [f'--config.{stage}_training.{key}' for stage in ('tokenizer', 'ar')
             for key in ('steps=16', 'checkpoint_every=2', 'log_every=1')]  # fmt: skip
    with Processes(tmp_path, 1, 2, f'--workdir={tmp_path / "alone"}', *steps) as run:
        assert run.end() == [0], run.err
    words, checkpoints = (f'--workdir={tmp_path / "w"}', *steps), tmp_path / 'w' / 'tokenizer' / 'checkpoints'

    def part(count, devices, until, *mesh):
        with Processes(tmp_path, count, devices, *words, *mesh) as run:
            if until is not None:
                run.wait_for(until)
                run.started[-1].terminate()
            assert set(run.end()) == {0 if until is None else 143}, run.err
            return run.out[0], run.err

    part(2, 2, 'tokenizer 5/16', '--config.mesh.fsdp=4', '--config.mesh.data=1')
    newest = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    largest = max((p for p in (newest / 'state').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    said, errors = part(2, 2, 'tokenizer 10/16', '--config.mesh.fsdp=2', '--config.mesh.tensor=2')
    assert f'{newest} cannot be read' in errors[0] and f'{newest} cannot be read' in errors[1]
    assert int(said.split('goes on from step ')[1].split()[0]) < int(newest.name)
    assert (checkpoints / f'damaged-{newest.name}').is_dir()
    part(1, 1, 'ar 4/16')
    with Processes(tmp_path, 4, 1, *words, '--config.mesh.fsdp=2') as run:
        run.wait_for('ar 8/16')
        run.started[2].kill()
        assert run.end(60) == [hosts.LOST, hosts.LOST, -signal.SIGKILL, hosts.LOST], run.err
        assert all(run.err[i].splitlines()[-1].startswith(f'process {i} of 4: {GONE}') for i in (0, 1, 3)), run.err
    part(4, 1, None, '--config.mesh.fsdp=2')
    runs = [load_run(str(tmp_path / name)) for name in ('alone', 'w')]
    for name in ('vae_params', 'ar_params'):
        chex.assert_trees_all_close(*(jax.device_get(getattr(run, name)) for run in runs), rtol=1e-3, atol=1e-4)

    def job(count, devices, *words):
        with Processes(tmp_path, count, devices, f'--workdir={tmp_path / "w"}', *words) as run:
            assert set(run.end()) == {0}, run.err

    scores = []
    for count, devices in (1, 2), (2, 1), (4, 1):
        job(count, devices, '--mode=sample', f'--output={tmp_path}/{count}.npz')
    for count, devices in (1, 2), (2, 1):
        job(count, devices, '--mode=evaluate')
        scores.append(json.loads((tmp_path / 'w' / 'evaluation.json').read_text()))
    one, two, four = (np.load(f'{tmp_path}/{count}.npz') for count in (1, 2, 4))
    assert one['arr_0'].shape == (40, 16, 16, 1)
    np.testing.assert_array_equal(one['arr_0'], two['arr_0'])  # both of two devices
    assert np.abs(one['arr_0'].astype(int) - four['arr_0']).max() <= 1  # of four: other batches, other roundings
    for other in two, four:
        np.testing.assert_array_equal(one['arr_1'], other['arr_1'])
    assert scores[0] == scores[1] and scores[0]['samples/classes_drawn'] > 0
