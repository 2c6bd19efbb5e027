"""TPUs and GPUs: what a chip can do at most, and the slices that there are.

Every number is of one chip.

TPUs have Google's names, and the numbers of https://docs.cloud.google.com/tpu/docs/NAME. The rates
of v4's HBM and ICI (six links of 50 GB/s) are not on its page, but at
https://glennklockwood.com/garden/processors/TPUv4. The pages publish no rate for float32: at JAX's
default precision a TPU multiplies float32 matrices as bfloat16 ones.

GPUs are Nvidia's SXM modules, a host of which has up to eight. The rates of bfloat16 products,
without sparsity, and of NVLink are those of the data sheets. Memory, its rate and `target` are what
the cards tell XLA (https://github.com/openxla/xla, xla/backends/gpu/target_config/specs).
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

GiB = 2**30


class Chip(NamedTuple):
    """A kind of TPU or GPU.

    Attributes:
      name: as in v6e-16.
      cores: what a chip adds to the number in the name of a slice: v5p-16 has 8 chips of 2 cores.
      devices: number of JAX devices of a chip.
      flops: bfloat16 operations a second.
      hbm: bytes of memory.
      hbm_rate: bytes a second, read and written together.
      link_rate: bytes a second that a chip can send over all its links to other chips (ICI or
        NVLink). It is half of what the pages call bidirectional.
      shapes: {number of chips: the shape of a slice of so many}.
      setting: libtpu's name of the chip's configuration.
      target: what XLA's compiler for GPUs asks of a card, by the names of its fields. A TPU has
        none.
    """

    name: str
    cores: int
    devices: int
    flops: float
    hbm: int
    hbm_rate: float
    link_rate: float
    shapes: Mapping[int, str]
    setting: str = 'default'
    target: Mapping[str, Any] = {}

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return bool(self.target)


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
# Slices, hosts and cards of a host, as XLA names them.
_HOST = {1: '1x1x1', 2: '1x1x2', 4: '1x1x4', 8: '1x1x8'}


def _gpu(
    name: str, flops: float, hbm: int, hbm_rate: float, link_rate: float, **target: Any
) -> Chip:
    """A GPU; the last arguments are what tells its `target` from others'."""
    common = {
        'threads_per_block_limit': 1024,
        'threads_per_warp': 32,
        'threads_per_core_limit': 2048,
        'shared_memory_per_block': 49152,
        'registers_per_core_limit': 65536,
        'registers_per_block_limit': 65536,
        'block_dim_limit_x': 2147483647,
        'block_dim_limit_y': 65535,
        'block_dim_limit_z': 65535,
        'device_memory_size': hbm,
        'memory_bandwidth': int(hbm_rate),
    }
    return Chip(name, 1, 1, flops, hbm, hbm_rate, link_rate, _HOST, target=common | target)


_HOPPER = {
    'major': 9,
    'core_count': 132,
    'fpus_per_core': 128,
    'clock_rate_ghz': 1.98,
    'l2_cache_size': 52428800,
    'shared_memory_per_core': 233472,
    'shared_memory_per_block_optin': 232448,
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
        _gpu(
            'a100',
            312e12,
            85100068864,
            2039.04e9,
            300e9,
            major=8,
            core_count=108,
            fpus_per_core=64,
            clock_rate_ghz=1.41,
            l2_cache_size=41943040,
            shared_memory_per_core=167936,
            shared_memory_per_block_optin=166912,
        ),
        _gpu('h100', 989e12, 84942979072, 3352.32e9, 450e9, **_HOPPER),
        _gpu('h200', 989e12, 151397597184, 4800e9, 450e9, **_HOPPER),
        _gpu(
            'b200',
            2250e12,
            191514411008,
            7672.32e9,
            900e9,
            major=10,
            core_count=148,
            fpus_per_core=128,
            clock_rate_ghz=1.965,
            l2_cache_size=132644864,
            shared_memory_per_core=233472,
            shared_memory_per_block_optin=232448,
        ),
    )
}


def target_config(chip: Chip) -> str:
    """The text by which XLA's compiler knows a GPU, a `GpuTargetConfigProto`.

    Args:
      chip: a GPU.
    """
    fields = dict(chip.target)
    capability = f'cuda_compute_capability {{ major: {fields.pop("major")} }}'
    numbers = ' '.join(f'{name}: {value}' for name, value in fields.items())
    return (
        f'gpu_device_info {{ {numbers} {capability} }} '
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } '
        f'device_description_str: "NVIDIA {chip.name.upper()}"'
    )


class Slice(NamedTuple):
    """A number of connected chips: TPUs, or GPUs of one host.

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
        """The kind and the shape, as in v6e:4x4, by which libtpu knows a slice of TPUs."""
        return f'{self.chip.name}:{self.shape}'

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(map(int, self.shape.split('x')))


def find_slice(text: str) -> Slice:
    """Looks a slice up by its name.

    Args:
      text: as in 'v6e-256', 'v6e:16x16' or 'h100-8'.

    Raises:
      ValueError: `CHIPS` has no such slice; the message is one line that says which there are.
    """
    by_shape = ':' in text
    kind, _, rest = text.partition(':' if by_shape else '-')
    if kind == 'v5litepod':  # gcloud's name of the type
        kind = 'v5e'
    if kind not in CHIPS:
        known = ', '.join(CHIPS)
        raise ValueError(f'{text!r} names no chip; known are {known}, as in v6e-256 or h100-8')
    chip = CHIPS[kind]
    for count, shape in chip.shapes.items():
        if re.fullmatch(shape if by_shape else str(count * chip.cores), rest):
            return Slice(f'{kind}-{count * chip.cores}', chip, shape)
    known = ', '.join(
        f'{kind}-{count * chip.cores} ({kind}:{shape})' for count, shape in chip.shapes.items()
    )
    raise ValueError(f'there is no slice {text}; there are {known}')
