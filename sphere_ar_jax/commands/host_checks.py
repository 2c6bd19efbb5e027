"""The checks that the doctor makes: what this host has and lacks for a run.

Every check does its own imports, so that the doctor can say which package is missing.
"""

import collections
import concurrent.futures
import importlib.metadata
import os
import pathlib
import platform
import shutil
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from sphere_ar_jax.runtime.console import UserError, first_line, size

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from sphere_ar_jax.data import small, sources
    from sphere_ar_jax.runtime.types import Progress, PyTree
    from sphere_ar_jax.training.state import Stage

_T = TypeVar('_T')

# Characters of a line on the screen.
WIDTH = 100
# Packages without which nothing runs, and those that some runs need.
REQUIRED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
OPTIONAL = ('libtpu', 'gcsfs', 'tokenizers')


class Check(NamedTuple):
    """What a check found.

    Attributes:
      name: the name of the check.
      status: 'ok', 'WARN' or 'FAIL'.
      text: one line or more.
    """

    name: str
    status: str
    text: str


def limited(
    function: Callable[[], _T], seconds: float, heard: Callable[[], float] = lambda: 0.0
) -> _T:
    """Calls function() with a time limit.

    Args:
      function: what to call.
      seconds: how long it may take, counted from its last sign of progress.
      heard: gives the time of that sign, by `time.monotonic`; the start counts as one, too.

    Raises:
      TimeoutError: the function has not returned in time. It goes on in a thread that nobody waits
        for.
    """
    started = time.monotonic()
    answer: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def call() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    while True:
        end = max(started, heard()) + seconds
        try:
            return answer.result(max(end - time.monotonic(), 0))
        except TimeoutError:
            # The function may raise it, too, or have given a sign meanwhile.
            if answer.done() or max(started, heard()) + seconds == end:
                raise


# ---- the machine


def check_versions(version: Callable[[str], str] = importlib.metadata.version) -> Check:
    """The versions of Python and of the packages that matter.

    Args:
      version: gives the version of a package by its name, or raises PackageNotFoundError.
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
        text += f'\nnot installed: {", ".join(missing)}; pip install -e .'
        return Check('versions', 'FAIL', text)
    return Check('versions', 'ok', text)


def device_files(exists: Callable[[str], bool] = os.path.exists) -> tuple[str, str] | None:
    """The accelerators that the operating system shows.

    Args:
      exists: whether there is a file of a path.

    Returns:
      (their name, the package's extra to install for them), or None where there are none.
    """
    if exists('/dev/nvidia0'):
        return 'an NVIDIA GPU', 'cuda12'
    if exists('/dev/accel0') or exists('/dev/vfio/0'):
        return 'a TPU', 'tpu'
    return None


def check_devices(
    devices: 'Sequence[jax.Device]',
    local: 'Sequence[jax.Device]',
    limit: int | None,
    files: tuple[str, str] | None,
) -> Check:
    """What JAX sees.

    Args:
      devices: all devices of the run.
      local: those of this process.
      limit: bytes that each of them may use, None where not known.
      files: what `device_files` gives.
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


def check_cache(environ: Mapping[str, str]) -> Check:
    """Where compiled programs are kept, and, if that is a local directory, how many there are.

    Args:
      environ: environment variables, which say where.
    """
    from sphere_ar_jax.runtime import files

    place = environ.get('JAX_COMPILATION_CACHE_DIR') or files.compilation_cache(environ)
    if place is None:
        text = 'JAX_COMPILATION_CACHE_DIR is empty: every start compiles anew'
        return Check('cache', 'WARN', text)
    if files.is_remote(place):
        return Check('cache', 'ok', place)
    programs = [path.stat().st_size for path in pathlib.Path(place).glob('*-cache')]
    text = f'{place}: {len(programs)} compiled program(s), {size(sum(programs))}'
    return Check('cache', 'ok', text)


# ---- the run


def check_memory(name: str, parts: dict[str, int], limit: int | None) -> Check:
    """What a training takes on a device before any activation.

    Args:
      name: the stage.
      parts: bytes of each part, see `programs.state_bytes`.
      limit: bytes that the device may use, None where not known.
    """
    from sphere_ar_jax.measure import programs

    total = sum(parts.values())
    shares = [
        f'{programs.NAMES.get(part, part)} {size(count)}' for part, count in parts.items() if count
    ]
    text = f'{name}: {size(total)} on each device, without activations ({", ".join(shares)})'
    if limit and total > limit:
        text += f'\nmore than the {size(limit)} there are: more devices, or a smaller model'
        return Check('memory', 'FAIL', text)
    if limit and total > limit / 2:
        text += f'\nmore than half of {size(limit)}: activations may not fit, see ….accumulate'
        return Check('memory', 'WARN', text)
    return Check('memory', 'ok', text)


def check_mesh(mesh: 'Mesh', batch_sizes: dict[str, tuple[int, int]]) -> Check:
    """The mesh, and whether batches split over it.

    Args:
      mesh: the devices.
      batch_sizes: {the config's key: (images, pieces)}; each piece must split.
    """
    from sphere_ar_jax.runtime import sharding

    text = ', '.join(f'{axis} {count}' for axis, count in mesh.shape.items())
    for key, (images, pieces) in batch_sizes.items():
        why = sharding.misfit(mesh, images, pieces)
        if why:
            return Check('mesh', 'FAIL', f'{text}\n{why}: set --config.{key}, or the mesh')
    return Check('mesh', 'ok', text)


def run_checks(
    cfg: 'ConfigDict',
    found: 'dict[str, tuple[Stage, PyTree]]',
    limit: int | None,
) -> 'tuple[list[Check], dict[str, Saved]]':
    """Checks the mesh and the memory that the trainings take.

    Args:
      cfg: a checked config.
      found: its trainings, see `programs.stages`.
      limit: bytes that a device may use, None where not known.

    Returns:
      (checks, what each stage saves).
    """
    from sphere_ar_jax.measure import costs, programs
    from sphere_ar_jax.runtime import sharding
    from sphere_ar_jax.training.state import abstract_state

    mesh = sharding.make_mesh(**cfg.mesh)
    batch_sizes = {
        f'{name}_training.batch_size': (s.options.batch_size, s.options.accumulate)
        for name, (s, _) in found.items()
    }
    checks = [check_mesh(mesh, batch_sizes)]
    saved = {}
    for name, (stage, frozen) in found.items():
        state = abstract_state(stage, mesh)
        said = sharding.describe_not_split(mesh, state)
        if said:
            checks.append(Check('mesh', 'WARN', f'{name}: {said}'))
        checks.append(check_memory(name, programs.state_bytes(stage, frozen, mesh), limit))
        saved[name] = Saved(costs.tree_bytes(state), stage.options)
    return checks, saved


class Saved(NamedTuple):
    """What a stage saves.

    Attributes:
      size: bytes of a checkpoint.
      options: the stage's section of the config.
    """

    size: int
    options: 'ConfigDict'


def room_for(saved: dict[str, Saved], workdir: str) -> int:
    """The bytes that checkpoints will take besides those that are there.

    Args:
      saved: what each stage saves, by its name.
      workdir: the directory of the run, an absolute path or gs://…
    """
    from sphere_ar_jax.training.workdir import saved_steps

    room = 0
    for name, one in saved.items():
        options = one.options
        there = saved_steps(workdir, name)
        if options.steps in there:
            continue
        # A new checkpoint is written before the oldest is removed, hence one more.
        most = options.keep + 1
        if options.keep_every:
            most += options.steps // options.keep_every
        room += one.size * max(1, most - len(there))
    return room


def check_workdir(workdir: str, saved: dict[str, Saved] | None = None) -> Check:
    """Whether a directory can be written.

    Writes a small file, reads it again and deletes it. Makes no directory: where the workdir does
    not exist yet, the nearest directory above it is tried.

    Args:
      workdir: an absolute path, or gs://…
      saved: what each stage will save, None where not known.
    """
    from etils import epath

    from sphere_ar_jax.runtime import files

    remote = files.is_remote(workdir)
    place = epath.Path(workdir)
    while not remote and not os.path.lexists(place):
        place = place.parent
    file = place / f'.doctor-{uuid.uuid4().hex}'
    content = os.urandom(64)
    try:
        file.write_bytes(content)
        same = file.read_bytes() == content
        file.unlink()
    except ImportError as error:
        return Check('workdir', 'FAIL', f"{workdir}: {error}; pip install -e '.[gcs]'")
    except Exception as error:  # the libraries of storages raise errors of many classes
        reason = first_line(error)
        hint = '; logged in? gcloud auth application-default login' if remote else ''
        return Check('workdir', 'FAIL', f'{workdir} cannot be written: {reason}{hint}')
    if not same:
        return Check('workdir', 'FAIL', f'{workdir}: what was written is not what is read again')
    text = f'{workdir} can be written'
    needed = room_for(saved or {}, workdir)
    if needed:
        text += f'; checkpoints will take {size(needed)}'
    if remote:
        return Check('workdir', 'ok', text)
    free = shutil.disk_usage(place).free
    if free < needed:
        text += f'\nbut only {size(free)} are free: make room, or set ….keep, ….keep_every'
        return Check('workdir', 'FAIL', text)
    return Check('workdir', 'WARN' if free < 2**30 else 'ok', f'{text}; {size(free)} free')


def check_inputs(cfg: 'ConfigDict', workdir: str | None) -> Check:
    """Whether a training finds what it reads besides images.

    That is a tokenizer, a teacher, the run that it is fine-tuned from, features of texts, and the
    files of LPIPS.

    Args:
      cfg: a checked config.
      workdir: the directory of the run, an absolute path; None where not known.
    """
    from sphere_ar_jax.commands.inputs import agreement, origins

    found = origins.check_inputs(agreement.with_absolute_paths(cfg), workdir)
    return Check('inputs', 'ok', ', '.join(found) or 'nothing is read but images')


def check_captions(cfg: 'ConfigDict', source: 'sources.Images | small.Split') -> Check:
    """Whether images have the captions that an AR model reads, and the vocabulary knows them.

    Args:
      cfg: a checked config whose AR model reads texts.
      source: its images.

    Raises:
      UserError: see `table.with_captions` and `training_images.describe_captions`.
    """
    from sphere_ar_jax.commands.inputs import training_images
    from sphere_ar_jax.data.captions import table

    if cfg.data.captions is not None:
        # The config's checks refuse a table for the small data sets.
        source = table.with_captions(cast('sources.Images', source), cfg.data.captions)
    said = training_images.describe_captions(cfg, source)
    left_out = getattr(source, 'left_out', '')
    if left_out:
        said.append(f'left out: {left_out}')
    return Check('captions', 'ok', '\n'.join(said))


def check_small(
    kind: str, path: str | None, training: 'small.Split'
) -> 'tuple[Check, sources.Images | small.Split]':
    """Says how many training images a small data set has, and which classes.

    Args:
      kind: a key of `small.KINDS`.
      path: where its files lie, None where it has none.
      training: its training images.
    """
    from sphere_ar_jax.config import schema
    from sphere_ar_jax.data import small
    from sphere_ar_jax.evaluation import class_names

    where = f'{kind} {path}' if small.KINDS[kind].has_path else f'{kind}, part of scikit-learn'
    what = 'with captions'
    if kind not in schema.CAPTIONED:
        what = class_names.describe(training.num_classes, training.class_names)
    text = f'{where}: {len(training)} images to train on, {what}'
    return Check('data', 'ok', text), training


def check_data(
    kind: str,
    path: str | None,
    split: str = 'train',
    data_dir: str | None = None,
    needs_labels: bool = True,
    progress: 'Progress' = lambda done, total: None,
) -> 'tuple[Check, sources.Images | small.Split]':
    """Opens the images of a training, and says how many images and classes there are.

    Args:
      kind: a key of `schema.DATA`.
      path: the path of the images, see `sources.open_source`; None where it is not given.
      split: the split of tfds or hf.
      data_dir: the directory of tfds or hf, None for its default.
      needs_labels: see `sources.open_source`.
      progress: likewise.

    Returns:
      (what was found, the images).

    Raises:
      UserError: the images cannot be opened, or the first or the last one cannot be read.
    """
    from sphere_ar_jax.data import small, sources
    from sphere_ar_jax.evaluation import class_names

    if path is None and (kind not in small.KINDS or small.KINDS[kind].has_path):
        raise UserError(f'data.path is not given, of the {kind} data: --config.data.path=…')
    if kind in small.KINDS:
        return check_small(kind, path, small.open_data_set(kind, path, 0, 0.2).train)
    assert path is not None  # by the lines above
    source = sources.open_source(
        kind, path, split, data_dir, needs_labels=needs_labels, progress=progress
    )
    # Reading raises where the files are damaged.
    for i in (0, len(source) - 1):
        source[i]
    classes = class_names.describe(source.num_classes, source.class_names)
    text = f'{kind} {path}: {len(source)} images, {classes}'
    if source.left_out:
        text += f'\nleft out: {source.left_out}'
    return Check('data', 'ok', text), source


# ---- the screen


def lines(check: Check) -> list[str]:
    """A check as lines of at most `WIDTH` characters, the first one with its status and name."""
    head = f'{check.status:<5} {check.name:<11} '
    wrapped = []
    for line in check.text.splitlines() or ['']:
        wrapped += textwrap.wrap(line, WIDTH - len(head), break_on_hyphens=False) or ['']
    first, *rest = wrapped
    indent = ' ' * len(head)
    return [head + first] + [indent + line for line in rest]


# The message of these errors says little without the name of their class.
_NAMED_ERRORS = (AssertionError, AttributeError, KeyError, TypeError, ImportError)


class Examination:
    """Runs checks one after the other and prints each as it ends.

    Attributes:
      failed: how many checks have failed.
      warned: how many have warned.
      stuck: whether one did not answer in time and still runs.
    """

    def __init__(self, seconds: float, show: Callable[[str], Any] = print):
        """Begins an examination.

        Args:
          seconds: the time limit of each check, and of each of its steps where it tells them.
          show: is called with every line to print.
        """
        self._seconds = seconds
        self._show = show
        self._heard = 0.0
        self.failed = 0
        self.warned = 0
        self.stuck = False

    def say(self, check: Check) -> None:
        """Prints a check and counts it."""
        self.failed += check.status == 'FAIL'
        self.warned += check.status == 'WARN'
        for line in lines(check):
            self._show(line)

    def progress(self, done: int, total: int) -> None:
        """Gives the check that runs its whole time again. It is a `Progress` of what that reads."""
        del done, total  # that there is progress is enough
        self._heard = time.monotonic()

    def run(
        self,
        name: str,
        function: Callable[[], _T],
        slow: str = 'give it longer: --timeout=SECONDS',
    ) -> _T | None:
        """Calls function() with the time limit.

        Args:
          name: the name of the check that fails where the function raises or does not answer.
          function: what to call.
          slow: what the message advises where the function does not answer.

        Returns:
          What the function returns, or None where it raises or does not answer.
        """
        try:
            return limited(function, self._seconds, lambda: self._heard)
        except TimeoutError:
            self.stuck = True
            text = f'no answer in {self._seconds:g} s: {slow}'
        except Exception as error:  # the doctor must go on
            text = ' '.join(str(error).split()) or type(error).__name__
            if isinstance(error, _NAMED_ERRORS):
                text = f'{type(error).__name__}: {text}'
        self.say(Check(name, 'FAIL', text))
        return None

    def check(self, name: str, function: Callable[[], Check], **options: str) -> None:
        """Prints the check that a function returns; see `run`."""
        found = self.run(name, function, **options)
        if found is not None:
            self.say(found)
