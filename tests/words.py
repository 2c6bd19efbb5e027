"""Words that do not belong in what the repository says of itself: diary, and sentences without a
subject.

python -m tests.words
"""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
# Words that no text has, in lower case; each is a regular expression.
DIARY = (r'session', r'the move\b', r'spec §', r'could not be had here')
# A sentence begins a text, follows the end of another one, or follows an empty line.
FRAGMENT = re.compile(r'(?:\A|[.!?:][)"’]?\s+|\n\s*\n\s*)(Of\b[^.\n]{0,50})')


def faults(text: str) -> list[str]:
    """The words of a text that do not belong there, as they stand in it."""
    plain = re.sub(r'\s+', ' ', text).lower()
    return [found.group() for words in DIARY for found in re.finditer(words, plain)]


def fragments(text: str) -> list[str]:
    """The beginnings of those sentences of a text that begin with "Of"."""
    return FRAGMENT.findall(text)


def documents() -> Iterator[tuple[str, str]]:
    """(path, text) of every document for readers."""
    for name in ('README.md', 'BUILD_NOTES.md', 'CHANGELOG.md', 'CONTRIBUTING.md'):
        yield name, (ROOT / name).read_text()
    for path in sorted((ROOT / 'docs').rglob('*.md')):
        yield str(path.relative_to(ROOT)), path.read_text()


def docstrings() -> Iterator[tuple[str, str]]:
    """(path:line, docstring) of every module, class and function, but for this file."""
    for folder in ('sphere_ar_jax', 'tests', 'configs'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            if path == pathlib.Path(__file__):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(
                    node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                ):
                    text = ast.get_docstring(node)
                    if text:
                        yield f'{path.relative_to(ROOT)}:{getattr(node, "lineno", 1)}', text


def check() -> list[str]:
    """One line, 'PLACE: words', for each fault in the documents and docstrings."""
    found = []
    for place, text in (*documents(), *docstrings()):
        found += [f'{place}: {words!r} does not belong here' for words in faults(text)]
        found += [f'{place}: a sentence begins with {words!r}' for words in fragments(text)]
    return found


if __name__ == '__main__':
    sys.exit('\n'.join(check()) or 0)
