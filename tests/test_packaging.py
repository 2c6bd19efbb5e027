"""What a wheel holds, and how the command starts."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

import sphere_ar_jax
from sphere_ar_jax import benchmark, config, doctor, loading
from sphere_ar_jax.config import packaged
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import model

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_has_all_that_a_user_needs(tmp_path):
    """Unpacked in an empty directory, it finds a packaged config by its bare word, and ImageNet's
    classes.
    """
    command = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '-q',
        '--no-deps',
        '-w',
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        assert 'sphere_ar_jax/py.typed' in archive.namelist()
        archive.extractall(tmp_path / 'site')
        metadata = next(name for name in archive.namelist() if name.endswith('entry_points.txt'))
        assert 'sphere-ar = sphere_ar_jax.main:run' in archive.read(metadata).decode()
    empty = tmp_path / 'empty'
    empty.mkdir()
    code = (
        'import sys; sys.path.insert(0, sys.argv.pop(1)); '
        'import sphere_ar_jax; assert "site" in sphere_ar_jax.__file__; '
        'from sphere_ar_jax.data import imagenet; assert len(imagenet.classes()) == 1000; '
        'from sphere_ar_jax import main; main.run()'
    )
    words = ['--config=digits:smoke', '--config.nope=1', '--workdir=w']
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'site'), *words],
        cwd=empty,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f'error: the config has no key nope; its sections are {", ".join(config.default())}\n'
    )
    assert list(empty.iterdir()) == []


def test_a_bare_word_names_a_packaged_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = str(ROOT / 'configs' / 'digits.py')
    assert packaged.with_paths(['x', '--config=digits:smoke']) == ['x', f'--config={digits}:smoke']
    assert packaged.with_paths(['x', '--config', 'digits']) == ['x', '--config', digits]
    others = [
        'x',
        '--config=nothing',
        '--config=configs/digits.py:fast',
        '--workdir=digits',
        '--config.seed=1',
        'digits',
    ]
    assert packaged.with_paths(others) == others
    (tmp_path / 'digits').write_text('')  # a file of that name comes first
    assert packaged.with_paths(['x', '--config=digits']) == ['x', '--config=digits']


def test_every_command_knows_the_bare_words(capsys):
    """They find the file, which then says what is wrong with the word after the colon."""
    assert doctor.main(['doctor', '--config=digits:huge']) == 2
    assert "no variant 'huge'" in capsys.readouterr().err
    with pytest.raises(UserError, match="no variant 'huge'"):
        benchmark.main(['benchmark', '--config=digits:huge'])


@pytest.mark.parametrize(
    'words', [['--version'], ['--help'], ['--nope'], ['--config=nope', '--workdir=w']]
)
def test_what_needs_no_jax_does_not_import_it(words):
    code = (
        f'import sys; sys.modules["jax"] = None; sys.argv[1:] = {words}; '
        'from sphere_ar_jax import main; main.run()'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert 'Traceback' not in done.stderr
    assert done.returncode == {'--version': 0, '--help': 0}.get(words[0], 2)
    if words == ['--version']:
        assert done.stdout == f'sphere_ar_jax {sphere_ar_jax.__version__}\n'


def _printed(code: str) -> str:
    """What Python prints for some code, in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return done.stdout


def test_the_package_imports_nothing():
    """`import sphere_ar_jax` is quick: nothing but the standard library's importlib and types comes
    with it.
    """
    code = 'import importlib, types, sys; before = set(sys.modules); import sphere_ar_jax; '
    code += 'print(*set(sys.modules) - before)'
    assert _printed(code).split() == ['sphere_ar_jax']


def test_what_the_package_shows_is_imported_when_it_is_asked_for():
    assert sphere_ar_jax.load is loading.load
    assert sphere_ar_jax.Model is model.Model
    assert {'load', 'Model', '__version__'} <= set(dir(sphere_ar_jax))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = sphere_ar_jax.laod


def test_config_files_of_version_0_1_are_read(tmp_path):
    """They import `config` and `recipes` from the package itself."""
    path = tmp_path / 'old.py'
    path.write_text(
        'from sphere_ar_jax import config, recipes\n'
        'def get_config(arg=""):\n'
        '    c = config.default()\n'
        '    c.sampling.update(recipes.FAST)\n'
        '    return c\n'
    )
    words = [f'--config={path}', '--config.nope=1', '--workdir=w']
    code = f'import sys; sys.argv[1:] = {words}; from sphere_ar_jax import main; main.run()'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert 'the config has no key nope' in done.stderr


def test_drawing_imports_only_what_it_needs():
    """These take a third of the time of all imports, and drawing to an npz needs none of them."""
    code = (
        'import sys, sphere_ar_jax.loading, sphere_ar_jax.commands.draw; '
        "late = ('matplotlib', 'grain', 'sklearn', 'scipy.stats', 'jax._src.pallas.triton'); "
        'print([name for name in late if name in sys.modules])'
    )
    assert _printed(code).strip() == '[]'
