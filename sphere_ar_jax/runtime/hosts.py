"""Several processes as one run: which one this is, and what they tell each other.

All processes run the same program on the same global arrays. `joining` makes one run of them, and
`ending` ends them together. In a process that is alone, these functions give the obvious answers.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def count() -> int:
    """The number of processes of the run. A process that is alone starts no device to answer."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process prints, and writes the files that one process writes for all."""
    return count() == 1 or jax.process_index() == 0


def gather(array: jax.Array) -> np.ndarray:
    """The contents of a global array, in every process. All processes must call it."""
    return multihost_utils.process_allgather(array, tiled=True)


def from_first(number: int) -> int:
    """The whole number that the first process gives. All processes must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def differing(numbers: Sequence[int]) -> list[int]:
    """The places at which the processes' lists of numbers differ, in all processes alike.

    All processes must call it.

    Args:
      numbers: whole numbers from 0 to 2³² − 1, as many in each process.
    """
    if count() == 1:
        return []
    all_numbers = multihost_utils.process_allgather(np.asarray(numbers, np.uint32))
    differ = (all_numbers != all_numbers[0]).any(axis=0)
    return np.flatnonzero(differ).tolist()


@functools.cache
def _one_each() -> NamedSharding:
    """The sharding of a vector that has one number on every device."""
    return NamedSharding(Mesh(np.array(jax.devices()), ('device',)), PartitionSpec('device'))


_max = jax.jit(jnp.max)


def largest(number: int) -> int | jax.Array:
    """The largest of the processes' whole numbers. All processes must call it.

    The call does not wait for the other processes, but int() of the result does.
    """
    if jax.process_count() == 1:
        return number
    mine = np.full(jax.local_device_count(), number, np.int32)
    return _max(jax.make_array_from_process_local_data(_one_each(), mine))


def wait() -> None:
    """Return when all processes have called it."""
    int(largest(0))
