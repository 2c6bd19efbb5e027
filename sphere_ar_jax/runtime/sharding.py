"""The device mesh, and the table that says how every array is laid out on it.

The compiler does the rest (GSPMD). These are the axes of the mesh, in order; devices that are next
to each other along the last axis are neighbours:
  data    Devices split the rows of a batch among them. Each has the same parameters.
  fsdp    Devices split the rows of a batch, and parameters, optimizer state and EMAs as well. Those
          are gathered where they are used.
  tensor  Devices split attention heads and the hidden features of MLPs. Each has the same rows.

See `docs/devices.md`.
"""

import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree

P = PartitionSpec
AXES = ('data', 'fsdp', 'tensor')

# Pairs (pattern somewhere in a leaf's path, spec of its last dimensions). The first match wins. A
# leaf that matches no pattern is replicated on every device. Convolutions are such leaves: they
# take 56 MB, for which gathering would not pay. A tokenizer with the backbone `cnn` is replicated
# as a whole, at 256×256 pixels 305 MB. The rules hold for parameters, EMAs and the optimizer's
# moments alike, whether layers are stacked or not.
RULES = (
    # Factors of low rank r beside the transformer's kernels, as these are split.
    (r'qkv/kernel/lora_a', P('fsdp', None)),  # (D, r)
    (r'qkv/kernel/lora_b', P(None, None, 'tensor', None)),  # (r, 3, N, K)
    (r'out/kernel/lora_a', P('tensor', None, None)),  # (N, K, r)
    (r'out/kernel/lora_b', P(None, 'fsdp')),  # (r, D)
    (r'w1/kernel/lora_a', P('fsdp', None)),  # (D, r)
    (r'w1/kernel/lora_b', P(None, None, 'tensor')),  # (r, 2, F)
    (r'w2/kernel/lora_a', P('tensor', None)),  # (F, r)
    (r'w2/kernel/lora_b', P(None, 'fsdp')),  # (r, D)
    (r'attention/qkv/kernel', P('fsdp', None, 'tensor', None)),  # (D, 3, N, K)
    (r'attention/out/kernel', P('tensor', None, 'fsdp')),  # (N, K, D)
    (r'w1/kernel', P('fsdp', None, 'tensor')),  # (D, 2, F), of every SwiGLU
    (r'w1/bias', P(None, 'tensor')),  # (2, F)
    (r'w2/kernel', P('tensor', 'fsdp')),  # (F, D)
    # (classes, C, D). If it were split by fsdp, its gradient would gather the batch.
    (r'cls_embedding', P(None, None, 'tensor')),
    (r'text_(embedding|positions)', P(None, 'tensor')),  # (V + 1, D), (T, D)
    (r'features_proj/kernel', P('fsdp', None)),  # (F, D)
    (r'features_positions', P(None, 'tensor')),  # (T, D)
    (r'begin_tokens', P(None, 'tensor')),  # (2, D)
    (r'text_head/kernel', P('fsdp', None)),  # (D, V)
    (r'ada/kernel', P('fsdp', None, None)),  # (M, 2 or 3, M)
    (r'head/(cond_embed|time2|span2)/kernel', P('fsdp', None)),  # (in, M)
)
# The rows of a batch in training and sampling.
BATCH = P(('data', 'fsdp'))
# The rows of a batch for networks whose parameters are replicated on every device.
ROWS = P(AXES)


def _processes(devices: Iterable[jax.Device]) -> set[int]:
    """The indices of the processes that devices belong to."""
    return {device.process_index for device in devices}


# What a container may use, where it is told so.
_CONTAINER_LIMIT = '/sys/fs/cgroup/memory.max'


def memory_limit(device: jax.Device, local_count: int) -> int | None:
    """Bytes that a device may use, None where that is not known.

    An accelerator may use its own memory. A CPU device may use its share of what the machine has
    and the container allows.

    Args:
      device: one of this process's devices.
      local_count: the number of this process's devices.
    """
    if device.platform == 'cpu':
        limit = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        try:
            allowed = pathlib.Path(_CONTAINER_LIMIT).read_text().strip()
        except OSError:
            allowed = ''
        if allowed.isdigit():
            limit = min(limit, int(allowed))
        return limit // local_count
    stats = device.memory_stats()
    if stats is None:
        return None
    return stats.get('bytes_limit')


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a mesh of data × fsdp × tensor devices.

    On TPUs, neighbours on the mesh are neighbours on the torus. Where there are several slices (for
    GPUs: nodes), each slice gets a part of the axis 'data', if their number divides it.

    Args:
      data: size of the axis 'data'. One of the three sizes may be −1, which stands for as many as
        there are devices for.
      fsdp: size of the axis 'fsdp'.
      tensor: size of the axis 'tensor'.
      devices: the devices to take from; all devices of the run if None.

    Returns:
      The mesh with the axes `AXES`.

    Raises:
      UserError: these devices cannot have such sizes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    text = ', '.join(f'mesh.{axis} {size}' for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f'{text}: sizes must be at least 1, and one of them may be -1, '
            'for all devices there are'
        )
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    total = math.prod(sizes)
    if not 0 < total <= len(devices):
        raise UserError(f'{text}: not possible with {len(devices)} device(s)')
    if total < len(devices) and -1 in (data, fsdp, tensor):
        raise UserError(
            f'{text}: -1 stands for all devices, but {len(devices)} are no multiple of {known}'
        )
    left_out = _processes(devices) - _processes(devices[:total])
    if left_out:
        raise UserError(
            f'{text}: leaves out all devices of {len(left_out)} process(es), start fewer of them'
        )
    array = _arrange(devices[:total], sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """Devices as an array of the given sizes, near ones beside each other."""
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices == 0:
        inside = (sizes[0] // slices, *sizes[1:])
        across = (slices, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    return np.array(devices).reshape(sizes)


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that a batch is split into. It must divide the number of rows."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def misfit(mesh: Mesh, images: int, pieces: int = 1) -> str:
    """Why a batch cannot be split over a mesh.

    Args:
      mesh: the mesh.
      images: rows of the batch.
      pieces: number of equal pieces of the batch that are computed one after the other.

    Returns:
      The reason, or '' where the batch can be split.
    """
    devices = batch_parts(mesh)
    if images % (devices * pieces) == 0:
        return ''
    text = f'{images} images are no multiple of {devices} devices (mesh.data · mesh.fsdp)'
    if pieces > 1:
        text += f' times {pieces} pieces'
    return text


def whole_rows(mesh: Mesh, rows: int) -> int:
    """The number of rows, rounded up so that every device of the mesh has equally many."""
    return -(-rows // mesh.size) * mesh.size


def whole(mesh: Mesh) -> NamedSharding:
    """Sharding that replicates an array on every device."""
    return NamedSharding(mesh, P())


def _name(path: tuple[Any, ...]) -> str:
    """The path of a leaf, its keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _split(
    path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh
) -> tuple[PartitionSpec, list[str]]:
    """The layout of a leaf by `RULES`.

    Returns:
      (spec of the leaf, the axes that its rule asks for but that do not divide its shape).
    """
    name = _name(path)
    rule = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
    wanted = (None,) * (len(shape) - len(rule)) + tuple(rule)
    axes = []
    left_out = []
    for axis, size in zip(wanted, shape, strict=True):
        if axis is None or size % mesh.shape[axis] == 0:
            axes.append(axis)
        else:
            axes.append(None)
            left_out.append(axis)
    return P(*axes), left_out


def tree_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """Lay out a tree of arrays by `RULES`.

    An axis of the mesh whose size does not divide a dimension does not split it.

    Args:
      mesh: the mesh.
      tree: arrays, abstract or not.

    Returns:
      A tree of NamedShardings.
    """

    def lay_out(path, a):
        spec, _ = _split(path, a.shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(lay_out, tree)


def abstract(mesh: Mesh, tree: PyTree) -> PyTree:
    """A tree of arrays, abstract or not, as ShapeDtypeStructs that are laid out by `RULES`."""

    def make(a, sharding):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree.map(make, tree, tree_shardings(mesh, tree))


def keep_rows_split(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the rows of a batch split in all Flax modules that a function calls.

    The first dimension of the output of every module that has inputs is split as `BATCH` says. The
    compiler chooses the layout of the other dimensions. Without this constraint it may gather a
    batch instead of a split parameter (measured in BUILD_NOTES.md, "Meshes, many hosts").

    Args:
      mesh: the mesh. It is in context while the function runs, where `attention.attend` finds it.
      function: takes positional arguments only.

    Returns:
      The function with that constraint.
    """
    parts = batch_parts(mesh)

    def constrain(a):
        if mesh.size == 1 or not hasattr(a, 'ndim') or not a.ndim or a.shape[0] % parts:
            return a
        spec = P(*BATCH, *(P.UNCONSTRAINED for _ in a.shape[1:]))
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))

    def interceptor(method, arguments, options, context):
        out = method(*arguments, **options)
        if context.method_name != '__call__' or not (arguments or options):
            return out  # A module without inputs returns parameters.
        return jax.tree.map(constrain, out)

    def kept(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.intercept_methods(interceptor):
            return function(*arguments)

    return kept


def describe_not_split(mesh: Mesh, tree: PyTree) -> str:
    """One line about the leaves that `RULES` would split, but whose shapes do not divide.

    Args:
      mesh: the mesh.
      tree: arrays, abstract or not.

    Returns:
      The line, which names the largest of those leaves, or '' where there are none.
    """
    found = []
    for path, a in jax.tree_util.tree_leaves_with_path(tree):
        _, axes = _split(path, a.shape, mesh)
        if axes:
            found.append((a.size * a.dtype.itemsize, _name(path), axes))
    if not found:
        return ''
    _, name, axes = max(found, key=lambda leaf: leaf[0])
    megabytes = sum(size for size, _, _ in found) / 1e6
    what = f'{len(found)} array(s) of {megabytes:.1f} MB, as {name}'
    return f'not split by mesh.{" and mesh.".join(axes)}, which does not divide: {what}'


def local_rows(mesh: Mesh, rows: int, spec: PartitionSpec = BATCH) -> np.ndarray:
    """The rows of a batch that this process's devices hold.

    Args:
      mesh: the mesh.
      rows: number of rows of the global batch.
      spec: how the rows are split.

    Returns:
      Their indices (b,), ascending.
    """
    indices = NamedSharding(mesh, spec).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


def place_batch(mesh: Mesh, batch: PyTree, spec: PartitionSpec = BATCH) -> PyTree:
    """Make global arrays of the parts of a batch that the processes have loaded.

    Args:
      mesh: the mesh.
      batch: a tree of NumPy arrays, this process's `local_rows` of each.
      spec: how the rows are split.

    Returns:
      A tree of global arrays.
    """
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), batch)


def on_each_device(
    function: Callable[[Any, Any], Any], mesh: Mesh, params: PyTree, rows: PyTree
) -> PyTree:
    """Compute function(params, rows) for every device's own rows, as a program of that device.

    Args:
      function: jitted, with rows (b, …) → results (b, …).
      mesh: the mesh.
      params: a tree of arrays that all devices get in full.
      rows: an array (B, …) in any layout, or a tree of such arrays.

    Returns:
      The results (B, …), an array or a tree of arrays, split by `ROWS`.
    """
    split = NamedSharding(mesh, ROWS)
    params, rows = jax.device_put((params, rows), (whole(mesh), split))
    first = jax.tree.leaves(rows)[0]

    def held_by(device):
        """The parts of the parameters and of the rows that a device holds."""

        def part(a):
            return next(s.data for s in a.addressable_shards if s.device == device)

        return jax.tree.map(part, (params, rows))

    def join(*parts):
        shape = (len(first), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, split, list(parts))

    results = [function(*held_by(shard.device)) for shard in first.addressable_shards]
    return jax.tree.map(join, *results)
