"""Measures of how the code reads, each with its bound.

python -m tests.texture
"""

import ast
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


def measure() -> list[Measure]:
    """All measures of the package and its configs."""
    lines = 0
    packed = []
    lambdas = []
    long = []
    untyped = []
    undocumented = []
    private = []
    functions = 0
    definitions = 0
    for path in files():
        name = str(path.relative_to(ROOT))
        text = path.read_text()
        lines += text.count('\n')
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > WIDTH:
                long.append(f'{name}:{number}')
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if is_packed(node):
                packed.append(f'{name}:{node.lineno}')
            if is_named_lambda(node):
                lambdas.append(f'{name}:{node.lineno}')
            if is_private_jax(node) and name != PRIVATE_JAX:
                private.append(f'{name}:{node.lineno}')
        for node, owner in public(tree):
            definitions += 1
            place = f'{name}:{getattr(node, "lineno", 1)}'
            if ast.get_docstring(node) is None:
                undocumented.append(place)
            if isinstance(node, Function):
                functions += 1
                if not has_types(node, owner):
                    untyped.append(place)
    thousands = lines / 1000
    typed = 100 * (1 - len(untyped) / functions)
    documented = 100 * (1 - len(undocumented) / definitions)
    return [
        Measure('packed assignments per 1,000 lines', len(packed) / thousands, 0, 1, packed),
        Measure('named lambdas per 1,000 lines', len(lambdas) / thousands, 0, 1, lambdas),
        Measure(f'lines over {WIDTH} characters', len(long), 0, 0, long),
        Measure('public functions with types, %', typed, 100, 100, untyped),
        Measure('public definitions with docstrings, %', documented, 95, 100, undocumented),
        Measure(f'private JAX names outside {PRIVATE_JAX}', len(private), 0, 0, private),
    ]


if __name__ == '__main__':
    found = measure()
    for one in found:
        print(one)
        if '-v' in sys.argv:
            print('\n'.join(f'  {place}' for place in one.places))
    sys.exit(any(not one.holds for one in found))
