import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from sphere_ar_jax.interop import torch_file
from sphere_ar_jax.runtime.console import UserError
from tests import fuzz_torch_file as fuzz
from tests import torch_writer as w
from tests.conftest import GOLDENS

FILES = ('torch_zip.pt', 'torch_zip4.pt', 'torch_stream.pth')


def _open(tmp_path, data):
    path = tmp_path / 'file.pt'
    path.write_bytes(data)
    return torch_file.open_file(path)


def _refused(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as error:
        _open(tmp_path, data)
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize('name', FILES)
def test_files_of_pytorch_read_as_pytorch_reads_them(name):
    """Every dtype, stride and kind of value, in both containers, against what PyTorch wrote beside
    them.
    """
    tree = torch_file.open_file(GOLDENS / name)
    truth = dict(np.load(GOLDENS / 'torch_files.npz'))
    state = tree['optimizer']['state']
    flat = {key: value for key, value in tree.items() if isinstance(value, torch_file.Tensor)}
    flat |= {f'model/{key}': value for key, value in tree['model'].items()}
    flat |= {
        f'optimizer/{i}/{key}': value for i, slots in state.items() for key, value in slots.items()
    }
    assert set(flat) == set(truth)
    assert len(truth) == 12 + 10 + 9 + 1 + 6 * 3
    for key, tensor in flat.items():
        want = truth[key].astype(ml_dtypes.bfloat16) if key == 'bfloat16' else truth[key]
        got = np.asarray(tensor)
        assert (got.dtype, tensor.dtype, tensor.shape, got.shape) == (
            want.dtype,
            want.dtype,
            want.shape,
            want.shape,
        )
        assert got.flags.c_contiguous
        assert got.flags.writeable
        np.testing.assert_array_equal(got, want, err_msg=key)
        assert np.asarray(tensor, np.complex64).dtype == np.complex64
    assert tree['epoch'] == 3
    assert tree['optimizer']['param_groups'][0]['betas'] == (0.9, 0.999)
    plain = tree['plain']
    assert plain['args'] == argparse.Namespace(model='x', lr=3e-4, sizes=[1, (2, None)], wide=True)
    assert plain['args'].sizes[1] == (2, None)
    assert plain['args'].wide is True
    del plain['args']
    assert plain == {
        'size': (2, 3), 'device': 'cuda:1', 'dtype': np.dtype(ml_dtypes.bfloat16), 'set': {1, 2},
        'frozen': frozenset('ab'), 'bytes': b'\x00\xff', 'complex': 1 - 2j, 'none': None,
        'big': 2**100, 'numpy': 0.1, 'numpy_int': -7,
        'key': {1: 'a', 2.5: 'b', None: 'c', 'ü': 'd'},
    }  # fmt: skip
    assert type(plain['frozen']) is frozenset
    assert type(plain['numpy_int']) is int


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    """Only a tensor that is asked for is read, and only its part of the storage once that has been
    verified.
    """
    counts = []
    fromfile = np.fromfile

    def counted(path, dtype, count, **options):
        counts.append(count)
        return fromfile(path, dtype, count, **options)

    monkeypatch.setattr(np, 'fromfile', counted)
    value = w.dictionary({'a': w.tensor(w.storage('0', 9000), (2, 3), (3, 1), 7)})
    for data, want in (
        (w.zip_file(value, {'0': np.arange(9000, dtype=np.float16).tobytes()}), [18000, 12, 12]),
        (
            w.stream_file(value, {'0': (9000, np.arange(9000, dtype=np.float16).tobytes())}),
            [12, 12],
        ),
    ):
        tree = _open(tmp_path, data)
        assert sum(counts) < 300
        counts.clear()
        for _ in range(2):
            np.testing.assert_array_equal(tree['a'], np.arange(7, 13).reshape(2, 3))
        assert counts == want
        counts.clear()


def test_damage_of_numbers_is_told_by_the_checksum(tmp_path):
    value = w.dictionary({'a': w.tensor(w.storage('0', 4), (4,))})
    data = w.zip_file(value, {'0': b'ABCDEFGH'})
    at = data.index(b'ABCDEFGH')
    damaged = data[:at] + b'A' + b'C' + data[at + 2 :]
    with pytest.raises(UserError, match=r"file\.pt is damaged: the checksum of storage '0'"):
        np.asarray(_open(tmp_path, damaged)['a'])
    # a file written without checksums has zeros for them, and is read
    directory = damaged.index(b'PK\x01\x02')
    crc = struct.pack('<I', zipfile.zlib.crc32(b'ABCDEFGH'))
    unchecked = damaged[:directory] + damaged[directory:].replace(crc, bytes(4))
    assert _open(tmp_path, unchecked)['a'].read().tobytes() == b'ACCDEFGH'


def test_a_file_that_shrinks_is_told(tmp_path):
    tree = _open(
        tmp_path,
        w.stream_file(
            w.dictionary({'a': w.tensor(w.storage('0', 4), (4,))}), {'0': (4, b'ABCDEFGH')}
        ),
    )
    os.truncate(tmp_path / 'file.pt', 20)
    with pytest.raises(UserError, match='has become shorter'):
        tree['a'].read()


def test_old_ways_of_pickling_read(tmp_path):
    """As Python 2 and PyTorch before 0.4 wrote: short strings, pairs in an OrderedDict, Parameter
    with a state.
    """
    one = w.tensor(w.storage('0', 4), (2, 2)).replace(b'_v2', b'').replace(b'\x89Nt', b't')
    parameter = w.name('torch.nn.parameter', 'Parameter') + one + b'\x85\x81(\x88\x89Ntb'
    pairs = b'](](U\x06weight' + parameter + b'e](U\x04bias' + one + b'ee'
    value = w.name('collections', 'OrderedDict') + pairs + b'\x85R'
    tree = _open(
        tmp_path, w.stream_file(value, {'0': (4, np.arange(4, dtype=np.float16).tobytes())})
    )
    assert list(tree) == ['weight', 'bias']
    for tensor in tree.values():
        np.testing.assert_array_equal(tensor, [[0, 1], [2, 3]])


def test_other_files_are_refused_by_name(tmp_path):
    value, storages = fuzz.small_tree()
    raw = {key: data for key, (_, data) in storages.items()}
    stream = w.stream_file(value, storages)
    for data, message in (
        (b'', 'it is no file of PyTorch'),
        (b'\x89HDF\r\n', 'it is no file of PyTorch'),
        (b'\x80\x02K\x01.', 'it is no file of PyTorch'),
        (bytes(257) + b'ustar' + bytes(300), 'it is a tar file, of PyTorch 0.1'),
        (w.zip_file(value, raw, {'constants.pkl': b''}), 'it is a TorchScript archive'),
        (
            w.zip_file(value, raw, {'byteorder': b'big'}),
            "its byte order is b'big': only little-endian",
        ),
        (
            stream.replace(w.SYSTEM, w.SYSTEM.replace(b'\x88', b'\x89')),
            'its byte order is big-endian',
        ),
        (
            w.zip_file(value, raw).replace(b'data.pkl', b'data.xyz'),
            'it is a zip file, but none that PyTorch saved',
        ),
        (stream + b'x', 'it has more bytes than its storages'),
        (stream[:-12], "it is cut off within storage '1'"),
        (stream[:-1], 'does not have the size'),
    ):
        _refused(tmp_path, data, message)
    with pytest.raises(FileNotFoundError):
        torch_file.open_file(tmp_path / 'absent.pt')


def test_few_keys_may_be_large_numbers_or_fractions(tmp_path):
    """As those of a scheduler's milestones."""
    numbers = [3_000_000, -(2**59), 7]
    value = b'}(' + b''.join(w.number(n) + b'N' for n in numbers) + b'u'
    fraction = b'}G' + struct.pack('>d', 0.3) + b'Ns'
    path = tmp_path / 'a.pt'
    path.write_bytes(w.zip_file(b'(' + value + fraction + b't'))
    assert torch_file.open_file(path) == (dict.fromkeys(numbers), {0.3: None})


@pytest.mark.parametrize('what', fuzz.HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, what):
    containers = (w.zip_file,) if what.startswith('many') else (w.zip_file, w.stream_file)
    for container in containers:
        _refused(tmp_path, fuzz.hostile_file(what, container), fuzz.HOSTILE[what][1])


def test_zips_that_lie_are_refused_by_name(tmp_path):
    value, storages = fuzz.small_tree()
    raw = {key: data for key, (_, data) in storages.items()}
    data = w.zip_file(value, raw)
    directory = data.index(b'PK\x01\x02')
    entry = [match.start() for match in re.finditer(b'PK\x01\x02', data)]
    at = next(e for e in entry if data[e + 46 :].startswith(b'archive/data/1'))

    def changed(where, number, size=4):
        return data[:where] + number.to_bytes(size, 'little') + data[where + size :]

    for lie, message in (
        (
            changed(at + 24, 11),
            "member 'archive/data/1' does not have the size that the directory says",
        ),
        (changed(at + 20, 2**31), "'archive/data/1' does not have the size"),
        (
            changed(at + 42, int.from_bytes(data[at - 18 : at - 14], 'little')),
            'overlaps another|is not where',
        ),
        (changed(at + 42, directory + 5), 'overlaps another or the directory'),
        (changed(at + 10, 8, 2), "member 'archive/data/1' is compressed"),
        (changed(at + 8, 1, 2), "member 'archive/data/1' is compressed"),
        (
            data[: at + 46] + b'archive/data/9' + data[at + 60 :],
            "member 'archive/data/9' is not where",
        ),
        (
            data.replace(b'archive/data/1', b'archive/data/0'),
            "member 'archive/data/0' is there twice",
        ),
        (data.replace(b'archive/data/1', b'../../../../..'), "it lacks storage '1'"),
        (data[:-5], 'it is a damaged zip file'),
    ):
        _refused(tmp_path, lie, message)


def test_a_list_of_storages_that_repeats_a_long_name_is_refused_at_once(tmp_path):
    """Sorting it would compare 10 MB a hundred thousand times, which takes minutes."""
    keys = b'](' + w.text('x' * 10**7) + b'q\x00' + b'h\x00' * 100_000 + b'e'
    data = w.MAGIC + w.pickle(w.number(1001)) + w.SYSTEM + w.pickle(b'}') + w.pickle(keys)
    _refused(tmp_path, data, 'list of storages does not match')


@pytest.mark.parametrize('count', [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_are_read_right_or_refused(count):
    memory = '/dev/shm' if os.path.isdir('/dev/shm') else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        command = [sys.executable, '-m', 'tests.fuzz_torch_file', str(count), '0', directory]
        run = subprocess.run(
            command,
            cwd=GOLDENS.parent.parent,
            capture_output=True,
            text=True,
            timeout=3000,
            check=True,
        )
    found = json.loads(run.stdout)
    assert (found['bad'], found['events']) == ([], [])
    results = found['results']
    assert results['hostile'].keys() == {'refused'}
    assert sum(sum(outcomes.values()) for outcomes in results.values()) >= count + len(fuzz.HOSTILE)
    # The mutations do something.
    for what in ('bytes of zip', 'bytes of stream', 'directory', 'members', 'pickle'):
        assert min(results[what]['read'], results[what]['refused']) > count / 500, what
