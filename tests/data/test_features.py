"""Files of texts and of their features."""

import io
import pickle
import unicodedata
import zipfile

import numpy as np
import pytest

from sphere_ar_jax.data.captions import features
from sphere_ar_jax.runtime.console import UserError

TEXTS = ['a one', ' a two ', 'zwei Ü']


def test_features_are_found_by_their_text(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float16)
    values[2, 1] = np.inf
    np.savez(tmp_path / 'f.npz', texts=TEXTS, features=values)
    found = features.open_features(str(tmp_path / 'f.npz'))
    assert found.shape == (4, 6)
    assert found.texts == tuple(TEXTS)
    for text in ('a two', ' a two'):
        label = found(text)
        assert label.dtype == np.float32
        np.testing.assert_array_equal(label, values[1].astype(np.float32))
    assert pickle.loads(pickle.dumps(found)) is found  # opened once in each process
    with pytest.raises(UserError, match="no features of the text 'a three': add them"):
        found('a three')
    # In whatever form of Unicode the text is written.
    for form in ('NFC', 'NFD'):
        with pytest.raises(UserError, match='numbers that are all 0 or not finite'):
            found(unicodedata.normalize(form, 'zwei Ü'))


def test_one_vector_of_a_text_is_one_place(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 6))
    np.savez(tmp_path / 'f.npz', texts=TEXTS, features=values)
    found = features.TextFeatures(tmp_path / 'f.npz')
    assert found.shape == (1, 6)
    np.testing.assert_array_equal(found('a one'), values[:1].astype(np.float32))


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        ({'texts': TEXTS}, 'is no npz with texts and their features: '),
        ({'texts': TEXTS, 'features': np.ones((3, 2), int)}, r'features \(N, T, F\) of floats'),
        ({'texts': [1, 2], 'features': np.ones((2, 2))}, r'must have texts \(N,\)'),
        ({'texts': TEXTS, 'features': np.ones((2, 2, 2))}, r'\(3,\) and float64 \(2, 2, 2\)'),
        ({'texts': 'a', 'features': np.ones((1, 2))}, r'<U1 \(\) and float64 \(1, 1, 2\)'),
        ({'texts': ['a', 'b', ' a'], 'features': np.ones((3, 2))}, 'has a text twice'),
        ({'texts': np.array(TEXTS, object), 'features': np.ones((3, 2))}, 'is no npz'),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / 'f.npz', **arrays)
    with pytest.raises(UserError, match=message) as error:
        features.TextFeatures(tmp_path / 'f.npz')
    assert '\n' not in str(error.value)


def _npy(array, claimed):
    """An array's npy whose header claims another shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {'descr': array.dtype.str, 'fortran_order': False, 'shape': claimed}
    )
    return file.getvalue() + array.tobytes()


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    path = tmp_path / 'f.npz'
    path.write_bytes(b'nothing')
    with pytest.raises(UserError, match='is no npz with texts and their features'):
        features.TextFeatures(path)
    # More numbers than any memory holds.
    values = np.ones((1, 2), np.float32)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('texts.npy', _npy(np.array(['a']), (1,)))
        archive.writestr('features.npy', _npy(values, (10**6, 10**6, 2)))
    with pytest.raises(UserError, match='is no npz with texts and their features'):
        features.TextFeatures(path)
    # A member that says it is encrypted, in both places where a zip does.
    np.savez(path, texts=np.array(['a']), features=values)
    content = bytearray(path.read_bytes())
    for mark, flags in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        start = content.find(mark)
        content[start + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match='encrypted'):
        features.TextFeatures(path)
    with pytest.raises(UserError, match=r'no file .*absent.npz with .* give --config\.ar\.f'):
        features.TextFeatures(tmp_path / 'absent.npz')
