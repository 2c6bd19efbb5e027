"""Orbax checkpoints that tell damage: a fingerprint of every save, verified on every restore.

A step directory holds `state` (the training state), `data` (the data iterator) and `meta` (fingerprint, seconds
trained). Orbax writes it under a temporary name and renames it when whole, so that a kill leaves no half step;
what it does not notice, bit flips in array data, the fingerprint does.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


class DamagedError(ValueError):
    """No checkpoint of a run could be read."""


@jax.jit
def _fingerprints(tree):
    """A uint32 per leaf: Σ word·weight mod 2³², weights odd and position-dependent. Exact on any mesh."""

    def one(a):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a = jax.random.key_data(a)
        width = a.dtype.itemsize
        words = jax.lax.bitcast_convert_type(a, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32))
        words = words.astype(jnp.uint32).ravel()
        position = jnp.arange(words.size, dtype=jnp.uint32)
        weights = (position * np.uint32(2654435761)) ^ ((position * np.uint32(40503)) >> np.uint32(7)) | np.uint32(1)
        return jnp.sum(words * weights, dtype=jnp.uint32)

    return jnp.stack([one(a) for a in jax.tree.leaves(tree)])


def fingerprint(tree):
    """A list of ints, one per leaf of a tree of arrays, that changes if any single bit of it does."""
    return [int(x) for x in np.asarray(_fingerprints(tree))]


class Checkpoints:
    """The checkpoints of one training run in one directory.

    Attributes:
      directory: where they are. keep: newest ones kept. keep_every: steps whose multiples are kept for good (0: none).
    """

    def __init__(self, directory, keep=2, keep_every=0):
        self.directory = os.path.abspath(directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self._open = lambda: ocp.CheckpointManager(self.directory, options=options)
        self._manager = self._open()

    def latest_step(self):
        """The newest step, None if there is none."""
        return self._manager.latest_step()

    def save(self, step, state, data_state, seconds):
        """Starts saving in the background; the state may be donated right after. A step saved before is left as is."""
        if step in self._manager.all_steps():
            return
        meta = {'fingerprint': fingerprint(state), 'seconds': seconds}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state), meta=ocp.args.JsonSave(meta)
        )
        self._manager.save(step, args=args)

    def _read(self, step, like):
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        if fingerprint(restored.state) != restored.meta['fingerprint']:
            raise ValueError('its contents do not match their fingerprint')
        return restored.state, restored.data, restored.meta['seconds']

    def restore(self, like):
        """The newest checkpoint that is whole.

        Damaged newer ones are named on stderr and moved aside to `damaged-STEP`, not deleted.

        Args:
          like: a tree of ShapeDtypeStructs with shardings.
        Returns:
          (state, data_state, seconds), or None if there is no checkpoint at all.
        Raises:
          DamagedError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged = []
        for step in steps:
            try:
                found = self._read(step, like)
            except Exception as error:  # Orbax and TensorStore raise many kinds for a torn step
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                print(f'checkpoint {self.directory}/{step} cannot be read ({reason}): skipped', file=sys.stderr)
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return found
        if steps:
            raise DamagedError(
                f'none of the checkpoints in {self.directory} can be read: move the directory away to start anew'
            )
        return None

    def _set_aside(self, steps):
        """Takes damaged steps out of the way of the run that will pass them again."""
        for step in steps:
            target = f'{self.directory}/damaged-{step}'
            while os.path.exists(target):
                target += '+'
            os.rename(f'{self.directory}/{step}', target)
        if steps:
            self._manager.close()
            self._manager = self._open()

    def close(self):
        """Waits for the saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()
