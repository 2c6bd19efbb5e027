"""Measures of how the code reads, each with its bound.

python -m tests.texture
"""

import ast
import collections
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
WIDTH = 100  # characters of the longest line
# The one file that may use what JAX keeps private.
PRIVATE_JAX = 'sphere_ar_jax/runtime/ending.py'
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Measure(NamedTuple):
    """One measure of the package and its configs.

    Attributes:
      name: what is measured, with its unit.
      value: what was found.
      least, most: the bounds of `value`, inclusive.
      places: PATH:LINE of what should be otherwise.
    """

    name: str
    value: float
    least: float
    most: float
    places: list[str]

    @property
    def holds(self) -> bool:
        """Whether the value lies within its bounds."""
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        bound = f'at most {self.most:g}' if self.least == 0 else f'at least {self.least:g}'
        return f'{self.name}: {self.value:.4g} ({bound})'


def files() -> Iterator[pathlib.Path]:
    """The Python files of the package and the configs."""
    for folder in ('sphere_ar_jax', 'configs'):
        yield from sorted((ROOT / folder).rglob('*.py'))


def is_packed(node: ast.AST) -> bool:
    """Whether a statement assigns several values at once: `a, b = x, y` or `a = b = x`."""
    if not isinstance(node, ast.Assign):
        return False
    if len(node.targets) > 1:
        return True
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def is_named_lambda(node: ast.AST) -> bool:
    """Whether a statement gives a lambda a name."""
    return isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Lambda)


def public(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(definition, what it stands in) of each public module, class, function and method."""
    yield tree, tree
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith('_'):
            continue
        yield node, tree
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, Function | ast.ClassDef) and not inner.name.startswith('_'):
                    yield inner, node


def has_types(function: ast.FunctionDef, owner: ast.AST) -> bool:
    """Whether all arguments but `self` have types, and the result has one."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    static = any(
        isinstance(d, ast.Name) and d.id == 'staticmethod' for d in function.decorator_list
    )
    if isinstance(owner, ast.ClassDef) and not static:
        named = named[1:]
    named += arguments.kwonlyargs
    named += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return function.returns is not None and all(a.annotation is not None for a in named)


def is_private_jax(node: ast.AST) -> bool:
    """Whether an import reaches into what JAX keeps private."""
    names = []
    if isinstance(node, ast.ImportFrom):
        names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    return any(
        name.split('.')[0] in ('jax', 'jaxlib')
        and any(part.startswith('_') for part in name.split('.'))
        for name in names
    )


def statements(tree: ast.Module, name: str) -> Iterator[tuple[str, int]]:
    """(what should not be there, its line) for each such statement of a file."""
    for node in ast.walk(tree):
        if is_packed(node):
            yield 'packed', node.lineno
        if is_named_lambda(node):
            yield 'lambda', node.lineno
        if is_private_jax(node) and name != PRIVATE_JAX:
            yield 'private', node.lineno


def signatures(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """('function' or 'definition', its line) of what is public; with 'un…' what lacks something."""
    for node, owner in public(tree):
        line = getattr(node, 'lineno', 1)
        yield 'definition', line
        if ast.get_docstring(node) is None:
            yield 'undocumented', line
        if isinstance(node, Function):
            yield 'function', line
            if not has_types(node, owner):
                yield 'untyped', line


def measure() -> list[Measure]:
    """All measures of the package and its configs."""
    found = collections.defaultdict(list)
    lines = 0
    for path in files():
        name = str(path.relative_to(ROOT))
        text = path.read_text()
        tree = ast.parse(text)
        rows = text.splitlines()
        lines += len(rows)
        wide = [('long', number) for number, row in enumerate(rows, 1) if len(row) > WIDTH]
        for kind, number in (*wide, *statements(tree, name), *signatures(tree)):
            found[kind].append(f'{name}:{number}')

    def each_thousand(kind: str) -> float:
        return 1000 * len(found[kind]) / lines

    def share(lacking: str, kind: str) -> float:
        return 100 * (1 - len(found[lacking]) / len(found[kind]))

    typed = share('untyped', 'function')
    documented = share('undocumented', 'definition')
    private = len(found['private'])
    return [
        Measure(
            'packed assignments per 1,000 lines', each_thousand('packed'), 0, 1, found['packed']
        ),
        Measure('named lambdas per 1,000 lines', each_thousand('lambda'), 0, 1, found['lambda']),
        Measure(f'lines over {WIDTH} characters', len(found['long']), 0, 0, found['long']),
        Measure('public functions with types, %', typed, 100, 100, found['untyped']),
        Measure(
            'public definitions with docstrings, %', documented, 95, 100, found['undocumented']
        ),
        Measure(f'private JAX names outside {PRIVATE_JAX}', private, 0, 0, found['private']),
    ]


if __name__ == '__main__':
    found = measure()
    for one in found:
        print(one)
        if '-v' in sys.argv:
            print('\n'.join(f'  {place}' for place in one.places))
    sys.exit(any(not one.holds for one in found))
