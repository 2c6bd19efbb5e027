import numpy as np
import pytest

from sphere_ar_jax.data import digits
from sphere_ar_jax.evaluation import tokenizer
from sphere_ar_jax.evaluation.digits import digit_pixels, memorisation, score_digits


def test_memorisation_tells_copies_from_new_images():
    rng = np.random.default_rng(0)
    train, heldout, new = rng.normal(size=(3, 2000, 4))
    copied = memorisation(train[:300], train, heldout)
    by_hand = np.linalg.norm(heldout[:, None] - train[None], axis=-1).min(1)
    np.testing.assert_allclose(
        copied['memorisation/heldout_to_train'], np.median(by_hand), rtol=1e-9
    )
    assert copied['memorisation/nearer_than_5pct_of_heldout'] == 1
    assert copied['memorisation/samples_to_train'] < 1e-6
    fresh = memorisation(new, train, heldout)
    assert abs(fresh['memorisation/nearer_than_5pct_of_heldout'] - 0.05) < 5 * np.sqrt(
        2 * 0.05 * 0.95 / 2000
    )
    np.testing.assert_allclose(
        fresh['memorisation/samples_to_train'], fresh['memorisation/heldout_to_train'], rtol=0.1
    )


def test_psnr():
    a = np.zeros((2, 4, 4, 1))
    np.testing.assert_allclose(tokenizer.psnr(a, a + 0.2), 20, rtol=1e-6)


def test_digit_scores_of_real_digits_and_of_nonsense():
    """Real held-out digits score as such through the same door.

    Shuffled labels and noise do not.
    """
    train = digits.Digits('train', 0)
    heldout = digits.Digits('heldout', 0)
    pixels = digit_pixels(heldout.images)
    np.testing.assert_allclose(pixels, heldout.pixels.reshape(-1, 64), atol=1e-6)
    scores = score_digits(pixels, heldout.labels, train, heldout)
    assert scores['samples/accuracy'] == scores['classifier/accuracy'] > 0.97
    assert scores['samples/classes_drawn'] == 10
    assert scores['samples/frechet'] < 0.1 and scores['samples/precision'] > 0.95
    np.testing.assert_allclose(scores['samples/frechet_heldout'], 0, atol=1e-6)
    assert abs(scores['memorisation/nearer_than_5pct_of_heldout'] - 0.05) < 0.01
    noise = np.random.default_rng(0).uniform(size=(500, 64))
    scores = score_digits(noise, np.arange(500) % 10, train, heldout)
    assert scores['samples/accuracy'] < 0.3 and scores['samples/frechet'] > 1
    assert scores['samples/precision'] < 0.01


@pytest.mark.parametrize('low, high', [(-3.0, -1.0), (1.0, 4.0)])
def test_digit_pixels_are_clipped(low, high):
    images = np.random.default_rng(0).uniform(low, high, size=(2, 16, 16, 1))
    pixels = digit_pixels(images)
    assert pixels.shape == (2, 64) and set(np.unique(pixels)) <= {0.0, 1.0}
