"""--mode=train: runs the trainings that the config asks for, then samples, scores and reports.

It trains the tokenizer, unless `config.tokenizer` names a trained one, and then the AR model. With
`config.init_from` it distils a head from a finished run instead.
With `config.fine_tuning.init_from` both begin with the weights of another run
(docs/fine_tuning.md).

Dimensions:
  B  images of a batch     H, W, c  an image
"""

import functools
import resource
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, checks, fine_tuning, own, schema
from sphere_ar_jax.data import augment, imagenet, small, sources
from sphere_ar_jax.data.captions import captioned, vocabulary
from sphere_ar_jax.data.captions import table as captions_table
from sphere_ar_jax.evaluation import class_names, page, pictures, small_images, snapshots
from sphere_ar_jax.evaluation.captioned import composed_digits
from sphere_ar_jax.evaluation.fidelity import inception_weights, protocol, statistics
from sphere_ar_jax.interop import shared
from sphere_ar_jax.interop.lpips import check_paths, read
from sphere_ar_jax.runtime import checkpoint, console, files, hosts, metric_writer, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.metric_writer import Logs, MetricWriter
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import adversarial, loop, standardisation
from sphere_ar_jax.training.run import (
    Run,
    check_origin,
    load_config,
    load_run,
    load_teacher,
    load_tokenizer,
    of_rate,
    with_ar,
)
from sphere_ar_jax.training.stages import ar_stage, distillation_stage
from sphere_ar_jax.training.state import Stage, TrainState
from sphere_ar_jax.training.tuning import transfer, tuned
from sphere_ar_jax.training.workdir import claim, is_converted, is_trained, other_model

_T = TypeVar('_T')


class _Data(NamedTuple):
    """The images of a run.

    Attributes:
      source: the images to train on.
      data: the small data set that these belong to, or None.
      heldout: images that are never trained on, or None.
      reading: what else `loop.train` needs to read the source.
      encoded_by: the hash of the tokenizer that latents were encoded with, None for images.
    """

    source: Any
    data: small.DataSet | None
    heldout: Any
    reading: dict[str, Any]
    encoded_by: str | None = None


class _Trained(NamedTuple):
    """The results of the trainings of a run.

    Attributes:
      vae_params: the S-VAE's parameters.
      ar_params: the AR model's parameters, None where none was trained.
      seconds: wall time by stage.
    """

    vae_params: PyTree
    ar_params: PyTree | None
    seconds: dict[str, float]


def _opened(key: str, load: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Calls `load` for the workdir that a key of the config names.

    Errors become UserErrors whose message begins with the key.
    """
    try:
        return load(*arguments, **options)
    except (OSError, ValueError) as error:
        raise UserError(f'{key}: {error}') from None


def _check_finished(key: str, workdir: str) -> None:
    """Raises UserError unless the run in a workdir is finished, or a converted one."""
    if is_converted(workdir):
        return
    if shared.is_shared(workdir):
        raise UserError(
            f'{key}: {workdir} holds shared weights: convert them into a workdir first, by '
            f'{shared.how_to_convert(workdir)}'
        )
    has_ended = epath.Path(workdir, 'metrics.json').exists()
    # A run that is prolonged has ended before.
    if not has_ended or not all(is_trained(workdir, stage) for stage in ('tokenizer', 'ar')):
        raise UserError(f'{key}: {workdir} is not finished: run its own command to the end first')


def _check_vocabulary(key: str, origin: str, theirs: ConfigDict, cfg: ConfigDict) -> None:
    """Raises UserError where a run that is gone on from numbers the words of texts otherwise."""
    if cfg.ar.condition != 'text':
        return
    if not vocabulary.are_same(theirs.ar.vocabulary, cfg.ar.vocabulary):
        raise UserError(
            f'{key}: {origin} has another vocabulary: give --config.ar.vocabulary='
            f'{theirs.ar.vocabulary}'
        )


def _check_base(cfg: ConfigDict) -> None:
    """Checks that the run in cfg.fine_tuning.init_from can be trained on.

    Raises:
      UserError: its head is distilled, or its models are others than cfg's.
    """
    key = 'fine_tuning.init_from'
    origin = cfg.fine_tuning.init_from
    theirs = _opened(key, load_config, origin)
    if theirs.init_from is not None:
        raise UserError(f'{key}: {origin} has a distilled head: take the run that trained it')
    found = schema.differences(schema.as_dict(theirs), schema.as_dict(cfg))
    changed = [difference for difference in found if difference.startswith(('vae.', 'ar.'))]
    if changed:
        raise UserError(
            f'{key}: {origin} has other models ({"; ".join(changed)}): only the classes may differ'
        )
    _check_vocabulary(key, origin, theirs, cfg)


class _Base(NamedTuple):
    """A run that is trained on.

    Attributes:
      run: its models.
      rows: for each new class the class of the run whose tokens it takes, see `transfer.origins`.
        None where the model reads texts, whose tokens stay.
    """

    run: Run
    rows: list[int | None] | None


def _base(cfg: ConfigDict, workdir: str, source: Any, mesh: Mesh) -> _Base | None:
    """Reads the run in cfg.fine_tuning.init_from.

    Returns:
      The run, or None where there is none to take, or the workdir has its weights already.

    Raises:
      UserError: it cannot be read or cannot be trained on, or a pattern matches nothing.
    """
    origin = cfg.fine_tuning.init_from
    if origin is None or transfer.is_done(workdir):
        return None
    _check_base(cfg)
    shapes = jax.eval_shape(build.build_ar(cfg).init_params, jax.random.key(0))
    tuned.select(shapes, fine_tuning.read(cfg.fine_tuning))
    tokenizer = _opened('fine_tuning.init_from', load_run, origin, mesh, tokenizer_only=True)
    whole = _opened('fine_tuning.init_from', with_ar, tokenizer, origin, mesh)
    # The tokenizer without the statistics of its latents, which are a file of their own.
    run = whole._replace(vae_params=tokenizer.vae_params)
    if build.has_captions(cfg):
        return _Base(run, None)
    old = class_names.of_run(origin, whole.config)
    new = getattr(source, 'class_names', None)
    known = schema.num_classes(whole.config)
    count = schema.num_classes(cfg)
    assert known is not None
    assert count is not None
    return _Base(run, transfer.origins(old, new, known, count))


def _take(cfg: ConfigDict, workdir: str, source: Any, mesh: Mesh, base: _Base) -> None:
    """Writes the weights of a run that is trained on into the workdir, and says what is new."""
    origin = cfg.fine_tuning.init_from
    transfer.take(workdir, base.run, origin, base.rows, mesh, tokenizer=cfg.tokenizer is None)
    names = getattr(source, 'class_names', None)
    print(f'weights of {origin}; {transfer.describe(base.rows, names)}', flush=True)


def _teacher(cfg: ConfigDict, mesh: Mesh) -> Run:
    """The run in cfg.init_from, which a head is distilled from.

    Raises:
      UserError: there is no run, its model is not cfg's own, or it is distilled itself.
    """
    teacher = _opened('init_from', load_teacher, cfg, mesh)
    if is_converted(cfg.init_from):
        # A converted run's config does not tell its data and seed, so only the models are compared.
        changed = other_model(teacher.config, cfg)
    else:
        found = schema.differences(schema.as_dict(teacher.config), schema.as_dict(cfg))
        changed = [d for d in found if d.startswith(('vae.', 'ar.', 'data.', 'seed '))]
    if changed:
        raise UserError(
            f'{cfg.init_from} has another model ({"; ".join(changed)}): '
            'a head is distilled from its own'
        )
    _check_vocabulary('init_from', cfg.init_from, teacher.config, cfg)
    return teacher


def _check_labels(cfg: ConfigDict, train: small.Split) -> None:
    """Raises UserError unless every class of a small data set gets a sample to be scored."""
    if cfg.sampling.num_images < train.num_classes:
        raise UserError(
            f'sampling.num_images is {cfg.sampling.num_images}, '
            f'but must be at least one for each of {train.num_classes} classes'
        )


def _with_captions(cfg: ConfigDict, data: _Data) -> _Data:
    """Makes labels of the images' captions, where the AR model reads texts.

    Raises:
      UserError: the images have no captions.
    """
    if not build.has_captions(cfg):
        return data
    captioned.first_caption(data.source, f'data {cfg.data.name}')
    transform = build.captioning(cfg, data.reading.get('transform'))
    heldout = data.heldout
    if heldout is not None:
        heldout = captioned.FirstCaption(heldout, build.caption_encoder(cfg))
    return data._replace(heldout=heldout, reading=data.reading | {'transform': transform})


def _open_data(cfg: ConfigDict) -> _Data:
    """Opens the training images, with the captions that the model reads.

    The arguments and errors are those of `_open_images`, and images must have the captions.
    """
    return _with_captions(cfg, _open_images(cfg))


def _open_images(cfg: ConfigDict) -> _Data:
    """Opens the training images.

    Where neither the config nor the kind of data says how many classes there are, this sets
    cfg.data.num_classes to the number found.

    Raises:
      UserError: there are no images, or they have more classes than the model.
    """
    d = cfg.data
    if d.name in small.KINDS:
        data = build.open_data_set(cfg)
        build.count_classes(cfg, data.train)
        checks.check_image_shape(d.name, data.train.image_shape, build.build_vae(cfg).image_shape)
        _check_labels(cfg, data.train)
        return _Data(data.train, data, data.heldout, {})
    if d.path is None:
        raise UserError(f'give --config.data.path, of the {d.name} data')
    source = build.open_files(cfg, console.bar(None, 'reading the tar', 'byte'))
    if isinstance(source, sources.Latents):
        training, heldout = sources.split(source, d.holdout_files)
        reading = dict(workers=d.workers, threads=d.threads)
        return _Data(training, None, heldout, reading, source.tokenizer)
    size, _, channels = build.build_vae(cfg).image_shape
    decay_from, decay_to = d.crop_until
    # The exact recipe of ImageNet knows neither EXIF nor transparency.
    as_stored = imagenet.are_synsets(source.class_names)
    reading = dict(
        transform=augment.Augmentation(
            size, decay_from, decay_to, d.draft, as_stored, channels, d.flip
        ),
        workers=d.workers,
        threads=d.threads,
        max_broken=d.max_broken,
    )
    training, heldout = sources.split(source, d.holdout_files)
    return _Data(training, None, heldout, reading)


def _check_latents(cfg: ConfigDict, encoded_by: str | None, vae_params: PyTree) -> None:
    """Raises UserError where latents were encoded by another tokenizer than the run's.

    `encoded_by` is None where there are images.
    """
    if encoded_by is None:
        return
    trained = {name: value for name, value in vae_params.items() if name != 'statistics'}
    if checkpoint.digest(trained) != encoded_by:
        raise UserError(
            f'{cfg.data.path} was encoded with another tokenizer than that of this run: encode the '
            'images again by --mode=encode, with the --workdir that --config.tokenizer names'
        )


def _run(
    setting: snapshots.Setting,
    reading: dict[str, Any],
    stage: Stage,
    look: Callable[[int, PyTree, MetricWriter], None],
    rate: float | None = None,
) -> tuple[PyTree, float]:
    """Runs one stage by `loop.train`. Returns (its parameters at the end, wall time in seconds).

    `reading` comes from `_open_data`. `look` is called every `cfg.watch.every` steps with the step,
    the parameters and a writer, and then the held-out images are looked at. `rate` is that of the
    EMA whose parameters are taken, see `run.of_rate`.
    """
    taken = of_rate(stage.options, rate)
    every = setting.cfg.watch.every
    held = snapshots.held_out(setting, stage) if every else None

    def look_at_all(step: int, state: TrainState, writer: MetricWriter) -> None:
        params = taken(state)
        look(step, params, writer)
        if held is not None:
            snapshots.look_at_heldout(held, params, step, writer)

    state, seconds = loop.train(
        stage,
        setting.source,
        f'{setting.workdir}/{stage.name}',
        seed=setting.cfg.seed,
        mesh=setting.mesh,
        reading=reading,
        watch=loop.Watch(every, look_at_all) if every else None,
        logs=setting.logs,
    )
    return taken(state), seconds


def _distillation(setting: snapshots.Setting, teacher: Run) -> Stage:
    """The training of a head that is distilled from a teacher."""
    cfg = setting.cfg
    parameters = (teacher.vae_params, teacher.ar_params)
    options = cfg.distillation_training
    return distillation_stage(setting.ar, setting.vae, *parameters, options, cfg.seed)


def _distil(
    setting: snapshots.Setting, reading: dict[str, Any], encoded_by: str | None, teacher: Run
) -> _Trained:
    """Distils a teacher's head (docs/method.md, "Mean-velocity distillation").

    The arguments are those of `_train`.
    """
    _check_latents(setting.cfg, encoded_by, teacher.vae_params)
    stage = _distillation(setting, teacher)
    directory = f'{setting.workdir}/distillation'

    def with_head(head: PyTree) -> PyTree:
        return teacher.ar_params | {'head': head}

    def look(step: int, head: PyTree, writer: MetricWriter) -> None:
        snapshots.look_at_samples(
            setting, teacher.vae_params, with_head(head), directory, step, writer
        )

    head, seconds = _run(setting, reading, stage, look)
    return _Trained(teacher.vae_params, with_head(head), {'distillation': seconds})


def _train_tokenizer(
    setting: snapshots.Setting, reading: dict[str, Any], lpips: PyTree | None
) -> tuple[PyTree, float]:
    """Trains the tokenizer. Returns (its parameters, wall time in seconds)."""
    stage = adversarial.tokenizer_stage(
        setting.vae, setting.cfg.tokenizer_training, setting.cfg.seed, lpips
    )
    images: Any = None  # read only where they are looked at
    if setting.cfg.watch.every and setting.cfg.tokenizer_training.steps:
        images = snapshots.examples(setting)

    def look(step: int, params: PyTree, writer: MetricWriter) -> None:
        snapshots.look_at_reconstructions(setting, params, images, step, writer)

    return _run(setting, reading, stage, look)


def _ar_stage(setting: snapshots.Setting, vae_params: PyTree) -> Stage:
    """The training of the AR model, of all of it or as a fine-tuning asks."""
    cfg = setting.cfg
    choose_remat = cfg.ar.remat is None
    stage = ar_stage(setting.ar, setting.vae, vae_params, cfg.ar_training, cfg.seed, choose_remat)
    tuning = fine_tuning.read(cfg.fine_tuning)
    return tuned.of_workdir(stage, tuning, f'{setting.workdir}/ar', setting.mesh, cfg.seed)


def _train(
    setting: snapshots.Setting,
    reading: dict[str, Any],
    encoded_by: str | None,
    tokenizer: PyTree | None,
    lpips: PyTree | None,
) -> _Trained:
    """Trains the tokenizer and the AR model, as far as the config asks for them.

    Args:
      setting: what the parts of the run share.
      reading: how the images are read, see `_open_data`.
      encoded_by: see `_Data`.
      tokenizer: the parameters of a trained tokenizer to use, or None to train one.
      lpips: LPIPS' parameters, or None where the tokenizer is trained without.
    """
    seconds = {}
    vae_params = tokenizer
    if tokenizer is None:
        vae_params, seconds['tokenizer'] = _train_tokenizer(setting, reading, lpips)
    if not setting.cfg.ar_training.steps:
        return _Trained(vae_params, None, seconds)
    _check_latents(setting.cfg, encoded_by, vae_params)
    vae_params = standardisation.add(
        setting.vae,
        vae_params,
        setting.source,
        setting.workdir,
        seed=setting.cfg.seed,
        batch_size=setting.cfg.ar_training.batch_size,
        mesh=setting.mesh,
        reading=reading,
    )
    stage = _ar_stage(setting, vae_params)
    directory = f'{setting.workdir}/ar'

    def look(step: int, params: PyTree, writer: MetricWriter) -> None:
        ar_params = stage.to_model(params)
        snapshots.look_at_samples(setting, vae_params, ar_params, directory, step, writer)

    rate = setting.cfg.sampling.ema_decay
    params, seconds['ar'] = _run(setting, reading, stage, look, rate)
    return _Trained(vae_params, stage.to_model(params), seconds)


def _summary(setting: snapshots.Setting, metrics: dict[str, float]) -> str:
    """The result of a run, in a few sentences for report.html."""
    cfg = setting.cfg
    if 'vae/psnr' not in metrics:
        return 'The AR model was trained on latents. Scores: --mode=sample, then --mode=evaluate.'
    psnr = f'{metrics["vae/psnr"]:.1f} dB'
    which = 'training' if setting.heldout is None else 'held-out'
    if setting.data is None:
        if not cfg.ar_training.steps:
            ways = (
                '--mode=evaluate --images=NPZ. '
                'An AR model on it: another --workdir, and --config.tokenizer with this one.'
            )
        else:
            prompts = ' --prompts=FILE' if build.has_captions(cfg) else ''
            ways = f'--mode=sample{prompts}, then --mode=evaluate with Inception weights.'
            if setting.source.num_classes > 1:
                ways = f'--mode=evaluate, by a classifier of the classes; or {ways}'
        return f'The tokenizer gives {which} images back at {psnr}. Scores: {ways}'
    noun = small.KINDS[setting.data.kind].noun
    if 'samples/seen' in metrics:
        return composed_digits.summary(cfg.sampling.num_images, metrics)
    if 'samples/accuracy' not in metrics:
        return f'The tokenizer gives held-out {noun} back at {psnr}.'
    return small_images.summary(noun, cfg.sampling.num_images, metrics)


def _with_lpips(cfg: ConfigDict) -> bool:
    """Whether a tokenizer is to be trained with LPIPS."""
    t = cfg.tokenizer_training
    return bool(t.steps and t.perceptual_weight and cfg.tokenizer is None and cfg.init_from is None)


def _check_origin(key: str, directory: str, workdir: str | None) -> None:
    """Checks that a run that the config names can be read, and is trained to its end.

    Args:
      key: the key that names it.
      directory: its workdir.
      workdir: that of the training, None where not known.
    """
    if workdir is not None and files.is_same(directory, workdir):
        raise UserError(f'{key}: {directory} is this --workdir: give another --workdir')
    _opened(key, load_config, directory)
    if key != 'tokenizer':
        _check_finished(key, directory)
    elif not is_trained(directory, 'tokenizer'):
        raise UserError(
            f'tokenizer: that in {directory} is not trained to its end: run its own command first'
        )


def check_inputs(cfg: ConfigDict, workdir: str | None) -> list[str]:
    """Checks that a training finds what it reads besides images.

    That is a tokenizer, a teacher, the run that it is fine-tuned from, features of texts, and the
    files of LPIPS.

    Args:
      cfg: a checked config.
      workdir: the directory of the run, None where not known.

    Returns:
      The paths of what is read.

    Raises:
      UserError: something is missing or cannot be used.
    """
    is_taken = workdir is not None and transfer.is_done(workdir)
    places = {
        'tokenizer': cfg.tokenizer,
        'init_from': cfg.init_from,
        'fine_tuning.init_from': None if is_taken else cfg.fine_tuning.init_from,
    }
    is_here = workdir is not None and epath.Path(workdir, 'tokenizer', 'weights').is_dir()
    if not (any(places.values()) or cfg.tokenizer_training.steps or is_here):
        raise UserError(
            'tokenizer_training.steps is 0, but no tokenizer was converted into the workdir: give '
            '--config.tokenizer=DIR, the workdir of a trained or converted one'
        )
    found = [directory for directory in places.values() if directory is not None]
    for name, directory in places.items():
        if directory is not None:
            _check_origin(name, directory, workdir)
    if build.reads_features(cfg):
        build.open_features(cfg)
        found.append(cfg.ar.features)
    if _with_lpips(cfg):
        weights = (cfg.tokenizer_training.lpips, cfg.tokenizer_training.vgg)
        check_paths(*weights)
        found += weights
    return found


def _check_parts(cfg: ConfigDict, workdir: str, mesh: Mesh) -> None:
    """Checks that these devices can run the trainings, and their inputs as `check_inputs` does."""
    checks.check_training(cfg)
    for name in checks.trainings(cfg):
        options = cfg[name]
        why = sharding.misfit(mesh, options.batch_size, options.accumulate)
        if why:
            raise UserError(f'{name}.batch_size: {why}')
    check_inputs(cfg, workdir)


def _tokenizer(cfg: ConfigDict, mesh: Mesh) -> PyTree | None:
    """The parameters of the tokenizer in cfg.tokenizer, None where the config names none.

    Raises:
      UserError: there is no such run, or its tokenizer is not cfg's own model.
    """
    if cfg.tokenizer is None:
        return None
    return _opened('tokenizer', load_tokenizer, cfg, mesh)


def _lpips(cfg: ConfigDict, mesh: Mesh) -> PyTree | None:
    """LPIPS' parameters, on all devices, or None where no tokenizer is trained with them."""
    if not _with_lpips(cfg):
        return None
    t = cfg.tokenizer_training
    return jax.device_put(read(t.lpips, t.vgg), sharding.whole(mesh))


def _judge(cfg: ConfigDict) -> tuple[PyTree, Any] | None:
    """What computes FID while training, or None where it is not asked for.

    Returns:
      (Inception's parameters, `statistics.Statistics` of the reference).
    """
    w = cfg.watch
    if not (w.every and w.fid_images):
        return None
    network = inception_weights.load(w.inception)
    progress = functools.partial(console.bars(), 'reference')
    reference = protocol.summarize(w.reference, network, progress=progress)
    protocol.warn({'note': statistics.note(w.fid_images, reference.images)})
    return network, reference.pool


# Keys that may hold a path, which may be another one on another machine.
_PATHS = (
    'init_from', 'tokenizer', 'fine_tuning.init_from', 'ar.features',
    'data.path', 'data.data_dir', 'data.captions',
    'tokenizer_training.lpips', 'tokenizer_training.vgg', 'watch.inception', 'watch.reference',
)  # fmt: skip
# Further keys that processes on different machines may set each in its own way.
_OF_MACHINES = ('reasons', 'data.threads', 'data.workers', 'ar.vocabulary')


def _check_same(cfg: ConfigDict, source: Any) -> None:
    """Raises UserError unless all processes of the run have the same config and the same images."""
    values = schema.leaves(schema.as_dict(cfg))
    for key in _OF_MACHINES:
        values.pop(key, None)
    for key in _PATHS:
        values[key] = values[key] is not None
    values['the number of images'] = len(source)
    # A single class has the name of its directory, which may lie elsewhere on another machine.
    names = getattr(source, 'class_names', None) or ()
    values['the names of classes'] = names if len(names) > 1 else ()
    read: Any = None
    if hosts.count() > 1 and build.has_captions(cfg):
        encode = build.caption_encoder(cfg)
        looked = captioned.look(source, captioned.LOOKED_AT, encode)
        read = ([encode(text).tobytes() for text in looked.texts], looked.broken)
    # All processes must have as many values, also where one of them has another kind of model.
    values['what the model reads of captions'] = read
    sums = [zlib.crc32(repr(value).encode()) for value in values.values()]
    keys = list(values)
    differing = sorted(keys[i] for i in hosts.differing(sums))
    if differing:
        some = ', '.join(differing[:4])
        raise UserError(
            f'the processes of this run differ in {some}: start all of them by the same command, '
            'with the same images'
        )


def with_absolute_paths(cfg: ConfigDict) -> ConfigDict:
    """A copy of a config with paths from the root, which hold in any directory.

    The names of data sets that are no paths stay as they are.
    """
    values = schema.leaves(schema.as_dict(cfg))
    named = set()
    if sources.is_name(cfg.data.name, cfg.data.path):
        named.add('data.path')
    if cfg.data.captions == captions_table.BESIDE:
        named.add('data.captions')
    paths = {key: files.absolute(values[key]) for key in _PATHS if values[key] and key not in named}
    return schema.changed(cfg, paths)


def _set_up(
    cfg: ConfigDict, workdir: str
) -> tuple[snapshots.Setting, Callable[[snapshots.Setting], _Trained]]:
    """Checks everything that can be checked before a training, and claims the workdir.

    Returns:
      (what the parts of the run share, a function of it that runs the trainings).
    """
    metric_writer.require(cfg.logging)
    cfg = with_absolute_paths(cfg)
    mesh = sharding.make_mesh(**cfg.mesh)
    source, data, heldout, reading, encoded_by = _open_data(cfg)
    # Processes that read other weights would wait for each other without end.
    _check_same(cfg, source)
    _check_parts(cfg, workdir, mesh)
    stages: functools.partial[_Trained]
    if cfg.init_from is None:
        tokenizer = _tokenizer(cfg, mesh)
        lpips = _lpips(cfg, mesh)
        stages = functools.partial(_train, tokenizer=tokenizer, lpips=lpips)
    else:
        stages = functools.partial(_distil, teacher=_teacher(cfg, mesh))
    stages = functools.partial(stages, reading=reading, encoded_by=encoded_by)
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)
    setting = snapshots.Setting(cfg, workdir, mesh, vae, ar, source, data, _judge(cfg), heldout)
    base = _base(cfg, workdir, source, mesh)
    if epath.Path(workdir, 'config.json').exists():
        _check_moved(setting, load_config(workdir), stages.keywords)
    if build.has_captions(cfg):
        print('\n'.join(describe_captions(cfg, source)), flush=True)
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    # Last, so that a config that was refused leaves the workdir free.
    claim(cfg, workdir)
    if base is not None:
        _take(cfg, workdir, source, mesh, base)
    return setting, stages


def _check_moved(
    setting: snapshots.Setting, before: ConfigDict, given: Mapping[str, PyTree]
) -> None:
    """Checks that a tokenizer or a teacher of another path is the one that a run was begun on.

    This comes before config.json names the new path.

    Args:
      setting: what the parts of the run share.
      before: the run's own config.
      given: the parameters of the `tokenizer` and the run of the `teacher`, where there are some.

    Raises:
      UserError: it is another one.
    """
    cfg = setting.cfg
    if (before.tokenizer, before.init_from) == (cfg.tokenizer, cfg.init_from):
        return
    teacher = given.get('teacher')
    tokenizer = given.get('tokenizer') if before.tokenizer is not None else None
    if teacher is not None:
        check_origin(_distillation(setting, teacher), setting.workdir, setting.mesh)
    elif tokenizer is not None and epath.Path(setting.workdir, 'ar', 'checkpoints').is_dir():
        vae_params = standardisation.read(setting.vae, tokenizer, setting.workdir)
        check_origin(_ar_stage(setting, vae_params), setting.workdir, setting.mesh)


def describe_captions(cfg: ConfigDict, source: Any) -> list[str]:
    """Reads some captions and says in lines what the first one is, and which are broken or cut off.

    Args:
      cfg: a checked config whose AR model reads texts.
      source: images whose records have captions.

    Raises:
      UserError: there are none, or more are broken than `data.max_broken` lets pass.
    """
    first = captioned.first_caption(source, f'data {cfg.data.name}')
    said = [f"captions, the first one: '{console.printable(first, 80)}'"]
    looked = captioned.look(source, captioned.LOOKED_AT, build.caption_encoder(cfg))
    most = cfg.data.max_broken
    # Three standard deviations more may be chance.
    if looked.broken > most + 3 * (most / looked.images) ** 0.5:
        raise UserError(
            f'{looked.broken:.1%} of the captions that were looked at are broken, more than '
            f'data.max_broken = {most}: {looked.reasons[0]}'
        )
    if looked.reasons:
        said.append(f'other images take the place of broken captions, as: {looked.reasons[0]}')
    if not build.reads_features(cfg):
        cut = vocabulary.describe_cut(
            looked.all_texts, build.open_vocabulary(cfg), cfg.ar.text_tokens
        )
        said += [cut] if cut else []
    return said


def _introduce(setting: snapshots.Setting) -> None:
    """Says what a run is trained on, and keeps the names of its classes in the workdir.

    Raises:
      UserError: the run was begun with other classes.
    """
    source = setting.source
    names = getattr(source, 'class_names', None)
    if setting.cfg.ar_training.steps or setting.cfg.init_from is not None:
        class_names.keep(setting.workdir, names)
    if setting.cfg.ar.condition == 'text':
        vocabulary.keep(setting.cfg.ar.vocabulary, setting.workdir)
    held = '' if setting.heldout is None else f', {len(setting.heldout)} held out'
    platform = jax.devices()[0].platform
    print(f'{len(source)} training images{held}; {setting.mesh.size} {platform} device(s)')
    if not build.has_captions(setting.cfg):
        print(class_names.describe(source.num_classes, names), flush=True)
    left_out = getattr(source, 'left_out', '')
    if left_out:
        print(f'left out: {left_out}', flush=True)


def _as_text(cfg: ConfigDict) -> str:
    """A config as text, with the reasons of its derived values as plain lines in front."""
    values = schema.changed(cfg, {'reasons': ()})
    return '\n'.join([*own.lines(cfg), str(values)])


def train(cfg: ConfigDict, workdir: str, command: str, started: float) -> dict[str, float]:
    """Runs the trainings, then evaluates and reports.

    Each part goes on where an earlier run in the workdir stopped.

    Args:
      cfg: a checked config.
      workdir: an absolute path; made if needed.
      command: what report.html says to type.
      started: `time.perf_counter()` at the start of the process.

    Returns:
      The metrics, as written to WORKDIR/metrics.json.

    Raises:
      UserError: something that the user can put right, as another run in the workdir; one line.
      OSError: likewise.
    """
    with files.owned(workdir, 'a training'):
        return _train_alone(cfg, workdir, command, started)


def _train_alone(cfg: ConfigDict, workdir: str, command: str, started: float) -> dict[str, float]:
    """Does what `train` says, in a workdir that is locked."""
    try:
        setting, stages = _set_up(cfg, workdir)
    except (OSError, ValueError) as error:
        raise UserError(console.said(error)) from None
    _introduce(setting)
    cfg = setting.cfg
    for line in (*own.lines(cfg), *checks.advice(cfg, len(setting.source))):
        print(line, flush=True)
    with Logs.opened(cfg.logging, workdir, schema.as_dict(cfg)) as logs:
        return _run_all(setting._replace(logs=logs), stages, command, started)


def _run_all(
    setting: snapshots.Setting,
    stages: Callable[[snapshots.Setting], _Trained],
    command: str,
    started: float,
) -> dict[str, float]:
    """Runs the trainings, then evaluates and reports; see `train`."""
    cfg = setting.cfg
    workdir = setting.workdir
    seconds = {'start': time.perf_counter() - started}
    trained = stages(setting)
    seconds |= trained.seconds
    finish = snapshots.show if setting.data is None else snapshots.score
    metrics, parts = finish(setting, trained.vae_params, trained.ar_params)
    seconds |= parts
    mark = time.perf_counter()
    posterior = setting.vae.posterior
    page.save_curves(f'{workdir}/curves.png', workdir, posterior)
    seconds['curves'] = time.perf_counter() - mark
    metrics |= {f'wall_s/{name}': round(value, 1) for name, value in seconds.items()}
    metrics['wall_s/total'] = round(sum(seconds.values()), 1)
    metrics['peak_rss_mb'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    files.write_json(f'{workdir}/metrics.json', metrics)
    final = pictures.read_all(workdir, ('samples', 'reconstructions'))
    setting.logs.conclude(workdir, metrics, _as_text(cfg), final)
    summary = _summary(setting, metrics)
    page.save_page(workdir, cfg.data.name, summary, metrics, _as_text(cfg), command, posterior)
    print(f'{summary}\nlook at {workdir}/report.html; all numbers: {workdir}/metrics.json')
    return metrics
