"""Parquet files and Hugging Face's data sets: columns by their types, and what is refused."""

import json
import pickle
import sys

import numpy as np
import pytest

from sphere_ar_jax.data import augment, sources
from sphere_ar_jax.data.captions import table
from sphere_ar_jax.data.files.listing import BrokenCaptionError
from sphere_ar_jax.data.files.parquet import Parquet
from sphere_ar_jax.runtime.console import UserError
from tests.fake_images import encode, picture

FILES = [encode(picture(i)) for i in range(6)]


def _refusal(make, *arguments):
    with pytest.raises(UserError) as caught:
        make(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Writes a Parquet file of columns, of row groups of two."""
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    def written(name='a.parquet', **columns):
        path = tmp_path / name
        parquet.write_table(pa.table(columns), path, row_group_size=2)
        return path

    return written


def test_columns_of_parquet_files(write, tmp_path):
    """Bytes or structs; integers, texts named label, or no labels at all."""
    structs = [{'bytes': content, 'path': None} for content in FILES]
    for columns, labels, names in (
        ({'jpg': FILES, 'class': [0, 2, 1, 1, 0, 2]}, [0, 2, 1, 1, 0, 2], None),
        ({'image': structs, 'x': FILES, 'label': list('babbaa')}, [1, 0, 1, 1, 0, 0], ('a', 'b')),
        ({'image': FILES, 'caption': list('abcdef')}, [0] * 6, ('a.parquet',)),
        ({'image': FILES, 'width': range(6), 'label': [3] * 6}, [3] * 6, None),
    ):
        source = Parquet(write(**columns))
        assert [source[i]['image'] for i in range(6)] == FILES
        assert [int(source[i]['label']) for i in range(6)] == labels
        assert source.class_names == names
        assert source[-1]['label'].dtype == np.int32
    write('b.parquet', image=FILES[:1], label=[1])
    source = Parquet(tmp_path)
    assert source.name(6) == 'b.parquet [0]'
    assert source.name(5) == 'a.parquet [5]'
    assert source[6]['image'] == FILES[0]
    assert len(source) == 7


def test_what_parquet_files_lack_is_said(write, tmp_path):
    for columns, message in (
        ({'text': list('ab')}, 'has no column of image bytes, but text'),
        ({'a': FILES, 'b': FILES}, 'several columns that may hold images, a, b: name the one'),
        ({'a': FILES, 'w': range(6), 'h': range(6)}, 'several columns that may hold labels, w, h'),
        ({'a': FILES, 'label': [0, None, 1, -1, 0, 0]}, '2 of 6 images have no label'),
        ({'a': FILES, 'label': [0, -7, 1, 1, 0, 0]}, 'has labels from -7 to 1'),
        ({'a': FILES, 'label': [0.0, 1.0] * 3}, 'has the label 0.0, a float: make the column one'),
        (
            {'a': FILES, 'id': np.array([2**63] * 6, np.uint64)},
            'to 9223372036854775808, but they must lie between 0 and 1048575: is the column one of',
        ),
        ({'a': FILES, 'id': [7, 2**20, 3, 0, 0, 0]}, 'has labels from 0 to 1048576, but they must'),
        ({'a': FILES[:0], 'label': np.zeros(0, np.int32)}, 'has no column of image bytes'),
    ):
        assert message in _refusal(Parquet, write(**columns))
    # A cell without an image is broken as an empty one is, so that another takes its place.
    source = Parquet(write(image=[*FILES[:3], None, b'']))
    assert [source[i]['image'] for i in (3, 4)] == [b'', b'']
    with pytest.raises(augment.BrokenImageError, match=r'^the file is empty$'):
        augment.central(source[3]['image'], 8)
    write('b.parquet', other=FILES)
    assert "b.parquet has no column 'image', which other" in _refusal(Parquet, tmp_path)
    (tmp_path / 'b.parquet').write_bytes(b'PAR1 and more')
    assert 'b.parquet cannot be read' in _refusal(Parquet, tmp_path)


def test_labels_that_are_not_needed_never_refuse_parquet_files(write, tmp_path):
    """A model that reads captions needs none: only a column named label counts, where it is one."""
    for columns, classes in (
        ({'image': FILES, 'w': range(6), 'h': range(6)}, 1),
        ({'image': FILES, 'width': range(6)}, 1),
        ({'image': FILES, 'label': [0, None, 1, -1, 0, 0]}, 1),
        ({'image': FILES, 'label': list('aabbcc'), 'h': range(6)}, 3),
        ({'image': FILES, 'label': range(6), 'h': range(6)}, 6),
    ):
        source = sources.open_source('parquet', str(write(**columns)), needs_labels=False)
        assert [source[i]['image'] for i in range(6)] == FILES
        assert source.num_classes == classes
        assert {int(source[i]['label']) for i in range(6)} == set(range(classes))
    # Where the file notes names of classes, as `datasets` does, the column counts.
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    noted = {'info': {'features': {'kind': {'names': ['a', 'b'], '_type': 'ClassLabel'}}}}
    columns = pa.table({'image': FILES, 'w': range(6), 'kind': [0, 1] * 3})
    path = tmp_path / 'noted.parquet'
    parquet.write_table(columns.replace_schema_metadata({'huggingface': json.dumps(noted)}), path)
    source = Parquet(path, needs_labels=False)
    assert source.class_names == ('a', 'b')
    assert int(source[1]['label']) == 1
    both = write(a=FILES, b=FILES)
    assert 'hold images, a, b' in _refusal(lambda: Parquet(both, needs_labels=False))


def test_captions_of_parquet_files(write, tmp_path):
    """Texts, lists of texts and rows with none, each from its row group of its file."""
    pa = pytest.importorskip('pyarrow')
    write(image=FILES, text=['a cat', None, ' ', 'a dog ', 'an ox', 'a cow'])
    write('b.parquet', image=FILES[:3], text=['a hen', 'a pig', ''], caption=['no', 'no', 'a ram'])
    source = Parquet(tmp_path, needs_labels=False)
    expected = [('a cat',), (), (), ('a dog',), ('an ox',), ('a cow',)]
    expected += [('a hen',), ('a pig',), ('a ram',)]
    for found in (source, pickle.loads(pickle.dumps(source))):
        assert [found.captions(i) for i in range(9)] == expected
        assert found.captions(-2) == ('a pig',)
    captioned = table.with_captions(source, 'beside')
    assert captioned[4]['captions'] == ('an ox',)
    assert captioned[4]['image'] == FILES[4]

    several = Parquet(write('c.parquet', image=FILES[:2], captions=[['a', 'b '], []]))
    assert [several.captions(i) for i in range(2)] == [('a', 'b'), ()]
    numbers = Parquet(write('d.parquet', image=FILES[:2], text=[1.5, 2.5]), needs_labels=False)
    with pytest.raises(BrokenCaptionError, match=r'd\.parquet \[1\] has a caption that is no text'):
        numbers.captions(1)
    bad = pa.array([b'a cat', b'\xff'], pa.binary()).view(pa.string())
    unreadable = Parquet(write('f.parquet', image=FILES[:2], text=bad), needs_labels=False)
    assert unreadable.captions(0) == ('a cat',)
    with pytest.raises(BrokenCaptionError, match=r'f\.parquet \[1\] has a caption that is no text'):
        unreadable.captions(1)
    none = Parquet(write('e.parquet', image=FILES))
    assert 'has no column text, caption, captions: give the column' in _refusal(none.captions, 0)


def test_a_caption_of_hugging_face_that_is_no_text_is_named(tmp_path):
    pa = pytest.importorskip('pyarrow')
    datasets = pytest.importorskip('datasets')
    features = {'image': datasets.Image(), 'text': datasets.Value('string')}
    images = pa.array([{'bytes': content, 'path': None} for content in FILES[:2]])
    bad = pa.array([b'a cat', b'\xff'], pa.binary()).view(pa.string())
    written = datasets.table.InMemoryTable(pa.table({'image': images, 'text': bad}))
    datasets.Dataset(written).cast(datasets.Features(features)).save_to_disk(tmp_path / 'cats')
    source = sources.HuggingFace(tmp_path / 'cats', needs_labels=False)
    assert source.captions(0) == ('a cat',)
    with pytest.raises(BrokenCaptionError, match=r'cats train \[1\] has a caption that is no text'):
        source.captions(1)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert "pip install 'sphere_ar_jax[parquet]'" in _refusal(Parquet, tmp_path)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    assert "pip install 'sphere_ar_jax[hf]'" in _refusal(sources.HuggingFace, 'a/b')


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
    """The library, which keeps what it prepares in a directory of the tests."""
    library = pytest.importorskip('datasets')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))
        patch.setattr(library.config, 'HF_HUB_OFFLINE', True)
        patch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        yield library


def _dataset(datasets, **kinds):
    """A data set of the six files, whose columns have certain types."""
    values = {datasets.Image: [{'bytes': content, 'path': None} for content in FILES]}
    columns = {name: values.get(type(kind), range(6)) for name, kind in kinds.items()}
    plain = datasets.Dataset.from_dict(columns)
    return plain.cast(datasets.Features(kinds))


def test_columns_of_hugging_face(datasets, tmp_path):
    """Image and ClassLabel or integers, of a saved data set with splits."""
    image = datasets.Image()
    number = datasets.Value('int64')
    names = datasets.ClassLabel(names=list('abcdef'))
    parts = datasets.DatasetDict(
        {
            'train': _dataset(datasets, picture=image, kind=names, id=number),
            'plain': _dataset(datasets, picture=image, id=number),
            'none': _dataset(datasets, picture=image),
            'two': _dataset(datasets, a=image, b=image),
            'numbers': _dataset(datasets, picture=image, a=number, b=number),
            'nothing': _dataset(datasets, a=number),
        }
    )
    parts.save_to_disk(tmp_path / 'saved')
    where = str(tmp_path / 'saved')
    for split, labels, classes in (
        ('train', range(6), tuple('abcdef')),
        ('plain', range(6), None),
        ('none', [0] * 6, ('saved',)),
    ):
        source = sources.open_source('hf', where, split)
        assert [source[i]['image'] for i in range(6)] == FILES
        assert [int(source[i]['label']) for i in range(6)] == list(labels)
        assert source.class_names == classes
    assert source.name(-1) == 'saved none [5]'
    # A cell without an image is broken as an empty one is.
    features = datasets.Features({'picture': image})
    lacking = datasets.Dataset.from_dict({'picture': [FILES[0], None]}, features=features)
    lacking.save_to_disk(tmp_path / 'lacking')
    source = sources.HuggingFace(tmp_path / 'lacking')
    assert [source[i]['image'] for i in range(2)] == [FILES[0], b'']
    # One split alone, as another directory in which it was saved.
    datasets.load_from_disk(where)['train'].save_to_disk(tmp_path / 'one')
    assert sources.HuggingFace(tmp_path / 'one').class_names == tuple('abcdef')
    for split, message in (
        ('test', "has no split 'test', but train, plain"),
        ('two', 'several columns that may hold images, a, b'),
        ('numbers', 'several columns that may hold labels, a, b'),
        ('nothing', 'has no column of images, but a: dataset.cast_column'),
    ):
        assert message in _refusal(sources.HuggingFace, where, split)


def test_labels_that_are_not_needed_never_refuse_a_data_set(datasets, tmp_path):
    """As for Parquet files; a column of class labels counts under any name."""
    image = datasets.Image()
    number = datasets.Value('int64')
    names = datasets.ClassLabel(names=list('abcdef'))
    for i, (kinds, classes) in enumerate(
        (
            (dict(picture=image, width=number, height=number), 1),
            (dict(picture=image, width=number), 1),
            (dict(picture=image, width=number, label=number), 6),
            (dict(picture=image, width=number, kind=names), 6),
            (dict(picture=image, kind=names, other=names), 1),
        )
    ):
        where = str(tmp_path / str(i))
        _dataset(datasets, **kinds).save_to_disk(where)
        source = sources.open_source('hf', where, needs_labels=False)
        assert [source[k]['image'] for k in range(6)] == FILES
        assert source.num_classes == classes


def test_texts_are_labels_and_other_types_are_named(datasets, tmp_path):
    """A column named label is never passed over."""
    plain = _dataset(datasets, image=datasets.Image())
    plain.add_column('label', list('babbaa')).save_to_disk(str(tmp_path / 'texts'))
    source = sources.HuggingFace(tmp_path / 'texts')
    assert source.class_names == ('a', 'b')
    assert [int(source[i]['label']) for i in range(6)] == [1, 0, 1, 1, 0, 0]
    plain.add_column('label', [0.5] * 6).save_to_disk(str(tmp_path / 'floats'))
    said = _refusal(sources.HuggingFace, tmp_path / 'floats')
    assert 'has the label 0.5, a float' in said


def test_a_moved_data_set_holds_out_the_same_images(datasets, tmp_path, monkeypatch):
    """Neither a way to write its path nor its place counts."""
    data = _dataset(datasets, image=datasets.Image(), label=datasets.Value('int64'))
    for place in ('birds', 'elsewhere/birds'):
        datasets.concatenate_datasets([data] * 20).save_to_disk(str(tmp_path / place))
    monkeypatch.chdir(tmp_path)
    names = set()
    held_out = set()
    for path in ('birds', './birds/', str(tmp_path / 'birds'), 'elsewhere/birds'):
        source = sources.open_source('hf', path)
        names.add(source.name(7))
        _, heldout = sources.split(source, 0.3)
        held_out.add(tuple(heldout.name(i) for i in range(len(heldout))))
    assert names == {'birds train [7]'}
    assert len(held_out) == 1
    assert 20 < len(held_out.pop()) < 55


def test_names_of_the_hub_that_are_not_there(datasets, tmp_path):
    said = _refusal(sources.HuggingFace, 'nobody/nothing:plain', 'train', str(tmp_path))
    assert 'cannot be opened by datasets' in said
    assert '--config.data.split' in said


def test_files_of_images_as_datasets_reads_them(datasets, tmp_path):
    """A directory of classes is given by paths, not by bytes."""
    for i, content in enumerate(FILES):
        place = tmp_path / 'birds' / 'train' / 'ab'[i % 2] / f'{i}.jpg'
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    source = sources.HuggingFace(tmp_path / 'birds', data_dir=tmp_path / 'kept')
    found = {source[i]['image']: int(source[i]['label']) for i in range(6)}
    assert found == {content: i % 2 for i, content in enumerate(FILES)}
    assert source.class_names == ('a', 'b')
