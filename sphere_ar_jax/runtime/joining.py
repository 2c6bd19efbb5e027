"""How the processes of one run find each other (`jax.distributed`), by what has started them.

SLURM       srun, with more than one task
Open MPI    mpirun, with more than one process
Cloud TPU   a TPU VM or a GKE pod, whose slice may have more hosts than this one
by hand     JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=n JAX_PROCESS_ID=0 … n − 1

See `docs/devices.md`, "Many hosts".
"""

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

from sphere_ar_jax.runtime import ending
from sphere_ar_jax.runtime.console import UserError

SILENCE = 40  # seconds without a heartbeat until a process counts as lost
_DAY = 24 * 3600  # seconds that a process which is done waits for the others to be done
_BY_HAND = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def expected(environ: Mapping[str, str]) -> tuple[int | None, str]:
    """The number of processes that the environment variables speak of.

    Returns:
      (the number, the variable that says so), or (None, '') where no variable does.
    """
    several = ['JAX_NUM_PROCESSES', 'OMPI_COMM_WORLD_SIZE']
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
    if not (count.isdigit() and index.isdigit()):
        raise UserError('JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers')
    if int(index) >= int(count):
        raise UserError(f'JAX_PROCESS_ID is {index}, but must lie between 0 and {int(count) - 1}')
    return dict(coordinator_address=address, num_processes=int(count), process_id=int(index))


def join(environ: Mapping[str, str] = os.environ, timeout: int = 300) -> None:
    """Join the other processes of the run, if there are any.

    Call it before JAX is asked for its devices.

    Args:
      environ: the environment variables.
      timeout: seconds to wait for the other processes. JAX aborts this process if they do not come.

    Raises:
      UserError: `arguments` raises it, or another number of processes has joined than the
        environment speaks of.
    """
    found = arguments(environ)
    if found is None or jax.distributed.is_initialized():
        return
    # JAX's notifier of preemptions would keep SIGTERM from this process as long as it lives.
    jax.config.update('jax_enable_preemption_service', False)
    where = f' at {found["coordinator_address"]}' if found else ''
    line = f'waiting for the other processes of this run{where}: was each of them started, once?'
    late = threading.Timer(min(20, timeout / 2), print, [line], dict(file=sys.stderr, flush=True))
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
