"""A trained run as Python callers hold it: `sphere_ar_jax.load` gives a `Model`.

Nothing is drawn here: `on_mesh` has the sampler. See `docs/python.md`.

Dimensions:
  n  images
  H, W, c   height, width and channels of the model's images
  L  tokens of an image
  d  latent dimension
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from sphere_ar_jax.config import build, checks, schema
from sphere_ar_jax.models.ar import AR, unstacked
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import autoencoding, batching, captioning, inputs, on_mesh
from sphere_ar_jax.sampling.generation import Run
from sphere_ar_jax.sampling.tokens import Drawn, Prefix
from sphere_ar_jax.sphere import geometry

_slerp = jax.jit(geometry.slerp)


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a call asks to be drawn, checked.

    Attributes:
      labels: labels of n images.
      count: n.
      seed: one for all images, or (n,).
      index: numbers of the images' noise, (n,).
      sampler: how they are drawn.
    """

    labels: Any
    count: int
    seed: int | np.ndarray
    index: np.ndarray
    sampler: build.Sampler


def _clipped(images: np.ndarray) -> np.ndarray:
    """Images in [−1, 1]; the decoder leaves the range by a little."""
    return np.clip(images, -1, 1)


def other_sampler(config: ConfigDict, solver: str, steps: int) -> build.Sampler:
    """Makes a run's sampler with another solver or number of steps.

    Options that go with the run's own solver or number of steps alone are left out.

    Args:
      config: the run's config.
      solver: one of `solvers.SOLVERS`.
      steps: the solver's steps for a token.

    Raises:
      UserError: the run has no such sampler.
    """
    values = {'sampling.solver': solver, 'sampling.num_steps': steps}
    if solver != config.sampling.solver:
        values |= {'sampling.last_step': None, 'sampling.noise_scale': None}
    if steps != config.sampling.num_steps:
        values |= {'sampling.final_steps': None, 'sampling.annealing': None}
    return build.build_sampler(checks.check(schema.changed(config, values)))


class Model:
    """A trained run: draws images, encodes, decodes, completes and interpolates them.

    `sphere_ar_jax.load` makes it. The names of the arguments mean the same in all methods:

    - Images that are returned are float32 (n, H, W, c) in [−1, 1]; `data.pixels.to_uint8` makes
      pixels of them, as `--mode=sample` does. Images that are given may also be uint8, or paths of
      files and images of PIL of any size, which are cropped as for an evaluation.
    - Tokens are float32 (n, L, d), as the AR model reads them. They are (n, L, d + 1) where
      `ar.token_space` is polar.
    - `labels` are numbers or names of classes: one, or one for each image. Where a run draws
      for texts they are the texts.
    - `seed` is a whole number, or one for each image. With one seed, image i has the noise of image
      i of `--mode=sample`. With several, image i is the one that its seed alone gives.
    - `guidance` is the guidance scale: a number, or one for each image; None takes the run's own.
    - `steps` are the solver's steps for a token; None takes the run's own.

    An image follows from its label, seed and guidance scale. It does not depend on the others up to
    rounding. Each method is compiled once for a number of images, and `sample` and its kin also for
    a number of steps; scales of each image, and seeds of each, have programs of their own. So has
    each `top_p` and temperature of `caption`. Other values compile nothing.

    The weights of the AR model are read when they are first needed.

    Whatever the model cannot take raises a ValueError of one line.

    >>> import sphere_ar_jax
    >>> run = sphere_ar_jax.load('/tmp/digits')
    >>> run
    <Model: images (16, 16, 1), tokens (16, 8), 10 classes>
    >>> run.sample([3, 11])
    Traceback (most recent call last):
    sphere_ar_jax.runtime.console.UserError: labels must lie between 0 and 9, but go from 3 to 11

    Attributes:
      config: the run's config.
      vae: the tokenizer.
      vae_params: its parameters.
      mesh: the devices that compute.
      class_names: names of the classes in the order of their numbers, None where they have none.
    """

    def __init__(
        self,
        run: Run,
        *,
        mesh: Mesh | None = None,
        batch_size: int | None = None,
        read_ar: Callable[[], Run] | None = None,
        class_names: Sequence[str] | None = None,
        find: Callable[[str], Any] | None = None,
    ) -> None:
        """Makes a model of a run that was read or trained.

        Args:
          run: the models, their parameters and config.
          mesh: devices that compute, all devices if None.
          batch_size: images that are computed at once, at most; the config's own if None.
          read_ar: reads the run with the AR model's parameters, if those of `run` are None.
          class_names: see the class.
          find: gives the number of the class that a text names, or the label of a text to draw.

        Raises:
          UserError: the batch size is not at least 1.
        """
        self.config = run.config
        self.vae: VAE = run.vae
        self.vae_params: PyTree = run.vae_params
        self.class_names = class_names
        self._run: Run | None = run
        self._opened: tuple[AR, PyTree] | None = None
        self._opening = threading.Lock()  # threads may ask for the AR model at once
        self._read_ar = read_ar
        self._find = find
        self.mesh = sharding.make_mesh() if mesh is None else mesh
        size = self.config.sampling.batch_size if batch_size is None else batch_size
        self._batch_size = inputs.number('batch_size', size, 1)

    def __repr__(self) -> str:
        tokens = (self.num_tokens, self.vae.token_dim)
        asked = f'{schema.num_classes(self.config)} classes'
        if build.reads_features(self.config):
            places, features = self.config.ar.feature_shape
            asked = f'texts of {places} places with {features} features each'
        elif build.has_captions(self.config):
            asked = f'texts of up to {self.config.ar.text_tokens} tokens'
        return f'<Model: images {self.image_shape}, tokens {tokens}, {asked}>'

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, c)."""
        return self.vae.image_shape

    @property
    def num_tokens(self) -> int:
        """Number L of an image's tokens."""
        return self.vae.grid[0] * self.vae.grid[1]

    @property
    def _autoregressive(self) -> tuple[AR, PyTree]:
        """The AR model and its parameters in the layout that sampling needs, read at first use."""
        with self._opening:
            if self._opened is None:
                self._opened = self._open()
                self._run = None  # It would keep the parameters in memory twice.
            return self._opened

    def _open(self) -> tuple[AR, PyTree]:
        """Gives what `_autoregressive` keeps.

        Raises:
          UserError: there is no AR model.
          OSError: there is no checkpoint of it.
        """
        run = self._run
        assert run is not None  # it is there until the model is opened
        if run.ar_params is None and self._read_ar is not None:
            run = self._read_ar()
        if run.ar_params is None:
            raise UserError('this model is a tokenizer alone: it encodes and decodes')
        return unstacked(run.ar, run.ar_params)

    @property
    def ar(self) -> AR:
        """The AR model. It is read when it is first asked for.

        Raises:
          UserError: there is none.
          OSError: there is no checkpoint of it.
        """
        return self._autoregressive[0]

    @property
    def ar_params(self) -> PyTree:
        """The AR model's parameters, see `ar`."""
        return self._autoregressive[1]

    # ---- requests

    def _sampler(self, steps: int | None) -> build.Sampler:
        """The run's own sampler, or that of another number of steps.

        Raises:
          UserError: the run has no sampler of so many steps.
        """
        if steps is None:
            return build.build_sampler(self.config)
        number = inputs.number('steps', steps, 1)
        return other_sampler(self.config, self.config.sampling.solver, number)

    def _request(
        self,
        labels: inputs.Labels,
        seed: ArrayLike,
        guidance: ArrayLike | None,
        steps: int | None,
        count: int | None = None,
    ) -> _Request:
        """Checks what is to be drawn.

        Args:
          labels: see the class.
          seed: see the class.
          guidance: see the class.
          steps: see the class.
          count: number of the images, where a single label is meant for all of them.

        Raises:
          UserError: the model cannot take an argument.
        """
        condition = self.ar.condition
        is_tree = not isinstance(condition.example(), jax.Array | np.ndarray)
        found_labels = inputs.labels(labels, self._find, is_tree=is_tree)
        arrays = on_mesh.checked_labels(condition, found_labels)
        found = len(jax.tree.leaves(arrays)[0])
        if count is not None and found == 1:
            arrays = jax.tree.map(lambda a: np.repeat(a, count, axis=0), arrays)
            found = count
        if count is not None and found != count:
            raise UserError(f'labels must be one for all {count} images or one for each: {found}')
        sampler = self._sampler(steps)
        if guidance is not None:
            if sampler.options.guidance is None:
                raise UserError('this run samples without guidance: leave guidance out')
            sampler = sampler._replace(guidance_scale=inputs.scales(guidance, found))
        seeds = inputs.seeds(seed, found)
        index = np.zeros(found, np.int32) if np.ndim(seeds) else np.arange(found, dtype=np.int32)
        return _Request(arrays, found, seeds, index, sampler)

    def _draw(self, request: _Request, prefix: Prefix | None = None) -> tuple[np.ndarray, Drawn]:
        """Images (n, H, W, c), clipped, and their tokens."""
        images, drawn = on_mesh.draw_images(
            self,
            request.sampler,
            request.labels,
            seed=request.seed,
            index=request.index,
            prefix=prefix,
            batch_size=self._batch_size,
            mesh=self.mesh,
        )
        return _clipped(images), drawn

    # ---- drawing

    def sample(
        self,
        labels: inputs.Labels,
        *,
        seed: ArrayLike = 0,
        guidance: ArrayLike | None = None,
        steps: int | None = None,
        on_token: Callable[[int, np.ndarray], object] | None = None,
    ) -> np.ndarray:
        """Draws an image for each label.

        >>> import sphere_ar_jax
        >>> run = sphere_ar_jax.load('/tmp/digits')
        >>> images = run.sample([3, 1], seed=0)
        >>> images.shape, images.dtype
        ((2, 16, 16, 1), dtype('float32'))
        >>> run.sample([3, 3], seed=[7, 8], guidance=[1.0, 2.5]).shape
        (2, 16, 16, 1)
        >>> images = run.sample([3, 1], on_token=lambda k, images: print(k, images.shape))
        4 (2, 16, 16, 1)
        8 (2, 16, 16, 1)
        12 (2, 16, 16, 1)
        16 (2, 16, 16, 1)

        Args:
          labels: see the class.
          seed: see the class.
          guidance: see the class.
          steps: see the class.
          on_token: called as on_token(k, images) after each row of the token grid, when k tokens
            are drawn. The decoder sees zeros in the place of the others. This has programs of its
            own, decodes all images once a row (16 times at 256×256 pixels, in place of once), and
            waits for the devices each time. The images are the same up to rounding.

        Returns:
          (n, H, W, c) float32 in [−1, 1].

        Raises:
          UserError: the model cannot take an argument, or an image is not finite; or with
            on_token there are more images than `batch_size`.
          OSError: the AR model cannot be read.
        """
        request = self._request(labels, seed, guidance, steps)
        if on_token is None:
            images, _ = self._draw(request)
            return images
        if request.count > self._batch_size:
            raise UserError(
                f'on_token takes at most batch_size = {self._batch_size} images, '
                f'not {request.count}'
            )
        parts = on_mesh.draw_row_by_row(
            self,
            request.sampler,
            request.labels,
            seed=request.seed,
            index=request.index,
            mesh=self.mesh,
        )
        for count, decoded, _ in parts:
            images = _clipped(decoded)
            on_token(count, images.copy())
        return images

    def sample_tokens(
        self,
        labels: inputs.Labels,
        *,
        seed: ArrayLike = 0,
        guidance: ArrayLike | None = None,
        steps: int | None = None,
    ) -> Drawn:
        """Draws the tokens of an image for each label; `decode` makes the images of `sample`.

        >>> import numpy as np
        >>> import sphere_ar_jax
        >>> run = sphere_ar_jax.load('/tmp/digits')
        >>> drawn = run.sample_tokens([3, 1])
        >>> np.linalg.norm(drawn.z, axis=-1).round(3)[0, :3]  # all tokens lie at R = √d
        array([2.828, 2.828, 2.828], dtype=float32)

        Args:
          labels: see the class.
          seed: see the class.
          guidance: see the class.
          steps: see the class.

        Returns:
          The tokens z, and `raw`, the same before projection.

        Raises:
          UserError: see `sample`.
          OSError: see `sample`.
        """
        _, drawn = self._draw(self._request(labels, seed, guidance, steps))
        return drawn

    def token_norms(
        self,
        labels: inputs.Labels,
        *,
        seed: ArrayLike = 0,
        guidance: ArrayLike | None = None,
        steps: int | None = None,
    ) -> np.ndarray:
        """Norms of the tokens as the head draws them, before they are projected.

        On a sphere the projection sets each of them to R. Their distance from R is the error
        of scale that it removes (paper §3).

        >>> import sphere_ar_jax
        >>> run = sphere_ar_jax.load('/tmp/digits')
        >>> run.token_norms([3, 1]).shape
        (2, 16)

        Args:
          labels: see the class.
          seed: see the class.
          guidance: see the class.
          steps: see the class.

        Returns:
          (n, L) float32.

        Raises:
          UserError: see `sample`.
          OSError: see `sample`.
        """
        drawn = self.sample_tokens(labels, seed=seed, guidance=guidance, steps=steps)
        return np.linalg.norm(drawn.raw[..., : self.vae.latent_dim], axis=-1)

    def complete(
        self,
        images: inputs.Images,
        labels: inputs.Labels,
        *,
        keep: float | str = 0.5,
        seed: ArrayLike = 0,
        guidance: ArrayLike | None = None,
        steps: int | None = None,
    ) -> np.ndarray:
        """Keeps the first tokens of images and draws the others.

        Tokens are in raster order, so that half of them is the upper half of the image. The pixels
        there change a little, since the decoder sees all tokens.

        >>> import sphere_ar_jax
        >>> run = sphere_ar_jax.load('/tmp/digits')
        >>> images = run.sample([3, 1])
        >>> run.complete(images, [3, 1], keep=0.5).shape
        (2, 16, 16, 1)

        Args:
          images: see the class.
          labels: one for all images, or one for each; see the class.
          keep: a whole number of tokens, rows of them as '2rows', or a share between 0 and 1.
          seed: see the class. The tokens drawn have the noise that they have without an image.
          guidance: see the class.
          steps: see the class.

        Returns:
          (n, H, W, c) float32 in [−1, 1].

        Raises:
          UserError: see `sample`.
          OSError: see `sample`.
        """
        count = inputs.kept(keep, self.vae.grid)
        checked = inputs.images(images, self.image_shape)
        request = self._request(labels, seed, guidance, steps, len(checked))
        completed, _ = self._draw(request, Prefix(self.encode(checked), count))
        return completed

    def caption(
        self,
        images: inputs.Images,
        *,
        top_p: float | None = None,
        temperature: float = 1.0,
        seed: ArrayLike = 0,
    ) -> list[str]:
        """Writes a text for each image, if the model is one that writes (`ar.text_weight`).

        Args:
          images: see the class.
          top_p: draws from the likeliest tokens whose probabilities sum to it, in (0, 1]; None
            takes the likeliest token each time.
          temperature: what logits are divided by before they are drawn from, above 0.
          seed: see the class.

        Returns:
          n texts.

        Raises:
          UserError: the model writes no texts, or it cannot take an argument.
          OSError: a file cannot be read.
        """
        captioning.writer(self.ar)
        writing = captioning.checked_writing(top_p, temperature)
        checked = inputs.images(images, self.image_shape)
        captions = captioning.write(
            self,
            checked,
            seed=inputs.seeds(seed, len(checked)),
            writing=writing,
            batch_size=self._batch_size,
            mesh=self.mesh,
        )
        words = build.open_vocabulary(self.config)
        return [words.decode(caption) for caption in captions]

    # ---- the tokenizer

    def encode(self, images: inputs.Images, *, seed: ArrayLike | None = None) -> np.ndarray:
        """Turns images into tokens.

        >>> import sphere_ar_jax
        >>> run = sphere_ar_jax.load('/tmp/digits')
        >>> run.encode(run.sample([3, 1])).shape
        (2, 16, 8)

        Args:
          images: see the class.
          seed: draws tokens from the posterior, as training and `--mode=evaluate` do; image i has
            the key of the seed folded by i, or with a seed for each image that of its own seed
            folded by 0. None gives the most probable tokens.

        Returns:
          (n, L, d) float32.

        Raises:
          UserError: the model cannot take the images or the seed.
          OSError: a file cannot be read.
        """
        checked = inputs.images(images, self.image_shape)
        if seed is None:
            program = autoencoding.encoder(self.vae)
            return self._in_batches(program, checked)
        seeds = inputs.seeds(seed, len(checked))
        data = np.asarray(jax.random.key_data(autoencoding.reading_keys(seeds, len(checked))))
        return self._in_batches(autoencoding.drawing_encoder(self.vae), (checked, data))

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """Turns tokens into images.

        >>> import numpy as np
        >>> import sphere_ar_jax
        >>> run = sphere_ar_jax.load('/tmp/digits')
        >>> run.decode(np.ones((2, 16, 8))).shape
        (2, 16, 16, 1)

        Args:
          tokens: (n, L, d), or (L, d) for one image.

        Returns:
          (n, H, W, c) float32 in [−1, 1].

        Raises:
          UserError: the model cannot take the tokens, or an image is not finite.
        """
        checked = inputs.tokens(tokens, self.num_tokens, self.vae.token_dim)
        images = self._in_batches(autoencoding.decoder(self.vae), checked)
        batching.require_finite(np.isfinite(images).all((1, 2, 3)), 0)
        return _clipped(images)

    def reconstruct(self, images: inputs.Images, *, seed: ArrayLike | None = None) -> np.ndarray:
        """Encodes images and decodes the tokens.

        >>> import sphere_ar_jax
        >>> run = sphere_ar_jax.load('/tmp/digits')
        >>> run.reconstruct(run.sample([3, 1])).shape
        (2, 16, 16, 1)

        Args:
          images: see the class.
          seed: see `encode`.

        Returns:
          (n, H, W, c) float32 in [−1, 1].

        Raises:
          UserError: see `encode` and `decode`.
          OSError: a file cannot be read.
        """
        return self.decode(self.encode(images, seed=seed))

    def interpolate(self, a: inputs.Images, b: inputs.Images, n: int) -> np.ndarray:
        """Decodes tokens on the way from one image to another.

        On a sphere each token follows its great circle at constant speed, and elsewhere a straight
        line. The first image is the reconstruction of a and the last one that of b.

        >>> import sphere_ar_jax
        >>> run = sphere_ar_jax.load('/tmp/digits')
        >>> three, one = run.sample([3, 1])
        >>> run.interpolate(three, one, 5).shape
        (5, 16, 16, 1)

        Args:
          a: one image, see the class.
          b: one image.
          n: number of images, both ends included; at least 2.

        Returns:
          (n, H, W, c) float32 in [−1, 1].

        Raises:
          UserError: there is more than one image in a or b, or n is below 2; or see `encode`.
          OSError: a file cannot be read.
        """
        count = inputs.number('n', n, 2)
        ends = [inputs.images(image, self.image_shape) for image in (a, b)]
        if any(len(image) != 1 for image in ends):
            raise UserError(
                f'interpolate goes from one image to one, not from {len(ends[0])} to {len(ends[1])}'
            )
        first, last = self.encode(np.concatenate(ends))
        t = np.linspace(0, 1, count, dtype=np.float32)[:, None, None]
        way = (1 - t) * first[None] + t * last[None]
        if sphere_radius(self.vae) is not None:
            d = self.vae.latent_dim
            way[..., :d] = _slerp(first[None, :, :d], last[None, :, :d], t)
        return self.decode(way)

    def _in_batches(self, function: Callable[[PyTree, PyTree], PyTree], rows: PyTree) -> np.ndarray:
        """What a program of the tokenizer makes of many rows."""
        return batching.in_batches(function, self.vae_params, rows, self._batch_size, self.mesh)


def sphere_radius(vae: VAE) -> float | None:
    """The radius R of the sphere that the first d numbers of all tokens lie on.

    On a sphere the projections of two points of one direction are the same, and R is their norm.
    It is None where tokens lie on no sphere.
    """
    points = np.ones((2, vae.token_dim), np.float32) * np.array([[1], [3]], np.float32)
    near, far = np.asarray(vae.project(jnp.asarray(points)))[:, : vae.latent_dim]
    return float(np.linalg.norm(near)) if np.allclose(near, far) else None
