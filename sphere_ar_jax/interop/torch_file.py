"""Reads PyTorch's `.pt` and `.pth` files without PyTorch and without trusting them.

Both containers are read: the zip (PyTorch ≥ 1.6) and the stream before it, which torchvision's and
other old weights still use. Each holds a pickle, which says how tensors view storages, and the
storages' raw bytes. A pickle is a program. Python's unpickler runs it here, but it knows only the
opcodes that build plain data (`_OPCODES`) and can call only what does the same (`_NAMES`). Opening
a file reads the pickle alone; a `Tensor` reads its own bytes each time it is asked for them.
Nothing is extracted, imported or executed.

The following is refused, with a message that names it:
  any other global, opcode or storage
  compressed, overlapping or doubled members of the zip
  sizes that the file does not have
  views that leave their storage or repeat it
  keys that are not scalars
  big-endian files, TorchScript archives, and the tar files of PyTorch 0.1
  nests of more than MAX_DEPTH levels, and pickles of more than MAX_STEPS or MAX_BYTES

A zip has a checksum of every member. It is verified once per storage where there is one; PyTorch
can be told to write none. The old stream has no checksums, so that flipped bits of its numbers go
unnoticed.

Dimensions:
  shape and strides of a tensor count elements, offsets of a file count bytes
"""

import argparse
import dataclasses
import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from sphere_ar_jax.runtime.console import UserError

MAX_BYTES = 2**26
MAX_STEPS = 10**6
MAX_DEPTH = 100
MAX_LARGE_KEYS = 1000
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_CHUNK = 2**24
# A stack or memo with nothing in it raises these, and so do arguments cut off or of wrong number.
_BAD = (
    LookupError,
    ValueError,
    TypeError,
    OverflowError,
    EOFError,
    struct.error,
    pickle.PickleError,
)


def _require(condition: Any, message: str) -> None:
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def _short(text: str | bytes) -> str:
    """Makes text from the file fit to be printed: in ASCII, of bounded length."""
    return ascii(text[:60])


def _read(path: str, start: int, count: int) -> np.ndarray:
    """Reads bytes start to start + count of a file, as uint8."""
    data = np.fromfile(path, np.uint8, count, offset=start)
    _require(len(data) == count, f'{path} has become shorter since it was opened')
    return data


@dataclasses.dataclass
class _Storage:
    """A run of `count` elements of one dtype in the file.

    Attributes:
      path: the file.
      key: the storage's name in the file.
      dtype: the elements' dtype.
      count: number of elements.
      start: the byte of the file where they begin.
      crc: their checksum; 0 where there is none, or once it is verified.
    """

    path: str
    key: str
    dtype: np.dtype
    count: int
    start: int = 0
    crc: int = 0

    def __str__(self) -> str:
        return f'storage {_short(self.key)}'

    @property
    def size(self) -> int:
        """The number of its bytes."""
        return self.count * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads bytes start to stop of it, and verifies all of it the first time."""
        if self.crc:
            crc = 0
            for at in range(0, self.size, _CHUNK):
                length = min(_CHUNK, self.size - at)
                crc = zlib.crc32(_read(self.path, self.start + at, length).data, crc)
            message = f'{self.path} is damaged: the checksum of {self} does not match'
            _require(crc == self.crc, message)
            self.crc = 0
        return _read(self.path, self.start + start, stop - start)


@dataclasses.dataclass(eq=False)
class Tensor:
    """A tensor that lies in a file; `read()` and `np.asarray(tensor)` give its numbers.

    It holds no numbers itself: each call reads the file again.

    Attributes:
      shape: the tensor's shape.
      dtype: its NumPy dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    _storage: _Storage = dataclasses.field(repr=False)
    _offset: int = dataclasses.field(repr=False)
    _strides: tuple[int, ...] = dataclasses.field(repr=False)

    def check(self) -> None:
        """Checks that all elements lie in the storage, and that there are no more than it has.

        Raises:
          UserError: they do not, or there are more, or the shape is impossible.
        """
        numbers = (*self.shape, *self._strides, self._offset)
        sound = (
            len(self.shape) == len(self._strides) <= 32
            and all(type(n) is int and 0 <= n < 2**64 for n in numbers)
            and math.prod(n for n in self.shape if n) < 2**48  # empty tensors are held to it too
        )
        _require(sound, 'a tensor has an impossible shape')
        storage = self._storage
        have = storage.size // self.dtype.itemsize
        _require(math.prod(self.shape) <= have, f'a tensor has more elements than its {storage}')
        _require(0 in self.shape or self._end <= have, f'a tensor reaches beyond its {storage}')

    @property
    def _end(self) -> int:
        """The place in the storage after the last element, in elements."""
        steps = zip(self.shape, self._strides, strict=True)
        return self._offset + sum((n - 1) * stride for n, stride in steps) + 1

    def read(self) -> np.ndarray:
        """Reads the numbers into a new array in C order; bfloat16 is that of ml_dtypes.

        Raises:
          UserError: the file has changed, or its checksum does not match.
          OSError: the file cannot be opened any more.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        size = self.dtype.itemsize
        data = self._storage.read(self._offset * size, self._end * size).view(self.dtype)
        # The strides of axes of length 1 mean nothing and may be any number.
        axes = zip(self.shape, self._strides, strict=True)
        strides = [stride * size if n > 1 else 0 for n, stride in axes]
        view = np.lib.stride_tricks.as_strided(data, self.shape, strides)
        return view if view.flags.c_contiguous else view.copy()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError('a tensor in a file cannot be had without a copy')
        return self.read().astype(dtype or self.dtype, copy=False)


@dataclasses.dataclass
class _Call:
    """The function that stands in for a callable name in a pickle; it builds plain data."""

    function: Callable[..., Any]


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any = False,
    hooks: Any = None,
    dtype: Any = None,
    metadata: Any = None,
) -> Tensor:
    """Stands for torch._utils._rebuild_tensor, _v2 and _v3; `Tensor.check` judges the numbers.

    The metadata of _v2 come in the place of dtype.
    """
    if not isinstance(dtype, np.dtype):
        metadata = dtype
        dtype = None
    _require(type(storage) is _Storage, 'a tensor has no storage')
    _require(type(shape) is type(strides) is tuple, 'a tensor has an impossible shape')
    _require(not metadata, 'a tensor is stored conjugated or negated, which is not supported')
    return Tensor(shape, dtype or storage.dtype, storage, offset, strides)


def _parameter(data: Any, *state: Any) -> Tensor:
    """Stands for torch._utils._rebuild_parameter and torch.nn.parameter.Parameter."""
    _require(type(data) is Tensor, 'a parameter has no tensor')
    return data


def _plain(value: Any, others: int = 0) -> Any:
    """Returns the value if it may be a key or a member of a set: a scalar, whose hash is quick.

    Args:
      value: the value.
      others: number of keys or members that are there already.
    """
    plain = type(value) in (str, bytes, int, float, bool, type(None))
    _require(plain, 'a key or a member of a set is no plain value')
    # The hash of a number is its remainder by 2⁶¹ − 1. Large numbers and fractions can be chosen so
    # that thousands of them are looked for in the same places, one after another. Small whole
    # numbers share too few places for that, and the hashes of texts have a secret in them.
    small = type(value) is not int or abs(value) < 2**60
    _require(small, 'a key or a member of a set is a huge number')
    harmless = type(value) is not float and (type(value) is not int or abs(value) < 2**20)
    message = f'a large number or a fraction is a key or a member among more than {MAX_LARGE_KEYS}'
    _require(harmless or others < MAX_LARGE_KEYS, message)
    return value


def _add(target: set[Any], items: Iterable[Any]) -> set[Any]:
    """Adds members to a set, and returns it."""
    for item in items:
        target.add(_plain(item, len(target)))
    return target


def _plain_set(items: Iterable[Any]) -> set[Any]:
    """Stands for builtins.set."""
    return _add(set(), items)


def _plain_frozenset(items: Iterable[Any]) -> frozenset[Any]:
    """Stands for builtins.frozenset."""
    return frozenset(_add(set(), items))


def _update(target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Sets items of a dictionary."""
    _require(type(target) is dict, 'something that is no dictionary is given items')
    for key, value in pairs:
        target[_plain(key, len(target))] = value


def _dictionary(pairs: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """Stands for collections.OrderedDict."""
    result: dict[Any, Any] = {}
    _update(result, pairs)
    return result


def _extend(target: Any, values: Iterable[Any]) -> None:
    """Appends values to a list."""
    _require(type(target) is list, 'something that is no list is appended to')
    target.extend(values)


def _device(*parts: Any) -> str:
    """Stands for torch.device, as in 'cuda:0'."""
    return ':'.join(str(_plain(part)) for part in parts)


def _numpy_dtype(code: Any, *rest: Any) -> np.dtype:
    """Stands for numpy.dtype."""
    _require(type(code) is str and re.fullmatch(r'[biufc]\d\d?', code), 'a NumPy dtype is unknown')
    return np.dtype(code)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    """Stands for numpy's scalar; gives Python's number."""
    _require(isinstance(dtype, np.dtype) and type(data) is bytes, 'a NumPy number is damaged')
    (value,) = np.frombuffer(data, dtype)
    return value.item()


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands for _codecs.encode, by which old pickles store bytes."""
    _require(type(text) is str, 'bytes are made of something that is no text')
    _require(encoding in ('latin1', 'latin-1'), 'bytes are in an unknown encoding')
    return text.encode('latin1')


_TYPES = {
    'Float': np.float32,
    'Double': np.float64,
    'Half': np.float16,
    'BFloat16': ml_dtypes.bfloat16,
    'Byte': np.uint8,
    'Char': np.int8,
    'Short': np.int16,
    'Int': np.int32,
    'Long': np.int64,
    'Bool': np.bool_,
    'ComplexFloat': np.complex64,
    'ComplexDouble': np.complex128,
}
_NAMES: dict[str, np.dtype | _Call] = {
    **{f'torch.{name}Storage': np.dtype(dtype) for name, dtype in _TYPES.items()},
    **{f'torch.{np.dtype(dtype).name}': np.dtype(dtype) for dtype in _TYPES.values()},
    **{f'torch.uint{bits}': np.dtype(f'uint{bits}') for bits in (16, 32, 64)},
    'torch.UntypedStorage': np.dtype(np.uint8),
    'torch.storage.UntypedStorage': np.dtype(np.uint8),
    'torch._utils._rebuild_tensor': _Call(_tensor),
    'torch._utils._rebuild_tensor_v2': _Call(_tensor),
    'torch._utils._rebuild_tensor_v3': _Call(_tensor),
    'torch._utils._rebuild_parameter': _Call(_parameter),
    'torch.nn.parameter.Parameter': _Call(_parameter),
    'torch.Size': _Call(tuple),
    'torch.device': _Call(_device),
    'collections.OrderedDict': _Call(_dictionary),
    'argparse.Namespace': _Call(argparse.Namespace),
    '_codecs.encode': _Call(_encode),
    'numpy.dtype': _Call(_numpy_dtype),
    'numpy.core.multiarray.scalar': _Call(_numpy_scalar),
    'numpy._core.multiarray.scalar': _Call(_numpy_scalar),
}
for _module in ('__builtin__', 'builtins'):  # Python 2 and 3
    _NAMES[f'{_module}.set'] = _Call(_plain_set)
    _NAMES[f'{_module}.frozenset'] = _Call(_plain_frozenset)
    _NAMES[f'{_module}.complex'] = _Call(complex)
_OPCODE_OF = {opcode.code: opcode for opcode in pickletools.opcodes}
_OPCODES = {
    'PROTO', 'FRAME', 'STOP', 'MARK', 'NONE', 'NEWTRUE', 'NEWFALSE', 'INT', 'BININT', 'BININT1',
    'BININT2', 'LONG1', 'LONG4', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8',
    'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'EMPTY_TUPLE',
    'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'EMPTY_LIST', 'APPEND', 'APPENDS', 'EMPTY_DICT',
    'SETITEM', 'SETITEMS', 'EMPTY_SET', 'ADDITEMS', 'FROZENSET', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE',
    'BINGET', 'LONG_BINGET', 'GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'NEWOBJ', 'BUILD', 'BINPERSID',
}  # fmt: skip


class _Opcodes:
    """The table in which Python's unpickler looks up the method for each opcode that it meets.

    The methods are those of `_Unpickler`. The table counts the opcodes and refuses those that no
    checkpoint needs.
    """

    def __init__(self) -> None:
        self.steps = 0

    def __getitem__(self, code: int) -> Callable[['_Unpickler'], None]:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise UserError(f'its pickle takes more than {MAX_STEPS} steps')
        opcode = _OPCODE_OF.get(chr(code))
        if opcode is None:
            raise UserError('its pickle is damaged')
        if opcode.name not in _OPCODES:
            raise UserError(f'it uses the opcode {opcode.name}, which no checkpoint needs')
        return getattr(_Unpickler, pickle._Unpickler.dispatch[code].__name__)


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, with a check before whatever calls, changes or hashes a value.

    `pickle._Unpickler` is the one written in Python, where each opcode is a method. The one in C
    hashes a dictionary's keys before they can be checked: a key of sixty nested tuples, each of
    which holds the next one twice, stops it for good, and no signal ends that.

    Attributes:
      path: the file that holds the storages.
      parts: number of parts of a storage's description; 0 where no storage may stand.
      storages: {key: storage} that the pickle has named so far.
      copied: number of elements that its calls have copied so far.
    """

    # The stack machine of `pickle._Unpickler`, which typeshed leaves out.
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: BinaryIO, path: str, parts: int = 0):
        """Prepares to read a pickle.

        Args:
          stream: stands at the start of the pickle; `load` leaves it after the end.
          path: the file that holds the storages.
          parts: number of parts of a storage's description; 0 where no storage may stand.
        """
        super().__init__(stream, encoding='latin1')
        # typeshed declares this attribute as a dictionary, and only of the class.
        self.dispatch = _Opcodes()  # type: ignore[misc, assignment]  # see above
        self.path = path
        self.parts = parts
        self.storages: dict[str, _Storage] = {}
        self.copied = 0

    def load(self) -> Any:
        value = super().load()
        _require(not self.stack and not self.metastack, 'its pickle is damaged')
        return value

    def find_class(self, module: str, name: str) -> np.dtype | _Call:
        _require(len(module) + len(name) < 200, 'it asks for a name without end')
        name = f'{module}.{name}'
        message = f'it asks for {_short(name)}, which is not among the names it may use'
        _require(name in _NAMES, message)
        return _NAMES[name]

    def persistent_load(self, description: Any) -> _Storage:
        described = type(description) is tuple and len(description) == self.parts
        _require(described, 'a storage is not described as one')
        kind, dtype, key, _, count, *view = description
        known = kind == 'storage' and isinstance(dtype, np.dtype) and type(key) is str
        _require(known, 'a storage is of unknown kind')
        storage = _Storage(self.path, key, dtype, count)
        _require(type(count) is int and count >= 0, f'{storage} has an impossible size')
        _require(not any(view), f'{storage} is a view of another, which is not supported')
        first = self.storages.setdefault(key, storage)
        _require(first == storage, f'{storage} is described twice, unlike')
        return first

    def load_stack_global(self) -> None:
        names = self.stack[-2:]
        _require(all(type(n) is str for n in names), 'it asks for a name that is no text')
        super().load_stack_global()  # type: ignore[misc]  # typeshed leaves it out

    def load_append(self) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        values = self.pop_mark()
        _extend(self.stack[-1], values)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        _update(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _update(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        _require(type(self.stack[-1]) is set, 'something that is no set is added to')
        _add(self.stack[-1], items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(_plain_frozenset(items))

    def _pop_argument(self) -> Any:
        """Takes the arguments of a call, or a state, from the stack.

        One call can copy everything that was made before it. What all of them copy is limited.
        """
        argument = self.stack.pop()
        parts = argument if type(argument) is tuple else (argument,)
        self.copied += sum(1 + len(part) if hasattr(part, '__len__') else 1 for part in parts)
        _require(self.copied <= MAX_STEPS, f'its calls copy more than {MAX_STEPS} elements')
        return argument

    def load_reduce(self) -> None:
        arguments = self._pop_argument()
        call = self.stack.pop()
        is_call = type(call) is _Call and type(arguments) is tuple
        _require(is_call, 'it calls something that is no function')
        self.append(call.function(*arguments))

    load_newobj = load_reduce

    def load_build(self) -> None:
        """Sets the attributes of a Namespace.

        Those of a dictionary (a module's version) and of a Parameter are left out.
        """
        state = self._pop_argument()
        target = self.stack[-1]
        if type(target) is argparse.Namespace:
            sound = type(state) is dict and all(type(name) is str for name in state)
            _require(sound, 'a Namespace is damaged')
            vars(target).update(state)
        elif isinstance(target, np.dtype):
            native = type(state) is tuple and len(state) > 1 and state[1] in ('<', '|', '=')
            _require(native, 'a NumPy dtype is unknown')
        else:
            known = type(target) in (dict, Tensor)
            _require(known, f'it sets the state of a {type(target).__name__}')


def _check(node: Any, seen: dict[int, int], depth: int = 0) -> int:
    """Checks that a value is plain data, and returns its height, the number of levels in it.

    Args:
      node: the value.
      seen: {id: height} of what was checked before, since a pickle can name one thing many times.
      depth: number of levels above the value.

    Raises:
      UserError: it holds something else, a view outside its storage, or a nest too deep or endless.
    """
    if id(node) not in seen:
        _require(depth < MAX_DEPTH, f'it nests more than {MAX_DEPTH} levels deep')
        if type(node) is Tensor:
            node.check()
        inner = vars(node) if type(node) is argparse.Namespace else node
        if type(inner) is dict:
            inner = inner.values()
        elif type(inner) not in (list, tuple, set, frozenset):
            plain = (Tensor, str, bytes, int, float, complex, np.dtype, type(None))
            _require(isinstance(node, plain), 'a storage or a function stands where a value should')
            _require(type(node) is not int or node.bit_length() <= 512, 'it has an endless number')
            inner = ()
        seen[id(node)] = 1 + max((_check(child, seen, depth + 1) for child in inner), default=0)
    _require(depth + seen[id(node)] <= MAX_DEPTH, f'it nests more than {MAX_DEPTH} levels deep')
    return seen[id(node)]


def _members(file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, tuple[int, int, int]]:
    """Finds a zip's members, as {name: (start, size, crc)} in bytes of the file.

    Raises:
      UserError: members are compressed, overlap or are there twice, or the zip's directory and its
        local headers disagree.
    """
    members = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = _short(info.filename)
        _require(not info.flag_bits & 1 and info.compress_type == 0, f'member {name} is compressed')
        inside = end <= info.header_offset < archive.start_dir
        _require(inside, f'member {name} overlaps another or the directory')
        file.seek(info.header_offset)
        signature, name_length, extra_length = struct.unpack('<4s22x2H', file.read(30))
        encoding = 'utf-8' if info.flag_bits & 0x800 else 'cp437'
        local_name = file.read(name_length)
        same = signature == b'PK\x03\x04' and local_name == info.orig_filename.encode(encoding)
        _require(same, f'member {name} is not where the directory says')
        start = info.header_offset + 30 + name_length + extra_length
        end = start + info.file_size
        right = info.compress_size == info.file_size and end <= archive.start_dir
        _require(right, f'member {name} does not have the size that the directory says')
        _require(info.filename not in members, f'member {name} is there twice')
        members[info.filename] = (start, info.file_size, info.CRC)
    return members


def _open_zip(path: str, file: BinaryIO) -> Any:
    """Reads the pickle of a zip file, see `open_file`."""
    with zipfile.ZipFile(file) as archive:
        members = _members(file, archive)
    pickles = [name for name in members if re.fullmatch(r'[^/]+/data\.pkl', name)]
    _require(len(pickles) == 1, 'it is a zip file, but none that PyTorch saved')
    root = pickles[0].removesuffix('data.pkl')
    script = f'{root}constants.pkl' in members
    _require(not script, 'it is a TorchScript archive: save its state_dict instead')

    def read_small(name: str) -> bytes:
        start, size, crc = members[root + name]
        _require(size <= MAX_BYTES, f'its {name} has more than {MAX_BYTES} bytes')
        data = _read(path, start, size).tobytes()
        sound = crc in (0, zlib.crc32(data))
        _require(sound, f'it is damaged: the checksum of {name} does not match')
        return data

    order = b'little'
    if f'{root}byteorder' in members:
        order = read_small('byteorder')
    message = f'its byte order is {_short(order)}: only little-endian files can be read'
    _require(order == b'little', message)
    unpickler = _Unpickler(io.BytesIO(read_small('data.pkl')), path, parts=5)
    value = unpickler.load()
    for key, storage in unpickler.storages.items():
        _require(f'{root}data/{key}' in members, f'it lacks {storage}')
        storage.start, size, storage.crc = members[f'{root}data/{key}']
        _require(size == storage.size, f'{storage} does not have the size that the pickle says')
    return value


def _open_stream(path: str, file: BinaryIO) -> Any:
    """Reads the pickles of a stream, see `open_file`."""
    stream = io.BytesIO(file.read(MAX_BYTES))
    end = os.fstat(file.fileno()).st_size
    for number in (_MAGIC, _PROTOCOL):
        _require(_Unpickler(stream, path).load() == number, 'it is no file of PyTorch')
    system = _Unpickler(stream, path).load()
    _require(type(system) is dict, 'its header is damaged')
    little = system.get('little_endian') is True
    _require(little, 'its byte order is big-endian: only little-endian files can be read')
    unpickler = _Unpickler(stream, path, parts=6)
    value = unpickler.load()
    storages = unpickler.storages
    keys = _Unpickler(stream, path).load()
    sound = type(keys) is list and all(type(key) is str for key in keys)
    _require(sound, 'its list of storages is damaged')
    same = len(keys) == len(storages) and set(keys) == set(storages)
    _require(same, 'its list of storages does not match its pickle')
    at = stream.tell()
    for key in keys:
        storage = storages[key]
        count = None
        if at + 8 <= end:
            (count,) = struct.unpack('<q', _read(path, at, 8).data)
        _require(count == storage.count, f'{storage} does not have the size that the pickle says')
        storage.start = at + 8
        at = storage.start + storage.size
        _require(at <= end, f'it is cut off within {storage}')
    _require(at == end, 'it has more bytes than its storages')
    return value


def open_file(path: str | os.PathLike[str]) -> Any:
    """Opens a `.pt` or `.pth` file; the numbers of its tensors are not read yet.

    Args:
      path: a file in either container.

    Returns:
      What was saved, with a `Tensor` for each tensor. The rest is dict (OrderedDict too), list,
      tuple (torch.Size too), set, argparse.Namespace, str, bytes, numbers (NumPy's as Python's),
      None, NumPy dtype (for torch's) and str (for torch.device).

    Raises:
      UserError: the file is refused; one line says why, see the module's docstring.
      OSError: the file cannot be opened.
    """
    path = os.fspath(path)
    with open(path, 'rb') as file:
        start = file.read(512)
        file.seek(0)
        try:
            tar = start[257:262] == b'ustar'
            _require(not tar, 'it is a tar file, of PyTorch 0.1: save it with a newer PyTorch')
            _require(start[:1] in (b'P', b'\x80'), 'it is no file of PyTorch')
            value = _open_zip(path, file) if start[:1] == b'P' else _open_stream(path, file)
            _check(value, {})
        except UserError as error:
            raise UserError(f'{path}: {error}') from None
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise UserError(f'{path}: it is a damaged zip file: {str(error)!a:.100}') from None
        except _BAD as error:
            kind = type(error).__name__
            raise UserError(f'{path}: its pickle or directory is damaged ({kind})') from None
    return value
