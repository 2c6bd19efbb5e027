"""The protocol of scores for small labelled data sets: the digits, and images in IDX files.

The scores are listed in `docs/evaluation.md`, "Small data sets: the digits and IDX files".

  data = small.open_data_set('idx', '/data/fashion', seed=0, holdout=0.2)
  judge = small_images.Judge(data, small_images.classifier(data, steps=1600))
  judge.floor(len(images)); judge.scores(images, labels)

Dimensions:
  n  images of a set     f  features of an image     h, w  pixels of an image in its file
"""

import functools

import numpy as np

from sphere_ar_jax.data import sources
from sphere_ar_jax.data.small import DataSet
from sphere_ar_jax.evaluation import classifiers
from sphere_ar_jax.evaluation.fidelity import precision_recall, statistics
from sphere_ar_jax.runtime.types import Progress

# Real images that precision and recall take at most, because their time grows as the square.
_MOST = 10_000
# Names of the Fréchet distances of pixels, and of a classifier's features.
_SPACES = ('frechet', 'feature_frechet')


def nearest(images: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the training image that is nearest to each image.

    Args:
      images: features (n, f).
      train: features (·, f) of the training images.

    Returns:
      (numbers of training images (n,), distances (n,)).
    """
    # scikit-learn is slow to import, so that it is imported only where images are scored.
    from sklearn.metrics import pairwise_distances_argmin_min

    return pairwise_distances_argmin_min(images, train)


def compare(of_samples: np.ndarray, of_heldout: np.ndarray) -> dict[str, float]:
    """Compares how near samples and held-out images lie to training images.

    Args:
      of_samples: the distance of each sample to the nearest training image, see `nearest`.
      of_heldout: that of each real image that was not trained on.

    Returns:
      The medians of both, and the share of samples that are nearer to a training image than the
      nearest 5% of held-out images are. That share is 0.05 where samples are as new as real images.
    """
    near = np.mean(of_samples < np.quantile(of_heldout, 0.05))
    return {
        'memorisation/samples_to_train': float(np.median(of_samples)),
        'memorisation/heldout_to_train': float(np.median(of_heldout)),
        'memorisation/nearer_than_5pct_of_heldout': float(near),
    }


def _flat(pixels: np.ndarray) -> np.ndarray:
    """Images (n, h, w) → (n, h·w)."""
    return pixels.reshape(len(pixels), -1)


def classifier(
    data: DataSet,
    steps: int,
    keep_in: str | None = None,
    progress: Progress = lambda done, total: None,
) -> classifiers.Classifier:
    """Trains the classifier of a data set on its real training images.

    Args:
      data: the data set. The digits have an SVC, all others a convolutional network.
      steps: the training steps of the network.
      keep_in: the directory that keeps the network's weights for the next time, or None.
      progress: called with the network's steps done and their number.
    """
    if data.kind == 'digits':
        return classifiers.SupportVectors(data.train)
    return classifiers.conv_net(data.train, classifiers.Recipe(steps), keep_in, progress)


class _Space:
    """A space in which the real images are compared with samples.

    Attributes:
      train: the training images (·, f).
      heldout: the held-out images (·, f).
      real: both.
    """

    def __init__(self, train: np.ndarray, heldout: np.ndarray):
        """Computes the moments of the three sets once."""
        self.train = train
        self.heldout = heldout
        self.real = np.concatenate([train, heldout])
        self._of_train = statistics.statistics(train)
        self._of_heldout = statistics.statistics(heldout)
        self._of_real = statistics.statistics(self.real)

    def distances(self, name: str, samples: np.ndarray) -> dict[str, float]:
        """Fréchet distances of samples (n, f) to all real and to the held-out images."""
        moments = statistics.statistics(samples)
        return {
            f'samples/{name}': statistics.frechet_distance(*moments, *self._of_real),
            f'samples/{name}_heldout': statistics.frechet_distance(*moments, *self._of_heldout),
        }

    @functools.cached_property
    def floor(self) -> float:
        """The Fréchet distance between the training and the held-out images."""
        return statistics.frechet_distance(*self._of_train, *self._of_heldout)

    def floor_of(self, count: int) -> float:
        """The Fréchet distance of so many held-out images to all real ones.

        It is the floor of as many samples, since a distance grows as there are fewer images. The
        chosen images are among the real ones, which makes it a little too small.

        Args:
          count: at most as many as are held out. They are chosen at random, always the same.
        """
        chosen = np.random.default_rng(0).permutation(len(self.heldout))[:count]
        moments = statistics.statistics(self.heldout[chosen])
        return statistics.frechet_distance(*moments, *self._of_real)


class Judge:
    """Scores any number of sets of samples of one data set by one classifier.

    Fréchet distances are taken in pixels and, where the classifier has features of its own, in
    those. Precision and recall are taken in the classifier's features, memorisation in pixels.
    """

    def __init__(self, data: DataSet, classifier: classifiers.Classifier):
        """Measures the real images.

        Args:
          data: the data set.
          classifier: its classifier, see `classifier`.
        """
        self._data = data
        self._classifier = classifier
        train = data.train.pixels
        heldout = data.heldout.pixels
        self._pixels = _Space(_flat(train), _flat(heldout))
        self._features = self._pixels
        if classifier.has_features:
            self._features = _Space(classifier.features(train), classifier.features(heldout))
        real = self._features.real
        # Those of sorted files would be of the first classes alone, were they not spread.
        self._compared = real[sources.spread(len(real), _MOST)]
        read = classifier.predict(heldout)
        self._accuracy = float(np.mean(read == data.heldout.labels))

    @functools.cached_property
    def _of_heldout(self) -> np.ndarray:
        """The distance of each held-out image to the nearest training image."""
        _, distances = nearest(self._pixels.heldout, self._pixels.train)
        return distances

    def floor(self, count: int) -> dict[str, float]:
        """What real images score: held-out against training images.

        Args:
          count: the number of the samples that are compared with it.

        Returns:
          The classifier's accuracy on held-out images, and the Fréchet distances between the
          training and the held-out images. Where there are fewer samples than held-out images,
          distances of as many held-out images stand beside.
        """
        found = {'classifier/accuracy': self._accuracy}
        for name, space in self._spaces():
            found[f'real/{name}'] = space.floor
            if count < len(space.heldout):
                found[f'real/{name}_as_many'] = space.floor_of(count)
        return found

    def _spaces(self) -> list[tuple[str, _Space]]:
        """The names of the Fréchet distances and the spaces in which they are taken."""
        if self._classifier.has_features:
            return list(zip(_SPACES, (self._pixels, self._features), strict=True))
        return [(_SPACES[0], self._pixels)]

    def scores(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Scores samples.

        Args:
          images: (n, H, W, c) in [−1, 1] as the model draws them, for `labels`.
          labels: (n,).

        Returns:
          The share of samples that the classifier reads as their labels, the number of classes that
          it sees, Fréchet distances, precision, recall, and what `compare` returns.
        """
        pixels = self._data.train.to_pixels(images)
        flat = _flat(pixels)
        features = self._classifier.features(pixels)
        read = self._classifier.predict(pixels)
        found: dict[str, float] = {
            'samples/accuracy': float(np.mean(read == labels)),
            'samples/classes_drawn': len(np.unique(read)),
            **self._pixels.distances(_SPACES[0], flat),
        }
        if self._classifier.has_features:
            found |= self._features.distances(_SPACES[1], features)
        # float64 for the few digits; a block of more images would take too much memory.
        precision, recall = precision_recall.precision_recall(
            self._compared, features, dtype=self._compared.dtype, block=5000
        )
        found['samples/precision'] = precision
        found['samples/recall'] = recall
        _, distances = nearest(flat, self._pixels.train)
        return found | compare(distances, self._of_heldout)


def summary(noun: str, count: int, scores: dict[str, float]) -> str:
    """The scores of samples, in a few sentences.

    Args:
      noun: what the images are, in the plural.
      count: the number of samples.
      scores: what `Judge.floor` and `Judge.scores` give.
    """
    text = (
        f'{count} {noun}, drawn class by class, none selected. '
        f'An independent classifier reads {scores["samples/accuracy"]:.1%} of them as the class '
        f'asked for (and {scores["classifier/accuracy"]:.1%} of real held-out {noun} correctly). '
        f'Fréchet distance to real {noun}: {scores["samples/frechet"]:.3f}; between the training '
        f'and the held-out real {noun} it is {scores["real/frechet"]:.3f}.'
    )
    if 'samples/feature_frechet' in scores:
        text += (
            f" In the classifier's features they are {scores['samples/feature_frechet']:.3f} and "
            f'{scores["real/feature_frechet"]:.3f}.'
        )
    if 'real/feature_frechet_as_many' in scores:
        text += (
            f' There, {count} held-out {noun} have {scores["real/feature_frechet_as_many"]:.3f}.'
        )
    return text
