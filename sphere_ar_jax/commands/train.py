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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.commands.inputs import agreement, origins, training_images
from sphere_ar_jax.config import build, checks, fine_tuning, own, schema
from sphere_ar_jax.data import small
from sphere_ar_jax.data.captions import vocabulary
from sphere_ar_jax.evaluation import class_names, page, pictures, small_images, snapshots
from sphere_ar_jax.evaluation.captioned import composed_digits
from sphere_ar_jax.evaluation.fidelity import inception_weights, protocol, statistics
from sphere_ar_jax.runtime import console, files, hosts, metric_writer, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.metric_writer import Logs, MetricWriter
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import adversarial, loop, standardisation
from sphere_ar_jax.training.run import (
    Run,
    check_origin,
    load_config,
    of_rate,
)
from sphere_ar_jax.training.stages import ar_stage, distillation_stage, student_params
from sphere_ar_jax.training.state import Stage, TrainState
from sphere_ar_jax.training.tuning import tuned
from sphere_ar_jax.training.workdir import check_claim, claim


class _Trained(NamedTuple):
    """The results of the trainings of a run.

    Attributes:
      run: the models. The AR model's parameters are None where none was trained.
      seconds: wall time by stage.
    """

    run: Run
    seconds: dict[str, float]


class _Start(NamedTuple):
    """What the trainings of a run start from.

    Attributes:
      tokenizer: parameters of a trained tokenizer, None where one is trained.
      lpips: LPIPS' parameters, None where no tokenizer is trained with them.
      teacher: the run whose head is distilled, None where none is.
    """

    tokenizer: PyTree | None = None
    lpips: PyTree | None = None
    teacher: Run | None = None


def _run_stage(
    setting: snapshots.Setting,
    stage: Stage,
    look: Callable[[int, PyTree, MetricWriter], None],
    rate: float | None = None,
) -> tuple[PyTree, float]:
    """Runs one stage by `loop.train`. Returns (its parameters at the end, wall time in seconds).

    `look` is called every `cfg.watch.every` steps with the step, the parameters and a writer, and
    then the held-out images are looked at. `rate` is that of the EMA whose parameters are taken,
    see `run.of_rate`.
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
        reading=setting.reading,
        watch=loop.Watch(every, look_at_all) if every else None,
        logs=setting.logs,
    )
    return taken(state), seconds


def _run(setting: snapshots.Setting, vae_params: PyTree, ar_params: PyTree) -> Run:
    """The setting's models with parameters, None for those of an AR model that is not trained."""
    return Run(setting.cfg, setting.vae, vae_params, setting.ar, ar_params)


def _distillation(setting: snapshots.Setting, teacher: Run) -> Stage:
    """The training of a head that is distilled from a teacher."""
    cfg = setting.cfg
    parameters = (teacher.vae_params, teacher.ar_params)
    return distillation_stage(setting.ar, setting.vae, *parameters, cfg.distillation_training)


def _distil(setting: snapshots.Setting, teacher: Run) -> _Trained:
    """Distils a teacher's head (docs/method.md, "Mean-velocity distillation")."""
    training_images.check_latents(setting.cfg, setting.encoded_by, teacher.vae_params)
    stage = _distillation(setting, teacher)
    directory = f'{setting.workdir}/distillation'

    def student(trained: PyTree) -> Run:
        options = setting.cfg.distillation_training
        return _run(
            setting, teacher.vae_params, student_params(teacher.ar_params, trained, options)
        )

    def look(step: int, trained: PyTree, writer: MetricWriter) -> None:
        snapshots.look_at_samples(setting, student(trained), directory, step, writer)

    trained, seconds = _run_stage(setting, stage, look, setting.cfg.sampling.ema_decay)
    return _Trained(student(trained), {'distillation': seconds})


def _train_tokenizer(setting: snapshots.Setting, lpips: PyTree | None) -> tuple[PyTree, float]:
    """Trains the tokenizer. Returns (its parameters, wall time in seconds)."""
    stage = adversarial.tokenizer_stage(setting.vae, setting.cfg.tokenizer_training, lpips)
    images: Any = None  # read only where they are looked at
    if setting.cfg.watch.every and setting.cfg.tokenizer_training.steps:
        images = snapshots.examples(setting).images

    def look(step: int, params: PyTree, writer: MetricWriter) -> None:
        snapshots.look_at_reconstructions(setting, params, images, step, writer)

    return _run_stage(setting, stage, look)


def _ar_stage(setting: snapshots.Setting, vae_params: PyTree) -> Stage:
    """The training of the AR model, of all of it or as a fine-tuning asks."""
    cfg = setting.cfg
    choose_remat = cfg.ar.remat is None
    stage = ar_stage(setting.ar, setting.vae, vae_params, cfg.ar_training, choose_remat)
    tuning = fine_tuning.read(cfg.fine_tuning)
    return tuned.of_workdir(stage, tuning, f'{setting.workdir}/ar', setting.mesh)


def _train(setting: snapshots.Setting, start: _Start) -> _Trained:
    """Trains the tokenizer and the AR model, as far as the config asks for them."""
    seconds = {}
    vae_params = start.tokenizer
    if vae_params is None:
        vae_params, seconds['tokenizer'] = _train_tokenizer(setting, start.lpips)
    if not setting.cfg.ar_training.steps:
        return _Trained(_run(setting, vae_params, None), seconds)
    training_images.check_latents(setting.cfg, setting.encoded_by, vae_params)
    vae_params = standardisation.add(
        setting.vae,
        vae_params,
        setting.source,
        setting.workdir,
        seed=setting.cfg.seed,
        batch_size=setting.cfg.ar_training.batch_size,
        mesh=setting.mesh,
        reading=setting.reading,
    )
    stage = _ar_stage(setting, vae_params)
    directory = f'{setting.workdir}/ar'

    def with_params(params: PyTree) -> Run:
        return _run(setting, vae_params, stage.to_model(params))

    def look(step: int, params: PyTree, writer: MetricWriter) -> None:
        snapshots.look_at_samples(setting, with_params(params), directory, step, writer)

    params, seconds['ar'] = _run_stage(setting, stage, look, setting.cfg.sampling.ema_decay)
    return _Trained(with_params(params), seconds)


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


def _check_parts(cfg: ConfigDict, workdir: str, mesh: Mesh) -> None:
    """Checks that these devices can run the trainings, and what they read besides images."""
    checks.check_training(cfg)
    for name in checks.trainings(cfg):
        options = cfg[name]
        why = sharding.misfit(mesh, options.batch_size, options.accumulate)
        if why:
            raise UserError(f'{name}.batch_size: {why}')
    origins.check_inputs(cfg, workdir)


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


def _read_start(cfg: ConfigDict, mesh: Mesh) -> _Start:
    """Reads what the trainings of a config start from. Raises UserError where it cannot be read."""
    if cfg.init_from is not None:
        return _Start(teacher=origins.read_teacher(cfg, mesh))
    return _Start(origins.read_tokenizer(cfg, mesh), origins.read_lpips(cfg, mesh))


def _set_up(cfg: ConfigDict, workdir: str) -> tuple[snapshots.Setting, _Start]:
    """Checks everything that can be checked before a training, and claims the workdir.

    Returns:
      (what the parts of the run share, what its trainings start from).
    """
    metric_writer.require(cfg.logging)
    cfg = agreement.with_absolute_paths(cfg)
    mesh = sharding.make_mesh(**cfg.mesh)
    images = training_images.open_data(cfg)
    # Processes that read other weights would wait for each other without end.
    agreement.check_same(cfg, images.source)
    _check_parts(cfg, workdir, mesh)
    start = _read_start(cfg, mesh)
    setting = snapshots.Setting(
        cfg,
        workdir,
        mesh,
        build.build_vae(cfg),
        build.build_ar(cfg),
        images.source,
        data=images.data,
        judge=_judge(cfg),
        heldout=images.heldout,
        reading=images.reading,
        encoded_by=images.encoded_by,
    )
    check_claim(cfg, workdir)
    _check_moved(setting, start)
    base = origins.read_base(cfg, workdir, images.source, mesh)
    if build.has_captions(cfg):
        print('\n'.join(training_images.describe_captions(cfg, images.source)), flush=True)
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    # Last, so that a config that was refused leaves the workdir free.
    claim(cfg, workdir)
    if base is not None:
        origins.take_base(cfg, workdir, images.source, mesh, base)
    return setting, start


def _has_moved(cfg: ConfigDict, workdir: str) -> bool:
    """Whether a run that has trained on a tokenizer or a teacher is given one of another path."""
    if not epath.Path(workdir, 'config.json').exists():
        return False
    before = load_config(workdir)
    if before.init_from is not None:
        return (before.init_from, before.tokenizer) != (cfg.init_from, cfg.tokenizer)
    has_trained = epath.Path(workdir, 'ar', 'checkpoints').is_dir()
    return has_trained and before.tokenizer not in (None, cfg.tokenizer)


def _check_moved(setting: snapshots.Setting, start: _Start) -> None:
    """Checks that a tokenizer or a teacher of another path is the one that a run was begun on.

    This comes before config.json names the new path. All processes call it. Where they name
    different paths, all of them check.

    Raises:
      UserError: it is another one.
    """
    if not hosts.largest(int(_has_moved(setting.cfg, setting.workdir))):
        return
    if start.teacher is not None:
        stage = _distillation(setting, start.teacher)
    else:
        vae_params = standardisation.read(setting.vae, start.tokenizer, setting.workdir)
        stage = _ar_stage(setting, vae_params)
    check_origin(stage, setting.workdir, setting.mesh)


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
        try:
            setting, start = _set_up(cfg, workdir)
        except (OSError, ValueError) as error:
            may_pass = files.may_pass(error)
            raise console.refusal(console.said(error), may_pass=may_pass) from None
        _introduce(setting)
        cfg = setting.cfg
        for line in (*own.lines(cfg), *checks.advice(cfg, len(setting.source))):
            print(line, flush=True)
        with Logs.opened(cfg.logging, workdir, schema.as_dict(cfg)) as logs:
            return _train_and_report(setting._replace(logs=logs), start, command, started)


def _train_and_report(
    setting: snapshots.Setting, start: _Start, command: str, started: float
) -> dict[str, float]:
    """Runs the trainings, then evaluates and reports; see `train`."""
    cfg = setting.cfg
    workdir = setting.workdir
    seconds = {'start': time.perf_counter() - started}
    if start.teacher is not None:
        trained = _distil(setting, start.teacher)
    else:
        trained = _train(setting, start)
    seconds |= trained.seconds
    finish = snapshots.show if setting.data is None else snapshots.score
    metrics, parts = finish(setting, trained.run)
    seconds |= parts
    posterior = setting.vae.posterior
    with console.timed(seconds, 'curves'):
        page.save_curves(f'{workdir}/curves.png', workdir, posterior)
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
