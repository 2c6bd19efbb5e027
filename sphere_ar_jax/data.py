"""Data sources and the Grain pipeline (spec §8).

A source is a random-access sequence of {'image': float32 (H, W, c) in [−1, 1], 'label': int32 ()} with the
attributes `image_shape` and `num_classes`.

Dimensions:
  B  images of the global batch, of which each of P processes loads B/P
"""

import grain
import numpy as np

UPSAMPLE = 2  # digits are 8×8 pixels; the models see 16×16


def enlarge(images, factor=UPSAMPLE):
    """(..., h, w, c) → (..., factor·h, factor·w, c), every pixel repeated."""
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def shrink(images, factor=UPSAMPLE):
    """The mean of every factor × factor square, the inverse of `enlarge`."""
    *batch, H, W, c = images.shape
    return images.reshape(*batch, H // factor, factor, W // factor, factor, c).mean((-4, -2))


class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI optdigits test set), 8×8 grey scans, enlarged to 16×16.

    Attributes:
      pixels: (n, 8, 8) float64 in [0, 1]. labels: (n,) int. image_shape: (16, 16, 1). num_classes: 10.
    """

    image_shape = (8 * UPSAMPLE, 8 * UPSAMPLE, 1)
    num_classes = 10

    def __init__(self, split, seed, holdout=0.2):
        """split: 'train', 'heldout' or 'all'; `holdout` is the held-out share, drawn by `seed`."""
        from sklearn.datasets import load_digits  # a second to import: only where digits are wanted

        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))
        cut = round(len(order) * (1 - holdout))
        chosen = {'train': order[:cut], 'heldout': order[cut:], 'all': order}[split]
        self.pixels, self.labels = digits.images[chosen] / 16, digits.target[chosen]
        self.images = (enlarge(self.pixels[..., None]) * 2 - 1).astype(np.float32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': np.int32(self.labels[index])}


class Synthetic:
    """No images: the classes of ImageNet for a model of any image shape, so that it can be built and measured.

    There is nothing to train on. Attributes: image_shape: None, any. num_classes: 1000.
    """

    image_shape = None
    num_classes = 1000


SOURCES = {'digits': Digits, 'synthetic': Synthetic}


def batches(source, *, batch_size, seed, process_index=0, process_count=1, threads=2):
    """An endless iterator over shuffled batches, a function of (seed, epoch, index) alone.

    Each epoch has its own order; process p of P loads rows [p·B/P, (p+1)·B/P) of every global batch, so that the
    global batches do not depend on P. The iterator has `get_state()` and `set_state()`.

    Args:
      source: see the module. batch_size: B, a multiple of P. seed: of the order. threads: that read ahead.
    Returns:
      iterator of {'image': (B/P, H, W, c) float32, 'label': (B/P,) int32}.
    """
    if batch_size % process_count:
        raise ValueError(f'batch size {batch_size} is not a multiple of the {process_count} processes')
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # batches of the local size, every P-th of them: contiguous rows of the global batch
    dataset = dataset.batch(batch_size // process_count, drop_remainder=True)[process_index::process_count]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))
