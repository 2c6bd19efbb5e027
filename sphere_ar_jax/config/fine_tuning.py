"""What the section `fine_tuning` says of the parameters: which are trained, and how fast.

Parameters are known by their paths, as `stack/blocks/attention/qkv/kernel`. A pattern is a regular
expression that is searched anywhere in a path, as in `sharding.RULES`. See `docs/fine_tuning.md`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from sphere_ar_jax.runtime.console import UserError


class Tuning(NamedTuple):
    """What a fine-tuning does with the parameters of the AR model.

    Attributes:
      freeze: patterns of parameters that are not trained.
      multipliers: pairs (pattern, factor of the learning rate); the first that matches counts.
      lora_rank: the rank of the factors that are trained in place of the transformer's kernels; 0
        trains the kernels.
    """

    freeze: tuple[str, ...] = ()
    multipliers: tuple[tuple[str, float], ...] = ()
    lora_rank: int = 0


def _check_pattern(key: str, pattern: object) -> None:
    """Raises UserError unless a value of a key is a regular expression."""
    try:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError('not a text')
        re.compile(pattern)
    except (ValueError, re.error) as error:
        raise UserError(f'{key} has {pattern!r}, which is no regular expression: {error}') from None


def _multipliers(texts: Iterable[object]) -> tuple[tuple[str, float], ...]:
    """Parses texts like 'PATTERN=FACTOR'."""
    found = []
    for text in texts:
        pattern, _, factor = str(text).rpartition('=')
        try:
            value = float(factor)
        except ValueError:
            value = 0.0
        if not (pattern and 0 < value < float('inf')):
            raise UserError(
                f'fine_tuning.multipliers has {text!r}, but must have PATTERN=FACTOR with a factor '
                'above 0, as head/=0.1; what is not to be trained belongs into fine_tuning.freeze'
            )
        _check_pattern('fine_tuning.multipliers', pattern)
        found.append((pattern, value))
    return tuple(found)


def read(section: ConfigDict) -> Tuning:
    """Reads the section `fine_tuning` of a config.

    Raises:
      UserError: a pattern is no regular expression, a multiplier is not written as one, or the rank
        is negative; one line.
    """
    for pattern in section.freeze:
        _check_pattern('fine_tuning.freeze', pattern)
    rank = section.lora_rank
    if rank < 0:
        raise UserError(f'fine_tuning.lora_rank is {rank}, but must be at least 0')
    return Tuning(tuple(section.freeze), _multipliers(section.multipliers), rank)
