"""The weights of the Inception network, from the files that people have."""

import functools
import math
import os
import re

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.evaluation.fidelity import inception
from sphere_ar_jax.interop import torch_file
from sphere_ar_jax.runtime.console import UserError

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


def _take(tensors, name_of, layout, source, unexpected):
    """The parameter tree of named tensors. Raises UserError with all that is wrong with them, in one line.

    layout: function of a tensor's rank → the order in which theirs has our axes.
    """
    params, faults = {}, {'missing': [], 'misshapen': [], 'unexpected': unexpected}
    for path, shape in _shapes().items():
        name, order = name_of(path), layout(len(shape))
        expected = tuple(shape[axis] for axis in order)
        if name not in tensors:
            faults['missing'].append(name)
        elif tuple(tensors[name].shape) != expected:
            faults['misshapen'].append(f'{name} of shape {tuple(tensors[name].shape)} instead of {expected}')
        else:
            params[path] = np.array(np.asarray(tensors[name], np.float32).transpose(np.argsort(order)), order='C')
    found = '; '.join(f'{len(names)} {kind}: {_some(names)}' for kind, names in faults.items() if names)
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
      a tree of float32 NumPy arrays. Raises UserError that lists whatever is missing, unexpected or mis-shaped.
    """
    expected = {_torch_name(path) for path in _shapes()}
    ignored = re.compile(r'fc\.bias|.*\.num_batches_tracked')  # the evaluator's logits have no bias
    unexpected = [name for name in tensors if name not in expected and not ignored.fullmatch(name)]
    layout = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}.get
    return _take(tensors, _torch_name, layout, 'the dict of tensors', unexpected)


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
      a tree of float32 NumPy arrays. Raises OSError where there is no file, UserError with one line where it is no
      GraphDef, or one without these constants.
    """
    if os.path.getsize(path) > MAX_FILE_BYTES:
        raise UserError(f'{path} is larger than any file of this network: {os.path.getsize(path)} bytes')
    with open(path, 'rb') as f:
        content = f.read()
    try:
        constants, unscaled, epsilons = _read_graph_def(memoryview(content))
    except _WireError as error:
        raise UserError(f'{path} is not a GraphDef: {error}') from None
    if any(not math.isclose(e, inception.EPSILON, rel_tol=1e-6) for e in epsilons):
        raise UserError(f'{path} has batch norms with an epsilon other than {inception.EPSILON}')
    expected = {_node_name(path) for path in _shapes()}
    unexpected = [name for name in constants if name not in expected and name.endswith(tuple(_NODES.values()))]
    params = _take(constants, _node_name, range, path, unexpected)
    flat = traverse.flatten_dict(params, sep='/')
    for name in unscaled:
        flat[f'{name.removesuffix("/batchnorm")}/gamma'][:] = 1
    return params


class _WireError(ValueError):
    pass


def _varint(view, at):
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise _WireError('it ends in the middle of a number')
        byte = view[at]
        at, value = at + 1, value | (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _WireError('it has a number of more than 10 bytes')


def _message(view):
    """Yields (field number, value) of a protobuf message: an int for varints, a view of the bytes for all else.

    https://protobuf.dev/programming-guides/encoding
    """
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(view, at)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise _WireError(f'it has a field of the unknown wire type {kind}')
        length, at = _varint(view, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if length > len(view) - at:
            raise _WireError('it is cut off')
        yield tag >> 3, view[at : at + length]
        at += length


def _submessage(value):
    if isinstance(value, int):
        raise _WireError('it has a number where a message belongs')
    return value


def _text(value):
    try:
        return str(_submessage(value), 'utf-8')
    except UnicodeDecodeError:
        raise _WireError('it has a name that is no text') from None


def _tensor(view):
    """A TensorProto of floats as a read-only array that takes no memory of its own; None for other types."""
    dtype, shape, content, values = 0, [], b'', []
    for field, value in _message(view):
        if field == 1:
            dtype = value
        elif field == 2:
            for kind, dim in _message(_submessage(value)):
                if kind == 2:
                    shape.append(next((size for inner, size in _message(_submessage(dim)) if inner == 1), 0))
        elif field == 4:
            content = _submessage(value)
        elif field == 5:
            values.append(_submessage(value))
    if dtype != 1:  # DT_FLOAT
        return None
    content = content or b''.join(values)
    count = math.prod(shape) if all(isinstance(size, int) for size in shape) else -1
    if len(shape) > 8 or not (len(content) in (4, 4 * count) and 1 <= count <= 2**28):
        raise _WireError(f'it has a tensor of shape {shape} with {len(content)} bytes')
    return np.broadcast_to(np.frombuffer(content, '<f4').reshape(shape if len(content) == 4 * count else ()), shape)


def _read_graph_def(view):
    """({name: array} of float constants, names of batch norms without scale, epsilons of batch norms)."""
    constants, unscaled, epsilons = {}, [], []
    for field, node in _message(view):
        if field != 1:
            continue
        name, op, attributes = '', '', {}
        for kind, value in _message(_submessage(node)):
            if kind == 1:
                name = _text(value)
            elif kind == 2:
                op = _text(value)
            elif kind == 5:
                entry = dict(_message(_submessage(value)))
                if 1 in entry and 2 in entry:
                    attributes[_text(entry[1])] = _submessage(entry[2])
        if op == 'Const' and 'value' in attributes:
            for kind, value in _message(attributes['value']):
                array = _tensor(_submessage(value)) if kind == 8 else None
                if array is not None:
                    constants[name] = array
        elif op == 'BatchNormWithGlobalNormalization':
            # protobuf may leave out a field that is false
            if not dict(_message(attributes.get('scale_after_normalization', b''))).get(5, 0):
                unscaled.append(name)
            for kind, value in _message(attributes.get('variance_epsilon', b'')):
                if kind == 4 and len(_submessage(value)) == 4:
                    epsilons.append(float(np.frombuffer(value, '<f4')[0]))
    return constants, unscaled, epsilons
