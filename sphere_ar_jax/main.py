"""The entry point: python -m sphere_ar_jax.main --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE …]

Trains the tokenizer, trains the AR model on its tokens, samples, scores, and writes pictures and report.html. Started
again in the same workdir it goes on where it stopped.
"""

import time

_STARTED = time.perf_counter()

import difflib  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402
from tqdm import tqdm  # noqa: E402

from sphere_ar_jax import checkpoint, config, data, evaluation, report, sharding, training  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file, with its argument after a colon.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for checkpoints, numbers and pictures.')


def compilation_cache(environ):
    """Where compiled programs are kept for the next start, or None where JAX_COMPILATION_CACHE_DIR says it already.

    A directory of the user's for each kind of processor, since programs for CPUs are compiled for the one they run on.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in environ:
        return None
    root = environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    try:
        with open('/proc/cpuinfo') as f:
            processor = next((line for line in f if line.startswith(('flags', 'Features'))), '')
    except OSError:
        processor = platform.processor()
    return os.path.join(root, 'sphere_ar_jax', f'{platform.machine()}-{zlib.crc32(processor.encode()):08x}')


class UserError(Exception):
    """Something that the user can put right; one line."""


def one_line(error):
    """An exception's message in one line; of a traceback inside a message, the last line."""
    message = str(error.args[0] if error.args and isinstance(error, KeyError | AttributeError) else error)
    hint = re.search(r'Did you mean .*', message)  # ml_collections prints all keys before it
    if hint:
        return hint.group()
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if any(line.startswith('Traceback') for line in lines) else ' '.join(lines)


def _parse_flags(argv):
    """absl's parser, but whatever is wrong with a flag, a config file or an override becomes one line (UserError)."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            dict(_CONFIG.value.items())  # a config file that failed to load says so only when it is read
        return rest
    except Exception as error:
        joined = re.sub(r'(^|\n)--?(config|workdir)\n', r'\1--\2=', '\n'.join(argv[1:])).split('\n')
        file = next((a.split('=', 1)[1] for a in joined if re.match(r'--?config=', a)), None)
        if file is not None and not os.path.exists(file.split(':')[0]):
            raise UserError(f'there is no config file {file.split(":")[0]}') from None
        given = [a.split('=')[0].removeprefix('--config.') for a in argv if a.startswith('--config.')]
        names = config.keys(config.default())
        unknown = [name for name in given if name not in names]
        if isinstance(error, AttributeError | KeyError) and unknown:
            close = difflib.get_close_matches(unknown[0], names, 1, 0.5)
            hint = f'did you mean {close[0]}?' if close else f'its sections are {", ".join(config.default())}'
            raise UserError(f'the config has no key {unknown[0]}; {hint}') from None
        where = '' if isinstance(error, flags.Error) or file is None else f'{file}: '
        raise UserError(f'{where}{one_line(error)}') from None


def _claim(cfg, workdir):
    """Writes WORKDIR/config.json, or refuses a workdir that was begun with another model, data or training."""
    path = os.path.join(workdir, 'config.json')
    mine = json.loads(cfg.to_json_best_effort())
    if os.path.exists(path):
        try:
            with open(path) as f:
                changed = config.differences(json.load(f), mine)
        except (ValueError, AttributeError):
            raise UserError(f'{path} is no config of ours: use another --workdir, or move the file away') from None
        if changed:
            raise UserError(
                f'{workdir} was begun with another config ({"; ".join(changed[:4])}): use another --workdir'
            )
    report.write_json(path, mine)


def _teacher(cfg, mesh):
    """The run in cfg.init_from, which must be of cfg's own model, finished, and no distilled one."""
    try:
        teacher = evaluation.load_teacher(cfg.init_from, mesh)
    except (OSError, ValueError) as error:
        raise UserError(f'init_from: {error}') from None
    theirs, mine = (json.loads(c.to_json_best_effort()) for c in (teacher.config, cfg))
    changed = [d for d in config.differences(theirs, mine) if d.startswith(('vae.', 'ar.', 'data.', 'seed '))]
    if changed:
        raise UserError(f'{cfg.init_from} has another model ({"; ".join(changed)}): a head is distilled from its own')
    if not os.path.exists(os.path.join(cfg.init_from, 'metrics.json')):
        raise UserError(f'{cfg.init_from} is not finished: run its own command to the end first')
    return teacher


def _distil(cfg, workdir, mesh, vae, ar, source, teacher):
    """A head of few evaluations from a teacher's run. Returns what `_train` does."""
    stage = training.distillation_stage(
        ar, vae, teacher.vae_params, teacher.ar_params, cfg.distillation_training, cfg.seed
    )
    state, seconds = training.train(stage, source, f'{workdir}/distillation', seed=cfg.seed, mesh=mesh)
    return teacher.vae_params, teacher.ar_params | {'head': state.eval_params}, {'distillation': seconds}


def _train(cfg, workdir, mesh, vae, ar, source):
    """Both stages. Returns (S-VAE parameters, AR parameters, seconds by stage)."""
    seconds = {}
    stage = training.tokenizer_stage(vae, cfg.tokenizer_training, cfg.seed)
    state, seconds['tokenizer'] = training.train(stage, source, f'{workdir}/tokenizer', seed=cfg.seed, mesh=mesh)
    vae_params = state.eval_params
    stage = training.ar_stage(ar, vae, vae_params, cfg.ar_training, cfg.seed)
    state, seconds['ar'] = training.train(stage, source, f'{workdir}/ar', seed=cfg.seed, mesh=mesh)
    return vae_params, state.eval_params, seconds


def _evaluate(cfg, workdir, mesh, vae, ar, vae_params, ar_params, train, heldout):
    """Reconstructs, samples and scores; writes the pictures. Returns (metrics, seconds by part)."""
    s, key = cfg.sampling, jax.random.key(cfg.seed + 1)
    seconds, mark = {}, time.perf_counter()
    recon, kl, kappa = evaluation.reconstruct(vae, vae_params, heldout.images, key, s.batch_size, mesh)
    metrics = {'vae/psnr': evaluation.psnr(recon, heldout.images), 'vae/kl': kl, 'vae/kappa': kappa}
    report.save_reconstructions(f'{workdir}/reconstructions.png', heldout.images, recon)
    seconds['reconstruction'], mark = time.perf_counter() - mark, time.perf_counter()

    labels = np.arange(s.num_images) % train.num_classes
    print(f'sampling {s.num_images} images: {s.solver}, {s.num_steps} steps, guidance {s.guidance_scale}', flush=True)
    with tqdm(total=s.num_images, desc='samples', unit='image', disable=not sys.stderr.isatty()) as bar:

        def progress(n):
            bar.update(n)
            if bar.disable:
                print(f'{n} more images', flush=True)

        images = evaluation.sample_images(
            ar, vae, ar_params, vae_params, labels, key, config.build_sampler(cfg), batch_size=s.batch_size, mesh=mesh,
            guidance_scale=s.guidance_scale, temperature=s.temperature, progress=progress,
        )  # fmt: skip
    report.save_samples(f'{workdir}/samples.png', images, labels)
    seconds['sampling'], mark = time.perf_counter() - mark, time.perf_counter()

    print('scoring', flush=True)
    metrics |= evaluation.score_digits(evaluation.digit_pixels(images), labels, train, heldout)
    seconds['scoring'] = time.perf_counter() - mark
    return metrics, seconds


def _summary(cfg, metrics):
    return (
        f'{cfg.sampling.num_images} digits, drawn class by class, none selected. An independent classifier reads '
        f'{metrics["samples/accuracy"]:.1%} of them as the class asked for (and {metrics["classifier/accuracy"]:.1%} '
        f'of real held-out digits correctly). Fréchet distance to real digits: {metrics["samples/frechet"]:.3f}; '
        f'between the training and the held-out real digits it is {metrics["real/frechet"]:.3f}.'
    )


def run(cfg, workdir, command):
    """Both trainings, then evaluation and report; each part goes on where an earlier run stopped.

    Args:
      cfg: a checked config. workdir: an absolute path, made if needed. command: what report.html says to type.
    Returns:
      the metrics, as written to WORKDIR/metrics.json.
    """
    if cfg.data.name == 'synthetic':
        raise UserError(
            'data.name is synthetic: there are no images to train on; python -m sphere_ar_jax.benchmark measures'
        )
    if cfg.init_from is not None:
        cfg.init_from = os.path.abspath(cfg.init_from)
    try:
        os.makedirs(workdir, exist_ok=True)
        mesh = sharding.make_mesh(**cfg.mesh)
        teacher = _teacher(cfg, mesh) if cfg.init_from is not None else None
        _claim(cfg, workdir)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    for name in ('distillation_training',) if cfg.init_from else ('tokenizer_training', 'ar_training'):
        if cfg[name].batch_size % mesh.size:
            raise UserError(f'{name}.batch_size is {cfg[name].batch_size}, not a multiple of the {mesh.size} devices')
    vae, ar = config.build_vae(cfg), config.build_ar(cfg)
    train, heldout = (data.SOURCES[cfg.data.name](split, cfg.seed, cfg.data.holdout) for split in ('train', 'heldout'))
    platform = jax.devices()[0].platform
    print(f'{len(train)} training images, {len(heldout)} held out; {mesh.size} {platform} device(s)', flush=True)
    seconds = {'start': time.perf_counter() - _STARTED}

    stages = _train if teacher is None else functools.partial(_distil, teacher=teacher)
    vae_params, ar_params, parts = stages(cfg, workdir, mesh, vae, ar, train)
    seconds |= parts
    metrics, parts = _evaluate(cfg, workdir, mesh, vae, ar, vae_params, ar_params, train, heldout)
    mark = time.perf_counter()
    report.save_curves(f'{workdir}/curves.png', workdir)
    seconds |= parts | {'curves': time.perf_counter() - mark}
    metrics |= {f'wall_s/{name}': round(value, 1) for name, value in seconds.items()}
    metrics['wall_s/total'] = round(sum(seconds.values()), 1)
    metrics['peak_rss_mb'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    report.write_json(f'{workdir}/metrics.json', metrics)
    summary = _summary(cfg, metrics)
    report.save_page(workdir, cfg.data.name, summary, metrics, str(cfg), command)
    print(f'{summary}\nlook at {workdir}/report.html; all numbers: {workdir}/metrics.json')
    return metrics


def main(argv):
    """Runs the job of the flags; anything the user can put right ends it with one line and exit code 2."""
    logging.set_verbosity(logging.WARNING)
    cache = compilation_cache(os.environ)
    if cache is not None:
        jax.config.update('jax_compilation_cache_dir', cache)
        jax.config.update('jax_compilation_cache_max_size', 2**31)  # bytes; the least used go first
    if len(argv) > 1:
        raise UserError(f'{argv[1]} is no flag: overrides are written --config.KEY=VALUE')
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError('give --config=configs/NAME.py and --workdir=DIR')
    command = f'python -m sphere_ar_jax.main {shlex.join(sys.argv[1:])}'
    run(config.check(_CONFIG.value), os.path.abspath(_WORKDIR.value), command)


def _guarded(function):
    """`function`, with what is no bug of ours said in one line. A signal ends with 128 + its number, as shells do."""

    def guarded(argument):
        try:
            return function(argument)
        except (UserError, config.ConfigError, checkpoint.DamagedError, training.NonFiniteError) as error:
            print(f'error: {error}', file=sys.stderr)
            sys.exit(2)
        except training.Preempted as stop:
            print(stop, file=sys.stderr)
            sys.exit(128 + stop.number)
        except KeyboardInterrupt:
            print('interrupted; the same command goes on', file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    return guarded


if __name__ == '__main__':
    app.run(_guarded(main), flags_parser=_guarded(_parse_flags))
