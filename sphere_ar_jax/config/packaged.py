"""The configs that come with the package, by their bare words, as in --config=digits:smoke."""

import os
import pathlib
import re

# A config file whose argument is a workdir, and whose config is that of the run in it.
OF_RUN = str(pathlib.Path(__file__).parents[1] / 'commands' / 'own_config.py')


def find(word: str) -> str:
    """Turns the bare word of a packaged config into its file; any other word stays as it is.

    'digits:smoke' becomes 'PATH/digits.py:smoke', unless the current directory has a file 'digits'.
    """
    name, colon, arg = word.partition(':')
    if not re.fullmatch(r'\w+', name) or os.path.exists(name):
        return word
    package = pathlib.Path(__file__).parents[1]
    # An installed wheel has its configs in the first place, a checkout in the second.
    for place in (package / 'configs', package.parent / 'configs'):
        if (place / f'{name}.py').exists():
            return f'{place / name}.py{colon}{arg}'
    return word


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
