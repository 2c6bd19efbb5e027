"""The configs that come with the package, by their bare words, as in --config=digits:smoke."""

import os
import pathlib
import re


def find(word: str) -> str:
    """Returns the file of a packaged config for its bare word; any other word stays as it is.

    'digits:smoke' becomes 'PATH/digits.py:smoke'. A file of that name in the current directory
    comes first.
    """
    name, colon, arg = word.partition(':')
    if not re.fullmatch(r'\w+', name) or os.path.exists(name):
        return word
    package = pathlib.Path(__file__).parents[1]
    # The first is where an installed wheel has them, the second where a checkout has them.
    for place in (package / 'configs', package.parent / 'configs'):
        if (place / f'{name}.py').exists():
            return f'{place / name}.py{colon}{arg}'
    return word


def with_paths(argv: list[str]) -> list[str]:
    """A command line, with the file of every packaged config in place of its bare word."""
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
