"""Records what a file of Inception weights computes, or compares it with an earlier record.

  python -m sphere_ar_jax.evaluation.fidelity.inception_record WEIGHTS RECORD.json

A record has the SHA-256 of the file and of its tensors, and three activations for a picture that is
drawn by formula: the first number of each of `inception.Features`. Where RECORD.json is not there,
it is written. Where it is, the tensors must be the same and the activations must agree, which tells
whether two machines compute the same scores. Two files of the same weights, as the .pb and the
.pth, have different hashes as files and may have the same tensors.
"""

import json
import os

import numpy as np
from absl import flags

from sphere_ar_jax.evaluation.fidelity import inception, inception_weights
from sphere_ar_jax.runtime import console, files
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree

_FLAGS = flags.FlagValues()
# Activations of two machines may differ by this, relative to 1 + their size.
_CLOSE = 1e-4


def _picture() -> np.ndarray:
    """The picture (1, 64, 64, 3) uint8 that the activations are of."""
    y, x, c = np.indices((64, 64, 3))
    return ((37 * y + 91 * x + 53 * c + x * y) % 256).astype(np.uint8)[None]


def activations(params: PyTree) -> dict[str, float]:
    """The first number of each output of the network, for the picture.

    Args:
      params: from `inception_weights.load`.
    """
    found = inception.features(params, _picture())
    return {name: float(np.ravel(a)[0]) for name, a in found._asdict().items()}


def compare(before: dict[str, object], now: dict[str, object]) -> None:
    """Compares a record with an earlier one.

    Raises:
      UserError: the tensors or the activations differ, or the earlier record is damaged.
    """
    if before.get('tensors') != now['tensors']:
        raise UserError(
            f'the tensors differ: their SHA-256 is {now["tensors"]}, and {before.get("tensors")} '
            'in the record'
        )
    earlier = before.get('activations')
    found = now['activations']
    assert isinstance(found, dict)
    if not isinstance(earlier, dict) or set(earlier) != set(found):
        raise UserError(f'the record has no activations of {", ".join(found)}')
    for name, value in found.items():
        old = earlier[name]
        close = isinstance(old, int | float) and abs(value - old) <= _CLOSE * (1 + abs(old))
        if not close:
            raise UserError(f'the activation {name} is {value}, and {old} in the record')


def main(argv: list[str]) -> None:
    """Writes a record, or compares with one.

    Args:
      argv: the command line, with the program's name first.

    Raises:
      UserError: a file is damaged, or the record is of other weights; one line.
    """
    weights, path = console.parse(argv, _FLAGS, __doc__, 'WEIGHTS', 'RECORD.json')
    params = inception_weights.load(weights)
    now: dict[str, object] = {
        'file': inception_weights.file_hash(weights),
        'tensors': inception_weights.fingerprint(params),
        'activations': activations(params),
    }
    print(json.dumps(now, indent=2))
    if not os.path.exists(path):
        files.write_json(path, now)
        print(f'wrote {path}')
        return
    before = files.read_json(path)
    if not isinstance(before, dict):
        raise UserError(f'{path} is no record')
    compare(before, now)
    print(f'the same tensors and activations as in {path}')


if __name__ == '__main__':
    console.run(main)
