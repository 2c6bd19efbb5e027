"""The configs that come with the package, by their bare words, as in --config=digits:smoke."""

import os
import pathlib
import re


def find(word: str) -> str:
    """The file of a packaged config for its bare word, as 'digits:smoke'; any other word as it is."""
    name, colon, arg = word.partition(':')
    if not re.fullmatch(r'\w+', name) or os.path.exists(name):
        return word
    package = pathlib.Path(__file__).parents[1]
    for place in (
        package / 'configs',
        package.parent / 'configs',
    ):  # of an installed wheel, and of a checkout
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
