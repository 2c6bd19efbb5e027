"""LPIPS' weights from the two public PyTorch files."""

import os

import numpy as np

from sphere_ar_jax.interop import torch_file
from sphere_ar_jax.models import lpips
from sphere_ar_jax.runtime.console import UserError

SOURCES = (
    "taming-transformers' vgg.pth (https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1)",
    "torchvision's vgg16-397923af.pth (https://download.pytorch.org/models/vgg16-397923af.pth)",
)


def load(lin_tensors, vgg_tensors):
    """Parameters of `LPIPS` from the tensors of two public PyTorch files.

    Args:
      lin_tensors: {name: array-like} of `vgg.pth` of taming-transformers or of the lpips package's
        v0.1 (the same names): lin<i>.model.1.weight (1, c, 1, 1).
      vgg_tensors: {name: array-like} of torchvision's `vgg16-397923af.pth`: features.<n>.weight
        (out, in, 3, 3) and features.<n>.bias (out,); its classifier.* are not needed.
    Returns:
      parameter tree of float32 NumPy arrays.
    Raises UserError, in one line, for all missing, mis-shaped and unexpected tensors together.
    """
    lins, shapes, convolutions = {}, {}, {}
    index, before = 0, 3  # torchvision's list counts ReLUs and poolings too
    for i, stage in enumerate(lpips.STAGES):
        lins[f'lin{i}.model.1.weight'] = (1, stage[-1], 1, 1)
        for j, channels in enumerate(stage):
            convolutions[f'conv{i + 1}_{j + 1}'] = f'features.{index}'
            shapes[f'features.{index}.weight'], shapes[f'features.{index}.bias'] = (
                (channels, before, 3, 3),
                (channels,),
            )
            index, before = index + 2, channels
        index += 1
    vgg_tensors = {
        name: a for name, a in vgg_tensors.items() if not str(name).startswith('classifier.')
    }
    faults = _faults('vgg.pth', lin_tensors, lins) + _faults(
        'vgg16-397923af.pth', vgg_tensors, shapes
    )
    if faults:
        raise UserError(
            "LPIPS takes the tensors of taming-transformers' vgg.pth and of torchvision's vgg16-397923af.pth, but "
            + '; '.join(faults)
        )
    array = lambda name: np.asarray(vgg_tensors[name], np.float32)
    return {
        f'lin{i}': np.asarray(lin_tensors[name], np.float32).ravel() for i, name in enumerate(lins)
    } | {
        'vgg': {
            ours: {
                'kernel': array(f'{theirs}.weight').transpose(2, 3, 1, 0),
                'bias': array(f'{theirs}.bias'),
            }
            for ours, theirs in convolutions.items()
        }
    }


def check_paths(lin_path, vgg_path):
    """Raises UserError where a path is None or no file is there; it says where both files are to be
    had.
    """
    missing = [
        f'no file {path}'
        for path in (lin_path, vgg_path)
        if path is not None and not os.path.isfile(path)
    ]
    missing += [
        f'no path to {s.split(" (")[0]}'
        for s, p in zip(SOURCES, (lin_path, vgg_path), strict=True)
        if p is None
    ]
    if missing:
        raise UserError(
            f'LPIPS needs {" and ".join(SOURCES)}, but there is {" and ".join(missing)}: download both '
            '(training goes without at perceptual_weight=0)'
        )


def read(lin_path, vgg_path):
    """`load` of the files `vgg.pth` and `vgg16-397923af.pth`.

    Raises:
      UserError: of `check_paths`; a file is of other tensors, damaged, or none of PyTorch.
    """
    check_paths(lin_path, vgg_path)
    contents = [torch_file.open_file(path) for path in (lin_path, vgg_path)]
    for path, tensors in zip((lin_path, vgg_path), contents, strict=True):
        if not isinstance(tensors, dict):
            raise UserError(
                f'{path} holds a {type(tensors).__name__}, but must hold tensors by name'
            )
    return load(*contents)


def _faults(file, tensors, shapes):
    """What is wrong with a file's {name: tensor} that should have these shapes, as a list of
    clauses.
    """
    missing = [name for name in shapes if name not in tensors]
    unexpected = [str(name) for name in tensors if name not in shapes]
    faults = [
        f'{name} has shape {np.shape(tensors[name])}, not {shape}'
        for name, shape in shapes.items()
        if name in tensors and np.shape(tensors[name]) != shape
    ]
    if missing:
        faults.append(f'{file} lacks {", ".join(missing)}')
    if unexpected:
        faults.append(f'{file} has unexpected {", ".join(unexpected)}')
    return faults
