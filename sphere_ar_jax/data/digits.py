"""scikit-learn's handwritten digits."""

import numpy as np

UPSAMPLE = 2  # digits are 8×8 pixels; the models see 16×16


def enlarge(images: np.ndarray, factor: int = UPSAMPLE) -> np.ndarray:
    """Repeats every pixel `factor` times along both axes.

    Args:
      images: (..., h, w, c).
      factor: how often each pixel is repeated.

    Returns:
      (..., factor·h, factor·w, c).
    """
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def shrink(images: np.ndarray, factor: int = UPSAMPLE) -> np.ndarray:
    """Takes the mean of every factor × factor square, the inverse of `enlarge`.

    Args:
      images: (..., H, W, c), where `factor` divides H and W.
      factor: side of the squares.

    Returns:
      (..., H/factor, W/factor, c).
    """
    *batch, H, W, c = images.shape
    squares = images.reshape(*batch, H // factor, factor, W // factor, factor, c)
    return squares.mean((-4, -2))


class Digits:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8×8 to 16×16 pixels.

    They are the grey scans of the test set of UCI's optdigits.

    Attributes:
      pixels: (n, 8, 8) float64 in [0, 1].
      labels: (n,) int.
      images: (n, 16, 16, 1) float32 in [−1, 1], the enlarged pixels.
      image_shape: (16, 16, 1).
      num_classes: 10.
      class_names: the ten digits as text.
    """

    image_shape = (8 * UPSAMPLE, 8 * UPSAMPLE, 1)
    num_classes = 10
    class_names = tuple('0123456789')

    def __init__(self, split: str, seed: int, holdout: float = 0.2):
        """Loads one of the two parts that the digits are split into.

        Args:
          split: 'train' or 'heldout'.
          seed: decides which digits are held out.
          holdout: the share of the digits that is held out.
        """
        # Imported here, because it takes a second.
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))
        cut = round(len(order) * (1 - holdout))
        chosen = {'train': order[:cut], 'heldout': order[cut:]}[split]
        self.pixels: np.ndarray = digits.images[chosen] / 16
        self.labels: np.ndarray = digits.target[chosen]
        self.images = (enlarge(self.pixels[..., None]) * 2 - 1).astype(np.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        return {'image': self.images[index], 'label': np.int32(self.labels[index])}

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Model images (n, 16, 16, 1) in [−1, 1] → (n, 8, 8) pixels of the scans in [0, 1]."""
        scaled = np.clip((np.asarray(images) + 1) / 2, 0, 1)
        return shrink(scaled)[..., 0]


def splits(seed: int, holdout: float) -> tuple[Digits, Digits]:
    """Loads (the digits to train on, those held out); see `Digits`."""
    return Digits('train', seed, holdout), Digits('heldout', seed, holdout)
