"""The notebooks of launch/, executed whole.

sphere_ar_colab.ipynb runs on digits and on a checkpoint of the public kind, and
fine_tune_on_a_folder.ipynb on the folders that it makes.
"""

import ast
import base64
import importlib
import io
import re

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from tests.conftest import GOLDENS

ROOT = GOLDENS.parent.parent
NOTEBOOK = ROOT / 'launch' / 'sphere_ar_colab.ipynb'
FINE_TUNING = ROOT / 'launch' / 'fine_tune_on_a_folder.ipynb'
# Appended: what the notebook draws without N_R is, once projected, what the sampler draws from the
# same noise.
AGREES = """
from sphere_ar_jax.flow import plan
from sphere_ar_jax.sampling import tokens
from sphere_ar_jax.sphere import geometry
apart = False if s.guidance == 'linear' else None
options = plan.Options(solver='euler', num_steps=STEPS, guidance=s.guidance, \
first_token_apart=apart)
first, rest = np.asarray(noise[None, :, 0]), np.asarray(noise[:, 1:]).swapaxes(0, 1)[:, None]
z = tokens.sample_tokens(
    run.ar, run.ar_params, labels, None, options, 3.0, \
noise=(np.concatenate([first, first], axis=1), rest)
)
x = unprojected(run.ar_params, labels, z, noise, 3.0)
assert np.abs(np.linalg.norm(x, axis=-1) - np.sqrt(d)).max() > 0.01
np.testing.assert_allclose(geometry.project(x), z, atol=1e-4)
"""


def _read(path=NOTEBOOK):
    return nbformat.read(path, as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


@pytest.mark.parametrize('path', [NOTEBOOK, FINE_TUNING])
def test_the_file_is_whole(path):
    """Valid nbformat 4.5 with ids. Its outputs are kept, as it was run from top to bottom: no
    error, and a picture at least.
    """
    notebook = _read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == 'python3'
    cells = _code(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == 'error']
    assert any('image/png' in output.get('data', {}) for output in outputs)
    assert path.stat().st_size < 1e6


def test_the_names_of_ours_exist():
    """Those that the notebook uses, in branches not run here too."""
    notebook = _read()
    tree = ast.parse('\n'.join(cell.source for cell in _code(notebook)))
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith('sphere_ar_jax'):
            package = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(package, alias.name):
                    importlib.import_module(f'{node.module}.{alias.name}')
                imported[alias.name] = getattr(package, alias.name)
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in imported
    }
    assert {('train', 'train'), ('checkpoints', 'convert_checkpoint')} <= used
    assert set(imported) <= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name, attribute in used:
        assert hasattr(imported[name], attribute), f'{name}.{attribute}'
        assert not attribute.startswith('_'), f'{name}.{attribute} is private'


def _with_settings(path, values):
    """A notebook with a cell behind its settings that sets some of them to other values."""
    notebook = _read(path)
    settings = next(
        i for i, cell in enumerate(notebook.cells) if 'parameters' in cell.metadata.get('tags', ())
    )
    source = '\n'.join(f'{key} = {value!r}' for key, value in values.items())
    notebook.cells.insert(settings + 1, nbformat.v4.new_code_cell(source))
    return notebook


RUNS = {
    'digits': dict(MODEL='digits', COLUMNS=4, CONFIG='tests/tiny_config.py', SCALES=[1.0, 3.0]),
    'checkpoint': dict(
        MODEL='B',
        COLUMNS=4,
        CHECKPOINT=str(GOLDENS / 'tiny.pt'),
        CLASSES=['0', 'goldfish', '7', '9'],
        SCALES=[1.0, 4.5],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['digits', 'checkpoint'])
def test_it_runs(name, tmp_path, monkeypatch):
    """No cell fails, the pictures are there, and the norms are what the text says."""
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    notebook = _with_settings(NOTEBOOK, RUNS[name] | dict(WORKDIR=str(tmp_path / 'run')))
    if name == 'checkpoint':
        notebook.cells.append(nbformat.v4.new_code_cell(AGREES))
    # The directory is not the checkout: the package must be found from anywhere.
    resources = {'metadata': {'path': str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name='python3', resources=resources
    ).execute()

    cells = {cell.id: cell for cell in notebook.cells}

    def outputs(id):
        return cells[id].outputs

    sizes = {}
    for id in ('grid', 'scales', 'plot'):
        (png,) = [
            output.data['image/png']
            for output in outputs(id)
            if output.output_type == 'display_data'
        ]
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('L'))
        assert min(picture.shape) > 200, id
        assert max(picture.shape) > 500, id
        assert picture.std() > 10, id
        sizes[id] = picture.shape
    assert sizes['grid'] != sizes['scales']
    text = ''.join(output.text for output in outputs('norms'))
    norms = re.findall(r'norms ([\d.]+) to ([\d.]+)', text)
    assert len(norms) == 2
    np.testing.assert_allclose(np.array(norms, float), np.sqrt(8), rtol=1e-5)
    assert (tmp_path / 'run' / 'ar' / 'metrics.jsonl').exists() == (name == 'digits')


@pytest.mark.slow
def test_the_fine_tuning_runs(tmp_path, monkeypatch):
    """The second run begins with the weights of the first and knows the classes of its folder."""
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    notebook = _with_settings(FINE_TUNING, dict(HOME=str(tmp_path / 'home')))
    resources = {'metadata': {'path': str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name='python3', resources=resources
    ).execute()
    cells = {cell.id: cell for cell in notebook.cells}
    assert "('eight', 'nine')" in ''.join(
        output.get('text', '') for output in cells['look'].outputs
    )
    said = ''.join(output.text for output in cells['tune'].outputs)
    assert '2 begin with the mean of the old ones' in said
    tuned = tmp_path / 'home' / 'fine_tuned'
    assert (tuned / 'ar' / 'weights').exists()
    assert (tuned / 'report.html').exists()
