"""What README and docs/ show: their commands and their Python."""

import ast
import re
import subprocess
import sys

from tests import read_commands
from tests.words import ROOT, documents


def test_every_command_is_understood(tmp_path):
    """Each program parses the commands that the documents show and finds no fault in a config."""
    out = subprocess.run(
        [sys.executable, '-m', 'tests.read_commands', str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout.split()[0]) == len(read_commands.commands()) >= 30


def test_a_wrong_command_is_named(tmp_path):
    """A flag that does not exist, a key that the config lacks and a value that it refuses."""
    for arguments, message in (
        ('--mode=grid --workdir=w --class=3', "Unknown command line flag 'class'"),
        ('--config=configs/ar_b.py --workdir=w --config.ar.widht=3', 'did you mean ar.width?'),
        ('--config=configs/ar_b.py --workdir=w --config.ar.depth=0', 'ar.depth'),
    ):
        code = (
            'from tests import read_commands\n'
            f'read_commands.read("sphere_ar_jax.main", {arguments.split()!r})'
        )
        out = subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert out.returncode == 1 and message in out.stderr.splitlines()[-1]


def test_the_python_of_the_documents_is_whole():
    for name, block in read_commands.blocks('python'):
        assert ast.parse(block).body, name


def test_every_file_that_is_named_is_there():
    """Paths in backticks below the folders of the repository; NAME stands for any name."""
    folders = '(?:sphere_ar_jax|configs|tests|launch|docs)/'
    for document, text in documents():
        for path in re.findall(rf'`({folders}[\w/.]*)`', text):
            assert 'NAME' in path or (ROOT / path).exists(), f'{document} names {path}'
