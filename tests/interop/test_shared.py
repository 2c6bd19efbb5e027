"""Safetensors files of any origin: what is not whole, or not a model, is one line."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.interop import shared, torch_names
from sphere_ar_jax.runtime import files, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import state
from tests import tiny_config


@pytest.fixture(scope='module')
def model():
    """(config, stage of the AR model) of the tiny run."""
    cfg = tiny_config.get_config()
    return cfg, tiny_config.stages(cfg)[1]


@pytest.fixture
def directory(model, tmp_path):
    """A directory of shared weights, all of them random."""
    cfg, _ = model
    run = tiny_config.random_run(cfg)
    torch_names.export(tmp_path / shared.WEIGHTS, run.vae, run.vae_params, run.ar_params)
    files.write_json(tmp_path / shared.CONFIG, schema.as_dict(cfg))
    return tmp_path


def _like(stage):
    return state.abstract_state(stage, sharding.make_mesh()).params


def _header(content):
    """(header, data) of a safetensors file: 8 bytes of length, JSON, data."""
    (length,) = struct.unpack('<Q', content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header, data):
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def _first(header):
    return next(name for name in header if name != '__metadata__')


def _out_of_the_file(content):
    header, data = _header(content)
    header[_first(header)]['data_offsets'][1] += 10**12
    return _joined(header, data)


def _of_another_shape(content):
    header, data = _header(content)
    header[_first(header)]['shape'] = [2**40, 2**40]
    return _joined(header, data)


@pytest.mark.parametrize(
    'spoil',
    [
        lambda content: b'',
        lambda content: content[:7],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content + b'more',
        lambda content: b'\xff' * 8 + content[8:],
        lambda content: struct.pack('<Q', 20) + b'[' * 20,
        lambda content: b'<html>404 not found</html>' * 10,
        _out_of_the_file,
        _of_another_shape,
    ],
)
def test_files_that_are_not_whole(model, directory, spoil):
    path = directory / shared.WEIGHTS
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(
        UserError, match=r'model\.safetensors is no whole safetensors file'
    ) as error:
        shared.read(directory, _like(model[1]))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('norm.weight', np.zeros(3, np.float32), 'shape: norm.weight has'),
        (
            'norm.weight',
            np.full(16, np.nan, np.float32),
            'norm.weight has numbers that are not fin',
        ),
        ('norm.weight', np.zeros(16, np.int64), 'norm.weight holds I64, but must hold floats'),
        ('\x1b[2J\nNaN', np.zeros(1, np.float32), 'unexpected: '),
    ],
)
def test_tensors_of_another_model(model, directory, name, value, message):
    tensors = load_file(directory / shared.WEIGHTS)
    save_file(tensors | {name: value}, directory / shared.WEIGHTS)
    with pytest.raises(UserError, match=message) as error:
        shared.read(directory, _like(model[1]))
    assert 'model.safetensors' in str(error.value)
    assert str(error.value).isprintable()


def test_the_number_of_heads_is_noted(model, directory, tmp_path):
    run = tiny_config.random_run(model[0])
    path = tmp_path / 'noted.safetensors'
    torch_names.export(path, run.vae, run.vae_params, run.ar_params, run.ar.heads)
    assert shared.heads(path) == run.ar.heads
    assert shared.heads(directory / shared.WEIGHTS) is None
    save_file(load_file(path), path, metadata={torch_names.AR_HEADS: 'many\n'})
    with pytest.raises(UserError, match=r'notes many.* as its number of heads') as error:
        shared.heads(path)
    assert str(error.value).isprintable()


def test_half_precision_is_read_and_a_tokenizer_alone_has_no_ar_model(model, directory):
    path = directory / shared.WEIGHTS
    tensors = load_file(path)
    dtypes = [ml_dtypes.bfloat16, np.float16, np.float64]
    save_file({n: t.astype(dtypes[i % 3]) for i, (n, t) in enumerate(tensors.items())}, path)
    read = torch_names.to_torch(shared.read(directory, _like(model[1])))
    for name, tensor in read.items():
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor, tensors[name], rtol=1e-2)
    assert shared.has_ar(directory)
    save_file({n: t for n, t in tensors.items() if n.startswith('vae.')}, path)
    assert not shared.has_ar(directory)
    assert shared.read(directory, _like(model[1])) is None
    os.mkdir(directory / 'ar')  # a run of its own
    assert not shared.is_shared(directory)
    with pytest.raises(FileNotFoundError):
        shared.open_file(directory / 'nothing.safetensors')


def test_the_shared_config_builds_the_same_models(model, tmp_path):
    words = tmp_path / 'words.txt'
    words.write_text('cat\n')
    cfg = schema.changed(
        model[0], {'data.path': '/data', 'tokenizer': '/w', 'watch.inception': 'a', 'mesh.data': 3}
    )
    found = shared.config(cfg)
    assert (found.data.path, found.tokenizer, found.watch.inception) == (None, None, None)
    assert found.mesh.data == -1
    assert found.sampling == cfg.sampling
    assert build.build_ar(found) == build.build_ar(cfg)
    assert build.build_vae(found) == build.build_vae(cfg)
    # The tokenizer of a run on captions needs neither their vocabulary nor their table.
    texts = {'ar.condition': 'text', 'ar.vocabulary': str(words), 'data.captions': '/captions.tsv'}
    texts |= {'ar.text_weight': 0.05, 'ar.alone_weight': 0.0}
    found = shared.config(schema.changed(cfg, texts))
    assert (found.ar.condition, found.ar.vocabulary) == ('classes', 'bytes')
    assert (found.ar.text_weight, found.ar.alone_weight) == (None, 1.0)
    assert found.data.captions is None
    assert build.build_vae(found) == build.build_vae(cfg)
    # Latents have no images to train a tokenizer on, which another run did.
    on_latents = {'data.name': 'latents', 'tokenizer': '/w', 'data.flip': False}
    on_latents |= {'data.crop_until': (0, 0)}
    found = shared.config(schema.changed(cfg, on_latents))
    assert found.tokenizer is None
    assert found.tokenizer_training.steps == 0
