"""Writes PyTorch's containers byte by byte, without PyTorch: for files that it would not write,
hostile or huge.

A pickle is a list of opcodes as bytes; the names below put them together, see `pickletools`.
"""

import io
import struct
import zipfile

MAGIC = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.'
SYSTEM = b'\x80\x02}(X\x0d\x00\x00\x00little_endian\x88u.'


def text(s):
    data = s.encode()
    return b'X' + struct.pack('<I', len(data)) + data


def number(n):
    if 0 <= n < 2**31:
        return b'J' + struct.pack('<i', n)
    data = n.to_bytes(n.bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8b' + struct.pack('<i', len(data)) + data


def name(module, attribute):
    return f'c{module}\n{attribute}\n'.encode()


def tuple_(*items):
    return b'(' + b''.join(items) + b't'


def numbers(values):
    return tuple_(*map(number, values))


def storage(key, count, kind='Half'):
    """A storage's description, as the zip has it."""
    return (
        tuple_(
            text('storage'), name('torch', f'{kind}Storage'), text(key), text('cpu'), number(count)
        )
        + b'Q'
    )


def tensor(stored, shape, strides=None, offset=0):
    if strides is None:
        strides = []
        step = 1
        for n in reversed(shape):
            strides = [step, *strides]
            step *= n
    args = tuple_(stored, number(offset), numbers(shape), numbers(strides), b'\x89', b'N')
    return name('torch._utils', '_rebuild_tensor_v2') + args + b'R'


def dictionary(items):
    return b'}(' + b''.join(text(key) + value for key, value in items.items()) + b'u'


def pickle(value):
    return b'\x80\x02' + value + b'.'


def zip_file(value, storages=None, extra=None, file=None, write=zipfile.ZipFile.writestr):
    """A zip with the pickle of `value` and {key: bytes}; extra: {member: bytes} besides. Its bytes,
    or fills file.
    """
    out = file or io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        members = {'data.pkl': pickle(value), 'byteorder': b'little', 'version': b'3\n'}
        members |= {f'data/{key}': data for key, data in (storages or {}).items()} | (extra or {})
        for member, data in members.items():
            write(archive, f'archive/{member}', data)
    return None if file else out.getvalue()


def stream_file(value, storages=None):
    """The old container; storages: {key: (count, bytes)}. Descriptions of storages get their sixth
    part, None.
    """
    value = value.replace(b'tQ', b'NtQ')
    keys = b']' + b''.join(text(key) + b'a' for key in storages or {})
    data = b''.join(struct.pack('<q', count) + raw for count, raw in (storages or {}).values())
    return MAGIC + pickle(number(1001)) + SYSTEM + pickle(value) + pickle(keys) + data
