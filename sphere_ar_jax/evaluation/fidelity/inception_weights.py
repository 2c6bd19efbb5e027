"""The weights of the Inception network, from the files that people have."""

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from google.protobuf import message

# These are TensorFlow's own message definitions.
from tensorboardX.proto import graph_pb2, types_pb2

from sphere_ar_jax.evaluation.fidelity import inception
from sphere_ar_jax.interop import torch_file
from sphere_ar_jax.runtime.console import UserError, first_line, printable, some
from sphere_ar_jax.runtime.types import PyTree

MAX_FILE_BYTES = 2**29  # The published file has 95 MB.
# The first digits of the SHA-256 of the .pth that pytorch-fid and torch-fidelity publish.
_PUBLISHED = '6726825d'


@functools.cache
def _shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path."""
    image = jax.ShapeDtypeStruct((1, inception.SIZE, inception.SIZE, 3), jnp.float32)
    params = jax.eval_shape(inception.Inception().init, jax.random.key(0), image)['params']
    return {path: leaf.shape for path, leaf in traverse.flatten_dict(params, sep='/').items()}


# Our names of a convolution's parameters → TensorFlow's.
_NODES = {
    'kernel': 'conv2d_params',
    'beta': 'batchnorm/beta',
    'gamma': 'batchnorm/gamma',
    'mean': 'batchnorm/moving_mean',
    'variance': 'batchnorm/moving_variance',
}
# Our names of a convolution's parameters → PyTorch's.
_TORCH_LEAVES = {
    'kernel': 'conv.weight',
    'beta': 'bn.bias',
    'gamma': 'bn.weight',
    'mean': 'bn.running_mean',
    'variance': 'bn.running_var',
}
# PyTorch's names of a block's `conv` and of its towers.
_TORCH_35 = ('branch1x1', 'branch5x5', 'branch3x3dbl', 'branch_pool')
_TORCH_17 = ('branch1x1', 'branch7x7', 'branch7x7dbl', 'branch_pool')
_TORCH_8 = ('branch1x1', 'branch3x3', 'branch3x3dbl', 'branch_pool')
# Our name of a block → PyTorch's names of the block, of its `conv`, and of its towers. PyTorch
# counts the convolutions of a tower from 1.
_TORCH_BLOCKS = {
    'mixed': ('Mixed_5b', *_TORCH_35),
    'mixed_1': ('Mixed_5c', *_TORCH_35),
    'mixed_2': ('Mixed_5d', *_TORCH_35),
    'mixed_3': ('Mixed_6a', 'branch3x3', 'branch3x3dbl'),
    'mixed_4': ('Mixed_6b', *_TORCH_17),
    'mixed_5': ('Mixed_6c', *_TORCH_17),
    'mixed_6': ('Mixed_6d', *_TORCH_17),
    'mixed_7': ('Mixed_6e', *_TORCH_17),
    'mixed_8': ('Mixed_7a', '', 'branch3x3', 'branch7x7x3'),
    'mixed_9': ('Mixed_7b', *_TORCH_8),
    'mixed_10': ('Mixed_7c', *_TORCH_8),
}
# Our names of the convolutions before the blocks → PyTorch's.
_TORCH_STEM = {
    'conv': 'Conv2d_1a_3x3',
    'conv_1': 'Conv2d_2a_3x3',
    'conv_2': 'Conv2d_2b_3x3',
    'conv_3': 'Conv2d_3b_1x1',
    'conv_4': 'Conv2d_4a_3x3',
}


def _count(name: str) -> int:
    """The number that a name ends in: 0 for 'tower', 2 for 'tower_2'."""
    return int(name.partition('_')[2] or 0)


def _torch_name(path: str) -> str:
    """PyTorch's name of the parameter at a path."""
    if path == 'softmax_weights':
        return 'fc.weight'
    *parts, leaf = path.split('/')
    if len(parts) == 1:
        return f'{_TORCH_STEM[parts[0]]}.{_TORCH_LEAVES[leaf]}'
    block, branch, *towers = _TORCH_BLOCKS[parts[0]]
    if parts[1] != 'conv':
        branch = towers[_count(parts[1])]
        if parts[2] == 'mixed':
            # The fork follows the tower's convolutions: one in tower 0, two in tower 1.
            position = _count(parts[1]) + 2
            side = 'ab'[_count(parts[3])]
            branch += f'_{position}{side}'
        elif branch != 'branch_pool':
            branch += f'_{_count(parts[2]) + 1}'
    return f'{block}.{branch}.{_TORCH_LEAVES[leaf]}'


def _node_name(path: str) -> str:
    """The name of the graph's node that holds the parameter at a path."""
    if path == 'softmax_weights':
        return 'softmax/weights'
    parent, _, leaf = path.rpartition('/')
    return f'{parent}/{_NODES[leaf]}'


def _take(
    tensors: Mapping[str, Any],
    name_of: Callable[[str], str],
    layout: Callable[[int], Sequence[int]],
    source: str | os.PathLike[str],
    ignored: Callable[[str], object],
) -> PyTree:
    """The parameter tree of named tensors.

    Args:
      tensors: array-like objects by the names that their source gives them.
      name_of: gives the source's name for the path of a parameter.
      layout: gives for a tensor's rank the order in which the source has our axes.
      source: what the error message calls the source.
      ignored: tells by its name whether a tensor that is no parameter may be there too.

    Returns:
      Nested dictionaries of float32 NumPy arrays.

    Raises:
      UserError: one line with all that is missing, misshapen or unexpected.
    """
    names = {path: name_of(path) for path in _shapes()}
    params = {}
    missing = []
    misshapen = []
    for path, shape in _shapes().items():
        name = names[path]
        order = layout(len(shape))
        expected = tuple(shape[axis] for axis in order)
        if name not in tensors:
            missing.append(name)
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != expected:
            misshapen.append(f'{name} of shape {tuple(tensor.shape)} instead of {expected}')
            continue
        ours = np.asarray(tensor, np.float32).transpose(np.argsort(order))
        params[path] = np.array(ours, order='C')
    known = set(names.values())
    unexpected = [name for name in tensors if name not in known and not ignored(name)]
    faults = {'missing': missing, 'misshapen': misshapen, 'unexpected': unexpected}
    found = '; '.join(
        f'{len(names)} {kind}: {some(names)}' for kind, names in faults.items() if names
    )
    if found:
        raise UserError(f'{source} does not hold the weights of the FID Inception ({found})')
    return traverse.unflatten_dict(params, sep='/')


def from_torch(tensors: Mapping[str, Any]) -> PyTree:
    """The parameters from the PyTorch port of the same weights.

    Args:
      tensors: arrays by name, those of `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) or
        `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity), with kernels OIHW.

    Returns:
      A tree of float32 NumPy arrays.

    Raises:
      UserError: one line with all that is missing, misshapen or unexpected.
    """
    # The file has biases of the logits, which the evaluator leaves out.
    ignored = re.compile(r'fc\.bias|.*\.num_batches_tracked')
    layouts = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    return _take(
        tensors, _torch_name, layouts.__getitem__, 'the dict of tensors', ignored.fullmatch
    )


def fingerprint(params: PyTree) -> str:
    """The SHA-256 of parameters, 64 hexadecimal digits, whatever file they come from.

    It is taken of their paths, shapes and float32 numbers, in the order of the paths.
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        numbers = np.ascontiguousarray(leaf, '<f4')
        found.update(f'{jax.tree_util.keystr(path)}{numbers.shape}'.encode())
        found.update(numbers.tobytes())
    return found.hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _require_named_hash(path: str | os.PathLike[str]) -> None:
    """Raises UserError where a published file's name tells another hash than the file has.

    PyTorch's convention puts the first digits of a file's SHA-256 into its name.
    """
    if not os.path.basename(path).endswith(f'-{_PUBLISHED}.pth'):
        return
    found = file_hash(path)
    if not found.startswith(_PUBLISHED):
        raise UserError(
            f'{path} is damaged: its SHA-256 begins with {found[:8]}, not with the {_PUBLISHED} '
            'of its name; fetch it again'
        )


def load(path: str | os.PathLike[str]) -> PyTree:
    """The parameters from a file: TensorFlow's .pb, or the .pth of pytorch-fid or torch-fidelity.

    A .pth under its published name must have the hash that the name tells.

    Returns:
      A tree of float32 NumPy arrays.

    Raises:
      OSError: there is no file.
      UserError: the file is damaged, or is not one of these.
    """
    if str(path).endswith('.pb'):
        return load_graph_def(path)
    _require_named_hash(path)
    tensors = torch_file.open_file(path)
    by_name = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not (by_name and all(hasattr(tensor, 'shape') for tensor in tensors.values())):
        raise UserError(f'{path} holds a {type(tensors).__name__}, but must hold tensors by name')
    return from_torch(tensors)


def _parse(path: str | os.PathLike[str]) -> graph_pb2.GraphDef:
    """The GraphDef in a file. Raises UserError for any other content and for files too large."""
    size = os.path.getsize(path)
    if size > MAX_FILE_BYTES:
        raise UserError(f'{path} is larger than any file of this network: {size} bytes')
    graph = graph_pb2.GraphDef()
    try:
        with open(path, 'rb') as f:
            graph.ParseFromString(f.read())
    except message.DecodeError as error:
        raise UserError(f'{path} is not a GraphDef: {printable(first_line(error))}') from None
    return graph


def _is_float_constant(node: Any) -> bool:
    return node.op == 'Const' and node.attr['value'].tensor.dtype == types_pb2.DT_FLOAT


def _is_not_ours(name: str) -> bool:
    """Whether a constant of the graph is named otherwise than parameters of convolutions are."""
    return not name.endswith(tuple(_NODES.values()))


def load_graph_def(path: str | os.PathLike[str]) -> PyTree:
    """The parameters from `classify_image_graph_def.pb`, read without TensorFlow.

    `gamma` becomes 1 wherever the graph's batch norm says scale_after_normalization=false.

    Returns:
      A tree of float32 NumPy arrays.

    Raises:
      OSError: there is no file.
      UserError: the file is not a GraphDef, or lacks one of the constants; the message is one line.
    """
    graph = _parse(path)
    constants = {
        node.name: _array(path, node.attr['value'].tensor)
        for node in graph.node
        if _is_float_constant(node)
    }
    norms = [node for node in graph.node if node.op == 'BatchNormWithGlobalNormalization']
    epsilons = [
        node.attr['variance_epsilon'].f for node in norms if 'variance_epsilon' in node.attr
    ]
    if any(not math.isclose(e, inception.EPSILON, rel_tol=1e-6) for e in epsilons):
        raise UserError(f'{path} has batch norms with an epsilon other than {inception.EPSILON}')
    params = _take(constants, _node_name, range, path, _is_not_ours)
    flat = traverse.flatten_dict(params, sep='/')
    for node in norms:
        if not node.attr['scale_after_normalization'].b:
            flat[f'{node.name.removesuffix("/batchnorm")}/gamma'][:] = 1
    return params


def _array(path: str | os.PathLike[str], tensor: Any) -> np.ndarray:
    """A TensorProto of floats as a read-only array.

    A number that the file has once for the whole tensor takes the memory of one number.
    """
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    content = tensor.tensor_content or np.array(tensor.float_val, '<f4').tobytes()
    count = math.prod(shape) if all(size > 0 for size in shape) else 0
    if len(shape) > 8 or len(content) not in (4, 4 * count) or not 1 <= count <= 2**28:
        raise UserError(
            f'{path} is not a GraphDef: it has a tensor of shape {shape[:8]} with '
            f'{len(content)} bytes'
        )
    values = np.frombuffer(content, '<f4')
    if len(values) == count:
        return values.reshape(shape)
    return np.broadcast_to(values.reshape(()), shape)
