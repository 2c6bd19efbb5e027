"""JSON of any origin: the value, or one printable line."""

import pytest

from sphere_ar_jax.runtime import console, files
from sphere_ar_jax.runtime.console import UserError


@pytest.mark.parametrize(
    'content',
    [
        b'[' * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ',
        b'',
        b'\xff\xfe\xfd',
        b'\x1b[31m',
        b'{"a": 1} x',
        b'9' * 10_000,
    ],
    ids=['brackets', 'braces', 'cut off', 'empty', 'no text', 'escapes', 'more', 'a long number'],
)
def test_what_is_no_json(tmp_path, content):
    path = tmp_path / 'a.json'
    path.write_bytes(content)
    with pytest.raises(UserError, match='is no JSON file: ') as error:
        files.read_json(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < len(str(path)) + 250


def test_what_was_written_is_read(tmp_path):
    files.write_json(tmp_path / 'a.json', {'a': [1, None, 'ü']})
    assert files.read_json(tmp_path / 'a.json') == {'a': [1, None, 'ü']}
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / 'b.json')


def test_too_large(tmp_path):
    with open(tmp_path / 'a.json', 'wb') as f:
        f.truncate(2**26 + 1)
    with pytest.raises(UserError, match='more bytes than any JSON file'):
        files.read_json(tmp_path / 'a.json')


@pytest.mark.parametrize(
    'text, shown',
    [
        ('n01440764', 'n01440764'),
        ('\x1b[31mred', r'\x1b[31mred'),
        ('two\nlines', r'two\nlines'),
        ('\u202egnp', r'\u202egnp'),
        ('\udc80', r'\udc80'),
        ('ü' * 10, 'ü' * 10),
        ('x' * 11, 'x' * 10 + '…'),
    ],
)
def test_printable(text, shown):
    assert console.printable(text, 10 if 'x' * 11 in text else 200) == shown
    assert shown.isprintable()
