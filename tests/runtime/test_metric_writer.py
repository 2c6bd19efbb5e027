import contextlib
import json
import resource
import sys
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
            assert len(found) >= 1 and all(isinstance(line['step'], int) for line in found)


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
    assert (
        '4/4 steps' in shown.err
        and 'left' in shown.err
        and 'loss 1.5' in shown.err
        and shown.out == ''
    )


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
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ''


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
