"""What the layout promises: imports only go down, and a plain install needs neither TensorFlow nor
PyTorch.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import sphere_ar_jax
from tests import conftest, texture, words

PACKAGE = pathlib.Path(sphere_ar_jax.__file__).parent
ROOT = PACKAGE.parent
# The floors of the house. A file may import from its own floor and from every floor below it.
FLOORS = (
    'doors',  # main, doctor, benchmark, fidelity, loading: the files of the package's own folder
    'serving',
    'commands',
    'experiments',
    'measure',
    'evaluation',
    'training',
    'sampling',
    'interop',
    'config',
    'models',
    'data',
    'runtime',
    'flow',
    'sphere',
)
DOORS = {'main', 'doctor', 'benchmark', 'fidelity', 'loading'}
MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
    for path in sorted(PACKAGE.rglob('*.py'))
}


def _floor(module: str) -> str:
    """The floor of a module's dotted name."""
    parts = module.split('.')
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else 'doors'


def _imports(path: pathlib.Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} has a relative import: write the whole name'
            for alias in node.names:
                whole = f'{node.module}.{alias.name}'
                found.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name in MODULES and name != 'sphere_ar_jax'}


def test_every_file_stands_on_a_floor():
    folders = ', '.join(FLOORS[1:])
    for module, path in MODULES.items():
        if path.parent == PACKAGE and path.stem != '__init__':
            assert path.stem in DOORS, (
                f'{module} stands beside the doors: move it into one of {folders}'
            )
        elif path.parent != PACKAGE:
            folder = path.relative_to(PACKAGE).parts[0]
            assert folder in FLOORS, f'the folder {folder} is no floor: use one of {folders}'


def test_imports_only_go_down():
    height = {floor: i for i, floor in enumerate(reversed(FLOORS))}
    for module, path in MODULES.items():
        if module == 'sphere_ar_jax':
            continue
        for imported in _imports(path):
            here = _floor(module)
            there = _floor(imported)
            assert height[there] <= height[here], (
                f'{module} is on the floor {here} and imports {imported} from {there} above it: '
                f'move what it needs down to {here} or lower, or pass it in as an argument'
            )


def test_no_imports_in_a_circle():
    graph = {module: _imports(path) for module, path in MODULES.items()}
    done = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f'imports go in a circle: {" → ".join((*trail, module))}'
        if module not in done:
            for imported in graph[module] - {module}:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_rooms_are_not_crowded():
    """A folder holds at most nine files, so that its list can be read at a glance."""
    for folder in {path.parent for path in MODULES.values()}:
        names = [path.stem for path in folder.glob('*.py') if path.stem != '__init__']
        assert len(names) <= 9, (
            f'{folder} has {len(names)} files: make a folder for those that belong together'
        )


def test_the_tests_mirror_the_folders():
    tests = ROOT / 'tests'
    helpers = {'goldens', 'cases', '__pycache__'}
    for folder in tests.iterdir():
        if folder.is_dir() and folder.name not in helpers:
            assert folder.name in FLOORS, (
                f'tests/{folder.name} has no folder of its name in sphere_ar_jax'
            )


def test_every_module_can_be_imported_without_tensorflow_and_torch():
    # None: no such module
    absent = 'sys.modules.update(tensorflow=None, torch=None)'
    code = f'import sys; {absent}; import {", ".join(MODULES)}'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=300, check=True)


@pytest.mark.parametrize('floor', ['sphere', 'flow', 'models'])
def test_models_know_no_mesh(floor):
    for path in (PACKAGE / floor).rglob('*.py'):
        text = path.read_text().lower()
        # The kernels of a platform are laid out on the mesh that a program names.
        if path.stem != 'attention':
            assert not re.search(r'\b(mesh|sharding)\b', text), (
                f'{path} speaks of a mesh: that is runtime/sharding.py'
            )


def test_the_files_that_come_first_are_there():
    tests = pathlib.Path(__file__).parent
    for name in conftest.LONGEST:
        assert (tests / name).exists(), f'tests/conftest.py, LONGEST: there is no tests/{name}'


def test_no_pmap():
    for path in MODULES.values():
        assert 'pmap' not in path.read_text(), path


def test_the_documents_hold_together():
    """No placeholder is left, and every link to a file has one behind it."""
    for path in [*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')]:
        text = path.read_text()
        assert not re.search(r'@[A-Z]+@', text), path
        for target in re.findall(r'\]\((?!http)([^)#]+)\)', text):
            assert (path.parent / target).exists(), f'{path}: {target}'


def test_words_that_do_not_belong():
    assert words.check() == []


@pytest.mark.parametrize(
    ('text', 'found'),
    [
        ('Of images: their number.', ['Of images: their number']),
        ('Draws tokens. Of one image.', ['Of one image']),
        ('Draws tokens.\n\nOf one image', ['Of one image']),
        ('The share of images.\n\nArgs:\n  seed: of the draws. Offsets come first.', []),
    ],
)
def test_sentences_that_begin_with_of(text, found):
    assert words.fragments(text) == found


def test_diary():
    assert words.faults('Measured a session\n  later.') == ['session']
    assert words.faults('See spec §3, as before the move; two sessions later.') == [
        'session',
        'the move',
        'spec §',
    ]
    assert words.faults('Measured by one command, by the movement of a draw.') == []


def test_texture():
    broken = [measured for measured in texture.measure() if not measured.holds]
    assert not broken, [f'{measured}: {", ".join(measured.places)}' for measured in broken]


@pytest.mark.parametrize(
    ('code', 'kinds'),
    [
        ('a, b = 1, 2', {'packed'}),
        ('a = b = 1', {'packed'}),
        ('a, b = f()', set()),
        ('f = lambda x: x', {'lambda'}),
        ('from jax._src import core', {'private'}),
        ('import jax._src.core', {'private'}),
        ('from jax import numpy as _np', set()),
    ],
)
def test_statements_that_tire_a_reader(code, kinds):
    assert {kind for kind, _ in texture.statements(ast.parse(code), 'a.py')} == kinds


@pytest.mark.parametrize(
    ('code', 'lacks_types'),
    [
        ('def f(x: int) -> int: ...', False),
        ('def f(x) -> int: ...', True),
        ('def f(x: int): ...', True),
        ('def f(*x: int, **y) -> int: ...', True),
        ('def _f(x): ...', False),
        ('class A:\n  def f(self, x: int) -> int: ...', False),
        ('class A:\n  def f(self, x): ...', True),
        ('class A:\n  @staticmethod\n  def f(x) -> int: ...', True),
    ],
)
def test_signatures_without_types(code, lacks_types):
    kinds = {kind for kind, _ in texture.signatures(ast.parse(code))}
    assert ('untyped' in kinds) == lacks_types
