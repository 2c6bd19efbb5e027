"""Orbax checkpoints that tell damage: a fingerprint of every save, verified on every restore.

A step directory holds `state` (the training state), `data` (what is noted of the data and of frozen
parameters) and `meta` (fingerprint, step, seconds trained). Orbax writes it under a temporary name
and renames it when it is whole, so that a kill leaves no half step. Orbax notices neither bit flips
in array data nor a step that was copied over another one. The fingerprint and the step do.

Only contents that are wrong are damage. What a disk or a bucket refuses (`files.fault`) is tried
again, and then ends the run with everything left as it is.

Where a run has several processes, all of them must make the same calls. Each writes and reads what
its devices hold, in one directory that all see, and all come to the same verdict on what they read.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sphere_ar_jax.runtime import files, hosts
from sphere_ar_jax.runtime.console import UserError, first_line, refusal
from sphere_ar_jax.runtime.types import PyTree

_SMALL = 2**16  # numbers in a leaf
_LARGE = 2**22

# Seconds before each further try to read a step, after a fault that may pass.
PAUSES: tuple[float, ...] = (1, 2, 4)

# What a step holds: (state or the part of it that was asked for, data_state, seconds).
_Contents: TypeAlias = tuple[PyTree, Any, float]


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> jax.Array:
    """A uint32 for each leaf: Σ word·weight mod 2³², the same on any mesh.

    The weights depend on the position, and are odd, so that any single flipped bit changes the sum.
    """

    def part(a, first):
        """The sum over a piece of a leaf; its first word has the position `first`."""
        word_type = {1: jnp.uint8, 2: jnp.uint16}.get(a.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(a, word_type)
        words = words.astype(jnp.uint32).ravel()
        position = jnp.arange(words.size, dtype=jnp.uint32) + first
        product = position * np.uint32(2654435761)
        mixed = product ^ ((position * np.uint32(40503)) >> np.uint32(7))
        weights = mixed | np.uint32(1)
        return jnp.sum(words * weights, dtype=jnp.uint32)

    def one(a):
        """The sum over a leaf. A large one is summed row by row, without a second copy of it."""
        if a.ndim < 2 or a.size < _LARGE:
            return part(a, np.uint32(0))
        words = a.size // len(a) * max(a.dtype.itemsize // 4, 1)
        firsts = jnp.arange(len(a), dtype=jnp.uint32) * np.uint32(words)

        def add(total, row):
            return total + part(*row), None

        total, _ = jax.lax.scan(add, jnp.uint32(0), (a, firsts))
        return total

    # Small leaves of one shape, as a bias and its moments, are summed together, which compiles in
    # less than half of the time.
    alike: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        own = None if leaf.size <= _SMALL else place
        alike.setdefault((leaf.shape, leaf.dtype, own), []).append(place)
    sums = []
    for places in alike.values():
        if len(places) == 1:
            sums.append(one(leaves[places[0]])[None])
        else:
            sums.append(jax.vmap(one)(jnp.stack([leaves[place] for place in places])))
    order = np.argsort(np.concatenate([*alike.values()]))
    return jnp.concatenate(sums)[order]


def fingerprint(tree: PyTree) -> list[int]:
    """One number for each leaf of a tree of arrays, which changes if any single bit of it does.

    All processes must call it.
    """
    # Trees of the same leaves, as a state and what is read of it, share one program.
    return [int(x) for x in hosts.gather(_fingerprints(jax.tree.leaves(tree)))]


def digest(tree: PyTree) -> str:
    """A hash of all bits of a tree of arrays, 8 hexadecimal digits. All processes must call it."""
    return f'{zlib.crc32(json.dumps(fingerprint(tree)).encode()):08x}'


def _checksum(data_state: Any, seconds: float, step: int | None) -> int:
    """A checksum of what a step holds beside the state.

    Args:
      data_state: see `Checkpoints.save`.
      seconds: see `Checkpoints.save`.
      step: the step; None for checkpoints of versions that did not note it.
    """
    noted = [data_state, seconds] if step is None else [data_state, seconds, step]
    return zlib.crc32(json.dumps(noted, sort_keys=True).encode())


_STATUS = re.compile(r'[A-Z]+(_[A-Z]+)*: ')  # how TensorStore's errors begin


def _root(error: BaseException) -> BaseException:
    """The first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _damage(
    data_state: Any, meta: dict[str, Any], numbers: dict[int, int], step: int, held: int | None
) -> str:
    """What is wrong with what was read of a step, '' if nothing is.

    Args:
      data_state: what the step notes of the data.
      meta: what it notes to be compared.
      numbers: the fingerprints of the leaves that were read, by their index in the state.
      step: the step by the name of its directory.
      held: the step by the state, None where the state has none.
    """
    try:
        same = all(meta['fingerprint'][i] == number for i, number in numbers.items())
        checksum = _checksum(data_state, meta['seconds'], meta.get('step'))
        if not same or checksum != meta['crc32']:
            return 'its contents do not match their fingerprint'
    except (KeyError, IndexError, TypeError, AttributeError):
        return 'its fingerprint cannot be read'
    inside = meta.get('step', held)
    return '' if inside in (None, step) else f'it holds step {inside}, not {step}'


def _step_index(like: PyTree) -> int | None:
    """The index of the leaf `step` at the top of a state, None where there is none."""
    for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(like)):
        if jax.tree_util.keystr(path, simple=True) == 'step':
            return i
    return None


def _left_behind(error: BaseException | None) -> bool:
    """Whether an error comes from a read that Orbax abandoned when another one failed."""
    text = str(error)
    return any(word in text for word in ('TensorStore', 'OCDBT', 'Event loop is closed'))


def _not_left_behind(record: logging.LogRecord) -> bool:
    """Filters such errors out of a log."""
    return not (record.exc_info and _left_behind(record.exc_info[1]))


def _not_raised_later(record: logging.LogRecord) -> bool:
    """Filters out of a log the tracebacks of Orbax's threads, whose errors it raises later."""
    return not (record.exc_info and 'orbax' in record.pathname)


@functools.cache
def _quieten() -> None:
    """Hides errors that Orbax shows in tracebacks besides raising them, to the process's end.

    When one read fails, Orbax abandons the others, and each of them would show a traceback. When a
    save fails, each of the threads that share in it shows one.
    """
    logging.getLogger('absl').addFilter(_not_raised_later)
    show = sys.unraisablehook

    def show_others(it: 'sys.UnraisableHookArgs') -> None:
        if not _left_behind(it.exc_value):
            show(it)

    sys.unraisablehook = show_others
    logging.getLogger('asyncio').addFilter(_not_left_behind)


class Checkpoints:
    """The checkpoints of one training run in one directory.

    Attributes:
      directory: where they are.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
        remedy: str = 'move the directory away to start anew',
    ) -> None:
        """Opens the directory, and makes it if it is not there.

        Args:
          directory: where the checkpoints are.
          keep: number of newest checkpoints that are kept.
          keep_every: checkpoints at multiples of this step are kept for good; 0 keeps none.
          read_only: neither makes, moves nor deletes anything, the directory included.
          remedy: what the user is told to do where all checkpoints are damaged.
        """
        self.directory = files.absolute(directory)
        self._read_only = read_only
        self._remedy = remedy
        self._manager: ocp.CheckpointManager | None = None
        _quieten()
        if read_only:
            return
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            # An error of making a directory is raised at once. A thread that meets it leaves other
            # threads waiting for the directory, which keep the process alive.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._check_directory()
        self._manager = self._open()
        self._remove_dead_saves()

    def _check_directory(self) -> None:
        """Raises UserError where something else than a directory is in the way."""
        for path in (epath.Path(self.directory), *epath.Path(self.directory).parents):
            if path.exists():
                if not path.is_dir():
                    raise UserError(f'{path} is a file, but must be a directory: move it away')
                return

    def _open(self) -> ocp.CheckpointManager:
        with self._writing():
            return ocp.CheckpointManager(self.directory, options=self._options)

    def _remove_dead_saves(self) -> None:
        """Removes what saves left that were killed or failed: they never get whole."""
        if not hosts.is_first():
            return
        for path in epath.Path(self.directory).iterdir():
            if re.match(r'\d+\.orbax-checkpoint-tmp', path.name):
                path.rmtree(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes a UserError of what a disk or a bucket refuses while something is written.

        Orbax raises errors of its background threads where the next save begins, or where it waits.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            causes = [
                cause
                for cause in files.chain(error)
                if isinstance(cause, OSError) or _STATUS.match(str(cause))
            ]
            if not causes:
                raise
            fault = files.fault(error)
            reason = fault.said if fault else first_line(causes[-1], 120)
            raise refusal(
                f'no checkpoint could be written to {self.directory} ({reason}): those that were '
                'there are untouched, and the same command goes on once this is put right',
                may_pass=fault is not None and fault.passes,
            ) from error

    def steps(self) -> list[int]:
        """All steps that have a checkpoint, ascending."""
        if self._manager is not None:
            return sorted(self._manager.all_steps())
        if not epath.Path(self.directory).is_dir():
            return []
        return sorted(it.step for it in ocp.step.standard_name_format().find_all(self.directory))

    def save(self, step: int, state: PyTree, data_state: Any, seconds: float) -> None:
        """Starts saving in the background. The state may be donated right after.

        A step that was saved before is left as it is.

        Args:
          step: the number of steps done.
          state: a tree of arrays.
          data_state: what to store beside it, as JSON takes it.
          seconds: how long the training took so far.

        Raises:
          RuntimeError: Orbax takes no checkpoint at this step, as it does if there is a newer one.
          UserError: this save or the one before cannot be written.
        """
        assert self._manager is not None  # It is None only for those that read.
        if step in self._manager.all_steps():
            return
        meta = {
            'fingerprint': fingerprint(state),
            'crc32': _checksum(data_state, seconds, step),
            'seconds': seconds,
            'step': step,
        }
        args = ocp.args.Composite(
            # As much as one file holds waits in memory: 64 MB here, 2 GB by default.
            state=ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=2**26),
            data=ocp.args.JsonSave(data_state),
            meta=ocp.args.JsonSave(meta),
        )
        with self._writing():
            if not epath.Path(self.directory).is_dir():
                raise FileNotFoundError(errno.ENOENT, 'the directory is gone', self.directory)
            taken = self._manager.save(step, args=args)
        if not taken:
            raise RuntimeError(
                f'{self.directory} took no checkpoint at step {step}: is there a newer one?'
            )

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, Any, dict[str, Any]]:
        """What a step holds: (state, data_state, meta).

        Leaves of `like` that are `ocp.PLACEHOLDER` are not read. Each process reads on its own: one
        that fails must not leave the others waiting inside Orbax.
        """
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            me, active_processes={me}, barrier_sync_key_prefix=str(me)
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.Composite(
            # A state of an older version may have further leaves. They are not read.
            state=ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        handler = ocp.CompositeCheckpointHandler()
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            found = reader.restore(epath.Path(self.directory, str(step)), args=args)
        return found.state, found.data, found.meta

    def _try(self, step: int, like: PyTree) -> tuple[Any, str, files.Fault | None]:
        """Reads a step once: (what `_read` gives or None, its damage, a fault of the disk)."""
        try:
            return self._read(step, like), '', None
        except Exception as error:  # Orbax and TensorStore raise many kinds for a torn step.
            if any(isinstance(cause, MemoryError) for cause in files.chain(error)):
                raise
            fault = files.fault(error)
            return None, '' if fault else first_line(_root(error), 160), fault

    def _read_patiently(self, step: int, like: PyTree) -> tuple[Any, str]:
        """Reads a step, several times if need be: (what `_read` gives, '') or (None, its damage).

        The verdict is the same in all processes.

        Raises:
          TemporaryError: a fault of the disk or the bucket did not pass in the time given to it.
          UserError: it does not pass by itself, as a missing permission.
        """
        where = f'checkpoint {self.directory}/{step}'
        for pause in (*PAUSES, None):
            found, damage, fault = self._try(step, like)
            mine = int(bool(damage))
            if fault:
                mine = 2 if fault.passes else 3
            worst = int(hosts.largest(mine))
            if worst == 0:
                return found, ''
            if worst == 1:
                return None, damage or 'not by another process'
            if pause is not None:
                if fault:
                    print(f'{where}: {fault.said}; trying again in {pause:g} s', file=sys.stderr)
                time.sleep(pause)
        said = fault.said if fault else 'not by another process'
        raise refusal(
            f'{where} cannot be read now ({said}): nothing was changed, and the same command goes '
            'on once this is put right',
            may_pass=worst == 2,
        )

    def _judge(self, step: int, like: PyTree, indices: Sequence[int]) -> tuple[Any, str]:
        """What a step holds, verified: (its contents, ''), or (None, why it cannot be read).

        The contents are (the leaves of these indices in `like`, data_state, seconds). All processes
        come to the same verdict.
        """
        leaves, tree_def = jax.tree.flatten(like)
        wanted = set(indices)
        own_step = _step_index(like)
        if own_step is not None:  # It tells the step where an older version did not note it.
            wanted.add(own_step)
        for i in range(len(leaves)):
            if i not in wanted:
                leaves[i] = ocp.PLACEHOLDER
        found, damage = self._read_patiently(step, jax.tree.unflatten(tree_def, leaves))
        if found is None:
            return None, damage
        state, data_state, meta = found
        read = jax.tree.leaves(state)
        order = sorted(wanted)
        # Each leaf has its own number. An older version's state may have had more leaves. They came
        # last, and are not read.
        numbers = dict(zip(order, fingerprint([read[i] for i in order]), strict=True))
        held = None if own_step is None else int(read[own_step])
        damage = _damage(data_state, meta, numbers, step, held)
        if damage:
            return None, damage
        return ([read[i] for i in indices], data_state, meta['seconds']), ''

    def restore(
        self, like: PyTree, part: Callable[[PyTree], PyTree] | None = None
    ) -> _Contents | None:
        """Reads the newest checkpoint that is whole, on any number of devices and processes.

        Damaged newer ones are named on stderr. They are not deleted but, unless read_only, renamed
        to `damaged-STEP`. A fault of the disk or the bucket is no damage: it is said, the step is
        read again after each of `PAUSES`, and nothing is renamed.

        Args:
          like: the wanted state, as a tree of ShapeDtypeStructs with shardings.
          part: gives the part of such a state that is wanted; nothing else is read. None reads all.

        Returns:
          (state or its part, data_state, seconds), or None if there is no checkpoint at all.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        if self._manager is not None:
            with self._writing():  # This process may be saving.
                self._manager.wait_until_finished()
        numbers = jax.tree.unflatten(jax.tree.structure(like), range(len(jax.tree.leaves(like))))
        indices, tree_def = jax.tree.flatten(numbers if part is None else part(numbers))
        steps = self.steps()[::-1]
        for i, step in enumerate(steps):
            contents, reason = self._judge(step, like, indices)
            if contents is None:
                print(
                    f'checkpoint {self.directory}/{step} cannot be read ({reason}): skipped',
                    file=sys.stderr,
                )
                continue
            if not self._read_only:
                self.set_aside(steps[:i])
            leaves, data_state, seconds = contents
            return jax.tree.unflatten(tree_def, leaves), data_state, seconds
        if self._read_only and self.steps()[::-1] != steps:
            return self.restore(like, part)  # A training has meanwhile saved and deleted some.
        if steps:
            raise UserError(
                f'none of the checkpoints in {self.directory} can be read: {self._remedy}'
            )
        return None

    def set_aside(self, steps: Sequence[int]) -> None:
        """Renames checkpoints to `damaged-STEP`, since the run will come to these steps again."""
        if not steps:
            return
        self.close()
        if hosts.is_first():
            for step in steps:
                target = f'{self.directory}/damaged-{step}'
                while epath.Path(target).exists():
                    target += '+'
                epath.Path(f'{self.directory}/{step}').rename(target)
        hosts.wait()  # No process opens the directory again before the steps are renamed.
        self._manager = self._open()

    def wait(self) -> None:
        """Returns when all that is being saved is there.

        Raises:
          UserError: it could not be written.
        """
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves under way, and closes the directory.

        Raises:
          UserError: they could not be written.
        """
        if self._manager is not None:
            self.wait()
            with self._writing():
                self._manager.close()
