"""Ctrl-C where Python cannot hear it at once, and what ends a program."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sphere_ar_jax import main
from sphere_ar_jax.runtime import console

ROOT = pathlib.Path(__file__).parents[2]
# An hour inside one call of C that lets other threads run, as XLA's compiler does.
BUSY = "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)"
PROGRAM = """
import gc, hashlib, os, signal, sys, time
from sphere_ar_jax.runtime.console import interrupts
told = []
interrupts.watch(lambda code, line: print('tells', code, flush=True))
def collect(phase, info):
    if phase == 'start' and not told:
        told.append(phase)
        signal.raise_signal(signal.SIGINT)
interrupts.keep({keeps})
try:
    print('begins', flush=True)
    {body}
except KeyboardInterrupt:
    sys.exit(130)
"""
COMPILING = 'interrupted: ends when the compilation is over; press Ctrl-C again to end now'


def _program(body, keeps=False):
    process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM.format(body=body, keeps=keeps)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == 'begins\n'
    time.sleep(0.3)  # until it is inside the body
    return process


def test_ctrl_c_answers_while_python_cannot_and_a_second_one_ends():
    with _program(BUSY) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == f'{COMPILING}\n'
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, 'tells 130\n', 'interrupted\n')


def test_a_state_that_is_not_saved_yet_is_kept():
    with _program(BUSY, keeps=True) as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.8)
        process.kill()
        assert process.communicate() == ('', '')


def test_ctrl_c_just_before_the_last_state_is_saved_says_nothing_of_a_compilation():
    """The training notes the signal, saves, and lets its state go before the listener speaks."""
    body = (
        'import threading; '
        'let_go = threading.Timer(0.2, interrupts.keep, (False,)); '
        'signal.signal(signal.SIGINT, lambda *_: let_go.start()); '
        'time.sleep(1.5)'
    )
    with _program(body, keeps=True) as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ('', '')
        assert process.returncode == 0


def test_ctrl_c_that_python_hears_says_nothing_more():
    with _program('time.sleep(100)') as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ('', '')
        assert process.returncode == 130


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    body = 'gc.callbacks.append(collect); [gc.collect() or time.sleep(0.1) for _ in range(50)]'
    with _program(body) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, '', '')


def test_a_program_that_ignores_ctrl_c_goes_on_to_do_so():
    """As under nohup, or where a shell started it with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = _program('time.sleep(1)')
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        os.kill(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60) == ('', '')
        assert process.returncode == 0


@pytest.mark.parametrize(
    'error, line',
    [
        (
            OSError(errno.ENOSPC, 'No space left on device', 'w/a'),
            'w/a cannot be written (No space left on device): make room, and the same command goes '
            'on',
        ),
        (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'a'), 'there is no file a'),
        (FileNotFoundError('there is no run in w'), 'there is no run in w'),
        (OSError(errno.EIO, 'Input/output error', 'a'), 'a: Input/output error'),
        (console.UserError('two\nlines'), 'two lines'),
    ],
)
def test_an_error_is_one_line(error, line):
    assert console.said(error) == line


@pytest.mark.parametrize(
    'error, code',
    [
        (console.UserError('a value'), 2),
        (console.TemporaryError('a bucket'), 75),
        (OSError(errno.EIO, 'Input/output error', 'a'), 75),
        (TimeoutError('no answer'), 75),
        (OSError(errno.ENOSPC, 'No space left on device', 'a'), 2),
        (PermissionError(errno.EACCES, 'Permission denied', 'a'), 2),
    ],
)
@pytest.mark.parametrize('ends', [console.run, lambda program: main._guarded(program)([])])
def test_the_exit_code_says_whether_a_fault_may_pass(capsys, ends, error, code):
    def program(words):
        raise error

    with pytest.raises(SystemExit) as stop:
        ends(program)
    assert stop.value.code == code
    assert capsys.readouterr().err == f'error: {console.said(error)}\n'


class HttpError(Exception):
    """As gcsfs raises it. It is no OSError."""

    __module__ = 'gcsfs.retry'

    def __init__(self, code):
        super().__init__(f'refused, {code}')
        self.code = code


@pytest.mark.parametrize(
    'error, code',
    [
        (HttpError(503), 75),
        (HttpError(403), 2),
        # XLA's own words, which are also those of a bucket that is asked too often.
        (RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes'), 1),
    ],
)
def test_what_a_bucket_refuses_is_one_line_wherever_it_happens(capsys, error, code):
    def program(words):
        raise ValueError('no metrics') from error

    with pytest.raises(SystemExit) as stop:
        main._guarded(program)([])
    assert stop.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines) == 1) == (code != 1)
    if code != 1:
        assert lines == [f'error: HTTP {error.code}: refused, {error.code}']
