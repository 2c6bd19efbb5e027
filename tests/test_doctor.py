"""The doctor: what it counts, against closed forms and real states; what it refuses, in one line;
joining processes.
"""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from sphere_ar_jax import doctor
from sphere_ar_jax.commands import host_checks
from sphere_ar_jax.config import build, recipes, schema
from sphere_ar_jax.data import sources
from sphere_ar_jax.measure import costs, programs
from sphere_ar_jax.runtime import console, ending, joining, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.files import write_json
from tests import tiny_config
from tests.runtime.test_hosts import free_port

ROOT = pathlib.Path(__file__).parent.parent
TINY = '--config=tests/tiny_config.py'


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def _examined(capsys, *words):
    """(exit code, lines printed) of the doctor in this process."""
    code = doctor.main(['doctor', *words])
    return code, capsys.readouterr().out.splitlines()


def _line(lines, name):
    """All that is said by the check of a name, in one line."""
    start = next(i for i, line in enumerate(lines) if line[6:].startswith(f'{name} '))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(' '))
    return ' '.join(' '.join(lines[start:end]).split())


# ---- the screen


def test_a_run_that_is_all_right(capsys, tmp_path):
    workdir = tmp_path / 'runs' / 'a'
    code, lines = _examined(
        capsys,
        TINY,
        f'--workdir={workdir}',
        '--config.ar_training.keep=3',
        '--columns=3',
        '--classes',
        '3',
    )
    assert code == 0
    assert lines[-1].startswith('0 failed')
    assert max(map(len, lines)) <= host_checks.WIDTH
    assert len(lines) <= 24
    assert (
        _line(lines, 'processes')
        == f'ok processes process 0 of 1, with {jax.device_count()} device(s)'
    )
    assert f'jax {jax.__version__}' in _line(lines, 'versions')
    assert _line(lines, 'mesh') == f'ok mesh data {jax.device_count()}, fsdp 1, tensor 1'
    assert '1438 images to train on, 10 classes' in _line(lines, 'data')
    assert os.environ['JAX_COMPILATION_CACHE_DIR'] in _line(lines, 'cache').replace(' ', '')
    assert 'not looked at: --columns=3 --classes 3' in _line(lines, 'flags')
    assert _line(lines, 'inputs') == 'ok inputs nothing is read but images'
    assert f'{workdir} can be written; checkpoints will take' in _line(lines, 'workdir')
    assert list(tmp_path.iterdir()) == []  # nothing was left


def test_a_run_that_cannot_be(capsys):
    code, lines = _examined(capsys, TINY, '--workdir=/dev/null/x', '--data=folder:/nowhere')
    assert code == 1
    assert lines[-1].startswith('2 failed')
    assert _line(lines, 'workdir') == 'FAIL workdir /dev/null/x cannot be written: Not a directory'
    assert 'FAIL data /nowhere cannot be read: No such file or directory' in _line(lines, 'data')


def test_what_else_a_training_reads(capsys, tmp_path):
    for words, said in [
        (
            ('--config.tokenizer_training.steps=0',),
            'no tokenizer was converted into the workdir: give --config.tok',
        ),
        ((f'--config.tokenizer={tmp_path}',), f'tokenizer: there is no run in {tmp_path}'),
    ]:
        code, lines = _examined(capsys, TINY, *words)
        assert code == 1
        assert _line(lines, 'inputs').startswith('FAIL')
        assert said.replace(' ', '') in _line(lines, 'inputs').replace(' ', '')
    write_json(f'{tmp_path}/config.json', schema.as_dict(tiny_config.get_config()))
    code, lines = _examined(capsys, TINY, f'--config.tokenizer={tmp_path}')
    assert code == 0
    assert _line(lines, 'inputs').replace(' ', '') == f'okinputs{tmp_path}'
    with pytest.raises(
        ValueError,
        match=r"no path to taming-transformers' vgg.pth and no path to torchvision's vgg16",
    ):
        host_checks.check_inputs(recipes.published_vae(''), None)


def test_of_other_modes_no_training_is_looked_at(capsys):
    code, lines = _examined(capsys, '--config=configs/ar_l.py', '--mode=sample')
    assert code == 0
    assert 'of --mode=sample only the machine and the workdir are looked at' in _line(
        lines, 'flags'
    )
    assert not any(line[6:].startswith(('data', 'inputs', 'memory', 'mesh')) for line in lines)
    code, lines = _examined(capsys, '--config=configs/ar_l.py')
    assert code == 1
    assert all(_line(lines, name).startswith('FAIL') for name in ('data', 'inputs'))


def test_what_the_mesh_does_not_split(capsys):
    code, lines = _examined(
        capsys, TINY, '--config.ar.heads=1', '--config.mesh.tensor=2', '--config.mesh.data=1'
    )
    if jax.device_count() > 1:
        assert code == 0
        assert 'WARN mesh ar: not split by mesh.tensor, which does not divide: ' in ' '.join(
            ' '.join(lines).split()
        )
    else:
        assert code == 1
        assert 'not possible with 1 device(s)' in _line(lines, 'mesh')


def test_a_config_that_cannot_be(capsys):
    code, lines = _examined(capsys, TINY, '--config.ar.heads=3')
    assert code == 1
    assert _line(lines, 'config') == 'FAIL config ar: 3 heads do not divide the width 16'
    code, lines = _examined(capsys, TINY, '--config.mesh.data=999')
    assert code == 1
    assert 'mesh.data 999, mesh.fsdp 1, mesh.tensor 1: not possible' in _line(lines, 'mesh')


def test_an_impossible_brightness_is_one_line(capsys):
    code, lines = _examined(capsys, TINY, '--config.data.brightness=(0.2,)')
    said = ' '.join(lines)
    assert code == 1
    assert 'not enough values' not in said
    assert 'data.brightness' in said


def test_some_classes_of_a_small_data_set(capsys):
    """The data are those of the config, and not all that there are."""
    _, lines = _examined(capsys, TINY, '--config.data.classes=(0,1)')
    assert '2 classes: 0, 1' in _line(lines, 'data')
    assert not any(line.startswith('FAIL') for line in lines)


@pytest.mark.parametrize(
    'words, said',
    [
        (['--config=configs/nope.py'], 'nope.py'),
        (['--config=configs/digits.py:huge'], "no variant 'huge'"),
        ([TINY, '--config.ar.width=wide'], 'invalid literal'),
        ([TINY, '--config.ar.widht=3'], 'width'),
        (['--timeout=never'], 'timeout'),
        (['--timeout=0'], 'timeout'),
    ],
)
def test_wrong_flags_are_said_in_one_line(capsys, words, said):
    assert doctor.main(['doctor', *words]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert said in err


def test_long_texts_are_wrapped():
    check = host_checks.Check('data', 'WARN', 'word ' * 60 + '\n' + 'x' * 250 + '\nlast')
    found = host_checks.lines(check)
    assert max(map(len, found)) <= 100
    assert found[-1].split() == ['last']
    assert ''.join(''.join(found).split()) == 'WARNdata' + 'word' * 60 + 'x' * 250 + 'last'


@pytest.mark.parametrize(
    'count, text',
    [
        (0, '0 B'),
        (1023, '1023 B'),
        (1024, '1.0 KiB'),
        (3 * 2**29, '1.5 GiB'),
        (2**52, '4096.0 TiB'),
    ],
)
def test_sizes(count, text):
    assert console.size(count) == text


def test_what_does_not_answer_is_given_up():
    assert host_checks.limited(lambda: 7, 5) == 7
    with pytest.raises(KeyError, match='gone'):
        host_checks.limited(lambda: {}['gone'], 5)
    gate = threading.Event()
    # Whoever gives signs of progress is waited for.
    threading.Timer(0.3, gate.set).start()
    assert host_checks.limited(gate.wait, 0.05, lambda: time.monotonic() + 1)
    gate.clear()
    said = []
    examination = host_checks.Examination(0.05, said.append)
    assert examination.run('data', gate.wait, slow='wait for it') is None
    gate.set()
    assert examination.failed == 1
    assert examination.stuck
    assert said == ['FAIL  data        no answer in 0.05 s: wait for it']


def test_what_breaks_is_said_and_the_rest_goes_on():
    said = []
    examination = host_checks.Examination(5, said.append)
    examination.check('one', lambda: [][1])
    examination.check('two', lambda: None.shape)
    examination.check('three', lambda: host_checks.Check('three', 'WARN', 'well'))
    assert (examination.failed, examination.warned, examination.stuck) == (2, 1, False)
    assert said[0] == 'FAIL  one         list index out of range'
    assert said[1].startswith('FAIL  two         AttributeError: ')
    assert said[2] == 'WARN  three       well'


# ---- the machine


def test_missing_packages():
    def version(name):
        if name in ('flax', 'libtpu'):
            raise host_checks.importlib.metadata.PackageNotFoundError(name)
        return '1.2'

    check = host_checks.check_versions(version)
    assert check.status == 'FAIL'
    assert 'not installed: flax; pip install' in check.text
    assert 'flax –' in check.text
    assert 'libtpu –' in check.text
    assert 'grain 1.2' in check.text
    assert host_checks.check_versions(lambda name: '1.2').status == 'ok'


def test_a_package_that_is_missing_is_no_traceback():
    code = (
        'import sys; sys.modules["optax"] = None\n'
        'from sphere_ar_jax import doctor\n'
        'sys.exit(doctor.main(["x"]))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 1
    assert done.stderr == ''
    assert done.stdout.startswith('FAIL  package     cannot be imported: ')
    assert 'optax' in done.stdout


def _device(platform, kind, stats=None):
    return types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats)


def test_devices():
    gpus = [_device('gpu', 'H100', {'bytes_limit': 64 * 2**30})] * 8
    assert sharding.memory_limit(gpus[0], 4) == 64 * 2**30
    assert host_checks.check_devices(
        gpus, gpus[:4], 64 * 2**30, ('an NVIDIA GPU', 'cuda12')
    ) == host_checks.Check('devices', 'ok', '4 here of 8 gpu device(s): 4 × H100; 64.0 GiB each')
    assert sharding.memory_limit(_device('tpu', 'v6e'), 4) is None
    assert 'memory unknown' in host_checks.check_devices(gpus, gpus, None, None).text


def test_an_accelerator_that_is_not_used():
    cpu = [_device('cpu', 'cpu')]
    assert host_checks.check_devices(cpu, cpu, 2**30, None).status == 'ok'
    for file, extra in (
        ('/dev/nvidia0', '[cuda12]'),
        ('/dev/accel0', '[tpu]'),
        ('/dev/vfio/0', '[tpu]'),
    ):
        check = host_checks.check_devices(
            cpu, cpu, 2**30, host_checks.device_files({file}.__contains__)
        )
        assert check.status == 'WARN'
        assert extra in check.text
    assert host_checks.device_files(lambda path: False) is None


@pytest.mark.skipif(not os.path.exists('/proc/meminfo'), reason='Linux only')
def test_the_memory_of_cpus(monkeypatch, tmp_path):
    kilobytes = int(pathlib.Path('/proc/meminfo').read_text().split('MemTotal:')[1].split()[0])
    monkeypatch.setattr(sharding, '_CONTAINER_LIMIT', str(tmp_path / 'none'))
    assert abs(sharding.memory_limit(_device('cpu', 'cpu'), 2) - kilobytes * 512) < 2**20
    for text, expected in (('max\n', kilobytes * 512), ('1048576\n', 2**19)):
        file = tmp_path / 'memory.max'
        file.write_text(text)
        monkeypatch.setattr(sharding, '_CONTAINER_LIMIT', str(file))
        assert abs(sharding.memory_limit(_device('cpu', 'cpu'), 2) - expected) < 2**20


def test_the_compilation_cache(tmp_path):
    for name, count in {'a-cache': 2**20, 'a-atime': 8, 'b-cache': 2**20}.items():
        (tmp_path / name).write_bytes(bytes(count))

    def cache(name, place):
        return host_checks.check_cache({name: place})

    check = cache('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
    assert check == host_checks.Check('cache', 'ok', f'{tmp_path}: 2 compiled program(s), 2.0 MiB')
    assert cache('JAX_COMPILATION_CACHE_DIR', 'gs://b/c').text == 'gs://b/c'
    assert cache('JAX_COMPILATION_CACHE_DIR', '/no/where').text.startswith('/no/where: 0 compiled')
    assert cache('JAX_COMPILATION_CACHE_DIR', '').status == 'WARN'
    assert cache('XDG_CACHE_HOME', '/no/where').text.startswith('/no/where/sphere_ar_jax/')


# ---- the run

MESH = sharding.make_mesh(1)
KEY = jax.random.key(0)


def _bytes(function):
    """Bytes of what a function of a key would return."""
    return sum(
        leaf.size * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(jax.eval_shape(function, KEY))
    )


@pytest.mark.parametrize('disc_weight', [0.0, 0.5])
def test_memory_is_that_of_the_state(disc_weight):
    cfg = tiny_config.get_config()
    cfg.tokenizer_training.disc_weight = disc_weight
    cfg.ar_training.more_ema_decays = (0.99,)
    cfg.vae.grid = (8, 8)  # a discriminator needs 24×24 pixels
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)
    (_, (tokenizer, nothing)), (_, (model, frozen)) = programs.stages(cfg).items()
    parts = programs.state_bytes(tokenizer, nothing, MESH)
    n = _bytes(vae.init_params)
    assert (parts['params'], parts['gradients'], parts['ema'], parts['frozen']) == (n, n, 0, 0)
    assert sum(parts.values()) - n == _bytes(tokenizer.init) - 4  # the step: 4 bytes
    assert ('disc_params' in parts) == (disc_weight > 0)
    parts = programs.state_bytes(model, frozen, MESH)
    m = _bytes(ar.init_params)
    assert (parts['params'], parts['gradients'], parts['ema'], parts['frozen']) == (m, m, 2 * m, n)
    assert sum(parts.values()) - m - n == _bytes(model.init) - 4


def test_memory_of_the_published_model():
    """204,499,216 and 75,393,297 parameters of four bytes; AdamW has two moments."""
    cfg = recipes.published_ar('B')
    ((name, (stage, frozen)),) = programs.stages(cfg).items()
    parts = programs.state_bytes(stage, frozen, MESH)
    n = 4 * 204_499_216
    assert name == 'ar'
    assert parts['params'] == parts['ema'] == n
    assert parts['frozen'] == 4 * 75_393_297
    assert 0 <= parts['opt_state'] - 2 * n < 64  # and its counters
    check = host_checks.check_memory(name, parts, 80 * 2**30)
    assert check.status == 'ok'
    assert '4.1 GiB on each device' in check.text
    assert 'optimizer 1.5 GiB' in check.text
    assert host_checks.check_memory(name, parts, 5 * 2**30).status == 'WARN'
    assert host_checks.check_memory(name, parts, 4 * 2**30).status == 'FAIL'
    assert host_checks.check_memory(name, parts, None).status == 'ok'


def test_memory_of_a_distilled_head():
    cfg = tiny_config.get_config('distilled')
    cfg.init_from = '/somewhere'
    ((name, (stage, frozen)),) = programs.stages(cfg).items()
    parts = programs.state_bytes(stage, frozen, MESH)
    ar = build.build_ar(cfg)
    head = _bytes(lambda key: ar.init_params(key)['head'])
    teacher = _bytes(ar.clone(head=ar.head.teacher()).init_params) + _bytes(
        build.build_vae(cfg).init_params
    )
    assert name == 'distillation'
    assert parts['params'] == head
    assert parts['frozen'] == teacher
    cfg.distillation_training.transformer = True
    ((_, (stage, frozen)),) = programs.stages(cfg).items()
    parts = programs.state_bytes(stage, frozen, MESH)
    assert parts['params'] == _bytes(ar.init_params)
    assert parts['frozen'] == teacher


def test_trainings_that_are_not_run_take_nothing():
    cfg = tiny_config.get_config()
    cfg.tokenizer = '/somewhere'
    assert list(programs.stages(cfg)) == ['ar']
    cfg.ar_training.steps = 0
    assert programs.stages(cfg) == {}


def test_what_is_split_counts_once():
    mesh = sharding.make_mesh()

    def make(spec):
        return jax.ShapeDtypeStruct(
            (mesh.size * 3, 5), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
        )

    assert costs.device_bytes([make(PartitionSpec('data'))]) == 3 * 5 * 2
    assert costs.device_bytes({'a': make(PartitionSpec())}) == mesh.size * 3 * 5 * 2


@pytest.mark.parametrize(
    'data, fsdp, tensor, images, pieces, fits',
    [
        (8, 1, 1, 16, 1, True), (8, 1, 1, 12, 1, False), (8, 1, 1, 16, 2, True),
        (8, 1, 1, 24, 2, False), (2, 4, 2, 8, 1, True), (2, 4, 1, 12, 1, False),
    ],
)  # fmt: skip
def test_batches_split_over_the_mesh(data, fsdp, tensor, images, pieces, fits):
    mesh = jax.sharding.AbstractMesh((data, fsdp, tensor), ('data', 'fsdp', 'tensor'))
    check = host_checks.check_mesh(mesh, {'ar_training.batch_size': (images, pieces)})
    assert check.status == ('ok' if fits else 'FAIL')
    assert check.text.startswith(f'data {data}, fsdp {fsdp}')
    assert fits or '--config.ar_training.batch_size' in check.text


def test_the_users_own_directory_is_looked_at(tmp_path, monkeypatch, capsys):
    home = tmp_path / 'home'
    home.write_text('')
    monkeypatch.setenv('HOME', str(home))
    code, lines = _examined(capsys, '--workdir=~/new')
    # It lies in a file.
    assert code == 1
    assert f'{home}/new cannot be written' in _line(lines, 'workdir')
    cfg = schema.changed(tiny_config.get_config(), {'tokenizer': '~/none'})
    with pytest.raises(UserError, match=f'there is no run in {home}/none'):
        host_checks.check_inputs(cfg, str(tmp_path))


def test_the_first_row_of_an_experiment_is_looked_at(capsys, tmp_path):
    words = ['--config=experiments/sequences:smoke', f'--workdir={tmp_path}', '--mode=experiment']
    code, lines = _examined(capsys, *words)
    assert code == 0, lines
    assert f'{tmp_path} can be written; checkpoints will take' in _line(lines, 'workdir')
    assert '1438 images to train on, 10 classes' in _line(lines, 'data')


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--mode=trian'], 'flag --mode=trian: value should be one of'),
        (['--workdir='], '--workdir is empty: give a value'),
        (['foo'], 'foo is no flag of sphere_ar_jax.main'),
        (['--workdr=/tmp/x'], '--workdr=/tmp/x is no flag'),
        (['--columns=3', 'foo'], 'foo is no flag'),
        (['--timeout=nan'], '--timeout is nan: give seconds'),
    ],
)
def test_words_that_main_refuses_are_refused(capsys, words, message):
    assert doctor.main(['doctor', TINY, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')
    assert message in line


def test_checkpoints_that_do_not_fit(tmp_path):
    assert host_checks.check_workdir(str(tmp_path)).status in ('ok', 'WARN')
    options = tiny_config.get_config().ar_training
    options.keep = 1
    saved = {'ar': host_checks.Saved(2**59, options)}
    check = host_checks.check_workdir(str(tmp_path), saved)
    assert check.status == 'FAIL'
    assert 'checkpoints will take 1048576.0 TiB but only' in ' '.join(check.text.split())


def test_disk_that_checkpoints_take(tmp_path):
    cfg = tiny_config.get_config()
    cfg.mesh.data = 1
    cfg.ar_training.update(steps=100, keep=2, keep_every=10)
    cfg.tokenizer_training.update(keep=1)
    found = programs.stages(cfg)
    sizes = {name: _bytes(stage.init) for name, (stage, _) in found.items()}
    checks, saved = host_checks.run_checks(cfg, found, None)
    assert {name: one.size for name, one in saved.items()} == sizes
    workdir = str(tmp_path)
    needed = host_checks.room_for(saved, workdir)
    assert needed == sizes['ar'] * (2 + 1 + 10) + sizes['tokenizer'] * 2
    # What is there already needs no further room, but the next one does.
    for place in ('ar/checkpoints/30', 'ar/checkpoints/40', 'tokenizer/checkpoints/6'):
        (tmp_path / place).mkdir(parents=True)
    assert host_checks.room_for(saved, workdir) == sizes['ar'] * 11
    for step in range(50, 200, 10):
        (tmp_path / 'ar' / 'checkpoints' / str(step + 1)).mkdir()
    assert host_checks.room_for(saved, workdir) == sizes['ar']
    assert [(check.name, check.status) for check in checks] == [
        ('mesh', 'ok'),
        ('memory', 'ok'),
        ('memory', 'ok'),
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_directory_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert 'Permission denied' in host_checks.check_workdir(str(tmp_path)).text


class _Store(MemoryFileSystem):
    """A bucket."""

    protocol = 'store'
    store = {}
    pseudo_dirs = ['']


class _Forgetful(_Store):
    def cat_file(self, *arguments, **options):
        return b'other'

    def _open(self, path, mode='rb', **options):
        if 'r' in mode:
            self.store[path].truncate(0)
        return super()._open(path, mode, **options)


class _Closed(_Store):
    def _open(self, *arguments, **options):
        raise OSError('Anonymous caller does not have storage.objects.create access\nto the bucket')


@pytest.mark.parametrize(
    'store, status, said',
    [
        (_Store, 'ok', 'can be written; checkpoints will take 3.0 GiB'),
        (_Forgetful, 'FAIL', 'what was written is not what is read again'),
        (
            _Closed,
            'FAIL',
            'cannot be written: Anonymous caller does not have storage.objects.create access; '
            'logged in?',
        ),
    ],
)
def test_buckets(monkeypatch, store, status, said):
    """Through etils.epath and fsspec, as gs:// is, with a bucket in memory in place of Google's."""
    from etils.epath import backend

    monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: store(skip_instance_cache=True))
    saved = {'ar': host_checks.Saved(2**30, tiny_config.get_config().ar_training)}
    check = host_checks.check_workdir('gs://bucket/run', saved)
    assert (check.name, check.status) == ('workdir', status)
    assert said in check.text
    assert '\n' not in check.text
    assert store.store == {} or status == 'FAIL'


def test_buckets_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gcsfs', None)  # no such module
    check = host_checks.check_workdir('gs://bucket/run')
    assert check.status == 'FAIL'
    assert check.text.endswith("pip install -e '.[gcs]'")


def test_data(tmp_path):
    for label, count in (('cat', 2), ('dog', 3)):
        (tmp_path / label).mkdir()
        for i in range(count):
            Image.new('RGB', (9, 7)).save(tmp_path / label / f'{i}.png')
    check, source = host_checks.check_data(*recipes.data_set(f'folder:{tmp_path}'))
    text = f'folder {tmp_path}: 5 images, 2 classes: cat, dog'
    assert check == host_checks.Check('data', 'ok', text)
    assert len(source) == 5
    (tmp_path / 'top.png').write_bytes(b'')
    check, _ = host_checks.check_data('folder', str(tmp_path))
    assert check.text == f'{text}\nleft out: 1 image(s) beside the directories of the classes'
    with pytest.raises(UserError, match=r'data\.path is not given, of the imagenet data'):
        host_checks.check_data('imagenet', None)
    (tmp_path / 'dog' / '2.png').unlink()
    (tmp_path / 'dog' / '2.png').symlink_to('gone')  # is listed, but the last image cannot be read
    with pytest.raises(UserError, match='cannot be read'):
        host_checks.check_data('folder', str(tmp_path))


def test_captions(tmp_path):
    """The doctor reads captions as the start of a training does, and says what is wrong first."""
    (tmp_path / 'cat').mkdir()
    for i in range(3):
        Image.new('RGB', (9, 7)).save(tmp_path / 'cat' / f'{i}.png')
    lines = [f'{{"file_name": "cat/{i}.png", "text": "left {i}"}}' for i in range(4)]
    table = tmp_path / 'captions.jsonl'
    table.write_text('\n'.join(lines))
    cfg = tiny_config.get_config()
    cfg.data.update(name='folder', path=str(tmp_path), captions=str(table))
    cfg.ar.condition = 'text'
    source = sources.open_source('folder', str(tmp_path))
    check = host_checks.check_captions(cfg, source)
    assert check.status == 'ok'
    first, left_out = check.text.splitlines()
    assert first == "captions, the first one: 'left 0'"
    assert left_out.endswith('captions without an image: 1, cat/3.png the first')
    words = tmp_path / 'words.txt'
    words.write_text('left\n')
    cfg.ar.vocabulary = str(words)
    with pytest.raises(UserError, match=r"^100.0% of the captions .* 'left 0' has '0', which"):
        host_checks.check_captions(cfg, source)
    cfg.data.captions = 'absent.jsonl'
    with pytest.raises(UserError, match=r'absent\.jsonl, but there is no such file'):
        host_checks.check_captions(cfg, source)


def test_classes_are_counted_as_a_training_does(tmp_path, capsys):
    """A folder whose number of classes no config says is as good for the doctor as for `main`."""
    for label in ('cat', 'dog', 'owl'):
        (tmp_path / label).mkdir()
        Image.new('RGB', (9, 7)).save(tmp_path / label / '1.png')
    words = (TINY, '--config.data.name=folder', f'--config.data.path={tmp_path}')
    code, lines = _examined(capsys, *words)
    assert code == 0, lines
    assert lines[-1].startswith('0 failed'), lines
    assert _line(lines, 'data').endswith('3 images, 3 classes: cat, dog, owl')
    assert any(line[6:].startswith('memory') for line in lines)  # the models were built
    code, lines = _examined(capsys, *words, '--config.data.num_classes=2')
    assert code == 1
    assert 'has 3 classes, but the model 2' in _line(lines, 'config')
    # Where there are no images, one check fails, not two.
    words = (TINY, '--config.data.name=folder', f'--config.data.path={tmp_path}/none')
    code, lines = _examined(capsys, *words)
    assert code == 1
    assert lines[-1].startswith('1 failed')
    assert 'FAIL  data' in '\n'.join(lines)
    # Other modes open no images.
    code, lines = _examined(capsys, *words, '--mode=sample')
    assert code == 0, lines


def test_a_directory_without_its_kind_is_one_line(tmp_path, capsys):
    code, lines = _examined(capsys, f'--data={tmp_path}')
    said = _line(lines, 'data').replace(' ', '')
    assert code == 1
    assert f'write data=folder:{tmp_path}'.replace(' ', '') in said


# ---- several processes

BY_HAND = {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
SLURM = {'SLURM_STEP_NODELIST': 'a', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '0'}


@pytest.mark.parametrize(
    'environ, expected',
    [
        ({}, None),
        (BY_HAND, {'coordinator_address': 'a:1', 'num_processes': 2, 'process_id': 1}),
        (SLURM, {}),
        (SLURM | {'SLURM_NTASKS': '1'}, None),
        ({'SLURM_NTASKS': '8', 'SLURM_PROCID': '0'}, None),  # in a batch script, not under srun
        ({'OMPI_COMM_WORLD_SIZE': '4'}, {}),
        ({'OMPI_COMM_WORLD_SIZE': '1'}, None),
        ({'TPU_ML_PLATFORM': 'JAX'}, {}),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, None),
    ],
)
def test_which_processes_belong_together(environ, expected):
    assert joining.arguments(environ) == expected


def test_another_number_of_processes_than_expected(monkeypatch):
    """As where some hosts of a slice were not started: JAX joins those that it is told of."""
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **_: None)
    joined = iter([False, True])
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: next(joined))
    monkeypatch.setattr(ending, 'listen', lambda: None)
    preemption = jax.config.jax_enable_preemption_service
    slurm = {'SLURM_STEP_NODELIST': 'a,b', 'SLURM_NTASKS': '16'}
    try:
        with pytest.raises(
            UserError, match=r'^1 process\(es\) joined, but SLURM_NTASKS speaks of 16$'
        ):
            joining.join(slurm)
    finally:
        jax.config.update('jax_enable_preemption_service', preemption)


@pytest.mark.parametrize(
    'wrong, said',
    [
        ({'JAX_PROCESS_ID': ''}, 'JAX_PROCESS_ID is not set'),
        ({'JAX_COORDINATOR_ADDRESS': ''}, 'JAX_COORDINATOR_ADDRESS is not set'),
        ({'JAX_NUM_PROCESSES': 'two'}, 'must be whole numbers'),
        ({'JAX_PROCESS_ID': '2'}, 'JAX_PROCESS_ID is 2, but must lie between 0 and 1'),
    ],
)
def test_processes_that_make_no_sense(wrong, said):
    with pytest.raises(UserError, match=said):
        joining.arguments(BY_HAND | wrong)


def _processes(environs, *words):
    """Starts a process for each environment, all at once.

    Returns [(exit code, what it printed)].
    """
    start = functools.partial(
        subprocess.Popen,
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    started = [
        start(env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''} | environ)
        for environ in environs
    ]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


JOINED = (
    'from sphere_ar_jax.runtime import joining; import jax; joining.join(); '
    'print(jax.process_index(), jax.process_count())'
)


@pytest.mark.parametrize('by', ['hand', pytest.param('slurm', marks=pytest.mark.slow)])
def test_two_processes_join(by):
    if by == 'hand':
        common = {'JAX_COORDINATOR_ADDRESS': f'localhost:{free_port()}', 'JAX_NUM_PROCESSES': '2'}
        environs = [common | {'JAX_PROCESS_ID': str(i)} for i in range(2)]
    else:
        common = {'SLURM_JOB_ID': '77', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
        common['JAX_COORDINATOR_PORT'] = str(free_port())
        environs = [common | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)} for i in range(2)]
    assert _processes(environs, '-c', JOINED) == [(0, '0 2\n'), (0, '1 2\n')]


@pytest.mark.slow
@pytest.mark.parametrize('index', ['0', '1'])
def test_a_process_that_comes_alone_says_so_and_ends(index):
    port = free_port()
    environ = {
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': index,
    }
    code = 'from sphere_ar_jax.runtime import joining; joining.join(timeout=2)'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, text=True,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environ, capture_output=True, timeout=200,
    )  # fmt: skip
    said = (
        f'waiting for the other processes of this run at localhost:{port}: '
        'was each of them started, once?'
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert done.stderr.startswith(f'{said}\n'), done.stderr


def test_processes_that_do_not_come_are_not_waited_for():
    environ = {
        'JAX_COORDINATOR_ADDRESS': f'localhost:{free_port()}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': '1',
    }
    ((code, output),) = _processes([environ], '-m', 'sphere_ar_jax.doctor', '--timeout=1', TINY)
    assert code == 1
    assert 'FAIL  processes   no answer in 1 s: have the other processes been started?' in output
    assert 'devices' not in output
