"""launch/sphere_ar_colab.ipynb, executed whole.

It runs on digits and on a checkpoint of the public kind.
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


def _read():
    return nbformat.read(NOTEBOOK, as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def test_the_file_is_clean():
    """Valid nbformat 4.5 with ids, no outputs.

    Every name of ours that it uses exists, in branches not run here too.
    """
    notebook = _read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == 'python3'
    assert all(not cell.outputs and cell.execution_count is None for cell in _code(notebook))
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


RUNS = {
    'digits': dict(MODEL='digits', CONFIG='tests/tiny_config.py', SCALES=[1.0, 3.0]),
    'checkpoint': dict(
        CHECKPOINT=str(GOLDENS / 'tiny.pt'), CLASSES=['0', 'goldfish', '7', '9'], SCALES=[1.0, 4.5]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['digits', 'checkpoint'])
def test_it_runs(name, tmp_path, monkeypatch):
    """No cell fails, the pictures are there, and the norms are what the text says."""
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    notebook = _read()
    settings = next(
        i for i, cell in enumerate(notebook.cells) if 'parameters' in cell.metadata.get('tags', ())
    )
    values = RUNS[name] | dict(WORKDIR=str(tmp_path / 'run'))
    source = '\n'.join(f'{key} = {value!r}' for key, value in values.items())
    notebook.cells.insert(settings + 1, nbformat.v4.new_code_cell(source))
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
        assert min(picture.shape) > 200 and max(picture.shape) > 500 and picture.std() > 10, id
        sizes[id] = picture.shape
    assert sizes['grid'] != sizes['scales']
    text = ''.join(output.text for output in outputs('norms'))
    norms = re.findall(r'norms ([\d.]+) to ([\d.]+)', text)
    assert len(norms) == 2
    np.testing.assert_allclose(np.array(norms, float), np.sqrt(8), rtol=1e-5)
    assert (tmp_path / 'run' / 'ar' / 'metrics.jsonl').exists() == (name == 'digits')
