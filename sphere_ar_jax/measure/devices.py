"""Cloud TPUs: what a chip can do at most, and the slices that there are, by Google's names.

Every number is of one chip, from its page at https://docs.cloud.google.com/tpu/docs/NAME. The rates
of v4's HBM and ICI (six links of 50 GB/s) are not on its page, but at
https://glennklockwood.com/garden/processors/TPUv4. The pages publish no rate for float32: at JAX's
default precision a TPU multiplies float32 matrices as bfloat16 ones.
"""

import math
import re
from typing import NamedTuple

GiB = 2**30


class Chip(NamedTuple):
    """A kind of TPU.

    Attributes:
      name: as in v6e-16.
      cores: what a chip adds to the number in the name of a slice: v5p-16 has 8 chips of 2 cores.
      devices: number of JAX devices of a chip.
      flops: bfloat16 operations a second.
      hbm: bytes of memory.
      hbm_rate: bytes a second, read and written together.
      ici: bytes a second that a chip can send over all its links to other chips. It is half of what
        the pages call bidirectional.
      shapes: {number of chips: the shape of a slice of so many}.
      setting: libtpu's name of the chip's configuration.
    """

    name: str
    cores: int
    devices: int
    flops: float
    hbm: int
    hbm_rate: float
    ici: float
    shapes: dict[int, str]
    setting: str = 'default'


_PLANE = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBES = {
    4: '2x2x1',
    8: '2x2x2',
    16: '2x2x4',
    32: '2x4x4',
    64: '4x4x4',
    128: '4x4x8',
    256: '4x8x8',
    512: '8x8x8',
}
CHIPS = {
    chip.name: chip
    for chip in (
        # In the setting megacore, the two cores of a chip are one device.
        Chip('v4', 2, 1, 275e12, 32 * GiB, 1.2e12, 300e9, _CUBES, 'megacore'),
        Chip('v5e', 1, 1, 197e12, 16 * GiB, 819e9, 200e9, _PLANE),
        Chip('v5p', 2, 1, 459e12, 95 * GiB, 2765e9, 600e9, _CUBES, 'megacore'),
        Chip('v6e', 1, 1, 918e12, 32 * GiB, 1640e9, 400e9, _PLANE),
        Chip('tpu7x', 2, 2, 2307e12, 192 * GiB, 7380e9, 600e9, _CUBES),
    )
}


class Slice(NamedTuple):
    """A number of connected chips.

    Attributes:
      name: as in v6e-16.
      chip: the kind of the chips.
      shape: as in 4x4.
    """

    name: str
    chip: Chip
    shape: str

    @property
    def topology(self) -> str:
        """The name that libtpu knows the slice by, as in v6e:4x4."""
        return f'{self.chip.name}:{self.shape}'

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(map(int, self.shape.split('x')))


def find_slice(text: str) -> Slice:
    """Looks a slice up by its name.

    Args:
      text: as in 'v6e-256' or 'v6e:16x16'.

    Raises:
      ValueError: `CHIPS` has no such slice; the message is one line that says which there are.
    """
    by_shape = ':' in text
    kind, _, rest = text.partition(':' if by_shape else '-')
    if kind == 'v5litepod':  # gcloud's name of the type
        kind = 'v5e'
    if kind not in CHIPS:
        known = ', '.join(CHIPS)
        raise ValueError(f'{text!r} names no TPU; known are {known}, as in v6e-256 or v6e:16x16')
    chip = CHIPS[kind]
    for count, shape in chip.shapes.items():
        if re.fullmatch(shape if by_shape else str(count * chip.cores), rest):
            return Slice(f'{kind}-{count * chip.cores}', chip, shape)
    known = ', '.join(
        f'{kind}-{count * chip.cores} ({kind}:{shape})' for count, shape in chip.shapes.items()
    )
    raise ValueError(f'there is no slice {text}; there are {known}')
