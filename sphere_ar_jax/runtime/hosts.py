"""Several processes as one run (`jax.distributed`): found, joined, agreeing, and ended together.

One machine needs none of it: all here does nothing, or the obvious, for a process that is alone. A run of several
processes is found by what started them:
  SLURM       srun, of more than one task
  Open MPI    mpirun, of more than one process
  Cloud TPU   a TPU VM or a GKE pod, whose slice may have more hosts than this one
  by hand     JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=n JAX_PROCESS_ID=0 … n − 1

All processes run the same program on the same arrays; what differs between them, a signal, an error, is shared here:
  an error or an end of one, said with `stop`, is told to the others, who end with the same exit code
  a process that vanished or hangs is noticed in `SILENCE` seconds, and the others end with `LOST`
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SILENCE = 40  # seconds without a heartbeat, after which a process counts as lost
LOST = 128 + signal.SIGTERM  # exit code: nothing is wrong with this process, start again. See launch/
_DAY = 24 * 3600  # seconds that a process that is done waits for the others: lost ones are noticed otherwise


class HostsError(ValueError):
    """Several processes that cannot be joined; one line."""


def _count(environ, name):
    """The whole number in a variable, 1 if there is none."""
    value = environ.get(name, '1')
    return int(value) if value.isdigit() else 1


def _under_slurm(environ):
    """Whether srun has started this process as one of several."""
    return 'SLURM_STEP_NODELIST' in environ and _count(environ, 'SLURM_NTASKS') > 1


def arguments(environ):
    """What `jax.distributed.initialize` is to be called with, a dict; None for a process that is alone.

    Empty where JAX finds all by itself. Raises HostsError, one line, for variables set by hand that make no sense.
    """
    names = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
    if 'JAX_NUM_PROCESSES' in environ or 'JAX_PROCESS_ID' in environ:
        missing = [name for name in names if not environ.get(name)]
        if missing:
            raise HostsError(f'{missing[0]} is not set, but {", ".join(names)} belong together')
        try:
            count, index = int(environ[names[1]]), int(environ[names[2]])
        except ValueError:
            raise HostsError(f'{names[1]} and {names[2]} must be whole numbers') from None
        if not 0 <= index < count:
            raise HostsError(f'{names[2]} is {index}, but must lie between 0 and {count - 1}')
        return dict(coordinator_address=environ[names[0]], num_processes=count, process_id=index)
    tpu = 'TPU_ML_PLATFORM' in environ  # JAX sets it on import, where it finds chips
    return {} if _under_slurm(environ) or _count(environ, 'OMPI_COMM_WORLD_SIZE') > 1 or tpu else None


def expected(environ):
    """(number of processes that the environment speaks of, the variable that says so); (None, '') where none does."""
    for name in ('JAX_NUM_PROCESSES', 'OMPI_COMM_WORLD_SIZE'):
        if environ.get(name, '').isdigit():
            return int(environ[name]), name
    if _under_slurm(environ):
        return _count(environ, 'SLURM_NTASKS'), 'SLURM_NTASKS'
    if environ.get('TPU_WORKER_HOSTNAMES'):  # of one slice
        slices = _count(environ, 'MEGASCALE_NUM_SLICES')
        return slices * len(environ['TPU_WORKER_HOSTNAMES'].split(',')), 'TPU_WORKER_HOSTNAMES'
    return None, ''


def join(environ=os.environ, timeout=300):
    """Joins the run's other processes, if there are any. To be called before JAX is asked for its devices.

    From then on the processes end together: see the module.

    Args:
      timeout: seconds to wait for them. JAX aborts where they do not come: the process ends with 1 and a line.
    Raises:
      HostsError: of `arguments`, or not as many came as the environment speaks of.
    """
    found = arguments(environ)
    if found is None or jax.distributed.is_initialized():
        return
    # Its notifier would swallow SIGTERM for as long as the process lives; a training handles it, and nothing else may.
    jax.config.update('jax_enable_preemption_service', False)
    where = f' at {found["coordinator_address"]}' if found else ''
    late = f'error: the processes of this run did not find each other{where} in {timeout} s: was each started, once?'
    times = dict(initialization_timeout=timeout, heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=_DAY)
    slow = threading.Timer(20, _say, [f'waiting for the other processes of this run{where}'])
    slow.start()
    try:
        with _ending_as(1, late):  # not 2: tried again, it may go well
            jax.distributed.initialize(**found, **times)
    except ValueError as error:
        if found or 'TPU_ML_PLATFORM' not in environ:  # a TPU machine that is in no cluster, as a notebook's, is alone
            raise HostsError(f'jax.distributed: {error}') from None
    except RuntimeError as error:
        raise HostsError(f'jax.distributed: {(str(error).splitlines() or [type(error).__name__])[0]}') from None
    finally:
        slow.cancel()
    if jax.distributed.is_initialized():
        _end_together()
    count, name = expected(environ)
    if count is not None and count != jax.process_count():
        raise HostsError(f'{jax.process_count()} process(es) joined, but {name} speaks of {count}')


def is_first():
    """Whether this is the process that prints, and writes files that are not of all processes."""
    return not jax.distributed.is_initialized() or distributed.global_state.process_id == 0


def count():
    """The processes of the run; unlike `jax.process_count`, and like `is_first`, it starts no device."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


# ---- agreeing


def gather(array):
    """A global array, whole, as NumPy in every process. All processes must call it."""
    return multihost_utils.process_allgather(array, tiled=True)


def from_first(number):
    """The first process's whole number, in all of them. All processes must call it, and wait for the first."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@functools.cache
def _one_each():
    """One number on every device."""
    return NamedSharding(Mesh(np.array(jax.devices()), ('device',)), PartitionSpec('device'))


@jax.jit
def _max(numbers):
    return numbers.max()


def largest(number):
    """The largest of the processes' whole numbers: int() of it waits for them, the call does not. All must call it."""
    if jax.process_count() == 1:
        return number
    mine = lambda index: np.full(1, number, np.int32)
    return _max(jax.make_array_from_callback((jax.device_count(),), _one_each(), mine))


def wait():
    """Returns when all processes have called it."""
    int(largest(0))


# ---- ending together

_TOLD = 'sphere_ar_jax/told'  # the key under which the first process to end says why
_ends = threading.Lock()  # held by the thread that ends this process
_settled = []  # (exit code, line to say) of this process, from the moment that all may end; the first counts
_calls = []  # the same, for an abort of JAX's in the thread that has called it
_stderr = [2]  # the last one is where our lines go; JAX's threads write to 2


def _name(index):
    return f'process {index} of {distributed.global_state.num_processes}'


def _mute():
    """From now on stderr is ours alone."""
    if len(_stderr) == 1:
        _stderr.append(os.dup(2))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _say(message):
    with contextlib.suppress(OSError):
        os.write(_stderr[-1], f'{message}\n'.encode() if message else b'')


def _say_last(message=''):
    """A line on stderr, if any, after which nobody says more: JAX's threads log that others end, also after ours."""
    for action in sys.stdout.flush, sys.stderr.flush, _mute:
        with contextlib.suppress(OSError, ValueError):
            action()
    _say(message)


def _end(code, message=''):
    """Ends this process now, whatever its other threads wait for, with one line on stderr, or as was settled before."""
    _settled.append((code, message))
    _ends.acquire()
    code, message = _settled[0]
    try:
        _say_last(message)
    finally:
        os._exit(code)


def _listen():
    """A thread: waits for another process's last word and ends as that one does."""
    client = distributed.global_state.client
    try:
        index, host, code, message = json.loads(client.blocking_key_value_get(_TOLD, 2**31 - 1))  # ms: 24 days
    except Exception:
        return  # the run is over, or the first process is gone: see _on_abort
    if index == distributed.global_state.process_id:
        return
    _settled.append((code, f'{_name(index)} ({host}) ended: {message}'))
    _meet(client)
    _end(code)


def _meet(client):
    """Waits for the other processes' `_listen`, but not for long: some may be gone."""
    with contextlib.suppress(Exception):
        client.wait_at_barrier(_TOLD, 5000)
    if is_first():  # which holds the service that the others hear through
        time.sleep(0.5)


def stop(code, message):
    """Ends this process with an exit code, and, if it has joined others, those with the same code and message.

    It has said itself what is wrong. Several that stop at once each end with their own code.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    with contextlib.suppress(ValueError):  # another thread than the main one has failed
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave the others waiting
    _settled.insert(0, (code, ''))  # before another's, which may have come meanwhile
    _say_last()
    client = distributed.global_state.client
    last_word = [distributed.global_state.process_id, socket.gethostname(), code, message]
    with contextlib.suppress(Exception):  # another was first
        client.key_value_set(_TOLD, json.dumps(last_word))
    _meet(client)
    _end(code)


# How errors read that say that another process is gone. Gloo's were seen; the others' are from the libraries' sources.
_GONE = re.compile(
    r'Gloo .*failed|NCCL .*(remote|abort)|UNAVAILABLE|heartbeat|Socket closed|Connection (reset|closed)', re.I
)
_LOST_LINE = 'another process of this run is gone or does not answer: stopped; start all of them again, the run goes on'


def _lost(reason=''):
    """(exit code, line) of this process where another is gone."""
    return LOST, f'{_name(distributed.global_state.process_id)}: {_LOST_LINE}' + (f' ({reason})' if reason else '')


def is_lost(error):
    """Whether an exception of JAX says that another process is gone."""
    of_jax = type(error) in (ValueError, RuntimeError, jax.errors.JaxRuntimeError)
    return jax.distributed.is_initialized() and of_jax and _GONE.search(str(error)) is not None


def end_if_lost(error):
    """Ends this process with the code LOST if the error says that another is gone; to be called before any clean-up,
    which would wait for that one."""
    if is_lost(error):
        _end(*_lost((str(error).strip() or type(error).__name__).splitlines()[0][:160]))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_):
    """JAX's coordination service ends a process whose peers are gone by abort(), in a thread of its own; they may be
    gone because all end. Or in the thread that calls it: see `_ending_as`."""
    if _calls:
        _end(*_calls[-1])
    if isinstance(threading.current_thread(), threading._DummyThread):  # not ours: a bug elsewhere stays one
        _end(*_lost())


_c_signal = ctypes.CDLL(None).signal  # Python's own handlers run later than abort() waits


@contextlib.contextmanager
def _ending_as(code, message):
    """Around a call of JAX's that may abort: the process ends with that code and line then, without a stack trace."""
    _calls.append((code, message))
    _c_signal(signal.SIGABRT, _on_abort)
    with contextlib.suppress(OSError):
        _mute()
    try:
        yield
    finally:
        _calls.pop()
        _c_signal(signal.SIGABRT, signal.SIG_DFL)
        if len(_stderr) == 2:
            os.dup2(_stderr.pop(), 2)


def _end_together():
    """Listens to the others' last words, and makes an exit code of what JAX would only abort for."""
    _c_signal(signal.SIGABRT, _on_abort)
    listener = threading.Thread(target=_listen, daemon=True)
    listener.start()

    @atexit.register
    def end():
        """Waits for the others to end as well; then no thread of ours may be left, which Python would end badly."""
        try:
            with _ending_as(*_lost()):
                jax.distributed.shutdown()
        except Exception:  # of the service, which one that waited with us has left
            _end(*_lost())
        listener.join(5)
