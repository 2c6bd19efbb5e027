"""Reads a compiled program: what it sends between devices, what memory traffic it makes, and which
arrays it holds.

The text is XLA's after all optimizations, for one device: `compiled.as_text()`. An instruction of a
loop's body counts as often as the loop runs; of the branches of a conditional the mean is taken.
Bytes are those of the layout, tiles filled up.

  program   computations, one of them the entry; each a list of instructions
  fusion    several instructions that run as one: what is between them is never in memory
"""

import collections
import math
import re
from typing import NamedTuple

COLLECTIVES = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
    'ragged-all-to-all',
)
# Take no time and touch no memory.
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id',
    'while', 'conditional', 'call', 'opt-barrier', 'add-dependency', 'async-update',
}  # fmt: skip
_SLICES = 'dynamic-slice', 'slice', 'gather'


class Array(NamedTuple):
    """dtype, shape, bytes as laid out, and whether it lies in HBM (on TPUs some lie in the chip's
    own memory).
    """

    dtype: str
    shape: tuple
    bytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    """name, opcode; arrays: its results; operands: names, of a constant or
    parameter its value or number; rest: the text of its attributes; root: whether it is its
    computation's result."""

    name: str
    opcode: str
    arrays: tuple
    operands: tuple
    rest: str
    root: bool


class Traffic(NamedTuple):
    """A kind of collective: how often it runs, and the bytes that each device sends for it."""

    count: float
    sent: float


def _array(dtype, dims, layout):
    shape = tuple(int(n) for n in dims.split(',') if n)
    bits = 8 if dtype == 'pred' else int((re.search(r'\d+', dtype) or ['0'])[0])
    padded = list(shape)
    order, tile = re.match(r'\{([\d,]*)(?::.*?T\(([\d,]+)\))?', layout or '{').groups()
    if tile and order:
        for axis, size in zip(
            order.split(','), reversed(tile.split(',')), strict=False
        ):  # the minor axis is first
            padded[int(axis)] = -(-padded[int(axis)] // int(size)) * int(size)
    return Array(
        dtype, shape, math.prod(padded) * bits // 8, not re.search(r'S\([1-9]', layout or '')
    )


def _closing(text):
    """The index of the parenthesis that closes the one at 0."""
    depth = 0
    for match in re.finditer(r'[()]', text):
        depth += 1 if match[0] == '(' else -1
        if not depth:
            return match.start()
    raise ValueError(f'no program: {text[:80]}')


def _instruction(line):
    match = re.match(r'\s+(ROOT )?%?([\w.\-]+) = (.*)', line)
    if not match:
        return None
    root, name, rest = match.groups()
    end = _closing(rest) + 1 if rest.startswith('(') else rest.index(' ')
    arrays = tuple(
        _array(*found) for found in re.findall(r'(\w+)\[([\d,]*)\](\{[^}]*\})?', rest[:end])
    )
    opcode, rest = re.match(r'\s*([\w\-]+)(.*)', rest[end:]).groups()
    end = _closing(rest)
    literal = opcode in ('constant', 'parameter')
    operands = (rest[1:end],) if literal else tuple(re.findall(r'%([\w.\-]+)', rest[:end]))
    return Instruction(name, opcode, arrays, operands, rest[end:], bool(root))


def _group_size(instruction, devices):
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


def _sent(kind, bytes_in, bytes_out, n):
    """Bytes that each of n devices sends by the ring algorithms."""
    if kind == 'collective-permute':
        return bytes_in
    share = (n - 1) / n
    return {'all-reduce': 2 * share * bytes_in, 'all-gather': share * bytes_out}.get(
        kind, share * bytes_in
    )


def _bytes(instruction):
    """Bytes of all results of an instruction."""
    return sum(a.bytes for a in instruction.arrays)


def _place(instruction):
    """Where an instruction comes from in the program's source."""
    return (re.search(r'op_name="([^"]*)"', instruction.rest) or ['', instruction.name])[1]


def sizes(shape):
    """The sizes above 1 of a shape, whatever their order."""
    return tuple(sorted(n for n in shape if n > 1))


class Program:
    """A compiled program.

    Args:
      text: of `compiled.as_text()`. lengths: how often a loop runs whose length is data, by the
        number of loops that it is nested in; once where nothing is given. Such loops are counted in
        `open_loops`.
    """

    def __init__(self, text, lengths=()):
        self.computations, self.entry, self.open_loops, self._lengths = {}, None, 0, lengths
        self.devices = int((re.search(r'num_partitions=(\d+)', text[:100_000]) or [0, 1])[1])
        current = None
        for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
            if header := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif current is not None and (instruction := _instruction(line)):
                current[instruction.name] = instruction
        if self.entry is None:
            raise ValueError('no program: it has no entry')
        self._times = (
            collections.Counter()
        )  # how often each computation runs, those within fusions apart
        self._visit(self.entry, 1.0, 0)
        # (instruction, its computation's name, how often it runs) of all that are not within a fusion
        self.instructions = [
            (i, n, times) for n, times in self._times.items() for i in self.computations[n].values()
        ]

    def _length(self, loop):
        """How often a loop's body runs, from its condition i < constant with i counted up by one;
        None where the text does not say.
        """
        if known := re.search(r'known_trip_count\D+(\d+)', loop.rest):
            return int(known[1])
        condition = self.computations[re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]]
        root = next(i for i in condition.values() if i.root)
        inside = (self._fused(root) or {}).values()  # on CPUs
        compare = [i for i in (root, *inside) if i.opcode == 'compare']
        constants = [
            i.operands[0] for i in (*condition.values(), *inside) if i.opcode == 'constant'
        ]
        if (
            len(compare) == len(constants) == 1
            and 'direction=LT' in compare[0].rest
            and constants[0].isdigit()
        ):
            return int(constants[0])
        return None

    def _visit(self, name, times, depth):
        """Adds to `_times` what a computation that runs so many times runs. depth: how many loops
        it is in.
        """
        self._times[name] += times
        for instruction in self.computations[name].values():
            called = lambda key, rest=instruction.rest: re.findall(rf'\b{key}=%?([\w.\-]+)', rest)
            if instruction.opcode == 'while':
                length = self._length(instruction)
                if length is None:
                    self.open_loops += 1
                    length = self._lengths[depth] if depth < len(self._lengths) else 1
                self._visit(called('body')[0], times * length, depth + 1)
                self._visit(called('condition')[0], times * (length + 1), depth + 1)
            elif instruction.opcode == 'conditional':
                branches = re.search(r'branch_computations=\{(.*?)\}', instruction.rest)
                names = (
                    re.findall(r'[\w.\-]+', branches[1])
                    if branches
                    else called('(?:true|false)_computation')
                )
                for branch in names:
                    self._visit(branch, times / len(names), depth)
            elif instruction.opcode == 'call' or instruction.opcode == 'async-start':
                for inner in called('to_apply') + called('calls'):
                    self._visit(inner, times, depth)

    def _fused(self, instruction):
        called = (
            re.search(r'calls=%?([\w.\-]+)', instruction.rest)
            if instruction.opcode == 'fusion'
            else None
        )
        return called and self.computations[called[1]]

    def collectives(self):
        """{kind: `Traffic`} of one device.

        An all-reduce of which every device keeps its part alone is a reduce-scatter, whatever XLA
        calls it. One that runs beside other work stands in several fusions, under one channel, and
        counts once.
        """
        found, seen = collections.defaultdict(lambda: Traffic(0, 0)), set()

        def add(i, computation, times, place, kind=None):
            opcode, channel = (
                i.opcode.removesuffix('-start'),
                re.search(r'channel_id=(\d+)', i.rest),
            )
            if opcode not in COLLECTIVES or (channel and (place, channel[1]) in seen):
                return
            seen.add((place, channel and channel[1]))
            before = sum(_bytes(computation[name]) for name in i.operands)
            after = _bytes(i) - (before if i.opcode.endswith('-start') else 0)
            sent = times * _sent(kind or opcode, before, after, _group_size(i, self.devices))
            count, total = found[kind or opcode]
            found[kind or opcode] = Traffic(count + times, total + sent)

        for i, name, times in self.instructions:
            add(i, self.computations[name], times, name)
            if (inner := self._fused(i)) is not None:
                scatter = (
                    'reduce-scatter' if 'reduce-scatter' in f'{i.name} {i.rest[:200]}' else None
                )
                for fused in inner.values():
                    add(fused, inner, times, name, scatter)
        return dict(found)

    def _read(self, computation, name, of_result):
        """Bytes that a fused computation reads of one of its arrays. of_result: what is read of its
        result.
        """
        total = of_result if computation[name].root else 0
        for user in computation.values():
            for place, operand in enumerate(user.operands):
                total += (
                    self._read_by(user, place, computation, of_result) if operand == name else 0
                )
        return min(total, _bytes(computation[name]))

    def _read_by(self, i, place, computation, of_result=None):
        """Bytes that one instruction reads of its operand at a place. of_result: see `_read`; None
        outside fusions.
        """
        if i.opcode == 'bitcast':
            return self._read(computation, i.name, of_result)
        if i.opcode in _SLICES and place == 0:
            return _bytes(i)
        if i.opcode == 'dynamic-update-slice' and place == 0:
            return 0  # what stays is not touched
        if (inner := self._fused(i)) is not None:
            parameter = next(
                j.name
                for j in inner.values()
                if j.opcode == 'parameter' and j.operands == (str(place),)
            )
            outside = math.inf if of_result is None else self._read(computation, i.name, of_result)
            return self._read(inner, parameter, outside)
        return _bytes(computation[i.operands[place]])

    def _written(self, computation, name):
        """Bytes of each result that an instruction writes."""
        i = computation[name]
        if i.opcode == 'tuple':
            return [size for operand in i.operands for size in self._written(computation, operand)]
        if i.opcode == 'bitcast':
            return self._written(computation, i.operands[0])
        if i.opcode == 'dynamic-update-slice':
            return [_bytes(computation[i.operands[1]])]
        if (inner := self._fused(i)) is not None:
            return self._written(inner, next(j.name for j in inner.values() if j.root))
        return [a.bytes for a in i.arrays]

    def _traffic(self, i, computation):
        """Bytes that one instruction reads from memory and writes to it."""
        if i.opcode in _FREE or i.opcode.endswith('-done') or 'AllocateBuffer' in i.rest:
            return 0
        operands = [computation[name] for name in i.operands]
        if i.opcode in ('copy-start', 'slice-start'):
            source = all(a.in_hbm for o in operands for a in o.arrays)
            target = i.arrays[-2] if i.opcode == 'slice-start' else i.arrays[0]
            return target.bytes * (source + target.in_hbm)
        if i.opcode.endswith('-start'):
            return 0 if i.opcode == 'async-start' else sum(a.bytes for a in i.arrays if a.in_hbm)
        in_hbm = [bool(o.arrays) and o.arrays[0].in_hbm for o in operands]
        read = sum(
            self._read_by(i, place, computation) for place, there in enumerate(in_hbm) if there
        )
        written = self._written(computation, i.name)
        return read + sum(n for a, n in zip(i.arrays, written, strict=False) if a.in_hbm)

    def memory_traffic(self):
        """Bytes that one device reads from its memory (HBM) and writes to it: operands and results
        of each fusion.
        """
        return sum(
            times * self._traffic(i, self.computations[name])
            for i, name, times in self.instructions
        )

    def arrays(self):
        """[(`Array`, opcode, where it comes from in the program's source)] of all arrays that are
        ever in memory.
        """
        return [(a, i.opcode, _place(i)) for i, _, _ in self.instructions for a in i.arrays]


def unsplit(program, shapes, batch, data, fsdp=1, tensor=1):
    """Arrays that one device has of more images than its own: gathered from others, or computed by
    all alike.

    Args:
      program: `Program` of one device. shapes: those that the images have in the whole computation,
        as `costs.shapes` has them, whose arrays are to be looked for. batch: images of the global
        batch; it must be a multiple of a prime that no size of the model is a multiple of, times
        data·fsdp, so that arrays of images can be told from others. data, fsdp, tensor: devices
        along the axes of the mesh; the batch is split along the first two.
    Returns:
      [(bytes, dtype and shape, opcode, source)], largest first, one for each shape and source. An
        array is found by its
      number of elements, or its shape, where that is the one of a whole batch (or a part of it
        along one axis alone)
      and of no device's own share.
    """
    parts = data * fsdp
    own = batch // parts
    count = lambda shape, k: math.prod(shape) // k
    mine = {count(shape, parts * k) for shape in shapes for k in (1, tensor)}
    larger = {count(shape, k) for shape in shapes for k in (1, data, fsdp) if k < parts} - mine
    split = lambda shape: [
        sizes((*shape[:i], n // parts, *shape[i + 1 :]))
        for i, n in enumerate(shape)
        if n % batch == 0
    ]
    whole = {sizes(shape) for shape in shapes} - {s for shape in shapes for s in split(shape)}
    found = {}
    for a, opcode, place in program.arrays():
        # bytes and slices are of arrays that are seen whole elsewhere, on their way to a TPU's own
        # memory
        if a.dtype == 's8' or opcode.startswith(('slice', 'async')):
            continue
        if any(n and n % own == 0 for n in a.shape) and (
            count(a.shape, 1) in larger or sizes(a.shape) in whole
        ):
            text = f'{a.dtype}[{",".join(map(str, a.shape))}]'
            found[text, place] = (a.bytes, text, opcode, place)
    return sorted(found.values(), reverse=True)
