"""A run that draws for texts, from its training to its pictures."""

import json
import shutil
from unittest import mock

import chex
import numpy as np
import pytest
from PIL import Image

import sphere_ar_jax
from sphere_ar_jax.commands import draw, evaluate, train
from sphere_ar_jax.config import build, checks, schema
from sphere_ar_jax.data import small
from sphere_ar_jax.data.captions import composed, vocabulary
from sphere_ar_jax.data.captions import table as captions
from sphere_ar_jax.evaluation import snapshots
from sphere_ar_jax.evaluation.captioned import composed_digits
from sphere_ar_jax.evaluation.fidelity import inception, statistics
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.run import load_run
from tests import tiny_config
from tests.conftest import libraries_promote

WORDS = (*composed.WORDS, 'a', 'an', 'thick', 'small', 'left', 'right', 'of', 'above', 'below',
         'rows', ':', '/', *'0123456789')  # fmt: skip


def _config(word='bytes'):
    c = tiny_config.get_config()
    c.data.name = 'composed'
    c.data.classifier_steps = 2
    c.vae.update(channels=(4, 4, 8, 16))
    c.ar.update(condition='text', vocabulary=word, text_tokens=16 if word != 'bytes' else 48)
    for name in ('tokenizer_training', 'ar_training'):
        c[name].update(steps=4, checkpoint_every=4)
    c.sampling.update(num_images=12, batch_size=12, guidance='constant')
    c.watch.update(every=4, classes=2, columns=2)
    return checks.check(c)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a short run whose vocabulary is a file of words, which is gone."""
    tokenizers = pytest.importorskip('tokenizers')
    directory = tmp_path_factory.mktemp('text')
    file = directory / 'tokenizer.json'
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({'[UNK]': 0} | {w: i for i, w in enumerate(WORDS, 1)}, '[UNK]')
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(file))
    trained = directory / 'trained'
    # Composing all images takes a while.
    with libraries_promote(), mock.patch.object(composed, '_COUNTS', (400, 60)):
        train.train(_config(str(file)), str(trained), 'the command', 0.0)
    file.unlink()
    moved = directory / 'moved'
    shutil.move(trained, moved)
    return moved


@pytest.mark.slow
def test_a_run_is_scored_by_what_was_asked_for(run):
    metrics = json.loads((run / 'metrics.json').read_text())
    for group in ('seen', 'held_out', 'rows'):
        for name in ('samples', 'real'):
            assert 0 <= metrics[f'{name}/{group}'] <= metrics[f'{name}/{group}_digits'] <= 1
    assert 'A network reads both digits' in (run / 'report.html').read_text()
    for name in ('samples.png', 'ar/samples_0000004.png', 'reconstructions.png'):
        with Image.open(run / name) as picture:
            assert picture.size[0] > 100


@pytest.mark.slow
def test_a_moved_run_draws_for_texts(run, capsys):
    texts = ['a thick three left of a small seven', 'an eight above a one']
    model = sphere_ar_jax.load(run)
    assert 'texts of up to 16 tokens' in repr(model)
    images = model.sample(texts, seed=3)
    chex.assert_shape(images, (2, 32, 32, 1))
    chex.assert_tree_all_finite(images)
    # An image does not depend on the others.
    np.testing.assert_allclose(model.sample(texts[0], seed=3)[0], images[0], atol=1e-4)
    assert model.complete(images, texts[0], keep=0.5).shape == (2, 32, 32, 1)
    for labels, message in (
        (3, 'this model draws for texts'),
        (['a one', 3], 'labels must be all of one kind, texts or numbers'),
        ('a cat', "'cat', which the tokenizer does not know"),
        (' ', 'a prompt is empty'),
    ):
        with pytest.raises(UserError, match=message):
            model.sample(labels)


@pytest.mark.slow
def test_prompts_of_the_command_line(run, tmp_path, capsys):
    prompts = tmp_path / 'prompts.txt'
    prompts.write_text('a one above a two\n\nan eight left of a small three\n')
    output = tmp_path / 'samples.npz'
    draw.sample(str(run), prompts=str(prompts), num_images=5, output=str(output))
    labels = np.load(output)['arr_1']
    chex.assert_shape(labels, (5, 16))
    words = vocabulary.open_vocabulary(str(run / 'vocabulary.json'))
    assert words.decode(labels[3]) == 'an eight left of a small three'
    np.testing.assert_array_equal(labels[0], labels[4])
    capsys.readouterr()
    draw.sample(str(run), prompts=str(prompts), num_images=1, output=str(tmp_path / 'one.npz'))
    assert '--num_images=1 draws for the first 1 of 2 texts' in capsys.readouterr().out
    # The config says 12 images.
    many = tmp_path / 'many.npz'
    draw.sample(str(run), prompt=['a six'] * 13, output=str(many))
    chex.assert_shape(np.load(many)['arr_1'], (13, 16))
    both = tmp_path / 'both.npz'
    asked = ['a nine below a six', 'a six']
    draw.sample(str(run), prompt=asked, prompts=str(prompts), num_images=4, output=str(both))
    drawn = np.load(both)
    assert [words.decode(row) for row in drawn['arr_1']] == [
        *asked,
        'a one above a two',
        'an eight left of a small three',
    ]
    chex.assert_shape(drawn['arr_0'], (4, 32, 32, 1))
    for place, options in (
        ('grid.png', {'prompt': ['a one above a two'], 'prompts': str(prompts), 'columns': 2}),
        ('other.png', {'prompt': ['a nine below a six']}),
    ):
        draw.grid(str(run), output=str(tmp_path / place), **options)
        assert (tmp_path / place).exists()
    image = tmp_path / 'image.png'
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(image)
    draw.complete(
        str(run), images=str(image), prompt=['a six'], output=str(tmp_path / 'complete.png')
    )
    for call, message in (
        (lambda: draw.grid(str(run), classes='3'), 'this run draws for texts: give --prompt='),
        (lambda: draw.sample(str(run)), 'this run draws for texts'),
        (
            lambda: draw.sample(str(run), labels='balanced', prompts=str(prompts)),
            '--labels are classes: leave them out',
        ),
        (
            lambda: draw.grid(str(run), classes='3', prompt=['a one above a two']),
            'give --classes, or else --prompt and --prompts',
        ),
        (
            lambda: draw.grid(str(run), prompts='texts.npz'),
            'texts.npz has features of texts, which this run does not read',
        ),
        (
            lambda: draw.grid(str(run), prompts='texts.npz', prompt=['a six']),
            'has texts and their features: give it alone',
        ),
        (lambda: draw.caption(str(run), images=str(image)), 'this model writes no texts: a model'),
        (
            lambda: draw.complete(str(run), images=str(image), prompt=['a one', 'a two']),
            '2 prompts are given for 1 images: give one for all, or one for each',
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.slow
def test_a_run_that_writes_texts(tmp_path, capsys):
    """Its scores, its captions on the screen and in a table, and what it refuses."""
    c = _config()
    c.ar.update(text_weight=0.05, alone_weight=0.0)
    c.tokenizer = tiny_config.random_tokenizer(c, tmp_path / 'tokenizer')
    c.tokenizer_training.steps = 0
    workdir = tmp_path / 'joint'
    with libraries_promote(), mock.patch.object(composed, '_COUNTS', (400, 60)):
        train.train(checks.check(c), str(workdir), 'the command', 0.0)
    metrics = json.loads((workdir / 'metrics.json').read_text())
    for group in ('seen', 'held_out', 'rows'):
        assert 0 <= metrics[f'captions/{group}'] <= 1
    # A model that knows nothing needs about log V nats for each byte, and captions have about 30.
    for name in ('captions/nats', 'captions/nats_held_out'):
        assert 50 < metrics[name] < 48 * np.log(257)
    # Texts without an image were not learned. Where they are, they are scored, too.
    assert 'captions/nats_alone' not in metrics
    learned = load_run(str(workdir))
    learned = learned._replace(config=schema.changed(learned.config, {'ar.alone_weight': 1.0}))
    data = small.open_data_set('composed', None, c.seed, c.data.holdout)
    real = composed_digits.real_images(data)
    few = composed_digits.Real(real.pixels[:30], real.wishes[:30])
    with libraries_promote():
        scores = composed_digits.score_captions(learned, few, sharding.make_mesh())
    assert 50 < scores['captions/nats_alone'] < 48 * np.log(257)
    assert 'writes the right caption' in (workdir / 'report.html').read_text()
    lines = (workdir / 'ar/metrics.jsonl').read_text().splitlines()
    losses = [found['text_loss'] for found in map(json.loads, lines) if 'text_loss' in found]
    assert losses
    assert all(0 < loss < np.log(257) + 1 for loss in losses)
    assert any('heldout_text_loss' in line for line in lines)

    model = sphere_ar_jax.load(workdir)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(3, 32, 32, 1), dtype=np.uint8)
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f'{i}.png')
    texts = model.caption(images)
    assert len(texts) == 3
    assert all(isinstance(text, str) for text in texts)
    assert model.caption(images[1:]) == texts[1:]
    drawn = model.caption(images, top_p=1.0, seed=[5, 6, 7])
    assert drawn != texts
    assert model.caption(images[2:], top_p=1.0, seed=[7]) == drawn[2:]
    capsys.readouterr()
    draw.caption(str(workdir), images=str(folder))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split('\t')[0] for line in shown] == ['0.png', '1.png', '2.png']
    table = tmp_path / 'captions.tsv'
    draw.caption(str(workdir), images=str(folder), top_p='0.9', num_images=2, output=str(table))
    read = captions.read_table(str(table))
    assert set(read) <= {'0.png', '2.png'}
    some = table.read_text().splitlines()
    assert len(some) == 2
    # An image is read by the same draws, however many others there are.
    draw.caption(str(workdir), images=str(folder), top_p='0.9', output=str(table))
    every = table.read_text().splitlines()
    assert len(every) == 3
    assert set(some) <= set(every)
    (folder / 'a\tb.png').write_bytes((folder / '0.png').read_bytes())
    with pytest.raises(UserError, match=r'a table cannot name a\\tb.png: rename the file'):
        draw.caption(str(workdir), images=str(folder), output=str(table))
    (folder / 'a\tb.png').unlink()
    (folder / '1.png').write_bytes(b'broken')
    draw.caption(str(workdir), images=str(folder))
    out, err = capsys.readouterr()
    assert out.splitlines()[-2:] == [shown[-3], shown[-1]]
    assert '1.png is left out: ' in err
    with pytest.raises(UserError, match=r'none of 1 images in .*1\.png can be read'):
        draw.caption(str(workdir), images=str(folder / '1.png'))
    # It draws, too.
    assert model.sample('a one above a two').shape == (1, 32, 32, 1)
    for call, message in (
        (
            lambda: model.caption(images, top_p=0.0),
            r'top_p is 0.0, but must be a number in \(0, 1\]',
        ),
        (lambda: model.caption(images, top_p=0.5, temperature=0), 'temperature is 0, but must be'),
        (lambda: model.caption(images, temperature=0.5), 'give top_p, as 1.0, too'),
        (
            lambda: draw.caption(str(workdir), images=str(folder), top_p='most'),
            '--top_p is most: give a share as 0.9',
        ),
        (
            lambda: draw.caption(str(workdir), images=str(folder), output='texts.txt'),
            '--output is texts.txt, but must end in .tsv',
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.slow
def test_a_run_for_texts_is_trained_on(run, tmp_path, capsys):
    """Its text tokens are kept, and another vocabulary is refused."""
    c = _config()
    c.fine_tuning.init_from = str(run)
    c.ar.text_tokens = 16
    with pytest.raises(UserError, match=r'another vocabulary: give --config\.ar\.vocabulary='):
        train.train(checks.check(c), str(tmp_path / 'refused'), 'the command', 0.0)
    c.ar.vocabulary = str(run / 'vocabulary.json')
    c.ar_training.steps = 1
    c.ar_training.warmup_steps = 0
    c.tokenizer = str(run)
    with libraries_promote(), mock.patch.object(composed, '_COUNTS', (400, 60)):
        train.train(checks.check(c), str(tmp_path / 'on'), 'the command', 0.0)
    assert 'the tokens of texts are kept' in capsys.readouterr().out
    assert (tmp_path / 'on/vocabulary.json').exists()
    before = sphere_ar_jax.load(run).ar_params['text_embedding']
    after = sphere_ar_jax.load(tmp_path / 'on').ar_params['text_embedding']
    assert 0 < np.abs(before - after).max() < 0.01


@pytest.mark.slow
def test_a_folder_with_texts_beside_its_images(tmp_path, capsys):
    """A training on captioned files, of which one has no caption and one a long one."""
    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(256, size=(40, 36), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i:02d}.png')
        if i:
            (folder / f'{i:02d}.txt').write_text('x' * 60 if i == 23 else f'number {i}\nno. {i}')
    c = _config()
    c.data.update(name='folder', path=str(folder), captions='beside', flip=False, max_broken=1.0)
    c.data.holdout_files = 0.3
    workdir = tmp_path / 'run'
    with libraries_promote():
        train.train(checks.check(c), str(workdir), 'the command', 0.0)
    said = capsys.readouterr()
    assert "captions, the first one: 'number 1'" in said.out
    assert '00.png has no caption that can be read: another image takes its place' in said.err
    metrics = json.loads((workdir / 'metrics.json').read_text())
    assert metrics['vae/psnr'] > 0
    assert (workdir / 'samples.png').exists()
    assert (workdir / 'ar/samples_0000004.png').exists()
    images = sphere_ar_jax.load(workdir).sample('number 7')
    chex.assert_shape(images, (1, 32, 32, 1))
    assert 'Scores: --mode=sample --prompts=FILE, then --mode=evaluate' in said.out
    with pytest.raises(UserError, match='the images have one class alone'):
        evaluate.evaluate(str(workdir))


@pytest.mark.slow
def test_a_run_with_another_vocabulary_does_not_go_on(run, tmp_path):
    """Neither with a list of words in place of a tokenizer.json, nor with bytes."""
    words = tmp_path / 'words.txt'
    words.write_text('\n'.join(WORDS) + '\nrows:\n')
    before = (run / 'config.json').read_bytes()
    for word in (str(words), 'bytes'):
        c = _config(word)
        c.ar.text_tokens = 16
        with (
            mock.patch.object(composed, '_COUNTS', (400, 60)),
            pytest.raises(UserError, match='was begun with another vocabulary than'),
        ):
            train.train(c, str(run), 'the command', 0.0)
    assert (run / 'config.json').read_bytes() == before
    assert not (run / 'vocabulary.txt').exists()


def test_fid_while_training_is_that_of_captions(monkeypatch):
    """Captions of the images are drawn in turn, as classes are elsewhere."""
    pool = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    seen = []
    monkeypatch.setattr(snapshots, '_drawn', lambda setting, run, labels: seen.append(labels))
    monkeypatch.setattr(
        snapshots.protocol, 'extract', lambda *_, **__: inception.Features(pool, None, None)
    )
    c = _config()
    c.watch.fid_images = 5
    source = [{'captions': ('a one', 'another one')}, {'captions': ()}, {'captions': ('a two',)}]
    judge = (None, statistics.statistics(pool))
    setting = snapshots.Setting(c, '', None, None, None, source, judge=judge)
    assert snapshots._fid(setting, None) == pytest.approx(0, abs=1e-6)
    texts = ['a one', 'a two', 'a one', 'a two', 'a one']
    np.testing.assert_array_equal(seen[0], build.encode_captions(c, texts))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'ar.condition': 'classes'}, "data composed has captions: use 'text'"),
        ({'ar.condition': 'features'}, r'give --config\.ar\.features=FILE\.npz, the features'),
        (
            {'ar.condition': 'features', 'ar.features': '/no/file.npz'},
            r'there is no file /no/file\.npz with the features of texts: give',
        ),
        (
            {'ar.condition': 'features', 'ar.text_encoder_depth': 1},
            r"ar\.text_encoder_depth is for models of texts: use ar\.condition 'text'",
        ),
        (
            {'data.name': 'idx'},
            "'text' reads captions, which data idx has not: give image files, or use ar.condition",
        ),
        (
            {'data.name': 'folder'},
            "'text' reads captions, which data folder has not: give --config.data.captions=FILE",
        ),
        (
            {'data.captions': 'beside'},
            'data.captions is for images in files, not for data composed',
        ),
        (
            {'data.name': 'folder', 'data.captions': 'beside', 'ar.condition': 'classes'},
            "data folder has captions: use 'text'",
        ),
        (
            {'data.name': 'folder', 'ar.condition': 'classes', 'ar.text_weight': 0.2},
            "ar.text_weight is for models of texts: use ar.condition 'text', or leave it out",
        ),
        (
            {'data.name': 'folder', 'ar.condition': 'classes', 'ar.text_encoder_depth': 1},
            'ar.text_encoder_depth is for models of texts',
        ),
        (
            {'ar.text_weight': 0.2, 'ar.text_encoder_depth': 1},
            'an encoder sees a whole text, which a model that writes it may not: leave out',
        ),
        ({'ar.text_encoder_depth': -1}, 'ar.text_encoder_depth is -1, but must be at least 0'),
        ({'ar.text_weight': -0.1}, 'ar.text_weight is -0.1, but must'),
        (
            {'ar.text_weight': 0.2, 'ar.alone_weight': -1.0},
            'ar.alone_weight is -1.0, but must not be negative',
        ),
        (
            {'ar.alone_weight': 0.0},
            'ar.alone_weight is for models that write texts: give ar.text_weight, or leave it out',
        ),
        ({'ar.condition': 'poems'}, "ar.condition is 'poems': use classes, text"),
        ({'ar.vocabulary': '/no/file'}, "give 'bytes', or the path of a tokenizer.json or a .txt"),
        ({'ar.text_tokens': 0}, 'ar.text_tokens is 0, but must be at least 1'),
    ],
)
def test_configs_that_no_run_can_have(changes, message):
    c = _config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as raised:
        checks.check(c)
    assert '\n' not in str(raised.value)
