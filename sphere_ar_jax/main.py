"""The entry point: python -m sphere_ar_jax.main --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE …]

Trains the tokenizer, trains the AR model on its tokens, samples, scores, and writes pictures and report.html. Started
again in the same workdir it goes on where it stopped.
"""

import time

_STARTED = time.perf_counter()

import difflib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402
from tqdm import tqdm  # noqa: E402

from sphere_ar_jax import checkpoint, config, data, evaluation, report, sharding, training  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file, with its argument after a colon.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for checkpoints, numbers and pictures.')

PREEMPTED = 143  # 128 + SIGTERM: a launcher starts us again


class UserError(Exception):
    """Something that the user can put right; one line."""


def _nearest(name, names):
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f'; did you mean {close[0]}?' if close else f'; there is {", ".join(sorted(names))}'


def _keys(cfg, prefix=''):
    """All dotted keys of a config."""
    for name, value in cfg.items():
        yield from _keys(value, f'{prefix}{name}.') if hasattr(value, 'items') else (f'{prefix}{name}',)


def _parse_flags(argv):
    """absl's parser, but what is wrong with a config or an override becomes one line (UserError)."""
    given = [a for a in argv if a.startswith('--config=') or a == '--config']
    try:
        return flags.FLAGS(argv)
    except (KeyError, AttributeError) as error:
        override = re.search(r"'?config\.([\w.]+)", ' '.join(argv))
        unknown = [a.split('=')[0].removeprefix('--config.') for a in argv if a.startswith('--config.')]
        names = list(_keys(config.default()))
        bad = [name for name in unknown if name not in names]
        if bad:
            raise UserError(f'the config has no key {bad[0]}{_nearest(bad[0], names)}') from None
        raise UserError(
            f'{" ".join(given)}: {_first_line(error)}' if override or given else _first_line(error)
        ) from None
    except (flags.Error, TypeError, ValueError, FileNotFoundError, SyntaxError, ImportError) as error:
        raise UserError(_first_line(error)) from None


def _first_line(error):
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _same_config(cfg, workdir):
    """Writes WORKDIR/config.json, or refuses a workdir that was begun with another model, data or training."""
    path = os.path.join(workdir, 'config.json')
    mine = json.loads(cfg.to_json_best_effort())
    if os.path.exists(path):
        with open(path) as f:
            theirs = json.load(f)
        fixed = re.compile(r'(seed|dtype|data\..*|vae\..*|ar\..*|\w+_training\.(?!log_every|checkpoint_every|keep).*)')
        flat = lambda tree, prefix='': (
            {k: v for n, x in tree.items() for k, v in flat(x, f'{prefix}{n}.').items()}
            if isinstance(tree, dict) else {prefix[:-1]: tree}
        )  # fmt: skip
        old, new = flat(theirs), flat(mine)
        changed = [
            f'{k} {old.get(k)} → {new.get(k)}' for k in new | old if fixed.fullmatch(k) and old.get(k) != new.get(k)
        ]
        if changed:
            raise UserError(
                f'{workdir} was begun with another config ({"; ".join(changed[:4])}): use another --workdir'
            )
    report.write_json(path, mine)


def _evaluate(cfg, workdir, vae, ar, vae_params, ar_params, train, heldout):
    """Reconstructs, samples and scores; writes the pictures. Returns (metrics, seconds by part)."""
    seconds, mark = {}, time.perf_counter()
    key = jax.random.key(cfg.seed + 1)
    recon, kl, kappa = evaluation.reconstruct(vae, vae_params, heldout.images, key)
    metrics = {'vae/psnr': evaluation.psnr(recon, heldout.images), 'vae/kl': kl, 'vae/kappa': kappa}
    report.save_reconstructions(f'{workdir}/reconstructions.png', heldout.images, recon)
    seconds['reconstruction'] = time.perf_counter() - mark

    mark = time.perf_counter()
    s = cfg.sampling
    labels = np.arange(s.num_images) % train.num_classes
    print(f'sampling {s.num_images} images, {s.solver}, {s.num_steps} steps, guidance {s.guidance_scale}', flush=True)
    with tqdm(total=s.num_images, desc='samples', unit='image', disable=not sys.stderr.isatty()) as bar:
        images = evaluation.sample_images(
            ar, vae, ar_params, vae_params, labels, key, s, config.build_sampler(cfg), bar.update
        )
    report.save_samples(f'{workdir}/samples.png', images, labels)
    seconds['sampling'] = time.perf_counter() - mark

    mark = time.perf_counter()
    print('scoring', flush=True)
    metrics |= evaluation.score_digits(evaluation.digit_pixels(images), labels, train, heldout)
    seconds['scoring'] = time.perf_counter() - mark
    return metrics, seconds


def run(cfg, workdir, command):
    """Both trainings, then evaluation and report; each part goes on where an earlier run stopped. Returns metrics."""
    os.makedirs(workdir, exist_ok=True)
    _same_config(cfg, workdir)
    mesh = sharding.make_mesh(**cfg.mesh)
    vae, ar = config.build_vae(cfg), config.build_ar(cfg)
    source = data.SOURCES[cfg.data.name]
    train, heldout = (source(split, cfg.seed, cfg.data.holdout) for split in ('train', 'heldout'))
    platform = jax.devices()[0].platform
    print(
        f'{len(train)} training images, {len(heldout)} held out; {mesh.size} {platform} device(s); to {workdir}',
        flush=True,
    )
    seconds = {'start': time.perf_counter() - _STARTED}

    stage = training.tokenizer_stage(vae, cfg.tokenizer_training, cfg.seed)
    state, seconds['tokenizer'] = training.train(stage, train, f'{workdir}/tokenizer', seed=cfg.seed, mesh=mesh)
    vae_params = state.eval_params
    stage = training.ar_stage(ar, vae, vae_params, cfg.ar_training, cfg.seed)
    state, seconds['ar'] = training.train(stage, train, f'{workdir}/ar', seed=cfg.seed, mesh=mesh)

    metrics, parts = _evaluate(cfg, workdir, vae, ar, vae_params, state.eval_params, train, heldout)
    report.save_curves(f'{workdir}/curves.png', workdir)
    seconds |= parts
    metrics |= {f'wall_s/{name}': round(value, 1) for name, value in seconds.items()}
    metrics['wall_s/total'] = round(sum(seconds.values()), 1)
    metrics['peak_rss_mb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report.write_json(f'{workdir}/metrics.json', metrics)
    summary = (
        f'{cfg.sampling.num_images} digits, drawn class by class; an independent classifier reads '
        f'{metrics["samples/accuracy"]:.1%} of them as the class asked for (and {metrics["classifier/accuracy"]:.1%} of real '
        f'held-out digits correctly). Fréchet distance to real digits {metrics["samples/frechet"]:.3f}; between training '
        f'and held-out real digits it is {metrics["real/frechet"]:.3f}.'
    )
    report.save_page(workdir, cfg.data.name, summary, metrics, str(cfg), command)
    print(summary)
    print(f'look at {workdir}/report.html; numbers in {workdir}/metrics.json ({metrics["wall_s/total"]:.0f} s)')
    return metrics


def main(_):
    """Runs the job of the flags; anything the user can put right ends it with one line and exit code 2."""
    logging.set_verbosity(logging.WARNING)
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError('give --config=configs/NAME.py and --workdir=DIR')
    command = f'python -m sphere_ar_jax.main {shlex.join(sys.argv[1:])}'
    run(config.check(_CONFIG.value), os.path.abspath(_WORKDIR.value), command)


def _guarded(function):
    def guarded(argument):
        try:
            return function(argument)
        except (UserError, config.ConfigError, checkpoint.DamagedError, training.NonFiniteError) as error:
            print(f'error: {error}', file=sys.stderr)
            sys.exit(2)
        except training.Preempted as stop:
            print(stop, file=sys.stderr)
            sys.exit(PREEMPTED)

    return guarded


if __name__ == '__main__':
    app.run(_guarded(main), flags_parser=_guarded(_parse_flags))
