"""Orbax checkpoints that tell damage: a fingerprint of every save, verified on every restore.

A step directory holds `state` (the training state), `data` (what is noted of the data and of frozen
parameters) and `meta` (fingerprint, seconds trained). Orbax writes it under a temporary name and
renames it when it is whole, so that a kill leaves no half step. Orbax does not notice bit flips in
array data, but the fingerprint does.

Where a run has several processes, all of them must make the same calls. Each writes and reads what
its devices hold, in one directory that all see, and all come to the same verdict on what they read.
"""

import errno
import functools
import json
import logging
import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sphere_ar_jax.runtime import files, hosts
from sphere_ar_jax.runtime.console import UserError, first_line
from sphere_ar_jax.runtime.types import PyTree

_LARGE = 2**22  # numbers in a leaf

# What a step holds: (state, data_state, seconds).
_Contents: TypeAlias = tuple[PyTree, Any, float]
# A list of fingerprints, one for each leaf of the state, and a checksum of the rest.
_Digest: TypeAlias = tuple[list[int], int]


@jax.jit
def _fingerprints(tree: PyTree) -> jax.Array:
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

    return jnp.stack([one(a) for a in jax.tree.leaves(tree)])


def fingerprint(tree: PyTree) -> list[int]:
    """One number for each leaf of a tree of arrays, which changes if any single bit of it does.

    All processes must call it.
    """
    return [int(x) for x in hosts.gather(_fingerprints(tree))]


def _digest(state: PyTree, data_state: Any, seconds: float) -> _Digest:
    """What `meta` holds to be compared on restore."""
    text = json.dumps([data_state, seconds], sort_keys=True)
    return fingerprint(state), zlib.crc32(text.encode())


# These are the machine's faults, not the checkpoint's: no reason to skip a checkpoint.
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that led to it, the first cause last."""
    return [error] if error.__cause__ is None else [error, *_causes(error.__cause__)]


def _machine_error(errors: Iterable[BaseException]) -> int:
    """The errno of the first of `_MACHINE_ERRORS` among errors, 0 if there is none.

    TensorStore's errors have no errno, only its text in their message.
    """
    for number in _MACHINE_ERRORS:
        words = os.strerror(number)
        for error in errors:
            if getattr(error, 'errno', None) == number or words in str(error):
                return number
    return 0


def _left_behind(error: BaseException | None) -> bool:
    """Whether an error comes from a read that Orbax abandoned when another one failed."""
    text = str(error)
    return any(word in text for word in ('TensorStore', 'OCDBT', 'Event loop is closed'))


def _not_left_behind(record: logging.LogRecord) -> bool:
    """Filters such errors out of a log."""
    return not (record.exc_info and _left_behind(record.exc_info[1]))


@functools.cache
def _quieten() -> None:
    """Hides the errors of reads that Orbax abandons, for the rest of the process.

    When one read fails, Orbax abandons the others, and each of them would show a traceback.
    """
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
    ) -> None:
        """Opens the directory, and makes it if it is not there.

        Args:
          directory: where the checkpoints are.
          keep: number of newest checkpoints that are kept.
          keep_every: checkpoints at multiples of this step are kept for good; 0 keeps none.
          read_only: neither makes, moves nor deletes anything, the directory included.
        """
        self.directory = files.absolute(directory)
        self._read_only = read_only
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_period=keep_every or None,
            read_only=read_only,
            create=not read_only,
        )
        self._manager: ocp.CheckpointManager | None = None
        if not read_only or epath.Path(self.directory).is_dir():
            self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory, options=self._options)

    def steps(self) -> list[int]:
        """All steps that have a checkpoint, ascending."""
        return [] if self._manager is None else sorted(self._manager.all_steps())

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
        """
        assert self._manager is not None  # It is None only where read_only finds no directory.
        if step in self._manager.all_steps():
            return
        state_digest, other_digest = _digest(state, data_state, seconds)
        meta = {'fingerprint': state_digest, 'crc32': other_digest, 'seconds': seconds}
        args = ocp.args.Composite(
            # As much as one file holds waits in memory: 64 MB here, 2 GB by default.
            state=ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=2**26),
            data=ocp.args.JsonSave(data_state),
            meta=ocp.args.JsonSave(meta),
        )
        if not self._manager.save(step, args=args):
            raise RuntimeError(
                f'{self.directory} took no checkpoint at step {step}: is there a newer one?'
            )

    def _read(self, step: int, like: PyTree) -> tuple[_Contents, _Digest]:
        """What a step holds, and the digest that was stored with it.

        Each process reads on its own: one that fails must not leave the others waiting inside
        Orbax.
        """
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            me, active_processes={me}, barrier_sync_key_prefix=str(me)
        )
        options = ocp.CheckpointManagerOptions(
            read_only=True, create=False, multiprocessing_options=alone
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.Composite(
            # A state of an older version may have further leaves. They are not read.
            state=ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        with ocp.CheckpointManager(self.directory, options=options) as reader:
            found = reader.restore(step, args=args)
        contents = (found.state, found.data, found.meta['seconds'])
        return contents, (found.meta['fingerprint'], found.meta['crc32'])

    def _judge(self, step: int, like: PyTree) -> tuple[_Contents | None, str]:
        """What a step holds, verified: (its contents, ''), or (None, why it cannot be read).

        The verdict is the same in all processes.
        """
        reason = ''
        _quieten()
        try:
            contents, noted = self._read(step, like)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a torn step.
            causes = _causes(error)
            if any(isinstance(cause, MemoryError) for cause in causes):
                raise
            number = _machine_error(causes)
            if number:
                raise OSError(number, os.strerror(number), f'{self.directory}/{step}') from error
            reason = first_line(causes[-1], 160)
        if int(hosts.largest(bool(reason))):
            return None, reason or 'not by another process'
        noted_leaves, noted_other = noted
        leaves, other = _digest(*contents)
        # An older version's state may have had more leaves. They came last, and are not read.
        if leaves != noted_leaves[: len(leaves)] or other != noted_other:
            return None, 'its contents do not match their fingerprint'
        return contents, ''

    def restore(self, like: PyTree) -> _Contents | None:
        """Reads the newest checkpoint that is whole, on any number of devices and processes.

        Damaged newer ones are named on stderr. They are not deleted but, unless read_only, renamed
        to `damaged-STEP`.

        Args:
          like: the wanted state, as a tree of ShapeDtypeStructs with shardings.

        Returns:
          (state, data_state, seconds), or None if there is no checkpoint at all.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        if self._manager is not None:
            self._manager.wait_until_finished()  # This process may be saving.
        steps = self.steps()[::-1]
        for i, step in enumerate(steps):
            contents, reason = self._judge(step, like)
            if contents is None:
                print(
                    f'checkpoint {self.directory}/{step} cannot be read ({reason}): skipped',
                    file=sys.stderr,
                )
                continue
            if not self._read_only:
                self.set_aside(steps[:i])
            return contents
        if steps:
            raise UserError(
                f'none of the checkpoints in {self.directory} can be read: '
                'move the directory away to start anew'
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
        """Returns when all that is being saved is there."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves under way, and closes the directory."""
        if self._manager is not None:
            self.wait()
            self._manager.close()
