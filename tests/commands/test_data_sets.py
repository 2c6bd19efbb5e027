"""Latents: what --mode=encode writes is what a training on the images computes."""

import functools
import json
import shutil

import chex
import jax
import numpy as np
import pytest

from sphere_ar_jax.commands import data_sets, open_run, train
from sphere_ar_jax.commands.inputs import origins, training_images
from sphere_ar_jax.config import beside, checks, packaged, schema
from sphere_ar_jax.data import small, sources
from sphere_ar_jax.data.batches import batches
from sphere_ar_jax.data.files.latents import Latents
from sphere_ar_jax.models.vae import batch_posterior
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training.losses import sample_keys
from sphere_ar_jax.training.run import load_config, load_run
from sphere_ar_jax.training.stages import ar_stage
from sphere_ar_jax.training.state import quickly_compiled
from sphere_ar_jax.training.workdir import is_trained
from tests.conftest import libraries_promote
from tests.fake_images import encode, picture


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Pictures of two classes; one file is cut off."""
    root = tmp_path_factory.mktemp('images')
    for i in range(40):
        place = root / ('cat', 'dog')[i % 2] / f'{i}.jpg'
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encode(picture(i, 24 + i % 5, 30 - i % 7)))
    (root / 'cat' / 'cut.jpg').write_bytes(encode(picture(1))[:300])
    return root


@pytest.fixture(scope='module')
def encoded(old_runs, folder, tmp_path_factory):
    """(the folder's latents by the tokenizer of the old digits, a directory; what was said)."""
    directory = tmp_path_factory.mktemp('latents') / 'out'
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr('builtins.print', lambda *words, **_: said.append(' '.join(map(str, words))))
        data_sets.encode(
            str(old_runs / 'digits'), str(directory), data=f'folder:{folder}', shards=3
        )
    return directory, said


def _config(old_runs, **values):
    """The config of an AR model on the tokenizer of the old digits."""
    cfg = load_config(old_runs / 'digits').copy_and_resolve_references()
    cfg.tokenizer = str(old_runs / 'digits')
    cfg.data.update(flip=False, crop_until=(0, 0), max_broken=0.5, num_classes=None)
    cfg.update_from_flattened_dict(values)
    return cfg


def _on(old_runs, kind, path, **values):
    return checks.check(_config(old_runs, **{'data.name': kind, 'data.path': str(path)}, **values))


def test_what_is_written(old_runs, folder, encoded):
    directory, said = encoded
    source = Latents(directory)
    vae = load_run(old_runs / 'digits', tokenizer_only=True).vae
    chex.assert_shape(source[3]['mu'], (vae.grid[0] * vae.grid[1], vae.latent_dim))
    chex.assert_shape(source[3]['kappa'], source[3]['mu'].shape[:1])
    np.testing.assert_allclose(np.linalg.norm(source[3]['mu'], axis=-1), 1, rtol=1e-5)
    assert source[3]['mu'].dtype == source[3]['kappa'].dtype == np.float32
    assert source[3]['kappa'].min() >= 1
    assert len(source) == 40
    assert source.class_names == ('cat', 'dog')
    assert source.num_classes == 2
    assert [source.name(i) for i in (0, 39)] == ['cat/0.jpg', 'dog/9.jpg']
    assert [int(source[i]['label']) for i in (0, 39)] == [0, 1]
    assert any('cat/cut.jpg is broken' in line for line in said)
    assert said[-2].endswith('latents of 40 images of 2 classes: cat, dog')
    assert said[-1] == 'left out: 1 broken image(s)' == f'left out: {source.left_out}'
    # The same images are held out as of the folder.
    sides = [sources.split(one, 0.3)[1] for one in (source, sources.ImageFolder(folder))]
    names = [{side.name(i) for i in range(len(side))} for side in sides]
    assert names[0] == names[1] - {'cat/cut.jpg'}
    assert len(names[0]) > 3


@pytest.mark.slow
def test_gradients_are_those_of_images(old_runs, folder, encoded, tmp_path):
    """Loss and gradients of one step, with the same order and the same draws.

    The folder is one without the broken file, which a training would replace by another.
    """
    whole = tmp_path / 'whole'
    shutil.copytree(folder, whole)
    (whole / 'cat' / 'cut.jpg').unlink()
    run = load_run(old_runs / 'digits')
    stage = ar_stage(run.ar, run.vae, run.vae_params, run.config.ar_training)
    compute = jax.jit(jax.value_and_grad(stage.loss, has_aux=True), **quickly_compiled())
    found = []
    for kind, path in (('folder', whole), ('latents', encoded[0])):
        data = training_images.open_data(_on(old_runs, kind, path))
        with batches(data.source, batch_size=16, seed=5, **data.reading) as reading:
            batch = next(reading)
        assert ('image' in batch) == (kind == 'folder')
        keys = sample_keys(jax.random.key(7), 3, 16)
        found.append((batch['label'], compute(run.ar_params, run.vae_params, batch, keys)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    (loss, _), gradients = found[0][1]
    assert np.isfinite(loss)
    assert max(map(np.max, jax.tree.leaves(gradients))) > 1e-3
    chex.assert_trees_all_close(found[0][1], found[1][1], rtol=2e-4, atol=1e-6)


def test_posteriors_are_those_of_images(old_runs, folder, encoded):
    """What latents give is what the tokenizer makes of the images, of the same type."""
    run = load_run(old_runs / 'digits', tokenizer_only=True)
    transform = training_images.open_data(_on(old_runs, 'folder', folder)).reading['transform']
    source = sources.ImageFolder(folder)
    kept = [i for i in range(len(source)) if source.name(i) != 'cat/cut.jpg'][:8]
    images = np.stack([transform(source[i], 0, np.random.default_rng(i))['image'] for i in kept])
    posterior = jax.jit(functools.partial(batch_posterior, run.vae), **quickly_compiled())
    of_images = posterior(run.vae_params, {'image': images})
    latents = [Latents(encoded[0])[i] for i in range(8)]
    batch = {name: np.stack([record[name] for record in latents]) for name in latents[0]}
    of_latents = batch_posterior(run.vae, None, batch)
    assert type(of_latents) is type(of_images)
    chex.assert_trees_all_equal_shapes_and_dtypes(of_images, of_latents)
    chex.assert_trees_all_close(of_images, of_latents, rtol=1e-4, atol=1e-5)


def test_small_images_are_those_of_the_runs_classes_and_brightness(old_runs):
    run = load_run(old_runs / 'digits', tokenizer_only=True)
    changes = {'data.classes': (1, 3), 'data.brightness': (0.0, 0.5)}
    run = run._replace(config=schema.changed(run.config, changes))
    source = data_sets._open_images(run.config, run.vae, 'digits', None)
    everything = small.open_data_set('digits', None, run.config.seed, run.config.data.holdout)
    assert source.num_classes == 2
    assert len(source) == np.isin(everything.train.labels, (1, 3)).sum() > 0
    assert max(source[i]['image'].max() for i in range(len(source))) < 0


def test_what_is_held_out_follows_from_the_runs_own_seed(old_runs, tmp_path):
    """Another seed draws other images. It may not change which images the run was trained on."""
    workdir = str(old_runs / 'digits')
    like = schema.changed(load_config(workdir), {'seed': 5})
    run, _ = open_run.open_run(workdir, like)
    assert run.config.seed == 5
    assert beside.for_the_images(load_config(workdir), like).seed == 0
    data_sets.encode(workdir, str(tmp_path / 'out'), like=like)
    train = small.open_data_set('digits', None, 0, run.config.data.holdout).train
    other = small.open_data_set('digits', None, 5, run.config.data.holdout).train
    written = Latents(tmp_path / 'out')
    labels = [int(written[i]['label']) for i in range(len(written))]
    np.testing.assert_array_equal(labels, train.labels)
    assert not np.array_equal(labels, other.labels)


def test_a_tokenizer_that_is_not_finished_is_not_used(old_runs, tmp_path):
    shutil.copytree(old_runs / 'digits', tmp_path / 'w')
    cfg = load_config(tmp_path / 'w').copy_and_resolve_references()
    assert is_trained(tmp_path / 'w', 'tokenizer')
    assert is_trained(tmp_path / 'w', 'ar')
    cfg.tokenizer_training.steps += 1
    files.write_json(tmp_path / 'w' / 'config.json', schema.as_dict(cfg))
    assert not is_trained(tmp_path / 'w', 'tokenizer')
    with pytest.raises(UserError, match='is not trained to its end'):
        data_sets.encode(str(tmp_path / 'w'), str(tmp_path / 'out'))
    mine = schema.changed(_config(old_runs), {'tokenizer': str(tmp_path / 'w')})
    with pytest.raises(UserError, match=r'tokenizer: that in .*/w is not trained to its end: run'):
        origins.check_inputs(mine, None)
    # Also where it is that of a workdir between.
    between = schema.changed(mine, {'tokenizer_training.steps': 0})
    (tmp_path / 'between').mkdir()
    files.write_json(tmp_path / 'between' / 'config.json', schema.as_dict(between))
    assert not is_trained(tmp_path / 'between', 'tokenizer')
    with pytest.raises(UserError, match=r'init_from: .*/w is not finished'):
        origins.check_finished('init_from', str(tmp_path / 'w'))


def _refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_what_latents_cannot_do_is_refused(old_runs, encoded, tmp_path):
    directory, _ = encoded
    for values, message in (
        ({'tokenizer': None}, 'a tokenizer cannot be trained on latents: give --config.tokenizer'),
        ({'data.flip': True}, 'not flipped: give --config.data.flip=False'),
        ({'data.crop_until': (0, 3)}, "--config.data.crop_until='(0, 0)'"),
    ):
        assert message in _refusal(_on, old_runs, 'latents', directory, **values)
    output = str(tmp_path / 'out')
    said = _refusal(data_sets.pack, f'latents:{directory}', output)
    assert 'holds latents, not images' in said
    digits = str(old_runs / 'digits')
    assert said == _refusal(data_sets.encode, digits, output, data=f'latents:{directory}')
    assert 'exists' in _refusal(data_sets.encode, digits, str(directory))
    # Nothing is read before: there are no such images.
    assert 'exists' in _refusal(data_sets.pack, f'imagenet:{tmp_path}/no.tar', str(directory))
    assert 'has no run' in _refusal(data_sets.encode, str(tmp_path), output)


def test_configs_of_latents(old_runs, encoded):
    """Crops and flips are off by themselves, and the images are counted."""
    given = {'tokenizer': str(old_runs / 'digits')}
    for word in ('own', 'ar_b'):
        cfg = packaged.load(f'{word}:data=latents:{encoded[0]}')
        checks.check(schema.changed(cfg, given))
        assert cfg.data.flip is False
        assert cfg.data.crop_until == (0, 0)
    cfg = packaged.load(f'own:data=latents:{encoded[0]}')
    assert 'from 40 images in 2 classes, as counted there' in cfg.reasons[0]


def test_latents_of_another_tokenizer_are_refused(old_runs, encoded, tmp_path):
    directory = tmp_path / 'copy'
    shutil.copytree(encoded[0], directory)
    about = json.loads((directory / 'latents.json').read_text())
    assert len(about['tokenizer']) == 8
    files.write_json(directory / 'latents.json', about | {'tokenizer': '0123abcd'})
    setting, start = train._set_up(_on(old_runs, 'latents', directory), str(tmp_path / 'w'))
    assert 'was encoded with another tokenizer' in _refusal(train._train, setting, start)
    np.save(directory / 'hashes.npy', np.zeros(3, np.uint64))
    assert '3 hashes of 40 records' in _refusal(Latents, directory)
    (directory / 'hashes.npy').unlink()
    assert 'encode it again' in _refusal(Latents, directory)


@pytest.mark.slow
def test_a_run_on_latents(old_runs, encoded, tmp_path):
    """It trains, looks at held-out latents, and ends with samples but without reconstructions."""
    values = {'data.holdout_files': 0.3, 'watch.every': 3, 'watch.classes': 2, 'watch.columns': 4}
    cfg = _on(old_runs, 'latents', encoded[0], **values)
    with libraries_promote():
        metrics = train.train(cfg, str(tmp_path / 'w'), 'command', 0.0)
    assert 'vae/psnr' not in metrics
    assert (tmp_path / 'w' / 'samples.png').exists()
    assert not (tmp_path / 'w' / 'reconstructions.png').exists()
    assert 'was trained on latents' in (tmp_path / 'w' / 'report.html').read_text()
    logged = (tmp_path / 'w' / 'ar' / 'metrics.jsonl').read_text()
    assert 'heldout_loss' in logged
    assert load_run(tmp_path / 'w').ar.condition.num_classes == 2
