"""What README and docs/ show: their commands and their Python."""

import ast
import io
import os
import pathlib
import re
import subprocess
import sys

import chex
import numpy as np
import pytest
from PIL import Image

from sphere_ar_jax.data import sources
from tests import read_commands
from tests.words import ROOT, documents


@pytest.mark.slow
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


@pytest.mark.slow
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
        assert out.returncode == 1
        assert message in out.stderr.splitlines()[-1]


def _run(words, place, tmp_path, changes=()):
    """Runs the one block of commands that has certain words, with a directory below `place`.

    `changes` are pairs (text, what the test has in its place).
    """
    (block,) = [text for _, text in read_commands.blocks('bash') if words in text]
    for old, new in changes:
        assert old in block
        block = block.replace(old, new)
    programs = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
    return subprocess.run(
        ['bash', '-euc', block.replace(place, f'{tmp_path}/')],
        cwd=ROOT,
        env=os.environ | {'PATH': programs, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.slow
def test_a_small_imagenet_from_the_tar_to_samples(tmp_path):
    """The commands of docs/imagenet.md, as they stand there."""
    done = _run('stand_in /tmp', '/tmp/', tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'are broken' not in done.stdout
    assert '5 classes: n01' in done.stdout
    for name in ('vae_smoke', 'ar_smoke'):
        assert (tmp_path / name / 'report.html').exists()
    samples = np.load(tmp_path / 'ar_smoke' / 'samples.npz')
    chex.assert_shape(samples['arr_0'], (16, 64, 64, 3))
    chex.assert_shape(samples['arr_1'], (16,))
    assert samples['arr_0'].dtype == np.uint8
    assert samples['arr_0'].std() > 1


@pytest.mark.slow
def test_images_of_ones_own_are_packed(tmp_path):
    """The command of docs/own_images.md; the files hold every image with its class."""
    colours = {'owl': (200, 0, 0), 'wren': (0, 0, 200)}
    for name, colour in colours.items():
        (tmp_path / 'birds' / name).mkdir(parents=True)
        Image.new('RGB', (40, 50), colour).save(tmp_path / 'birds' / name / '1.png')
    done = _run('--mode=pack', '/data/', tmp_path)
    assert done.returncode == 0, done.stderr
    packed = sources.open_source('array_records', str(tmp_path / 'birds_packed'))
    assert list(packed.class_names) == list(colours)
    assert len(packed) == 2
    for i in range(2):
        record = packed[i]
        image = Image.open(io.BytesIO(record['image']))
        assert image.size == (40, 50)
        assert image.getpixel((0, 0)) == colours[packed.class_names[record['label']]]


@pytest.mark.slow
def test_eight_digits_then_ten(tmp_path):
    """The commands and the Python of docs/fine_tuning.md, with the smallest models in few steps."""
    smallest = (('configs/digits.py', 'tests/tiny_config.py'), ('=150', '=4'), ('=15 ', '=1 '))
    done = _run('/tmp/ten_by_factors', '/tmp/', tmp_path, smallest)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('8 of 10 classes keep theirs') == 2
    (block,) = [text for name, text in read_commands.blocks('python') if 'fine_tuning' in name]
    for name in ('ten', 'ten_by_factors'):
        found = {}
        fewer = block.replace('np.arange(1000)', 'np.arange(40)')
        assert fewer != block
        exec(fewer.replace('/tmp/ten', str(tmp_path / name)), found)
        chex.assert_shape(found['images'], (40, 16, 16, 1))
        assert np.isfinite(found['images']).all()
        assert found['right'].dtype == bool


def test_the_python_of_the_documents_is_whole():
    for name, block in read_commands.blocks('python'):
        assert ast.parse(block).body, name


def test_every_file_that_is_named_is_there():
    """Paths in backticks below the folders of the repository; NAME stands for any name."""
    folders = '(?:sphere_ar_jax|configs|tests|launch|docs)/'
    for document, text in documents():
        for path in re.findall(rf'`({folders}[\w/.]*)`', text):
            assert 'NAME' in path or (ROOT / path).exists(), f'{document} names {path}'
