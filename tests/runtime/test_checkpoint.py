import errno
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.runtime.console import TemporaryError, UserError


@pytest.fixture
def mesh():
    return sharding.make_mesh()


def _state(mesh, seed):
    state = {
        'step': np.int32(seed),
        'w': np.random.default_rng(seed).normal(size=(300, 40)).astype(np.float32),
        'half': np.arange(64).astype(jnp.bfloat16),
    }
    return jax.device_put(state, sharding.tree_shardings(mesh, state))


def _like(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def _save(directory, mesh, steps, **options):
    checkpoints = checkpoint.Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, _state(mesh, step), {'next_index': step}, 1.5 * step)
    checkpoints.close()


def _restored(directory, mesh):
    checkpoints = checkpoint.Checkpoints(directory, keep=10)
    try:
        return checkpoints.restore(_like(_state(mesh, 0)))
    finally:
        checkpoints.close()


def test_fingerprint_of_a_large_leaf_is_that_of_its_words_in_order():
    """Summed row by row; the truth is the formula over all words at once, by NumPy."""
    leaf = np.random.default_rng(0).normal(size=(5, 2**20)).astype(np.float32)
    assert leaf.size >= checkpoint._LARGE
    position = np.arange(leaf.size, dtype=np.uint32)
    weights = (position * np.uint32(2654435761)) ^ (
        (position * np.uint32(40503)) >> np.uint32(7)
    ) | np.uint32(1)
    assert checkpoint.fingerprint([leaf]) == [
        int((leaf.ravel().view(np.uint32) * weights).sum(dtype=np.uint32))
    ]


def test_fingerprint_sees_every_bit():
    tree = {
        'a': np.arange(50, dtype=np.float32),
        'b': np.arange(7, dtype=np.int32),
        'c': np.arange(9).astype(jnp.bfloat16),
    }
    before = checkpoint.fingerprint(tree)
    assert len(before) == 3
    assert checkpoint.fingerprint(tree) == before
    for bit in range(50 * 32):
        changed = tree['a'].copy()
        changed.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        assert checkpoint.fingerprint({**tree, 'a': changed}) != before
    assert checkpoint.fingerprint({**tree, 'a': tree['a'][::-1].copy()}) != before


def test_round_trip_and_what_is_kept(tmp_path, mesh):
    _save(tmp_path, mesh, range(1, 8), keep=2, keep_every=3)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [3, 6, 7]
    state, data_state, seconds = _restored(tmp_path, mesh)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(_state(mesh, 7)), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(np.asarray(ours, np.float64), np.asarray(theirs, np.float64))
    assert data_state == {'next_index': 7}
    assert seconds == 10.5


def test_nothing_to_restore(tmp_path, mesh):
    assert _restored(tmp_path, mesh) is None


def _array_files(step_directory):
    files = [p for p in pathlib.Path(step_directory, 'state').rglob('*') if p.is_file()]
    return sorted(files, key=lambda p: p.stat().st_size)


def _truncate(directory):
    path = _array_files(directory)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(directory):
    path = _array_files(directory)[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def _drop(directory):
    for path in pathlib.Path(directory, 'meta').rglob('*'):
        if path.is_file():
            path.unlink()


def _forge(directory):
    """Another state under the same meta: what a bit flip that Orbax does not notice looks like."""
    other = pathlib.Path(directory).parent / '2'
    shutil.rmtree(pathlib.Path(directory) / 'state')
    shutil.copytree(other / 'state', pathlib.Path(directory) / 'state')


def _move_iterator(directory):
    """Another position of the data iterator, in good JSON."""
    path = next(
        p
        for p in pathlib.Path(directory, 'data').rglob('*')
        if p.is_file() and '3' in p.read_text()
    )
    path.write_text(path.read_text().replace('3', '4'))


class _HttpError(Exception):
    """As gcsfs raises it; the status is a number there and in google's packages a text."""

    __module__ = 'gcsfs.retry'

    def __init__(self, code):
        super().__init__(f'{code}, a bucket says')
        self.code = code


class _NoConnection(OSError):
    """As requests raises it."""

    __module__ = 'requests.exceptions'


def _from(error, cause):
    error.__cause__ = cause
    return error


def _while(error, handled):
    error.__context__ = handled
    return error


ERRNOS = (
    'EIO', 'ESTALE', 'ETIMEDOUT', 'ECONNRESET', 'ENOSPC', 'EROFS', 'EDQUOT', 'EAGAIN', 'EBUSY',
    'EMFILE', 'ENFILE', 'ENOMEM', 'EACCES', 'EPERM', 'EHOSTDOWN', 'ENETUNREACH', 'ENXIO',
)  # fmt: skip
STATUSES = (
    'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED', 'RESOURCE_EXHAUSTED', 'UNAUTHENTICATED',
    'PERMISSION_DENIED', 'CANCELLED', 'INTERNAL',
)  # fmt: skip
LASTING = (
    'ENOSPC', 'EROFS', 'EDQUOT', 'EBUSY', 'EMFILE', 'ENFILE', 'ENOMEM', 'EACCES', 'EPERM',
    'ENXIO', 'UNAUTHENTICATED', 'PERMISSION_DENIED', 'HTTP 401', 'HTTP 403',
    'by number, older', 'from another',
)  # fmt: skip
PASSING = {
    **{name: OSError(getattr(errno, name), os.strerror(getattr(errno, name))) for name in ERRNOS},
    **{name: ValueError(f'{name}: Error reading "gs://b/o"') for name in STATUSES},
    **{f'HTTP {code}': _HttpError(code) for code in (401, 403, '429', 500, 502, '503', 504)},
    'by number': ValueError("OUT_OF_RANGE: Failed reading: Input/output error [os_error_code='5']"),
    'by number, older': ValueError('ABORTED: [OS error 24: EMFILE Too many open files]'),
    'as a cause': _from(Exception('reading an array'), ValueError('UNAVAILABLE: no route')),
    'from another': _from(OSError(errno.EMFILE, 'Too many open files'), KeyError('x')),
    'while handling another': _while(KeyError('x'), OSError(errno.EIO, 'Input/output error')),
    'in a group': ExceptionGroup('reads', [KeyError('x'), OSError(errno.EIO, 'an error')]),
    'no answer': TimeoutError(),
    'no connection': _NoConnection('Max retries exceeded with url'),
}
CONTENT = {
    'ENOENT': FileNotFoundError(errno.ENOENT, 'No such file or directory'),
    'ENOTDIR': NotADirectoryError(errno.ENOTDIR, 'Not a directory'),
    'EISDIR': IsADirectoryError(errno.EISDIR, 'Is a directory'),
    'HTTP 404': _HttpError(404),
    'NOT_FOUND': ValueError("NOT_FOUND: Error opening: [os_error_code='2']"),
    'DATA_LOSS': ValueError('DATA_LOSS: checksum does not match'),
    'FAILED_PRECONDITION': ValueError('FAILED_PRECONDITION: Error opening "zarr" driver'),
    'INVALID_ARGUMENT': ValueError('INVALID_ARGUMENT: Error decoding zstd'),
    'OUT_OF_RANGE': ValueError('OUT_OF_RANGE: Requested byte range is not valid'),
    'JSON': json.JSONDecodeError('Expecting value', 'x', 0),
    'a key': KeyError('w'),
}


def _failing(monkeypatch, error, times):
    """Lets so many reads of step 2 fail, and counts the reads of all steps."""
    read = checkpoint.Checkpoints._read
    tried = []

    def reading(self, step, like):
        tried.append(step)
        if step == 2 and tried.count(2) <= times:
            raise error
        return read(self, step, like)

    monkeypatch.setattr(checkpoint.Checkpoints, '_read', reading)
    monkeypatch.setattr(checkpoint, 'PAUSES', (0, 0, 0))
    return tried


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp('two_steps')
    _save(directory, sharding.make_mesh(), [1, 2], keep=10)
    return directory


@pytest.mark.parametrize('name', PASSING)
def test_a_fault_that_may_pass_is_no_damage(two_steps, mesh, monkeypatch, capfd, name):
    before = sorted(two_steps.rglob('*'))
    tried = _failing(monkeypatch, PASSING[name], 99)
    with pytest.raises(UserError, match=r'/2 cannot be read now .*: nothing was changed') as caught:
        _restored(two_steps, mesh)
    assert tried == [2] * 4
    assert isinstance(caught.value, TemporaryError) == (name not in LASTING)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr().err.count('trying again in 0 s') == 3
    assert sorted(two_steps.rglob('*')) == before


@pytest.mark.parametrize('name', ['EIO', 'ENOSPC', 'UNAVAILABLE', 'PERMISSION_DENIED'])
def test_what_refuses_a_checkpoint_is_said_and_may_pass(tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise PASSING[name]

    monkeypatch.setattr(checkpoint.ocp, 'CheckpointManager', refuse)
    line = r'^no checkpoint could be written to .*: those that were there are untouched,'
    with pytest.raises(UserError, match=line) as caught:
        checkpoint.Checkpoints(tmp_path)
    assert isinstance(caught.value, TemporaryError) == (name not in LASTING)


@pytest.mark.parametrize('name', CONTENT)
def test_wrong_contents_are_damage(two_steps, tmp_path, mesh, monkeypatch, name):
    directory = tmp_path / 'w'
    shutil.copytree(two_steps, directory)
    tried = _failing(monkeypatch, CONTENT[name], 99)
    assert int(_restored(directory, mesh)[0]['step']) == 1
    assert tried == [2, 1]
    assert (directory / 'damaged-2').is_dir()


def test_a_fault_that_passes_costs_nothing(two_steps, mesh, monkeypatch, capfd):
    tried = _failing(monkeypatch, OSError(errno.ESTALE, 'Stale file handle'), 2)
    assert int(_restored(two_steps, mesh)[0]['step']) == 2
    assert tried == [2] * 3
    assert capfd.readouterr().err.count('Stale file handle; trying again') == 2


def test_a_fault_of_another_process_is_retried_here_too(two_steps, mesh, monkeypatch):
    """Processes that do not agree would wait for each other."""
    tried = _failing(monkeypatch, None, 0)
    others = iter([2, 2, 0])  # what the other process has met: a fault twice
    monkeypatch.setattr(checkpoint.hosts, 'largest', lambda mine: max(mine, next(others)))
    assert int(_restored(two_steps, mesh)[0]['step']) == 2
    assert tried == [2] * 3


def test_a_step_in_the_place_of_another_is_damage(tmp_path, mesh, capfd):
    _save(tmp_path, mesh, [1, 2, 3], keep=10)
    shutil.rmtree(tmp_path / '3')
    shutil.copytree(tmp_path / '1', tmp_path / '3')
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert int(checkpoints.restore(_like(_state(mesh, 0)))[0]['step']) == 2
    assert int(_restored(tmp_path, mesh)[0]['step']) == 2
    assert (
        capfd.readouterr().err.count(f'{tmp_path}/3 cannot be read (it holds step 1, not 3)') == 2
    )
    assert (tmp_path / 'damaged-3').is_dir()


def _note_otherwise(directory, change):
    """Writes a step's meta again, as `change` leaves it."""
    path = directory / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def _as_before(meta):
    """As versions wrote it that noted no step."""
    del meta['step']
    meta['crc32'] = zlib.crc32(json.dumps([{'next_index': 2}, meta['seconds']]).encode())


@pytest.mark.parametrize('swapped', [False, True])
def test_an_older_checkpoint_tells_its_step_by_its_state(tmp_path, mesh, swapped):
    _save(tmp_path, mesh, [1, 2], keep=10)
    _note_otherwise(tmp_path / '2', _as_before)
    if swapped:
        (tmp_path / '2').rename(tmp_path / '4')
    state, data_state, _ = _restored(tmp_path, mesh)
    assert int(state['step']) == data_state['next_index'] == (1 if swapped else 2)


@pytest.mark.parametrize('piece', ['state', 'data', 'meta'])
def test_pieces_of_two_steps_are_not_one(tmp_path, mesh, piece):
    """The same state and data, so that seconds and steps alone differ."""
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=10)
    for step in (1, 2, 3):
        checkpoints.save(step, _state(mesh, 7 if piece == 'meta' else step), {'a': step}, step)
    checkpoints.close()
    shutil.rmtree(tmp_path / '3' / piece)
    shutil.copytree(tmp_path / '1' / piece, tmp_path / '3' / piece)
    assert _restored(tmp_path, mesh)[2] == 2


@pytest.mark.parametrize('key', ['step', 'seconds', 'crc32'])
def test_what_is_noted_of_a_step_is_checked(tmp_path, mesh, key):
    def change(meta):
        meta[key] += 1

    _save(tmp_path, mesh, [1, 2], keep=10)
    _note_otherwise(tmp_path / '2', change)
    assert int(_restored(tmp_path, mesh)[0]['step']) == 1


@pytest.mark.parametrize('meta', ['{}', '[]', '7', 'null', '{"fingerprint": 7}', '[' * 100_000])
def test_notes_that_are_not_ours_are_damage(tmp_path, mesh, meta):
    _save(tmp_path, mesh, [1, 2], keep=10)
    (tmp_path / '2' / 'meta' / 'metadata').write_text(meta)
    assert int(_restored(tmp_path, mesh)[0]['step']) == 1


def test_only_the_part_that_is_wanted_is_read(tmp_path, mesh, monkeypatch):
    _save(tmp_path, mesh, [1, 2], keep=10)
    # A leaf that is not wanted is damaged; another one, of an older version, is not wanted at all.
    state = _state(mesh, 2) | {'zz': np.arange(5, dtype=np.float32)}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=10)
    checkpoints.save(3, state, {}, 0.0)
    checkpoints.close()
    seen = []
    read = checkpoint.Checkpoints._read

    def reading(self, step, like):
        found = read(self, step, like)
        seen.append(sum(a.nbytes for a in jax.tree.leaves(found[0]) if a is not ...))
        return found

    monkeypatch.setattr(checkpoint.Checkpoints, '_read', reading)
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    part, _, _ = checkpoints.restore(_like(_state(mesh, 0)), lambda state: {'x': state['half']})
    assert list(part) == ['x']
    assert seen == [2 * 64 + 4]
    np.testing.assert_array_equal(np.asarray(part['x'], np.float32), np.arange(64))


@pytest.mark.parametrize('wanted, whole', [('half', 3), ('w', 2)])
def test_a_part_is_checked_by_its_own_number(tmp_path, mesh, wanted, whole):
    """The fingerprint of another leaf is wrong; it counts only for whoever reads that leaf."""

    def change(meta):
        meta['fingerprint'][2] ^= 1  # the leaves in order: half, step, w

    _save(tmp_path, mesh, [2, 3], keep=10)
    _note_otherwise(tmp_path / '3', change)
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    _, data_state, _ = checkpoints.restore(_like(_state(mesh, 0)), lambda state: state[wanted])
    assert data_state == {'next_index': whole}


def test_opening_and_reading_says_nothing(two_steps, mesh, caplog, capfd):
    """Neither absl nor Orbax warns of what was asked for."""
    with caplog.at_level(logging.WARNING):
        checkpoints = checkpoint.Checkpoints(two_steps, read_only=True)
        assert checkpoints.restore(_like(_state(mesh, 0))) is not None
        checkpoints.close()
    assert caplog.records == []
    assert capfd.readouterr().err == ''


SAVE = """
import os, resource, shutil, sys
import jax, numpy as np
from sphere_ar_jax.runtime import checkpoint
from sphere_ar_jax.runtime.console import UserError
state = {'w': np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32)}
state = jax.device_put(state, jax.devices()[0])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for how in sys.argv[2:]:
    directory = os.path.join(sys.argv[1], how)
    if how == 'file':
        open(directory, 'w').close()
    try:
        checkpoints = checkpoint.Checkpoints(directory)
        checkpoints.save(1, state, {}, 0.0)
        checkpoints.wait()
        if how == 'gone':
            shutil.rmtree(directory)
        elif how != 'file':
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(how), hard))
        checkpoints.save(2, state, {}, 0.0)
        checkpoints.close()
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        os.write(1, (str(error) + chr(10)).encode())
"""


def test_a_save_that_cannot_be_written_is_one_line(tmp_path):
    """Nor does the process wait for threads of Orbax at its end."""
    reasons = {
        'gone': 'the directory is gone',
        'file': 'is a file, but must be a directory: move it away',
        '20000': 'File too large',
        '0': 'File too large',
    }
    done = subprocess.run(
        [sys.executable, '-c', SAVE, tmp_path, *reasons], cwd=pathlib.Path(__file__).parents[2],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ''
    for line, (how, reason) in zip(done.stdout.splitlines(), reasons.items(), strict=True):
        assert reason in line
        assert str(tmp_path / how) in line
    for how in ('0', '20000'):
        directory = tmp_path / how
        whole = [name for name in os.listdir(directory) if name.isdigit()]
        assert whole == ['1']
        assert len(os.listdir(directory)) == 2
        checkpoint.Checkpoints(directory, read_only=True)
        assert len(os.listdir(directory)) == 2
        checkpoint.Checkpoints(directory).close()
        assert os.listdir(directory) == ['1']


def test_read_only_changes_nothing(tmp_path, mesh, capfd):
    _save(tmp_path / 'a', mesh, [1, 2], keep=10)
    _truncate(tmp_path / 'a' / '2')
    before = sorted(tmp_path.rglob('*'))
    for name, step in (('a', 1), ('none', None)):
        checkpoints = checkpoint.Checkpoints(tmp_path / name, read_only=True)
        found = checkpoints.restore(_like(_state(mesh, 0)))
        checkpoints.close()
        assert (found and int(found[0]['step'])) == step
    assert 'a/2 cannot be read' in capfd.readouterr().err
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('damage', [_truncate, _flip, _drop, _forge, _move_iterator])
def test_a_damaged_newest_step_is_named_and_skipped(tmp_path, mesh, capfd, damage):
    _save(tmp_path, mesh, [1, 2, 3], keep=10)
    damage(tmp_path / '3')
    state, data_state, _ = _restored(tmp_path, mesh)
    assert int(state['step']) == 2
    assert data_state == {'next_index': 2}
    assert f'{tmp_path}/3 cannot be read' in capfd.readouterr().err
    # The checkpoint is set aside, not deleted.
    assert (tmp_path / 'damaged-3').is_dir()
    assert not (tmp_path / '3').exists()
    _save(tmp_path, mesh, [3], keep=10)  # and out of the way of the next save of that step
    assert int(_restored(tmp_path, mesh)[0]['step']) == 3


RESTORE = """
import gc, sys
from absl import logging
from sphere_ar_jax.runtime import checkpoint
from sphere_ar_jax.runtime import sharding
from tests.runtime import test_checkpoint
logging.set_verbosity(logging.ERROR)  # as main does
like = test_checkpoint._like(test_checkpoint._many(sharding.make_mesh()))
print(int(checkpoint.Checkpoints(sys.argv[1], read_only=True).restore(like)[0]['step']))
gc.collect()
"""


def _many(mesh):
    state = {f'w{i}': np.arange(i, 5000 + i, dtype=np.float32) for i in range(60)}
    state['step'] = np.int32(7)
    return jax.device_put(state, sharding.tree_shardings(mesh, state))


def test_damage_is_said_in_a_line_each(tmp_path, mesh):
    """The process is one of its own: what Python, asyncio and Orbax say goes past the tests' own
    hooks.
    """
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=10)
    for step in range(1, 5):
        checkpoints.save(step, _many(mesh), {}, 0.0)
    checkpoints.close()
    for step, damage in ((2, _truncate), (3, _flip), (4, _drop)):
        damage(tmp_path / str(step))
    done = subprocess.run(
        [sys.executable, '-c', RESTORE, tmp_path], cwd=pathlib.Path(__file__).parents[2],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == '7\n', done.stderr
    said = done.stderr.splitlines()
    assert [line.split(' cannot be read (')[0] for line in said] == [
        f'checkpoint {tmp_path}/{s}' for s in (4, 3, 2)
    ]
    assert 'OUT_OF_RANGE' in said[2]
    assert all(len(line) < len(str(tmp_path)) + 250 for line in said)


def test_all_damaged_is_an_error_and_nothing_is_lost(tmp_path, mesh):
    _save(tmp_path, mesh, [1, 2], keep=10)
    for step in ('1', '2'):
        _truncate(tmp_path / step)
    with pytest.raises(UserError, match='none of the checkpoints'):
        _restored(tmp_path, mesh)
    assert {'1', '2'} <= set(os.listdir(tmp_path))
