"""The weights of the Inception network, from the files that people have."""

import functools
import math
import os
import re

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from google.protobuf import message
from tensorboardX.proto import graph_pb2, types_pb2  # TensorFlow's own message definitions

from sphere_ar_jax.evaluation.fidelity import inception
from sphere_ar_jax.interop import torch_file
from sphere_ar_jax.runtime.console import UserError, first_line

MAX_FILE_BYTES = 2**29  # the published file has 95 MB


@functools.cache
def _shapes():
    """{path: shape} of all parameters."""
    image = jax.ShapeDtypeStruct((1, inception.SIZE, inception.SIZE, 3), jnp.float32)
    params = jax.eval_shape(inception.Inception().init, jax.random.key(0), image)['params']
    return {path: leaf.shape for path, leaf in traverse.flatten_dict(params, sep='/').items()}


_NODES = {'kernel': 'conv2d_params', 'beta': 'batchnorm/beta', 'gamma': 'batchnorm/gamma'}
_NODES |= {'mean': 'batchnorm/moving_mean', 'variance': 'batchnorm/moving_variance'}
_TORCH_LEAVES = {'kernel': 'conv.weight', 'beta': 'bn.bias', 'gamma': 'bn.weight'}
_TORCH_LEAVES |= {'mean': 'bn.running_mean', 'variance': 'bn.running_var'}
# Theirs of: the block, its `conv`, its towers; the convolutions of a tower count from 1.
_TORCH_35 = 'branch1x1', 'branch5x5', 'branch3x3dbl', 'branch_pool'
_TORCH_17 = 'branch1x1', 'branch7x7', 'branch7x7dbl', 'branch_pool'
_TORCH_8 = 'branch1x1', 'branch3x3', 'branch3x3dbl', 'branch_pool'
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
_TORCH_STEM = {
    'conv': 'Conv2d_1a_3x3',
    'conv_1': 'Conv2d_2a_3x3',
    'conv_2': 'Conv2d_2b_3x3',
    'conv_3': 'Conv2d_3b_1x1',
    'conv_4': 'Conv2d_4a_3x3',
}


def _count(name):
    """0 for 'tower', 2 for 'tower_2'."""
    return int(name.partition('_')[2] or 0)


def _torch_name(path):
    if path == 'softmax_weights':
        return 'fc.weight'
    *parts, leaf = path.split('/')
    if len(parts) == 1:
        return f'{_TORCH_STEM[parts[0]]}.{_TORCH_LEAVES[leaf]}'
    block, branch, *towers = _TORCH_BLOCKS[parts[0]]
    if parts[1] != 'conv':
        branch = towers[_count(parts[1])]
        if parts[2] == 'mixed':  # behind the one or two convolutions of the tower
            branch += f'_{_count(parts[1]) + 2}{"ab"[_count(parts[3])]}'
        elif branch != 'branch_pool':
            branch += f'_{_count(parts[2]) + 1}'
    return f'{block}.{branch}.{_TORCH_LEAVES[leaf]}'


def _node_name(path):
    if path == 'softmax_weights':
        return 'softmax/weights'
    parent, _, leaf = path.rpartition('/')
    return f'{parent}/{_NODES[leaf]}'


def _take(tensors, name_of, layout, source, ignored):
    """The parameter tree of named tensors. Raises UserError with all that is wrong with them, in
    one line.

    layout: function of a tensor's rank → the order in which theirs has our axes. ignored: function
    of a name, whether a tensor of it may be there too.
    """
    names = {path: name_of(path) for path in _shapes()}
    unexpected = [name for name in tensors if name not in names.values() and not ignored(name)]
    params, faults = {}, {'missing': [], 'misshapen': [], 'unexpected': unexpected}
    for path, shape in _shapes().items():
        name, order = names[path], layout(len(shape))
        expected = tuple(shape[axis] for axis in order)
        if name not in tensors:
            faults['missing'].append(name)
        elif tuple(tensors[name].shape) != expected:
            faults['misshapen'].append(
                f'{name} of shape {tuple(tensors[name].shape)} instead of {expected}'
            )
        else:
            params[path] = np.array(
                np.asarray(tensors[name], np.float32).transpose(np.argsort(order)), order='C'
            )
    found = '; '.join(
        f'{len(names)} {kind}: {_some(names)}' for kind, names in faults.items() if names
    )
    if found:
        raise UserError(f'{source} does not hold the weights of the FID Inception ({found})')
    return traverse.unflatten_dict(params, sep='/')


def _some(names, most=10):
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def from_torch(tensors):
    """The parameters from the PyTorch port of the same weights.

    Args:
      tensors: {name: array} of `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) or
        `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity), kernels OIHW.
    Returns:
      a tree of float32 NumPy arrays. Raises UserError that lists whatever is missing, unexpected or
        mis-shaped.
    """
    ignored = re.compile(
        r'fc\.bias|.*\.num_batches_tracked'
    ).fullmatch  # the evaluator's logits have no bias
    layout = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}.get
    return _take(tensors, _torch_name, layout, 'the dict of tensors', ignored)


def load(path):
    """The parameters from a file: TensorFlow's .pb, or the .pth of pytorch-fid or torch-fidelity.

    Raises OSError where there is no file, UserError for any other.
    """
    if str(path).endswith('.pb'):
        return load_graph_def(path)
    tensors = torch_file.open_file(path)
    by_name = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not (by_name and all(hasattr(tensor, 'shape') for tensor in tensors.values())):
        raise UserError(f'{path} holds a {type(tensors).__name__}, but must hold tensors by name')
    return from_torch(tensors)


def load_graph_def(path):
    """The parameters from `classify_image_graph_def.pb`, read without TensorFlow.

    `gamma` becomes 1 wherever the graph's batch norm says scale_after_normalization=false.

    Returns:
      a tree of float32 NumPy arrays. Raises OSError where there is no file, UserError with one line
        where it is no
      GraphDef, or one without these constants.
    """
    if os.path.getsize(path) > MAX_FILE_BYTES:
        raise UserError(
            f'{path} is larger than any file of this network: {os.path.getsize(path)} bytes'
        )
    graph = graph_pb2.GraphDef()
    try:
        with open(path, 'rb') as f:
            graph.ParseFromString(f.read())
    except message.DecodeError as error:
        raise UserError(f'{path} is not a GraphDef: {first_line(error)}') from None
    constants = {
        node.name: _array(path, node.attr['value'].tensor)
        for node in graph.node
        if node.op == 'Const' and node.attr['value'].tensor.dtype == types_pb2.DT_FLOAT
    }
    norms = [node for node in graph.node if node.op == 'BatchNormWithGlobalNormalization']
    epsilons = [
        node.attr['variance_epsilon'].f for node in norms if 'variance_epsilon' in node.attr
    ]
    if any(not math.isclose(e, inception.EPSILON, rel_tol=1e-6) for e in epsilons):
        raise UserError(f'{path} has batch norms with an epsilon other than {inception.EPSILON}')
    params = _take(
        constants, _node_name, range, path, lambda name: not name.endswith(tuple(_NODES.values()))
    )
    flat = traverse.flatten_dict(params, sep='/')
    for node in norms:
        if not node.attr['scale_after_normalization'].b:
            flat[f'{node.name.removesuffix("/batchnorm")}/gamma'][:] = 1
    return params


def _array(path, tensor):
    """A TensorProto of floats as a read-only array; one number that is repeated takes no memory."""
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    content = tensor.tensor_content or np.array(tensor.float_val, '<f4').tobytes()
    count = math.prod(shape) if all(size > 0 for size in shape) else 0
    if len(shape) > 8 or len(content) not in (4, 4 * count) or not 1 <= count <= 2**28:
        raise UserError(
            f'{path} is not a GraphDef: it has a tensor of shape {shape} with {len(content)} bytes'
        )
    values = np.frombuffer(content, '<f4')
    return np.broadcast_to(values.reshape(shape if len(values) == count else ()), shape)
