"""The device mesh and the table that says how every array is laid out on it (GSPMD: the compiler
does the rest).

Axes, in this order, neighbours last:
  data    devices among which the rows of a batch are split; parameters are the same along it fsdp
  the same for rows; parameters, optimizer state and EMAs are split as well, and gathered where they
  are used tensor  attention heads and the hidden features of MLPs are split; the rows of a batch
  are the same along it
"""

import math
import re

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sphere_ar_jax.runtime.console import UserError

P = PartitionSpec
AXES = 'data', 'fsdp', 'tensor'

# (pattern somewhere in a leaf's path, spec of its last dimensions), first match wins; what matches none is whole on
# every device, as convolutions are: 56 MB, for which gathering would not pay. The same for
# parameters, EMAs and the optimizer's moments, stacked or apart.
RULES = (
    (r'attention/qkv/kernel', P('fsdp', None, 'tensor', None)),  # (D, 3, N, K)
    (r'attention/out/kernel', P('tensor', None, 'fsdp')),  # (N, K, D)
    (r'w1/kernel', P('fsdp', None, 'tensor')),  # (D, 2, F), of every SwiGLU
    (r'w1/bias', P(None, 'tensor')),  # (2, F)
    (r'w2/kernel', P('tensor', 'fsdp')),  # (F, D)
    (
        r'cls_embedding',
        P(None, None, 'tensor'),
    ),  # (classes, C, D); split by fsdp, its gradient would gather the batch
    (r'ada/kernel', P('fsdp', None, None)),  # (M, 2 or 3, M)
    (r'head/(cond_embed|time2|span2)/kernel', P('fsdp', None)),  # (in, M)
)
BATCH = P(('data', 'fsdp'))
ROWS = P(AXES)  # of a batch that networks look at whose parameters are whole on every device


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
    """A mesh of data × fsdp × tensor devices; one of the three may be −1: as many as there are
    devices for.

    devices: all of the run if None. On TPUs neighbours on the mesh are neighbours on the torus; of
    several slices (of GPUs: nodes) each has a part of the axis 'data', where that divides. Raises
    UserError for sizes that these devices cannot have.
    """
    devices, sizes = jax.devices() if devices is None else list(devices), [data, fsdp, tensor]
    text = ', '.join(f'mesh.{axis} {size}' for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f'{text}: sizes must be at least 1, and one of them may be -1, for all devices there are'
        )
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if not 0 < math.prod(sizes) <= len(devices):
        raise UserError(f'{text}: not possible with {len(devices)} device(s)')
    processes = lambda devices: {device.process_index for device in devices}
    if left_out := processes(devices) - processes(devices[: math.prod(sizes)]):
        raise UserError(
            f'{text}: leaves out all devices of {len(left_out)} process(es), start fewer of them'
        )
    devices = devices[: math.prod(sizes)]
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if slices == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices == 0:
        inside, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    else:
        array = np.array(devices).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_parts(mesh):
    """Into how many parts a batch is split: it must have a multiple of so many rows."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def misfit(mesh, images, pieces=1):
    """Why a batch cannot be split over a mesh, in so many pieces one after the other; '' if it can."""
    devices = batch_parts(mesh)
    if images % (devices * pieces) == 0:
        return ''
    return f'{images} images are no multiple of {devices} devices (mesh.data · mesh.fsdp)' + (
        f' times {pieces} pieces' if pieces > 1 else ''
    )


def whole_rows(mesh: Mesh, rows: int) -> int:
    """The number of rows, rounded up so that every device of the mesh has equally many."""
    return -(-rows // mesh.size) * mesh.size


def whole(mesh):
    """The layout of what every device has whole."""
    return NamedSharding(mesh, P())


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _split(path, shape, mesh):
    """(spec of a leaf, the axes that its rule wants and its shape does not allow)."""
    rule = next((spec for pattern, spec in RULES if re.search(pattern, _name(path))), P())
    wanted = (None,) * (len(shape) - len(rule)) + tuple(rule)
    fits = lambda axis, size: axis is None or size % mesh.shape[axis] == 0
    axes = [axis if fits(axis, size) else None for axis, size in zip(wanted, shape, strict=True)]
    return P(*axes), [
        axis for axis, size in zip(wanted, shape, strict=True) if not fits(axis, size)
    ]


def tree_shardings(mesh, tree):
    """A tree of NamedShardings for `tree` by `RULES`; an axis that does not divide its dimension is
    left out.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, a: NamedSharding(mesh, _split(path, a.shape, mesh)[0]), tree
    )


def abstract(mesh, tree):
    """`tree` of arrays, abstract or not, as ShapeDtypeStructs laid out by `RULES`."""
    make = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    return jax.tree.map(make, tree, tree_shardings(mesh, tree))


def keep_rows_split(mesh, function):
    """`function`, with the first dimension of what any Flax module in it makes of its inputs split
    as `BATCH` says.

    Without that word the compiler may as well gather a batch as a split parameter. Other dimensions
    are its choice. In it the mesh has its name, by which `attention.attend` finds it.
    """
    parts, anything = batch_parts(mesh), P.UNCONSTRAINED

    def constrain(a):
        if mesh.size == 1 or not hasattr(a, 'ndim') or not a.ndim or a.shape[0] % parts:
            return a
        spec = P(*BATCH, *(anything for _ in a.shape[1:]))
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


def describe_not_split(mesh, tree):
    """The leaves of `tree` that `RULES` would split along axes that their shapes forbid, in a line;
    '' without any.
    """
    found = [
        (path, a, _split(path, a.shape, mesh)[1])
        for path, a in jax.tree_util.tree_leaves_with_path(tree)
    ]
    found = [(a.size * a.dtype.itemsize, _name(path), axes) for path, a, axes in found if axes]
    if not found:
        return ''
    _, name, axes = max(found, key=lambda leaf: leaf[0])
    what = f'{len(found)} array(s) of {sum(leaf[0] for leaf in found) / 1e6:.1f} MB, as {name}'
    return f'not split by mesh.{" and mesh.".join(axes)}, which does not divide: {what}'


def local_rows(mesh, rows, spec=BATCH):
    """The numbers, in order, of those rows of a batch of so many that this process's devices hold."""
    indices = NamedSharding(mesh, spec).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


def place_batch(mesh, batch, spec=BATCH):
    """This process's `local_rows` of a batch, a tree of NumPy arrays, as one global array each,
    split by `spec`.
    """
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), batch)


def on_each_device(function, mesh, params, rows):
    """function(params, rows) of every device's own rows, each a program of that device alone.

    Args:
      function: jitted, rows (b, …) → (b, …). params: a tree that all devices get whole.
      rows: (B, …), in any layout. Both rows and results may be trees of such arrays.
    Returns:
      the results (B, …), split by `ROWS`.
    """
    split = NamedSharding(mesh, ROWS)
    params, rows = jax.device_put((params, rows), (whole(mesh), split))
    on = lambda device: jax.tree.map(
        lambda a: next(s.data for s in a.addressable_shards if s.device == device), (params, rows)
    )
    first = jax.tree.leaves(rows)[0]
    parts = [function(*on(shard.device)) for shard in first.addressable_shards]
    join = lambda *a: jax.make_array_from_single_device_arrays(
        (len(first), *a[0].shape[1:]), split, list(a)
    )
    return jax.tree.map(join, *parts)
