import errno
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.runtime.console import UserError


@pytest.fixture
def mesh():
    return sharding.make_mesh()


def _state(mesh, seed):
    state = {
        'step': jnp.int32(seed),
        'w': jax.random.normal(jax.random.key(seed), (300, 40)),
        'half': jnp.arange(64, dtype=jnp.bfloat16),
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
        'c': jnp.arange(9, dtype=jnp.bfloat16),
    }
    before = checkpoint.fingerprint(tree)
    assert len(before) == 3 and checkpoint.fingerprint(tree) == before
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
        assert ours.dtype == theirs.dtype and ours.sharding == theirs.sharding
        np.testing.assert_array_equal(np.asarray(ours, np.float64), np.asarray(theirs, np.float64))
    assert data_state == {'next_index': 7} and seconds == 10.5


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


def test_the_machine_s_faults_are_not_the_checkpoint_s(tmp_path, mesh, monkeypatch):
    _save(tmp_path, mesh, [1, 2], keep=10)

    def full(*_):
        raise OSError(errno.EMFILE, 'Too many open files')

    def full_in_tensorstore(*_):
        raise Exception('reading an array') from ValueError(
            'ABORTED: [OS error 24: EMFILE Too many open files]'
        )

    def full_from_another(*_):
        raise OSError(errno.EMFILE, 'Too many open files') from KeyError('x')

    for read in (full, full_in_tensorstore, full_from_another):
        monkeypatch.setattr(checkpoint.Checkpoints, '_read', read)
        with pytest.raises(OSError, match=r'Too many open files: .*/2'):
            _restored(tmp_path, mesh)
    assert {'1', '2'} <= set(os.listdir(tmp_path))


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
    assert int(state['step']) == 2 and data_state == {'next_index': 2}
    assert f'{tmp_path}/3 cannot be read' in capfd.readouterr().err
    # The checkpoint is set aside, not deleted.
    assert (tmp_path / 'damaged-3').is_dir() and not (tmp_path / '3').exists()
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
    state = {f'w{i}': jnp.arange(5000.0) + i for i in range(60)} | {'step': jnp.int32(7)}
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
    assert done.returncode == 0 and done.stdout == '7\n', done.stderr
    said = done.stderr.splitlines()
    assert [line.split(' cannot be read (')[0] for line in said] == [
        f'checkpoint {tmp_path}/{s}' for s in (4, 3, 2)
    ]
    assert 'OUT_OF_RANGE' in said[2] and all(len(line) < len(str(tmp_path)) + 250 for line in said)


def test_all_damaged_is_an_error_and_nothing_is_lost(tmp_path, mesh):
    _save(tmp_path, mesh, [1, 2], keep=10)
    for step in ('1', '2'):
        _truncate(tmp_path / step)
    with pytest.raises(UserError, match='none of the checkpoints'):
        _restored(tmp_path, mesh)
    assert {'1', '2'} <= set(os.listdir(tmp_path))
