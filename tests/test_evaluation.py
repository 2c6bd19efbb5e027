import numpy as np
import pytest
import scipy.linalg

from sphere_ar_jax import data, evaluation


def test_frechet_of_known_normals():
    """Diagonal covariances have a closed form: |Δμ|² + Σ(σ_a − σ_b)²."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5000, 6))
    a = (a - a.mean(0)) / a.std(0, ddof=1)
    a = a @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T  # covariance exactly 1
    scale, shift = np.array([1, 2, 0.5, 1, 3, 0]), np.array([0, 1, 0, -2, 0, 0.5])
    expected = np.sum(shift**2) + np.sum((1 - scale) ** 2)
    np.testing.assert_allclose(evaluation.frechet_distance(a, a * scale + shift), expected, rtol=1e-6)
    np.testing.assert_allclose(evaluation.frechet_distance(a, a), 0, atol=1e-9)


def test_frechet_against_scipy_and_symmetric():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(400, 10)) @ rng.normal(size=(10, 10)), rng.normal(size=(300, 10)) + 0.3
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    np.testing.assert_allclose(evaluation.frechet_distance(a, b), expected, rtol=1e-7)
    np.testing.assert_allclose(evaluation.frechet_distance(b, a), expected, rtol=1e-7)


def test_frechet_with_singular_covariances():
    """Fewer images than pixels, and pixels that never change."""
    rng = np.random.default_rng(2)
    a = np.concatenate([rng.normal(size=(20, 40)), np.zeros((20, 3))], axis=1)
    assert np.isfinite(evaluation.frechet_distance(a, a[::-1] + 1))
    np.testing.assert_allclose(evaluation.frechet_distance(a, a + 1), 43, rtol=1e-6)


def test_distances_against_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(size=(9, 5))
    np.testing.assert_allclose(evaluation.distances(a, b), np.linalg.norm(a[:, None] - b[None], axis=-1), atol=1e-7)


def test_precision_recall_against_brute_force():
    rng = np.random.default_rng(0)
    real, fake, k = rng.normal(size=(60, 2)), rng.normal(size=(50, 2)) * 0.7 + 0.5, 3

    def on_manifold(x, of):
        hits = 0
        for point in x:
            for i, center in enumerate(of):
                others = sorted(np.linalg.norm(np.delete(of, i, 0) - center, axis=1))
                if np.linalg.norm(point - center) <= others[k - 1]:
                    hits += 1
                    break
        return hits / len(x)

    precision, recall = evaluation.precision_recall(real, fake, k)
    assert precision == on_manifold(fake, real) and recall == on_manifold(real, fake)
    assert 0 < recall < precision  # the narrower set is inside the wider one


def test_precision_recall_extremes():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(50, 2))
    assert evaluation.precision_recall(real, real) == (1, 1)
    assert evaluation.precision_recall(real, real + 100) == (0, 0)


def test_memorisation_tells_copies_from_new_images():
    rng = np.random.default_rng(0)
    train, heldout, new = rng.normal(size=(3, 2000, 4))
    copied = evaluation.memorisation(train[:300], train, heldout)
    assert copied['memorisation/nearer_than_5pct_of_heldout'] == 1
    assert copied['memorisation/samples_to_train'] < 1e-6
    fresh = evaluation.memorisation(new, train, heldout)
    assert abs(fresh['memorisation/nearer_than_5pct_of_heldout'] - 0.05) < 5 * np.sqrt(2 * 0.05 * 0.95 / 2000)
    np.testing.assert_allclose(fresh['memorisation/samples_to_train'], fresh['memorisation/heldout_to_train'], rtol=0.1)


def test_psnr():
    a = np.zeros((2, 4, 4, 1))
    np.testing.assert_allclose(evaluation.psnr(a, a + 0.2), 20, rtol=1e-6)


def test_digit_scores_of_real_digits_and_of_nonsense():
    """Real held-out digits score as such through the same door; shuffled labels and noise do not."""
    train, heldout = data.Digits('train', 0), data.Digits('heldout', 0)
    pixels = evaluation.digit_pixels(heldout.images)
    np.testing.assert_allclose(pixels, heldout.pixels.reshape(-1, 64), atol=1e-6)
    scores = evaluation.score_digits(pixels, heldout.labels, train, heldout)
    assert scores['samples/accuracy'] == scores['classifier/accuracy'] > 0.97
    assert scores['samples/classes_drawn'] == 10
    assert scores['samples/frechet'] < 0.1 and scores['samples/precision'] > 0.95
    np.testing.assert_allclose(scores['samples/frechet_heldout'], 0, atol=1e-6)
    assert abs(scores['memorisation/nearer_than_5pct_of_heldout'] - 0.05) < 0.01
    noise = np.random.default_rng(0).uniform(size=(500, 64))
    scores = evaluation.score_digits(noise, np.arange(500) % 10, train, heldout)
    assert scores['samples/accuracy'] < 0.3 and scores['samples/frechet'] > 1
    assert scores['samples/precision'] < 0.01


@pytest.mark.parametrize('low, high', [(-3.0, -1.0), (1.0, 4.0)])
def test_digit_pixels_are_clipped(low, high):
    images = np.random.default_rng(0).uniform(low, high, size=(2, 16, 16, 1))
    pixels = evaluation.digit_pixels(images)
    assert pixels.shape == (2, 64) and set(np.unique(pixels)) <= {0.0, 1.0}
