"""Reads mutated and hostile files under watch: `python -m tests.fuzz_torch_file COUNT SEED
DIRECTORY`, as JSON.

Every file must be read right or refused with UserError in one line: within 5 s of CPU time, within
ROOM bytes of address space more than at the start (the largest files here have 1 MB), without an
event of Python's audit hooks that imports, executes, starts, writes or connects.
"""

import io
import itertools
import json
import os
import pathlib
import pickletools
import random
import re
import resource
import signal
import struct
import sys
import warnings
import zipfile

import numpy as np

from sphere_ar_jax.interop import torch_file
from sphere_ar_jax.runtime.console import UserError
from tests import torch_writer as w

ROOM = 2**28
GOLDENS = pathlib.Path(__file__).parent / 'goldens'
ONE = w.tensor(w.storage('0', 4), (2, 2))
HALF = w.name('torch', 'HalfStorage')


def call(module, attribute, *args, code=b'R'):
    return w.name(module, attribute) + w.tuple_(*args) + code


def stored(count=b'J\x04\x00\x00\x00', key=None, kind=HALF, pid=None):
    return w.tuple_(pid or w.text('storage'), kind, key or w.text('0'), w.text('cpu'), count) + b'Q'


def view(shape, strides, offset=0):
    return w.tensor(w.storage('0', 4), shape, strides, offset)


# a tuple of two, each a tuple of two, each …: 2⁶⁰ in all, but sixty in memory
SPACE = call('argparse', 'Namespace', code=b'\x81')
COPIES = b']q\x01(%be'
BOMB = b')' + b''.join(b'q%ch%c\x86' % (i, i) for i in range(60))
# {what: (pickled value, part of the refusal)}; none of them may be read. Storage 0 has 4 elements.
HOSTILE = {
    'system': (call('os', 'system', w.text('touch /tmp/x')), r"asks for 'os\.system'"),
    'posix': (call('posix', 'system', w.text('touch /tmp/x')), r"asks for 'posix\.system'"),
    'eval': (call('builtins', 'eval', w.text('1')), r"asks for 'builtins\.eval'"),
    'exec in Python 2': (call('__builtin__', 'exec', w.text('1')), r"asks for '__builtin__\.exec'"),
    'getattr': (call('builtins', 'getattr', b'N', w.text('x')), r"asks for 'builtins\.getattr'"),
    'import': (
        call('importlib', 'import_module', w.text('os')),
        r"asks for 'importlib\.import_module'",
    ),
    'popen': (
        call('subprocess', 'Popen', w.text('x'), code=b'\x81'),
        r"asks for 'subprocess\.Popen'",
    ),
    'dotted': (
        b'\x8c\x05torch\x8c\x12serialization.load\x93',
        r"asks for 'torch\.serialization\.load'",
    ),
    'dotted beyond': (
        b'\x8c\x08argparse\x8c\x10Namespace.__init\x93',
        r"asks for 'argparse\.Namespace\.__init'",
    ),
    'name of no text': (b'K\x01K\x02\x93', 'asks for a name that is no text'),
    'numpy array': (
        call('numpy._core.multiarray', '_reconstruct', b'N'),
        r"'numpy\._core\.multiarray\._recon",
    ),
    'new with keywords': (w.name('argparse', 'Namespace') + b')}\x92', 'opcode NEWOBJ_EX'),
    'instance': (b'(ios\nsystem\n', 'opcode INST'),
    'object': (b'(' + w.name('argparse', 'Namespace') + b'o', 'opcode OBJ'),
    'extension': (b'\x82\x01', 'opcode EXT1'),
    'extensions': (b'\x84\x01\x00\x00\x00', 'opcode EXT4'),
    'text id': (b'Pstorage\n', 'opcode PERSID'),
    'text in escapes': (b'V\\u0041\n', 'opcode UNICODE'),
    'text index': (b'Np0\n', 'opcode PUT'),
    'value twice': (b'N2\x86', 'opcode DUP'),
    'huge bytearray': (b'\x96' + struct.pack('<Q', 2**62), 'opcode BYTEARRAY8'),
    'huge frame': (b'\x95' + b'\xff' * 8 + b'N', 'damaged'),
    'huge memo': (b'Nr\xff\xff\xff\xffN', 'damaged'),
    'out of band': (b'\x97', 'opcode NEXT_BUFFER'),
    'call of text': (w.text('os.system') + b')R', 'calls something that is no function'),
    'call of a dtype': (HALF + b'(K\x05tR', 'calls something that is no function'),
    'call of a tensor': (ONE + b')R', 'calls something that is no function'),
    'call with a list': (w.name('torch', 'Size') + b']R', 'calls something that is no function'),
    'state of a function': (w.name('argparse', 'Namespace') + b'}b', 'sets the state of a _Call'),
    'slots of a function': (
        w.name('argparse', 'Namespace') + b'N}\x86b',
        'sets the state of a _Call',
    ),
    'new with a list': (
        w.name('argparse', 'Namespace') + b']\x81',
        'calls something that is no function',
    ),
    'state of a list': (b']}b', 'sets the state of a list'),
    'state of a storage': (w.storage('0', 4) + b'}b', 'sets the state of a _Storage'),
    'state in slots': (SPACE + b'}}\x86b', 'a Namespace is damaged'),
    'state of numbers': (SPACE + b'}(K\x01K\x02ub', 'a Namespace is damaged'),
    'function left over': (w.name('torch', 'Size'), 'a storage or a function stands'),
    'storage left over': (w.storage('0', 4), 'a storage or a function stands'),
    'append to a dict': (b'}K\x01a', 'no list is appended to'),
    'items of a list': (b'](K\x01K\x02u', 'no dictionary is given items'),
    'add to a list': (b'](K\x01\x90', 'no set is added to'),
    'key that is a bomb': (b'}' + BOMB + b'Ns', 'is no plain value'),
    'member that is a bomb': (b'(' + BOMB + b'\x91', 'is no plain value'),
    'key that is a tuple': (b'}))\x86Ns', 'is no plain value'),
    'member that is a tuple': (b'()\x91', 'is no plain value'),
    'device that is a bomb': (call('torch', 'device', BOMB), 'is no plain value'),
    'huge key': (b'}' + w.number(2**61) + b'Ns', 'a huge number'),
    'many keys that collide': (
        b'}(' + b''.join(w.number(i * (2**61 - 1)) + b'N' for i in range(40_000)) + b'u',
        'a huge number',
    ),
    'many keys whose last bits are 0': (
        b'}(' + b''.join(w.number(i << 40) + b'N' for i in range(100_000)) + b'u',
        'among more than 1000',
    ),
    'many members whose last bits are 0': (
        b'(' + b''.join(w.number(i << 32) for i in range(1, 100_000)) + b'\x91',
        'among more than 1000',
    ),
    'negative huge key': (b'}' + w.number(-(2**61)) + b'Ns', 'a huge number'),
    'many keys that are fractions': (
        b'}(' + b''.join(b'G' + struct.pack('>d', i / 2**40) + b'N' for i in range(100_000)) + b'u',
        'among more than 1000',
    ),
    'many members that are fractions': (
        b'(' + b''.join(b'G' + struct.pack('>d', i / 2**40) for i in range(100_000)) + b'\x91',
        'among more than 1000',
    ),
    'dtype that is a bomb': (call('numpy', 'dtype', BOMB), 'NumPy dtype is unknown'),
    'dtype of objects': (call('numpy', 'dtype', w.text('O8')), 'NumPy dtype is unknown'),
    'big-endian number': (
        call('numpy', 'dtype', w.text('f8')) + b'(K\x03U\x01>tb',
        'NumPy dtype is unknown',
    ),
    'number cut off': (
        call('numpy.core.multiarray', 'scalar', call('numpy', 'dtype', w.text('f8')), b'C\x03abc'),
        'damaged',
    ),
    'deep lists': (b']' * 200 + b'a' * 199, 'nests more than 100 levels'),
    'deep tuples': (b')' + b'\x85' * 5000, 'nests more than 100 levels'),
    'list within itself': (b']q\x00h\x00a', 'nests more than 100 levels'),
    'many steps': (b']' + b'Na' * 600_000, 'takes more than 1000000 steps'),
    'many sets': (b'\x8f' * 1_100_000, 'takes more than 1000000 steps'),
    'many copies': (
        b'](' + b'N' * 300_000 + b'eq\x00' + COPIES % (call('torch', 'Size', b'h\x00') * 200),
        'copy more',
    ),
    'many copies of nothings': (
        b'(' + b')' * 300_000 + b'tq\x00' + COPIES % (b'}h\x00b' * 200),
        'copy more',
    ),
    'many copies of text': (
        w.text('x' * 300_000)
        + b'q\x00'
        + COPIES % (call('_codecs', 'encode', b'h\x00', w.text('latin1')) * 200),
        'copy more',
    ),
    'many states': (
        w.dictionary({str(i): b'N' for i in range(90_000)})
        + b'q\x00'
        + COPIES % ((SPACE + b'h\x00b') * 200),
        'copy more',
    ),
    'endless name': (w.text('x' * 10_000) + w.text('y') + b'\x93', 'a name without end'),
    'endless number': (
        b'\x8b' + struct.pack('<i', 100_000) + b'\x7f' * 100_000,
        'an endless number',
    ),
    'endless number in text': (b'I0x' + b'f' * 10_000 + b'\n', '(an endless number|damaged)'),
    'long text': (b'X\xff\xff\xff\x7fabc', 'damaged'),
    'longer text': (b'\x8d' + b'\xff' * 7 + b'\x7fabc', 'damaged'),
    'long bytes': (b'B\xff\xff\xff\xffabc', 'damaged'),
    'long number': (b'\x8b\xff\xff\xff\x7fabc', 'damaged'),
    'negative length': (b'\x8b\xff\xff\xff\xffabc', 'damaged'),
    'nothing on the stack': (b'a', 'damaged'),
    'no mark': (b't', 'damaged'),
    'no memo': (b'h\x07', 'damaged'),
    'odd items': (b'}(K\x01u', 'damaged'),
    'two values': (b'NN', 'damaged'),
    'open mark': (b'(N', 'damaged'),
    'unknown opcode': (b'\xf0', 'damaged'),
    'huge shape': (view((2**40, 2**40), (0, 0)), 'impossible shape'),
    'repeated': (view((5,), (0,)), 'has more elements than its storage'),
    'overlapping': (view((3, 3), (1, 0)), 'has more elements than its storage'),
    'long stride': (view((2,), (4,)), 'reaches beyond its storage'),
    'huge stride': (view((2,), (2**62,)), 'reaches beyond its storage'),
    'offset': (view((2,), (1,), 3), 'reaches beyond its storage'),
    'huge offset': (view((1,), (1,), 2**63), 'reaches beyond its storage'),
    'empty and huge': (view((0, 2**50), (1, 1)), 'impossible shape'),
    'strides too few': (view((2, 2), (1,)), 'impossible shape'),
    'many axes': (view((1,) * 40, (1,) * 40), 'impossible shape'),
    'negative shape': (
        ONE.replace(w.numbers((2, 2)), b'(J\xff\xff\xff\xffK\x02t'),
        'impossible shape',
    ),
    'negative stride': (
        ONE.replace(w.numbers((2, 1)), b'(J\xff\xff\xff\xffK\x01t'),
        'impossible shape',
    ),
    'negative offset': (ONE.replace(w.number(0), b'J\xff\xff\xff\xff', 1), 'impossible shape'),
    'shape of floats': (
        ONE.replace(w.numbers((2, 2)), b'(G@\x00\x00\x00\x00\x00\x00\x00K\x02t'),
        'impossible shape',
    ),
    'shape of truth': (ONE.replace(w.numbers((2, 2)), b'(\x88K\x02t'), 'impossible shape'),
    'shape of a list': (ONE.replace(w.numbers((2, 2)), b']'), 'impossible shape'),
    'conjugated': (ONE[:-2] + b'}(X\x04\x00\x00\x00conj\x88utR', 'conjugated or negated'),
    'tensor of text': (
        call('torch._utils', '_rebuild_tensor_v2', w.text('x'), b'K\x00', b')', b')'),
        'has no storage',
    ),
    'parameter of text': (call('torch._utils', '_rebuild_parameter', w.text('x')), 'has no tensor'),
    'storage of bytes': (stored(pid=b'C\x07storage'), 'of unknown kind'),
    'module': (stored(pid=w.text('module')), 'of unknown kind'),
    'storage of no dtype': (stored(kind=w.text('HalfStorage')), 'of unknown kind'),
    'storage of no key': (stored(key=b'N'), 'of unknown kind'),
    'storage of -1': (stored(count=b'J\xff\xff\xff\xff'), 'has an impossible size'),
    'storage of other size': (w.tensor(w.storage('0', 5), (2,)), 'does not have the size'),
    'huge storage': (w.tensor(stored(count=w.number(2**62)), (2,)), 'does not have the size'),
    'storage as two dtypes': (
        b']' + ONE + b'a' + w.tensor(w.storage('0', 4, 'Float'), (1,)) + b'a',
        'described twice',
    ),
    'storage that is not there': (
        w.tensor(w.storage('9', 4), (2,)),
        "(lacks storage|does not match)",
    ),
    'storage outside': (
        w.tensor(w.storage('../data.pkl', 4), (2,)),
        "(lacks storage|does not match)",
    ),
}  # fmt: skip


def hostile_file(what, container):
    """container: `w.zip_file` or `w.stream_file`. Storage 0 is in it where the pickle has storages
    at all.
    """
    value = HOSTILE[what][0]
    data = b'ABCDEFGH' if container is w.zip_file else (4, b'ABCDEFGH')
    return container(value, {'0': data} if b'tQ' in value else {})


def tensors_in(tree):
    """[(name, Tensor)] of a tree, each object visited once."""
    found = []
    todo = [('', tree)]
    seen = set()
    while todo:
        name, node = todo.pop()
        if isinstance(node, torch_file.Tensor):
            found.append((name, node))
        if id(node) in seen or isinstance(node, str | bytes):
            continue
        seen.add(id(node))
        node = vars(node) if type(node).__name__ == 'Namespace' else node
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list | tuple)
            else ()
        )
        todo += [(f'{name}/{key}', value) for key, value in items]
    return sorted(found, key=lambda pair: pair[0])


def contents(path):
    """{name: (dtype, shape, bytes)}; more bytes than the file has are an error."""
    tensors = tensors_in(torch_file.open_file(path))
    found = {name: (str(t.dtype), t.shape, np.asarray(t).tobytes()) for name, t in tensors}
    assert all(len(data) <= os.path.getsize(path) for _, _, data in found.values())
    return found


def small_tree():
    """A pickle with tensors of three dtypes, strides, a shared storage, an empty one and a
    Namespace.
    """
    items = {
        'a': w.tensor(w.storage('0', 6, 'Float'), (2, 3), (1, 2)),
        'b': w.tensor(w.storage('0', 6, 'Float'), (2,), (1,), 3),
        'c': w.tensor(w.storage('1', 5), ()),
        'd': w.tensor(w.storage('2', 0, 'Long'), (0, 3)),
        'args': SPACE
        + w.dictionary({'n': b'K\x07', 'x': b'G?\xf0\x00\x00\x00\x00\x00\x00'})
        + b'b',
        'state': call('collections', 'OrderedDict') + w.dictionary({'_metadata': b'}'}) + b'b',
    }
    return w.dictionary(items), {'0': (6, bytes(range(24))), '1': (5, b'0123456789'), '2': (0, b'')}


def bytes_mutated(rng, data):
    """Cut off, or a few bits or bytes flipped, put in, left out or doubled."""
    data = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data))
        length = rng.choice((1, 2, 4, 8, 40))
        if kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 3:
            data[at:at] = rng.randbytes(length)
        elif kind == 4:
            del data[at : at + length]
        else:
            data[at:at] = data[at : at + length]
        data = data or bytearray(1)
    return bytes(data)


def directory_mutated(rng, data):
    """Fields of the zip's local headers, directory or its end are set to others: sizes, offsets,
    names, methods.
    """
    data = bytearray(data)
    fields = {
        b'PK\x03\x04': (
            (4, 2),
            (6, 2),
            (8, 2),
            (14, 4),
            (18, 4),
            (22, 4),
            (26, 2),
            (28, 2),
            (30, 4),
        ),
        b'PK\x01\x02': (
            (8, 2),
            (10, 2),
            (16, 4),
            (20, 4),
            (24, 4),
            (28, 2),
            (30, 2),
            (32, 2),
            (42, 4),
            (46, 4),
            (54, 4),
        ),
        b'PK\x05\x06': ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    }
    for _ in range(rng.choice((1, 1, 2, 3))):
        signature = rng.choice(list(fields))
        at = rng.choice([match.start() for match in re.finditer(re.escape(signature), data)])
        offset, size = rng.choice(fields[signature])
        old = int.from_bytes(data[at + offset : at + offset + size], 'little')
        new = rng.choice(
            (
                0,
                1,
                old + 1,
                old - 1,
                2 * old,
                old + 64,
                2 ** (8 * size) - 1,
                2 ** (8 * size - 1),
                rng.getrandbits(31),
            )
        )
        data[at + offset : at + offset + size] = (new % 2 ** (8 * size)).to_bytes(size, 'little')
    return bytes(data)


def members_mutated(rng, data):
    """The zip is written again with members doubled, renamed, compressed, left out or exchanged."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    out = io.BytesIO()
    method = zipfile.ZIP_STORED
    at = rng.randrange(len(members))
    other = rng.randrange(len(members))
    name, content = members[at]
    kind = rng.randrange(6)
    if kind == 0:
        members.insert(other, (name, rng.choice((content, b'', rng.randbytes(9)))))
    elif kind == 1:
        tricks = (
            '../' + name,
            '/' + name,
            name.replace('/', '//'),
            name.upper(),
            name + '/',
            'x/' + name,
            '.',
            'archive',
        )
        members[at] = rng.choice(tricks), content
    elif kind == 2:
        method = zipfile.ZIP_DEFLATED
    elif kind == 3:
        del members[at]
    elif kind == 4:
        members[at] = name, members[other][1]
    else:
        members.append(
            (
                rng.choice(
                    ('archive/constants.pkl', 'other/data.pkl', 'archive/data/7', '../../x')
                ),
                b'x',
            )
        )
    with zipfile.ZipFile(out, 'w', method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def pickle_mutated(rng, value):
    """Opcodes left out, doubled, exchanged or replaced, hostile ones put between."""
    ends = [pos for _, _, pos in pickletools.genops(w.pickle(value))]
    parts = [w.pickle(value)[a:b] for a, b in itertools.pairwise(ends[1:])]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(parts))
        other = rng.randrange(len(parts))
        kind = rng.randrange(6)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            parts.insert(at, parts[other])
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            numbers = [-1, 0, 1, 3, 5, 255, 2**31 - 1]
            parts[at] = rng.choice(
                (
                    b'J' + struct.pack('<i', rng.choice(numbers)),
                    w.number(2 ** rng.randrange(31, 90)),
                )
            )
        elif kind == 4:
            what = rng.choice([name for name in HOSTILE if not name.startswith('many')])
            parts.insert(
                at, HOSTILE[what][0] + rng.choice((b'', b'0', b'R', b'b', b'\x81', b'a', b's'))
            )
        else:
            parts.insert(at, bytes([rng.randrange(256)]))
    return b''.join(parts)


class Watch:
    """Notes what Python reports to its audit hooks while `on`."""

    def __init__(self):
        self.on = False
        self.events = []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.on:
            return
        writes = event == 'open' and (
            args[1] not in ('r', 'rb', None) or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        )
        bad = (
            'exec',
            'compile',
            'import',
            'os.',
            'subprocess',
            'socket',
            'shutil',
            'ctypes',
            'marshal',
            'pickle',
            'code',
        )
        if writes or event.startswith(bad):
            self.events.append(f'{event} {args!r:.80}')


class HangError(BaseException):
    """A file took too long."""


def hang(*_):
    raise HangError


def attempt(path, watch):
    """('read', contents), ('refused', message) or ('bad', why)."""
    signal.setitimer(signal.ITIMER_VIRTUAL, 5)
    watch.on = True
    try:
        outcome = 'read', contents(path)
    except UserError as error:
        line = str(error)
        outcome = 'refused' if '\n' not in line and len(line) < 400 else 'bad', line
    except BaseException as error:
        outcome = 'bad', repr(error)[:200]
    watch.on = False
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return outcome


def mutants(rng, count):
    """(what, file, contents that it must have, or None where others are as good)."""
    value, storages = small_tree()
    stream = w.stream_file(value, storages)
    small = w.zip_file(value, {key: data for key, (_, data) in storages.items()})
    files = {'zip': small, 'stream': stream}
    files |= {name: (GOLDENS / name).read_bytes() for name in ('torch_zip.pt', 'torch_stream.pth')}
    for i in range(count):
        kind = rng.choice(('bytes', 'bytes', 'directory', 'members', 'pickle', 'pickle'))
        if kind == 'bytes':
            name = rng.choice(('zip', 'stream')) if i % 20 else rng.choice(list(files))
            yield (
                f'bytes of {name}',
                bytes_mutated(rng, files[name]),
                name if 'zip' in name else None,
            )
        elif kind == 'pickle':
            changed = pickle_mutated(rng, value)
            raw = {key: data for key, (_, data) in storages.items()}
            data = (
                w.zip_file(changed, raw) if rng.randrange(2) else w.stream_file(changed, storages)
            )
            yield 'pickle', data, None
        else:
            change = directory_mutated if kind == 'directory' else members_mutated
            yield kind, change(rng, small), 'zip'


def main(count, seed, directory):
    path = pathlib.Path(directory) / 'mutant.pt'
    rng = random.Random(seed)
    watch = Watch()
    warnings.simplefilter('ignore')  # of zipfile, which writes what it warns of
    signal.signal(signal.SIGVTALRM, hang)
    value, storages = small_tree()
    path.write_bytes(w.zip_file(value, {key: data for key, (_, data) in storages.items()}))
    truth = {'zip': contents(path), 'torch_zip.pt': contents(GOLDENS / 'torch_zip.pt')}
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    results = {}
    bad = []
    cases = [(what, hostile_file(what, w.zip_file), 'refused') for what in HOSTILE]
    cases += [
        (what, hostile_file(what, w.stream_file), 'refused')
        for what in HOSTILE
        if not what.startswith('many')
    ]
    for what, data, want in itertools.chain(cases, mutants(rng, count)):
        path.write_bytes(data)
        outcome, found = attempt(path, watch)
        key = 'hostile' if want == 'refused' else what
        results.setdefault(key, {}).setdefault(outcome, 0)
        results[key][outcome] += 1
        wrong = outcome == 'read' and (
            want == 'refused' or (want in truth and found != truth[want])
        )
        if outcome == 'bad' or wrong:
            bad.append(f'{what}: {outcome} {str(found)[:200]}')
    print(json.dumps({'results': results, 'bad': bad, 'events': watch.events}))


if __name__ == '__main__':
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
