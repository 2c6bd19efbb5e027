"""Runs command lines of `main`, each in a process of its own, and tells how each ended.

python -m tests.answers < CASES

CASES is a JSON list of lists of words. The answer is a JSON list of [exit code, stdout, stderr].
The processes are forked after all imports, which would take most of the time.
"""

import json
import os
import sys
import tempfile

import jax  # noqa: F401

import sphere_ar_jax.commands.train  # noqa: F401
from sphere_ar_jax import main


def _run(words: list[str], out: int, err: int) -> None:
    """Becomes the program with these words, and ends with its exit code."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.argv = ['sphere_ar_jax.main', *words]
    code = 1
    try:
        main.run()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(words: list[str]) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of the program with these words."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _run(words, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return os.waitstatus_to_exitcode(status), *texts


if __name__ == '__main__':
    json.dump([answer(words) for words in json.load(sys.stdin)], sys.stdout)
