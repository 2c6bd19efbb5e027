"""LPIPS' weights from the two public PyTorch files."""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from sphere_ar_jax.interop import torch_file, torch_names
from sphere_ar_jax.models.judges import lpips
from sphere_ar_jax.runtime.console import UserError, some
from sphere_ar_jax.runtime.types import PyTree

SOURCES = (
    "taming-transformers' vgg.pth (https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1)",
    "torchvision's vgg16-397923af.pth (https://download.pytorch.org/models/vgg16-397923af.pth)",
)

OptionalPath: TypeAlias = str | os.PathLike[str] | None


def load(lin_tensors: Mapping[str, Any], vgg_tensors: Mapping[str, Any]) -> PyTree:
    """Makes the parameters of `LPIPS` from the tensors of two public PyTorch files.

    Args:
      lin_tensors: {name: array-like} of `vgg.pth` of taming-transformers or of the lpips package's
        v0.1, which has the same names: lin<i>.model.1.weight (1, c, 1, 1).
      vgg_tensors: {name: array-like} of torchvision's `vgg16-397923af.pth`: features.<n>.weight
        (out, in, 3, 3) and features.<n>.bias (out,). Its classifier.* are not needed.

    Returns:
      A parameter tree of float32 NumPy arrays.

    Raises:
      UserError: tensors are missing, mis-shaped or unexpected; one line names them all.
    """
    lin_shapes: dict[str, tuple[int, ...]] = {}
    vgg_shapes: dict[str, tuple[int, ...]] = {}
    convolutions = {}
    index = 0  # in torchvision's list of layers, where ReLUs and poolings count too
    channels_before = 3
    for i, stage in enumerate(lpips.STAGES):
        lin_shapes[f'lin{i}.model.1.weight'] = (1, stage[-1], 1, 1)
        for j, channels in enumerate(stage):
            convolutions[f'conv{i + 1}_{j + 1}'] = f'features.{index}'
            vgg_shapes[f'features.{index}.weight'] = (channels, channels_before, 3, 3)
            vgg_shapes[f'features.{index}.bias'] = (channels,)
            index += 2
            channels_before = channels
        index += 1
    features = {
        name: a for name, a in vgg_tensors.items() if not str(name).startswith('classifier.')
    }
    faults = _faults('vgg.pth', lin_tensors, lin_shapes)
    faults += _faults('vgg16-397923af.pth', features, vgg_shapes)
    if faults:
        raise UserError(
            "LPIPS takes the tensors of taming-transformers' vgg.pth and of torchvision's "
            f'vgg16-397923af.pth, but {"; ".join(faults)}'
        )
    params: dict[str, Any] = {}
    for i, name in enumerate(lin_shapes):
        params[f'lin{i}'] = _numbers(name, lin_tensors).ravel()
    vgg = {}
    for ours, theirs in convolutions.items():
        kernel = _numbers(f'{theirs}.weight', features)
        bias = _numbers(f'{theirs}.bias', features)
        vgg[ours] = {'kernel': kernel.transpose(2, 3, 1, 0), 'bias': bias}
    params['vgg'] = vgg
    return params


def _numbers(name: str, tensors: Mapping[str, Any]) -> np.ndarray:
    """The finite float32 numbers of a tensor; errors as of `torch_names.numbers_of`."""
    return torch_names.numbers_of(name, tensors).astype(np.float32)


def check_paths(lin_path: OptionalPath, vgg_path: OptionalPath) -> None:
    """Checks that both files are there.

    Args:
      lin_path: the first file of SOURCES, None if the user has not named it.
      vgg_path: the second file, or None.

    Raises:
      UserError: a path is None, or no file is there. The message says where to download both.
    """
    paths = (lin_path, vgg_path)
    missing = [f'no file {path}' for path in paths if path is not None and not os.path.isfile(path)]
    for source, path in zip(SOURCES, paths, strict=True):
        if path is None:
            file = source.split(' (')[0]
            missing.append(f'no path to {file}')
    if missing:
        raise UserError(
            f'LPIPS needs {" and ".join(SOURCES)}, but there is {" and ".join(missing)}: '
            'download both (training goes without at perceptual_weight=0)'
        )


def read(lin_path: OptionalPath, vgg_path: OptionalPath) -> PyTree:
    """Reads the files `vgg.pth` and `vgg16-397923af.pth`; see `load`.

    Args:
      lin_path: `vgg.pth`, None if the user has not named it.
      vgg_path: `vgg16-397923af.pth`, or None.

    Returns:
      A parameter tree of float32 NumPy arrays.

    Raises:
      UserError: a file is not named, missing, damaged, not a file of PyTorch, or holds other
        tensors.
    """
    check_paths(lin_path, vgg_path)
    assert lin_path is not None
    assert vgg_path is not None
    paths = (lin_path, vgg_path)
    contents = [torch_file.open_file(path) for path in paths]
    for path, tensors in zip(paths, contents, strict=True):
        if not isinstance(tensors, dict):
            kind = type(tensors).__name__
            raise UserError(f'{path} holds a {kind}, but must hold tensors by name')
    return load(*contents)


def _faults(
    file: str, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Lists what is wrong with a file's tensors, which should have these names and shapes."""
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
        faults.append(f'{file} has unexpected {some(unexpected)}')
    return faults
