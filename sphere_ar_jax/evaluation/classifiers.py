"""Classifiers that judge samples.

  SupportVectors   scikit-learn's SVC on pixels, for the digits
  ConvNet          a small convolutional network, for images of up to 64×64 pixels or so

Dimensions:
  n  images     h, w  pixels of an image as its file has it     f  features     k  classes
Where images have colours, they are (n, h, w, c) in place of (n, h, w).
"""

import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from sphere_ar_jax.data.small import Split
from sphere_ar_jax.interop import npz
from sphere_ar_jax.models.convolutions import Conv
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import Progress, PyTree

_BATCH = 1000  # images that are classified at a time


class Labelled(Protocol):
    """Images to learn from.

    Attributes:
      labels: (n,) int, 0 … num_classes − 1.
      num_classes: the number of classes.
    """

    labels: np.ndarray
    num_classes: int

    @property
    def pixels(self) -> np.ndarray:
        """The images (n, h, w) or (n, h, w, c) in [0, 1]."""

    def __len__(self) -> int: ...


class Classifier(Protocol):
    """What judges images.

    Attributes:
      has_features: whether its features are other than the pixels.
    """

    has_features: bool

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, h, w) in [0, 1] → features (n, f)."""

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, h, w) in [0, 1] → labels (n,)."""


class SupportVectors:
    """scikit-learn's SVC with a Gaussian kernel on pixels, tuned for the digits."""

    has_features = False

    def __init__(self, train: Split):
        """Fits the classifier to images that were trained on."""
        # scikit-learn is slow to import.
        from sklearn.svm import SVC

        # Nothing is fitted to images of a single class, which are all read as that one.
        self._only: int | None = None
        if len(np.unique(train.labels)) == 1:
            self._only = int(train.labels[0])
            return
        self._svc = SVC(gamma=0.256, C=10).fit(self.features(train.pixels), train.labels)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, h, w) → the same pixels (n, h·w)."""
        return pixels.reshape(len(pixels), -1)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, h, w) → labels (n,)."""
        if self._only is not None:
            return np.full(len(pixels), self._only)
        return self._svc.predict(self.features(pixels))


class Recipe(NamedTuple):
    """How a `ConvNet` is trained: AdamW with warm-up and cosine, labels smoothed.

    Attributes:
      steps: training steps.
      batch_size: images of a step.
      learning_rate: its largest value, after a fifth of the steps.
      weight_decay: the decay of AdamW.
      smoothing: the share of the probability that is spread over all classes.
      channels: channels of the three layers.
      width: features, f.
      seed: draws the first weights and the order of the images.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    channels: tuple[int, int, int] = (24, 32, 64)
    width: int = 64
    seed: int = 0


class _Network(nn.Module):
    """A small convolutional network.

    It has patches of 4×4 pixels at a stride of 2, two convolutions of 3×3 with a maximum over 2×2
    between them, then two dense layers.
    """

    channels: tuple[int, int, int]
    width: int
    classes: int

    def _bias(self, name: str, channels: int) -> jax.Array:
        """A bias (1, 1, 1, channels), 0 at first."""
        return self.param(name, nn.initializers.zeros, (1, 1, 1, channels))

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (n, h, w) or (n, h, w, c) in [0, 1] → (features (n, f), logits (n, k))."""
        if x.ndim == 3:
            x = x[..., None]
        n, h, w, _ = x.shape
        # A margin for the patches, and at the end what makes both sides multiples of 4.
        h += -h % 4
        w += -w % 4
        x = jnp.pad(x, ((0, 0), (1, h + 2 - x.shape[1]), (1, w + 2 - x.shape[2]), (0, 0)))
        taps = [x[:, i : i + h : 2, j : j + w : 2] for i in range(4) for j in range(4)]
        x = nn.relu(nn.Dense(self.channels[0])(jnp.concatenate(taps, axis=-1)))
        x = Conv(self.channels[1])(x)
        x = nn.relu(x + self._bias('bias_1', self.channels[1]))
        # XLA's own maximum over windows has a slow gradient on CPUs.
        x = x.reshape(n, h // 4, 2, w // 4, 2, self.channels[1]).max((2, 4))
        x = Conv(self.channels[2])(x)
        x = nn.relu(x + self._bias('bias_2', self.channels[2]))
        features = nn.relu(nn.Dense(self.width)(x.reshape(n, -1)))
        return features, nn.Dense(self.classes)(features)


class ConvNet:
    """A trained convolutional network."""

    has_features = True

    def __init__(self, network: _Network, params: PyTree):
        """Makes a classifier of a network and its parameters."""

        def apply(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
            features, logits = network.apply({'params': params}, pixels)
            return features, logits.argmax(-1)

        self._apply = jax.jit(apply)

    def _read(self, pixels: np.ndarray, output: int) -> np.ndarray:
        """One of the network's outputs for images (n, h, w), batch by batch of one size."""
        parts = []
        for start in range(0, len(pixels), _BATCH):
            part = np.asarray(pixels[start : start + _BATCH], np.float32)
            missing = _BATCH - len(part)
            filled = np.pad(part, ((0, missing), *((0, 0),) * (part.ndim - 1)))
            parts.append(np.asarray(self._apply(filled)[output])[: len(part)])
        return np.concatenate(parts)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, h, w) → the last hidden layer (n, f), float32."""
        return self._read(pixels, 0)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, h, w) → labels (n,)."""
        return self._read(pixels, 1)


def _batches(count: int, recipe: Recipe) -> Iterator[np.ndarray]:
    """Yields the indices of each step's images: shuffled epochs, joined."""
    rng = np.random.default_rng(recipe.seed)
    order = np.empty(0, np.int64)
    for _ in range(recipe.steps):
        while len(order) < recipe.batch_size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[: recipe.batch_size]
        order = order[recipe.batch_size :]


def _trained(
    network: _Network, params: PyTree, train: Labelled, recipe: Recipe, done: Any
) -> PyTree:
    """Trains a network from its first parameters; done(step, steps) is called after every step."""
    warmup = recipe.steps // 5
    rate = optax.warmup_cosine_decay_schedule(
        0, recipe.learning_rate, warmup, recipe.steps, recipe.learning_rate / 300
    )
    optimizer = optax.adamw(rate, weight_decay=recipe.weight_decay)

    def loss(params: PyTree, pixels: jax.Array, labels: jax.Array) -> jax.Array:
        _, logits = network.apply({'params': params}, pixels)
        wanted = optax.smooth_labels(
            jax.nn.one_hot(labels, network.classes), jnp.float32(recipe.smoothing)
        )
        return optax.softmax_cross_entropy(logits, wanted).mean()

    @jax.jit
    def update(
        params: PyTree, state: PyTree, pixels: jax.Array, labels: jax.Array
    ) -> tuple[PyTree, PyTree]:
        gradient = jax.grad(loss)(params, pixels, labels)
        with jax.numpy_dtype_promotion('standard'):  # optax mixes types
            change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    pixels = np.asarray(train.pixels, np.float32)
    for step, chosen in enumerate(_batches(len(train), recipe), 1):
        params, state = update(params, state, pixels[chosen], train.labels[chosen])
        done(step, recipe.steps)
    return params


def fingerprint(train: Labelled, recipe: Recipe) -> str:
    """A hash of the images, their labels and the recipe, in hexadecimal digits."""
    found = hashlib.sha256(repr((tuple(recipe), train.num_classes)).encode())
    found.update(train.pixels.tobytes())
    found.update(train.labels.tobytes())
    return found.hexdigest()


def _kept(path: str, key: str, like: PyTree) -> PyTree | None:
    """The parameters that a file keeps, None where it is absent, damaged or of another key."""
    shapes = flax.traverse_util.flatten_dict(like, sep='/')
    found = {}
    try:
        with npz.open_archive(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    header = npz.read_header(member)
                    found[name.removesuffix('.npy')] = npz.read_numbers(member, header)
    except (OSError, UserError):
        return None
    if str(found.pop('key', '')) != key:
        return None
    if {name: a.shape for name, a in found.items()} != {n: a.shape for n, a in shapes.items()}:
        return None
    return flax.traverse_util.unflatten_dict(found, sep='/')


def conv_net(
    train: Labelled,
    recipe: Recipe,
    keep_in: str | None = None,
    progress: Progress = lambda done, total: None,
) -> ConvNet:
    """Trains a classifier on real images, or takes the one that was kept.

    Args:
      train: the images.
      recipe: how it is trained. The same recipe gives the same classifier on the same machine.
      keep_in: the directory whose classifier.npz keeps the weights, with a hash of images and
        recipe, or None to keep nothing. Weights of other images or of another recipe are replaced.
      progress: called after every step with the steps done and their number.
    """
    network = _Network(recipe.channels, recipe.width, train.num_classes)
    example = jnp.zeros((1, *train.pixels.shape[1:]))
    init = functools.partial(network.init, jax.random.key(recipe.seed))
    shapes = jax.eval_shape(init, example)['params']
    key = fingerprint(train, recipe)
    path = None if keep_in is None else os.path.join(keep_in, 'classifier.npz')
    params = None if path is None or files.is_remote(path) else _kept(path, key, shapes)
    if params is None:
        first = jax.jit(init)(example)['params']
        params = jax.device_get(_trained(network, first, train, recipe, progress))
        if path is not None:
            flat = flax.traverse_util.flatten_dict(params, sep='/')
            epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.replace(path, lambda f: np.savez(f, key=np.array(key), **flat))
    return ConvNet(network, params)
