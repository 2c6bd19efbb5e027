"""Directories to share: the weights of a run under the public names, and what their use needs.

  model.safetensors  the weights
  config.json        the config, without what belongs to the machine that the run was made on
  classes.json       the names of the classes, where the run has them
  README.md          a model card

`docs/sharing.md` shows how they are written, uploaded and loaded. safetensors' own reader checks
the header of a file of any origin, so that sizes and places of tensors are those of the file.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401, NumPy knows bfloat16 by it
import numpy as np
import safetensors
from etils import epath
from ml_collections import ConfigDict
from numpy.typing import DTypeLike

from sphere_ar_jax.config import checks, schema
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.runtime.console import UserError, first_line, printable
from sphere_ar_jax.runtime.types import PyTree

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
CLASSES = 'classes.json'
CARD = 'README.md'
FILES = (WEIGHTS, CONFIG, CLASSES, CARD)

_FLOATS = ('F16', 'BF16', 'F32', 'F64')
# Directories of the stages of a run.
_STAGES = ('tokenizer', 'ar', 'distillation')


# Keys of the config that belong to the machine that a run was made on, or to weights that it began
# with or kept and that are not shared.
_OF_MACHINES = (
    'reasons', 'logging', 'tokenizer', 'init_from', 'mesh.data', 'mesh.fsdp', 'mesh.tensor',
    'sampling.ema_decay',
    'data.path', 'data.data_dir', 'data.workers', 'data.threads', 'tokenizer_training.lpips',
    'tokenizer_training.vgg', 'watch.inception', 'watch.reference', 'watch.fid_images',
    'fine_tuning.init_from', 'fine_tuning.freeze', 'fine_tuning.multipliers',
    'fine_tuning.lora_rank',
)  # fmt: skip
# Keys of a model of texts and its data. A tokenizer is shared without them.
_OF_TEXTS = (
    'ar.condition', 'ar.vocabulary', 'ar.text_tokens', 'ar.features', 'ar.feature_shape',
    'ar.text_encoder_depth', 'ar.text_weight', 'ar.alone_weight', 'data.captions',
)  # fmt: skip


class Tensor:
    """A tensor that lies in a safetensors file; `np.asarray(tensor)` reads its numbers.

    Attributes:
      shape: the tensor's shape.
    """

    def __init__(self, file: Any, path: str, name: str) -> None:
        """Looks at the header alone.

        Args:
          file: what `safetensors.safe_open` gives.
          path: the file's path, for messages.
          name: the tensor's name.

        Raises:
          UserError: the tensor holds anything but floats.
        """
        header = file.get_slice(name)
        self.shape = tuple(header.get_shape())
        self._file = file
        self._name = name
        if header.get_dtype() not in _FLOATS:
            where = f'{path}: {printable(name, 100)}'
            raise UserError(f'{where} holds {header.get_dtype()}, but must hold floats')

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self._file.get_tensor(self._name).astype(dtype or np.float32)


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """A context that makes a UserError of what safetensors raises at a file that is not whole."""
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f'{where} is no whole safetensors file: {printable(first_line(error))}'
        ) from None


def open_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Opens a safetensors file; the numbers of its tensors are not read yet.

    Args:
      path: the file, on a local disk.

    Returns:
      {name: `Tensor`}.

    Raises:
      OSError: there is no file.
      UserError: it is no safetensors file, or is damaged, or a tensor holds other than floats.
    """
    where = os.fspath(path)
    with open(where, 'rb'):  # safetensors' own error has no name of the file.
        pass
    with _naming(where):
        file = safetensors.safe_open(where, framework='numpy')
        return {name: Tensor(file, where, name) for name in file.keys()}  # noqa: SIM118


def heads(path: str | os.PathLike[str]) -> int | None:
    """The AR model's attention heads that a safetensors file notes, None where it notes none.

    Raises:
      UserError: the file is damaged, or what it notes is no number.
    """
    where = os.fspath(path)
    with _naming(where), safetensors.safe_open(where, framework='numpy') as file:
        noted = (file.metadata() or {}).get(torch_names.AR_HEADS)
    if noted is None:
        return None
    if not noted.isdecimal() or not 0 < int(noted) < 10**6:
        raise UserError(f'{where} notes {printable(noted, 40)} as its number of heads')
    return int(noted)


def is_shared(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds shared weights, and no run of its own."""
    place = epath.Path(directory)
    has_stages = any((place / stage).is_dir() for stage in _STAGES)
    return (place / WEIGHTS).exists() and (place / CONFIG).exists() and not has_stages


def how_to_convert(directory: str | os.PathLike[str]) -> str:
    """The flags that make a workdir, which a training can go on from, of shared weights."""
    return f'--mode=convert --checkpoint={os.fspath(directory)}/{WEIGHTS}'


def has_ar(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds the shared weights of an AR model.

    Raises:
      UserError: the file of the weights is damaged.
    """
    if not is_shared(directory):
        return False
    tensors = open_file(os.path.join(directory, WEIGHTS))
    return not all(name.startswith('vae.') for name in tensors)


def config(cfg: ConfigDict) -> ConfigDict:
    """The config of a run as it is shared.

    Paths, devices and where numbers are logged belong to the machine that the run was made on: they
    have their defaults again. So do the keys of a fine-tuning, whose factors are merged, and those
    of texts: no model of texts is shared, only its tokenizer.

    Args:
      cfg: the run's config.
    """
    default = schema.leaves(schema.default().to_dict())
    values = {key: default[key] for key in (*_OF_MACHINES, *_OF_TEXTS)}
    if cfg.data.name in schema.CAPTIONED:
        # Its data are images with captions, which only a model of texts may have.
        values |= {'data.name': 'folder', 'data.num_classes': 1}
    if cfg.tokenizer is not None:  # Another run trained it.
        values |= {'tokenizer_training.steps': 0, 'tokenizer_training.warmup_steps': 0}
    return checks.check(schema.changed(cfg, values))


def read(directory: str | os.PathLike[str], like: PyTree) -> PyTree | None:
    """The parameters of one model in a directory of shared weights.

    Args:
      directory: the directory, on a local disk.
      like: the parameters, abstract, with their shardings.

    Returns:
      The parameters, or None where the directory holds no shared weights, or no such model.

    Raises:
      UserError: the file is damaged, or its tensors are not those of this model; one line.
    """
    if not is_shared(directory):
        return None
    path = os.path.join(directory, WEIGHTS)
    tensors = open_file(path)
    of_vae = any(name.startswith('vae.') for name in torch_names.torch_shapes(like))
    if not any(name.startswith('vae.') == of_vae for name in tensors):
        return None
    try:
        params = torch_names.from_torch(tensors, like)
    except UserError as error:
        some = '; '.join(str(error).splitlines()[:4])
        raise UserError(some if some.startswith(str(path)) else f'{path}: {some}') from None
    return jax.tree.map(lambda a, leaf: jax.device_put(a, leaf.sharding), params, like)
