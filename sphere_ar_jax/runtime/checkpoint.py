"""Orbax checkpoints that tell damage: a fingerprint of every save, verified on every restore.

A step directory holds `state` (the training state), `data` (the data iterator) and `meta`
(fingerprint, seconds trained). Orbax writes it under a temporary name and renames it when whole, so
that a kill leaves no half step; what it does not notice, bit flips in array data, the fingerprint
does.

With several processes all of them must make the same calls; each writes and reads what its devices
hold, into one directory that all see, and all come to the same verdict on what they read.
"""

import errno
import functools
import json
import logging
import os
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sphere_ar_jax.runtime import files, hosts
from sphere_ar_jax.runtime.console import UserError, first_line

_LARGE = 2**22  # numbers in a leaf


@jax.jit
def _fingerprints(tree):
    """A uint32 per leaf: Σ word·weight mod 2³², weights odd and position-dependent. Exact on any
    mesh.
    """

    def part(a, first):
        """The sum over a piece of a leaf; its first word has the position `first`."""
        width = a.dtype.itemsize
        words = jax.lax.bitcast_convert_type(
            a, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)
        )
        words = words.astype(jnp.uint32).ravel()
        position = jnp.arange(words.size, dtype=jnp.uint32) + first
        weights = (position * np.uint32(2654435761)) ^ (
            (position * np.uint32(40503)) >> np.uint32(7)
        ) | np.uint32(1)
        return jnp.sum(words * weights, dtype=jnp.uint32)

    def one(a):
        if a.ndim < 2 or a.size < _LARGE:
            return part(a, np.uint32(0))
        words = a.size // len(a) * max(a.dtype.itemsize // 4, 1)
        rows = (
            a,
            jnp.arange(len(a), dtype=jnp.uint32) * np.uint32(words),
        )  # row by row: no second copy in memory
        return jax.lax.scan(lambda total, row: (total + part(*row), None), jnp.uint32(0), rows)[0]

    return jnp.stack([one(a) for a in jax.tree.leaves(tree)])


def fingerprint(tree):
    """A list of ints, one per leaf of a tree of arrays, that changes if any single bit of it does."""
    return [int(x) for x in hosts.gather(_fingerprints(tree))]


def _digest(state, data_state, seconds):
    """What `meta` holds to be compared on restore."""
    text = json.dumps([data_state, seconds], sort_keys=True)
    return fingerprint(state), zlib.crc32(text.encode())


# The machine's fault, not the checkpoint's: never a reason to skip one.
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)


def _causes(error):
    """An error and those that led to it, the first cause last."""
    return [error] if error.__cause__ is None else [error, *_causes(error.__cause__)]


def _machine_error(errors):
    """The errno of such a fault among errors, which TensorStore has in its words only; 0 if there
    is none.
    """
    of = lambda error, number: (
        getattr(error, 'errno', None) == number or os.strerror(number) in str(error)
    )
    return next(
        (number for number in _MACHINE_ERRORS if any(of(error, number) for error in errors)), 0
    )


@functools.cache
def _quieten():
    """For good: where one of Orbax' reads fails it leaves the others behind, of which each would
    show a traceback.
    """
    left_behind = lambda error: any(
        s in str(error) for s in ('TensorStore', 'OCDBT', 'Event loop is closed')
    )
    show = sys.unraisablehook
    sys.unraisablehook = lambda it: None if left_behind(it.exc_value) else show(it)
    logging.getLogger('asyncio').addFilter(
        lambda record: not (record.exc_info and left_behind(record.exc_info[1]))
    )


class Checkpoints:
    """The checkpoints of one training run in one directory.

    Attributes:
      directory: where they are. keep: newest ones kept. keep_every: steps whose multiples are kept
        for good (0: none).
      read_only: nothing in the directory is made, moved or deleted.
    """

    def __init__(self, directory, keep=2, keep_every=0, read_only=False):
        self.directory, self._read_only = files.absolute(directory), read_only
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, keep_period=keep_every or None, read_only=read_only,
            create=not read_only,
        )  # fmt: skip
        self._open = lambda: ocp.CheckpointManager(self.directory, options=options)
        self._manager = (
            None if read_only and not epath.Path(self.directory).is_dir() else self._open()
        )

    def steps(self):
        """All steps there are, in order."""
        return [] if self._manager is None else sorted(self._manager.all_steps())

    def save(self, step, state, data_state, seconds):
        """Starts saving in the background; the state may be donated right after. A step saved
        before is left as is.
        """
        if step in self._manager.all_steps():
            return
        state_digest, other_digest = _digest(state, data_state, seconds)
        meta = {'fingerprint': state_digest, 'crc32': other_digest, 'seconds': seconds}
        args = ocp.args.Composite(  # files of 64 MB: as much waits in memory, of 2 GB otherwise
            state=ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=2**26),
            data=ocp.args.JsonSave(data_state),
            meta=ocp.args.JsonSave(meta),
        )
        if not self._manager.save(step, args=args):
            raise RuntimeError(
                f'{self.directory} took no checkpoint at step {step}: is there a newer one?'
            )

    def _read(self, step, like):
        """(state, data_state, seconds, digest noted) of a step. Each process reads on its own: one
        that fails must not leave the others waiting inside Orbax.
        """
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            me, active_processes={me}, barrier_sync_key_prefix=str(me)
        )
        options = ocp.CheckpointManagerOptions(
            read_only=True, create=False, multiprocessing_options=alone
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        # What a state of an older version had besides is left where it is.
        restore = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True)
        args = ocp.args.Composite(
            state=restore, data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
        )
        with ocp.CheckpointManager(self.directory, options=options) as reader:
            found = reader.restore(step, args=args)
        return (
            found.state,
            found.data,
            found.meta['seconds'],
            (found.meta['fingerprint'], found.meta['crc32']),
        )

    def _judge(self, step, like):
        """((state, data_state, seconds) of a step, ''), or (None, why it cannot be read): the same
        in all processes.
        """
        reason = ''
        _quieten()
        try:
            *found, noted = self._read(step, like)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a torn step
            causes = _causes(error)
            if any(isinstance(cause, MemoryError) for cause in causes):
                raise
            if number := _machine_error(causes):
                raise OSError(number, os.strerror(number), f'{self.directory}/{step}') from error
            reason = first_line(causes[-1], 160)
        if int(hosts.largest(bool(reason))):
            return None, reason or 'not by another process'
        leaves, other = _digest(*found)
        # An older version's state may have had more leaves; they came last, and are not read.
        if leaves != noted[0][: len(leaves)] or other != noted[1]:
            return None, 'its contents do not match their fingerprint'
        return tuple(found), ''

    def restore(self, like):
        """The newest checkpoint that is whole, on any number of devices and processes.

        Damaged newer ones are named on stderr and, unless read_only, moved aside to `damaged-STEP`,
        not deleted.

        Args:
          like: a tree of ShapeDtypeStructs with shardings.
        Returns:
          (state, data_state, seconds), or None if there is no checkpoint at all.
        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        if self._manager is not None:
            self._manager.wait_until_finished()  # a save of this process
        steps = self.steps()[::-1]
        for i, step in enumerate(steps):
            found, reason = self._judge(step, like)
            if found is None:
                print(
                    f'checkpoint {self.directory}/{step} cannot be read ({reason}): skipped',
                    file=sys.stderr,
                )
                continue
            if not self._read_only:
                self.set_aside(steps[:i])
            return found
        if steps:
            raise UserError(
                f'none of the checkpoints in {self.directory} can be read: move the directory away to start anew'
            )
        return None

    def set_aside(self, steps):
        """Renames steps to `damaged-STEP`: out of the way of the run that will pass them again, but
        not deleted.
        """
        if not steps:
            return
        self.close()
        for step in steps if hosts.is_first() else ():
            target = f'{self.directory}/damaged-{step}'
            while epath.Path(target).exists():
                target += '+'
            epath.Path(f'{self.directory}/{step}').rename(target)
        hosts.wait()  # not before they are renamed
        self._manager = self._open()

    def wait(self):
        """Returns when what is being saved is there."""
        self._manager.wait_until_finished()

    def close(self):
        """Waits for the saves under way."""
        if self._manager is not None:
            self.wait()
            self._manager.close()
