"""Reads a compiled program: what devices send, what memory traffic there is, which arrays it holds.

The text is XLA's after all optimizations, for one device: `compiled.as_text()`. An instruction of a
loop's body counts as often as the loop runs, and a conditional's branch as often as it is taken.
Bytes are those of the layout, with tiles filled up.

  program   computations, one of them the entry; each is a list of instructions
  fusion    several instructions that run as one: what is between them is never in memory
"""

import collections
import math
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeAlias

from sphere_ar_jax.models import kernels

COLLECTIVES = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
    'ragged-all-to-all',
)
# These take no time and touch no memory.
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id',
    'replica-id', 'while', 'conditional', 'call', 'opt-barrier', 'add-dependency', 'async-update',
}  # fmt: skip
_SLICES = ('dynamic-slice', 'slice', 'gather')


class Array(NamedTuple):
    """An array of a program.

    Attributes:
      dtype: by XLA's name.
      shape: its sizes.
      bytes: as laid out.
      in_hbm: whether it lies in HBM; on TPUs some lie in the chip's own memory.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    """An instruction of a program.

    Attributes:
      name: unique in its computation.
      opcode: as in 'all-reduce-start'.
      arrays: its results.
      operands: names of instructions; for a constant its value, for a parameter its number.
      rest: the text of its attributes.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool


# The instructions of a computation by their names, in their order.
Computation: TypeAlias = dict[str, Instruction]


class Traffic(NamedTuple):
    """A kind of collective.

    Attributes:
      count: how often it runs.
      sent: bytes that each device sends for it.
    """

    count: float  # type: ignore[assignment]  # the field takes the place of tuple.count
    sent: float


def _search(pattern: str, text: str) -> re.Match[str]:
    """The first match of a pattern in a text. Raises ValueError where there is none."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f'no program: {text[:80]}')
    return match


def _array(dtype: str, dims: str, layout: str) -> Array:
    """The array of a type such as f32[2,3]{1,0:T(8,128)}, given in its three parts."""
    shape = tuple(int(n) for n in dims.split(',') if n)
    bits = 8
    if dtype != 'pred':
        digits = re.search(r'\d+', dtype)
        bits = int(digits[0]) if digits else 0
    padded = list(shape)
    order, tile = _search(r'^\{([\d,]*)(?::.*?T\(([\d,]+)\))?', layout or '{').groups()
    if tile and order:
        # Both lists are read from the minor axis on: `order` has it first, `tile` last.
        for axis, size in zip(order.split(','), reversed(tile.split(',')), strict=False):
            padded[int(axis)] = -(-padded[int(axis)] // int(size)) * int(size)
    in_hbm = not re.search(r'S\([1-9]', layout or '')
    return Array(dtype, shape, math.prod(padded) * bits // 8, in_hbm)


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the one at 0."""
    depth = 0
    for match in re.finditer(r'[()]', text):
        depth += 1 if match[0] == '(' else -1
        if not depth:
            return match.start()
    raise ValueError(f'no program: {text[:80]}')


def _instruction(line: str) -> Instruction | None:
    """The instruction of a line of a computation; None for any other line."""
    match = re.match(r'\s+(ROOT )?%?([\w.\-]+) = (.*)', line)
    if not match:
        return None
    root, name, rest = match.groups()
    end = _closing(rest) + 1 if rest.startswith('(') else rest.index(' ')
    types = re.findall(r'(\w+)\[([\d,]*)\](\{[^}]*\})?', rest[:end])
    arrays = tuple(_array(*found) for found in types)
    opcode, rest = _search(r'^\s*([\w\-]+)(.*)', rest[end:]).groups()
    end = _closing(rest)
    literal = opcode in ('constant', 'parameter')
    operands = (rest[1:end],) if literal else tuple(re.findall(r'%([\w.\-]+)', rest[:end]))
    return Instruction(name, opcode, arrays, operands, rest[end:], bool(root))


def _called(instruction: Instruction, key: str) -> list[str]:
    """Names of the computations that an instruction calls; key: pattern of the attribute's name."""
    return re.findall(rf'\b{key}=%?([\w.\-]+)', instruction.rest)


def _group_size(instruction: Instruction, devices: int) -> int:
    """Devices that take part in one collective together."""
    text = re.search(r'replica_groups=(.*?)(?:, \w+=|$)', instruction.rest)
    groups = text[1] if text else ''
    if mesh := re.match(r'mesh\[(.*?)\] ?\{(.*?)\}', groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if iota := re.match(r'\[\d+,(\d+)\]', groups):
        return int(iota[1])
    if listed := re.match(r'\{\{([\d,]+)\}', groups):
        return listed[1].count(',') + 1
    return devices


def _sent(kind: str, bytes_in: int, bytes_out: int, n: int) -> float:
    """Bytes that each of n devices sends by the ring algorithms."""
    if kind == 'collective-permute':
        return bytes_in
    share = (n - 1) / n
    if kind == 'all-reduce':
        return 2 * share * bytes_in
    if kind == 'all-gather':
        return share * bytes_out
    return share * bytes_in


def _bytes(instruction: Instruction) -> int:
    """Bytes of all results of an instruction."""
    return sum(a.bytes for a in instruction.arrays)


def _place(instruction: Instruction) -> str:
    """Where an instruction comes from in the program's source."""
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else instruction.name


def _maker(instruction: Instruction) -> str:
    """What a GPU's kernel is made with: cuBLAS, cuDNN, Triton, or XLA itself."""
    opcode = instruction.opcode.removesuffix('-start')
    if opcode in COLLECTIVES:
        return 'collective'
    if opcode == 'copy':
        return 'copy'
    said = re.search(r'custom_call_target="([^"]*)"|"kind":"(__[^"]*)"', instruction.rest)
    words = ' '.join(word for word in said.groups() if word) if said else ''
    for word, maker in (('cublas', 'cuBLAS'), ('cudnn', 'cuDNN'), ('triton', 'Triton')):
        if word in words:
            return maker
    return 'XLA'


def sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes above 1 of a shape, in ascending order."""
    return tuple(sorted(n for n in shape if n > 1))


class Program:
    """A compiled program.

    Attributes:
      computations: by their names.
      entry: the name of the computation that the program begins with.
      devices: number of devices that run the program together.
      open_loops: number of loops whose length the text does not say, because it depends on data.
      instructions: (instruction, its computation's name, how often it runs) of all that are not
        within a fusion.
    """

    def __init__(self, text: str, lengths: tuple[float, ...] = (), taken: float = 0.5):
        """Reads a program.

        Args:
          text: `compiled.as_text()`.
          lengths: how often the open loops run, by the number of loops that one is nested in. A
            loop counts as one round where nothing is given.
          taken: the share of the runs of a conditional that take its last branch, see
            `costs.flops`.

        Raises:
          ValueError: the text is not a program.
        """
        self.computations: dict[str, Computation] = {}
        self.open_loops = 0
        self._lengths = lengths
        self._taken = taken
        partitions = re.search(r'num_partitions=(\d+)', text[:100_000])
        self.devices = int(partitions[1]) if partitions else 1
        entry = None
        current: Computation | None = None
        for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
            if header := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
                current = {}
                self.computations[header[2]] = current
                if header[1]:
                    entry = header[2]
            elif current is not None and (instruction := _instruction(line)):
                current[instruction.name] = instruction
        if entry is None:
            raise ValueError('no program: it has no entry')
        self.entry: str = entry
        # How often each computation runs, without those within fusions.
        self._times: dict[str, float] = collections.defaultdict(float)
        self._visit(self.entry, 1.0, 0)
        self.instructions = [
            (instruction, name, times)
            for name, times in self._times.items()
            for instruction in self.computations[name].values()
        ]

    def _length(self, loop: Instruction) -> int | None:
        """How often a loop's body runs; None where the text does not say.

        It is XLA's own note if there is one. Otherwise the loop's condition must be i < constant,
        and i is taken to count up by one from 0.
        """
        if known := re.search(r'known_trip_count\D+(\d+)', loop.rest):
            return int(known[1])
        condition = self.computations[_search(r'condition=%?([\w.\-]+)', loop.rest)[1]]
        root = next(i for i in condition.values() if i.root)
        inside = (self._fused(root) or {}).values()  # On CPUs the comparison is in a fusion.
        compare = [i for i in (root, *inside) if i.opcode == 'compare']
        constants = [
            i.operands[0] for i in (*condition.values(), *inside) if i.opcode == 'constant'
        ]
        if len(compare) != 1 or len(constants) != 1:
            return None
        if 'direction=LT' in compare[0].rest and constants[0].isdigit():
            return int(constants[0])
        return None

    def _visit(self, name: str, times: float, depth: int) -> None:
        """Counts in `_times` a computation that runs so many times, and all that it runs.

        `depth` is the number of loops that the computation is nested in.
        """
        self._times[name] += times
        for instruction in self.computations[name].values():
            if instruction.opcode == 'while':
                length: float | None = self._length(instruction)
                if length is None:
                    self.open_loops += 1
                    length = self._lengths[depth] if depth < len(self._lengths) else 1
                self._visit(_called(instruction, 'body')[0], times * length, depth + 1)
                self._visit(_called(instruction, 'condition')[0], times * (length + 1), depth + 1)
            elif instruction.opcode == 'conditional':
                branches = re.search(r'branch_computations=\{(.*?)\}', instruction.rest)
                if branches:
                    *others, last = re.findall(r'[\w.\-]+', branches[1])
                else:
                    others = _called(instruction, 'false_computation')
                    (last,) = _called(instruction, 'true_computation')
                self._visit(last, times * (self._taken if others else 1), depth)
                for branch in others:
                    self._visit(branch, times * (1 - self._taken) / len(others), depth)
            elif instruction.opcode in ('call', 'async-start'):
                for inner in _called(instruction, 'to_apply') + _called(instruction, 'calls'):
                    self._visit(inner, times, depth)

    def _fused(self, instruction: Instruction) -> Computation | None:
        """The computation of a fusion; None for any other instruction."""
        if instruction.opcode != 'fusion':
            return None
        called = re.search(r'calls=%?([\w.\-]+)', instruction.rest)
        return self.computations[called[1]] if called else None

    def collectives(self) -> dict[str, Traffic]:
        """What one device sends, by the kind of collective.

        An all-reduce of which every device keeps its part alone is a reduce-scatter, whatever XLA
        calls it. A collective that runs beside other work stands in several fusions, under one
        channel, and counts once.
        """
        found: dict[str, Traffic] = {}
        seen = set()

        def add(
            instruction: Instruction,
            computation: Computation,
            times: float,
            place: str,
            kind: str | None = None,
        ) -> None:
            opcode = instruction.opcode.removesuffix('-start')
            if opcode not in COLLECTIVES:
                return
            if channel := re.search(r'channel_id=(\d+)', instruction.rest):
                if (place, channel[1]) in seen:
                    return
                seen.add((place, channel[1]))
            before = sum(_bytes(computation[name]) for name in instruction.operands)
            after = _bytes(instruction)
            if instruction.opcode.endswith('-start'):
                after -= before
            kind = kind or opcode
            size = _group_size(instruction, self.devices)
            sent = times * _sent(kind, before, after, size)
            count, total = found.get(kind, Traffic(0, 0))
            found[kind] = Traffic(count + times, total + sent)

        for instruction, name, times in self.instructions:
            add(instruction, self.computations[name], times, name)
            inner = self._fused(instruction)
            if inner is not None:
                said = f'{instruction.name} {instruction.rest[:200]}'
                scatter = 'reduce-scatter' if 'reduce-scatter' in said else None
                for fused in inner.values():
                    add(fused, inner, times, name, scatter)
        return found

    def _read(self, computation: Computation, name: str, of_result: float) -> float:
        """Bytes that a fused computation reads of the array that the instruction `name` makes.

        `of_result` is how many bytes are read of the computation's own result.
        """
        total = of_result if computation[name].root else 0
        for user in computation.values():
            for place, operand in enumerate(user.operands):
                if operand == name:
                    total += self._read_by(user, place, computation, of_result)
        return min(total, _bytes(computation[name]))

    def _read_by(
        self,
        instruction: Instruction,
        place: int,
        computation: Computation,
        of_result: float | None = None,
    ) -> float:
        """Bytes that one instruction reads of the operand at index `place`.

        `computation` holds the instruction. `of_result` is that of `_read`, and None outside
        fusions.
        """
        if instruction.opcode == 'bitcast':
            assert of_result is not None  # `_traffic` asks for no bitcast outside fusions
            return self._read(computation, instruction.name, of_result)
        if instruction.opcode in _SLICES and place == 0:
            return _bytes(instruction)
        if instruction.opcode == 'dynamic-update-slice' and place == 0:
            return 0  # What stays is not touched.
        inner = self._fused(instruction)
        if inner is not None:
            parameter = next(
                i.name
                for i in inner.values()
                if i.opcode == 'parameter' and i.operands == (str(place),)
            )
            outside = math.inf
            if of_result is not None:
                outside = self._read(computation, instruction.name, of_result)
            return self._read(inner, parameter, outside)
        return _bytes(computation[instruction.operands[place]])

    def _written(self, computation: Computation, name: str) -> list[int]:
        """Bytes of each result that an instruction writes."""
        instruction = computation[name]
        if instruction.opcode == 'tuple':
            return [
                size
                for operand in instruction.operands
                for size in self._written(computation, operand)
            ]
        if instruction.opcode == 'bitcast':
            return self._written(computation, instruction.operands[0])
        if instruction.opcode == 'dynamic-update-slice':
            return [_bytes(computation[instruction.operands[1]])]
        inner = self._fused(instruction)
        if inner is not None:
            return self._written(inner, next(i.name for i in inner.values() if i.root))
        return [a.bytes for a in instruction.arrays]

    def _traffic(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes that one instruction reads from memory and writes to it."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith('-done') or 'AllocateBuffer' in instruction.rest:
            return 0
        # Quotation marks may be written as \22.
        said = re.search(rf'{kernels.BYTES_ACCESSED}(?:\\22|[": ])+(\d+)', instruction.rest)
        if said:
            return int(said[1])
        operands = [computation[name] for name in instruction.operands]
        if opcode in ('copy-start', 'slice-start'):
            source = all(a.in_hbm for o in operands for a in o.arrays)
            target = instruction.arrays[-2 if opcode == 'slice-start' else 0]
            return target.bytes * (source + target.in_hbm)
        if opcode == 'async-start':
            return 0
        if opcode.endswith('-start'):
            return sum(a.bytes for a in instruction.arrays if a.in_hbm)
        in_hbm = [bool(o.arrays) and o.arrays[0].in_hbm for o in operands]
        read = sum(
            self._read_by(instruction, place, computation)
            for place, there in enumerate(in_hbm)
            if there
        )
        written = self._written(computation, instruction.name)
        results = zip(instruction.arrays, written, strict=False)
        kept = [size for array, size in results if array.in_hbm]
        # The last result of a call of cuBLAS or cuDNN is room to work in, used as far as needed.
        if _maker(instruction) in ('cuBLAS', 'cuDNN') and len(kept) > 1:
            kept.pop()
        return read + sum(kept)

    def memory_traffic(self) -> float:
        """Bytes that one device reads from its memory (HBM) and writes to it.

        They are the operands and results of each fusion and of each instruction outside fusions.
        """
        return sum(
            times * self._traffic(instruction, self.computations[name])
            for instruction, name, times in self.instructions
        )

    def kernels(self) -> dict[str, float]:
        """How many kernels one GPU starts, by the library or compiler that they are made with.

        Copies and collectives count as kernels. The conditions of loops do not: the host evaluates
        them, or the length of the loop is known.
        """
        conditions = {
            _called(instruction, 'condition')[0]
            for instruction, _, _ in self.instructions
            if instruction.opcode == 'while'
        }
        found: dict[str, float] = {}
        for instruction, name, times in self.instructions:
            opcode = instruction.opcode
            if name in conditions or opcode in _FREE or opcode.endswith('-done'):
                continue
            if opcode == 'async-start':
                continue  # What it starts is counted by itself.
            maker = _maker(instruction)
            found[maker] = found.get(maker, 0.0) + times
        return dict(sorted(found.items()))

    def arrays(self) -> list[tuple[Array, str, str]]:
        """All arrays that are ever in memory: (array, opcode, its place in the source)."""
        return [
            (array, instruction.opcode, _place(instruction))
            for instruction, _, _ in self.instructions
            for array in instruction.arrays
        ]


def _merged(shape: tuple[int, ...], axis: int) -> Iterator[tuple[int, ...]]:
    """A shape, and what it becomes where neighbours of an axis are merged with it."""
    for first in range(axis + 1):
        for end in range(axis + 1, len(shape) + 1):
            yield (*shape[:first], math.prod(shape[first:end]), *shape[end:])


def unsplit(
    program: Program,
    shapes: Collection[tuple[int, ...]],
    batch: int,
    data: int,
    fsdp: int = 1,
    tensor: int = 1,
) -> list[tuple[int, str, str, str]]:
    """Arrays that one device has of more images than its own.

    They are gathered from other devices, or computed by all alike. An array counts if its number of
    elements is that of an array of the whole batch, or of the batch split along only one of the two
    axes that split it, or if it has the shape of an array of the whole batch. Numbers and shapes
    that a device's own share has as well do not count, nor do arrays whose axes have no place for
    more rows than a device's own: some programs sum an image in parts.

    Args:
      program: of one device.
      shapes: those that arrays of the images have in the whole computation, from `costs.shapes`.
      batch: images of the global batch. It must be data·fsdp times a multiple of a prime that
        divides no size of the model, so that arrays of images can be told from others.
      data: devices along this axis of the mesh, which splits the batch.
      fsdp: devices along this axis, which splits the batch too.
      tensor: devices along this axis, which does not.

    Returns:
      (bytes, dtype and shape, opcode, source), largest first, one for each shape and source.
    """
    parts = data * fsdp
    own = batch // parts
    own_counts = {math.prod(shape) // (parts * k) for shape in shapes for k in (1, tensor)}
    larger_counts = {
        math.prod(shape) // k for shape in shapes for k in (1, data, fsdp) if k < parts
    }
    larger_counts -= own_counts
    splits = {n for n in (data, fsdp, parts) if n > 1}

    def may_have_more(shape: tuple[int, ...]) -> bool:
        """Whether an axis has rows of several devices, or one has rows and another devices."""
        rows = [n for n in shape if n and n % own == 0]
        together = any(n % (own * k) == 0 for n in rows for k in splits)
        return together or (bool(rows) and bool(splits & set(shape)))

    own_sizes = {
        sizes(merged)
        for shape in shapes
        for axis, n in enumerate(shape)
        if n % batch == 0
        for merged in _merged((*shape[:axis], n // parts, *shape[axis + 1 :]), axis)
    }
    whole_sizes = {sizes(shape) for shape in shapes} - own_sizes
    found = {}
    for array, opcode, place in program.arrays():
        # Bytes and slices belong to arrays that are seen whole elsewhere, on their way to a TPU's
        # own memory, or are room for a GPU's libraries to work in.
        if array.dtype in ('s8', 'u8') or opcode.startswith(('slice', 'async')):
            continue
        if not may_have_more(array.shape):
            continue
        if math.prod(array.shape) in larger_counts or sizes(array.shape) in whole_sizes:
            text = f'{array.dtype}[{",".join(map(str, array.shape))}]'
            found[text, place] = (array.bytes, text, opcode, place)
    return sorted(found.values(), reverse=True)
