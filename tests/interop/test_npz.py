"""npz and npy files of any origin: read right, or one printable line in bounded time."""

import io
import struct
import zipfile

import numpy as np
import pytest

from sphere_ar_jax.evaluation.fidelity import image_sets, protocol
from sphere_ar_jax.interop import npz
from sphere_ar_jax.runtime.console import UserError

IMAGES = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)


def _npy(header):
    """An npy of version 1.0 that has a header and no numbers."""
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(header)) + header


def _zip(members, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def _with_size(content, size):
    """A zip whose directory says another unpacked size of its first member."""
    at = content.index(b'PK\1\2') + 24
    return content[:at] + struct.pack('<I', size) + content[at + 4 :]


def _array(array):
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


HEADER = b"{'descr': '%s', 'fortran_order': False, 'shape': %s, }\n"
# What stands in arr_0.npy.
HOSTILE = {
    'brackets': _npy(b'(' * 9000),
    'brackets that fit': _npy(b'(' * 900),
    'minus signs': _npy(b'-' * 900 + b'1'),
    'spaces': _npy(b' ' * 9000),
    'a long text': _npy(b"'" + b'x' * 60_000 + b"'"),
    'escapes': _npy(b"{'\x1b[31m': 1}"),
    'no dictionary': _npy(b'[1]'),
    'a call': _npy(b"{'descr': print(1), 'fortran_order': False, 'shape': (1,)}"),
    'objects': _array(np.array([None])),
    'huge': _npy(HEADER % (b'|u1', b'(1099511627776, 1, 1, 3)')),
    'without end': _npy(HEADER % (b'|u1', b'(%d, 1, 1, 3)' % 2**200)),
    'negative': _npy(HEADER % (b'|u1', b'(-1, 1, 1, 3)')),
    'truth': _npy(HEADER % (b'|u1', b'(True, 1, 1, 3)')),
    'wide numbers': _npy(HEADER % (b'|V2147483647', b'(2147483647,)')),
    'another version': b'\x93NUMPY\7\0' + _npy(b'')[8:],
    'nothing': b'',
    'no magic': b'PK\3\4' * 10,
    'text': b'1 2 3',
}


def _refused(path):
    with pytest.raises(UserError) as error:
        list(image_sets.read_images(path))
    assert str(path) in str(error.value)
    line = str(error.value)
    assert line.isprintable(), line
    assert len(line) < len(str(path)) + 400, line
    return line


@pytest.mark.parametrize('what', HOSTILE)
def test_hostile_headers(tmp_path, what):
    path = tmp_path / 'a.npz'
    path.write_bytes(_zip({'arr_0.npy': HOSTILE[what]}))
    _refused(path)
    (tmp_path / 'a.npy').write_bytes(HOSTILE[what])
    with pytest.raises(UserError, match='is not a whole npy file') as error:
        npz.read_npy(tmp_path / 'a.npy')
    assert str(error.value).isprintable()


@pytest.mark.parametrize('method', [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_ways_to_compress_are_refused_by_name(tmp_path, method):
    path = tmp_path / 'a.npz'
    path.write_bytes(_zip({'arr_0.npy': _array(IMAGES)}, method))
    assert f'compressed by method {method}' in _refused(path)


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_that_say_they_unpack_to_too_much(tmp_path, method):
    path = tmp_path / 'a.npz'
    path.write_bytes(_with_size(_zip({'arr_0.npy': _array(IMAGES)}, method), 2**31))
    assert 'unpacks to 2147483648 bytes' in _refused(path)


def test_many_members(tmp_path):
    path = tmp_path / 'a.npz'
    path.write_bytes(_zip({f'{i}.npy': b'' for i in range(1001)}))
    assert 'has 1001 arrays' in _refused(path)


def test_names_are_printed_short_and_without_escapes(tmp_path):
    path = tmp_path / 'a.npz'
    path.write_bytes(_zip({'\x1b[31m' + 'x' * 60_000: b'', **{f'b{i}': b'' for i in range(500)}}))
    assert r'\x1b[31m' in _refused(path)


def test_hostile_statistics(tmp_path):
    """Shapes are compared before any number is read."""
    path = tmp_path / 'a.npz'
    good = {'mu': np.zeros(2048), 'mu_s': np.zeros(2023)}
    for header in (HEADER % (b'<f8', b'(1099511627776, 1099511627776)'), b'(' * 9000):
        members = {f'{name}.npy': _array(array) for name, array in good.items()}
        path.write_bytes(_zip(members | {'sigma.npy': _npy(header), 'sigma_s.npy': b''}))
        with pytest.raises(UserError) as error:
            protocol.summarize(path, None)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < len(str(path)) + 400


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, save):
    path = tmp_path / 'a.npz'
    arrays = {
        'arr_0': IMAGES,
        'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        'big': np.arange(3, dtype='>i4'),
        'zeros': np.zeros(10**6),
        'empty': np.zeros((0, 3)),
        'one': np.float32(7),
    }
    save(path, **arrays)
    np.testing.assert_array_equal(np.concatenate(list(image_sets.read_images(path, 1))), IMAGES)
    with npz.open_archive(path) as archive:
        assert sorted(npz.array_names(archive)) == sorted(arrays)
        for name, array in arrays.items():
            with archive.open(f'{name}.npy') as file:
                found = npz.read_numbers(file, npz.read_header(file))
            np.testing.assert_array_equal(found, array)
            assert found.dtype == np.asarray(array).dtype
    np.save(tmp_path / 'a.npy', arrays['fortran'])
    np.testing.assert_array_equal(npz.read_npy(tmp_path / 'a.npy'), arrays['fortran'])


def test_flipped_bits_and_cuts(tmp_path):
    """Each is read right or refused in one line; a zip has a checksum of every member."""
    content = _zip({'arr_0.npy': _array(IMAGES)}, zipfile.ZIP_DEFLATED)
    path = tmp_path / 'a.npz'
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        if rng.integers(4) == 0:
            damaged = damaged[: rng.integers(len(content))]
        path.write_bytes(damaged)
        try:
            found = np.concatenate(list(image_sets.read_images(path)))
        except UserError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            np.testing.assert_array_equal(found, IMAGES)
    assert refused > 150
