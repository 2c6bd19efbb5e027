"""Looks at a model while it is trained."""

from unittest import mock

import numpy as np
import pytest

from sphere_ar_jax.evaluation import snapshots
from sphere_ar_jax.sampling import on_mesh


@pytest.fixture
def not_finite():
    return on_mesh.NonFiniteSamples([0, 1], 0, 2)


def _said(capsys):
    """The only line on stderr; nothing is on stdout."""
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ''
    return line


def test_samples_that_are_not_finite_do_not_end_the_training(
    tmp_path, capsys, monkeypatch, not_finite
):
    monkeypatch.setattr(snapshots, '_draw_grid', mock.Mock(side_effect=not_finite))
    writer = mock.Mock()
    snapshots.look_at_samples(mock.Mock(), {}, {}, str(tmp_path), 40, writer)
    line = _said(capsys)
    assert line.startswith('step 40: no picture, 2 of the images 0 to 1 are not finite')
    assert not list(tmp_path.iterdir()) and not writer.mock_calls


def test_reconstructions_that_are_not_finite_do_not_end_the_training(
    tmp_path, capsys, monkeypatch, not_finite
):
    monkeypatch.setattr(on_mesh, 'reconstruct', mock.Mock(side_effect=not_finite))
    writer = mock.Mock()
    setting = mock.Mock(workdir=str(tmp_path))
    images = np.zeros((2, 4, 4, 1), np.float32)
    snapshots.look_at_reconstructions(setting, {}, images, 40, writer)
    assert _said(capsys).startswith('step 40: no picture, 2 of the images 0 to 1')
    assert not list(tmp_path.iterdir()) and not writer.mock_calls
