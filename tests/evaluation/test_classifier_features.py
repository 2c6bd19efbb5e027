"""The Fréchet distance of image files in the features of a classifier of their classes."""

import json

import numpy as np
import pytest
from PIL import Image

from sphere_ar_jax.commands import evaluate, open_run
from sphere_ar_jax.data import sources
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
    assert found.shape == (2, small, small, 3) and found.dtype == np.float32
    block = side // small
    corner = images[1, -block:, :block].astype(np.float64).mean((0, 1)) / 255
    np.testing.assert_allclose(found[1, -1, 0], corner, rtol=1e-5)


def test_every_fifth_image_is_kept_from_the_classifier(real):
    """Broken ones are left out; samples get the classes in the proportions of the real images."""
    assert (len(real.train), len(real.heldout), real.of_run) == (47, 12, False)
    labels = classifier_features.labels(real, 30)
    assert labels.shape == (30,) and np.bincount(labels).tolist() == [20, 10]


@pytest.mark.slow
def test_real_images_are_near_and_noise_is_far(real, tmp_path):
    """Held-out images in the place of samples are at distance 0 of themselves, as read as such."""
    heldout = (real.heldout.pixels * 255).round().astype(np.uint8)
    scores = classifier_features.score(
        [heldout[:5], heldout[5:]], real.heldout.labels, real, STEPS, str(tmp_path)
    )
    assert scores['classifier_frechet_heldout'] == pytest.approx(0, abs=1e-5)
    assert scores['samples/accuracy'] == scores['classifier/accuracy'] > 0.8
    assert scores['compared'] == {
        'samples': 12, 'train': 47, 'heldout': 12, 'heldout_from': 'the classifier alone',
        'side': 16, 'classifier_steps': STEPS,
    }  # fmt: skip
    assert 'it is not FID' in scores['note'] and not any(name == 'fid' for name in scores)
    kept = (tmp_path / 'classifier.npz').read_bytes()
    noise = np.random.default_rng(3).integers(0, 256, heldout.shape, np.uint8)
    far = classifier_features.score([noise], real.heldout.labels, real, STEPS, str(tmp_path))
    assert far['classifier_frechet'] > 3 * scores['classifier_frechet']
    assert far['classifier_frechet_floor'] == scores['classifier_frechet_floor'] > 0
    assert (tmp_path / 'classifier.npz').read_bytes() == kept


def test_a_run_on_a_folder_is_scored_without_other_weights(folder, tmp_path, monkeypatch):
    """By the images that the run itself holds out, where it does."""
    cfg = tiny_config.get_config()
    cfg.vae.image_channels = 3
    cfg.data.update(name='folder', path=str(folder), num_classes=2)
    cfg.data.update(holdout_files=0.3, classifier_steps=2)
    run = tiny_config.random_run(cfg, num_images=24)
    monkeypatch.setattr(open_run, 'open_run', lambda *_: (run, sharding.make_mesh()))
    asked = []

    def drawn(setting, vae_params, ar_params, labels, progress):
        asked.append(labels)
        yield _bars(0, len(labels), 9)

    monkeypatch.setattr(snapshots, '_drawn', drawn)
    scores = evaluate.evaluate(str(tmp_path))
    assert len(asked[0]) == 24 and set(asked[0]) == {0, 1}
    compared = scores['compared']
    assert compared['heldout_from'] == 'the run' and compared['train'] + compared['heldout'] == 59
    assert np.isfinite(scores['classifier_frechet']) and 'seed' in scores
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
