"""Pictures and scores of a run, while it is trained and at its end.

Dimensions:
  n  images     H, W, c  an image, float in [−1, 1]
"""

import itertools
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import augment, imagenet, pixels, small, sources
from sphere_ar_jax.data.captions import captioned
from sphere_ar_jax.evaluation import class_names, heldout, pictures, small_images, tokenizer
from sphere_ar_jax.evaluation.captioned import composed_digits
from sphere_ar_jax.evaluation.fidelity import classifier_features, protocol, statistics
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime import console, hosts
from sphere_ar_jax.runtime.console import TemporaryError, UserError
from sphere_ar_jax.runtime.metric_writer import DEFAULT, Logs, MetricWriter
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import autoencoding, batching, on_mesh
from sphere_ar_jax.training.run import Run
from sphere_ar_jax.training.state import Batch, Stage


class Setting(NamedTuple):
    """What the parts of a run share.

    Attributes:
      cfg: the config of the run.
      workdir: the directory that the run is written to.
      mesh: the devices.
      vae: the tokenizer.
      ar: the autoregressive model.
      source: the training images, see `sources`.
      data: the small data set whose training images these are, or None.
      judge: parameters of the Inception network and the statistics of the reference, for FID while
        training, or None.
      heldout: images that are never trained on, a source or a split of `data`, or None.
      reading: what `loop.train` needs to read the source, see `data.batches.batches`.
      encoded_by: the hash of the tokenizer that latents were encoded with, None for images.
      logs: where numbers and pictures go besides the workdir's own files.
    """

    cfg: ConfigDict
    workdir: str
    mesh: Mesh
    vae: VAE
    ar: AR
    source: Any
    data: small.DataSet | None = None
    judge: tuple[PyTree, statistics.Statistics] | None = None
    heldout: Any = None
    reading: Mapping[str, Any] = MappingProxyType({})
    encoded_by: str | None = None
    logs: Logs = DEFAULT


class _Grid(NamedTuple):
    """The fixed grid of samples that every look draws.

    Attributes:
      titles: the name of each row's class, or its caption.
      labels: label of each image, row by row.
      noise: number of each image's noise, the same in every row.
    """

    titles: list[str]
    labels: np.ndarray
    noise: np.ndarray


def _examples(setting: Setting, source: Any, numbers: Iterable[int], most: int) -> Batch:
    """Images of files, cropped at the centre, without those that cannot be shown.

    Args:
      setting: the run.
      source: the images.
      numbers: the entries to try, in turn.
      most: how many are taken.

    Returns:
      {'image': (n, H, W, c), 'label': (n, …)}; both are lists of nothing where n would be 0.

    Raises:
      TemporaryError: the processes of the run took different ones.
    """
    size, _, channels = setting.vae.image_shape
    as_stored = imagenet.are_synsets(getattr(source, 'class_names', None))
    images: list[np.ndarray] = []
    labels: list[Any] = []
    taken: list[int] = []
    for i in numbers:
        if len(images) == most:
            break
        try:
            record = source[i]
            crop = augment.central(record['image'], size, channels, as_stored)
        except (augment.BrokenImageError, UserError, MemoryError):
            continue
        images.append(pixels.to_float(crop))
        labels.append(record['label'])
        taken.append(i)
    # What one process cannot read at this moment, another one can.
    if hosts.differing([zlib.crc32(np.array(taken, np.int64).tobytes())]):
        line = 'an image was read in some processes of this run alone: start it again'
        raise TemporaryError(line)
    return {
        'image': np.stack(images) if images else [],
        'label': np.stack(labels) if labels else [],
    }


def _has_latents(setting: Setting) -> bool:
    """Whether a run is trained on latents, and has no images."""
    return setting.cfg.data.name == 'latents'


# Held-out images that a look takes at most.
_MOST_LOOKED_AT = 256


def held_out(setting: Setting, stage: Stage) -> heldout.HeldOut | None:
    """What computes a stage's loss on held-out images, None where there are none."""
    if setting.heldout is None or stage.loss is None:
        return None
    numbers = sources.spread(len(setting.heldout), _MOST_LOOKED_AT)
    images: Batch
    if setting.data is not None or _has_latents(setting):
        records = [setting.heldout[i] for i in numbers]
        images = {name: np.stack([record[name] for record in records]) for name in records[0]}
    else:
        images = _examples(setting, setting.heldout, numbers, _MOST_LOOKED_AT)
    if not len(images['label']):
        return None
    return heldout.HeldOut(stage, images, setting.cfg.seed, setting.mesh)


def look_at_heldout(held: heldout.HeldOut, params: PyTree, step: int, writer: MetricWriter) -> None:
    """Writes a stage's loss on held-out images, see `heldout.HeldOut.scalars`.

    Args:
      held: from `held_out`.
      params: the stage's parameters at this step.
      step: number of training steps done.
      writer: the stage's metrics.
    """
    found = held.scalars(params)
    if found:
        writer.write(step, found, found)


# Held-out images that are reconstructed at the end of a run at most.
_MOST_HELD_OUT = 10_000


def _some_images(split: small.Split, n: int) -> np.ndarray:
    """At most n images (n, H, W, c) of a split, spread evenly, since files may be sorted."""
    return np.stack([split[i]['image'] for i in sources.spread(len(split), n)])


class Examples(NamedTuple):
    """Images of which reconstructions are shown.

    Attributes:
      images: (n, H, W, c).
      split: 'held-out' or 'training', where the images come from.
    """

    images: np.ndarray
    split: str


def examples(setting: Setting, n: int = 48) -> Examples:
    """At most n images of which reconstructions are shown, spread evenly.

    Returns:
      Held-out images, or training images where none are held out or none of these can be shown.
      Images of files are cropped at the centre, and left out where they are broken, cannot be
      read, or are too long and thin to be cropped.

    Raises:
      UserError: no image can be shown.
    """
    if setting.data is not None:
        return Examples(_some_images(setting.data.heldout, n), 'held-out')
    if setting.heldout is not None:
        numbers = sources.spread(len(setting.heldout), n)
        found = _examples(setting, setting.heldout, numbers, n)['image']
        if len(found):
            return Examples(found, 'held-out')
    count = len(setting.source)
    # The files of a class lie together. All others stand in for those that cannot be shown.
    wanted = dict.fromkeys(sources.spread(count, n))
    others = (i for i in range(count) if i not in wanted)
    found = _examples(setting, setting.source, itertools.chain(wanted, others), n)['image']
    if not len(found):
        raise UserError(f'none of the {len(setting.source)} images can be shown: all are broken')
    return Examples(found, 'training')


def _report_no_picture(step: int, error: batching.NonFiniteSamples) -> None:
    """Says in one line on stderr why there is no picture of a step; training goes on."""
    if hosts.is_first():
        print(f'step {step}: no picture, {error}', file=sys.stderr, flush=True)


def _at_once(images: np.ndarray) -> int:
    """How many of some examples are reconstructed at once.

    Looks and the end of a run share it, and so the compiled program.
    """
    return min(16, len(images))


def look_at_reconstructions(
    setting: Setting, vae_params: PyTree, images: np.ndarray, step: int, writer: MetricWriter
) -> None:
    """Writes a picture of reconstructions into the stage's directory and to TensorBoard.

    Args:
      setting: the run.
      vae_params: the tokenizer's parameters at this step.
      images: what is reconstructed, from `examples`.
      step: number of training steps done.
      writer: the stage's metrics.
    """
    try:
        recon, _ = autoencoding.reconstruct(
            setting.vae, vae_params, images, jax.random.key(0), _at_once(images), setting.mesh
        )
    except batching.NonFiniteSamples as error:
        _report_no_picture(step, error)
        return
    path = f'{setting.workdir}/tokenizer/reconstructions_{step:07d}.png'
    columns = min(8, len(images))
    pictures.save_reconstructions(path, images, recon, columns=columns, title=f'step {step}')
    pairs = np.concatenate([images[:8], recon[:8]])
    writer.picture('reconstructions', step, pictures.tile(pairs, columns, 1))


def _drawing(setting: Setting) -> dict[str, Any]:
    """The options of `on_mesh.draw_batches` and `on_mesh.draw_images` that the config gives."""
    cfg = setting.cfg
    return {
        'sampler': build.build_sampler(cfg),
        'seed': cfg.seed,
        'batch_size': cfg.sampling.batch_size,
        'mesh': setting.mesh,
    }


def _drawn(
    setting: Setting,
    run: Run,
    labels: np.ndarray,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[np.ndarray]:
    """Yields samples for labels (n,) batch by batch, uint8 (b, H, W, c)."""
    n = len(labels)
    for first, images, _ in on_mesh.draw_batches(run, labels=labels, **_drawing(setting)):
        batching.require_finite_images(images, n - first, first)
        found = np.asarray(pixels.to_uint8(hosts.gather(images)[: n - first]))
        progress(first + len(found))
        yield found


class _Shown:
    """Samples that are shown with the nearest training images: as many of some classes."""

    def __init__(self, labels: np.ndarray, rows: int = 12, columns: int = 12):
        """Chooses the samples.

        Args:
          labels: the class that each sample is drawn for, (n,), sorted.
          rows: classes at most, spread evenly over those that have enough samples.
          columns: samples of a class at most, spread evenly.
        """
        classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
        columns = min(columns, int(counts.max()))
        enough = np.flatnonzero(counts >= columns)
        chosen = enough[sources.spread(len(enough), rows)]
        self._classes = classes[chosen]
        spread = [sources.spread(count, columns) for count in counts[chosen]]
        self._numbers = (first[chosen, None] + np.array(spread)).ravel()
        self._images: list[np.ndarray] = []

    def keep(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields batches of samples unchanged, and keeps those that are shown."""
        first = 0
        for batch in batches:
            inside = (self._numbers >= first) & (self._numbers < first + len(batch))
            self._images.append(batch[self._numbers[inside] - first])
            first += len(batch)
            yield batch

    def save(
        self, path: str, trained: np.ndarray, nearest: np.ndarray, titles: Sequence[str]
    ) -> None:
        """Writes the picture.

        Args:
          path: the PNG.
          trained: the images (·, s, s, c) in [0, 1] that the run was trained on.
          nearest: the number of the training image that is nearest to each sample, (n,).
          titles: the name of each class.
        """
        samples = classifier_features.shrunk(np.concatenate(self._images))
        pictures.save_nearest(
            path,
            2 * samples - 1,
            2 * trained[nearest[self._numbers]] - 1,
            [titles[label] for label in self._classes],
            'samples, and below each the training image that is nearest in pixels',
        )


def score_by_classifier(setting: Setting, run: Run) -> dict[str, Any]:
    """Scores a run on image files by a classifier of their classes; no other weights are needed.

    Samples are drawn for the classes of real images, or for their captions. WORKDIR/nearest.png
    shows some of each class, with the nearest training images.

    Args:
      setting: what the parts of the run share; its images are no small data set.
      run: the models.

    Returns:
      What `classifier_features.score` gives, of `sampling.num_images` samples.

    Raises:
      UserError: there are too few classes or images.
    """
    size, _, channels = setting.vae.image_shape
    encode = build.caption_encoder(setting.cfg) if build.has_captions(setting.cfg) else None
    real = classifier_features.read(setting.source, setting.heldout, size, channels, encode)
    wanted = classifier_features.asked(real, setting.cfg.sampling.num_images)
    labels = wanted.labels
    if wanted.captions:
        labels = build.encode_captions(setting.cfg, wanted.captions)
    titles = class_names.titles(range(setting.source.num_classes), setting.source.class_names)
    steps = setting.cfg.data.classifier_steps
    bar = console.bar(len(labels), 'samples')
    shown = _Shown(wanted.labels)
    scores, nearest = classifier_features.score(
        shown.keep(_drawn(setting, run, labels, bar)),
        wanted,
        real,
        titles,
        steps,
        setting.workdir,
        console.bar(steps, 'training the classifier', 'step'),
    )
    shown.save(f'{setting.workdir}/nearest.png', real.trained_on(), nearest, titles)
    return scores


def _all_classes(count: int, num_classes: int) -> np.ndarray:
    """Labels (count,): each class equally often, and the rest spread evenly over them."""
    whole = count - count % num_classes
    rest = sources.spread(num_classes, count - whole)
    return np.concatenate([np.arange(whole) % num_classes, np.asarray(rest, int)])


def _fid(setting: Setting, run: Run) -> float:
    """The FID of `watch.fid_images` samples, of all classes or of captions, to the reference."""
    assert setting.judge is not None
    network, reference = setting.judge
    numbers = np.arange(setting.cfg.watch.fid_images)
    if build.has_captions(setting.cfg):
        captions = build.encode_captions(setting.cfg, _captions(setting, len(numbers)))
        labels = captions[numbers % len(captions)]
    else:
        num_classes = schema.num_classes(setting.cfg)
        assert num_classes is not None  # the model was built with it
        labels = _all_classes(len(numbers), num_classes)
    features = protocol.extract(
        _drawn(setting, run, labels),
        network,
        batch_size=setting.cfg.sampling.batch_size,
        mesh=setting.mesh,
    )
    return statistics.frechet_distance(*statistics.statistics(features.pool), *reference)


def _captions(setting: Setting, count: int) -> list[str]:
    """First captions of at most `count` images, spread evenly over the held-out ones.

    Images whose captions cannot be encoded are passed over. Where no held-out image has one that
    can be, or none is held out, the captions are those of training images.

    Raises:
      UserError: none of the training images that are tried has a caption that can be encoded.
    """
    encode = build.caption_encoder(setting.cfg)
    pools = [setting.source]
    if setting.heldout is not None:
        pools.insert(0, setting.heldout.source)
    for source in pools:
        looked = captioned.look(source, count, encode)
        if len(looked.texts) < min(count, len(source)) and count < captioned.LOOKED_AT:
            looked = captioned.look(source, captioned.LOOKED_AT, encode)
        if looked.texts:
            break
    if not looked.texts:
        raise UserError(looked.reasons[0])
    return [looked.texts[i] for i in sources.spread(len(looked.texts), count)]


def _rows(setting: Setting) -> tuple[list[str], np.ndarray]:
    """The titles and labels of the grid's rows."""
    watch = setting.cfg.watch
    if build.has_captions(setting.cfg):
        captions = _captions(setting, watch.classes)
        titles = [console.printable(caption, 80) for caption in captions]
        return titles, build.encode_captions(setting.cfg, captions)
    classes = min(schema.num_classes(setting.cfg), setting.source.num_classes)
    numbers = sources.spread(classes, watch.classes)
    names = getattr(setting.source, 'class_names', None)
    return class_names.titles(numbers, names), np.asarray(numbers)


def _grid(setting: Setting) -> _Grid:
    """The grid of samples: rows of `watch.columns` images, `watch.classes` of them.

    The rows are classes, spread evenly, or captions.
    """
    watch = setting.cfg.watch
    titles, labels = _rows(setting)
    return _Grid(
        titles=titles,
        labels=np.repeat(labels, watch.columns, axis=0),
        noise=np.tile(np.arange(watch.columns), len(titles)),
    )


def _draw_grid(setting: Setting, grid: _Grid, run: Run, **options: Any) -> np.ndarray:
    """The images (n, H, W, c) of the grid; options: further ones of `on_mesh.draw_images`."""
    options |= _drawing(setting)
    images, _ = on_mesh.draw_images(run, labels=grid.labels, index=grid.noise, **options)
    return images


def _save_grid(setting: Setting, grid: _Grid, path: str, images: np.ndarray) -> None:
    """Writes the images of the grid as a picture with a title at each row."""
    pictures.save_classes(path, images, setting.cfg.watch.columns, grid.titles)


def look_at_samples(
    setting: Setting, run: Run, directory: str, step: int, writer: MetricWriter
) -> None:
    """Writes a picture of samples and, where the setting has a judge, their FID.

    Every look draws the same classes from the same noise. See `docs/evaluation.md`, "FID while
    training".

    Args:
      setting: what the parts of the run share.
      run: the models at this step.
      directory: where samples_STEP.png goes.
      step: number of training steps done.
      writer: the stage's metrics, which get the picture, `fid` and `fid_images`, the number of
        samples that it was taken from.
    """
    grid = _grid(setting)
    try:
        images = _draw_grid(setting, grid, run)
        _save_grid(setting, grid, f'{directory}/samples_{step:07d}.png', images)
        writer.picture('samples', step, pictures.tile(images, setting.cfg.watch.columns, 1))
        if setting.judge is not None:
            n = setting.cfg.watch.fid_images
            found = {'fid': _fid(setting, run), 'fid_images': n}
            writer.write(step, found, found)
    except batching.NonFiniteSamples as error:
        _report_no_picture(step, error)


def _reconstruct(
    setting: Setting, vae_params: PyTree, images: np.ndarray, batch_size: int, **options: Any
) -> dict[str, float]:
    """Writes WORKDIR/reconstructions.png, and returns PSNR and what the posterior shows, by name.

    `options` are further ones of `pictures.save_reconstructions`.
    """
    key = on_mesh.sampling_key(setting.cfg.seed)
    recon, found = autoencoding.reconstruct(
        setting.vae, vae_params, images, key, batch_size, setting.mesh
    )
    path = f'{setting.workdir}/reconstructions.png'
    pictures.save_reconstructions(path, images, recon, **options)
    scores = {f'vae/{name}': found[name] for name in setting.vae.posterior.shown}
    return {'vae/psnr': tokenizer.psnr(recon, images), **scores}


class _Way(NamedTuple):
    """What is drawn of a small data set, and how it is shown and scored.

    Attributes:
      labels: the label of each sample.
      save: writes a picture of the samples, as save(path, images).
      score: gives the scores of the samples and those of real images.
    """

    labels: np.ndarray
    save: Callable[[str, np.ndarray], None]
    score: Callable[[np.ndarray], dict[str, float]]


def _of_classes(setting: Setting, data: small.DataSet) -> _Way:
    """Samples of all classes in turn, scored by `small_images.Judge`."""
    labels = np.arange(setting.cfg.sampling.num_images) % data.train.num_classes
    titles = class_names.titles(range(data.train.num_classes), data.train.class_names)
    steps = setting.cfg.data.classifier_steps

    def save(path: str, images: np.ndarray) -> None:
        pictures.save_samples(path, images, labels, titles)

    def scores(images: np.ndarray) -> dict[str, float]:
        bar = console.bar(steps, 'training the classifier', 'step')
        classifier = small_images.classifier(data, steps, setting.workdir, bar)
        judge = small_images.Judge(data, classifier)
        return judge.floor(len(images)) | judge.scores(images, labels)

    return _Way(labels, save, scores)


def _of_captions(setting: Setting, data: small.DataSet, run: Run) -> _Way:
    """Samples of composed digits for captions, scored by `composed_digits.Reader`.

    The captions that a model of both directions writes are scored besides.
    """
    wishes = composed_digits.asked(data, setting.cfg.sampling.num_images)
    captions = [wish.caption for wish in wishes]
    labels = build.encode_captions(setting.cfg, captions)
    steps = setting.cfg.data.classifier_steps

    def save(path: str, images: np.ndarray) -> None:
        pictures.save_captioned(path, images, captions)

    def scores(images: np.ndarray) -> dict[str, float]:
        bar = console.bar(steps, 'training the classifier', 'step')
        reader = composed_digits.Reader(data, steps, setting.workdir, bar)
        real = composed_digits.real_images(data)
        found = composed_digits.floor(reader, real)
        found |= composed_digits.scores(reader, data, images, wishes)
        if build.writes_texts(setting.cfg):
            found |= composed_digits.score_captions(run, real, setting.mesh)
        return found

    return _Way(labels, save, scores)


def score(setting: Setting, run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Scores a run on a small data set by its protocol, and writes pictures into the workdir.

    The weights of a classifier that had to be trained are kept in the workdir.

    Args:
      setting: what the parts of the run share.
      run: the models. Without parameters of the AR model samples are left out.

    Returns:
      (metrics by name, seconds by part).
    """
    data = setting.data
    assert data is not None  # by the caller
    sampling = setting.cfg.sampling
    seconds: dict[str, float] = {}
    with console.timed(seconds, 'reconstruction'):
        images = _some_images(data.heldout, _MOST_HELD_OUT)
        columns = min(16, len(images))
        size = sampling.batch_size
        metrics = _reconstruct(setting, run.vae_params, images, size, columns=columns)
    if run.ar_params is None:
        return metrics, seconds

    with console.timed(seconds, 'sampling'):
        print(
            f'sampling {sampling.num_images} images: {sampling.solver}, {sampling.num_steps} '
            f'steps, guidance {sampling.guidance_scale}',
            flush=True,
        )
        if data.kind == 'composed':
            way = _of_captions(setting, data, run)
        else:
            way = _of_classes(setting, data)
        bar = console.bar(sampling.num_images, 'samples')
        samples, _ = on_mesh.draw_images(run, labels=way.labels, progress=bar, **_drawing(setting))
        way.save(f'{setting.workdir}/samples.png', samples)

    with console.timed(seconds, 'scoring'):
        print('scoring', flush=True)
        metrics |= way.score(samples)
    return metrics, seconds


def show(setting: Setting, run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Writes pictures of a run on images that have no protocol of scores here.

    Args:
      setting: what the parts of the run share.
      run: the models. Without parameters of the AR model the grid of samples is left out.

    Returns:
      (metrics by name, seconds by part).
    """
    seconds: dict[str, float] = {}
    metrics: dict[str, float] = {}
    if _has_latents(setting):
        print('latents hold no images: reconstructions and their PSNR are left out', flush=True)
    else:
        with console.timed(seconds, 'reconstruction'):
            images, split = examples(setting)
            metrics = _reconstruct(
                setting,
                run.vae_params,
                images,
                _at_once(images),
                columns=min(8, len(images)),
                title=f'{split} images, cropped at the centre, and decoded',
            )
    if run.ar_params is not None:
        with console.timed(seconds, 'sampling'):
            grid = _grid(setting)
            bar = console.bar(len(grid.labels), 'samples')
            images = _draw_grid(setting, grid, run, progress=bar)
            _save_grid(setting, grid, f'{setting.workdir}/samples.png', images)
    return metrics, seconds
