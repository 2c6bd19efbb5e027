"""What the layout promises: imports only go down, and a plain install needs neither TensorFlow nor PyTorch."""

import ast
import pathlib
import re
import subprocess
import sys

import sphere_ar_jax

PACKAGE = pathlib.Path(sphere_ar_jax.__file__).parent
# Each module may import only from lines above its own.
LEVELS = (
    ('attention', 'chips', 'console', 'ending', 'geometry', 'hlo', 'hosts', 'imagenet', 'torch_file'),
    ('distributions', 'flow', 'solvers', 'inception', 'joining', 'perceptual', 'tar_index', 'stand_in'),
    ('transformer', 'convolutions'),
    ('vae', 'flow_head', 'discriminators'),
    ('ar',),
    ('convert', 'losses', 'sampling', 'optimizer', 'costs', 'against', 'augment'),
    ('data', 'sources', 'sharding', 'checkpoint', 'metric_writer'),
    ('config', 'training', 'fidelity'),
    ('adversarial', 'recipes'),
    ('evaluation', 'report'),
    ('generation', 'frontier', 'parts', 'programs'),
    ('looks', 'ahead'),
    ('experiment',),
    ('jobs',),
    ('main',),
    ('benchmark', 'data_benchmark', 'doctor'),
)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'sphere_ar_jax':
            yield from (alias.name for alias in node.names if alias.name != '__version__')
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path.name}: relative import'
            if node.module.startswith('sphere_ar_jax.'):
                yield node.module.split('.')[1]
        elif isinstance(node, ast.Import):
            yield from (n.name.split('.')[1] for n in node.names if n.name.startswith('sphere_ar_jax.'))


def test_imports_only_go_down():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    modules = {path.stem: path for path in PACKAGE.glob('*.py') if path.stem != '__init__'}
    assert set(modules) == set(level)
    for name, path in modules.items():
        for imported in _imports(path):
            assert level[imported] < level[name], f'{name} imports {imported}'


def test_no_tensorflow_and_no_torch():
    """Every module can be imported where neither is installed."""
    names = ', '.join(f'sphere_ar_jax.{path.stem}' for path in PACKAGE.glob('*.py') if path.stem != '__init__')
    code = (
        f'import sys; sys.modules["tensorflow"] = sys.modules["torch"] = None; import {names}'  # None: no such module
    )
    assert subprocess.run([sys.executable, '-c', code], cwd=PACKAGE.parent, timeout=300).returncode == 0


def test_models_know_no_mesh():
    models = 'geometry distributions flow transformer vae flow_head ar discriminators losses sampling'
    for name in models.split():
        assert not re.search(r'\b(mesh|sharding)\b', (PACKAGE / f'{name}.py').read_text().lower()), name


def test_no_pmap():
    for path in PACKAGE.glob('*.py'):
        assert 'pmap' not in path.read_text(), path


def test_functions_are_short():
    """A training step fits on a screen, the loop in 150 lines."""
    lengths = {}
    for path in PACKAGE.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths[f'{path.stem}.{node.name}'] = node.end_lineno - node.lineno + 1
    assert max(lengths['training.step'], lengths['adversarial.step']) <= 40
    assert max(lengths.values()) <= 150


def test_the_documents_hold_together():
    """No placeholder is left, and every link to a file of ours has one behind it."""
    root = PACKAGE.parent
    for name in ('README.md', 'BUILD_NOTES.md'):
        text = (root / name).read_text()
        assert not re.search(r'@[A-Z]+@', text), name
        for target in re.findall(r'\]\((?!http)([^)#]+)\)', text):
            assert (root / target).exists(), f'{name}: {target}'
