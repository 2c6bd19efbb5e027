"""The digits' own protocol of scores.

The scores are listed in `docs/evaluation.md`, "The digits".

Dimensions:
  n  images of a set     f  features of an image (64 pixels for digits at 8×8)
"""

import numpy as np

from sphere_ar_jax.data import digits
from sphere_ar_jax.evaluation.fidelity import precision_recall, statistics


def memorisation(samples: np.ndarray, train: np.ndarray, heldout: np.ndarray) -> dict[str, float]:
    """Compares how near samples and held-out images lie to training images.

    Args:
      samples: features (n, f) of samples.
      train: features (·, f) of the training images.
      heldout: features (·, f) of real images that were not trained on.

    Returns:
      The median distance to the nearest training image, of samples and of held-out images, and the
      share of samples that are nearer to a training image than the nearest 5% of held-out images
      are. That share is 0.05 where samples are as new as real images.
    """
    # scikit-learn is slow to import, so that it is imported only where digits are scored.
    from sklearn.metrics import pairwise_distances_argmin_min

    _, of_samples = pairwise_distances_argmin_min(samples, train)
    _, of_heldout = pairwise_distances_argmin_min(heldout, train)
    near = np.mean(of_samples < np.quantile(of_heldout, 0.05))
    return {
        'memorisation/samples_to_train': float(np.median(of_samples)),
        'memorisation/heldout_to_train': float(np.median(of_heldout)),
        'memorisation/nearer_than_5pct_of_heldout': float(near),
    }


def digit_pixels(images: np.ndarray) -> np.ndarray:
    """Model images (n, 16, 16, 1) in [−1, 1] → (n, 64) pixels of the 8×8 scans in [0, 1]."""
    scaled = np.clip((np.asarray(images) + 1) / 2, 0, 1)
    return digits.shrink(scaled).reshape(len(images), 64)


def _flat(source: digits.Digits) -> np.ndarray:
    """The pixels (n, 64) of a source's digits."""
    return source.pixels.reshape(len(source), 64)


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance between two sets of features (·, f)."""
    return statistics.frechet_distance(*statistics.statistics(a), *statistics.statistics(b))


def score_digits(
    samples: np.ndarray, labels: np.ndarray, train: digits.Digits, heldout: digits.Digits
) -> dict[str, float]:
    """Scores samples by the digits' protocol, on 8×8 pixels in [0, 1].

    Args:
      samples: (n, 64), drawn for `labels`.
      labels: (n,).
      train: the digits that were trained on. An SVC learns to read from them.
      heldout: digits that were never trained on.

    Returns:
      The accuracy with which the SVC reads the labels back and its accuracy on `heldout`, Fréchet
      distances, precision, recall, and what `memorisation` returns.
    """
    from sklearn.svm import SVC

    train_pixels = _flat(train)
    heldout_pixels = _flat(heldout)
    real = np.concatenate([train_pixels, heldout_pixels])
    classifier = SVC(gamma=0.256, C=10).fit(train_pixels, train.labels)
    read = classifier.predict(samples)
    precision, recall = precision_recall.precision_recall(real, samples, dtype=np.float64)
    return {
        'classifier/accuracy': float(classifier.score(heldout_pixels, heldout.labels)),
        'samples/accuracy': float(np.mean(read == labels)),
        'samples/classes_drawn': len(np.unique(read)),
        'samples/frechet': _frechet(samples, real),
        'samples/frechet_heldout': _frechet(samples, heldout_pixels),
        'real/frechet': _frechet(train_pixels, heldout_pixels),
        'samples/precision': precision,
        'samples/recall': recall,
        **memorisation(samples, train_pixels, heldout_pixels),
    }
