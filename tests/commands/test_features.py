"""Runs that are trained on features of texts."""

import json
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import sphere_ar_jax
from sphere_ar_jax.commands import draw, evaluate, train
from sphere_ar_jax.config import build, checks, schema
from sphere_ar_jax.data import sources
from sphere_ar_jax.data.captions import captioned, composed, table
from sphere_ar_jax.evaluation import snapshots
from sphere_ar_jax.runtime import metric_writer, sharding
from sphere_ar_jax.runtime.console import UserError
from tests import tiny_config
from tests.conftest import libraries_promote

pytestmark = pytest.mark.slow  # each of them trains


def _config():
    c = tiny_config.get_config()
    c.data.name = 'composed'
    c.data.classifier_steps = 2
    c.vae.update(channels=(4, 4, 8, 16))
    c.ar.condition = 'features'
    for name in ('tokenizer_training', 'ar_training'):
        c[name].update(steps=4, checkpoint_every=4)
    c.sampling.update(num_images=12, batch_size=12, guidance='constant')
    c.watch.update(every=4, classes=2, columns=2)
    return c


def _take_tokenizer(c, directory):
    """Lets a config take a tokenizer that needs no training."""
    c.tokenizer = tiny_config.random_tokenizer(c, directory / 'tokenizer')
    c.tokenizer_training.steps = 0


def test_features_of_another_model_stand_in_place_of_tokens(tmp_path, capsys):
    """Training, drawing for texts that the file has, and for others with a file of their own."""
    c = _config()
    texts = set()
    with mock.patch.object(composed, '_COUNTS', (400, 60)):
        for images in composed.splits(c.seed, c.data.holdout):
            texts |= {images.composition(i).caption() for i in range(len(images))}
    texts = sorted(texts)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / 'f.npz', texts=texts, features=rng.normal(size=(len(texts), 3, 6)))
    c.ar.features = str(tmp_path / 'f.npz')
    workdir = str(tmp_path / 'run')
    _take_tokenizer(c, tmp_path)
    with libraries_promote(), mock.patch.object(composed, '_COUNTS', (400, 60)):
        train.train(checks.check(c), workdir, 'the command', 0.0)
    assert json.loads((tmp_path / 'run/config.json').read_text())['ar']['feature_shape'] == [3, 6]
    metrics = json.loads((tmp_path / 'run/metrics.json').read_text())
    assert {'samples/seen', 'samples/held_out', 'samples/rows'} <= set(metrics)
    run = sphere_ar_jax.load(workdir)
    assert 'texts of 3 places with 6 features each' in repr(run)
    by_text = run.sample([texts[0], texts[5]])
    given = np.load(tmp_path / 'f.npz')['features'][[0, 5]].astype(np.float32)
    np.testing.assert_array_equal(run.sample(given), by_text)
    # The same noise with another text: after four steps it changes little, but it does.
    assert not np.array_equal(by_text[1], run.sample([texts[0]] * 2)[1])
    with pytest.raises(UserError, match="no features of the text 'a cat': add them"):
        run.sample('a cat')
    other = rng.normal(size=(2, 3, 6))
    np.savez(tmp_path / 'other.npz', texts=['a cat', 'two owls'], features=other)
    (tmp_path / 'f.npz').unlink()
    draw.grid(workdir, prompts=str(tmp_path / 'other.npz'), columns=2)
    draw.sample(workdir, prompts=str(tmp_path / 'other.npz'), num_images=5)
    with np.load(tmp_path / 'run/samples.npz') as file:
        assert file['arr_0'].shape == (5, 32, 32, 1)
        assert file['arr_1'].tolist() == [0, 1, 0, 1, 0]
        assert file['arr_1'].dtype == np.int32
    (tmp_path / 'two').mkdir()
    for name in ('black', 'grey'):
        Image.new('L', (32, 32), 100 * (name == 'grey')).save(tmp_path / f'two/{name}.png')
    draw.complete(workdir, images=str(tmp_path / 'two'), prompts=str(tmp_path / 'other.npz'))
    assert (tmp_path / 'run/complete.png').exists()
    np.savez(tmp_path / 'wide.npz', texts=['a cat'], features=np.ones((1, 3, 7)))
    with pytest.raises(UserError, match=r'has features \(3, 7\), but the model reads \(3, 6\)'):
        draw.grid(workdir, prompts=str(tmp_path / 'wide.npz'))


@pytest.fixture
def folder(tmp_path):
    """Images of two classes with captions in a table, and the features of these captions."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(40):
        place = tmp_path / 'images' / 'ab'[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(36, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f'{i:02d}.png')
        if i:  # one image has no caption
            lines.append(f'{"ab"[i % 2]}/{i:02d}.png\tnumber {i}\n')
    (tmp_path / 'captions.tsv').write_text(''.join(lines))
    texts = [f'number {i}' for i in range(40)]
    values = rng.normal(size=(40, 2, 5)).astype(np.float16)
    np.savez(tmp_path / 'f.npz', texts=texts, features=values)
    return tmp_path


def _on_folder(folder):
    c = _config()
    c.data.update(name='folder', path=str(folder / 'images'), flip=False, holdout_files=0.3)
    c.data.captions = str(folder / 'captions.tsv')
    c.data.workers = 1
    c.ar.features = str(folder / 'f.npz')
    _take_tokenizer(c, folder)
    return checks.check(c)


@libraries_promote()
def test_features_of_images_in_files(folder, capsys):
    """Training by a worker process, another place of the file, and the scores."""
    c = _on_folder(folder)
    assert c.ar.feature_shape == (2, 5)
    workdir = str(folder / 'run')
    train.train(c, workdir, 'the command', 0.0)
    assert 'by a classifier of the classes; or --mode=sample --prompts' in capsys.readouterr().out
    curves = metric_writer.read_scalars(f'{workdir}/ar/metrics.jsonl')
    assert any(np.isfinite(line.get('heldout_loss', np.nan)) for line in curves)
    (folder / 'f.npz').rename(folder / 'moved.npz')
    with pytest.raises(UserError, match=r'there is no file .*f\.npz with the features of texts'):
        draw.grid(workdir, prompt=['number 3'])
    like = schema.changed(c, {'ar.features': str(folder / 'moved.npz')})
    draw.grid(workdir, prompt=['number 3'], like=like)
    scores = evaluate.evaluate(workdir, like=like)
    assert scores['compared']['side'] == 32
    assert scores['compared']['train'] + scores['compared']['heldout'] == 39
    assert 0 <= scores['memorisation/own_nearest'] <= 1
    with Image.open(folder / 'run/nearest.png') as picture:
        assert picture.width > 6 * 48
    run = sphere_ar_jax.load(workdir)
    with pytest.raises(UserError, match=r'there is no file .*f\.npz'):
        run.sample('number 3')


def test_held_out_images_have_their_features(folder):
    c = _on_folder(folder)
    source = table.with_captions(sources.open_source('folder', c.data.path), c.data.captions)
    training, heldout = sources.split(source, 0.3)
    first = captioned.FirstCaption(heldout, build.caption_encoder(c))
    vae = build.build_vae(c)
    mesh = sharding.make_mesh()
    setting = snapshots.Setting(c, '', mesh, vae, None, training, heldout=first)
    found = snapshots._examples(setting, first, range(len(first)), 5)
    with np.load(folder / 'f.npz') as file:
        for i, label in enumerate(found['label']):
            (text,) = heldout[i]['captions']
            number = int(text.split()[1])
            np.testing.assert_array_equal(label, file['features'][number].astype(np.float32))


def test_a_caption_without_features_is_named(folder):
    with np.load(folder / 'f.npz') as file:
        np.savez(folder / 'few.npz', texts=file['texts'][:20], features=file['features'][:20])
    c = schema.changed(_on_folder(folder), {'ar.features': str(folder / 'few.npz')})
    with (
        libraries_promote(),
        pytest.raises(UserError, match=r"few\.npz has no features of the text 'number \d+'"),
    ):
        train.train(checks.check(c), str(folder / 'run'), 'the command', 0.0)
