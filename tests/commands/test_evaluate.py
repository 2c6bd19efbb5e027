"""--mode=evaluate: what is opened before anything is computed."""

import numpy as np
import pytest

from sphere_ar_jax.commands import evaluate
from sphere_ar_jax.evaluation.fidelity import inception_weights, protocol
from tests.conftest import libraries_promote


@pytest.mark.parametrize(
    ('files', 'error', 'message'),
    [
        ({'images': 'none.npz'}, OSError, 'none.npz'),
        ({'images': 'real.npz', 'lpips': 'none.pth', 'vgg': 'none.pth'}, ValueError, 'no file'),
    ],
)
def test_a_wrong_path_costs_no_scores(old_runs, tmp_path, monkeypatch, files, error, message):
    """The files of the tokenizer are looked for before the samples are scored."""

    def begin(*arguments, **options):
        raise AssertionError('the scores would begin here')

    monkeypatch.setattr(inception_weights, 'load', lambda path: {})
    monkeypatch.setattr(protocol, 'evaluate', begin)
    np.savez(tmp_path / 'real.npz', arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    given = {name: str(tmp_path / file) for name, file in files.items()}
    with libraries_promote(), pytest.raises(error, match=message):
        evaluate.evaluate(
            str(old_runs / 'digits'), samples='s.npz', reference='r.npz', inception='i.pb', **given
        )
