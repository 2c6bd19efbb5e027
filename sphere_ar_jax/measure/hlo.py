"""Reads a compiled program: what it sends between devices, what memory traffic it makes, and which arrays it holds.

The text is XLA's after all optimizations, for one device: `compiled.as_text()`. An instruction of a loop's body counts
as often as the loop runs; of the branches of a conditional the mean is taken. Bytes are those of the layout, tiles
filled up.

  program   computations, one of them the entry; each a list of instructions
  fusion    several instructions that run as one: what is between them is never in memory
"""

import collections
import functools
import math
import re
from typing import NamedTuple

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all')
# Take no time and touch no memory.
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id',
    'while', 'conditional', 'call', 'opt-barrier', 'add-dependency', 'async-update',
}  # fmt: skip
_SLICES = 'dynamic-slice', 'slice', 'gather'


class Array(NamedTuple):
    """dtype, shape, bytes as laid out, and whether it lies in HBM (on TPUs some lie in the chip's own memory)."""

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
        for axis, size in zip(order.split(','), reversed(tile.split(',')), strict=False):  # the minor axis is first
            padded[int(axis)] = -(-padded[int(axis)] // int(size)) * int(size)
    return Array(dtype, shape, math.prod(padded) * bits // 8, not re.search(r'S\([1-9]', layout or ''))


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
    arrays = tuple(_array(*found) for found in re.findall(r'(\w+)\[([\d,]*)\](\{[^}]*\})?', rest[:end]))
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
    return {'all-reduce': 2 * share * bytes_in, 'all-gather': share * bytes_out}.get(kind, share * bytes_in)


def _place(instruction):
    """Where an instruction comes from in the program's source."""
    return (re.search(r'op_name="([^"]*)"', instruction.rest) or ['', instruction.name])[1]


def sizes(shape):
    """The sizes above 1 of a shape, whatever their order."""
    return tuple(sorted(n for n in shape if n > 1))


class Program:
    """A compiled program.

    Args:
      text: of `compiled.as_text()`. lengths: how often a loop runs whose length is data, by the number of loops that it
        is nested in; once where nothing is given. Such loops are counted in `open_loops`.
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
        self._times = collections.Counter()  # how often each computation runs, those within fusions apart
        self._visit(self.entry, 1.0, 0)

    def _length(self, loop):
        """How often a loop's body runs, from its condition i < constant with i counted up by one; None where the text
        does not say."""
        if known := re.search(r'known_trip_count\D+(\d+)', loop.rest):
            return int(known[1])
        condition = self.computations[re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]]
        root = next(i for i in condition.values() if i.root)
        if root.opcode == 'fusion':  # CPUs
            inner = self.computations[re.search(r'calls=%?([\w.\-]+)', root.rest)[1]]
            outside = [condition[name] for name in root.operands]
            constants = [i for i in (*outside, *inner.values()) if i.opcode == 'constant']
            compare = [i for i in inner.values() if i.opcode == 'compare']
        else:
            constants = [condition[name] for name in root.operands if name in condition]
            constants = [i for i in constants if i.opcode == 'constant']
            compare = [root]
        if len(compare) == 1 and compare[0].opcode == 'compare' and 'direction=LT' in compare[0].rest and constants:
            value = constants[0].operands[0]
            return int(value) if value.isdigit() else None
        return None

    def _visit(self, name, times, depth):
        """Adds to `_times` what a computation that runs so many times runs. depth: how many loops it is in."""
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
                names = re.findall(r'[\w.\-]+', branches[1]) if branches else called('(?:true|false)_computation')
                for branch in names:
                    self._visit(branch, times / len(names), depth)
            elif instruction.opcode == 'call' or instruction.opcode == 'async-start':
                for inner in called('to_apply') + called('calls'):
                    self._visit(inner, times, depth)

    @functools.cached_property
    def instructions(self):
        """[(instruction, its computation's name, how often it runs)] of all that are not within a fusion."""
        return [(i, name, times) for name, times in self._times.items() for i in self.computations[name].values()]

    def _fused(self, instruction):
        called = re.search(r'calls=%?([\w.\-]+)', instruction.rest) if instruction.opcode == 'fusion' else None
        return called and self.computations[called[1]]

    @functools.cached_property
    def _collectives(self):
        """[(instruction, its computation, kind, how often it runs)] of all collectives, each once.

        An all-reduce of which every device keeps its part alone is a reduce-scatter, whatever XLA calls it. One that
        runs beside other work stands in several fusions, under one channel.
        """
        found, seen = [], set()

        def add(i, computation, times, place, kind=None):
            opcode, channel = i.opcode.removesuffix('-start'), re.search(r'channel_id=(\d+)', i.rest)
            if opcode in COLLECTIVES and not (channel and (place, channel[1]) in seen):
                seen.add((place, channel and channel[1]))
                found.append((i, computation, kind or opcode, times))

        for i, name, times in self.instructions:
            add(i, self.computations[name], times, name)
            if (inner := self._fused(i)) is not None:
                scatter = 'reduce-scatter' if 'reduce-scatter' in f'{i.name} {i.rest[:200]}' else None
                for fused in inner.values():
                    add(fused, inner, times, name, scatter)
        return found

    def collectives(self):
        """{kind: `Traffic`} of one device."""
        found = collections.defaultdict(lambda: Traffic(0, 0))
        for i, computation, kind, times in self._collectives:
            before = sum(a.bytes for name in i.operands if name in computation for a in computation[name].arrays)
            after = sum(a.bytes for a in i.arrays) - (before if i.opcode.endswith('-start') else 0)
            sent = times * _sent(kind, before, after, _group_size(i, self.devices))
            found[kind] = Traffic(found[kind].count + times, found[kind].sent + sent)
        return dict(found)

    def gathered(self):
        """[(`Array`, where it comes from in the program's source)] of what all-gathers make."""
        return [(i.arrays[-1], _place(i)) for i, _, kind, _ in self._collectives if kind == 'all-gather']

    def _read(self, computation, name):
        """Bytes that a fused computation reads of one of its parameters (or of what that is a bitcast of)."""
        total, whole = 0, sum(a.bytes for a in computation[name].arrays)
        for user in computation.values():
            if name not in user.operands:
                continue
            if user.opcode == 'bitcast':
                total += self._read(computation, user.name)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += sum(a.bytes for a in user.arrays)
            elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
                total += 0  # what stays is not touched
            elif (inner := self._fused(user)) is not None:
                for place, operand in enumerate(user.operands):
                    if operand == name:
                        parameter = _parameter(inner, place)
                        total += self._read(inner, parameter)
                        total += self._read(computation, user.name) if _is_root(inner, parameter) else 0
            else:
                total += whole
        return min(total, whole)

    def _written(self, computation, name):
        """Bytes of each result that a fused computation writes."""
        i = computation[name]
        if i.opcode == 'tuple':
            return [size for operand in i.operands for size in self._written(computation, operand)]
        if i.opcode == 'bitcast':
            return self._written(computation, i.operands[0])
        if i.opcode == 'dynamic-update-slice':
            return [sum(a.bytes for a in computation[i.operands[1]].arrays)]
        if (inner := self._fused(i)) is not None:
            return self._written(inner, next(j.name for j in inner.values() if j.root))
        return [a.bytes for a in i.arrays]

    def _traffic(self, i, computation):
        """Bytes that one instruction reads from memory and writes to it."""
        operands = [computation[name] for name in i.operands if name in computation]
        if i.opcode in _FREE or i.opcode.endswith('-done') or 'AllocateBuffer' in i.rest:
            return 0
        if i.opcode in ('copy-start', 'slice-start'):
            source = all(a.in_hbm for o in operands for a in o.arrays)
            target = i.arrays[-2] if i.opcode == 'slice-start' else i.arrays[0]
            return target.bytes * (source + target.in_hbm)
        if i.opcode.endswith('-start'):
            return 0 if i.opcode == 'async-start' else sum(a.bytes for a in i.arrays if a.in_hbm)
        inner = self._fused(i)
        if inner is not None:
            names = [_parameter(inner, place) for place in range(len(operands))]
            whole = [sum(a.bytes for a in o.arrays) for o in operands]
            read = [
                n if _is_root(inner, name) else self._read(inner, name) for n, name in zip(whole, names, strict=True)
            ]
            written = self._written(inner, next(j.name for j in inner.values() if j.root))
        elif i.opcode in _SLICES:
            read, written = [sum(a.bytes for a in i.arrays)], [a.bytes for a in i.arrays]
        elif i.opcode == 'dynamic-update-slice':
            update = sum(a.bytes for a in operands[1].arrays)
            read, written = [0, update], [update]
        else:
            read, written = [sum(a.bytes for a in o.arrays) for o in operands], [a.bytes for a in i.arrays]
        in_hbm = lambda o: bool(o.arrays) and o.arrays[0].in_hbm
        return sum(n for o, n in zip(operands, read, strict=False) if in_hbm(o)) + sum(
            n for a, n in zip(i.arrays, written, strict=False) if a.in_hbm
        )

    def memory_traffic(self):
        """Bytes that one device reads from its memory (HBM) and writes to it: operands and results of each fusion."""
        return sum(times * self._traffic(i, self.computations[name]) for i, name, times in self.instructions)

    def arrays(self):
        """[(`Array`, opcode, where it comes from in the program's source)] of all arrays that are ever in memory."""
        return [(a, i.opcode, _place(i)) for i, _, _ in self.instructions for a in i.arrays]


def _parameter(computation, place):
    """The name of a computation's parameter of that number."""
    return next(i.name for i in computation.values() if i.opcode == 'parameter' and i.operands == (str(place),))


def _is_root(computation, name):
    """Whether a computation's result is that instruction, or a bitcast of it."""
    if computation[name].root:
        return True
    users = [user for user in computation.values() if user.opcode == 'bitcast' and name in user.operands]
    return any(_is_root(computation, user.name) for user in users)


def unsplit(program, shapes, batch, data, fsdp=1, tensor=1):
    """Arrays that one device has of more images than its own: gathered from others, or computed by all alike.

    Args:
      program: `Program` of one device. shapes: those that the images have in the whole computation, as `costs.shapes`
        has them, whose arrays are to be looked for. batch: images of the global batch; it must be a multiple of a prime
        that no size of the model is a multiple of, times data·fsdp, so that arrays of images can be told from others.
        data, fsdp, tensor: devices along the axes of the mesh; the batch is split along the first two.
    Returns:
      [(bytes, dtype and shape, opcode, source)], largest first, one for each shape and source. An array is found by its
      number of elements, or its shape, where that is the one of a whole batch (or a part of it along one axis alone)
      and of no device's own share.
    """
    parts = data * fsdp
    own = batch // parts
    count = lambda shape, k: math.prod(shape) // k
    mine = {count(shape, parts * k) for shape in shapes for k in (1, tensor)}
    larger = {count(shape, k) for shape in shapes for k in (1, data, fsdp) if k < parts} - mine
    split = lambda shape: [
        sizes((*shape[:i], n // parts, *shape[i + 1 :])) for i, n in enumerate(shape) if n % batch == 0
    ]
    whole = {sizes(shape) for shape in shapes} - {s for shape in shapes for s in split(shape)}
    found = {}
    for a, opcode, place in program.arrays():
        # bytes and slices are of arrays that are seen whole elsewhere, on their way to a TPU's own memory
        if a.dtype == 's8' or opcode.startswith(('slice', 'async')):
            continue
        if any(n and n % own == 0 for n in a.shape) and (count(a.shape, 1) in larger or sizes(a.shape) in whole):
            text = f'{a.dtype}[{",".join(map(str, a.shape))}]'
            found[text, place] = (a.bytes, text, opcode, place)
    return sorted(found.values(), reverse=True)
