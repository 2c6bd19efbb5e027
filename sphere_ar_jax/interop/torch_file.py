"""Reads PyTorch's `.pt` and `.pth` files without PyTorch and without trusting them.

Both containers are read: the zip (PyTorch ≥ 1.6) and the stream before it, which torchvision's and other old weights
still use. Each holds a pickle, which says how tensors view storages, and the storages' raw bytes. The pickle is a
program; here it is interpreted, not run: `_interpret` knows the opcodes that build plain data, and `_NAMES` is all that
they can call, none of which does more than make plain data. Opening a file reads the pickle alone; a `Tensor` reads its
own bytes each time it is asked for them. Nothing is extracted, imported or executed.

Refused, each by name: any other global, opcode or storage; compressed, overlapping or doubled members of the zip; sizes
that the file does not have; views that leave their storage or repeat it; big-endian files, TorchScript archives,
the tar files of PyTorch 0.1, nests of more than MAX_DEPTH and pickles of more than MAX_STEPS or MAX_BYTES.

A zip has a checksum of every member. It is verified where there is one (PyTorch can be told to write none), once per
storage. The old stream has none: flipped bits of its numbers go unnoticed.

Dimensions:
  shape and strides of a tensor count elements, offsets of a file bytes
"""

import argparse
import io
import math
import os
import pickletools
import re
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np

MAX_BYTES, MAX_STEPS, MAX_DEPTH = 2**26, 10**6, 100
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_CHUNK = 2**24


class FileError(ValueError):
    """A file that cannot be read as plain tensors; the message is one line."""


def _require(condition, message):
    if not condition:
        raise FileError(message)


def _read(path, start, count):
    """Bytes start to start + count of a file, as uint8."""
    data = np.fromfile(path, np.uint8, count, offset=start)
    _require(len(data) == count, f'{path} has become shorter since it was opened')
    return data


def _short(text):
    """Text from the file as it may be printed: in ASCII, of bounded length."""
    return ascii(text[:60])


class _Storage:
    """`count` elements of a dtype that lie in the file at `start`; crc is their checksum, 0 where there is none."""

    def __init__(self, path, key, dtype, count):
        self.path, self.key, self.dtype, self.count, self.start, self.crc = path, key, dtype, count, None, 0

    def read(self, start, stop):
        """Bytes start to stop of it; verifies all of it the first time."""
        if self.crc:
            crc, end = 0, self.count * self.dtype.itemsize
            for at in range(0, end, _CHUNK):
                crc = zlib.crc32(_read(self.path, self.start + at, min(_CHUNK, end - at)), crc)
            _require(
                crc == self.crc, f'{self.path} is damaged: the checksum of storage {_short(self.key)} does not match'
            )
            self.crc = 0
        return _read(self.path, self.start + start, stop - start)


class Tensor:
    """A tensor that lies in a file: `shape`, NumPy `dtype`, and its numbers by `read()` or `np.asarray(tensor)`.

    It keeps nothing: each reading opens the file anew. Raises FileError where the file has changed or its checksum does
    not match, OSError where it cannot be opened any more.
    """

    def __init__(self, storage, offset, shape, strides, dtype=None):
        self.shape, self.dtype = shape, dtype or storage.dtype
        self._storage, self._offset, self._strides = storage, offset, strides

    def __repr__(self):
        return f'Tensor(shape={self.shape}, dtype={self.dtype})'

    def check(self):
        """Raises FileError unless every element lies in the storage and there are no more of them than it has."""
        shape, strides, storage = self.shape, self._strides, self._storage
        whole = len(shape) == len(strides) <= 32
        whole = whole and all(type(n) is int and n >= 0 for n in (*shape, *strides, self._offset))
        whole = whole and math.prod(n for n in shape if n) < 2**48  # of empty ones too
        _require(whole, 'a tensor has an impossible shape')
        have = storage.count * storage.dtype.itemsize // self.dtype.itemsize
        _require(math.prod(shape) <= have, f'a tensor has more elements than its storage {_short(storage.key)}')
        _require(0 in shape or self._last < have, f'a tensor reaches beyond its storage {_short(storage.key)}')

    @property
    def _last(self):
        """Where in the storage the last element is."""
        return self._offset + sum((n - 1) * s for n, s in zip(self.shape, self._strides, strict=True))

    def read(self):
        """The numbers, in a new array in C order. bfloat16 is that of ml_dtypes."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        size = self.dtype.itemsize
        data = self._storage.read(self._offset * size, (self._last + 1) * size).view(self.dtype)
        # strides of axes of length 1 mean nothing and may be any number
        strides = [s * size if n > 1 else 0 for n, s in zip(self.shape, self._strides, strict=True)]
        view = np.lib.stride_tricks.as_strided(data, self.shape, strides)
        return view if view.flags.c_contiguous else view.copy()

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError('a tensor in a file cannot be had without a copy')
        return self.read().astype(dtype or self.dtype, copy=False)


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, dtype=None, metadata=None):
    """torch._utils._rebuild_tensor, _v2 (its metadata comes in the place of dtype) and _v3."""
    if not isinstance(dtype, np.dtype):
        dtype, metadata = None, dtype
    _require(type(storage) is _Storage, 'a tensor has no storage')
    _require(type(shape) is tuple is type(strides), 'a tensor has an impossible shape')
    _require(not metadata, 'a tensor is stored conjugated or negated, which is not supported')
    return Tensor(storage, offset, shape, strides, dtype)


def _parameter(data, *state):
    _require(type(data) is Tensor, 'a parameter has no tensor')
    return data


def _plain(value):
    """A scalar, fit for a key or a member of a set: hashing it calls nothing and is quick."""
    _require(type(value) in (str, bytes, int, float, bool, type(None)), 'a key or a member of a set is no plain value')
    return value


def _update(target, pairs):
    _require(type(target) is dict, 'something that is no dictionary is given items')
    target.update((_plain(key), value) for key, value in pairs)


def _dictionary(pairs=()):
    result = {}
    _update(result, pairs)
    return result


def _numpy_dtype(code, *rest):
    _require(type(code) is str and re.fullmatch(r'[biufc]\d{1,2}', code), 'a NumPy dtype is unknown')
    return np.dtype(code)


def _numpy_scalar(dtype, data):
    _require(isinstance(dtype, np.dtype) and type(data) is bytes, 'a NumPy number is damaged')
    (value,) = np.frombuffer(data, dtype)
    return value.item()


def _encode(text, encoding):
    _require(type(text) is str and encoding in ('latin1', 'latin-1'), 'bytes are in an unknown encoding')
    return text.encode('latin1')


def _complex(real, imaginary):
    _require(type(real) is float is type(imaginary), 'a complex number is damaged')
    return complex(real, imaginary)


class _Call:
    """Something in a pickle's name that builds plain data."""

    def __init__(self, function):
        self.function = function


_TYPES = dict(
    Float=np.float32, Double=np.float64, Half=np.float16, BFloat16=ml_dtypes.bfloat16, Byte=np.uint8, Char=np.int8,
    Short=np.int16, Int=np.int32, Long=np.int64, Bool=np.bool_, ComplexFloat=np.complex64, ComplexDouble=np.complex128,
)  # fmt: skip
_NAMES = {
    **{f'torch {name}Storage': np.dtype(dtype) for name, dtype in _TYPES.items()},
    **{f'torch {np.dtype(dtype).name}': np.dtype(dtype) for dtype in _TYPES.values()},
    **{f'torch uint{bits}': np.dtype(f'uint{bits}') for bits in (16, 32, 64)},
    'torch UntypedStorage': np.dtype(np.uint8),
    'torch.storage UntypedStorage': np.dtype(np.uint8),
    'torch._utils _rebuild_tensor': _Call(lambda *args: _tensor(*args[:4])),
    'torch._utils _rebuild_tensor_v2': _Call(_tensor),
    'torch._utils _rebuild_tensor_v3': _Call(_tensor),
    'torch._utils _rebuild_parameter': _Call(_parameter),
    'torch.nn.parameter Parameter': _Call(_parameter),
    'torch Size': _Call(tuple),
    'torch device': _Call(lambda *parts: ':'.join(map(str, map(_plain, parts)))),
    'collections OrderedDict': _Call(_dictionary),
    'argparse Namespace': _Call(argparse.Namespace),
    '_codecs encode': _Call(_encode),
    'numpy dtype': _Call(_numpy_dtype),
}
for _module in ('__builtin__', 'builtins'):
    _NAMES[f'{_module} set'] = _Call(lambda items: set(map(_plain, items)))
    _NAMES[f'{_module} frozenset'] = _Call(lambda items: frozenset(map(_plain, items)))
    _NAMES[f'{_module} complex'] = _Call(_complex)
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    _NAMES[f'{_module} scalar'] = _Call(_numpy_scalar)


def _find(name):
    _require(name in _NAMES, f'it asks for {_short(name.replace(" ", "."))}, which is not among the names it may use')
    return _NAMES[name]


def _call(call, args):
    _require(type(call) is _Call and type(args) is tuple, 'it calls something that is no function')
    return call.function(*args)


def _build(target, state):
    """Sets the attributes of a Namespace. Those of a dictionary (a module's version) and a Parameter are left out."""
    if type(target) is argparse.Namespace:
        _require(type(state) is dict and all(type(name) is str for name in state), 'a Namespace is damaged')
        vars(target).update(state)
    elif isinstance(target, np.dtype):
        _require(type(state) is tuple and len(state) > 1 and state[1] in ('<', '|', '='), 'a NumPy dtype is unknown')
    else:
        _require(type(target) in (dict, Tensor), f'it sets the state of a {type(target).__name__}')


_VALUES = {
    *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE'),
    *('BINUNICODE8', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple, 'EMPTY_SET': set}
_MARKED = {'TUPLE', 'FROZENSET', 'APPENDS', 'ADDITEMS', 'SETITEMS'}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_OTHERS = {
    'MARK', 'STOP', 'PROTO', 'FRAME', 'APPEND', 'SETITEM', 'PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE', 'GET', 'BINGET',
    'LONG_BINGET', 'GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'NEWOBJ', 'BUILD', 'BINPERSID',
}  # fmt: skip
_OPCODES = {opcode.code.encode('latin-1'): opcode for opcode in pickletools.opcodes}
_KNOWN = _VALUES | _OTHERS | _MARKED | {*_CONSTANTS, *_EMPTY, *_TUPLES}


def _steps(stream):
    """The pickle's opcodes up to STOP and their arguments, not more than MAX_STEPS. Of an opcode that is refused the
    argument is not even decoded."""
    for _ in range(MAX_STEPS):
        code = stream.read(1)
        _require(code in _OPCODES, 'its pickle is damaged')
        name, argument = _OPCODES[code].name, _OPCODES[code].arg
        _require(name in _KNOWN, f'it uses the opcode {name}, which no checkpoint needs')
        yield name, argument and argument.reader(stream)
        if name == 'STOP':
            return
    raise FileError(f'its pickle takes more than {MAX_STEPS} steps')


def _weight(args):
    """Elements and characters in the arguments of a call."""
    return sum(1 + len(a) if hasattr(a, '__len__') else 1 for a in (args if type(args) is tuple else (args,)))


def _interpret(stream, persistent=None):
    """The value of one pickle; leaves the stream after it. persistent: makes a storage of its description."""
    stack, below, memo, copied = [], [], {}, 0
    for name, argument in _steps(stream):
        if name in _MARKED:
            items, stack = stack, below.pop()
        match name:
            case _ if name in _VALUES:
                _require(type(argument) is not int or argument.bit_length() <= 512, 'it has an endless number')
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case _ if name in _TUPLES:
                stack.append(tuple([stack.pop() for _ in range(_TUPLES[name])][::-1]))
            case 'MARK':
                below.append(stack)
                stack = []
            case 'TUPLE' | 'FROZENSET':
                stack.append(tuple(items) if name == 'TUPLE' else frozenset(map(_plain, items)))
            case 'APPEND' | 'APPENDS':
                items = items if name == 'APPENDS' else [stack.pop()]
                _require(type(stack[-1]) is list, 'something that is no list is appended to')
                stack[-1].extend(items)
            case 'ADDITEMS':
                _require(type(stack[-1]) is set, 'something that is no set is added to')
                stack[-1].update(map(_plain, items))
            case 'SETITEM' | 'SETITEMS':
                items = items if name == 'SETITEMS' else [stack.pop(-2), stack.pop()]
                _update(stack[-1], zip(items[::2], items[1::2], strict=True))
            case 'PUT' | 'BINPUT' | 'LONG_BINPUT':
                memo[argument] = stack[-1]
            case 'MEMOIZE':
                memo[len(memo)] = stack[-1]
            case 'GET' | 'BINGET' | 'LONG_BINGET':
                stack.append(memo[argument])
            case 'GLOBAL':
                stack.append(_find(argument))
            case 'STACK_GLOBAL':
                attribute, module = stack.pop(), stack.pop()
                _require(type(attribute) is str is type(module), 'it asks for a name that is no text')
                _require(len(attribute) + len(module) < 200, 'it asks for a name without end')
                stack.append(_find(f'{module} {attribute}'))
            case 'REDUCE' | 'NEWOBJ' | 'BUILD':
                args = stack.pop()
                copied += _weight(args)  # one opcode can copy all that was made before: limited in all, like opcodes
                _require(copied <= MAX_STEPS, f'its calls copy more than {MAX_STEPS} elements')
                if name == 'BUILD':
                    _build(stack[-1], args)
                else:
                    stack.append(_call(stack.pop(), args))
            case 'BINPERSID':
                _require(persistent, 'a storage stands where none may')
                stack.append(persistent(stack.pop()))
    (value,) = stack
    _require(not below, 'its pickle is damaged')
    return value


def _check(node, seen, depth=0):
    """Raises FileError for what is no plain data, views outside their storage and nests too deep, or endless.

    seen: {id: height} of what was checked before, since a pickle can name one thing many times. Returns the height.
    """
    if id(node) not in seen:
        _require(depth < MAX_DEPTH, f'it nests more than {MAX_DEPTH} levels deep')
        if type(node) is Tensor:
            node.check()
        if type(node) in (dict, argparse.Namespace):
            inner = (node if type(node) is dict else vars(node)).values()
        elif type(node) in (list, tuple, set, frozenset):
            inner = node
        else:
            plain = isinstance(node, Tensor | str | bytes | int | float | complex | np.dtype) or node is None
            _require(plain, 'a storage or a function stands where a value should')
            inner = ()
        seen[id(node)] = 1 + max((_check(child, seen, depth + 1) for child in inner), default=0)
    _require(depth + seen[id(node)] <= MAX_DEPTH, f'it nests more than {MAX_DEPTH} levels deep')
    return seen[id(node)]


def _object(stream, path, length):
    """The object pickle of either container: its value, not yet checked, and its storages by key."""
    storages = {}

    def persistent(description):
        _require(type(description) is tuple and len(description) == length, 'a storage is not described as one')
        kind, dtype, key, _, count, *view = description
        _require(kind == 'storage' and isinstance(dtype, np.dtype) and type(key) is str, 'a storage is of unknown kind')
        _require(type(count) is int and count >= 0, f'storage {_short(key)} has an impossible size')
        _require(not any(view), f'storage {_short(key)} is a view of another, which is not supported')
        storage = storages.setdefault(key, _Storage(path, key, dtype, count))
        _require((storage.dtype, storage.count) == (dtype, count), f'storage {_short(key)} is described twice, unlike')
        return storage

    return _interpret(stream, persistent), storages


def _members(file, archive):
    """{name: (start, size, crc)} of a zip's members, after its own claims were checked against each other."""
    members, end = {}, 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        _require(not info.flag_bits & 1 and info.compress_type == 0, f'member {_short(info.filename)} is compressed')
        inside = end <= info.header_offset < archive.start_dir
        _require(inside, f'member {_short(info.filename)} overlaps another or the directory')
        file.seek(info.header_offset)
        header = file.read(30)
        signature, name_length, extra_length = struct.unpack('<4s22x2H', header)
        encoding = 'utf-8' if info.flag_bits & 0x800 else 'cp437'
        same = signature == b'PK\x03\x04' and file.read(name_length) == info.orig_filename.encode(encoding)
        _require(same, f'member {_short(info.filename)} is not where the directory says')
        start = info.header_offset + 30 + name_length + extra_length
        end = start + info.file_size
        _require(
            info.compress_size == info.file_size and end <= archive.start_dir,
            f'member {_short(info.filename)} does not have the size that the directory says',
        )
        _require(info.filename not in members, f'member {_short(info.filename)} is there twice')
        members[info.filename] = start, info.file_size, info.CRC
    return members


def _open_zip(path, file):
    with zipfile.ZipFile(file) as archive:
        members = _members(file, archive)
    roots = [name.removesuffix('data.pkl') for name in members if re.fullmatch(r'[^/]+/data\.pkl', name)]
    _require(len(roots) == 1, 'it is a zip file, but none that PyTorch saved')
    (root,) = roots
    _require(f'{root}constants.pkl' not in members, 'it is a TorchScript archive: save its state_dict instead')

    def small(name):
        start, size, crc = members[root + name]
        _require(size <= MAX_BYTES, f'its {name} has more than {MAX_BYTES} bytes')
        data = _read(path, start, size).tobytes()
        _require(crc in (0, zlib.crc32(data)), f'it is damaged: the checksum of {name} does not match')
        return data

    order = small('byteorder') if f'{root}byteorder' in members else b'little'
    _require(order == b'little', f'its byte order is {_short(order)}: only little-endian files can be read')
    value, storages = _object(io.BytesIO(small('data.pkl')), path, 5)
    for key, storage in storages.items():
        _require(f'{root}data/{key}' in members, f'it lacks storage {_short(key)}')
        storage.start, size, storage.crc = members[f'{root}data/{key}']
        right = size == storage.count * storage.dtype.itemsize
        _require(right, f'storage {_short(key)} does not have the size that the pickle says')
    return value


def _open_stream(path, file):
    stream, end = io.BytesIO(file.read(MAX_BYTES)), os.fstat(file.fileno()).st_size
    _require(_interpret(stream) == _MAGIC and _interpret(stream) == _PROTOCOL, 'it is no file of PyTorch')
    system = _interpret(stream)
    _require(type(system) is dict, 'its header is damaged')
    _require(system.get('little_endian') is True, 'its byte order is big-endian: only little-endian files can be read')
    value, storages = _object(stream, path, 6)
    keys = _interpret(stream)
    _require(type(keys) is list and all(type(key) is str for key in keys), 'its list of storages is damaged')
    _require(sorted(keys) == sorted(storages), 'its list of storages does not match its pickle')
    at = stream.tell()
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack('<q', _read(path, at, 8)) if at + 8 <= end else (None,)
        _require(count == storage.count, f'storage {_short(key)} does not have the size that the pickle says')
        storage.start, at = at + 8, at + 8 + count * storage.dtype.itemsize
        _require(at <= end, f'it is cut off within storage {_short(key)}')
    _require(at == end, 'it has more bytes than its storages')
    return value


def open_file(path):
    """The contents of a `.pt` or `.pth` file, with a `Tensor` for each tensor; their numbers are not read yet.

    Args:
      path: of a file in either container.
    Returns:
      what was saved, in dict (OrderedDict too), list, tuple (torch.Size too), set, argparse.Namespace, str, bytes,
      numbers (NumPy's as Python's), None, NumPy dtype (for torch's) and str (for torch.device).
    Raises:
      FileError: with the reason in one line, see the module's docstring. OSError: the file cannot be opened.
    """
    path = os.fspath(path)
    with open(path, 'rb') as file:
        start = file.read(512)
        file.seek(0)
        try:
            _require(start[257:262] != b'ustar', 'it is a tar file, of PyTorch 0.1: save it again with a newer PyTorch')
            _require(start[:1] in (b'P', b'\x80'), 'it is no file of PyTorch')
            value = (_open_zip if start[:1] == b'P' else _open_stream)(path, file)
            _check(value, {})
        except FileError as error:
            raise FileError(f'{path}: {error}') from None
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise FileError(f'{path}: it is a damaged zip file: {str(error)!a:.100}') from None
        except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
            # what remains: a stack or memo with nothing in it, arguments cut off or of wrong number
            raise FileError(f'{path}: its pickle or directory is damaged ({type(error).__name__})') from None
    return value
