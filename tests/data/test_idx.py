"""IDX files: what is read, and what is refused in one line that names the file."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphere_ar_jax.data import batches, idx, small
from sphere_ar_jax.runtime.console import UserError

CODES = {'u1': 8, 'i1': 9, '>i2': 11, '>i4': 12, '>f4': 13, '>f8': 14}


def encoded(array, dtype='u1'):
    """An array as an IDX file, by the format's description."""
    array = np.asarray(array, dtype)
    header = bytes([0, 0, CODES[dtype], array.ndim])
    return header + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


def write(directory, prefix='', test='t10k', first=0, packed=True, shape=(28, 28)):
    """Writes a data set of 12 and 6 images of three classes. Returns its arrays by file name."""
    directory.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (('train', 12), (test, 6)):
        images = rng.integers(0, 256, (n, *shape)).astype(np.uint8)
        arrays[f'{prefix}{part}-images-idx3-ubyte'] = images
        arrays[f'{prefix}{part}-labels-idx1-ubyte'] = (np.arange(n) % 3 + first).astype(np.uint8)
    for name, array in arrays.items():
        content = encoded(array)
        if packed:
            (directory / f'{name}.gz').write_bytes(gzip.compress(content))
        else:
            (directory / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('test', ['t10k', 'test'])
def test_a_data_set(tmp_path, packed, test):
    """28×28 pixels lie in the middle of 32×32, on the ground, in [−1, 1]."""
    arrays = write(tmp_path, test=test, packed=packed)
    train, heldout = idx.splits(tmp_path)
    assert (len(train), len(heldout)) == (12, 6)
    assert train.image_shape == (32, 32, 1)
    assert train.num_classes == heldout.num_classes == 3
    assert train.class_names is None
    for split, name in ((train, 'train'), (heldout, test)):
        scans = arrays[f'{name}-images-idx3-ubyte']
        np.testing.assert_array_equal(split.labels, arrays[f'{name}-labels-idx1-ubyte'])
        images = np.stack([split[i]['image'] for i in range(len(split))])
        assert images.dtype == np.float32
        assert split[1]['label'] == 1
        expected = np.pad(scans / 127.5 - 1, ((0, 0), (2, 2), (2, 2)), constant_values=-1)
        np.testing.assert_allclose(images[..., 0], expected, atol=1e-6)
        np.testing.assert_allclose(split.pixels, scans / 255, atol=1e-7)
        np.testing.assert_allclose(split.to_pixels(images), split.pixels, atol=1e-6)
    assert heldout.name(-1) == f'{tmp_path} test [5]'
    with batches.batches(train, batch_size=4, seed=0) as found:
        batch = next(found)
    assert batch['image'].shape == (4, 32, 32, 1)
    assert batch['label'].dtype == np.int32


def test_images_that_are_not_square_and_samples_out_of_range(tmp_path):
    write(tmp_path, shape=(20, 9))
    train, _ = idx.splits(tmp_path)
    assert train.image_shape == (32, 32, 1)
    image = train[0]['image']
    np.testing.assert_allclose(train.to_pixels(image[None])[0], train.pixels[0], atol=1e-6)
    assert set(np.unique(train.to_pixels(3 * np.sign(image[None] + 1e-3)))) == {0.0, 1.0}


def test_emnist_is_turned_upright_and_its_letters_count_from_one(tmp_path):
    arrays = write(tmp_path, prefix='emnist-letters-', test='test', first=1)
    train, _ = idx.splits(tmp_path)
    turned = arrays['emnist-letters-train-images-idx3-ubyte'].transpose(0, 2, 1)
    np.testing.assert_allclose(train.pixels, turned / 255, atol=1e-7)
    assert train.num_classes == 3
    assert set(train.labels) == {0, 1, 2}
    write(tmp_path, prefix='emnist-balanced-', test='test')
    with pytest.raises(UserError, match=r'several data sets \(emnist-balanced, emnist-letters\)'):
        idx.splits(tmp_path)
    assert set(idx.splits(tmp_path / 'emnist-balanced')[0].labels) == {0, 1, 2}


def test_names_of_classes(tmp_path):
    write(tmp_path)
    (tmp_path / 'classes.txt').write_text('shirt\n bag \n\nboot\n')
    assert idx.splits(tmp_path)[1].class_names == ('shirt', 'bag', 'boot')
    (tmp_path / 'classes.txt').write_text('shirt\nbag\nboot\n', encoding='utf-8-sig')
    assert idx.splits(tmp_path)[1].class_names == ('shirt', 'bag', 'boot')
    (tmp_path / 'classes.txt').write_text('shirt\nbag\n')
    with pytest.raises(UserError, match=r'classes.txt has 2 names, but the labels are 0 to 2'):
        idx.splits(tmp_path)
    all_there_are = np.array([0, 255], np.uint8)
    (tmp_path / 'classes.txt').write_text('\n'.join(map(str, range(256))))
    assert len(idx._class_names(str(tmp_path), all_there_are)) == 256
    (tmp_path / 'classes.txt').write_bytes(b'\xff\xfe')
    with pytest.raises(UserError, match=r'classes.txt cannot be read: '):
        idx.splits(tmp_path)


GOOD = encoded(np.zeros((12, 28, 28)))
BAD = {
    'empty': (b'', 'no IDX file'),
    'text': (b'a text', 'no IDX file'),
    'code': (b'\0\0\x07\x03' + GOOD[4:], 'no IDX file'),
    'type': (encoded(np.zeros((12, 28, 28)), '>f4'), 'float32, but must be uint8'),
    'dimensions': (encoded(np.zeros((12, 784))), '2 dimension.s., but must have 3'),
    'header': (GOOD[:9], 'cut off'),
    'cut': (GOOD[:-1], 'more than it can hold|cut off'),
    'longer': (GOOD + b'\0', 'more than the 9408 elements'),
    'huge': (GOOD[:4] + b'\xff' * 12 + GOOD[16:], 'more than it can hold'),
    'packed and cut': (gzip.compress(GOOD)[:-9], 'ended before|cut off'),
    'packed and short': (gzip.compress(GOOD[:-1]), 'cut off: it has 9407 of 9408'),
    'packed and huge': (gzip.compress(GOOD[:4] + b'\x40\0\0\0' + GOOD[8:]), 'more than it can'),
    'checksum': (gzip.compress(GOOD)[:-8] + b'\0' * 8, 'CRC'),
    'none': (encoded(np.zeros((0, 28, 28))), 'has no images'),
    'count': (encoded(np.zeros((11, 28, 28))), '11 images, but .* 12 labels'),
    'size': (encoded(np.zeros((12, 27, 28))), r'\(27, 28\) to train on and of \(28, 28\)'),
}


@pytest.mark.parametrize('fault', BAD)
def test_bad_files_are_named_in_one_line(tmp_path, fault):
    write(tmp_path)
    content, message = BAD[fault]
    (tmp_path / 'train-images-idx3-ubyte.gz').write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        idx.splits(tmp_path)
    assert '\n' not in str(error.value)
    assert str(tmp_path) in str(error.value)


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_an_array_or_one_line(tmp_path_factory, content, packed):
    path = tmp_path_factory.getbasetemp() / 'any'
    path.write_bytes(gzip.compress(content) if packed else content)
    try:
        assert encoded(idx.read(path, 1)) == content
    except UserError as error:
        assert '\n' not in str(error)
        assert str(path) in str(error)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match='has no IDX files, as train-images-idx3-ubyte'):
        idx.splits(tmp_path)
    write(tmp_path)
    with pytest.raises(UserError, match='is a file: give the directory'):
        idx.splits(tmp_path / 'train-images-idx3-ubyte.gz')
    (tmp_path / 't10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(UserError, match=r'has no test-labels-idx1-ubyte \(or t10k-…\), .gz or not'):
        idx.splits(tmp_path)
    with pytest.raises(UserError, match='none cannot be read: No such file'):
        idx.splits(tmp_path / 'none' / 'there')
    with pytest.raises(UserError, match=r'give --config\.data\.path, of the idx data'):
        small.open_data_set('idx', None, 0, 0.2)


def test_labels_that_were_never_trained_on(tmp_path):
    write(tmp_path)
    (tmp_path / 't10k-labels-idx1-ubyte.gz').write_bytes(encoded([0, 1, 2, 3, 0, 1]))
    with pytest.raises(UserError, match='has labels 0 to 3, but the training images 0 to 2'):
        idx.splits(tmp_path)
