"""Files that are whole or absent, the lock of a directory, and the cache of compiled programs."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import zlib

import pytest
from jax._src.lru_cache import LRUCache

from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, number):
    path = tmp_path / 'a.json'
    files.write_json(path, {'a': 1})

    def write(f):
        f.write(b'half')
        raise OSError(number, os.strerror(number))  # Without a path, as `write` raises it.

    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        files.replace(path, write)
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert os.listdir(tmp_path) == ['a.json']
    assert json.loads(path.read_text()) == {'a': 1}


def test_an_interrupt_leaves_no_half_file(tmp_path):
    def write(f):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(tmp_path / 'a', write)
    assert os.listdir(tmp_path) == []


def test_an_error_keeps_the_path_that_it_has(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.naming('other'):
        (tmp_path / 'none').read_bytes()
    assert caught.value.filename == str(tmp_path / 'none')


def _take(directory):
    with files.owned(str(directory), 'a sampling'):
        pass


def test_a_directory_has_one_owner(tmp_path):
    directory = tmp_path / 'new' / 'w'
    with files.owned(str(directory), 'a training'):
        note = json.loads((directory / 'lock.json').read_text())
        assert note['pid'] == os.getpid()
        assert note['command'] == sys.argv
        line = (
            f'{directory} is in use by a training, process {os.getpid()} on {note["host"]}, '
            f'since {note["since"]}: wait for its end, or stop it'
        )
        with pytest.raises(UserError, match=f'^{re.escape(line)}$'):
            _take(directory)
        assert json.loads((directory / 'lock.json').read_text()) == note
        with files.owned(str(tmp_path / 'other'), 'a sampling'):
            pass
    assert os.listdir(directory) == []
    with files.owned(str(directory), 'a sampling'):
        assert json.loads((directory / 'lock.json').read_text())['what'] == 'a sampling'


def test_an_error_sets_the_directory_free(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), files.owned(str(tmp_path), 'a training'):
            raise KeyError


DIES = """
import filelock, os, signal, sys
filelock.FileLock(sys.argv[1] + '/lock').acquire()
open(sys.argv[1] + '/lock.json', 'w').write('{"what": "a training", "pid": 1}')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lock_of_a_dead_owner_is_taken_over(tmp_path):
    done = subprocess.run([sys.executable, '-c', DIES, tmp_path], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / 'lock.json').exists()
    with files.owned(str(tmp_path), 'a sampling'):
        assert json.loads((tmp_path / 'lock.json').read_text())['pid'] == os.getpid()


@pytest.mark.parametrize(
    'note',
    [
        '',
        '[' * 100_000,
        '[]',
        '{"what": 1}',
        json.dumps({'what': '\x1b[2J' + 'x' * 10**6, 'pid': 1, 'host': 'h', 'since': '\n'}),
    ],
)
def test_a_broken_note_of_the_owner_is_still_one_line(tmp_path, note):
    with files.owned(str(tmp_path), 'a training'):
        (tmp_path / 'lock.json').write_text(note)
        with pytest.raises(UserError, match='is in use by') as caught:
            _take(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(tmp_path)) + 400


def test_directories_in_buckets_are_not_locked():
    with files.owned('gs://bucket/w', 'a training'), files.owned('gs://bucket/w', 'a training'):
        pass


def _entries(cache):
    return sorted(name for name in os.listdir(cache) if name[0] != '.')


@pytest.fixture
def cache(tmp_path):
    """JAX's own cache with two entries, and its directory."""
    lru = LRUCache(str(tmp_path), max_size=2**20)
    for key in 'ab':
        lru.put(key, zlib.compress(key.encode() * 1000))
    return lru, tmp_path


def _lose_time(path):
    (path / 'a-atime').unlink()


def _lose_entry(path):
    (path / 'a-cache').unlink()


def _cut(path):
    whole = (path / 'a-cache').read_bytes()
    (path / 'a-cache').write_bytes(whole[:-5])


def _flip(path):
    whole = bytearray((path / 'a-cache').read_bytes())
    whole[-1] ^= 1
    (path / 'a-cache').write_bytes(bytes(whole))


def _empty(path):
    (path / 'a-cache').write_bytes(b'')


@pytest.mark.parametrize('swept', [False, True])
@pytest.mark.parametrize('damage', [_lose_time, _lose_entry, _cut, _flip, _empty])
def test_what_a_kill_leaves_in_the_cache_is_removed(cache, damage, swept):
    lru, path = cache
    if swept:
        files.sweep_compilation_cache(str(path))
        assert _entries(path) == ['a-atime', 'a-cache', 'b-atime', 'b-cache']
    damage(path)
    files.sweep_compilation_cache(str(path))
    assert _entries(path) == ['b-atime', 'b-cache']
    lru.put('a', zlib.compress(b'again'))  # JAX raises here where an entry is alone.
    assert zlib.decompress(lru.get('a')) == b'again'
    assert zlib.decompress(lru.get('b')) == b'b' * 1000


def test_a_cache_that_jax_uses_is_left_alone(cache):
    lru, path = cache
    _empty(path)
    with lru.lock:
        files.sweep_compilation_cache(str(path))
    assert 'a-cache' in _entries(path)


def test_no_cache_is_no_error(tmp_path):
    files.sweep_compilation_cache(str(tmp_path / 'none'))
    assert os.listdir(tmp_path) == []


def test_a_sweep_looks_at_a_bounded_number_of_bytes(cache, monkeypatch):
    """The newest entry alone, here; the older one was whole when it was written."""
    _, path = cache
    os.utime(path / 'b-cache', (2**31, 2**31))
    seen = []
    monkeypatch.setattr(files, '_CHECKED', (path / 'b-cache').stat().st_size)
    monkeypatch.setattr(files, '_is_readable', lambda path: seen.append(path) or True)
    files.sweep_compilation_cache(str(path))
    assert seen == [str(path / 'b-cache')]


def test_paths_from_the_root(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert files.absolute('~/f.npz') == '/home/me/f.npz'
    assert files.absolute('gs://bucket/~/w') == 'gs://bucket/~/w'
    assert files.absolute('w') == os.path.abspath('w')
