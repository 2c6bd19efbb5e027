"""The entry point: python -m sphere_ar_jax.main --config=configs/NAME.py --workdir=DIR
[--config.KEY=VALUE …]

Trains the tokenizer, trains the AR model on its tokens, samples, scores, and writes pictures and
report.html. Started again in the same workdir it goes on where it stopped. What else --mode does,
see `draw`:

  --mode=convert --checkpoint=FILE.pt|hf://OWNER/REPOSITORY/FILE.pt --workdir=DIR [--no-ema]
  [--heads=N] --mode=export --workdir=DIR --output=FILE.safetensors --mode=pack --data=KIND:PATH
  --output=DIR [--shards=N] [--split=NAME --data_dir=DIR, of tfds] --mode=sample --workdir=DIR
  [--output=FILE.npz] [--num_images=N] [--labels=uniform|balanced|FILE] [--png=DIR] --mode=grid
  --workdir=DIR --classes='golden retriever; 388' [--columns=N] [--output=FILE.png] --mode=evaluate
  --workdir=DIR [--samples=NPZ --reference=NPZ --inception=FILE] [--images=NPZ]
                  [--lpips=vgg.pth --vgg=vgg16.pth]
  --mode=compile --config=FILE --topology=v6e-256[,v5p-64,…] [--parts=train,sample,evaluate]
  [--output=FILE.json]
                  [--noaudit]: what the programs would take on TPUs; needs none, see `compile_ahead`

With --config these take the sampler, seed, dtype and mesh from it, else those that the run was
begun with.

Started as several processes, see `joining`, training, sample, grid and evaluate are one run of all
of them.
"""

import difflib
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from sphere_ar_jax import __version__
from sphere_ar_jax.config import packaged, schema
from sphere_ar_jax.runtime.console import Preempted, UserError, one_line

# JAX and all that needs it is imported by the command that runs: what is wrong with the flags is
# said before that.

_STARTED = time.perf_counter()

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Configuration file, with its argument after a colon.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for checkpoints, numbers and pictures.')
_MODE = flags.DEFINE_enum(
    'mode',
    'train',
    ['train', 'convert', 'export', 'pack', 'sample', 'grid', 'evaluate', 'compile'],
    'What to do, see above.',
)
# Flags of single modes, by the modes that take them.
_OPTIONS = (
    (
        flags.DEFINE_string('checkpoint', None, 'PyTorch file, or hf://OWNER/REPOSITORY/FILE.'),
        ('convert',),
    ),
    (flags.DEFINE_bool('no-ema', None, 'Take `model`, not `ema`, of a checkpoint.'), ('convert',)),
    (
        flags.DEFINE_integer(
            'heads', None, 'Attention heads of an AR model that was not published.', 1
        ),
        ('convert',),
    ),
    (
        flags.DEFINE_string('output', None, 'File or directory to write.'),
        ('export', 'pack', 'sample', 'grid', 'compile'),
    ),
    (
        flags.DEFINE_string('data', None, 'A tar of ImageNet, or KIND:PATH of another data set.'),
        ('pack',),
    ),
    (flags.DEFINE_integer('shards', None, 'Files to write, 128 if not given.', 1), ('pack',)),
    (flags.DEFINE_string('split', None, 'Of tfds; train if not given.'), ('pack',)),
    (flags.DEFINE_string('data_dir', None, 'Of tfds, if not its default.'), ('pack',)),
    (
        flags.DEFINE_integer('num_images', None, 'Images to draw; else of the config.', 1),
        ('sample',),
    ),
    (
        flags.DEFINE_string('labels', None, 'uniform, balanced, or a file of whole numbers.'),
        ('sample',),
    ),
    (
        flags.DEFINE_string('png', None, 'Directory for a PNG file of every image, too.'),
        ('sample',),
    ),
    (
        flags.DEFINE_string('classes', None, 'Names, synsets or numbers, separated by semicolons.'),
        ('grid',),
    ),
    (flags.DEFINE_integer('columns', None, 'Images of each class, 4 if not given.', 1), ('grid',)),
    (flags.DEFINE_string('samples', None, 'npz of samples (arr_0).'), ('evaluate',)),
    (
        flags.DEFINE_string('reference', None, 'npz of reference images or statistics.'),
        ('evaluate',),
    ),
    (
        flags.DEFINE_string('inception', None, 'Weights of the Inception network, .pb or .pth.'),
        ('evaluate',),
    ),
    (
        flags.DEFINE_string(
            'images', None, 'npz of real images (arr_0), for scores of the tokenizer.'
        ),
        ('evaluate',),
    ),
    (flags.DEFINE_string('lpips', None, "LPIPS' linear weights (vgg.pth)."), ('evaluate',)),
    (
        flags.DEFINE_string(
            'topology', None, 'Slices of TPUs, as v6e-256 or v6e:16x16, separated by commas.'
        ),
        ('compile',),
    ),
    (
        flags.DEFINE_list('parts', None, 'Of train, sample and evaluate; all, if not given.'),
        ('compile',),
    ),
    (
        flags.DEFINE_bool('audit', None, 'Compile steps once more, to find what is replicated.'),
        ('compile',),
    ),
    (
        flags.DEFINE_string('vgg', None, "torchvision's VGG16 (vgg16-397923af.pth), for --lpips."),
        ('evaluate',),
    ),
)


def _config_file(argv: list[str]) -> str | None:
    """The file that --config names, without its argument."""
    for flag, value in zip(argv, [*argv[1:], ''], strict=True):
        if flag.lstrip('-').startswith('config='):
            return flag.split('=', 1)[1].split(':')[0]
        if flag.lstrip('-') == 'config':
            return value.split(':')[0]
    return None


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but whatever is wrong with a flag, a config file or an override becomes one
    line (UserError).
    """
    if '--version' in argv:
        print(f'sphere_ar_jax {__version__}')
        sys.exit(0)
    argv = packaged.with_paths(argv)
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            dict(
                _CONFIG.value.items()
            )  # a config file that failed to load says so only when it is read
        return rest
    except Exception as error:
        file = _config_file(argv)
        if file is not None and not os.path.exists(file):
            raise UserError(f'there is no config file {file}') from None
        given = [
            a.split('=')[0].removeprefix('--config.') for a in argv if a.startswith('--config.')
        ]
        names = list(schema.leaves(schema.default().to_dict()))
        unknown = [name for name in given if name not in names]
        if isinstance(error, AttributeError | KeyError) and unknown:
            close = difflib.get_close_matches(unknown[0], names, 1, 0.5)
            hint = (
                f'did you mean {close[0]}?'
                if close
                else f'its sections are {", ".join(schema.default())}'
            )
            raise UserError(f'the config has no key {unknown[0]}; {hint}') from None
        where = '' if isinstance(error, flags.Error) or file is None else f'{file}: '
        raise UserError(f'{where}{one_line(error)}') from None


def _check_usage(argv: list[str], mode: str, given: dict[str, Any]) -> None:
    """Raise UserError for flags that do not go together."""
    if len(argv) > 1:
        raise UserError(f'{argv[1]} is no flag: overrides are written --config.KEY=VALUE')
    for option, modes in _OPTIONS:
        if option.name in given and mode not in modes:
            raise UserError(f'--{option.name} is for --mode={" or ".join(modes)}, not for {mode}')
    there = {*given, *(flag.name for flag in (_CONFIG, _WORKDIR) if flag.value is not None)}
    needed, message = _NEEDED.get(mode, ((), ''))
    if not there.issuperset(needed):
        raise UserError(message)
    if mode not in ('pack', 'compile') and 'workdir' not in there:
        raise UserError('give --workdir=DIR')
    output = given.get('output')
    if mode == 'sample' and output is not None:
        if not output.endswith('.npz'):
            raise UserError(f'--output is {output}, but must end in .npz')
        if '://' in output:
            raise UserError(
                f'--output is {output}: samples are put together on a local disk, give --output=FILE.npz'
            )
    if mode == 'evaluate' and (
        ('lpips' in given) != ('vgg' in given) or ('lpips' in given and 'images' not in given)
    ):
        raise UserError('give --lpips, --vgg and --images together')


# What a mode cannot do without: (flags, what to say where one is missing).
_NEEDED = {
    'train': (('config', 'workdir'), 'give --config=configs/NAME.py and --workdir=DIR'),
    'convert': (('checkpoint',), 'give --checkpoint=FILE.pt or hf://OWNER/REPOSITORY/FILE.pt'),
    'pack': (('data', 'output'), 'give --data=KIND:PATH and --output=DIR'),
    'grid': (('classes',), "give --classes='golden retriever; 388'"),
    'compile': (('topology', 'config'), 'give --config=configs/NAME.py and --topology=v6e-256'),
}
_ALONE = ('compile', 'convert', 'export', 'pack')  # nothing in them is shared out


def main(argv: list[str]) -> None:
    """Run the command of the flags; anything the user can put right ends it with one line and exit
    code 2.
    """
    mode = _MODE.value
    given = {option.name: option.value for option, _ in _OPTIONS if option.value is not None}
    _check_usage(argv, mode, given)
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what we asked it for
    import jax

    from sphere_ar_jax.config import checks
    from sphere_ar_jax.runtime import files, hosts, joining

    cache = files.compilation_cache(os.environ)
    if cache is not None:
        jax.config.update('jax_compilation_cache_dir', cache)
        jax.config.update('jax_compilation_cache_max_size', 2**31)  # bytes; the least used go first
    joining.join()  # before anything asks for a device
    if not hosts.is_first():
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115, for good
    elif mode in _ALONE and hosts.count() > 1:
        raise UserError(f'--mode={mode} is for one process, but {hosts.count()} were started')
    cfg = None if _CONFIG.value is None else checks.check(_CONFIG.value)
    workdir = None if _WORKDIR.value is None else files.absolute(_WORKDIR.value)
    _run(mode, workdir, cfg, {name.replace('-', '_'): value for name, value in given.items()})


def _run(mode: str, workdir: str | None, cfg: Any, given: dict[str, Any]) -> None:
    """Call the command of a mode with the flags given."""
    if mode == 'train':
        from sphere_ar_jax.commands import train

        train.train(
            cfg, workdir, f'python -m sphere_ar_jax.main {shlex.join(sys.argv[1:])}', _STARTED
        )
    elif mode == 'compile':
        from sphere_ar_jax.measure import compile_ahead

        compile_ahead.run(cfg, **given)
    elif mode == 'pack':
        from sphere_ar_jax.commands import pack

        pack.pack(**given)
    elif mode == 'convert':
        from sphere_ar_jax.commands import checkpoints

        ema = not given.pop('no_ema', False)
        checkpoints.convert_checkpoint(given.pop('checkpoint'), workdir, ema=ema, like=cfg, **given)
    elif mode == 'export':
        from sphere_ar_jax.commands import checkpoints

        checkpoints.export_checkpoint(workdir, **given)
    elif mode == 'evaluate':
        from sphere_ar_jax.commands import evaluate

        evaluate.evaluate(workdir, like=cfg, **given)
    else:
        from sphere_ar_jax.commands import draw

        command = {'sample': draw.sample, 'grid': draw.grid}[mode]
        command(workdir, like=cfg, **given)


def _end(code: int, line: str, details: str = '') -> NoReturn:
    """End this process with an exit code and a line on stderr, and with it all others of its run."""
    if sys.modules.get('jax'):
        from sphere_ar_jax.runtime import ending

        ending.end(code, line, details)
    sys.stderr.write(details)
    print(line, file=sys.stderr)
    sys.exit(code)


def _guarded(function: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
    """`function`, with what is no bug said in one line. A signal ends with 128 + its number, as
    shells do.
    """

    def guarded(argument):
        try:
            return function(argument)
        except (UserError, OSError) as error:
            message = str(error)
            if isinstance(error, FileNotFoundError) and error.filename:
                message = f'there is no file {error.filename}'
            _end(2, f'error: {message}')
        except Preempted as stop:  # in all processes at the same step
            from sphere_ar_jax.runtime import hosts

            if hosts.is_first():
                print(stop, file=sys.stderr)
            sys.exit(128 + stop.number)
        except KeyboardInterrupt:
            _end(128 + signal.SIGINT, 'interrupted; the same command goes on')
        except Exception as error:
            _end(1, f'error: {one_line(error)}', traceback.format_exc())

    return guarded


def run() -> None:
    """The command line, `sphere-ar` or `python -m sphere_ar_jax.main`."""
    app.run(_guarded(main), flags_parser=_guarded(_parse_flags))


if __name__ == '__main__':
    run()
