"""Fréchet distance and Inception Score from features.

Dimensions:
  n  images     f  features of an image
"""

from typing import Any, NamedTuple

import numpy as np

from sphere_ar_jax.runtime.console import UserError


class Statistics(NamedTuple):
    """Mean (f,) and covariance (f, f) of a set's features, float64."""

    mu: Any
    sigma: Any


def statistics(x):
    """`Statistics` of features x (n, f), n ≥ 2: mean and unbiased covariance (n − 1), computed in
    float64.

    The evaluator's mean is float32; this one is not.
    """
    if len(x) < 2:
        raise UserError(f'a covariance needs at least 2 images, but there are {len(x)}')
    return Statistics(
        np.mean(x, axis=0, dtype=np.float64), np.cov(x, rowvar=False, dtype=np.float64)
    )


def _root(sigma):
    """A with A·Aᵀ = Σ, from the eigenvalues of the symmetric Σ ≥ 0; what rounding made negative
    counts as 0.
    """
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(0))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of two normal distributions: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½).

    With Σᵢ = AᵢAᵢᵀ the trace of the root is the sum of the singular values of A₁ᵀA₂: real and not
    negative also for singular covariances (fewer images than features, or features that never
    change), where the evaluator's scipy.linalg.sqrtm of the product may fail and then adds 1e-6 to
    both diagonals.

    Args:
      mu1, mu2: (f,). sigma1, sigma2: (f, f), symmetric, positive semidefinite.
    Returns:
      float ≥ 0 up to rounding, float64 throughout. Source: Heusel et al. 2017, eq. 6. Raises
        UserError for shapes
      that do not belong together and for numbers that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not (
        mu1.ndim == 1 and mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == 2 * mu1.shape
    ):
        shapes = ', '.join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise UserError(
            f'means and covariances of two sets must be (f,), (f, f), (f,), (f, f), but are {shapes}'
        )
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError('a mean or a covariance is not finite')
    overlap = np.linalg.svd(_root(sigma1).T @ _root(sigma2), compute_uv=False).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


def inception_score(logits, split_size=5000):
    """exp(mean over images of KL(p(y|x) ‖ p(y))), p the softmax of logits, averaged over splits of
    consecutive images.

    Args:
      logits: (n, classes), of `inception.Features`. split_size: images of a split, over which p(y)
        is the mean; the last split may be shorter and counts as much as the others.
    Returns:
      float ≥ 1, float64 throughout. Source: Salimans et al. 2016, with the splits of the evaluator.
    """
    scores = []
    for start in range(0, len(logits), split_size):
        log_p = np.asarray(logits[start : start + split_size], np.float64)
        log_p = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
        log_mean = np.logaddexp.reduce(log_p, axis=0, keepdims=True) - np.log(len(log_p))
        scores.append(np.exp(np.sum(np.exp(log_p) * (log_p - log_mean), axis=1).mean()))
    if not scores:
        raise UserError('an Inception Score needs at least one image')
    return float(np.mean(scores))
