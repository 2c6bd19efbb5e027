"""The discriminators' parameters in PyTorch's names, order and layout, and by formula (see
goldens/README.md).
"""

import numpy as np
from flax import traverse_util as traverse

# Modules of the public PatchGAN, in its order → ours.
PATCHGAN = {
    'main.0': 'conv0', 'main.2': 'conv1', 'main.3': 'norm1', 'main.5': 'conv2', 'main.6': 'norm2',
    'main.8': 'conv3', 'main.9': 'norm3', 'main.11': 'conv_out',
}  # fmt: skip


def stylegan(side):
    """The modules of the public StyleGAN discriminator for images of side × side pixels, in its
    order → ours.
    """
    block = {'conv_res': 'shortcut', 'net.0': 'conv1', 'net.2': 'conv2', 'downsample.1': 'conv3'}
    modules = {'blocks.0': 'conv_in'}
    number = 2
    while side > 4:
        side //= 2
        modules |= {
            f'blocks.{number}.{theirs}': f'down{side}/{ours}' for theirs, ours in block.items()
        }
        number += 1
    return modules | {
        'final_conv.0': 'conv_out',
        'final_linear.0': 'dense1',
        'final_linear.2': 'dense2',
    }


def _theirs(path, a):
    if a.ndim == 4:
        return a.transpose(3, 2, 0, 1)
    if path == 'dense1/kernel':  # theirs flattens 4×4 pixels channels first
        return a.reshape(4, 4, -1, a.shape[-1]).transpose(3, 2, 0, 1).reshape(a.shape[::-1])
    return a.T


def _ours(path, a):
    if a.ndim == 4:
        return a.transpose(2, 3, 1, 0)
    if path == 'dense1/kernel':
        return a.reshape(len(a), -1, 4, 4).transpose(2, 3, 1, 0).reshape(a.shape[::-1])
    return a.T


def _named(flat, modules):
    """(PyTorch name, our path) in PyTorch's order."""
    for theirs, ours in modules.items():
        for leaf, name in (('kernel', 'weight'), ('scale', 'weight'), ('bias', 'bias')):
            if f'{ours}/{leaf}' in flat:
                yield f'{theirs}.{name}', f'{ours}/{leaf}'


def to_torch(tree, modules):
    """{PyTorch name: array}, in PyTorch's order, of our parameters or of any tree like them."""
    flat = traverse.flatten_dict(tree, sep='/')
    tensors = {name: _theirs(path, np.asarray(flat[path])) for name, path in _named(flat, modules)}
    assert len(tensors) == len(flat)
    return tensors


def by_formula(abstract, modules):
    """Our parameters of the goldens, by their place in PyTorch's order; `abstract`: a tree of their
    shapes.
    """
    flat = traverse.flatten_dict(abstract, sep='/')
    params = {}
    for i, (name, path) in enumerate(_named(flat, modules)):
        n = np.random.RandomState(i).standard_normal(
            _theirs(path, np.empty(flat[path].shape)).shape
        )
        scaled = (
            n * 1.4 / np.sqrt(np.prod(n.shape[1:]))
            if n.ndim > 1
            else 0.05 * n + name.endswith('weight')
        )
        params[path] = _ours(path, scaled.astype(np.float32))
    assert len(params) == len(flat)
    return traverse.unflatten_dict(params, sep='/')
