"""The Fréchet distance of image files in the features of a classifier of their classes."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from sphere_ar_jax.commands import evaluate, open_run
from sphere_ar_jax.data import sources
from sphere_ar_jax.data.captions import table
from sphere_ar_jax.evaluation import snapshots
from sphere_ar_jax.evaluation.fidelity import classifier_features
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from tests import tiny_config

STEPS = 40


def _bars(label, n, seed):
    """Images (n, 16, 16, 3) uint8 of one bright row (label 0) or column (1) each."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, 16, 16, 3), np.uint8)
    for image in images:
        at = rng.integers(2, 14)
        bar = image[at] if label == 0 else image[:, at]
        bar[:] = rng.integers(150, 256, 3)
    return images


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Forty images with a row, twenty with a column, and one that is broken."""
    root = tmp_path_factory.mktemp('bars')
    for label, (name, n) in enumerate((('row', 40), ('column', 20))):
        (root / f'{label}_{name}').mkdir()
        for i, image in enumerate(_bars(label, n, label)):
            Image.fromarray(image).save(root / f'{label}_{name}' / f'{i:02}.png')
    (root / '1_column' / '07.png').write_bytes(b'broken')
    return root


@pytest.fixture(scope='module')
def real(folder):
    return classifier_features.read(sources.open_source('folder', str(folder)), None, 16, 3)


@pytest.mark.parametrize(('side', 'small'), [(16, 16), (64, 64), (96, 48), (160, 40), (256, 64)])
def test_images_are_averaged_to_at_most_64_pixels_a_side(side, small):
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    found = classifier_features.shrunk(images)
    assert found.shape == (2, small, small, 3)
    assert found.dtype == np.float32
    block = side // small
    corner = images[1, -block:, :block].astype(np.float64).mean((0, 1)) / 255
    np.testing.assert_allclose(found[1, -1, 0], corner, rtol=1e-5)


def test_images_whose_caption_the_model_cannot_read_are_left_out(folder, tmp_path):
    """As in a training, which replaces them: they do not end an evaluation."""
    source = sources.open_source('folder', str(folder))
    names = [source.name(i) for i in range(len(source))]
    texts = ['a kitten' if i == 3 else 'a cat' for i in range(len(names))]
    lines = (f'{name}\t{text}\n' for name, text in zip(names, texts, strict=True))
    (tmp_path / 'a.tsv').write_text(''.join(lines))

    def encode(text):
        if text != 'a cat':
            raise UserError(text)
        return np.zeros(2, np.int32)

    captioned = table.with_captions(source, str(tmp_path / 'a.tsv'))
    found = classifier_features.read(captioned, None, 16, 3, encode)
    assert len(found.captions) == 58
    assert set(found.captions) == {'a cat'}


def test_every_fifth_image_is_kept_from_the_classifier(real):
    """Broken ones are left out; samples get the classes in the proportions of the real images."""
    assert (len(real.train), len(real.heldout), real.of_run) == (47, 12, False)
    wanted = classifier_features.asked(real, 30)
    assert wanted.labels.shape == (30,)
    assert np.bincount(wanted.labels).tolist() == [20, 10]
    np.testing.assert_array_equal(real.labels[wanted.images], wanted.labels)
    assert wanted.captions == ()


@pytest.mark.slow
def test_real_images_are_near_and_noise_is_far(real, tmp_path):
    """Held-out images in the place of samples are at distance 0 of themselves, as read as such."""
    heldout = (real.heldout.pixels * 255).round().astype(np.uint8)
    numbers = len(real.train) + np.arange(len(heldout))
    wanted = classifier_features.Asked(real.heldout.labels, numbers, ())
    of_run = real._replace(of_run=True)

    def score(batches):
        scores, nearest = classifier_features.score(
            batches, wanted, of_run, ['row', 'column'], STEPS, str(tmp_path)
        )
        assert nearest.shape == (12,)
        assert nearest.max() < len(real.train)
        return scores

    scores = score([heldout[:5], heldout[5:]])
    assert scores['classifier_frechet_heldout'] == pytest.approx(0, abs=1e-5)
    assert scores['samples/accuracy'] == scores['classifier/accuracy'] > 0.8
    assert scores['samples/balanced_accuracy'] == scores['classifier/balanced_accuracy'] > 0.8
    assert scores['compared'] == {
        'samples': 12, 'train': 47, 'heldout': 12, 'heldout_from': 'the run',
        'side': 16, 'classifier_steps': STEPS,
    }  # fmt: skip
    assert 'it is not FID' in scores['note']
    assert not any(name == 'fid' for name in scores)
    kept = (tmp_path / 'classifier.npz').read_bytes()
    assert scores['memorisation/samples_to_train'] == scores['memorisation/heldout_to_train'] > 0
    noise = np.random.default_rng(3).integers(0, 256, heldout.shape, np.uint8)
    far = score([noise])
    assert far['classifier_frechet'] > 3 * scores['classifier_frechet']
    assert far['classifier_frechet_floor'] == scores['classifier_frechet_floor'] > 0
    assert (tmp_path / 'classifier.npz').read_bytes() == kept


def test_classes_are_compared_with_as_many_real_images():
    """By the Fréchet distance of two Gaussians: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 √(Σ₁Σ₂))."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(4000, 2))
    real_labels = np.repeat([0, 1, 2], [2000, 1970, 30])
    labels = np.repeat([0, 1, 2], [1500, 600, 900])
    drawn = rng.normal(size=(3000, 2)) * np.where(labels == 1, 3, 1)[:, None]
    drawn[labels == 0] += (3, 4)
    titles = ['far', 'wide', 'few']
    found = classifier_features._of_classes(titles, real, real_labels, drawn, labels)
    counts = {title: scores['images'] for title, scores in found.items()}
    assert counts == {'far': 1000, 'wide': 600}
    np.testing.assert_allclose(found['far']['frechet'], 25, rtol=0.05)
    np.testing.assert_allclose(found['wide']['frechet'], 2 * (3 - 1) ** 2, rtol=0.1)
    assert all(0 < scores['floor'] < 0.02 for scores in found.values())


def test_a_sample_may_be_its_captions_own_image():
    """Copies of the captioned training images are told, and so are samples that lie anew."""
    rng = np.random.default_rng(0)
    pixels = rng.random((30, 8, 8, 1)).astype(np.float32)
    texts = tuple(f'number {i}' for i in range(30))
    labels = np.arange(30) % 2
    train = classifier_features.Sample(pixels[:20], labels[:20], 2, texts[:20])
    heldout = classifier_features.Sample(pixels[20:], labels[20:], 2, texts[20:])
    real = classifier_features.Real(train, heldout, of_run=True)
    wanted = classifier_features.asked(real, 30)
    assert sorted(wanted.captions) == sorted(texts)
    assert [texts[i] for i in wanted.images] == list(wanted.captions)

    def score(images):
        batch = np.round(images * 255).astype(np.uint8)
        scores, nearest = classifier_features.score([batch], wanted, real, ['a', 'b'], 2)
        return scores | {'nearest': nearest}

    copied = score(pixels[wanted.images])
    assert copied['memorisation/own_nearest'] == 1
    of_train = wanted.images < 20
    np.testing.assert_array_equal(copied['nearest'][of_train], wanted.images[of_train])
    # The held-out images themselves are as far as held-out images are.
    assert copied['memorisation/samples_to_train'] < 0.05 < copied['memorisation/heldout_to_train']
    # Only the classes that have 20 images of their own on both sides are compared.
    assert copied['classes'] == {}
    turned = score(np.roll(pixels[wanted.images], 1, axis=0))
    assert turned['memorisation/own_nearest'] == 0


def test_a_run_on_a_folder_is_scored_without_other_weights(folder, tmp_path, monkeypatch):
    """By the images that the run itself holds out, where it does."""
    cfg = tiny_config.get_config()
    cfg.vae.image_channels = 3
    cfg.data.update(name='folder', path=str(folder), num_classes=2)
    cfg.data.update(holdout_files=0.3, classifier_steps=2)
    run = tiny_config.random_run(cfg, num_images=24)
    monkeypatch.setattr(open_run, 'open_run', lambda *_: (run, sharding.make_mesh()))
    monkeypatch.setattr(open_run, 'config_of', lambda _: cfg)
    asked = []

    def drawn(setting, run, labels, progress):
        asked.append(labels)
        yield _bars(0, 10, 9)
        yield _bars(0, len(labels) - 10, 9)

    monkeypatch.setattr(snapshots, '_drawn', drawn)
    scores = evaluate.evaluate(str(tmp_path))
    assert len(asked[0]) == 24
    assert set(asked[0]) == {0, 1}
    compared = scores['compared']
    assert compared['heldout_from'] == 'the run'
    assert compared['train'] + compared['heldout'] == 59
    assert np.isfinite(scores['classifier_frechet'])
    assert 'seed' in scores
    assert 'memorisation/own_nearest' not in scores  # without captions
    with Image.open(tmp_path / 'nearest.png') as picture:
        assert picture.width > 12 * 48
        assert picture.height > 2 * 48
    assert json.loads((tmp_path / 'evaluation.json').read_text())['note'] == scores['note']


def test_too_few_classes_or_images(tmp_path):
    (tmp_path / 'a').mkdir()
    for i, image in enumerate(_bars(0, 4, 0)):
        Image.fromarray(image).save(tmp_path / 'a' / f'{i}.png')
    alone = sources.open_source('folder', str(tmp_path))
    with pytest.raises(UserError, match='one class alone'):
        classifier_features.read(alone, None, 16, 3)
    (tmp_path / 'b').mkdir()
    Image.fromarray(image).save(tmp_path / 'b' / '1.png')
    few = sources.open_source('folder', str(tmp_path))
    with pytest.raises(UserError, match='5 images are too few'):
        classifier_features.read(few, None, 16, 3)


def test_small_classes_count_as_much_as_large_ones():
    """As scikit-learn's score of that name."""
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 200, p=(0.8, 0.1, 0.06, 0.04))
    read = np.where(rng.random(200) < 0.7, labels, 0)
    found = classifier_features._balanced(read == labels, labels)
    np.testing.assert_allclose(found, metrics.balanced_accuracy_score(labels, read))
