import errno
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax import checkpoint, sharding


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
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


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
    weights = (position * np.uint32(2654435761)) ^ ((position * np.uint32(40503)) >> np.uint32(7)) | np.uint32(1)
    assert checkpoint.fingerprint([leaf]) == [int((leaf.ravel().view(np.uint32) * weights).sum(dtype=np.uint32))]


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
    path = next(p for p in pathlib.Path(directory, 'data').rglob('*') if p.is_file() and '3' in p.read_text())
    path.write_text(path.read_text().replace('3', '4'))


def test_the_machine_s_faults_are_not_the_checkpoint_s(tmp_path, mesh, monkeypatch):
    _save(tmp_path, mesh, [1, 2], keep=10)

    def full(*_):
        raise OSError(errno.EMFILE, 'Too many open files')

    monkeypatch.setattr(checkpoint.Checkpoints, '_read', full)
    with pytest.raises(OSError, match='Too many open files'):
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
    assert (tmp_path / 'damaged-3').is_dir() and not (tmp_path / '3').exists()  # set aside, not deleted
    _save(tmp_path, mesh, [3], keep=10)  # and out of the way of the next save of that step
    assert int(_restored(tmp_path, mesh)[0]['step']) == 3


def test_all_damaged_is_an_error_and_nothing_is_lost(tmp_path, mesh):
    _save(tmp_path, mesh, [1, 2], keep=10)
    for step in ('1', '2'):
        _truncate(tmp_path / step)
    with pytest.raises(checkpoint.DamagedError, match='none of the checkpoints'):
        _restored(tmp_path, mesh)
    assert {'1', '2'} <= set(os.listdir(tmp_path))
