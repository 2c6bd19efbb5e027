"""Conversion and export on a disk that is full, and in a workdir that is in use; directories to
share, written, uploaded, loaded and converted.
"""

import contextlib
import inspect
import json
import os
import re
import resource
import shutil
import sys
import types

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sphere_ar_jax
from sphere_ar_jax.commands import checkpoints, open_run
from sphere_ar_jax.commands.inputs import origins
from sphere_ar_jax.config import checks, packaged, schema
from sphere_ar_jax.evaluation import model_card
from sphere_ar_jax.interop import shared
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import generation
from sphere_ar_jax.training.run import load_config, load_run
from sphere_ar_jax.training.workdir import claim
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
    assert str(exported) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir(workdir)) == before
    assert exported.read_text() == 'an older one'
    checkpoints.export_checkpoint(str(workdir))
    assert exported.stat().st_size > 5000
    assert sorted(os.listdir(workdir)) == before


def test_a_workdir_that_is_in_use_is_not_converted_into(tmp_path):
    with files.owned(str(tmp_path), 'a training'):
        with pytest.raises(UserError, match='is in use by a training'):
            _convert(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ['lock', 'lock.json']


# ---- directories to share


@pytest.fixture(scope='module')
def run_with_paths(old_runs, tmp_path_factory):
    """The workdir of the old digits' run with names of classes, and paths of its machine."""
    workdir = tmp_path_factory.mktemp('shared') / 'w'
    shutil.copytree(old_runs / 'digits', workdir)
    values = json.loads((workdir / 'config.json').read_text())
    values['data']['data_dir'] = values['watch']['inception'] = '/secret/place'
    (workdir / 'config.json').write_text(json.dumps(values))
    (workdir / 'classes.json').write_text(json.dumps(['nought', 'a|b`c', *map(str, range(8))]))
    return workdir


@pytest.fixture(scope='module')
def directory(run_with_paths):
    """What is exported of it."""
    path = run_with_paths.parent / 'shared'
    checkpoints.export_checkpoint(str(run_with_paths), str(path))
    return path


def test_a_directory_to_share_is_the_run(run_with_paths, directory):
    """Its weights are those of the run bit for bit, under the names that older exports had."""
    assert sorted(os.listdir(directory)) == sorted(shared.FILES)
    names = np.load(GOLDENS / 'old_runs.npz')['digits/export_names'].tolist()
    assert sorted(load_file(directory / 'model.safetensors')) == names
    ours = load_run(str(run_with_paths))
    theirs = load_run(str(directory))
    chex.assert_trees_all_equal(ours.vae_params, theirs.vae_params)
    chex.assert_trees_all_equal(ours.ar_params, theirs.ar_params)
    assert ours.vae == theirs.vae
    assert ours.ar == theirs.ar
    assert ours.config.sampling == theirs.config.sampling
    assert 'secret' not in ''.join((directory / name).read_text() for name in shared.FILES[1:])


def test_a_shared_directory_is_no_workdir_to_train_in(directory):
    """A training would begin anew there, and its stages would hide the shared weights."""
    advice = f'--mode=convert --checkpoint={directory}/model.safetensors'
    with pytest.raises(UserError, match=f'holds shared weights, .*{advice}'):
        claim(load_config(directory), str(directory))
    with pytest.raises(UserError, match=f'init_from: .* holds shared weights: .*{advice}'):
        origins.check_finished('init_from', str(directory))
    assert sorted(os.listdir(directory)) == sorted(shared.FILES)


def test_the_model_card_says_what_the_run_says(run_with_paths, directory):
    card = (directory / 'README.md').read_text()
    head, yaml, body = card.split('---\n', 2)
    assert head == ''
    assert 'library_name: sphere_ar_jax\n' in yaml
    assert '\nlicense:' not in yaml
    metrics = json.loads((run_with_paths / 'metrics.json').read_text())
    found = dict(re.findall(r'^\| `([\w/]+)` \| (\S+) \|', body, re.MULTILINE))
    assert found == {
        name: f'{value:.4g}'
        for name, value in metrics.items()
        if not name.startswith(('wall_s', 'peak_rss_mb'))
    }
    assert '- AR model: 6 steps of 16 images' in body
    assert '`nought, a|bc, 0, ' in body
    assert "sphere_ar_jax.load('hf://USER/NAME')" in body
    assert 'run.sample(' in body


def test_the_card_of_a_fine_tuned_run_names_no_published_weights(run_with_paths):
    run, _ = open_run.open_run(str(run_with_paths))
    done = {'tokenizer': None, 'ar': (6, 16)}
    said = model_card._training(run, None, done)
    assert '- tokenizer: converted weights' in said
    tuned = schema.changed(run.config, {'fine_tuning.init_from': '/w'})
    said = model_card._training(run._replace(config=tuned), None, done)
    assert '- tokenizer: the weights of another run' in said
    assert '- AR model: 6 steps of 16 images' in said


def test_only_scores_of_the_very_weights_are_on_a_card(run_with_paths, tmp_path):
    """Those of `--mode=evaluate` note the weights; those of a training's end are of its end."""
    workdir = tmp_path / 'w'
    shutil.copytree(run_with_paths, workdir)
    run, _ = open_run.open_run(str(workdir))
    crc = generation.parameters_crc(run)
    reference = {'file': '/secret/birds.npz', 'images': 7}
    for parameters, expected in ((crc, {'`fid`': '12.5'}), (crc + 1, {})):
        samples = {'images': 40, 'parameters': parameters}
        scores = {'fid': 12.5, 'samples': samples, 'reference': reference}
        (workdir / 'evaluation.json').write_text(json.dumps(scores))
        card = checkpoints._card(str(workdir), run, None)
        assert dict(re.findall(r'^\| (`fid`) \| (\S+) \|', card, re.MULTILINE)) == expected
        assert ('40 samples against `birds.npz` of 7 images' in card) == (parameters == crc)
        assert ('`samples/accuracy`' in card) != (parameters == crc)
        assert 'secret' not in card
    shutil.rmtree(workdir / 'ar' / 'checkpoints' / '6')  # as if it had been killed before
    card = checkpoints._card(str(workdir), run, None)
    assert 'No scores of these weights are known' in card
    assert '4 steps of 16' in card
    assert 'fine-tuned' not in card
    run.config.fine_tuning.update(init_from='/secret/base', lora_rank=3)
    card = checkpoints._card(str(workdir), run, None)
    assert 'another run, by factors of rank 3' in card
    assert 'secret' not in card


def test_the_card_claims_no_samples_that_were_not_drawn(run_with_paths, tmp_path):
    """A run on image files ends with numbers of its tokenizer alone."""
    workdir = tmp_path / 'w'
    shutil.copytree(run_with_paths, workdir)
    metrics = json.loads((workdir / 'metrics.json').read_text())
    of_tokenizer = {name: value for name, value in metrics.items() if name.startswith('vae/')}
    (workdir / 'metrics.json').write_text(json.dumps(of_tokenizer))
    run, _ = open_run.open_run(str(workdir))
    card = checkpoints._card(str(workdir), run, None)
    assert 'At the end of the training.\n' in card
    assert 'samples of seed' not in card
    sampling = {'num_images': 5, 'solver': 'euler', 'num_steps': 2, 'guidance_scale': None}
    said = model_card._drawn({'seed': 1, 'sampling': sampling})
    assert said == '5 samples of seed 1, solver euler with 2 steps, no guidance.'


def test_the_heads_of_a_file_are_noted_or_said(directory, tmp_path, capsys):
    """A file without a config beside it tells sizes by its tensors, which leave out the heads."""
    alone = tmp_path / 'alone.safetensors'
    shutil.copy(directory / 'model.safetensors', alone)
    heads = load_config(directory).ar.heads
    assert heads != 1
    assert checkpoints._opened(str(alone), True, None)[1].ar.heads == heads
    assert capsys.readouterr().out == ''
    # The config beside a file says it, and is not to be contradicted.
    whole = str(directory / 'model.safetensors')
    assert checkpoints._opened(whole, True, heads)[1].ar.heads == heads
    with pytest.raises(UserError, match=r'--heads is 7, but .*config\.json says \d+: leave it out'):
        checkpoints._opened(whole, True, 7)
    prefixed = {f'module.{name}': tensor for name, tensor in load_file(alone).items()}
    save_file(prefixed, alone)
    assert checkpoints._opened(str(alone), True, heads)[1].ar.heads == heads
    assert capsys.readouterr().out == ''
    assert checkpoints._opened(str(alone), True, None)[1].ar.heads == 1
    said = 'attention heads: 1, the width over 64, since shapes do not tell; --heads=N'
    assert said in capsys.readouterr().out


def test_files_that_are_no_whole_model_are_one_line(directory, tmp_path):
    for name in ('model-00001-of-00002.safetensors', 'model.safetensors.index.json'):
        with pytest.raises(UserError, match=f'{name} is a part of several: join them'):
            checkpoints._opened(str(tmp_path / name), True, None)
    shutil.copy(directory / 'model.safetensors', tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "vit"}')
    with pytest.raises(
        UserError, match=r'config\.json: .*; if it is no config of this model, move it'
    ):
        checkpoints._opened(str(tmp_path / 'model.safetensors'), True, None)


@pytest.mark.slow
def test_shared_weights_draw_the_images_of_the_run(run_with_paths, directory):
    images = [sphere_ar_jax.load(path).sample([3, 1]) for path in (run_with_paths, directory)]
    assert images[0].shape == (2, 16, 16, 1)
    np.testing.assert_array_equal(*images)
    assert sphere_ar_jax.load(directory).class_names[0] == 'nought'


@pytest.mark.slow
def test_a_shared_file_is_converted(directory, tmp_path, capsys):
    """With the config beside it, as a run that can be trained on; without, by its shapes."""
    source = str(directory / 'model.safetensors')
    checkpoints.convert_checkpoint(source, str(tmp_path / 'w'))
    assert 'the model of its config.json, ' in capsys.readouterr().out
    chex.assert_trees_all_equal(
        load_run(str(tmp_path / 'w')).ar_params, load_run(str(directory)).ar_params
    )
    assert (tmp_path / 'w' / 'classes.json').exists()
    shutil.copy(source, tmp_path / 'a.safetensors')
    checkpoints.convert_checkpoint(str(tmp_path / 'a.safetensors'), str(tmp_path / 'v'), heads=2)
    cfg = load_config(str(tmp_path / 'v'))
    assert cfg.ar.depth == 1
    assert cfg.data.num_classes == 10


def test_where_a_directory_may_be_written(run_with_paths, directory, tmp_path):
    """Never over a run; a model card that was changed by hand stays."""
    run = str(run_with_paths)
    (tmp_path / 'file').write_text('')
    for output, push, message in (
        (run, None, 'holds another config.json: give another --output'),
        (str(tmp_path / 'file'), None, r'give a directory, or FILE\.safetensors'),
        (str(tmp_path / 'a.pt'), None, r'give a directory, or FILE\.safetensors'),
        ('gs://bucket/a', None, 'give a directory of this machine'),
        (str(tmp_path / 'a.safetensors'), 'me/a', '--push uploads a directory'),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.export_checkpoint(run, output, push)
    assert os.listdir(tmp_path) == ['file']
    shutil.copytree(directory, tmp_path / 'd')
    (tmp_path / 'd' / 'classes.json').write_text('["other"]')
    (tmp_path / 'd' / 'README.md').write_text('license: mit')
    (tmp_path / 'd' / 'model.safetensors').write_bytes(b'')
    checkpoints.export_checkpoint(run, str(tmp_path / 'd'))
    assert (tmp_path / 'd' / 'README.md').read_text() == 'license: mit'
    assert (tmp_path / 'd' / 'model.safetensors').stat().st_size > 0
    names = json.loads((tmp_path / 'd' / 'classes.json').read_text())
    assert names == json.loads((run_with_paths / 'classes.json').read_text())


def test_a_distilled_head_is_not_exported(old_runs, tmp_path):
    """It would leave a tokenizer alone, in the place of the run."""
    for output in ('d', 'a.safetensors'):
        with pytest.raises(UserError, match=r'has a distilled head, .* from, .*/digits$'):
            checkpoints.export_checkpoint(str(old_runs / 'distilled'), str(tmp_path / output))
    assert os.listdir(tmp_path) == []


def test_the_tokenizer_of_captioned_images_can_be_shared():
    """Its config names data that a model of classes may have."""
    own = checks.check(packaged.load('composed:smoke'))
    found = shared.config(own)
    assert found.data.name == 'folder'
    assert found.ar.condition == 'classes'
    assert found.vae == own.vae


class _FakeHub(types.ModuleType):
    """What is used of huggingface_hub: a repository is a directory below `root`."""

    errors = types.SimpleNamespace(HfHubHTTPError=type('HfHubHTTPError', (OSError,), {}))

    def __init__(self, root, token):
        super().__init__('huggingface_hub')
        self._root = root
        self._token = token

    def get_token(self):
        return self._token

    def HfApi(self):
        return self

    def create_repo(self, name, exist_ok):
        if name.startswith('other/'):
            raise self.errors.HfHubHTTPError('403 Forbidden\nYou may not')
        if name.startswith('far/'):
            raise Exception('[Errno 111] Connection refused')  # as httpx's errors, no OSError
        (self._root / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        for name in set(os.listdir(folder_path)) & set(allow_patterns):
            shutil.copy(os.path.join(folder_path, name), self._root / repo_id / name)

    def snapshot_download(self, name, allow_patterns):
        assert set(allow_patterns) == set(shared.FILES)
        if not (self._root / name).is_dir():
            raise self.errors.HfHubHTTPError('404 Client Error\nmore')
        return str(self._root / name)


def test_the_fake_hub_takes_what_the_real_one_takes():
    """Each call of the fake's kind fits the signature of huggingface_hub's own function."""
    hub = pytest.importorskip('huggingface_hub')
    for function, given, options in (
        (hub.HfApi().create_repo, ['me/a'], ['exist_ok']),
        (hub.HfApi().upload_folder, [], ['repo_id', 'folder_path', 'allow_patterns']),
        (hub.snapshot_download, ['me/a'], ['allow_patterns']),
        (hub.get_token, [], []),
    ):
        inspect.signature(function).bind(*given, **dict.fromkeys(options))
    assert issubclass(hub.errors.HfHubHTTPError, OSError)


def test_push_and_load_from_the_hub(run_with_paths, directory, tmp_path, monkeypatch):
    hub = tmp_path / 'hub'
    monkeypatch.setitem(sys.modules, 'huggingface_hub', _FakeHub(hub, 'a token'))
    shutil.copytree(run_with_paths, tmp_path / 'w')
    checkpoints.export_checkpoint(str(tmp_path / 'w'), push='me/my-digits')
    card = (hub / 'me' / 'my-digits' / 'README.md').read_text()
    assert '# my-digits\n' in card
    assert "load('hf://me/my-digits')\n" in card
    assert sorted(os.listdir(hub / 'me' / 'my-digits')) == sorted(shared.FILES)
    run = sphere_ar_jax.load('hf://me/my-digits')
    assert run.class_names[0] == 'nought'
    assert run.num_tokens == 16
    fetched = hub / 'me' / 'my-digits' / 'model.safetensors'
    assert fetched.read_bytes() == (directory / 'model.safetensors').read_bytes()
    assert checkpoints._local('hf://me/my-digits/model.safetensors') == str(fetched)
    (hub / 'me' / 'empty').mkdir()
    for name, message in (
        ('me/empty', 'has no model.safetensors with a config.json'),
        ('me/nothing', '404 Client Error$'),
    ):
        with pytest.raises(UserError, match=message):
            sphere_ar_jax.load(f'hf://{name}')


def test_what_push_refuses(run_with_paths, tmp_path, monkeypatch):
    """Before anything is written where there is no token, no package or no name."""
    run = str(run_with_paths)
    output = tmp_path / 'd'
    for hub, push, message in (
        (None, 'me/a', '--push needs another package: pip install huggingface_hub'),
        (_FakeHub(tmp_path, None), 'me/a', 'needs a token of Hugging Face: set HF_TOKEN'),
        (_FakeHub(tmp_path, 'a token'), 'me', '--push is me, but must be USER/NAME'),
    ):
        monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
        with pytest.raises(UserError, match=message):
            checkpoints.export_checkpoint(run, str(output), push)
        assert not output.exists()
    with pytest.raises(UserError, match=r'^--push=other/a: 403 Forbidden; .*/d is written$'):
        checkpoints.export_checkpoint(run, str(output), 'other/a')
    assert output.exists()
    with pytest.raises(UserError, match=r'^--push=far/a: .* Connection refused; .*/d is written$'):
        checkpoints.export_checkpoint(run, str(output), 'far/a')
