"""The device mesh and the table that says how every array is laid out on it.

Axes:
  data  devices among which the rows of a batch are split; parameters are the same on all of them
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# (pattern of a leaf's path in the training state, spec), first match wins.
RULES = ((r'.*', PartitionSpec()),)
BATCH = PartitionSpec('data')


def make_mesh(data=-1):
    """A mesh of `data` devices on the axis 'data' (−1: all there are).

    Raises ValueError where the machine has fewer devices.
    """
    available = jax.device_count()
    size = available if data == -1 else data
    if not 0 < size <= available:
        raise ValueError(f'mesh.data is {data}, but this machine has {available} device(s)')
    return jax.make_mesh((size,), ('data',), devices=jax.devices()[:size], axis_types=(AxisType.Auto,))


def _spec(path):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return next(spec for pattern, spec in RULES if re.fullmatch(pattern, name))


def tree_shardings(mesh, tree):
    """A tree of NamedShardings for `tree` by `RULES`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, _spec(path)), tree)


def place_batch(mesh, batch):
    """This process's rows of a batch, a tree of NumPy arrays, as one global array each, rows split over 'data'."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch)


def on_each_device(function, mesh, whole, rows):
    """function(whole, rows) of every device's own rows, each a program of that device alone.

    Args:
      function: jitted, rows (b, …) → (b, …). whole: a tree that all devices get whole. rows: (B, …), split over 'data'.
    Returns:
      the results (B, …), split as the rows are.
    """
    whole = jax.device_put(whole, NamedSharding(mesh, PartitionSpec()))
    on = lambda device: jax.tree.map(lambda a: next(s.data for s in a.addressable_shards if s.device == device), whole)
    parts = [function(on(shard.device), shard.data) for shard in rows.addressable_shards]
    shape = (len(rows), *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, BATCH), parts)
