"""scikit-learn's handwritten digits."""

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
    """scikit-learn's 1,797 handwritten digits (UCI optdigits test set), 8×8 grey scans, enlarged to
    16×16.

    Attributes:
      pixels: (n, 8, 8) float64 in [0, 1]. labels: (n,) int. image_shape: (16, 16, 1). num_classes:
        10.
    """

    image_shape = (8 * UPSAMPLE, 8 * UPSAMPLE, 1)
    num_classes = 10
    class_names = tuple('0123456789')

    def __init__(self, split, seed, holdout=0.2):
        """split: 'train' or 'heldout'; `holdout` is the held-out share, drawn by `seed`."""
        from sklearn.datasets import load_digits  # a second to import: only where digits are wanted

        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))
        cut = round(len(order) * (1 - holdout))
        chosen = {'train': order[:cut], 'heldout': order[cut:]}[split]
        self.pixels, self.labels = digits.images[chosen] / 16, digits.target[chosen]
        self.images = (enlarge(self.pixels[..., None]) * 2 - 1).astype(np.float32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': np.int32(self.labels[index])}


def splits(seed: int, holdout: float) -> tuple[Digits, Digits]:
    """The digits to train on and those held out; see `Digits`."""
    return Digits('train', seed, holdout), Digits('heldout', seed, holdout)
