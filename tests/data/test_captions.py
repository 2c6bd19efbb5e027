"""Captions: vocabularies, prompts, records with captions, and composed digits."""

import io
import json
import os
import pathlib
import pickle
import re
import shutil
import tarfile
import types
import unicodedata

import chex
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image
from scipy import ndimage

from sphere_ar_jax.config import packaged
from sphere_ar_jax.data import sources
from sphere_ar_jax.data.batches import batches
from sphere_ar_jax.data.captions import captioned, composed, features, files, table, vocabulary
from sphere_ar_jax.data.digits import Digits
from sphere_ar_jax.data.files.hugging_face import HuggingFace
from sphere_ar_jax.data.files.listing import BrokenCaptionError, BrokenImageError
from sphere_ar_jax.data.files.webdataset import WebDataset
from sphere_ar_jax.runtime.console import UserError

BYTES = vocabulary.open_vocabulary('bytes')
ENCODE = vocabulary.CaptionEncoder('bytes', 3)


@pytest.fixture(scope='module')
def tokenizer_file(tmp_path_factory):
    """A tokenizer.json of words, with a token for unknown ones, that would cut texts."""
    tokenizers = pytest.importorskip('tokenizers')
    words = {'[UNK]': 0, 'a': 1, 'three': 2, 'left': 3, 'of': 4, 'seven': 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    path = tmp_path_factory.mktemp('vocabulary') / 'tokenizer.json'
    tokenizer.save(str(path))
    return str(path)


@hypothesis.given(strategies.text(strategies.characters(exclude_categories=('Cs',))))
def test_bytes_come_back_as_they_were(text):
    normal = unicodedata.normalize('NFC', text)
    numbers = BYTES.encode(text)
    assert numbers == [byte + 1 for byte in normal.encode()]
    assert BYTES.decode(numbers) == normal
    assert BYTES.decode([*numbers, vocabulary.END, 5, 6]) == normal


def test_bytes_that_are_no_text_are_shown_as_such():
    assert BYTES.decode([0xFF + 1]) == '\ufffd'
    with pytest.raises(UserError, match='character 2 is half of a surrogate pair'):
        BYTES.encode('a\ud800')


def test_a_tokenizer_file_is_a_vocabulary(tokenizer_file):
    words = vocabulary.open_vocabulary(tokenizer_file)
    assert words.size == 7
    # Its own truncation and padding do not count.
    assert words.encode('a three left of a seven') == [2, 3, 4, 5, 2, 6]
    assert words.decode([2, 3, 4, 5, 2, 6, 0, 0]) == 'a three left of a seven'
    with pytest.raises(UserError, match="'a cat' has 'cat', which the tokenizer does not know"):
        words.encode('a cat')


def _saved(tokenizer, directory):
    """A vocabulary of a tokenizer, from its file."""
    path = directory / f'{len(list(directory.iterdir()))}.json'
    tokenizer.save(str(path))
    return vocabulary.open_vocabulary(str(path))


def test_a_text_is_always_encoded_alike(tmp_path):
    """A tokenizer may be saved with dropout of its merges, which draws at each call."""
    tokenizers = pytest.importorskip('tokenizers')
    names = {'a': 0, 'b': 1, 'ab': 2, 'abab': 3}
    model = tokenizers.models.BPE(names, [('a', 'b'), ('ab', 'ab')], dropout=0.5)
    words = _saved(tokenizers.Tokenizer(model), tmp_path)
    assert {tuple(words.encode('ababab')) for _ in range(50)} == {(4, 3)}


def test_byte_level_tokenizers_give_any_text_back(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    level = tokenizers.pre_tokenizers.ByteLevel
    pieces = {piece: i for i, piece in enumerate(sorted(level.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    words = _saved(tokenizer, tmp_path)
    for text in ('two rows: 4 1 / 8 8', 'a  😀 cat', 'שלום', 'x' * 1000):
        assert words.decode([*words.encode(text), 0]) == text


def test_what_a_tokenizer_would_leave_out_is_refused(tmp_path):
    """A model of pieces without a token for unknown ones drops them in silence."""
    tokenizers = pytest.importorskip('tokenizers')
    pieces = {'a': 0, 'c': 1, 't': 2, 'ca': 3, 'é': 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [('c', 'a')]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = _saved(tokenizer, tmp_path)
    assert words.encode('a  cat é') == [1, 4, 3, 5]
    for text, piece in (('a 😀 cat', '😀'), ('éat!', '!'), ('😀', '😀'), ('A', 'A')):
        with pytest.raises(UserError, match=f"has '{piece}', which the tokenizer does not know"):
            words.encode(text)


def test_added_tokens_are_known(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    pieces = {'a': 0, 'c': 1, 't': 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_tokens(['日本', '<Z>'])
    words = _saved(tokenizer, tmp_path)
    assert words.encode('a 日本 cat<Z>') == [1, 4, 2, 1, 3, 5]
    with pytest.raises(UserError, match="has '日', which the tokenizer does not know"):
        words.encode('日本 日')


def test_ends_of_words_are_no_text(tmp_path):
    """As of CLIP's tokenizer, whose decoder leaves them."""
    tokenizers = pytest.importorskip('tokenizers')
    pieces = {'a': 0, 'c': 1, 't': 2, 'a</w>': 3, 't</w>': 4}
    model = tokenizers.models.BPE(pieces, [], end_of_word_suffix='</w>')
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    words = _saved(tokenizer, tmp_path)
    assert words.encode('cat a') == [2, 1, 5, 4]
    assert words.decode([2, 1, 5, 4, 0]) == 'cat a'
    with pytest.raises(UserError, match="'x' has 'x', which the tokenizer does not know"):
        words.encode('x')


def test_unknown_pieces_of_unigrams_and_special_tokens_are_refused(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    pieces = [('<unk>', 0.0), ('▁a', -1.0), ('▁cat', -1.0), ('a', -2.0), ('</s>', 0.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(['</s>', '<|end|>'])
    words = _saved(tokenizer, tmp_path)
    assert words.encode('a cat') == [2, 3]
    for text in ('😀', 'a שלום', 'A CAT', 'x' * 10_000):
        with pytest.raises(UserError, match='which the tokenizer does not know') as raised:
            words.encode(text)
        assert '\n' not in str(raised.value)
        assert len(str(raised.value)) < 300
    for text in ('a</s>', '<|end|> a cat'):
        with pytest.raises(UserError, match=r"has '<.*>', which is a special token"):
            words.encode(text)


def test_captions_that_are_cut_off_are_counted():
    texts = ['a cat', ' four ', 'a dog and a cat']
    said = vocabulary.describe_cut(texts, BYTES, 4)
    assert said.startswith('2 of 3 captions that were looked at are cut off behind 4 tokens')
    assert said.endswith('; the longest has 15')
    assert vocabulary.describe_cut(texts, BYTES, 15) == ''


@pytest.mark.parametrize('form', ['NFC', 'NFD'])
def test_words_are_compared_in_one_form_of_unicode(form, tmp_path):
    """An accented letter is one character or two."""
    path = tmp_path / 'words.txt'
    path.write_text(unicodedata.normalize(form, 'café\n\ntür\n'))
    words = vocabulary.Words(str(path))
    for other in ('NFC', 'NFD'):
        numbers = words.encode(unicodedata.normalize(other, 'tür café'))
        assert numbers == [2, 1]
        assert words.decode(numbers) == 'tür café'


def test_a_list_of_words_is_a_vocabulary(tmp_path):
    path = tmp_path / 'words.txt'
    path.write_text('left\nof\n\n  rot\nthree\n')
    words = vocabulary.open_vocabulary(str(path))
    assert words.size == 5
    assert words.encode(' three  left of\trot ') == [4, 1, 2, 3]
    assert words.decode([4, 1, 2, 3, 0, 1]) == 'three left of rot'
    with pytest.raises(UserError, match=r"'left of a' has 'a', which .*: use the words of"):
        words.encode('left of a')
    (tmp_path / 'run').mkdir()
    vocabulary.keep(str(path), str(tmp_path / 'run'))
    moved = vocabulary.of_run('/gone/words.txt', tmp_path / 'run')
    assert vocabulary.open_vocabulary(moved).encode('rot') == [3]
    for content, message in (
        ('left\nleft\n', 'each once'),
        ('left of\n', "has 'left of': write one word in each line"),
        ('\n', 'it must have some'),
    ):
        other = tmp_path / f'{len(content)}.txt'
        other.write_text(content)
        with pytest.raises(UserError, match=message):
            vocabulary.open_vocabulary(str(other))
    with pytest.raises(UserError, match=r'absent\.txt, but there is no such file'):
        vocabulary.open_vocabulary(str(tmp_path / 'absent.txt'))


def test_the_words_of_composed_digits_are_known():
    """Each caption of the grammar has words of configs/composed.py, ten at most."""
    cfg = packaged.load('composed')
    words = vocabulary.open_vocabulary(cfg.ar.vocabulary)
    training, heldout = composed.splits(0, 0.2)
    shown = [images.composition(i) for images in (training, heldout) for i in range(500)]
    captions = [composition.caption() for composition in shown]
    found = [words.encode(caption) for caption in captions]
    assert [words.decode(numbers) for numbers in found] == captions
    assert max(map(len, found)) == cfg.ar.text_tokens == 10
    assert set().union(*found) == set(range(1, words.size))


def test_a_run_keeps_its_tokenizer_file(tokenizer_file, tmp_path):
    vocabulary.keep('bytes', str(tmp_path))
    assert vocabulary.of_run('bytes', tmp_path) == 'bytes'
    assert vocabulary.of_run('/gone/tokenizer.json', tmp_path) == '/gone/tokenizer.json'
    vocabulary.keep(tokenizer_file, str(tmp_path))
    kept = vocabulary.of_run('/gone/tokenizer.json', tmp_path)
    assert vocabulary.open_vocabulary(kept).encode('seven') == [6]
    vocabulary.keep(kept, str(tmp_path))  # the run is continued
    assert vocabulary.are_same(kept, tokenizer_file)
    other = tmp_path / 'other.json'
    other.write_text('{}')
    assert not vocabulary.are_same(kept, str(other))
    assert not vocabulary.are_same('bytes', kept)


def test_a_vocabulary_is_read_from_a_bucket(tokenizer_file, tmp_path, monkeypatch):
    """A run in a bucket keeps its vocabulary there."""

    def place(*parts):
        return pathlib.Path(*[str(part).replace('gs://bucket', str(tmp_path)) for part in parts])

    for module in (vocabulary, files):
        monkeypatch.setattr(module.epath, 'Path', place)
    (tmp_path / 'words.txt').write_text('left\nright\n')
    shutil.copy(tokenizer_file, tmp_path / 'tokenizer.json')
    assert vocabulary.Words('gs://bucket/words.txt').encode('right') == [2]
    assert vocabulary.TokenizerFile('gs://bucket/tokenizer.json').encode('seven') == [6]


def test_the_size_of_a_tokenizer_is_above_its_largest_number(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    words = tokenizers.models.WordLevel({'a': 0, 'b': 7}, unk_token='a')
    tokenizers.Tokenizer(words).save(str(tmp_path / 't.json'))
    found = vocabulary.TokenizerFile(str(tmp_path / 't.json'))
    assert found.encode('b') == [8]
    assert found.size == 9


def test_captions_change_no_image_that_is_held_out(tmp_path):
    """ImageNet's tar and ArrayRecord files are split by number, also where they have captions."""

    class Numbered:
        num_classes = 1
        class_names = None
        left_out = ''
        hashes = np.random.default_rng(0).integers(0, 2**63, 9, np.uint64)

        def __len__(self):
            return 9

        def __getitem__(self, i):
            return {'image': b'', 'label': 0}

        def name(self, i):
            return f'{i}.jpg'

    with_text = table.Captioned(Numbered(), {f'{i}.jpg': ('a text',) for i in (0, 2, 3, 8)})
    np.testing.assert_array_equal(sources.hashes(with_text), Numbered.hashes[[0, 2, 3, 8]])


def test_what_is_no_tokenizer_is_refused(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    with pytest.raises(UserError, match=r"give 'bytes', or the path of a tokenizer\.json or"):
        vocabulary.open_vocabulary(str(tmp_path / 'absent.json'))
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps({'model': 3}))
    with pytest.raises(UserError, match='is no tokenizer: '):
        vocabulary.open_vocabulary(str(path))
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / 'empty.json'))
    with pytest.raises(UserError, match=r'empty\.json has no tokens: train the tokenizer first'):
        vocabulary.open_vocabulary(str(tmp_path / 'empty.json'))


def test_the_home_directory_is_found(tmp_path, monkeypatch):
    """Shells leave ~ as it is inside of --config.ar.vocabulary=~/words.txt."""
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'words-of-home.txt').write_text('cat\ndog\n')
    word = '~/words-of-home.txt'
    assert vocabulary.open_vocabulary(word).encode('dog cat') == [2, 1]
    (tmp_path / 'run').mkdir()
    vocabulary.keep(word, str(tmp_path / 'run'))
    kept = vocabulary.of_run(word, tmp_path / 'run')
    assert kept == str(tmp_path / 'run' / 'vocabulary.txt')
    assert vocabulary.are_same(word, kept)


def test_prompts_are_filled_up_and_captions_are_cut():
    found = vocabulary.encode_prompt(' ab ', BYTES, 4)
    chex.assert_trees_all_equal(found, np.array([98, 99, 0, 0], np.int32))
    chex.assert_trees_all_equal(
        vocabulary.CaptionEncoder('bytes', 4)('abcdef'), np.array([98, 99, 100, 101], np.int32)
    )


@pytest.mark.parametrize(
    ('length', 'kept'), [(2, ''), (3, '日'), (5, '日'), (6, '日本'), (9, '日本語')]
)
def test_no_character_is_cut_in_two(length, kept):
    numbers = vocabulary.CaptionEncoder('bytes', length)('日本語')
    chex.assert_shape(numbers, (length,))
    assert BYTES.decode(numbers) == kept


def test_files_that_change_are_read_again(tmp_path):
    """A process may live longer than a list of words or a file of features, as a notebook."""
    words = tmp_path / 'w.txt'
    for content, expected in (('a\nb\n', [2]), ('b\na\n', [1])):
        words.write_text(content)
        os.utime(words, ns=(0, len(expected) + expected[0]))
        assert vocabulary.open_vocabulary(str(words)).encode('b') == expected
    place = tmp_path / 'f.npz'
    for texts in (['a'], ['a', 'b']):
        np.savez(place, texts=texts, features=np.ones((len(texts), 2, 3), np.float32))
        assert features.open_features(str(place)).texts == tuple(texts)


@pytest.mark.parametrize(
    ('prompt', 'message'),
    [
        ('', 'a prompt is empty: say what the image shows'),
        (' \n\t', 'a prompt is empty: say what the image shows'),
        ('x' * 10_000, 'is too long: it has 10000 tokens, and this model reads 48'),
        ('😀' * 13, 'is too long: it has 52 tokens'),
        ('a\udfff', 'is half of a surrogate pair'),
    ],
)
def test_prompts_that_no_model_reads_are_one_line(prompt, message):
    with pytest.raises(UserError, match=message) as raised:
        vocabulary.encode_prompt(prompt, BYTES, 48)
    text = str(raised.value)
    assert len(text) < 250
    assert text.isprintable()


@pytest.mark.parametrize('prompt', ['😀', 'אבג right to left', '\u202eשלום', 'a\x00b\x1b[31m'])
def test_any_other_text_is_a_prompt(prompt):
    row = vocabulary.encode_prompt(prompt, BYTES, 48)
    chex.assert_shape(row, (48,))
    assert BYTES.decode(row) == prompt


def test_files_of_prompts(tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_bytes('\ufeffa one\r\n\r\n  ein Käse \n'.encode())
    assert files.read_prompts(path) == ['a one', 'ein Käse']
    path.write_bytes(b'\n \n')
    with pytest.raises(UserError, match='has no prompt: write one in each line'):
        files.read_prompts(path)
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match='is no text in UTF-8'):
        files.read_prompts(path)
    for name, message in (('absent', 'absent is not there'), ('', 'is no plain file')):
        with pytest.raises(UserError, match=message):
            files.read_prompts(tmp_path / name)


# ---- records with captions


class Captioned:
    """Four images with one, two, three and no captions."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        captions = tuple(f'{index}{letter}' for letter in 'abc'[: (index + 1) % 4])
        image = np.full((2, 2, 1), index, np.float32)
        return {'image': image, 'label': np.int32(0), 'captions': captions}


def _texts(batch):
    return [BYTES.decode(row) for row in batch['label']]


def test_batches_have_any_of_the_captions():
    transform = pickle.loads(pickle.dumps(captioned.Captioning(ENCODE)))
    with batches(
        Captioned(), batch_size=4, seed=0, transform=transform, max_broken=1.0, threads=1
    ) as found:
        drawn = [next(found) for _ in range(20)]
    chex.assert_shape(drawn[0]['label'], (4, 3))
    assert drawn[0]['label'].dtype == np.int32
    for batch in drawn:
        for image, text in zip(batch['image'], _texts(batch), strict=True):
            assert text[0] == str(int(image[0, 0, 0]))
    texts = {text for batch in drawn for text in _texts(batch)}
    # Image 3 has no caption: another one takes its place.
    assert texts == {'0a', '1a', '1b', '2a', '2b', '2c'}


def test_an_image_without_a_caption_is_named():
    with pytest.raises(BrokenImageError, match='it has no caption'):
        captioned.Captioning(ENCODE)(Captioned()[3], 0, np.random.default_rng(0))


def test_the_images_own_draws_come_first():
    def crop(record, epoch, rng):
        return {'image': rng.random(), 'label': record['label']}

    found = captioned.Captioning(ENCODE, crop)(Captioned()[2], 0, np.random.default_rng(5))
    assert found['image'] == np.random.default_rng(5).random()


def test_looks_take_the_first_caption():
    source = pickle.loads(pickle.dumps(captioned.FirstCaption(Captioned(), ENCODE)))
    assert len(source) == 4
    assert BYTES.decode(source[2]['label']) == '2a'


class Spoilt:
    """Ten images. That of index 1 has a caption that cannot be encoded, and 2 a broken file."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 2:
            raise BrokenCaptionError('2.txt is no text in UTF-8')
        captions = ('1', '\ud800') if index == 1 else (f'{index}',)
        image = np.zeros((2, 2, 1), np.float32)
        return {'image': image, 'label': np.int32(0), 'captions': captions}


def test_other_images_take_the_place_of_broken_captions(capfd):
    """They are named and counted like broken images, and do not end a training."""
    captioning = captioned.Captioning(ENCODE)
    with batches(Spoilt(), batch_size=10, seed=0, transform=captioning, max_broken=1.0) as found:
        texts = [text for _ in range(6) for text in _texts(next(found))]
    assert len(texts) == 60
    assert set(texts) == set('013456789')
    said = capfd.readouterr().err
    for number in (1, 2):
        lacks = f'image {number} has no caption that can be read: another image takes its place'
        assert lacks in said


def test_missing_captions_are_not_called_broken_images():
    captioning = captioned.Captioning(ENCODE)
    with (
        batches(Spoilt(), batch_size=100, seed=0, transform=captioning, max_broken=0.01) as found,
        pytest.raises(UserError, match=r'images are broken \(\d+ of them have no caption that can'),
    ):
        next(found)


def test_captions_are_looked_at():
    """All captions of an image are encoded, and the first ones are given."""
    texts, all_texts, reasons, broken, images = captioned.look(Spoilt(), 10, ENCODE)
    assert texts == all_texts == list('013456789')
    assert images == 10
    assert np.isclose(broken, (1 / 2 + 1) / 10)  # one of two captions, and one image
    assert re.search('^image .: .* half of a surrogate', reasons[0])
    assert reasons[1] == '2.txt is no text in UTF-8'


class Late:
    """A thousand images. Only those from 500 on have captions, the second of which is long."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return {'captions': ('short', 'l' * 99) if index >= 500 else ()}


def test_the_whole_of_the_data_is_looked_at_for_captions():
    assert captioned.first_caption(Late(), 'these') == 'short'
    looked = captioned.look(Late(), 100, ENCODE)
    assert looked.texts == ['short'] * 50
    assert np.isclose(looked.broken, 0.5)
    said = vocabulary.describe_cut(looked.all_texts, BYTES, 9)
    assert said.startswith('50 of 100 captions that were looked at are cut off behind 9 tokens')


def test_data_without_captions_are_refused():
    class Without(Late):
        def __getitem__(self, index):
            return {'captions': ()}

    with pytest.raises(UserError, match='these: none of the 100 images that were looked at has a'):
        captioned.first_caption(Without(), 'these')
    with pytest.raises(UserError, match=r'data digits has no captions, which the AR model reads'):
        captioned.first_caption(Digits('train', 0), 'data digits')
    assert captioned.first_caption(Captioned(), 'these') == '0a'


# ---- captions of files


def _picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Three images in two classes, two of which have a text beside them."""
    directory = tmp_path_factory.mktemp('folder')
    for i, name in enumerate(('cats/1.png', 'cats/2 ü.png', 'dogs/1.png')):
        _picture(directory / name, i)
    (directory / 'cats/1.txt').write_text('\ufeffa grey cat\n\n a cat \n')
    (directory / 'dogs/1.txt').write_text('ein Hündchen')
    return directory


def test_texts_beside_images(folder):
    source = table.with_captions(sources.ImageFolder(folder), 'beside')
    found = [source[i]['captions'] for i in range(len(source))]
    assert found == [('a grey cat', 'a cat'), (), ('ein Hündchen',)]
    assert captioned.look(source, 9, ENCODE).reasons == ['cats/2 ü.png has no caption']
    assert source.left_out == (
        '2 file(s) that are no images (.txt 2); texts beside images among them are read as captions'
    )
    again = pickle.loads(pickle.dumps(source))
    assert again[0] == source[0]
    assert again.name(0) == 'cats/1.png'


def test_texts_may_end_in_capitals_and_directories_are_none(tmp_path):
    for name in 'ab':
        _picture(tmp_path / f'cats/{name}.png')
    (tmp_path / 'cats/a.TXT').write_text('A CAT')
    (tmp_path / 'cats/b.txt').mkdir()
    source = table.with_captions(sources.ImageFolder(tmp_path), 'beside')
    assert [source[i]['captions'] for i in range(2)] == [('A CAT',), ()]


def test_a_text_that_is_none_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'bad')
    (tmp_path / 'bad/cats/1.txt').write_bytes(b'\xff\xfe')
    source = table.with_captions(sources.ImageFolder(tmp_path / 'bad'), 'beside')
    with pytest.raises(UserError, match=r'cats/1\.txt is no text in UTF-8'):
        source[0]


ENTRIES = (
    {'file_name': 'cats/1.png', 'text': 'a grey cat'},
    {'path': 'cats/2 ü.png', 'captions': ['one', ' ', 'two']},
    {'image': 'cats/1.png', 'text': ' ', 'caption': 'A CAT'},
    {'image': 'cats/9.png', 'text': 'of no image'},
)
TABLES = {
    'a.jsonl': '\n\n'.join(map(json.dumps, ENTRIES)),
    'a.json': json.dumps(ENTRIES, ensure_ascii=False, indent=1),
    'a.tsv': 'cats/1.png\ta grey cat\r\ncats/2 ü.png\tone\n./cats/2 ü.png\ttwo\ncats/1.png\tA CAT'
    '\ncats/9.png\tof no image',
}


@pytest.mark.parametrize('name', TABLES)
def test_tables_of_captions(name, folder, tmp_path):
    path = tmp_path / name
    path.write_text(TABLES[name])
    source = table.with_captions(sources.ImageFolder(folder), str(path))
    assert len(source) == 2
    assert source.num_classes == 2
    assert source[0]['captions'] == ('a grey cat', 'A CAT')
    assert source[1]['captions'] == ('one', 'two')
    assert source.name(1) == 'cats/2 ü.png'
    assert source.left_out.endswith(
        'images without a caption: 1, dogs/1.png the first; '
        'captions without an image: 1, cats/9.png the first'
    )


@pytest.mark.parametrize(('of_file', 'of_table'), [('NFC', 'NFD'), ('NFD', 'NFC')])
def test_a_path_may_be_in_another_form_of_unicode(of_file, of_table, tmp_path):
    """Archives and file systems differ in it."""
    names = [unicodedata.normalize(of_file, 'cafés/1.png'), 'dogs/1.png']
    for i, name in enumerate(names):
        _picture(tmp_path / 'images' / name, i)
    path = tmp_path / 'a.tsv'
    path.write_text(unicodedata.normalize(of_table, 'cafés/1.png\ta cup\ndogs/1.png\ta dog\n'))
    source = table.with_captions(sources.ImageFolder(tmp_path / 'images'), str(path))
    assert [source[i]['captions'] for i in range(2)] == [('a cup',), ('a dog',)]
    assert source.left_out == ''
    # Where there are files of both forms, each has its own path alone.
    other = unicodedata.normalize(of_table, 'cafés/1.png')
    _picture(tmp_path / 'images' / other, 2)
    source = table.with_captions(sources.ImageFolder(tmp_path / 'images'), str(path))
    assert len(source) == 2
    assert source.left_out.startswith('images without a caption: 1, caf')


def test_a_text_of_a_table_that_is_none_breaks_its_image_alone(folder, tmp_path):
    """As a text beside an image does."""
    path = tmp_path / 'a.jsonl'
    images = sources.ImageFolder(folder)
    first, second, *_ = [images.name(i) for i in range(len(images))]
    entries = [(first, 'a cat'), (first, ['x', None]), (first, 'more'), (second, 'a dog')]
    path.write_text('\n'.join(json.dumps({'path': p, 'text': text}) for p, text in entries))
    source = table.with_captions(images, str(path))
    assert len(source) == 2
    assert source[1]['captions'] == ('a dog',)
    for _ in range(2):
        with pytest.raises(BrokenCaptionError, match=r'a\.jsonl, line 2 has a caption that is no'):
            source[0]


def test_a_table_cannot_name_two_images_alike(tmp_path):
    for place in ('one', 'two'):
        (tmp_path / place).mkdir()
        with tarfile.open(tmp_path / place / '0.tar', 'w') as archive:
            archive.addfile(tarfile.TarInfo('cat.jpg'), io.BytesIO())
    (tmp_path / 'a.tsv').write_text('0.tar/cat\ta cat\n')
    source = WebDataset(f'{tmp_path}/*/0.tar')
    assert len(source) == 2
    with pytest.raises(UserError, match=r'two images have the name 0\.tar/cat, so that a table'):
        table.with_captions(source, str(tmp_path / 'a.tsv'))
    with tarfile.open(tmp_path / 'one' / '0.tar', 'a') as archive:
        archive.addfile(tarfile.TarInfo('dog.jpg'), io.BytesIO())
    (tmp_path / 'b.tsv').write_text('0.tar/dog\ta dog\n')
    found = table.with_captions(WebDataset(f'{tmp_path}/*/0.tar'), str(tmp_path / 'b.tsv'))
    assert len(found) == 1
    assert found[0]['captions'] == ('a dog',)


@pytest.mark.parametrize('line', ['a bird\u2028on a branch', 'a bird\x0con a\x85branch'])
def test_only_newlines_part_captions(line, tmp_path):
    """Texts from the web have other characters at which Python ends lines."""
    (tmp_path / '1.png').write_bytes(b'')
    (tmp_path / '1.txt').write_text(f'{line}\r\na second\n', newline='')
    source = sources.ImageFolder(tmp_path)
    assert source.captions(0) == (line, 'a second')
    with tarfile.open(tmp_path / '0.tar', 'w') as archive:
        for name in ('1.png', '1.txt'):
            archive.add(tmp_path / name, name)
    assert WebDataset(tmp_path / '0.tar').captions(0) == (line, 'a second')


def test_images_beside_directories_may_have_captions(tmp_path):
    """Their labels are not read. Parts of a data set are not mixed all the same."""
    names = ['1.png', 'more/2.png']
    for i, name in enumerate(names):
        _picture(tmp_path / 'beside' / name, i)
    source = sources.open_source('folder', str(tmp_path / 'beside'), needs_labels=False)
    assert [source.name(i) for i in range(2)] == names
    assert source.num_classes == 1
    assert source.left_out == ''
    assert [int(source[i]['label']) for i in range(2)] == [0, 0]
    for name in ('train', 'val'):
        _picture(tmp_path / 'parts' / name / '1.png', 0)
    with pytest.raises(UserError, match='parts of a data set and not classes'):
        sources.open_source('folder', str(tmp_path / 'parts'), needs_labels=False)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.tsv', 'cats/1.png\ta\tcat', r'a\.tsv, line 1 has more than two columns'),
        ('a.tsv', 'cats/1.png a cat', r'a\.tsv, line 1 has no tab between a path and a text'),
        ('a.jsonl', '{"text": "a"}', r'a\.jsonl, line 1 is no caption: write \{"file_name"'),
        ('a.jsonl', '{"path": "x", "text": "a"}\n{', r'a\.jsonl, line 2 is no JSON'),
        ('a.json', '{"path": ["x"], "text": "a"}', r'a\.json, entry 1 is no caption'),
        ('a.json', '{"path": "x", "prompt": "a"}', r'a\.json, entry 1 is no caption'),
        ('a.json', '[[[', r'a\.json is no JSON'),
        ('a.json', '\n\n[\n\n\n{"path": "x" 1}]', r'a\.json is no JSON: .* line 6 column 14'),
        ('a.csv', 'x,a', r"a\.csv: give a \.jsonl, \.json or \.tsv file, or 'beside'"),
        ('a.tsv', 'x\ta', "none of the 3 images has a caption: the table has no path like 'cats/1"),
        ('a.tsv', 'cats/1.png\t', "the table has an empty text for each, as for 'cats/1.png'"),
    ],
)
def test_what_is_no_table_is_one_line(name, content, message, folder, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        table.with_captions(sources.ImageFolder(folder), str(tmp_path / name))
    assert '\n' not in str(raised.value)


def test_tables_that_are_not_there(folder):
    with pytest.raises(UserError, match="but there is no such file; 'beside' is a word"):
        table.read_table('besides')
    images = types.SimpleNamespace(num_classes=1, left_out='')
    with pytest.raises(UserError, match='such data have no texts of their own'):
        table.with_captions(images, 'beside')


def test_texts_in_tars(tmp_path):
    path = tmp_path / 'a.tar'
    content = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(content, 'PNG')
    members = {
        '0.png': content.getvalue(),
        '0.txt': b'erster\nzweiter\n',
        '1.json': b'{"caption": "of json", "label": 3}',
        '1.png': content.getvalue(),
        '2.png': content.getvalue(),
        '2.cls': b'1',
        '3.png': content.getvalue(),
        '3.json': b'{"caption": "of json"}',
        '3.txt': b'of txt',
        '1.txt': b' \n',
        '0.cls': b'2',
        '3.cls': b'0',
        '4.png': content.getvalue(),
        '4.cls': b'1',
        '4.txt': b'x' * (2**20 + 1),
    }
    with tarfile.open(path, 'w') as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = table.with_captions(WebDataset(path), 'beside')
    found = [source[i]['captions'] for i in range(4)]
    assert found == [('erster', 'zweiter'), ('of json',), (), ('of txt',)]
    with pytest.raises(BrokenCaptionError, match=r'/4 has a caption of 1,048,577 bytes'):
        source[4]
    # The index is kept, and has them too.
    assert table.with_captions(WebDataset(path), 'beside')[1]['captions'] == ('of json',)


def test_tables_name_what_lies_at_the_top_of_a_tar(tmp_path):
    """`tar cf a.tar .` puts './' before each name."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(picture, 'PNG')
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        info = tarfile.TarInfo('./0.png')
        info.size = len(picture.getvalue())
        archive.addfile(info, io.BytesIO(picture.getvalue()))
    source = sources.open_source('webdataset', str(tmp_path / 'a.tar'), needs_labels=False)
    for name in ('a.tar/0', './a.tar/0', 'a.tar/./0'):
        (tmp_path / 't.tsv').write_text(f'{name}\thello')
        assert table.with_captions(source, str(tmp_path / 't.tsv'))[0]['captions'] == ('hello',)


def test_lists_of_texts_in_a_set_with_a_format(tmp_path):
    datasets = pytest.importorskip('datasets')
    images = [Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(2)]
    found = datasets.Dataset.from_dict({'image': images, 'captions': [['a', 'b'], ['c']]})
    found = found.cast_column('image', datasets.Image()).with_format('numpy')
    found.save_to_disk(str(tmp_path / 'set'))
    source = table.with_captions(HuggingFace(tmp_path / 'set'), 'beside')
    assert [source[i]['captions'] for i in range(2)] == [('a', 'b'), ('c',)]


def test_texts_in_a_column(tmp_path):
    datasets = pytest.importorskip('datasets')
    images = [Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(2)]
    images.append(images[0])
    columns = {'image': images, 'text': ['a cat', None, ' '], 'caption': ['b', None, 'a dog']}
    datasets.Dataset.from_dict(columns).cast_column('image', datasets.Image()).save_to_disk(
        str(tmp_path / 'set')
    )
    source = table.with_captions(HuggingFace(tmp_path / 'set'), 'beside')
    assert [source[i]['captions'] for i in range(3)] == [('a cat',), (), ('a dog',)]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    plain = datasets.Dataset.from_dict({'image': images}).cast_column('image', datasets.Image())
    plain.save_to_disk(str(tmp_path / 'plain'))
    with pytest.raises(UserError, match='has no column text, caption, captions'):
        table.with_captions(HuggingFace(tmp_path / 'plain'), 'beside')[0]


# ---- composed digits

GRAMMAR = re.compile(
    r'(an eight|a (thick )?(small )?({words})) (left of|right of|above|below) '
    r'(an eight|a (thick )?(small )?({words}))|two rows: \d \d / \d \d'.replace(
        '{words}', '|'.join(composed.WORDS)
    )
)


@pytest.fixture(scope='module')
def images():
    return composed.splits(0, 0.2)


def test_captions_follow_the_grammar(images):
    for split in images:
        for i in range(300):
            caption = split.composition(i).caption()
            assert GRAMMAR.fullmatch(caption), caption
            assert len(caption) <= 48


@pytest.mark.parametrize(
    ('caption', 'upright', 'backwards'),
    [
        ('a thick three left of a small eight', False, False),
        ('a small eight right of a thick three', False, True),
        ('a thick three above a small eight', True, False),
        ('a small eight below a thick three', True, True),
    ],
)
def test_one_image_has_two_captions(caption, upright, backwards):
    things = (composed.Thing(3, thick=True), composed.Thing(8, small=True))
    assert composed.Composition(things, upright, backwards).caption() == caption


def test_rows_and_articles():
    things = tuple(composed.Thing(k) for k in (4, 1, 8, 8))
    assert composed.Composition(things).caption() == 'two rows: 4 1 / 8 8'
    assert composed.Thing(8).caption() == 'an eight'
    assert composed.Thing(8, small=True, thick=True).caption() == 'a thick small eight'


def test_training_images_have_no_held_out_pair(images):
    train, heldout = images
    held_out = composed.held_out_pairs(0)
    assert len(held_out) == 20
    # Each digit is first and second of two pairs, so that training shows it in each place.
    for place in (0, 1):
        counts = np.bincount([pair[place] for pair in held_out], minlength=10)
        np.testing.assert_array_equal(counts, 2)
    seen = set().union(*(train.composition(i).pairs() for i in range(3000)))
    assert seen.isdisjoint(held_out)
    assert len(seen) == 80
    assert set().union(*(heldout.composition(i).pairs() for i in range(500))) == held_out
    assert composed.held_out_pairs(1) != held_out


def test_images_are_a_function_of_seed_part_and_number(images):
    train, heldout = images
    again = composed.Composed('train', 0, count=50)
    for i in (0, 7, 49):
        chex.assert_trees_all_equal(again[i], train[i])
    chex.assert_shape(train[3]['image'], (32, 32, 1))
    assert train[3]['image'].dtype == np.float32
    assert not np.array_equal(train[3]['image'], heldout[3]['image'])
    with pytest.raises(IndexError):
        again[50]
    shown = again.to_pixels(again[7]['image'][None])[0]
    np.testing.assert_allclose(again.pixels[7], shown, atol=1e-6)


def test_digits_lie_in_their_places(images):
    """The ink of each digit lies in its half or quarter, and as high as its size says."""
    train, _ = images
    for i in range(200):
        composition = train.composition(i)
        pixels = train.to_pixels(train[i]['image'][None])[0]
        assert pixels.min() == 0
        assert pixels.max() <= 1
        upper, lower = pixels[:16], pixels[16:]
        if len(composition.things) == 4:
            parts = [half[:, side] for half in (upper, lower) for side in np.s_[:16, 16:]]
        elif composition.upright:
            parts = [upper, lower]
        else:
            parts = [pixels[:, :16], pixels[:, 16:]]
        for thing, part in zip(composition.things, parts, strict=True):
            rows = np.flatnonzero(part.max(1) > 0.1)
            side = composed.SMALL if thing.small else composed.LARGE
            height = rows[-1] - rows[0] + 1
            assert 0.7 * side <= height <= side, (composition.caption(), height)


def test_things_are_painted_from_scans():
    scan = Digits('train', 0).pixels[0]
    plain = composed.paint(composed.Thing(0), scan)
    chex.assert_shape(plain, (14, 14))
    np.testing.assert_allclose(
        plain, ndimage.zoom(ndimage.zoom(scan, 2, order=1), 14 / 16, order=1)
    )
    chex.assert_shape(composed.paint(composed.Thing(0, small=True), scan), (10, 10))
    thick = composed.paint(composed.Thing(0, thick=True), scan)
    assert thick.sum() > 1.25 * plain.sum()
    assert thick.max() <= 1


def test_a_part_without_a_digit_is_refused():
    with pytest.raises(
        UserError, match=r'data\.holdout is 0\.01: the heldout part has no scan of the'
    ):
        composed.Composed('heldout', 0, 0.01)
