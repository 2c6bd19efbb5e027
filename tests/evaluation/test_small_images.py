import numpy as np
import pytest

from sphere_ar_jax.data import digits, idx, small
from sphere_ar_jax.evaluation import classifiers, small_images
from sphere_ar_jax.evaluation.small_images import compare, nearest

# What metrics.json of a run on the digits has had from the beginning.
NAMES = [
    'classifier/accuracy',
    'real/frechet',
    'samples/accuracy',
    'samples/classes_drawn',
    'samples/frechet',
    'samples/frechet_heldout',
    'samples/precision',
    'samples/recall',
    'memorisation/samples_to_train',
    'memorisation/heldout_to_train',
    'memorisation/nearer_than_5pct_of_heldout',
]


def test_memorisation_tells_copies_from_new_images():
    rng = np.random.default_rng(0)
    train, heldout, new = rng.normal(size=(3, 2000, 4))
    _, of_heldout = nearest(heldout, train)
    _, of_copies = nearest(train[:300], train)
    copied = compare(of_copies, of_heldout)
    by_hand = np.linalg.norm(heldout[:, None] - train[None], axis=-1).min(1)
    np.testing.assert_allclose(
        copied['memorisation/heldout_to_train'], np.median(by_hand), rtol=1e-9
    )
    assert copied['memorisation/nearer_than_5pct_of_heldout'] == 1
    assert copied['memorisation/samples_to_train'] < 1e-6
    _, of_new = nearest(new, train)
    fresh = compare(of_new, of_heldout)
    assert abs(fresh['memorisation/nearer_than_5pct_of_heldout'] - 0.05) < 5 * np.sqrt(
        2 * 0.05 * 0.95 / 2000
    )
    np.testing.assert_allclose(
        fresh['memorisation/samples_to_train'], fresh['memorisation/heldout_to_train'], rtol=0.1
    )


def test_digit_scores_of_real_digits_and_of_nonsense():
    """Real held-out digits score as such through the same door.

    Shuffled labels and noise do not.
    """
    data = small.open_data_set('digits', None, 0, 0.2)
    heldout = data.heldout
    np.testing.assert_allclose(heldout.to_pixels(heldout.images), heldout.pixels, atol=1e-6)
    judge = small_images.Judge(data, small_images.classifier(data, steps=1))
    scores = judge.floor(len(heldout)) | judge.scores(heldout.images, heldout.labels)
    assert list(scores) == NAMES
    assert scores['samples/accuracy'] == scores['classifier/accuracy'] > 0.97
    assert scores['samples/classes_drawn'] == 10
    assert scores['samples/frechet'] < 0.1
    assert scores['samples/precision'] > 0.95
    np.testing.assert_allclose(scores['samples/frechet_heldout'], 0, atol=1e-6)
    assert abs(scores['memorisation/nearer_than_5pct_of_heldout'] - 0.05) < 0.01
    noise = np.random.default_rng(0).uniform(-1, 1, size=(500, 8, 8, 1))
    scores = judge.scores(digits.enlarge(noise), np.arange(500) % 10)
    assert scores['samples/accuracy'] < 0.3
    assert scores['samples/frechet'] > 1
    assert scores['samples/precision'] < 0.01


@pytest.mark.parametrize('low, high', [(-3.0, -1.0), (1.0, 4.0)])
def test_digit_pixels_are_clipped(low, high):
    images = np.random.default_rng(0).uniform(low, high, size=(2, 16, 16, 1))
    pixels = digits.Digits('train', 0).to_pixels(images)
    assert pixels.shape == (2, 8, 8)
    assert set(np.unique(pixels)) <= {0.0, 1.0}


def test_the_digits_numbers_are_those_of_their_first_protocol():
    """Computed here from scikit-learn and the definitions, as that protocol did."""
    from sklearn.metrics import pairwise_distances
    from sklearn.svm import SVC

    data = small.open_data_set('digits', None, 3, 0.2)
    train = data.train.pixels.reshape(-1, 64)
    heldout = data.heldout.pixels.reshape(-1, 64)
    images = data.train.images[:200] * np.float32(0.9)
    labels = data.train.labels[:200]
    samples = digits.shrink((images + 1) / 2).reshape(-1, 64)
    judge = small_images.Judge(data, small_images.classifier(data, steps=1))
    scores = judge.floor(len(images)) | judge.scores(images, labels)
    svc = SVC(gamma=0.256, C=10).fit(train, data.train.labels)
    assert scores['classifier/accuracy'] == svc.score(heldout, data.heldout.labels)
    assert scores['samples/accuracy'] == np.mean(svc.predict(samples) == labels)
    nearest = np.median(pairwise_distances(samples, train).min(1))
    np.testing.assert_allclose(scores['memorisation/samples_to_train'], nearest, rtol=1e-6)
    real = np.concatenate([train, heldout])
    few = heldout[np.random.default_rng(0).permutation(len(heldout))[: len(images)]]
    for name, a, b in (
        ('samples/frechet', samples, real),
        ('samples/frechet_heldout', samples, heldout),
        ('real/frechet', train, heldout),
        ('real/frechet_as_many', few, real),
    ):
        means = a.mean(0) - b.mean(0)
        product = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0)
        traces = np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
        truth = means @ means + traces - 2 * np.sqrt(product).sum()
        np.testing.assert_allclose(scores[name], truth, atol=1e-4)


def _bars(n, seed):
    """8×8 images with a bright bar in the column of their label, on noise."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(n) % 3
    scans = rng.integers(0, 60, (n, 8, 8))
    scans[np.arange(n), :, 2 * labels] = 255
    return scans.astype(np.uint8), labels


@pytest.fixture(scope='module')
def bars():
    """A small data set of three classes."""
    splits = [idx.IDX('/bars', part, *_bars(n, n), 3, None) for part, n in PARTS.items()]
    return small.DataSet('idx', *splits)


PARTS = {'train': 300, 'test': 120}
RECIPE = classifiers.Recipe(100, 32, 1e-2, channels=(8, 8, 8), width=16)


def _images(split):
    return np.stack([split[i]['image'] for i in range(len(split))])


def test_a_network_learns_and_its_weights_are_kept(bars, tmp_path):
    """It reads held-out bars; other data or another recipe train anew, a damaged file too."""
    seen = []

    def count(done, total):
        seen.append(done)

    first = classifiers.conv_net(bars.train, RECIPE, str(tmp_path), count)
    assert seen == list(range(1, 101))
    read = first.predict(bars.heldout.pixels)
    assert np.mean(read == bars.heldout.labels) > 0.95
    again = classifiers.conv_net(bars.train, RECIPE, str(tmp_path), count)
    assert len(seen) == 100
    pixels = bars.heldout.pixels
    np.testing.assert_array_equal(first.features(pixels), again.features(pixels))
    content = (tmp_path / 'classifier.npz').read_bytes()
    (tmp_path / 'classifier.npz').write_bytes(content[:-200])
    classifiers.conv_net(bars.train, RECIPE, str(tmp_path), count)
    assert len(seen) == 200
    other = idx.IDX('/bars', 'train', *_bars(300, 7), 3, None)
    assert classifiers.fingerprint(other, RECIPE) != classifiers.fingerprint(bars.train, RECIPE)
    assert classifiers.fingerprint(bars.train, RECIPE._replace(steps=5)) != (
        classifiers.fingerprint(bars.train, RECIPE)
    )


def test_idx_images_are_scored_in_features_too(bars):
    """Held-out images score as their floor says, wrong labels and noise do not."""
    judge = small_images.Judge(bars, classifiers.conv_net(bars.train, RECIPE))
    floor = judge.floor(len(bars.heldout))
    assert set(floor) == {'classifier/accuracy', 'real/frechet', 'real/feature_frechet'}
    images = _images(bars.heldout)
    labels = bars.heldout.labels
    scores = judge.scores(images, labels)
    assert set(scores) - set(NAMES) == {
        'samples/feature_frechet',
        'samples/feature_frechet_heldout',
    }
    assert scores['samples/accuracy'] == floor['classifier/accuracy']
    np.testing.assert_allclose(scores['samples/feature_frechet_heldout'], 0, atol=1e-3)
    assert scores['samples/feature_frechet'] <= floor['real/feature_frechet']
    wrong = judge.scores(images, (labels + 1) % 3)
    assert wrong['samples/accuracy'] < 0.05
    noise = np.random.default_rng(0).uniform(-1, 1, images.shape)
    assert judge.scores(noise, labels)['samples/frechet'] > 3 * floor['real/frechet']
    text = small_images.summary('images', 120, floor | scores)
    assert '120 images' in text
    assert "In the classifier's features" in text
    assert 'held-out images have' not in text
    fewer = judge.floor(40) | judge.scores(images[:40], labels[:40])
    assert fewer['real/feature_frechet_as_many'] > scores['samples/feature_frechet']
    text = small_images.summary('images', 40, floor | fewer)
    assert text.endswith(f'40 held-out images have {fewer["real/feature_frechet_as_many"]:.3f}.')


def test_images_of_one_class_are_all_read_as_it():
    """Nothing can be fitted to them, but their distances are scores all the same."""
    data = small.open_data_set('digits', None, 0, 0.2, (3,))
    judge = small_images.Judge(data, small_images.classifier(data, 0))
    images = 2 * data.heldout.pixels[:20, :, :, None].repeat(2, 1).repeat(2, 2) - 1
    scores = judge.scores(images.astype(np.float32), np.zeros(20, int))
    assert scores['samples/accuracy'] == 1
    assert scores['samples/classes_drawn'] == 1
    assert all(np.isfinite(value) for value in scores.values())
