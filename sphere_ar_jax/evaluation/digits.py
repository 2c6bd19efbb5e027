"""The digits' own protocol of scores.

Dimensions:
  n  images of a set     f  features of an image (64 pixels for digits at 8×8)
"""

import numpy as np

from sphere_ar_jax.data import digits
from sphere_ar_jax.evaluation.fidelity import precision_recall, statistics


def memorisation(samples, train, heldout):
    """How near samples lie to training images, beside how near held-out real images do.

    Args:
      samples, train, heldout: (·, f).
    Returns:
      dict: median nearest-training distance of samples and of held-out images, and the share of
        samples nearer to a
      training image than the nearest 5% of held-out images are (0.05 where samples are as new as
        real images).
    """
    from sklearn.metrics import (
        pairwise_distances_argmin_min,
    )  # slow to import: only where digits are scored

    of_samples, of_heldout = (
        pairwise_distances_argmin_min(images, train)[1] for images in (samples, heldout)
    )
    return {
        'memorisation/samples_to_train': float(np.median(of_samples)),
        'memorisation/heldout_to_train': float(np.median(of_heldout)),
        'memorisation/nearer_than_5pct_of_heldout': float(
            np.mean(of_samples < np.quantile(of_heldout, 0.05))
        ),
    }


def digit_pixels(images):
    """Model images (n, 16, 16, 1) in [−1, 1] → (n, 64) pixels of the 8×8 scans in [0, 1]."""
    return digits.shrink(np.clip((np.asarray(images) + 1) / 2, 0, 1)).reshape(len(images), 64)


def score_digits(samples, labels, train, heldout):
    """The digits' protocol on 8×8 pixels in [0, 1].

    Args:
      samples: (n, 64) drawn for `labels` (n,). train, heldout: `digits.Digits`, the second never
        trained on.
    Returns:
      dict of floats: accuracy with which an SVC trained on `train` reads the labels back (and its
        own on `heldout`),
      Fréchet distances, precision, recall, memorisation.
    """
    from sklearn.svm import SVC

    flat = lambda source: source.pixels.reshape(len(source), 64)
    real = np.concatenate([flat(train), flat(heldout)])
    classifier = SVC(gamma=0.256, C=10).fit(flat(train), train.labels)
    read = classifier.predict(samples)
    precision, recall = precision_recall.precision_recall(real, samples, dtype=np.float64)
    frechet = lambda a, b: statistics.frechet_distance(
        *statistics.statistics(a), *statistics.statistics(b)
    )
    return {
        'classifier/accuracy': float(classifier.score(flat(heldout), heldout.labels)),
        'samples/accuracy': float(np.mean(read == labels)),
        'samples/classes_drawn': len(np.unique(read)),
        'samples/frechet': frechet(samples, real),
        'samples/frechet_heldout': frechet(samples, flat(heldout)),
        'real/frechet': frechet(flat(train), flat(heldout)),
        'samples/precision': precision,
        'samples/recall': recall,
        **memorisation(samples, flat(train), flat(heldout)),
    }
