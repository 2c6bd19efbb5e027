"""Conversion and export on a disk that is full, and in a workdir that is in use."""

import contextlib
import os
import resource

import pytest

from sphere_ar_jax.commands import checkpoints
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError
from tests.conftest import GOLDENS


@contextlib.contextmanager
def _files_up_to(size):
    """A context in which no file gets larger, as `ulimit -f` says it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _convert(workdir):
    checkpoints.convert_checkpoint(str(GOLDENS / 'tiny.pt'), str(workdir), heads=2)


@pytest.mark.slow
def test_without_room_a_conversion_and_an_export_are_one_line_each(tmp_path):
    """With room again, the same commands go through."""
    workdir = tmp_path / 'w'
    with _files_up_to(5000), pytest.raises(UserError, match=r'tokenizer/weights .*too large'):
        _convert(workdir)
    assert not (workdir / 'config.json').exists()
    _convert(workdir)
    exported = workdir / 'model.safetensors'
    exported.write_text('an older one')
    before = sorted(os.listdir(workdir))
    with _files_up_to(5000), pytest.raises((UserError, OSError), match='too large') as caught:
        checkpoints.export_checkpoint(str(workdir))
    assert str(exported) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir(workdir)) == before and exported.read_text() == 'an older one'
    checkpoints.export_checkpoint(str(workdir))
    assert exported.stat().st_size > 5000 and sorted(os.listdir(workdir)) == before


def test_a_workdir_that_is_in_use_is_not_converted_into(tmp_path):
    with files.owned(str(tmp_path), 'a training'):
        with pytest.raises(UserError, match='is in use by a training'):
            _convert(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ['lock', 'lock.json']
