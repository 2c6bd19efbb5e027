"""The configs that come with the package, by their bare words, as in --config=digits:smoke."""

import importlib.util
import os
import pathlib
import re
from typing import Any

# A config file whose argument is a workdir, and whose config is that of the run in it.
OF_RUN = str(pathlib.Path(__file__).parents[1] / 'commands' / 'own_config.py')


# What is said of a workdir without a run.
NO_RUN = 'has no run: train one, or --mode=convert a checkpoint'


def find(word: str) -> str:
    """Turns the bare word of a packaged config into its file; any other word stays as it is.

    'digits:smoke' becomes 'PATH/digits.py:smoke', unless the current directory has a file 'digits',
    and 'experiments/guidance' becomes 'PATH/experiments/guidance.py'.
    """
    name, colon, arg = word.partition(':')
    file = None if os.path.isfile(name) else _file(name)
    return f'{file or os.path.expanduser(name)}{colon}{arg}'


def _file(name: str) -> str | None:
    """The file of a packaged config, None where there is none of that name."""
    if not re.fullmatch(r'\w+(/\w+)?', name):
        return None
    package = pathlib.Path(__file__).parents[1]
    # An installed wheel has its configs in the first place, a checkout in the second.
    for place in (package / 'configs', package.parent / 'configs'):
        if (place / f'{name}.py').exists():
            return f'{place / name}.py'
    return None


def load(word: str) -> Any:
    """The config that the bare word of a packaged config gives, as 'digits' or 'digits:smoke'.

    Raises:
      FileNotFoundError: there is no such config.
    """
    name, _, arg = word.partition(':')
    file = _file(name)
    if file is None:
        raise FileNotFoundError(f'there is no packaged config {word}')
    spec = importlib.util.spec_from_file_location('packaged_config', file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def with_paths(argv: list[str]) -> list[str]:
    """Replaces the bare word of a packaged config after --config by its file, see `find`."""
    out = []
    for before, word in zip(['', *argv], argv, strict=False):
        flag, equals, value = word.partition('=')
        if flag in ('--config', '-config') and equals:
            out.append(f'{flag}={find(value)}')
        elif before in ('--config', '-config'):
            out.append(find(word))
        else:
            out.append(word)
    return out
