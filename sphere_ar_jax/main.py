"""The entry point: python -m sphere_ar_jax.main --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE …]

Trains the tokenizer, trains the AR model on its tokens, samples, scores, and writes pictures and report.html. Started
again in the same workdir it goes on where it stopped. What else --mode does, see `jobs`:

  --mode=convert --checkpoint=FILE.pt|hf://OWNER/REPOSITORY/FILE.pt --workdir=DIR [--no-ema] [--heads=N]
  --mode=export --workdir=DIR --output=FILE.safetensors
  --mode=pack --data=KIND:PATH --output=DIR [--shards=N] [--split=NAME --data_dir=DIR, of tfds]
  --mode=sample --workdir=DIR [--output=FILE.npz] [--num_images=N] [--labels=uniform|balanced|FILE] [--png=DIR]
  --mode=grid --workdir=DIR --classes='golden retriever; 388' [--columns=N] [--output=FILE.png]
  --mode=evaluate --workdir=DIR [--samples=NPZ --reference=NPZ --inception=FILE] [--images=NPZ]
                  [--lpips=vgg.pth --vgg=vgg16.pth]
  --mode=compile --config=FILE --topology=v6e-256[,v5p-64,…] [--parts=train,sample,evaluate] [--output=FILE.json]
                  [--noaudit]: what the programs would take on TPUs; needs none, see `ahead`

With --config these take the sampler, seed, dtype and mesh from it, else those that the run was begun with.

Started as several processes, see `joining`, training, sample, grid and evaluate are one run of all of them.
"""

import time

_STARTED = time.perf_counter()

import difflib  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
import zlib  # noqa: E402

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from sphere_ar_jax import (  # noqa: E402
    ahead,
    checkpoint,
    config,
    ending,
    experiment,
    hosts,
    jobs,
    joining,
    training,
)
from sphere_ar_jax.console import UserError  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file, with its argument after a colon.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for checkpoints, numbers and pictures.')
_MODE = flags.DEFINE_enum(
    'mode',
    'train',
    ['train', 'convert', 'export', 'pack', 'sample', 'grid', 'evaluate', 'compile'],
    'What to do, see above.',
)
# Flags of single modes, by the modes that take them.
_OPTIONS = (
    (flags.DEFINE_string('checkpoint', None, 'PyTorch file, or hf://OWNER/REPOSITORY/FILE.'), ('convert',)),
    (flags.DEFINE_bool('no-ema', None, 'Take `model`, not `ema`, of a checkpoint.'), ('convert',)),
    (flags.DEFINE_integer('heads', None, 'Attention heads of an AR model that was not published.', 1), ('convert',)),
    (
        flags.DEFINE_string('output', None, 'File or directory to write.'),
        ('export', 'pack', 'sample', 'grid', 'compile'),
    ),
    (flags.DEFINE_string('data', None, 'A tar of ImageNet, or KIND:PATH of another data set.'), ('pack',)),
    (flags.DEFINE_integer('shards', None, 'Files to write, 128 if not given.', 1), ('pack',)),
    (flags.DEFINE_string('split', None, 'Of tfds; train if not given.'), ('pack',)),
    (flags.DEFINE_string('data_dir', None, 'Of tfds, if not its default.'), ('pack',)),
    (flags.DEFINE_integer('num_images', None, 'Images to draw; else of the config.', 1), ('sample',)),
    (flags.DEFINE_string('labels', None, 'uniform, balanced, or a file of whole numbers.'), ('sample',)),
    (flags.DEFINE_string('png', None, 'Directory for a PNG file of every image, too.'), ('sample',)),
    (flags.DEFINE_string('classes', None, 'Names, synsets or numbers, separated by semicolons.'), ('grid',)),
    (flags.DEFINE_integer('columns', None, 'Images of each class, 4 if not given.', 1), ('grid',)),
    (flags.DEFINE_string('samples', None, 'npz of samples (arr_0).'), ('evaluate',)),
    (flags.DEFINE_string('reference', None, 'npz of reference images or statistics.'), ('evaluate',)),
    (flags.DEFINE_string('inception', None, 'Weights of the Inception network, .pb or .pth.'), ('evaluate',)),
    (flags.DEFINE_string('images', None, 'npz of real images (arr_0), for scores of the tokenizer.'), ('evaluate',)),
    (flags.DEFINE_string('lpips', None, "LPIPS' linear weights (vgg.pth)."), ('evaluate',)),
    (
        flags.DEFINE_string('topology', None, 'Slices of TPUs, as v6e-256 or v6e:16x16, separated by commas.'),
        ('compile',),
    ),
    (flags.DEFINE_list('parts', None, 'Of train, sample and evaluate; all, if not given.'), ('compile',)),
    (flags.DEFINE_bool('audit', None, 'Compile steps once more, to find what is replicated.'), ('compile',)),
    (flags.DEFINE_string('vgg', None, "torchvision's VGG16 (vgg16-397923af.pth), for --lpips."), ('evaluate',)),
)


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


def main(argv):
    """Runs the job of the flags; anything the user can put right ends it with one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what we asked it for
    cache = compilation_cache(os.environ)
    if cache is not None:
        jax.config.update('jax_compilation_cache_dir', cache)
        jax.config.update('jax_compilation_cache_max_size', 2**31)  # bytes; the least used go first
    joining.join()  # before anything asks for a device
    mode, given = _MODE.value, {option.name: option.value for option, _ in _OPTIONS if option.value is not None}
    if not hosts.is_first():
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115, for good
    elif mode in _ALONE and hosts.count() > 1:
        raise UserError(f'--mode={mode} is for one process, but {hosts.count()} were started')
    if len(argv) > 1:
        raise UserError(f'{argv[1]} is no flag: overrides are written --config.KEY=VALUE')
    for option, modes in _OPTIONS:
        if option.name in given and mode not in modes:
            raise UserError(f'--{option.name} is for --mode={" or ".join(modes)}, not for {mode}')
    if mode == 'pack':
        _pack(**given)
        return
    if mode == 'compile':
        _compile(**given)
        return
    if _WORKDIR.value is None or (mode == 'train' and _CONFIG.value is None):
        raise UserError('give --config=configs/NAME.py and --workdir=DIR' if mode == 'train' else 'give --workdir=DIR')
    workdir = checkpoint.absolute(_WORKDIR.value)
    cfg = None if _CONFIG.value is None else config.check(_CONFIG.value)
    if mode == 'train':
        command = f'python -m sphere_ar_jax.main {shlex.join(sys.argv[1:])}'
        experiment.train(cfg, workdir, command, _STARTED)
    else:
        _JOBS[mode](workdir, cfg, **{name.replace('-', '_'): value for name, value in given.items()})


def _convert(workdir, cfg, checkpoint=None, no_ema=False, heads=None):
    if checkpoint is None:
        raise UserError('give --checkpoint=FILE.pt or hf://OWNER/REPOSITORY/FILE.pt')
    jobs.convert_checkpoint(checkpoint, workdir, ema=not no_ema, heads=heads, like=cfg)


def _export(workdir, cfg, output=None):
    jobs.export_checkpoint(workdir, output or f'{workdir}/model.safetensors')


def _pack(data=None, output=None, **options):
    if data is None or output is None:
        raise UserError('give --data=KIND:PATH and --output=DIR')
    jobs.pack(data, output, **options)


def _compile(topology=None, **options):
    if topology is None or _CONFIG.value is None:
        raise UserError('give --config=configs/NAME.py and --topology=v6e-256')
    ahead.run(config.check(_CONFIG.value), topology, **options)


def _sample(workdir, cfg, output=None, labels='uniform', **options):
    output = output or f'{workdir}/samples.npz'
    if not output.endswith('.npz'):
        raise UserError(f'--output is {output}, but must end in .npz')
    if '://' in output:
        raise UserError(f'--output is {output}: samples are put together on a local disk, give --output=FILE.npz')
    jobs.sample(workdir, output, labels=labels, like=cfg, **options)


def _grid(workdir, cfg, classes=None, output=None, columns=4):
    if classes is None:
        raise UserError("give --classes='golden retriever; 388'")
    jobs.grid(workdir, output or f'{workdir}/grid.png', classes=classes, seeds=columns, like=cfg)


def _evaluate(workdir, cfg, inception=None, lpips=None, vgg=None, **files):
    if (lpips is None) != (vgg is None) or (lpips is not None and 'images' not in files):
        raise UserError('give --lpips, --vgg and --images together')
    lpips = None if lpips is None else (lpips, vgg)
    jobs.evaluate(workdir, network=inception, lpips=lpips, like=cfg, **files)


_ALONE = 'compile', 'convert', 'export', 'pack'  # nothing in them is shared out
_JOBS = {'convert': _convert, 'export': _export, 'sample': _sample, 'grid': _grid, 'evaluate': _evaluate}


def _guarded(function):
    """`function`, with what is no bug of ours said in one line. A signal ends with 128 + its number, as shells do.

    Whatever ends one of several processes is told to the others, see `ending`."""

    def guarded(argument):
        try:
            return function(argument)
        except (UserError, training.NonFiniteError, *jobs.INPUT_ERRORS) as error:
            if isinstance(error, FileNotFoundError) and error.filename:
                error = f'there is no file {error.filename}'
            ending.end(2, f'error: {error}')
        except training.Preempted as stop:  # of all processes at the same step
            if hosts.is_first():
                print(stop, file=sys.stderr)
            sys.exit(128 + stop.number)
        except KeyboardInterrupt:
            ending.end(128 + signal.SIGINT, 'interrupted; the same command goes on')
        except Exception as error:
            ending.end(1, f'error: {one_line(error)}', traceback.format_exc())

    return guarded


if __name__ == '__main__':
    app.run(_guarded(main), flags_parser=_guarded(_parse_flags))
