"""The checks that the doctor makes: what this host has and lacks for a run."""

import collections
import concurrent.futures
import importlib.metadata
import os
import pathlib
import platform
import shutil
import textwrap
import threading
import uuid
from typing import NamedTuple

from sphere_ar_jax.runtime.console import first_line, size

WIDTH = 100  # of the screen, characters
REQUIRED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
OPTIONAL = ('libtpu', 'gcsfs')


class Check(NamedTuple):
    """What a check found: its name, 'ok', 'WARN' or 'FAIL', and a text of one line or more."""

    name: str
    status: str
    text: str


def limited(function, seconds):
    """function(), or TimeoutError where it has not returned after so many seconds; it is left alone
    then.
    """
    answer = concurrent.futures.Future()

    def call():
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return answer.result(seconds)


# ---- the machine


def check_versions(version=importlib.metadata.version):
    """The versions of Python and of the packages that matter; version: name → str, or
    PackageNotFoundError.
    """
    found = {'python': platform.python_version()}
    for name in REQUIRED + OPTIONAL:
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = '–'
    text = ', '.join(f'{name} {number}' for name, number in found.items())
    missing = [name for name in REQUIRED if found[name] == '–']
    if missing:
        return Check(
            'versions', 'FAIL', f'{text}\nnot installed: {", ".join(missing)}; pip install -e .'
        )
    return Check('versions', 'ok', text)


def device_files(exists=os.path.exists):
    """The accelerators that the operating system shows: (their name, the extra to install for
    them), or None.
    """
    if exists('/dev/nvidia0'):
        return 'an NVIDIA GPU', 'cuda12'
    if exists('/dev/accel0') or exists('/dev/vfio/0'):
        return 'a TPU', 'tpu'
    return None


def memory_limit(device, local_count):
    """Bytes that a device may use: its own memory, or of a CPU its share of the machine's; None
    where unknown.
    """
    if device.platform == 'cpu':
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // local_count
    return (device.memory_stats() or {}).get('bytes_limit')


def check_devices(devices, local, limit, files):
    """What JAX sees. devices, local: lists of all and of this process's devices; limit: bytes of
    each, or None; files: of `device_files`.
    """
    kinds = collections.Counter(device.device_kind for device in local)
    text = f'{len(local)} here of {len(devices)} {local[0].platform} device(s): '
    text += ', '.join(f'{count} × {kind}' for kind, count in kinds.items())
    text += f'; {size(limit)} each' if limit else '; memory unknown'
    if local[0].platform == 'cpu' and files is not None:
        name, extra = files
        text += f"\nthe machine has {name}, but JAX does not use it: pip install -e '.[{extra}]'"
        return Check('devices', 'WARN', text)
    return Check('devices', 'ok', text)


def check_cache(environ):
    """Where compiled programs are kept, as the environment variables say, and what is there if it
    is local.
    """
    from sphere_ar_jax.runtime import files

    place = environ.get('JAX_COMPILATION_CACHE_DIR') or files.compilation_cache(environ)
    if place is None:
        return Check(
            'cache', 'WARN', 'JAX_COMPILATION_CACHE_DIR is empty: every start compiles anew'
        )
    if '://' in place:
        return Check('cache', 'ok', place)
    programs = [path.stat().st_size for path in pathlib.Path(place).glob('*-cache')]
    return Check(
        'cache', 'ok', f'{place}: {len(programs)} compiled program(s), {size(sum(programs))}'
    )


# ---- the run


def check_memory(name, parts, limit):
    """What training takes on a device before any activation. parts: of `programs.state_bytes`;
    limit: bytes or None.
    """
    from sphere_ar_jax.measure import programs

    total = sum(parts.values())
    text = ', '.join(
        f'{programs.NAMES.get(part, part)} {size(count)}' for part, count in parts.items() if count
    )
    text = f'{name}: {size(total)} on each device, without activations ({text})'
    if limit and total > limit:
        text += f'\nmore than the {size(limit)} there are: more devices, or a smaller model'
        return Check('memory', 'FAIL', text)
    if limit and total > limit / 2:
        text += f'\nmore than half of {size(limit)}: activations may not fit, see ….accumulate'
        return Check('memory', 'WARN', text)
    return Check('memory', 'ok', text)


def check_mesh(mesh, batch_sizes):
    """The mesh, and whether batches split over it. batch_sizes: {key: (images, pieces)}."""
    from sphere_ar_jax.runtime import sharding

    text = ', '.join(f'{axis} {count}' for axis, count in mesh.shape.items())
    for key, (images, pieces) in batch_sizes.items():
        if why := sharding.misfit(mesh, images, pieces):
            return Check('mesh', 'FAIL', f'{text}\n{why}: set --config.{key}, or the mesh')
    return Check('mesh', 'ok', text)


def run_checks(cfg, found, limit):
    """(the checks of mesh and memory, bytes that checkpoints will take on disk). found: of
    `programs.stages`.
    """
    from sphere_ar_jax.measure import costs, programs
    from sphere_ar_jax.runtime import sharding
    from sphere_ar_jax.training.state import abstract_state

    mesh = sharding.make_mesh(**cfg.mesh)
    batch_sizes = {
        f'{name}_training.batch_size': (s.options.batch_size, s.options.accumulate)
        for name, (s, _) in found.items()
    }
    checks, disk = [check_mesh(mesh, batch_sizes)], 0
    for name, (stage, frozen) in found.items():
        state = abstract_state(stage, mesh)
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
    """Whether a directory can be written: a small file is, is read again and deleted. Makes no
    directory.

    Args:
      workdir: a path, that need not exist yet, or gs://… needed: bytes that checkpoints will take,
        0: not known.
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
        reason = first_line(error)
        hint = '; logged in? gcloud auth application-default login' if remote else ''
        return Check('workdir', 'FAIL', f'{workdir} cannot be written: {reason}{hint}')
    if not same:
        return Check('workdir', 'FAIL', f'{workdir}: what was written is not what is read again')
    text = f'{workdir} can be written' + (
        f'; checkpoints will take {size(needed)}' if needed else ''
    )
    if remote:
        return Check('workdir', 'ok', text)
    free = shutil.disk_usage(place).free
    if free < needed:
        text += f'\nbut only {size(free)} are free: make room, or set ….keep, ….keep_every'
        return Check('workdir', 'FAIL', text)
    return Check('workdir', 'WARN' if free < 2**30 else 'ok', f'{text}; {size(free)} free')


def check_inputs(cfg, workdir):
    """Whether what a training reads besides images is there: a tokenizer or a teacher, LPIPS'
    files.
    """
    from sphere_ar_jax.commands import train

    found = train.check_inputs(cfg, workdir)
    return Check('inputs', 'ok', ', '.join(found) or 'nothing is read but images')


def check_data(kind, path, split='train', data_dir=None):
    """Whether the images are found, and how many; kind, path: see `schema.DATA` and
    `sources.open_source`.
    """
    from sphere_ar_jax.data import digits, sources

    if kind == 'digits':
        source = digits.Digits('train', 0)
        return Check(
            'data',
            'ok',
            f'digits, part of scikit-learn: {len(source)} images to train on, 10 classes',
        )
    if path is None:
        return Check(
            'data', 'FAIL', f'data.path is not given, of the {kind} data: --config.data.path=…'
        )
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
    """Checks one after the other, each printed as it ends. failed: how many have. stuck: whether
    one still runs.
    """

    def __init__(self, seconds, show=print):
        self._seconds, self._show, self.failed, self.warned, self.stuck = seconds, show, 0, 0, False

    def say(self, check):
        """Print a check and count it."""
        self.failed += check.status == 'FAIL'
        self.warned += check.status == 'WARN'
        for line in lines(check):
            self._show(line)

    def run(self, name, function, slow='give it longer: --timeout=SECONDS'):
        """function() with the time limit; what it raises is said as a failed check, and None
        returned. slow: what to do where it does not answer.
        """
        try:
            return limited(function, self._seconds)
        except TimeoutError:
            self.stuck = True
            text = f'no answer in {self._seconds:g} s: {slow}'
        except Exception as error:  # the doctor must go on
            text = ' '.join(str(error).split()) or type(error).__name__
            if isinstance(
                error, AssertionError | AttributeError | KeyError | TypeError | ImportError
            ):
                text = f'{type(error).__name__}: {text}'
        self.say(Check(name, 'FAIL', text))

    def check(self, name, function, **options):
        """`run` of a function that returns a Check, which is said."""
        found = self.run(name, function, **options)
        if found is not None:
            self.say(found)
