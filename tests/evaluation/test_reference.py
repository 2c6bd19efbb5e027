"""References: directories as sets of images, statistics in parts, and the command."""

import pathlib

import chex
import numpy as np
import pytest
from PIL import Image

from sphere_ar_jax.commands import evaluate
from sphere_ar_jax.data import augment, sources
from sphere_ar_jax.evaluation.fidelity import (
    image_sets,
    inception,
    protocol,
    reference,
    statistics,
)
from sphere_ar_jax.runtime.console import UserError
from tests.evaluation.test_fidelity import reference_arrays


def _pixels(n, height=12, width=16):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def _fill(directory, images):
    """Writes images as PNG files into directories a, b, a, b, …, and beside them no images."""
    for i, image in enumerate(images):
        path = directory / 'ab'[i % 2] / f'{i:03d}.PNG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (directory / 'a' / '._000.png').write_bytes(b'AppleDouble')
    (directory / 'notes.txt').write_text('no image')
    (directory / '.cache').mkdir()
    (directory / '.cache' / 'x.png').write_bytes(b'hidden')
    return directory


def test_a_directory_is_a_set_of_images(tmp_path):
    """All images below it in the order of their paths, as in the npz of the same images."""
    images = _pixels(7)
    directory = _fill(tmp_path / 'set', images)
    expected = np.concatenate([images[::2], images[1::2]])
    batches = list(image_sets.read_images(directory, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), expected)
    np.savez(tmp_path / 'set.npz', arr_0=expected)
    for path in (directory, tmp_path / 'set.npz'):
        assert image_sets.count_images(path) == 7


def test_linked_directories_belong_to_a_set(tmp_path):
    """Each once, also where links lead back, as in a training."""
    elsewhere = _fill(tmp_path / 'elsewhere', _pixels(4))
    directory = _fill(tmp_path / 'set', _pixels(3))
    (directory / 'linked').symlink_to(elsewhere, target_is_directory=True)
    (directory / 'again').symlink_to(elsewhere, target_is_directory=True)
    (directory / 'b' / 'back').symlink_to(directory, target_is_directory=True)
    assert image_sets.count_images(directory) == 7


def test_directories_that_are_no_set(tmp_path):
    directory = _fill(tmp_path / 'set', _pixels(3))
    Image.fromarray(_pixels(1, 5, 5)[0]).save(directory / 'b' / 'z.png')
    with pytest.raises(UserError, match=r'z.png has \(5, 5\) pixels, but .*one size'):
        list(image_sets.read_images(directory))
    (directory / 'b' / 'z.png').write_bytes(b'none')
    with pytest.raises(UserError, match='cannot be decoded: it is no whole image') as caught:
        list(image_sets.read_images(directory))
    assert '\n' not in str(caught.value)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no images'):
        image_sets.count_images(tmp_path / 'empty')
    with pytest.raises(FileNotFoundError):
        protocol.evaluate(tmp_path / 'nowhere', directory, None)


@pytest.mark.parametrize('m', [1, 2, 40])
def test_merged_statistics_are_those_of_all(m):
    x = np.random.default_rng(1).normal(3.0, 2.0, (30 + m, 5))
    first = statistics.statistics(x[:30])
    second = reference._moments(x[30:])
    found = statistics.merged(first, 30, second, m)
    np.testing.assert_allclose(found.mu, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(x.T), rtol=1e-12)


def _features(batches, params, *, batch_size, progress):
    """A stand-in for the network: a few means of pixels."""
    del params, batch_size
    images = np.concatenate(list(batches)).astype(np.float32)
    progress(len(images))
    pool = images.mean(axis=(1, 2))
    return inception.Features(pool, pool[:, :2] ** 2, pool)


def test_statistics_of_a_source_in_parts(tmp_path, monkeypatch):
    """A file of statistics and spread images; one image of the source is broken."""
    images = _pixels(9, 8, 8)
    directory = _fill(tmp_path / 'data', images)
    (directory / 'a' / 'broken.png').write_bytes(b'none')
    monkeypatch.setattr(protocol, 'extract', _features)
    monkeypatch.setattr(reference, '_BATCH', 2)
    monkeypatch.setattr(reference, '_BATCHES', 2)
    crops = reference.Crops(sources.ImageFolder(directory), 8)
    done = []
    found = reference.write(
        tmp_path / 'r.npz', crops, {}, kept=4, progress=lambda *a: done.append(a)
    )
    assert found == {'kept': 4, 'images': 9}
    assert done[-1] == (9, 10)
    assert list(crops.broken.values()) == [
        'a/broken.png: it is no whole image of a format that is read: '
        'JPEG, PNG, WEBP, BMP, PPM, TIFF, GIF'
    ]
    ordered = np.concatenate([images[::2], images[1::2]])
    pool = ordered.mean(axis=(1, 2), dtype=np.float64)
    with np.load(tmp_path / 'r.npz') as written:
        assert written['n'] == 9
        np.testing.assert_allclose(written['mu'], pool.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(written['sigma'], np.cov(pool.T), rtol=1e-4)
        np.testing.assert_allclose(written['sigma_s'], np.cov(pool[:, :2].T ** 2), rtol=1e-4)
        chex.assert_shape(written['arr_0'], (4, 8, 8, 3))
        np.testing.assert_array_equal(written['arr_0'][[0, -1]], ordered[[0, -1]])


def test_the_number_of_images_is_read_and_said(tmp_path):
    arrays = reference_arrays(0)
    np.savez(tmp_path / 'r.npz', n=1234, **arrays)
    found = protocol.summarize(tmp_path / 'r.npz', None)
    assert found.images == 1234
    assert found.describe()['images'] == 1234
    np.savez(tmp_path / 'r.npz', n=np.arange(2), **arrays)
    with pytest.raises(UserError, match='n must be a whole number, but is int64'):
        protocol.summarize(tmp_path / 'r.npz', None)


def test_statistics_need_no_labels(tmp_path, capsys):
    """Columns of widths and heights do not matter, and images beside classes are not taken."""
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    directory = _fill(tmp_path / 'data', _pixels(5, 20, 30))
    source = sources.ImageFolder(directory)
    files = [pathlib.Path(source.file(i)) for i in range(len(source))]
    columns = {'image': [file.read_bytes() for file in files]}
    columns |= {'width': [20] * len(files), 'height': [30] * len(files)}
    parquet.write_table(pa.table(columns), tmp_path / 'a.parquet')
    (directory / 'stray.png').write_bytes(files[0].read_bytes())
    for data, left_out in (
        (f'parquet:{tmp_path}/a.parquet', ''),
        (f'folder:{directory}', 'beside'),
    ):
        evaluate.write_reference(data, 8, str(tmp_path / 'r.npz'))
        assert left_out in capsys.readouterr().out
        assert np.load(tmp_path / 'r.npz')['arr_0'].shape == (len(files), 8, 8, 3)


def test_the_command_writes_images_alone_without_weights(tmp_path, capsys):
    directory = _fill(tmp_path / 'data', _pixels(5, 20, 30))
    (directory / 'b' / 'broken.png').write_bytes(b'none')
    path = tmp_path / 'r.npz'
    evaluate.write_reference(f'folder:{directory}', 8, str(path))
    said = capsys.readouterr().out
    assert '6 images of 2 classes' in said
    assert 'left out: 1 image(s) that cannot' in said
    assert said.endswith(
        '5 images of 8×8 pixels, without statistics, since there is no --inception\n'
    )
    first = Image.open(directory / 'a' / '000.PNG')
    with np.load(path) as written:
        assert set(written.files) == {'arr_0'}
        assert written['arr_0'].shape == (5, 8, 8, 3)
        np.testing.assert_array_equal(written['arr_0'][0], augment.center_crop(first, 8))
    # Directories are made before the images are read.
    evaluate.write_reference(f'folder:{directory}', 8, str(tmp_path / 'new' / 'r.npz'))
    assert (tmp_path / 'new' / 'r.npz').exists()
    for data, output, message in (
        ('digits:x', path, 'digits'),
        (f'folder:{directory}', tmp_path / 'r.txt', 'must end in .npz'),
        (f'folder:{directory}', 'gs://bucket/r.npz', 'is written to a local disk'),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.write_reference(data, 8, str(output))
