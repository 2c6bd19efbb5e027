"""How the processes of one run end together.

A process that stops for a reason of its own tells the others by `end`, and all of them end with its
exit code and its line. A process that vanishes or hangs tells nobody: JAX's coordination service
misses its heartbeats and aborts the others, with a stack trace and the exit code 128 + SIGABRT.
No process leaves before all are ready to, so that the exit codes 0 and 2 mean that none was lost.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
from typing import Any, NoReturn

import jax

# `jax.distributed` has no public access to the key-value store of its coordination service (JAX
# 0.10 and 0.11). A public client with `key_value_set` and `blocking_key_value_get` would replace
# this private import. `multihost_utils` cannot: all processes must call it at the same point.
from jax._src import distributed

_KEY = 'sphere_ar_jax/end'  # The first process to stop leaves 'CODE LINE' under this key.
_LONG = 2**31 - 1  # milliseconds, 24 days: the longest time that the store waits for a key
_leaving = threading.Lock()  # The thread that holds it ends this process, and all others wait.


def _client() -> Any:
    """The client of the run's key-value store."""
    client = distributed.global_state.client
    assert client is not None  # `joining.join` comes first.
    return client


def _shut_down() -> None:
    """Leave the run as soon as all other processes do. This process aborts if one is lost."""
    try:
        jax.distributed.shutdown()
    except Exception as error:
        print(error, file=sys.stderr)
        os.abort()  # JAX has mostly aborted the process already.


def _wait_for_the_first() -> None:
    """Wait until a process stops, then end this one too, whatever its other threads wait for."""
    try:
        code, line = _client().blocking_key_value_get(_KEY, _LONG).split(' ', 1)
    except jax.errors.JaxRuntimeError:
        return  # The run is over, or the first process is lost.
    with _leaving:
        try:
            sys.stdout.flush()
            print(line, file=sys.stderr, flush=True)
            _shut_down()
        finally:
            os._exit(int(code))


_listener = threading.Thread(target=_wait_for_the_first, daemon=True)


def _wait_for_the_last() -> None:
    """Wait at the end of this process until all others have come to theirs, and leave the run."""
    with _leaving:
        _shut_down()
    _listener.join()  # Python must not end while a thread is inside JAX.


def listen() -> None:
    """Make this process end when another one says so, and otherwise no sooner than all others."""
    _listener.start()
    atexit.register(_wait_for_the_last)


def tell(code: int, line: str) -> None:
    """Tells all other processes of the run to end. The first one that tells it counts.

    Args:
      code: their exit code.
      line: what they print. The name of this process precedes it.
    """
    if not jax.distributed.is_initialized():
        return
    run = distributed.global_state
    name = f'process {run.process_id} of {run.num_processes} ({socket.gethostname()})'
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another process has been faster.
        _client().key_value_set(_KEY, f'{code} {name}: {line}')


def end(code: int, line: str, details: str = '') -> NoReturn:
    """End this process, and those that it has joined, with an exit code and a line on stderr.

    Where several processes call it at the same time, the code and the line of the first one count.

    Args:
      code: the exit code.
      line: what every process prints. Where several have joined, the name of this one precedes it.
      details: what this process alone prints before the line, such as a traceback.
    """
    with _leaving:
        sys.stderr.write(details)
        if not jax.distributed.is_initialized():
            print(line, file=sys.stderr)
            sys.exit(code)
        # Another Ctrl-C would end this process and leave the others waiting.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        tell(code, line)
    _listener.join()  # It ends this process, too.
    os.abort()  # The listener has heard nothing, since the first process is lost.
