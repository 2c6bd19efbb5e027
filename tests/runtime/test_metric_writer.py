import contextlib
import functools
import json
import resource
import sys
import time
import types
from unittest import mock

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX.proto import event_pb2

from sphere_ar_jax.evaluation import page
from sphere_ar_jax.models.posteriors import PowerSpherical
from sphere_ar_jax.runtime import files, hosts, metric_writer
from sphere_ar_jax.runtime.console import UserError


def _events(directory):
    """The scalars of the TensorBoard files in a directory: [(step, tag, value)].

    Records: length, crc, event, crc.
    """
    found = []
    for path in sorted(directory.glob('events.*')):
        content = path.read_bytes()
        while content:
            length = int(np.frombuffer(content[:8], '<u8')[0])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return found


def test_lines_events_and_plain_console(tmp_path, capsys):
    writer = metric_writer.MetricWriter(tmp_path, 'stage', 0, 10)
    writer.write(5, {'loss': 2.0, 'lr': 0.5, 'seconds_per_step': 3.0}, ('loss',))
    writer.write(10, {'loss': 1.0, 'lr': 0.25}, ('loss',))
    writer.close()
    expected = [
        {'step': 5, 'loss': 2.0, 'lr': 0.5, 'seconds_per_step': 3.0},
        {'step': 10, 'loss': 1.0, 'lr': 0.25},
    ]
    assert metric_writer.read_scalars(tmp_path / 'metrics.jsonl') == expected
    assert {(5, 'loss', 2.0), (10, 'loss', 1.0), (10, 'lr', 0.25)} <= set(_events(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        'stage 5/10, 15 s left: loss 2',
        'stage 10/10: loss 1',
    ]


def test_a_resumed_run_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(
        ''.join(json.dumps({'step': s, 'loss': s}) + '\n' for s in (2, 4, 6, 8))
        + '{"step": 10, "lo'
    )
    writer = metric_writer.MetricWriter(tmp_path, 'stage', 5, 10)
    writer.write(6, {'loss': 0.5}, ())
    writer.close()
    assert [(line['step'], line['loss']) for line in metric_writer.read_scalars(path)] == [
        (2, 2),
        (4, 4),
        (6, 0.5),
    ]


LINES = [json.dumps({'step': step, 'loss': 0.5 * step}).encode() + b'\n' for step in (2, 4, 6)]


@pytest.mark.parametrize(
    'bad',
    [
        b'{"step": 4, "loss": 2.0',
        b'{"step": 4, "loss": 2.\xff}',
        b'{"s\xf4ep": 4, "loss": 2.0}',
        b'{"stfp": 4, "loss": 2.0}',
        b'{"step": "4", "loss": 2.0}',
        b'[' * 100_000,
        b'7',
        b'',
        b'\0' * 30,
    ],
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys, bad):
    """Those around them stay, and so they do when the run goes on."""
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(LINES[0] + bad + b'\n' + LINES[2])
    assert [line['step'] for line in metric_writer.read_scalars(path)] == [2, 6]
    assert capsys.readouterr().err == f'{path}: 1 of 3 lines are damaged and left out\n'
    writer = metric_writer.MetricWriter(tmp_path, 'stage', 6, 10)
    writer.write(8, {'loss': 4.0}, ())
    writer.close()
    capsys.readouterr()
    assert [line['step'] for line in metric_writer.read_scalars(path)] == [2, 6, 8]
    assert capsys.readouterr().err == ''


def test_any_flipped_bit_of_the_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    content = b''.join(LINES)
    for at in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            found = metric_writer.read_scalars(path)
            assert len(found) >= 1
            assert all(isinstance(line['step'], int) for line in found)


def test_curves_of_a_damaged_file(tmp_path):
    (tmp_path / 'ar').mkdir()
    lines = [*LINES[:2], b'{"step": 5, "loss": "x"}\n', b'{"step": 5, "lo\xff\n', LINES[2]]
    (tmp_path / 'ar' / 'metrics.jsonl').write_bytes(b''.join(lines))
    page.save_curves(tmp_path / 'curves.png', str(tmp_path), PowerSpherical())
    assert (tmp_path / 'curves.png').read_bytes()[:4] == b'\x89PNG'


def test_a_terminal_sees_a_bar_with_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    writer = metric_writer.MetricWriter(tmp_path, 'stage', 0, 4)
    for _ in range(4):
        writer.advance()
    writer.write(4, {'loss': 1.5}, ('loss',))
    writer.close()
    shown = capsys.readouterr()
    assert '4/4 steps' in shown.err
    assert 'left' in shown.err
    assert 'loss 1.5' in shown.err
    assert shown.out == ''


def test_no_file_is_no_lines(tmp_path):
    assert metric_writer.read_scalars(tmp_path / 'nothing.jsonl') == []


def test_in_a_bucket(monkeypatch):
    """Lines and files go through etils.epath and fsspec, as gs:// is, with a bucket in memory in
    place of Google's.
    """
    store = MemoryFileSystem(skip_instance_cache=True)
    monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: store)
    # The library knows Google's buckets itself.
    monkeypatch.setattr(metric_writer, 'EventsWriter', mock.MagicMock())
    for last in (3, 5):  # the second start drops the line of step 3
        writer = metric_writer.MetricWriter('gs://bucket/run/ar', 'ar', 2, 10)
        writer.write(1, {'loss': 4.0}, ()) if last == 3 else None
        writer.write(last, {'loss': 2.0}, ())
        if last == 3:
            # Each write sends the whole file, so that lines wait for a checkpoint or for the end.
            assert not metric_writer.read_scalars('gs://bucket/run/ar/metrics.jsonl')
            writer.flush()
            assert len(metric_writer.read_scalars('gs://bucket/run/ar/metrics.jsonl')) == 2
        writer.close()
    lines = metric_writer.read_scalars('gs://bucket/run/ar/metrics.jsonl')
    assert lines == [{'step': 1, 'loss': 4.0}, {'step': 5, 'loss': 2.0}]
    files.write_json('gs://bucket/run/config.json', {'seed': 1})
    assert epath.Path('gs://bucket/run/config.json').read_text() == '{\n  "seed": 1\n}\n'
    assert not [name for name in store.find('') if name.endswith('.tmp')]


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hosts, 'is_first', lambda: False)
    writer = metric_writer.MetricWriter(tmp_path / 'ar', 'ar', 0, 10)
    writer.advance()
    writer.write(1, {'loss': 4.0}, ('loss',))
    writer.picture('samples', 1, np.zeros((2, 2, 1), np.uint8))
    writer.close()
    files.write_json(tmp_path / 'config.json', {})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('bytes_left', [0, 400])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, bytes_left):
    """It is raised where the numbers are written, and closing does not wait for a thread."""
    path = tmp_path / 'w'
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = metric_writer.MetricWriter(path, 'stage', 0, 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        with pytest.raises(OSError, match='File too large') as caught:
            for step in range(1, 11):
                writer.write(step, {'loss': 1.0, 'a_name_of_some_length': 2.0}, ())
        with contextlib.suppress(OSError):  # What is still in memory cannot be written either.
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename.startswith(str(path))
    writer = metric_writer.MetricWriter(path, 'stage', 0, 10)
    writer.write(1, {'loss': 1.0}, ())
    writer.close()
    assert metric_writer.read_scalars(path / 'metrics.jsonl') == [{'step': 1, 'loss': 1.0}]


def test_logging_names_where_numbers_go(tmp_path):
    """Without TensorBoard there are lines alone, and what a run has come to goes nowhere else."""
    logs = metric_writer.Logs(tensorboard=False)
    writer = metric_writer.MetricWriter(tmp_path, 'ar', 0, 10, logs)
    writer.write(5, {'loss': 2.0}, ())
    writer.picture('samples', 5, np.zeros((2, 2, 3), np.uint8))
    writer.close()
    logs.conclude(str(tmp_path), {'samples/accuracy': 0.9}, 'seed: 0', {})
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


def test_tensorboard_has_the_final_scores(tmp_path):
    """A run that is concluded twice ends with its last scores."""
    for accuracy in (0.5, 0.75):
        pictures = {'samples': np.zeros((2, 2, 3), np.uint8)}
        metric_writer.DEFAULT.conclude(
            str(tmp_path), {'samples/accuracy': accuracy}, 'seed: 0', pictures
        )
    found = [(tag, value) for step, tag, value in _events(tmp_path) if step == 0]
    assert found[-2:] == [('samples/accuracy', 0.75), ('samples', 0.0)]
    assert {'config/text_summary', 'samples'} <= {tag for tag, _ in found}


class _FakeWandb(types.ModuleType):
    """What is used of wandb. It notes the calls in `calls`."""

    Error = type('Error', (Exception,), {})

    def __init__(self, has_key):
        super().__init__('wandb')
        self.calls = []
        self.steps = [-1]
        self.summary = {}
        self._has_key = has_key

    def Settings(self, **options):
        return options

    def Image(self, pixels):
        return ('picture', pixels.shape)

    def login(self, prompt, verify):
        assert not prompt
        assert not verify
        return self._has_key

    def init(self, **options):
        if options['config'].get('refused'):
            raise self.Error('no such\nproject')
        self.calls.append(('init', options['id'], options['mode'], options['config']))
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ('ar/*', 'ar/step')

    def log(self, values, step):
        assert step > self.steps[-1]
        self.steps.append(step)
        self.calls.append(('log', values))

    def finish(self, exit_code):
        self.calls.append(('finish', exit_code))


def _log_to_wandb(workdir, fails=False):
    """Logs a line and a picture as a training does, and ends or fails."""
    with metric_writer.Logs.opened(('wandb',), str(workdir), {'seed': 3}) as logs:
        writer = metric_writer.MetricWriter(workdir / 'ar', 'ar', 0, 10, logs)
        writer.write(5, {'loss': 2.0}, ())
        writer.picture('samples', 5, np.zeros((2, 3, 1), np.uint8))
        writer.close()
        if fails:
            raise KeyboardInterrupt
        logs.conclude(str(workdir), {'samples/accuracy': 0.9}, 'seed: 3', {})


@pytest.mark.parametrize('has_key', [True, False])
def test_all_starts_in_a_workdir_are_one_run_of_wandb(tmp_path, monkeypatch, capsys, has_key):
    """Without a key it stays on this machine, which a line says."""
    fake = _FakeWandb(has_key)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.delenv('WANDB_MODE', raising=False)
    with pytest.raises(KeyboardInterrupt):
        _log_to_wandb(tmp_path, fails=True)
    time.sleep(0.02)  # Its own steps are milliseconds.
    _log_to_wandb(tmp_path)
    assert len(fake.steps) == 5  # and they rise, over both starts
    run_id = json.loads((tmp_path / 'wandb.json').read_text())['id']
    start = ('init', run_id, None if has_key else 'offline', {'seed': 3})
    lines = [
        ('log', {'ar/step': 5, 'ar/loss': 2.0}),
        ('log', {'ar/step': 5, 'ar/samples': ('picture', (2, 3, 1))}),
    ]
    assert fake.calls == [start, *lines, ('finish', 1), start, *lines, ('finish', 0)]
    assert fake.summary == {'samples/accuracy': 0.9}
    assert ('`wandb sync` uploads it' in capsys.readouterr().out) != has_key


def test_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    opened = functools.partial(metric_writer.Logs.opened, ('wandb',), str(tmp_path))
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(UserError, match='pip install wandb'), opened({}):
        pass
    with pytest.raises(UserError, match='pip install wandb'):
        metric_writer.require(('wandb',))
    monkeypatch.setitem(sys.modules, 'wandb', _FakeWandb(True))
    with (
        pytest.raises(UserError, match=r'^wandb: no such project; WANDB_MODE'),
        opened({'refused': True}),
    ):
        pass
    for damaged in ('[]', '{"id": "a/b"}'):
        (tmp_path / 'wandb.json').write_text(damaged)
        with pytest.raises(UserError, match=r'wandb\.json has no id'), opened({}):
            pass
    monkeypatch.setattr(hosts, 'is_first', lambda: False)
    with opened({}) as logs:
        assert logs.wandb is None


@pytest.mark.slow
def test_the_real_wandb_offline(tmp_path, monkeypatch):
    """Two starts leave two parts of one run."""
    pytest.importorskip('wandb')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    for name in ('WANDB_MODE', 'WANDB_API_KEY', 'NETRC'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / 'w').mkdir()
    _log_to_wandb(tmp_path / 'w')
    time.sleep(1.1)  # The names of the parts have seconds.
    _log_to_wandb(tmp_path / 'w')
    run_id = json.loads((tmp_path / 'w' / 'wandb.json').read_text())['id']
    parts = sorted((tmp_path / 'w' / 'wandb').glob('offline-run-*'))
    assert len(parts) == 2
    for part in parts:
        records = (part / f'run-{run_id}.wandb').read_bytes()
        for word in (b'ar/loss', b'ar/step', b'samples/accuracy', b'seed'):
            assert word in records
        assert len(list((part / 'files' / 'media' / 'images' / 'ar').glob('samples_*.png'))) == 1
