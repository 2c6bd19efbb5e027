"""How the processes of one run find each other (`jax.distributed`), by what has started them.

SLURM       srun, with more than one task
Open MPI    mpirun, with more than one process
Cloud TPU   a TPU VM or a GKE pod, whose slice may have more hosts than this one
by hand     JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=n JAX_PROCESS_ID=0 … n − 1

See `docs/devices.md`, "Many hosts".
"""

import os
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

from sphere_ar_jax.runtime import ending
from sphere_ar_jax.runtime.console import UserError

SILENCE = 40  # seconds without a heartbeat until a process counts as lost
_DAY = 24 * 3600  # seconds that a process which is done waits for the others to be done
_PATIENCE = 20  # seconds after which a process that still waits says so, and looks at the port
# How HTTP/2, and so gRPC, begins: the preface and an empty frame of settings. The other side
# answers with its own settings, a frame whose kind is the number 4.
_PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4
_BY_HAND = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def expected(environ: Mapping[str, str]) -> tuple[int | None, str]:
    """The number of processes that the environment variables speak of.

    Returns:
      (the number, the variable that says so), or (None, '') where no variable does.
    """
    if 'JAX_NUM_PROCESSES' in environ:  # What is set by hand is taken in place of all else.
        return int(environ['JAX_NUM_PROCESSES']), 'JAX_NUM_PROCESSES'
    several = ['OMPI_COMM_WORLD_SIZE']
    if 'SLURM_STEP_NODELIST' in environ:  # It is set under srun, but not in the script of a job.
        several.append('SLURM_NTASKS')
    for name in several:
        if int(environ.get(name, 1)) > 1:
            return int(environ[name]), name
    if environ.get('TPU_WORKER_HOSTNAMES'):  # It lists the hosts of one slice.
        hosts = len(environ['TPU_WORKER_HOSTNAMES'].split(','))
        return hosts * int(environ.get('MEGASCALE_NUM_SLICES', 1)), 'TPU_WORKER_HOSTNAMES'
    return None, ''


def arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`, or None for a process that is alone.

    They are empty where JAX finds everything by itself.

    Raises:
      UserError: variables that were set by hand make no sense.
    """
    if 'JAX_NUM_PROCESSES' not in environ and 'JAX_PROCESS_ID' not in environ:
        several = expected(environ)[1] in ('OMPI_COMM_WORLD_SIZE', 'SLURM_NTASKS')
        tpu = 'TPU_ML_PLATFORM' in environ  # JAX sets it on import, where it finds chips.
        return {} if several or tpu else None
    missing = [name for name in _BY_HAND if not environ.get(name)]
    if missing:
        raise UserError(f'{missing[0]} is not set, but {", ".join(_BY_HAND)} belong together')
    address, count, index = (environ[name] for name in _BY_HAND)
    if not (count.isdecimal() and index.isdecimal()):
        raise UserError('JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers')
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f'JAX_COORDINATOR_ADDRESS is {address}, but must be HOST:PORT')
    if int(index) >= int(count):
        raise UserError(f'JAX_PROCESS_ID is {index}, but must lie between 0 and {int(count) - 1}')
    return dict(coordinator_address=address, num_processes=int(count), process_id=int(index))


def _check_port(address: str) -> None:
    """Checks that this process, the first one, can listen on the port of an address HOST:PORT.

    JAX would end without a word where another program has it.

    Raises:
      UserError: it cannot.
    """
    port = int(address.rpartition(':')[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(('', port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UserError(
            f'port {port} cannot be opened ({os.strerror(error.errno or 0)}): give another one in '
            'JAX_COORDINATOR_ADDRESS to all processes'
        ) from None


def _is_foreign(address: str) -> bool:
    """Whether something listens at an address HOST:PORT that is no coordinator of JAX's."""
    host, _, port = address.rpartition(':')
    try:
        with socket.create_connection((host.strip('[]'), int(port)), _PATIENCE) as connection:
            try:
                connection.sendall(_PREFACE)
                answer = connection.recv(9, socket.MSG_WAITALL)
            except OSError:
                return True
    except OSError:
        return False  # Nobody is there yet.
    return len(answer) < 9 or answer[3] != _SETTINGS


def _say_who_is_missing(address: str | None, index: int) -> None:
    """Says that this process waits for others, and ends it where they cannot come.

    Args:
      address: HOST:PORT of the coordinator, None where only JAX knows it.
      index: the number of this process.
    """
    where = '' if address is None else f' at {address}'
    print(
        f'waiting for the other processes of this run{where}: was each of them started, once?',
        file=sys.stderr,
        flush=True,
    )
    if address is None or index == 0 or not _is_foreign(address):
        return
    print(
        f'error: another program listens at {address}: give another port in '
        'JAX_COORDINATOR_ADDRESS to all processes',
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # The main thread is inside JAX.


def join(environ: Mapping[str, str] = os.environ, timeout: int = 300) -> None:
    """Join the other processes of the run, if there are any.

    Call it before JAX is asked for its devices.

    Args:
      environ: the environment variables.
      timeout: seconds to wait for the other processes. JAX aborts this process if they do not come.

    Raises:
      UserError: `arguments` raises it, the first process cannot listen, or another number of
        processes has joined than the environment speaks of.
    """
    found = arguments(environ)
    if found is None or jax.distributed.is_initialized():
        return
    # JAX's notifier of preemptions would keep SIGTERM from this process as long as it lives.
    jax.config.update('jax_enable_preemption_service', False)
    address = found.get('coordinator_address')
    index = found.get('process_id', 0)
    if address is not None and index == 0:
        _check_port(address)
    wait = min(_PATIENCE, timeout / 2)
    late = threading.Timer(wait, _say_who_is_missing, (address, index))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=_DAY,
        )
    except ValueError as error:
        # A notebook's TPU belongs to no cluster, so that JAX finds none: its process is alone.
        if found or 'TPU_ML_PLATFORM' not in environ:
            raise UserError(f'jax.distributed: {error}') from None
    finally:
        late.cancel()
    if jax.distributed.is_initialized():
        ending.listen()
    count, name = expected(environ)
    if count is not None and count != jax.process_count():
        raise UserError(f'{jax.process_count()} process(es) joined, but {name} speaks of {count}')
