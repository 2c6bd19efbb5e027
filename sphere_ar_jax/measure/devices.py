"""Cloud TPUs: what a chip can do at most, and the slices that there are, by the names that Google
gives them.

Every number is of one chip, from its page at https://docs.cloud.google.com/tpu/docs/NAME, except
for v4's rates of HBM and ICI (six links of 50 GB/s), which others report:
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
      name: as in v6e-16. cores: that the number in such a name counts, of each chip. devices: of
        JAX, of each chip.
      flops: bfloat16 operations a second. hbm: bytes. hbm_rate: bytes a second, read and written
        together.
      ici: bytes a second that a chip can send, over all its links to other chips (half of what the
        pages call
      bidirectional). shapes: of slices, by their number of chips. setting: libtpu's name of the
        chip's configuration.
    """

    name: str
    cores: int
    devices: int
    flops: float
    hbm: int
    hbm_rate: float
    ici: float
    shapes: dict
    setting: str = 'default'


_PLANE = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBES = {
    4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8', 512: '8x8x8',
}  # fmt: skip
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            'v4', 2, 1, 275e12, 32 * GiB, 1.2e12, 300e9, _CUBES, 'megacore'
        ),  # its two cores are one device
        Chip('v5e', 1, 1, 197e12, 16 * GiB, 819e9, 200e9, _PLANE),
        Chip('v5p', 2, 1, 459e12, 95 * GiB, 2765e9, 600e9, _CUBES, 'megacore'),
        Chip('v6e', 1, 1, 918e12, 32 * GiB, 1640e9, 400e9, _PLANE),
        Chip('tpu7x', 2, 2, 2307e12, 192 * GiB, 7380e9, 600e9, _CUBES),
    )
}


class Slice(NamedTuple):
    """A number of connected chips. name: as in v6e-16. shape: as in 4x4."""

    name: str
    chip: Chip
    shape: str

    @property
    def topology(self):
        """libtpu's name."""
        return f'{self.chip.name}:{self.shape}'

    @property
    def chips(self):
        """How many there are."""
        return math.prod(map(int, self.shape.split('x')))


def find_slice(text):
    """The `Slice` of 'v6e-256' or 'v6e:16x16'. Raises ValueError, one line, for any other than
    those of `CHIPS`.
    """
    kind, _, rest = text.partition(':') if ':' in text else text.partition('-')
    kind = 'v5e' if kind == 'v5litepod' else kind  # the type that gcloud asks for
    if kind in CHIPS:
        chip = CHIPS[kind]
        for count, shape in chip.shapes.items():
            if re.fullmatch(shape if ':' in text else str(count * chip.cores), rest):
                return Slice(f'{kind}-{count * chip.cores}', chip, shape)
        known = ', '.join(
            f'{kind}-{count * chip.cores} ({kind}:{shape})' for count, shape in chip.shapes.items()
        )
        raise ValueError(f'there is no slice {text}; there are {known}')
    raise ValueError(
        f'{text!r} names no TPU; known are {", ".join(CHIPS)}, as in v6e-256 or v6e:16x16'
    )
