"""The port of the coordinator, which another program may have."""

import contextlib
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

from sphere_ar_jax.runtime import joining
from sphere_ar_jax.runtime.console import UserError

ROOT = pathlib.Path(__file__).parents[2]


def _environ(address, index=0):
    return {
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': str(index),
    }


@contextlib.contextmanager
def _listening(answer):
    """A server on a free port of this machine; `answer` gets each connection."""
    with socket.create_server(('127.0.0.1', 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    answer(server.accept()[0])

        threading.Thread(target=serve, daemon=True).start()
        yield f'127.0.0.1:{server.getsockname()[1]}'


def _close(connection):
    connection.close()


def _web(connection):
    connection.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')
    connection.close()


kept = []  # connections that a server leaves open without a word


def test_a_port_that_is_taken_is_one_line():
    with _listening(_close) as address:
        port = address.split(':')[1]
        with pytest.raises(UserError, match=f'^port {port} cannot be opened .*in use.*: give'):
            joining.join(_environ(address))


@pytest.mark.parametrize('address', ['localhost', 'localhost:x', ':1', 'localhost:0', 'a:99999'])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(UserError, match=f'^JAX_COORDINATOR_ADDRESS is {address}, but must be HOST'):
        joining.arguments(_environ(address))


@pytest.mark.parametrize('answer', [_close, _web, kept.append])
def test_another_program_at_the_port_is_noticed(monkeypatch, capsys, answer):
    """The processes that wait for the first one end, too."""
    codes = []
    monkeypatch.setattr(joining.os, '_exit', codes.append)
    monkeypatch.setattr(joining, '_PATIENCE', 0.5)
    with _listening(answer) as address:
        joining._say_who_is_missing(address, 1)
        joining._say_who_is_missing(address, 0)
    said = capsys.readouterr().err.splitlines()
    assert codes == [2]
    assert said[1].startswith(f'error: another program listens at {address}: give another port')
    assert [line.split(':')[0] for line in said[::2]] == [
        'waiting for the other processes of this run at 127.0.0.1'
    ] * 2


def test_nobody_at_the_port_is_not_another_program(monkeypatch, capsys):
    monkeypatch.setattr(joining.os, '_exit', lambda code: pytest.fail('it ended'))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        joining._say_who_is_missing(f'127.0.0.1:{free.getsockname()[1]}', 1)
    joining._say_who_is_missing(None, 1)
    assert capsys.readouterr().err.count('\n') == 2


COORDINATOR = """
import socket, jax
from sphere_ar_jax.runtime import joining
with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
jax.distributed.initialize(address, 1, 0)
print(joining._is_foreign(address))
"""


def test_jax_s_coordinator_is_not_another_program():
    done = subprocess.run(
        [sys.executable, '-c', COORDINATOR], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == 'False\n', done.stderr
