"""Read the commands of the documents as the programs would, up to the point where work begins.

python -m tests.read_commands DIR

Each command is parsed in a child process of its own, because the programs keep their flags in
globals. DIR gets the config files that the documents show, the file that a config of features
reads, and a run for the commands that change values of a run's own config.
"""

import argparse
import importlib
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator

import numpy as np

from tests.words import ROOT, documents

BLOCK = re.compile(r'^```(\w+)\n(.*?)^```', re.DOTALL | re.MULTILINE)
PROGRAM = re.compile(r'(?:python -m (sphere_ar_jax[\w.]*)|(?<![\w/])sphere-ar\b)(.*)')
# What stands for something that a reader puts in: `…`, $VARIABLE, a NAME in capitals.
PLACEHOLDER = re.compile(r'…|\$|configs/[A-Z]+\.py')
# A directory that `faults` fills.
RUN = '--workdir=run'


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(document, text) of every block of code in a language."""
    for name, text in documents():
        for found, block in BLOCK.findall(text):
            if found == language:
                yield name, block


def commands() -> list[tuple[str, str, list[str]]]:
    """(document, module, arguments) of every command without placeholders, each once."""
    found = {}
    for name, block in blocks('bash'):
        for line in block.replace('\\\n', ' ').splitlines():
            match = PROGRAM.search(line.split(' && ')[-1])
            if match is None or PLACEHOLDER.search(line):
                continue
            arguments = shlex.split(match[2], comments=True)
            module = match[1] or 'sphere_ar_jax.main'
            found[module, *arguments] = (name, module, arguments)
    return list(found.values())


def _with_run(arguments: list[str]) -> list[str]:
    """Name the run RUN in place of the document's, if values of its own config are changed."""
    changes = any(word.startswith('--config.') for word in arguments)
    has_file = any(word.startswith('--config=') for word in arguments)
    if not changes or has_file:
        return arguments
    return [RUN if word.startswith('--workdir=') else word for word in arguments]


def read(module: str, arguments: list[str]) -> None:
    """Parse one command and check its config. Raises what the program would say."""
    sys.argv = [module, *_with_run(arguments)]
    if module == 'sphere_ar_jax.main':
        from sphere_ar_jax import main
        from sphere_ar_jax.config import checks, experiments

        rest = main._parse_flags(sys.argv)
        main._check_usage(rest, main._MODE.value, main._given())
        if main._CONFIG.value is not None:
            is_experiment = main._MODE.value == 'experiment'
            check = experiments.check if is_experiment else checks.check
            check(main._CONFIG.value)
    elif module == 'sphere_ar_jax.doctor':
        from sphere_ar_jax import doctor

        doctor._flags(sys.argv)
    else:
        program = importlib.import_module(module)
        if hasattr(program, '_FLAGS'):
            program._FLAGS(sys.argv)
        else:
            _parse_only(program)


def _parse_only(program) -> None:
    """Call the `main` of a program of argparse, ended once its arguments are parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*arguments, **options):
        parse(*arguments, **options)
        raise StopIteration

    argparse.ArgumentParser.parse_args = parse_and_end
    try:
        program.main(*([sys.argv[1:]] if program.main.__code__.co_argcount else []))
    except StopIteration:
        return
    raise AssertionError(f'{program.__name__} parsed nothing')


def faults(directory: str) -> list[str]:
    """A line for each command that its program refuses."""
    # Imported once for all children.
    import sphere_ar_jax.config.checks
    import sphere_ar_jax.main  # noqa: F401
    from sphere_ar_jax.config import packaged, schema

    (pathlib.Path(directory) / 'configs').symlink_to(ROOT / 'configs')
    for _, block in blocks('python'):
        title = re.match(r'# (\w+\.py)\n', block)
        if title is not None:
            pathlib.Path(directory, title[1]).write_text(block)
    # A config of features is checked by its file.
    np.savez(pathlib.Path(directory, 'features.npz'), texts=['a bird'], features=np.ones((1, 2, 3)))
    pathlib.Path(directory, 'run').mkdir()
    config = schema.as_dict(packaged.load('ar_l'))
    pathlib.Path(directory, 'run', 'config.json').write_text(json.dumps(config))
    os.chdir(directory)
    found = []
    for name, module, arguments in commands():
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            message = ''
            try:
                read(module, arguments)
            except BaseException as error:
                message = f'{type(error).__name__}: {error}'
            os.write(writing, message.encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            message = pipe.read()
        os.waitpid(child, 0)
        if message:
            found.append(f'{name}: {module} {shlex.join(arguments)}\n  {message}')
    return found


if __name__ == '__main__':
    print(f'{len(commands())} commands')
    sys.exit('\n'.join(faults(sys.argv[1])) or 0)
