"""A server that forks the processes of runs, so that what they import is imported once.

A line of JSON on stdin orders a process: {'path': …, 'environ': {…}, 'words': […]}. It runs `main`
with these words, or `scene` where they do not begin with a dash. It writes PATH.out and PATH.err; a
process beside it writes PATH.pid, and PATH.code at the end.

The processes of a run on CPUs share compiled programs. JAX keys them by the devices, which differ
between the processes, and only the first one writes.
"""

import json
import os
import runpy
import signal
import sys

import jax
import numpy as np
from jax._src import cache_key

from sphere_ar_jax.runtime import checkpoint, hosts, joining, sharding
from sphere_ar_jax.runtime.console import UserError

cache_key._hash_accelerator_config = cache_key._hash_devices


def _stop(how):
    if how == 'mistake':
        raise UserError('a mistake')
    os.kill(os.getpid(), signal.Signals[how])


def scene(directory, where, how, culprit, silence):
    """A run in which one process, the culprit, stops while the others are somewhere.

    Args:
      where: the others are in a 'collective' of JAX's, in a 'barrier' of Orbax's, at their 'exit',
        'saving' a second checkpoint, or 'closing' while it is written and the culprit has to help.
      how: the culprit makes a 'mistake', or gets the signal of this name.
      silence: seconds without a heartbeat until it counts as lost.
    """
    joining.SILENCE = int(silence)
    joining.join()
    is_culprit = jax.process_index() == int(culprit)
    checkpoints = checkpoint.Checkpoints(directory)
    everywhere = sharding.whole(sharding.make_mesh())

    def save(step):
        values = step * np.arange(8, dtype=np.float32)
        state = {'a': jax.make_array_from_process_local_data(everywhere, values)}
        checkpoints.save(step, state, {}, 0.0)

    try:
        save(1)
        checkpoints.wait()
        hosts.wait()
        if where == 'closing':
            if is_culprit:
                checkpoints._manager._finalize = lambda *_: _stop(how)
            save(2)
        elif is_culprit:
            _stop(how)
        elif where == 'collective':
            hosts.wait()
        elif where == 'barrier':
            checkpoint.Checkpoints(directory)
        elif where == 'saving':
            save(2)
    finally:
        checkpoints.close()


def _write(path, number):
    """Writes a number to a file, which is there with all of it or not at all."""
    with open(f'{path}.tmp', 'w') as f:
        f.write(str(number))
    os.replace(f'{path}.tmp', path)


def _wait_beside(path):
    """Forks: returns in the new process, while the old one waits for its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        _write(f'{path}.pid', pid)
        _write(f'{path}.code', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)


def _run(path, environ, words):
    """What an order asks for, in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(f'{path}.{name}', os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environ)
    if words[0].startswith('-'):
        sys.argv = ['sphere_ar_jax.main', *words]
        runpy.run_module('sphere_ar_jax.main', run_name='__main__')
    else:
        from sphere_ar_jax import main

        main._guarded(lambda words: scene(*words))(words)


def serve():
    """Forks a process for every order on stdin."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those beside have ended
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            _wait_beside(order['path'])
            _run(**order)
            return


serve()
