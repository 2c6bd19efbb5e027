"""The command line: trains models, draws images, scores them, converts checkpoints.

This command trains the tokenizer, and the AR model on its tokens:

  python -m sphere_ar_jax.main --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE …]

It then samples, scores, and writes pictures and report.html. Started again in the same workdir it
goes on where it stopped. The other modes are:

  --mode=convert   --workdir=DIR --checkpoint=FILE.pt|hf://OWNER/REPOSITORY/FILE.pt
                   [--no-ema] [--heads=N] (the file may be a .safetensors, too)
  --mode=export    --workdir=DIR [--output=FILE.safetensors|DIR] [--push=USER/NAME]
                   (a directory has a config and a model card besides the weights)
  --mode=pack      --data=KIND:PATH --output=DIR [--shards=N]
                   [--split=NAME] [--data_dir=DIR] (these two for tfds and hf)
                   [--labels=none] (of images with captions, whose labels nobody reads)
  --mode=encode    --workdir=DIR --output=DIR [--data=KIND:PATH] [--shards=N]
                   [--split=NAME] [--data_dir=DIR]
                   (latents of images, which the AR model may be trained on)
  --mode=sample    --workdir=DIR [--output=FILE.npz] [--num_images=N]
                   [--labels=uniform|balanced|FILE] [--png=DIR]
                   (--prompt='a three left of a seven' for runs of texts, as often as you like, or
                   --prompts=FILE, a text in each line or an npz of features)
  --mode=grid      --workdir=DIR --classes='golden retriever; 388' [--columns=N]
                   [--output=FILE.png]
                   (or --prompt='a three left of a seven', as often as you like, or --prompts=FILE)
  --mode=complete  --workdir=DIR --images=FILE|DIR [--classes='golden retriever'] [--keep=0.5]
                   [--corruption=noisy:3] [--num_images=N] [--columns=N] [--output=FILE.png]
                   (keeps the first tokens of images and draws the others; a DIR without --classes
                   has a directory for each class, as ImageNet-R has; runs of texts take --prompt
                   or --prompts in place of --classes)
  --mode=caption   --workdir=DIR --images=FILE|DIR [--top_p=0.9] [--num_images=N]
                   [--output=FILE.tsv]
                   (writes a text for each image, by runs with ar.text_weight)
  --mode=evaluate  --workdir=DIR [--samples=NPZ --reference=NPZ --inception=FILE]
                   [--images=NPZ] [--lpips=vgg.pth --vgg=vgg16.pth]
                   (each NPZ may be a directory of images)
  --mode=reference --data=KIND:PATH --size=256 --output=FILE.npz [--inception=FILE]
                   [--num_images=N] [--split=NAME] [--data_dir=DIR]
                   (statistics and images of a data set, for FID)
  --mode=experiment --config=configs/experiments/NAME.py --workdir=DIR [--seeds=0,1,2]
                   (trains and compares rows with several seeds, see docs/experiments)
  --mode=serve     --workdir=DIR [--host=127.0.0.1] [--port=7860]
                   (a page to draw with in the browser, see docs/serving.md)
  --mode=compile   --config=FILE --topology=v6e-256[,h100-8,…] [--noaudit]
                   [--parts=train,sample,evaluate] [--output=FILE.json]
                   (what the programs would take on TPUs or GPUs, without one)

Encode, sample, grid, complete, caption, evaluate and serve take sampler, seed, dtype and mesh from
--config if it is given, else from the run's own config, of which --config.KEY=VALUE changes a
value.

Train, sample, grid and evaluate may be started as several processes, which then form one run.
"""

import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from sphere_ar_jax import __version__
from sphere_ar_jax.config import packaged, schema
from sphere_ar_jax.runtime import console
from sphere_ar_jax.runtime.console import Preempted, UserError, interrupts, one_line, said

# Only the command that runs imports JAX, and whatever needs it, so that wrong flags are reported
# at once.

_T = TypeVar('_T')

_STARTED = time.perf_counter()
_PATIENCE = 5  # seconds that a process which has failed waits for its threads


class _Mode(NamedTuple):
    """What a value of --mode needs.

    Attributes:
      needed: flags without which it cannot run.
      message: what is said where one of them is missing.
      has_workdir: whether it needs --workdir, which is then said on its own.
      opens_run: whether it draws with a trained run, scores or encodes. It then takes the run's own
        config unless another is given.
      alone: whether several processes cannot share it.
    """

    needed: tuple[str, ...] = ()
    message: str = ''
    has_workdir: bool = True
    opens_run: bool = False
    alone: bool = True


_MODES = {
    'train': _Mode(
        ('config', 'workdir'), 'give --config=configs/NAME.py and --workdir=DIR', alone=False
    ),
    'convert': _Mode(('checkpoint',), 'give --checkpoint=FILE.pt or hf://OWNER/REPOSITORY/FILE.pt'),
    'export': _Mode(opens_run=True),
    'pack': _Mode(('data', 'output'), 'give --data=KIND:PATH and --output=DIR', has_workdir=False),
    'encode': _Mode(
        ('workdir', 'output'),
        'give --workdir=DIR, a trained run, and --output=DIR',
        opens_run=True,
    ),
    'sample': _Mode(opens_run=True, alone=False),
    'grid': _Mode(opens_run=True, alone=False),
    'complete': _Mode(
        ('images',),
        "give --images=FILE or DIR, and --classes='golden retriever', one for all or one for each, "
        'or none for a DIR with a directory for each class',
        opens_run=True,
    ),
    'caption': _Mode(('images',), 'give --images=FILE or DIR', opens_run=True),
    'evaluate': _Mode(opens_run=True, alone=False),
    'reference': _Mode(
        ('data', 'size', 'output'),
        'give --data=KIND:PATH, --size=256 and --output=FILE.npz',
        has_workdir=False,
    ),
    'compile': _Mode(
        ('topology', 'config'),
        'give --config=configs/NAME.py and --topology=v6e-256',
        has_workdir=False,
    ),
    'experiment': _Mode(
        ('config', 'workdir'), 'give --config=configs/experiments/NAME.py and --workdir=DIR'
    ),
    'serve': _Mode(opens_run=True),
}

# The words behind --mode.
MODES = tuple(_MODES)

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Configuration file, with its argument after a colon.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for checkpoints, numbers and pictures.')
_MODE = flags.DEFINE_enum(
    'mode',
    'train',
    list(MODES),
    'What to do, see above.',
)


class _Option(NamedTuple):
    """A flag that not all modes take.

    Attributes:
      flag: the flag.
      modes: the modes that take it.
    """

    flag: flags.FlagHolder[Any]
    modes: tuple[str, ...]


class _PathParser(flags.ArgumentParser[str]):
    """Reads a path; ~ is the user's own directory, which shells leave as it is behind a flag."""

    def parse(self, argument: str) -> str:
        """Gives the path without ~."""
        return os.path.expanduser(argument)


def _text(name: str, modes: tuple[str, ...], help: str) -> _Option:
    """A flag that takes a text."""
    return _Option(flags.DEFINE_string(name, None, help), modes)


def _path(name: str, modes: tuple[str, ...], help: str) -> _Option:
    """A flag that takes a path, or a word in its place."""
    holder = flags.DEFINE(_PathParser(), name, None, help, serializer=flags.ArgumentSerializer())
    return _Option(holder, modes)


def _count(name: str, modes: tuple[str, ...], help: str) -> _Option:
    """A flag that takes a positive whole number."""
    return _Option(flags.DEFINE_integer(name, None, help, lower_bound=1), modes)


def _texts(name: str, modes: tuple[str, ...], help: str) -> _Option:
    """A flag that takes a text, and may be given several times."""
    return _Option(flags.DEFINE_multi_string(name, None, help), modes)


def _switch(name: str, modes: tuple[str, ...], help: str) -> _Option:
    """A flag that takes no value."""
    return _Option(flags.DEFINE_bool(name, None, help), modes)


def _words(name: str, modes: tuple[str, ...], help: str) -> _Option:
    """A flag that takes words, separated by commas."""
    return _Option(flags.DEFINE_list(name, None, help), modes)


_WRITING = (
    'export',
    'pack',
    'encode',
    'sample',
    'grid',
    'complete',
    'caption',
    'reference',
    'compile',
)
_OF_DATA = ('pack', 'encode', 'reference')
_OPTIONS = (
    _path('checkpoint', ('convert',), 'PyTorch file, or hf://OWNER/REPOSITORY/FILE.'),
    _switch('no-ema', ('convert',), 'Take `model`, not `ema`, of a checkpoint.'),
    _count('heads', ('convert',), 'Attention heads of an AR model that was not published.'),
    _path('output', _WRITING, 'File or directory to write.'),
    _text('push', ('export',), 'Repository of Hugging Face to upload to, USER/NAME.'),
    _text('data', _OF_DATA, 'A tar of ImageNet, or KIND:PATH of another data set.'),
    _count('shards', ('pack', 'encode'), 'Files to write, 128 if not given.'),
    _text('split', _OF_DATA, 'Split of tfds or hf; train if not given.'),
    _path('data_dir', _OF_DATA, 'Directory of tfds or hf, if not its default.'),
    _count(
        'num_images',
        ('sample', 'complete', 'caption', 'reference'),
        'Images to draw, complete, caption or keep.',
    ),
    _count('size', ('reference',), 'Side of the crops in pixels.'),
    _path(
        'labels',
        ('sample', 'pack'),
        'uniform, balanced, or a file of whole numbers; to pack: none.',
    ),
    _path('png', ('sample',), 'Directory for a PNG file of every image, too.'),
    _text('classes', ('grid', 'complete'), 'Names, synsets or numbers, separated by semicolons.'),
    _texts('prompt', ('sample', 'grid', 'complete'), 'Text to draw; may be given several times.'),
    _path(
        'prompts',
        ('sample', 'grid', 'complete'),
        'File of texts to draw, one in each line; or npz of features.',
    ),
    _count('columns', ('grid', 'complete'), 'Images of each class or completion, 4 if not given.'),
    _text('keep', ('complete',), 'Tokens to keep, rows as 4rows, or a share; 0.5 if not given.'),
    _text('corruption', ('complete',), 'Corruption of the images with its severity, as noisy:3.'),
    _path('samples', ('evaluate',), 'npz of samples (arr_0), or a directory of images.'),
    _path('reference', ('evaluate',), 'npz of images or statistics, or a directory of images.'),
    _path('inception', ('evaluate', 'reference'), 'Weights of the Inception network, .pb or .pth.'),
    _path('images', ('evaluate', 'complete', 'caption'), 'Real images: npz or directory; picture.'),
    _text('top_p', ('caption',), 'Share of the probability that tokens are drawn from.'),
    _path('lpips', ('evaluate',), "LPIPS' linear weights (vgg.pth)."),
    _path('vgg', ('evaluate',), "torchvision's VGG16 (vgg16-397923af.pth), for --lpips."),
    _text('topology', ('compile',), 'TPUs or GPUs, as v6e-256, v6e:16x16 or h100-8, by commas.'),
    _words('parts', ('compile',), 'Any of train, sample and evaluate; all if not given.'),
    _words('seeds', ('experiment',), "Seeds, in place of the config's."),
    _text('host', ('serve',), 'Address to listen at, 127.0.0.1 if not given.'),
    _count('port', ('serve',), 'Port to listen at, 7860 if not given.'),
    _switch('audit', ('compile',), 'Compile steps once more, to find what is replicated.'),
)


def _value(argv: list[str], name: str) -> str | None:
    """The value that a command line gives a flag, None where it gives none."""
    for flag, value in zip(argv, [*argv[1:], ''], strict=True):
        if flag.lstrip('-').startswith(f'{name}='):
            return flag.split('=', 1)[1]
        if flag.lstrip('-') == name:
            return value
    return None


def _config_file(argv: list[str]) -> str | None:
    """The file that --config names, without its argument."""
    value = _value(argv, 'config')
    return None if value is None else value.split(':')[0]


def _config_name() -> str:
    """The name of the config file without its folder, and its words: 'guidance-fashion'."""
    file, _, words = (_value(sys.argv, 'config') or '').partition(':')
    name = os.path.splitext(os.path.basename(file))[0]
    return '-'.join([name, *sorted(filter(None, words.split(',')))])


def _with_own_config(argv: list[str]) -> list[str]:
    """Adds --config with the run's own config where its keys are overridden and no file is given.

    Only the modes that take the run's own config anyway have it.
    """
    overrides = any(word.startswith('--config.') for word in argv)
    workdir = _value(argv, 'workdir')
    if not overrides or not workdir or _value(argv, 'config') is not None:
        return argv
    mode = _MODES.get(_value(argv, 'mode') or '')
    if mode is None or not mode.opens_run:
        return argv
    place = os.path.expanduser(workdir)
    if '://' not in place and not os.path.exists(os.path.join(place, 'config.json')):
        raise UserError(f'{workdir} {packaged.NO_RUN}')
    # absl accepts an override only after the --config that it changes.
    return [argv[0], f'--config={packaged.OF_RUN}:{workdir}', *argv[1:]]


def _unknown_key(argv: list[str]) -> str | None:
    """The message about the first override of an unknown key, None where all keys are known."""
    words = (word for word in argv if word.startswith('--config.'))
    keys = (word.split('=')[0].removeprefix('--config.') for word in words)
    messages = (schema.unknown(key) for key in keys)
    return next((message for message in messages if message is not None), None)


def _explained(error: Exception, argv: list[str]) -> UserError:
    """What is wrong with a command line, in one line.

    Args:
      error: what absl, ml_collections or the config file raised.
      argv: the command line.
    """
    file = _config_file(argv)
    if file is not None and not os.path.exists(file):
        return UserError(f'there is no config file {file}')
    if file is None and isinstance(error, flags.Error):
        override = next((word for word in argv if word.startswith('--config.')), None)
        if override is not None:
            return UserError(f'give --config=configs/NAME.py: {override} changes one of its values')
    if isinstance(error, AttributeError | KeyError):
        message = _unknown_key(argv)
        if message is not None:
            return UserError(message)
    of_file = file not in (None, packaged.OF_RUN) and not isinstance(error, flags.Error)
    where = f'{file}: ' if of_file else ''
    return UserError(f'{where}{one_line(error)}')


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line as absl does. Returns the words that are no flags.

    Raises:
      UserError: a flag, the config file or an override is wrong; one line.
    """
    if '--version' in argv:
        print(f'sphere_ar_jax {__version__}', flush=True)
        sys.exit(0)
    if '--help' in argv:
        print(f'{__doc__}\n{flags.FLAGS.main_module_help()}', flush=True)
        sys.exit(0)
    argv = _with_own_config(packaged.with_paths(argv))
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            # A config file that failed to load says so only when it is read.
            dict(_CONFIG.value.items())
        return rest
    except Exception as error:
        raise _explained(error, argv) from None


def _given() -> dict[str, Any]:
    """The values of the flags of `_OPTIONS` that were given."""
    values = {option.flag.name: option.flag.value for option in _OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def _check_each(argv: list[str], mode: str, given: dict[str, Any]) -> None:
    """Raises UserError for a flag that is wrong by itself; see `_check_usage`."""
    if len(argv) > 1:
        raise UserError(f'{argv[1]} is no flag: overrides are written --config.KEY=VALUE')
    for option in _OPTIONS:
        name = option.flag.name
        if name in given and mode not in option.modes:
            raise UserError(f'--{name} is for --mode={" or ".join(option.modes)}, not for {mode}')
    for name, value in {**given, 'workdir': _WORKDIR.value}.items():
        console.require_value(f'--{name}', value)


def _check_usage(argv: list[str], mode: str, given: dict[str, Any]) -> None:
    """Raises UserError for flags that are wrong or do not go together.

    Args:
      argv: the program's name and the words that are no flags.
      mode: the value of --mode.
      given: the values of the flags of `_OPTIONS` that were given.
    """
    _check_each(argv, mode, given)
    there = {*given, *(flag.name for flag in (_CONFIG, _WORKDIR) if flag.value is not None)}
    needs = _MODES[mode]
    if not there.issuperset(needs.needed):
        raise UserError(needs.message)
    if needs.has_workdir and 'workdir' not in there:
        raise UserError('give --workdir=DIR')
    if mode == 'grid' and not there & {'classes', 'prompt', 'prompts'}:
        raise UserError("give --classes='golden retriever; 388', or --prompt='a text'")
    if mode == 'sample':
        _check_samples_files(_WORKDIR.value or '', given.get('output'), given.get('png'))
    if mode == 'evaluate':
        has_lpips = 'lpips' in given
        alone = has_lpips and 'images' not in given
        if alone or has_lpips != ('vgg' in given):
            raise UserError('give --lpips, --vgg and --images together')


def _check_samples_files(workdir: str, output: str | None, png: str | None) -> None:
    """Raises UserError unless samples can be written where they shall be.

    Args:
      workdir: of the run, which gets the samples without an `output`.
      output: the value of --output.
      png: the value of --png.
    """
    from sphere_ar_jax.runtime import files

    if output is not None and not output.endswith('.npz'):
        raise UserError(f'--output is {output}, but must end in .npz')
    if files.is_remote(output or workdir):
        name = '--workdir' if output is None else '--output'
        raise UserError(
            f'{name} is {output or workdir}: samples are put together on a local disk, give '
            '--output=FILE.npz'
        )
    if png is not None and files.is_remote(png):
        raise UserError(f'--png is {png}: pictures are written to a local disk, give --png=DIR')


def _beside_run(cfg: ConfigDict, workdir: str) -> ConfigDict:
    """The config of the command line for a mode that opens a run, see `beside`.

    Raises:
      UserError: an override would take other images than the run has.
    """
    from sphere_ar_jax.commands import open_run
    from sphere_ar_jax.config import beside

    own = open_run.config_of(workdir) if open_run.has_run(workdir) else None
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    names_images = re.search(r'\bdata=', _value(sys.argv, 'config') or '') is not None
    return beside.without_other_images(cfg, own, overrides, names_images)


def _checked_config(mode: str, workdir: str | None) -> ConfigDict | None:
    """The config of the command line, None where there is none.

    It is checked, but for that of an experiment, which its own command checks.

    Raises:
      UserError: it has a value that no run can have, or does not fit the mode or the run.
    """
    from sphere_ar_jax.config import beside, checks

    cfg = _CONFIG.value
    if cfg is None or mode == 'experiment':
        return cfg
    if schema.is_experiment(cfg):
        raise UserError('this is the config of an experiment: give --mode=experiment')
    if workdir is None:
        return checks.check(cfg)
    cfg = checks.check(beside.with_kept_vocabulary(cfg, workdir))
    return _beside_run(cfg, workdir) if _MODES[mode].opens_run else cfg


def main(argv: list[str]) -> None:
    """Runs the command that the flags name.

    Raises:
      UserError: something that the user can put right; one line.
    """
    mode = _MODE.value
    given = _given()
    _check_usage(argv, mode, given)
    # Orbax warns about what it was asked for.
    logging.set_verbosity(logging.ERROR)
    if mode == 'compile':
        # JAX would ask NVIDIA's driver for versions, and give up its plugin where there is none.
        os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
    import jax

    from sphere_ar_jax.runtime import files, hosts, joining

    cache = files.compilation_cache(os.environ)
    if cache is not None:
        files.sweep_compilation_cache(cache)
        jax.config.update('jax_compilation_cache_dir', cache)
        # In bytes; the least recently used programs are removed first.
        jax.config.update('jax_compilation_cache_max_size', 2**31)
    # Processes must join before anything asks for a device.
    joining.join()
    if _MODES[mode].alone and hosts.count() > 1:
        raise UserError(f'--mode={mode} is for one process, but {hosts.count()} were started')
    if not hosts.is_first():
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115, it stays open to the end
    workdir = None if _WORKDIR.value is None else files.absolute(_WORKDIR.value)
    if workdir is not None and os.path.isfile(workdir):
        raise UserError(f'--workdir is {workdir}, which is a file: give a directory')
    cfg = _checked_config(mode, workdir)
    _call(mode, workdir, cfg, {name.replace('-', '_'): value for name, value in given.items()})


def _call_without_workdir(mode: str, cfg: ConfigDict | None, given: dict[str, Any]) -> None:
    """Calls the command of a mode that has no workdir; see `_call`."""
    if mode == 'pack':
        from sphere_ar_jax.commands import data_sets

        data_sets.pack(**given)
    elif mode == 'reference':
        from sphere_ar_jax.commands import evaluate

        evaluate.write_reference(**given)
    else:
        from sphere_ar_jax.measure import compile_ahead

        assert cfg is not None  # by `_check_usage`
        compile_ahead.run(cfg, **given)


def _call_on_run(mode: str, workdir: str, cfg: ConfigDict | None, given: dict[str, Any]) -> None:
    """Calls the command of a mode that opens a run, see `_call`."""
    if mode == 'encode':
        from sphere_ar_jax.commands import data_sets

        data_sets.encode(workdir, like=cfg, **given)
    elif mode == 'export':
        from sphere_ar_jax.commands import checkpoints

        checkpoints.export_checkpoint(workdir, like=cfg, **given)
    elif mode == 'evaluate':
        from sphere_ar_jax.commands import evaluate

        evaluate.evaluate(workdir, like=cfg, **given)
    elif mode == 'serve':
        from sphere_ar_jax.serving import page

        page.serve(workdir, like=cfg, **given)
    else:
        from sphere_ar_jax.commands import draw

        commands: dict[str, Callable[..., None]] = {
            'sample': draw.sample,
            'grid': draw.grid,
            'complete': draw.complete,
            'caption': draw.caption,
        }
        commands[mode](workdir, like=cfg, **given)


def _call(mode: str, workdir: str | None, cfg: ConfigDict | None, given: dict[str, Any]) -> None:
    """Calls the command of a mode.

    Args:
      mode: the value of --mode.
      workdir: an absolute path, None for modes that have no workdir.
      cfg: the checked config, None where none was given; train and compile always have one.
      given: the values of the flags of `_OPTIONS` that were given.
    """
    if not _MODES[mode].has_workdir:
        _call_without_workdir(mode, cfg, given)
        return
    assert workdir is not None  # by `_check_usage`
    command = f'python -m sphere_ar_jax.main {shlex.join(sys.argv[1:])}'
    if mode == 'experiment':
        from sphere_ar_jax.commands import experiment

        assert cfg is not None  # by `_check_usage`
        experiment.experiment(cfg, _config_name(), workdir, command, **given)
    elif mode == 'train':
        from sphere_ar_jax.commands import train

        assert cfg is not None  # by `_check_usage`
        train.train(cfg, workdir, command, _STARTED)
    elif mode == 'convert':
        from sphere_ar_jax.commands import checkpoints

        ema = not given.pop('no_ema', False)
        checkpoints.convert_checkpoint(given.pop('checkpoint'), workdir, ema=ema, like=cfg, **given)
    else:
        _call_on_run(mode, workdir, cfg, given)


def _end(code: int, line: str, details: str = '') -> NoReturn:
    """Ends this process, and with it all others of its run.

    Args:
      code: the exit code.
      line: the last line on stderr.
      details: what is written before it.
    """
    if sys.modules.get('jax'):
        from sphere_ar_jax.runtime import ending

        ending.end(code, line, details)
    sys.stderr.write(details)
    print(line, file=sys.stderr)
    sys.exit(code)


def _guarded(function: Callable[[list[str]], _T]) -> Callable[[list[str]], _T]:
    """Makes errors of a function end the process with a line on stderr.

    Errors that the user can put right have no traceback, and the exit code of `console.exit_code`.
    A signal ends the process with 128 + its number, as in shells.
    """

    def guarded(argument: list[str]) -> _T:
        try:
            result = function(argument)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            console.end_unheard()
        except (UserError, OSError) as error:
            _end(console.exit_code(error), f'error: {said(error)}')
        except Preempted as stop:  # all processes stop at the same step
            from sphere_ar_jax.runtime import hosts

            if hosts.is_first():
                print(stop, file=sys.stderr)
            sys.exit(128 + stop.number)
        except KeyboardInterrupt:
            _end(128 + signal.SIGINT, 'interrupted; the same command goes on')
        except Exception as error:
            # Errors of buckets are no OSErrors. Without this module nothing was read or written.
            files = sys.modules.get('sphere_ar_jax.runtime.files')
            fault = None if files is None else files.bucket_fault(error)
            if fault is not None:
                _end(75 if fault.passes else 2, f'error: {fault.said}')
            _end(1, f'error: {one_line(error)}', traceback.format_exc())

    return guarded


def _tell(code: int, line: str) -> None:
    """Tells the other processes of the run to end, if there are any."""
    ending = sys.modules.get('sphere_ar_jax.runtime.ending')
    if ending is not None:
        ending.tell(code, line)


def _leave(code: object) -> None:
    """Ends the process with an exit code, whatever its other threads wait for."""
    time.sleep(_PATIENCE)
    os._exit(code if isinstance(code, int) else 1)


def run() -> None:
    """Runs the command line, `sphere-ar` or `python -m sphere_ar_jax.main`."""
    console.print_anything()
    interrupts.watch(_tell)
    try:
        app.run(_guarded(main), flags_parser=_guarded(_parse_flags))
    except SystemExit as stop:
        hosts = sys.modules.get('sphere_ar_jax.runtime.hosts')
        # A save that failed may have left threads of Orbax that wait, and Python waits for them.
        if stop.code and (hosts is None or hosts.count() == 1):
            threading.Thread(target=_leave, args=(stop.code,), daemon=True).start()
        raise


if __name__ == '__main__':
    run()
