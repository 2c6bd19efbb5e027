"""WebDataset's tars: every byte as tarfile has it, labels as they were written."""

import io
import json
import os
import tarfile

import numpy as np
import pytest

from sphere_ar_jax.data import sources
from sphere_ar_jax.data.files.webdataset import WebDataset
from sphere_ar_jax.runtime.console import UserError


def _write(path, files):
    """Writes a tar of {name: bytes or text}, or of pairs."""
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _refusal(make, *arguments):
    with pytest.raises(UserError) as caught:
        make(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_samples_are_files_of_one_key(tmp_path):
    files = {
        'b/2.jpg': b'two' * 300, 'b/2.cls': '5\n', 'b/2.txt': 'a caption', 'b/2.seg.png': b'mask',
        'a/1.json': json.dumps({'label': 2, 'width': 7}), 'a/1.WebP': b'one',
        'a/3.png': b'three', 'a/3.json': '{"label": 4}', 'a/3.cls': '0', '._x.jpg': b'',
        'alone.cls': '1',
    }  # fmt: skip
    path = _write(tmp_path / '00.tar', files)
    source = WebDataset(path)
    with tarfile.open(path) as archive:
        truth = [archive.extractfile(name).read() for name in ('b/2.jpg', 'a/1.WebP', 'a/3.png')]
    assert [source[i]['image'] for i in range(3)] == truth
    assert len(source) == 3
    assert [int(source[i]['label']) for i in range(3)] == [5, 2, 0]  # .cls goes before .json
    assert source.num_classes == 6
    assert source.class_names is None
    assert [source.name(i) for i in range(3)] == ['00.tar/b/2', '00.tar/a/1', '00.tar/a/3']
    assert source.left_out == '2 file(s) that are no images (.seg.png 1, .txt 1); 1 hidden file(s)'
    assert sorted(os.listdir(tmp_path)) == ['00.tar', '00.tar.index.npz']
    other = bytearray(path.read_bytes())
    other[other.index(b'b/2.jpg')] ^= 1
    path.write_bytes(other)
    assert 'has changed since' in _refusal(source.__getitem__, 0)
    assert 'bad checksum' in _refusal(WebDataset, path)
    _write(path, {'c.jpg': b'another', 'c.cls': '1'})
    assert WebDataset(path).name(0) == '00.tar/c'


def test_tars_are_named_by_directories_ranges_and_patterns(tmp_path):
    for i in range(12):
        _write(tmp_path / f'train-{i:03d}.tar', {f'{i}.jpg': f'{i}', f'{i}.cls': 'ab'[i % 2]})
    for path, count in (
        (tmp_path, 12),
        (tmp_path / 'train-{008..010}.tar', 3),
        (tmp_path / 'train-{000..000}{8..9}.tar', 0),
        (tmp_path / 'train-00?.tar', 10),
        (tmp_path / 'train-004.tar', 1),
        (tmp_path / 'train-0*', 12),  # beside them lie their indices now
    ):
        if count:
            source = WebDataset(path)
            assert [source[i]['image'] for i in (0, -1)] == [
                str(int(source.name(i)[6:9])).encode() for i in (0, -1)
            ]
            assert len(source) == count
        else:
            assert 'there is no' in _refusal(WebDataset, path)
    assert (tmp_path / 'train-004.tar.index.npz').exists()
    assert 'a range goes upwards' in _refusal(WebDataset, tmp_path / 'train-{010..008}.tar')
    assert WebDataset(tmp_path).class_names == ('a', 'b')
    training, heldout = sources.split(WebDataset(tmp_path), 0.3)
    for i in range(12):
        (tmp_path / f'train-{i:03d}.tar').rename(tmp_path / f'train-{i:03d}.tar.away')
    few = [name for name in os.listdir(tmp_path) if name.endswith('away')][:7]
    for name in few:
        (tmp_path / name).rename(tmp_path / name.removesuffix('.away'))
    _, of_few = sources.split(WebDataset(tmp_path), 0.3)
    kept = {heldout.name(i) for i in range(len(heldout))}
    assert {of_few.name(i) for i in range(len(of_few))} == {
        name for name in kept if f'{name.split("/")[0]}.away' in few
    }
    assert len(training) + len(heldout) == 12
    _write(tmp_path / 'test-000.tar', {})
    assert f'data=webdataset:{tmp_path}/train*.tar' in _refusal(WebDataset, tmp_path)


def test_what_is_no_webdataset_is_refused(tmp_path):
    path = tmp_path / 'a.tar'
    for files, message in (
        ({'1.jpg': b'', '2.jpg': b'', '1.cls': '0'}, '1 of 2 images have no label: each needs'),
        ({'1.jpg': b'', '1.png': b''}, 'two images of the sample 1'),
        ({'1.jpg': b'', '1.txt': 'a', '1.TXT': 'b'}, 'two texts of the sample 1'),
        ({'1.txt': b'', '1.cls': '0'}, 'holds no images (1 file(s) that are no images (.txt 1))'),
        ({'1.jpg': b'', '1.cls': '-1'}, '1 of 1 images have no label'),
    ):
        assert message in _refusal(WebDataset, _write(path, files))
    # A model that reads captions needs no labels.
    _write(path, {'1.jpg': b'x', '2.jpg': b'y', '1.cls': '0'})
    source = sources.open_source('webdataset', str(path), needs_labels=False)
    assert source.num_classes == 1
    assert [int(source[i]['label']) for i in range(2)] == [0, 0]
    # A byte order mark, as some editors write it, is no part of a label.
    marked = {'1.cls': b'\xef\xbb\xbf1', '2.json': b'\xef\xbb\xbf{"label": 0}'}
    source = WebDataset(_write(path, {'1.jpg': b'', '2.jpg': b''} | marked))
    assert source.class_names is None
    assert [int(source[i]['label']) for i in range(2)] == [1, 0]
    # What only Python takes for a number is a name, and numbers may be too large.
    source = WebDataset(_write(path, {'1.jpg': b'', '2.jpg': b'', '1.cls': '1_0', '2.cls': '10'}))
    assert source.class_names == ('10', '1_0')
    large = {'1.jpg': b'', '1.cls': '123456789012345678901'}
    assert 'to 123456789012345678901, but they must' in _refusal(WebDataset, _write(path, large))
    _write(path, {'1.jpg': b'x', '2.jpg': b'y', '2.txt': 'text'})
    source = WebDataset(path)
    assert source.class_names == ('a.tar',)
    assert source[1]['label'] == np.int32(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:1100])
    assert 'cut off' in _refusal(WebDataset, path)
    assert 'there is no' in _refusal(WebDataset, tmp_path / 'none')
    (tmp_path / 'empty').mkdir()
    assert 'holds no files *.tar' in _refusal(WebDataset, tmp_path / 'empty')
