"""What a host has for a run, and what it lacks, on one screen: run it on every host before the program.

  python -m sphere_ar_jax.doctor [--config=FILE[:VARIANT] [--config.KEY=VALUE …]] [--workdir=DIR|gs://BUCKET/DIR]
                                 [--data=KIND:PATH] [--timeout=SECONDS]

Takes the words of `main` as well, and says which it does not look at; with another --mode than train it looks at no
training. Every check ends with ok, WARN (it will run, but
perhaps not as meant) or FAIL (it will not), and with what to do. Exit code 1 if anything failed, 2 for wrong flags.
A check that has not answered after 60 s (--timeout), as storage and drivers may, has failed too.

Every check is a function of plain arguments that returns a `Check`. Sizes are bytes. What a check needs is imported in
it, for that a package is missing or broken is what the doctor is there to say.
"""

import collections
import importlib.metadata
import logging
import os
import platform
import queue
import shutil
import sys
import textwrap
import threading
import time
import uuid
from typing import NamedTuple

from sphere_ar_jax.console import size

WIDTH = 100  # of the screen, characters
REQUIRED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
OPTIONAL = ('libtpu', 'gcsfs')


class Check(NamedTuple):
    """What a check found: its name, 'ok', 'WARN' or 'FAIL', and a text of one line or more."""

    name: str
    status: str
    text: str


def limited(function, seconds):
    """function(), or TimeoutError where it has not returned after so many seconds; it is left alone then."""
    answers = queue.Queue()

    def call():
        try:
            answers.put((function(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f'no answer in {seconds:g} s') from None
    if error is not None:
        raise error
    return answer


# ---- the machine


def check_versions(version=importlib.metadata.version):
    """The versions of Python and of the packages that matter; version: name → str, or PackageNotFoundError."""
    found = {}
    for name in REQUIRED + OPTIONAL:
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    text = ', '.join(
        f'{name} {number or "–"}' for name, number in {'python': platform.python_version(), **found}.items()
    )
    missing = [name for name in REQUIRED if found[name] is None]
    if missing:
        return Check('versions', 'FAIL', f'{text}\nnot installed: {", ".join(missing)}; pip install -e .')
    return Check('versions', 'ok', text)


def check_frameworks(modules):
    """Whether TensorFlow or PyTorch got imported (modules: as `sys.modules`), which nothing here needs."""
    if modules.get('tensorflow') is not None:
        return Check('frameworks', 'WARN', 'TensorFlow got imported: it may take memory of the GPU, and is not needed')
    if modules.get('torch') is not None:
        return Check(
            'frameworks', 'ok', 'PyTorch is imported, as tensorboardX does where there is one: it costs seconds'
        )
    return Check('frameworks', 'ok', 'neither TensorFlow nor PyTorch is imported')


def device_files(exists=os.path.exists):
    """The accelerators that the operating system shows: (their name, the extra to install for them), or None."""
    if exists('/dev/nvidia0'):
        return 'an NVIDIA GPU', 'cuda12'
    if exists('/dev/accel0') or exists('/dev/vfio/0'):
        return 'a TPU', 'tpu'
    return None


def memory_limit(device, local_count):
    """Bytes that a device may use: its own memory, or of a CPU its share of the machine's; None where unknown."""
    if device.platform == 'cpu':
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // local_count
    return (device.memory_stats() or {}).get('bytes_limit')


def check_devices(devices, local, limit, files):
    """What JAX sees. devices, local: lists of all and of this process's devices; limit: bytes of each, or None; files:
    of `device_files`."""
    kinds = collections.Counter(device.device_kind for device in local)
    text = f'{len(local)} here of {len(devices)} {local[0].platform} device(s): '
    text += ', '.join(f'{count} × {kind}' for kind, count in kinds.items())
    text += f'; {size(limit)} each' if limit else '; memory unknown'
    if local[0].platform == 'cpu' and files is not None:
        name, extra = files
        return Check(
            'devices', 'WARN', f"{text}\nthe machine has {name}, but JAX does not use it: pip install -e '.[{extra}]'"
        )
    return Check('devices', 'ok', text)


def check_processes(index, count, local):
    """Which process this is, of how many; local: its devices."""
    return Check('processes', 'ok', f'process {index} of {count}, with {local} device(s)')


def check_cache(place, files=None):
    """Where compiled programs are kept. place: a path or URL; files: {name: bytes} found there, None if not local."""
    if files is None:
        return Check('cache', 'ok', place)
    programs = [count for name, count in files.items() if name.endswith('-cache')]
    return Check('cache', 'ok', f'{place}: {len(programs)} compiled program(s), {size(sum(programs))}')


def _cache(environ):
    from sphere_ar_jax import main

    place = environ.get('JAX_COMPILATION_CACHE_DIR') or main.compilation_cache(environ)
    if place is None:
        return Check('cache', 'WARN', 'JAX_COMPILATION_CACHE_DIR is empty: every start compiles anew')
    if '://' in place:
        return check_cache(place)
    found = os.scandir(place) if os.path.isdir(place) else ()
    return check_cache(place, {entry.name: entry.stat().st_size for entry in found if entry.is_file()})


# ---- the run


def check_memory(name, parts, limit):
    """What training takes on a device before any activation. parts: of `programs.state_bytes`; limit: bytes or None."""
    from sphere_ar_jax import programs

    total = sum(parts.values())
    text = ', '.join(f'{programs.NAMES.get(part, part)} {size(count)}' for part, count in parts.items() if count)
    text = f'{name}: {size(total)} on each device, without activations ({text})'
    if limit and total > limit:
        return Check(
            'memory', 'FAIL', f'{text}\nmore than the {size(limit)} there are: more devices, or a smaller model'
        )
    if limit and total > limit / 2:
        return Check(
            'memory', 'WARN', f'{text}\nmore than half of {size(limit)}: activations may not fit, see ….accumulate'
        )
    return Check('memory', 'ok', text)


def check_mesh(mesh, batch_sizes):
    """The mesh, and whether batches split over it. batch_sizes: {key: (images, pieces)}."""
    from sphere_ar_jax import sharding

    text = ', '.join(f'{axis} {count}' for axis, count in mesh.shape.items())
    for key, (images, pieces) in batch_sizes.items():
        if why := sharding.misfit(mesh, images, pieces):
            return Check('mesh', 'FAIL', f'{text}\n{why}: set --config.{key}, or the mesh')
    return Check('mesh', 'ok', text)


def _run_checks(cfg, found, limit):
    """(the checks of mesh and memory, bytes that checkpoints will take on disk). found: of `programs.stages`."""
    from sphere_ar_jax import costs, programs, sharding, training

    mesh = sharding.make_mesh(**cfg.mesh)
    batch_sizes = {
        f'{name}_training.batch_size': (s.options.batch_size, s.options.accumulate) for name, (s, _) in found.items()
    }
    checks, disk = [check_mesh(mesh, batch_sizes)], 0
    for name, (stage, frozen) in found.items():
        state = training.abstract_state(stage, mesh)
        if said := sharding.describe_not_split(mesh, state):
            checks.append(Check('mesh', 'WARN', f'{name}: {said}'))
        checks.append(check_memory(name, programs.state_bytes(stage, frozen, mesh), limit))
        once = costs.tree_bytes(state)
        # One more is written before the oldest goes.
        disk += once * (stage.options.keep + 1)
        if stage.options.keep_every:
            disk += once * (stage.options.steps // stage.options.keep_every)
    return checks, disk


def check_workdir(workdir, needed=0):
    """Whether a directory can be written: a small file is, is read again and deleted. Makes no directory.

    Args:
      workdir: a path, that need not exist yet, or gs://… needed: bytes that checkpoints will take, 0: not known.
    """
    from etils import epath

    place = epath.Path(workdir if '://' in workdir else os.path.abspath(workdir))
    remote = '://' in workdir
    while not remote and not os.path.lexists(place):  # it will be made
        place = place.parent
    file, content = place / f'.doctor-{uuid.uuid4().hex}', os.urandom(64)
    try:
        file.write_bytes(content)
        same = file.read_bytes() == content
        file.unlink()
    except ImportError as error:
        return Check('workdir', 'FAIL', f"{workdir}: {error}; pip install -e '.[gcs]'")
    except Exception as error:  # whatever the storage's library raises
        reason = getattr(error, 'strerror', None) or next(iter(str(error).splitlines()), '') or type(error).__name__
        hint = '; logged in? gcloud auth application-default login' if remote else ''
        return Check('workdir', 'FAIL', f'{workdir} cannot be written: {reason}{hint}')
    if not same:
        return Check('workdir', 'FAIL', f'{workdir}: what was written is not what is read again')
    text = f'{workdir} can be written' + (f'; checkpoints will take {size(needed)}' if needed else '')
    if remote:
        return Check('workdir', 'ok', text)
    free = shutil.disk_usage(place).free
    if free < needed:
        return Check(
            'workdir', 'FAIL', f'{text}\nbut only {size(free)} are free: make room, or set ….keep, ….keep_every'
        )
    return Check('workdir', 'WARN' if free < 2**30 else 'ok', f'{text}; {size(free)} free')


def check_inputs(cfg, workdir):
    """Whether what a training reads besides images is there: a tokenizer or a teacher, LPIPS' files."""
    from sphere_ar_jax import experiment

    found = experiment.check_inputs(cfg, workdir)
    return Check('inputs', 'ok', ', '.join(found) or 'nothing is read but images')


def check_data(kind, path, split='train', data_dir=None):
    """Whether the images are found, and how many; kind, path: see `config.DATA` and `sources.open_source`."""
    from sphere_ar_jax import data, sources

    if kind == 'digits':
        source = data.Digits('train', 0)
        return Check('data', 'ok', f'digits, part of scikit-learn: {len(source)} images to train on, 10 classes')
    if path is None:
        return Check('data', 'FAIL', f'data.path is not given, of the {kind} data: --config.data.path=…')
    source = sources.open_source(kind, path, split, data_dir)
    source[0], source[len(source) - 1]
    return Check('data', 'ok', f'{kind} {path}: {len(source)} images, {source.num_classes} classes')


# ---- the screen


def lines(check):
    """A check as lines of at most `WIDTH` characters, the first one with its status and name."""
    head = f'{check.status:<5} {check.name:<11} '
    wrap = lambda text: textwrap.wrap(text, WIDTH - len(head), break_on_hyphens=False) or ['']
    first, *rest = [line for part in check.text.splitlines() or [''] for line in wrap(part)]
    return [head + first] + [' ' * len(head) + line for line in rest]


class Examination:
    """Checks one after the other, each printed as it ends. failed: how many have. stuck: whether one still runs."""

    def __init__(self, seconds, show=print):
        self._seconds, self._show, self.failed, self.warned, self.stuck = seconds, show, 0, 0, False

    def say(self, check):
        self.failed += check.status == 'FAIL'
        self.warned += check.status == 'WARN'
        for line in lines(check):
            self._show(line)

    def run(self, name, function, slow='give it longer: --timeout=SECONDS'):
        """function() with the time limit; what it raises is said as a failed check, and None returned. slow: what to do
        where it does not answer."""
        try:
            return limited(function, self._seconds)
        except TimeoutError as error:
            self.stuck = True
            text = f'{error}: {slow}'
        except Exception as error:  # the doctor must go on
            text = ' '.join(str(error).split()) or type(error).__name__
            if isinstance(error, AssertionError | AttributeError | KeyError | TypeError | ImportError):
                text = f'{type(error).__name__}: {text}'
        self.say(Check(name, 'FAIL', text))

    def check(self, name, function, **options):
        """`run` of a function that returns a Check, which is said."""
        found = self.run(name, function, **options)
        if found is not None:
            self.say(found)


def examine(cfg, workdir, data, examination, trains=True):
    """All checks. cfg: a config, not checked yet, or None. workdir, data: as given by flags, or None. trains: whether a
    training is to be looked at."""
    import jax

    from sphere_ar_jax import config, joining, programs, recipes

    e = examination
    e.run('processes', joining.join, slow='have the other processes been started? --timeout=SECONDS waits longer')
    if e.failed:  # a device asked for now would wait for the others without end
        return
    seen = e.run('devices', lambda: (jax.devices(), jax.local_devices()), slow='does another program hold them?')
    if seen is None:
        return
    devices, local = seen
    limit = memory_limit(local[0], len(local))
    e.say(check_processes(jax.process_index(), jax.process_count(), len(local)))
    e.say(check_devices(devices, local, limit, device_files()))
    disk = 0
    trainings = None if cfg is None else e.run('config', lambda: programs.stages(config.check(cfg)))
    if trainings is not None and trains:
        checks, disk = e.run('mesh', lambda: _run_checks(cfg, trainings, limit)) or ((), 0)
        for check in checks:
            e.say(check)
    if workdir is not None:
        e.check('workdir', lambda: check_workdir(workdir, disk), slow='is the storage there, and are you logged in?')
    if data is not None:
        found = recipes.data_set(data)
    elif cfg is not None and trains:
        found = cfg.data.name, cfg.data.path, cfg.data.split, cfg.data.data_dir
    else:
        found = None
    if found is not None:
        slow = "a large tar's index takes minutes, once: --timeout=1800"
        e.check('data', lambda: check_data(*found), slow=slow)
    if trainings is not None and trains:
        e.check('inputs', lambda: check_inputs(cfg, workdir), slow='is the storage there, and are you logged in?')
    e.check('cache', lambda: _cache(os.environ))
    e.say(check_frameworks(sys.modules))


def _flags(argv):
    """(values of the flags, the words that are of `main` alone). Raises what absl and config files raise."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()  # of its own: `main` has flags of the same names
    config_flags.DEFINE_config_file('config', None, 'Configuration file.', flag_values=values, sys_argv=argv)
    flags.DEFINE_string('workdir', None, 'Directory of the run, local or gs://…', flag_values=values)
    flags.DEFINE_string('mode', 'train', 'As for `main`.', flag_values=values)
    flags.DEFINE_string('data', None, 'KIND:PATH, in place of the data of the config.', flag_values=values)
    flags.DEFINE_float('timeout', 60, 'Seconds that a check may take.', 1e-3, flag_values=values)
    return values, values(argv, known_only=True)[1:]


def main(argv):
    """Examines this host. Returns the exit code."""
    if '--help' in argv:
        print(__doc__.split('\n\nEvery check is')[0])
        return 0
    started = time.perf_counter()
    versions = check_versions()
    if versions.status == 'FAIL':
        print('\n'.join(lines(versions)))
        return 1
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises all the same
    try:
        from sphere_ar_jax.main import one_line

        values, rest = _flags(argv)
        cfg = values.config
        if cfg is not None:
            dict(cfg.items())  # a config file that failed to load says so only when it is read
    except ImportError as error:
        print('\n'.join(lines(Check('package', 'FAIL', f'cannot be imported: {error}; pip install -e .'))))
        return 1
    except Exception as error:  # also whatever a config file raises
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 2
    examination = Examination(values.timeout)
    print(f'{platform.node()}, {platform.platform(terse=True)}, {os.cpu_count()} CPUs')
    examination.say(versions)
    if rest:
        examination.say(Check('flags', 'ok', f'not looked at: {" ".join(rest)}'))
    trains = values.mode == 'train'
    if not trains:
        examination.say(Check('flags', 'ok', f'of --mode={values.mode} only the machine and the workdir are looked at'))
    examine(cfg, values.workdir, values.data, examination, trains)
    seconds = time.perf_counter() - started
    print(f'{examination.failed} failed, {examination.warned} warning(s), {seconds:.0f} s')
    sys.stdout.flush()
    if examination.stuck:
        os._exit(1)  # what did not answer would hold up the end too
    return 1 if examination.failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
