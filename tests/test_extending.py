"""Every line of docs/extending.md runs: parts from outside the package, trained and sampled by its
loop and sampler.
"""

import pathlib
import re

import chex
import numpy as np
import pytest

from sphere_ar_jax.models.posteriors import PowerSpherical
from sphere_ar_jax.runtime import metric_writer
from tests.conftest import libraries_promote

pytestmark = pytest.mark.slow  # half a minute
PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'extending.md'


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """The names that the page's Python defines, once it has run, and the directory that it trained
    in.
    """
    workdir = tmp_path_factory.mktemp('extending')
    names = {'WORKDIR': str(workdir), '__name__': 'extending'}
    with libraries_promote():
        for block in re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S):
            exec(compile(block, str(PAGE), 'exec'), names)
    return names, workdir


def test_both_stages_were_trained(page):
    names, workdir = page
    for stage, scalar in (('tokenizer', 'std'), ('ar', 'token_norm')):
        lines = metric_writer.read_scalars(f'{workdir}/{stage}/metrics.jsonl')
        assert [line['step'] for line in lines] == [5, 10]
        assert np.isfinite(lines[-1][scalar])
        assert lines[-1]['loss'] < lines[0]['loss']
    assert int(names['state'].step) == 10


def test_images_were_drawn_by_the_parts(page):
    names, _ = page
    chex.assert_shape(names['images'], (6, 16, 16, 1))
    chex.assert_shape(names['drawn'].z, (6, 16, 8))
    chex.assert_tree_all_finite((names['images'], names['drawn']))
    norms = np.linalg.norm(names['drawn'].z, axis=-1)
    assert norms.std() > 0.1  # the Gaussian posterior's tokens are not on a sphere
    on_sphere = PowerSpherical().project(names['drawn'].z)
    np.testing.assert_allclose(np.linalg.norm(on_sphere, axis=-1), 8**0.5, rtol=1e-5)


def test_labels_that_the_condition_refuses(page):
    names, _ = page
    with pytest.raises(ValueError, match='labels must lie between 0 and 9'):
        names['draw_images'](names['models'], names['sampler'], [3, 10], seed=0)
