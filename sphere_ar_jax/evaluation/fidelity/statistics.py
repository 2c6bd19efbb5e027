"""Fréchet distance and Inception Score from features.

`docs/evaluation.md`, "How exact they are", says how these differ from OpenAI's evaluator.

Dimensions:
  n  images     f  features of an image
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from sphere_ar_jax.runtime.console import UserError

ENOUGH_IMAGES = 10_000  # With fewer, the bias of FID outweighs the differences of good models.


class Statistics(NamedTuple):
    """Moments of a set's features.

    Attributes:
      mu: mean (f,), float64.
      sigma: covariance (f, f), float64.
    """

    mu: np.ndarray
    sigma: np.ndarray


def statistics(x: np.ndarray) -> Statistics:
    """Mean and unbiased covariance (with n − 1) of features.

    Both are computed in float64, while the evaluator's mean is float32.

    Args:
      x: (n, f), n at least 2.

    Raises:
      UserError: there are fewer than two images.
    """
    if len(x) < 2:
        raise UserError(f'a covariance needs at least 2 images, but there are {len(x)}')
    mu = np.asarray(np.mean(x, axis=0, dtype=np.float64))
    return Statistics(mu, np.cov(x, rowvar=False, dtype=np.float64))


def merged(first: Statistics, n: int, second: Statistics, m: int) -> Statistics:
    """The statistics of two sets together, which need not be in memory at once.

    Σ = [(n − 1)Σ₁ + (m − 1)Σ₂ + nm/(n + m) · δδᵀ]/(n + m − 1) with δ = μ₂ − μ₁.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".

    Args:
      first: statistics of n images.
      n: at least 1; the covariance of a single image is 0.
      second: statistics of m images.
      m: likewise.
    """
    delta = second.mu - first.mu
    spread = (n - 1) * first.sigma + (m - 1) * second.sigma
    between = n * m / (n + m) * np.outer(delta, delta)
    return Statistics(first.mu + delta * m / (n + m), (spread + between) / (n + m - 1))


def _root(sigma: np.ndarray) -> np.ndarray:
    """A matrix A (f, r) with A·Aᵀ = Σ, from the eigenvalues of a symmetric Σ ≥ 0 of rank r.

    Eigenvalues that are nothing but rounding are left out.
    """
    values, vectors = np.linalg.eigh(sigma)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def _check(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> None:
    """Raises UserError unless these are finite means and covariances of two sets."""
    moments = (mu1, sigma1, mu2, sigma2)
    square = 2 * mu1.shape
    alike = mu1.shape == mu2.shape and sigma1.shape == sigma2.shape
    if not (mu1.ndim == 1 and alike and sigma1.shape == square):
        shapes = ', '.join(str(a.shape) for a in moments)
        raise UserError(
            'means and covariances of two sets must be (f,), (f, f), (f,), (f, f), '
            f'but are {shapes}'
        )
    if not all(np.isfinite(a).all() for a in moments):
        raise UserError('a mean or a covariance is not finite')


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Fréchet distance of two normal distributions: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½).

    With Σᵢ = AᵢAᵢᵀ the trace of the root is the sum of the singular values of A₁ᵀA₂. It is real and
    not negative also for singular covariances, which sets with fewer images than features have, or
    features that never change. The evaluator's scipy.linalg.sqrtm of the product may fail there,
    and it then adds 1e-6 to both diagonals.

    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    Args:
      mu1: mean (f,) of the first distribution.
      sigma1: its covariance (f, f), symmetric and positive semidefinite.
      mu2: mean (f,) of the second distribution.
      sigma2: its covariance (f, f).

    Returns:
      The distance, at least 0 up to rounding, computed in float64.

    Raises:
      UserError: the shapes do not belong together, or a number is not finite.
    """
    mu1 = np.asarray(mu1, np.float64)
    sigma1 = np.asarray(sigma1, np.float64)
    mu2 = np.asarray(mu2, np.float64)
    sigma2 = np.asarray(sigma2, np.float64)
    _check(mu1, sigma1, mu2, sigma2)
    overlap = np.linalg.svd(_root(sigma1).T @ _root(sigma2), compute_uv=False).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


def note(*counts: int | None) -> str | None:
    """What must be said of a Fréchet distance of so few images.

    Args:
      *counts: numbers of images of the sets; None for one whose number is not known.

    Returns:
      A line, or None where all sets are large enough.
    """
    known = [count for count in counts if count is not None]
    if not known or min(known) >= ENOUGH_IMAGES:
        return None
    return (
        f'FID of {min(known)} images is biased upwards and cannot be compared with published '
        'numbers, which take 50,000 samples'
    )


def inception_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """Inception Score: exp(mean over images of KL(p(y|x) ‖ p(y))), p being the softmax of logits.

    The score is averaged over splits of consecutive images, as in the evaluator. Source: Salimans
    et al. 2016 (arXiv 1606.03498).

    Args:
      logits: (n, classes), see `inception.Features`.
      split_size: images of a split, over which p(y) is the mean. The last split may be shorter and
        counts as much as the others.

    Returns:
      The score, at least 1, computed in float64.

    Raises:
      UserError: there are no images.
    """
    scores = []
    for start in range(0, len(logits), split_size):
        log_p = np.asarray(logits[start : start + split_size], np.float64)
        log_p = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
        log_mean = np.logaddexp.reduce(log_p, axis=0, keepdims=True) - np.log(len(log_p))
        divergence = np.sum(np.exp(log_p) * (log_p - log_mean), axis=1)
        scores.append(np.exp(divergence.mean()))
    if not scores:
        raise UserError('an Inception Score needs at least one image')
    return float(np.mean(scores))
