"""Training on image files, from the tar to the report, with the smallest models; and what is
refused.

What trains on the tar is slow: each run compiles the tokenizer, the discriminator and the sampler.
"""

import errno
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
import types

import chex
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from sphere_ar_jax import main
from sphere_ar_jax.commands import data_sets, evaluate, host_checks, open_run, train
from sphere_ar_jax.commands.inputs import agreement, origins, training_images
from sphere_ar_jax.config import build, checks, own, packaged, schema
from sphere_ar_jax.data import augment, sources, stand_in
from sphere_ar_jax.data import batches as data_batches
from sphere_ar_jax.evaluation import snapshots
from sphere_ar_jax.evaluation.fidelity import inception, protocol, statistics
from sphere_ar_jax.runtime import checkpoint, console, files, metric_writer, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import adversarial, loop, state
from sphere_ar_jax.training.run import Run, load_config, load_run
from sphere_ar_jax.training.stages import ar_stage
from sphere_ar_jax.training.state import TrainState
from sphere_ar_jax.training.workdir import claim
from tests import tiny_config
from tests.conftest import libraries_promote, noted_fingerprint
from tests.data.test_idx import write

ROOT = pathlib.Path(__file__).parents[2]
SYNSETS = ('n01440764', 'n01443537', 'n02099601')


@pytest.fixture(scope='module')
def tar(tmp_path_factory):
    path = tmp_path_factory.mktemp('tar') / 'ILSVRC2012_img_train.tar'
    stand_in.write_tar(str(path), SYNSETS, 8, seed=0, broken=1)
    return path


def _config(tar, **options):
    """32×32 pixels, 8×8 tokens."""
    c = schema.default()
    c.data.update(name='imagenet', path=str(tar), max_broken=0.5, threads=2)
    c.vae.update(
        grid=(8, 8),
        latent_dim=8,
        stem=4,
        channels=(4, 8, 16),
        encoder_depth=1,
        decoder_depth=1,
        heads=2,
    )
    c.ar.update(
        depth=1, heads=2, width=16, head_depth=2, head_width=16, head_groups=1, class_tokens=2
    )
    steps = dict(
        steps=4, batch_size=8, warmup_steps=0, log_every=2, checkpoint_every=2, learning_rate=1e-3
    )
    c.tokenizer_training.update(steps, perceptual_weight=0.0, disc_start=2)
    c.ar_training.update(steps, ema_decay=0.9, copies=2, more_ema_decays=(0.5,))
    c.sampling.update(
        num_images=8, batch_size=8, num_steps=2, guidance='linear', guidance_scale=1.5
    )
    c.watch.update(every=2, classes=3, columns=2)
    c.update_from_flattened_dict(options)
    return checks.check(c)


def _train(cfg, workdir):
    with libraries_promote(), tiny_config.narrow_patchgan():
        return train.train(cfg, str(workdir), 'the command', time.perf_counter())


@pytest.fixture(scope='module')
def tokenizer(tar, tmp_path_factory):
    """Workdir of a tokenizer trained against a discriminator, and its metrics."""
    workdir = tmp_path_factory.mktemp('tokenizer') / 'w'
    return workdir, _train(_config(tar, **{'ar_training.steps': 0}), workdir)


@pytest.fixture(scope='module')
def trained(tar, tokenizer, tmp_path_factory):
    """Workdir of an AR model on that tokenizer."""
    workdir = tmp_path_factory.mktemp('ar') / 'w'
    options = {'tokenizer_training.steps': 0, 'tokenizer': str(tokenizer[0])}
    return workdir, _train(_config(tar, **options), workdir)


def _size(path):
    return Image.open(path).size


@pytest.mark.slow
def test_a_tokenizer_alone(tokenizer):
    workdir, metrics = tokenizer
    lines = metric_writer.read_scalars(f'{workdir}/tokenizer/metrics.jsonl')
    assert [line['step'] for line in lines] == [2, 4]
    for name in (
        'discriminator',
        'adversarial',
        'logits_real',
        'spread_mean',
        'dead_share',
        'disc_grad_norm',
    ):
        assert np.isfinite(lines[-1][name]), name
    assert lines[0]['disc_grad_norm'] > 0  # the mean over steps 1, where its weight is 0, and 2
    assert 0 < metrics['vae/psnr'] < 40
    page = (workdir / 'report.html').read_text()
    assert page.count('<img') == 2
    assert 'Samples' not in page
    for step in (2, 4):
        width, height = _size(workdir / 'tokenizer' / f'reconstructions_{step:07d}.png')
        assert width > 8 * 32
        assert height > 4 * 32
    assert not (workdir / 'ar').exists()


@pytest.mark.slow
def test_an_ar_model_on_it(tar, tokenizer, trained):
    workdir, _ = trained
    assert not (workdir / 'tokenizer').exists()
    run = load_run(str(workdir))
    alone = load_run(str(tokenizer[0]), tokenizer_only=True)
    chex.assert_trees_all_equal(run.vae_params, alone.vae_params)
    assert run.ar.condition.num_classes == 1000
    page = (workdir / 'report.html').read_text()
    assert page.count('<img') == 3
    first, last = (
        np.asarray(Image.open(workdir / 'ar' / f'samples_{step:07d}.png')) for step in (2, 4)
    )
    assert first.shape == last.shape
    assert min(first.shape[:2]) > 2 * 128
    assert not np.array_equal(first, last)
    assert list((workdir / 'ar').glob('events.out.tfevents.*'))


@pytest.mark.slow
def test_the_ema_to_sample_with(trained):
    workdir, _ = trained
    cfg = load_config(str(workdir))
    slow = cfg.copy_and_resolve_references()
    fast = cfg.copy_and_resolve_references()
    slow.sampling.ema_decay = 0.9
    fast.sampling.ema_decay = 0.5
    of = [load_run(str(workdir), cfg=c).ar_params for c in (cfg, slow, fast)]
    plain = cfg.copy_and_resolve_references()
    plain.sampling.ema_decay = 0.0
    weights = load_run(str(workdir), cfg=plain).ar_params
    others = [jax.tree.map(lambda a, b: float(np.abs(a - b).max()), weights, o) for o in of[1:]]
    assert min(max(jax.tree.leaves(tree)) for tree in others) > 1e-5
    chex.assert_trees_all_equal(of[0], of[1])
    away = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), of[1], of[2])
    assert max(jax.tree.leaves(away)) > 1e-5


@pytest.mark.slow
def test_another_tokenizer_is_refused(tar, tokenizer, trained, tmp_path):
    """For sampling and for training on: the same config, other weights."""
    other = tiny_config.random_tokenizer(_config(tar), tmp_path / 'other')
    workdir = tmp_path / 'w'
    shutil.copytree(trained[0], workdir)
    settings = json.loads((workdir / 'config.json').read_text())
    (workdir / 'config.json').write_text(json.dumps(settings | {'tokenizer': str(other)}))
    with pytest.raises(UserError, match=f'{workdir}/ar was trained on another tokenizer'):
        load_run(str(workdir))
    options = {'tokenizer_training.steps': 0, 'tokenizer': str(other), 'ar_training.log_every': 1}
    with pytest.raises(UserError, match='was trained on another tokenizer'):
        _train(_config(tar, **options), workdir)
    # A finished run is left as it was.
    finished = trained[0] / 'config.json'
    before = finished.read_text()
    with pytest.raises(UserError, match='was trained on another tokenizer'):
        _train(_config(tar, **options), trained[0])
    for changes, message in (
        ({'tokenizer': None, 'tokenizer_training.steps': 2}, 'give --config.tokenizer=DIR, where'),
        ({'tokenizer': str(trained[0])}, 'is this --workdir: give another --workdir'),
    ):
        with pytest.raises(UserError, match=message):
            _train(_config(tar, **options | changes), trained[0])
    assert finished.read_text() == before
    assert not (trained[0] / 'tokenizer').exists()
    moved = tmp_path / 'moved'
    shutil.copytree(tokenizer[0], moved)
    _train(_config(tar, **options | {'tokenizer': str(moved)}), trained[0])
    assert load_config(str(trained[0])).tokenizer == str(moved)


def test_a_model_on_a_tokenizer_of_its_own_keeps_it(tar, tmp_path):
    tokenizer = tiny_config.random_tokenizer(_config(tar), tmp_path / 'tokenizer')
    workdir = tmp_path / 'w'
    workdir.mkdir()
    claim(_config(tar), str(workdir))
    saved = checkpoint.Checkpoints(workdir / 'ar' / 'checkpoints')
    saved.save(2, {'a': np.ones(2)}, {}, 0.0)
    saved.close()
    before = (workdir / 'config.json').read_text()
    with pytest.raises(UserError, match=r'begun on a tokenizer of its own: leave --config\.tokeni'):
        _train(_config(tar, tokenizer=tokenizer), workdir)
    assert (workdir / 'config.json').read_text() == before


def test_only_what_is_trained_must_split(tmp_path):
    """A tokenizer that is given has no batches."""
    cfg = checks.check(_config('', **{'tokenizer_training.batch_size': 7}))
    mesh = sharding.make_mesh(devices=[jax.devices()[0]] * 2)
    with pytest.raises(UserError, match=r'tokenizer_training\.batch_size: 7 images'):
        train._check_parts(cfg, str(tmp_path), mesh)
    with pytest.raises(UserError, match='tokenizer: there is no run in /none'):
        train._check_parts(schema.changed(cfg, {'tokenizer': '/none'}), str(tmp_path), mesh)


def test_weights_that_were_taken_are_no_tokenizer(tmp_path, monkeypatch):
    """A fine-tuning on a tokenizer elsewhere takes none, and none is made up in its place."""
    changes = {'fine_tuning.init_from': '/gone', 'tokenizer_training.steps': 0}
    cfg = checks.check(_config('', **changes))
    monkeypatch.setattr(origins.transfer, 'is_done', lambda workdir: True)
    with pytest.raises(UserError, match=r'give --config\.tokenizer=DIR, the workdir of a trained'):
        origins.check_inputs(cfg, str(tmp_path))
    (tmp_path / 'tokenizer' / 'weights').mkdir(parents=True)
    assert origins.check_inputs(cfg, str(tmp_path)) == []


@pytest.mark.slow
def test_fid_while_training(tar, tokenizer, tmp_path, monkeypatch):
    """It is that of as many samples as wished, with the EMA.

    The network is replaced by the colours of four places.
    """
    seen = []

    def extract(batches, network, *, batch_size, mesh):
        images = np.concatenate(list(batches))
        seen.append(images)
        return inception.Features(
            images[:, ::16, ::16].reshape(len(images), -1).astype(np.float32), None, None
        )

    reference = statistics.statistics(np.random.default_rng(0).uniform(0, 255, (50, 12)))
    monkeypatch.setattr(protocol, 'extract', extract)
    monkeypatch.setattr(train, '_judge', lambda cfg: (None, reference))
    cfg = _config(tar, **{'tokenizer_training.steps': 0, 'tokenizer': str(tokenizer[0])})
    cfg.watch.update(fid_images=20, inception='weights', reference='reference')
    _train(checks.check(cfg), tmp_path / 'w')
    lines = [
        line
        for line in metric_writer.read_scalars(f'{tmp_path}/w/ar/metrics.jsonl')
        if 'fid' in line
    ]
    assert [line['step'] for line in lines] == [2, 4]
    assert [images.shape for images in seen] == [(20, 32, 32, 3)] * 2
    of_last = statistics.statistics(seen[1][:, ::16, ::16].reshape(20, -1).astype(np.float32))
    np.testing.assert_allclose(
        lines[1]['fid'], statistics.frechet_distance(*of_last, *reference), rtol=1e-6
    )


WRONG = {
    'no path': ({'data.path': None}, 'give --config.data.path'),
    'no such tar': ({'data.path': '/nowhere/x.tar'}, '/nowhere/x.tar'),
    'too many classes': ({'data.num_classes': 2}, 'has 3 classes, but the model 2'),
    'no LPIPS': (
        {'tokenizer_training.perceptual_weight': 1.0},
        r'vgg\.pth.*vgg16-397923af\.pth.*perceptual_weight=0',
    ),
    'no tokenizer': ({'tokenizer_training.steps': 0}, r'give --config\.tokenizer=DIR'),
    'not a run': (
        {'tokenizer_training.steps': 0, 'tokenizer': '/nowhere'},
        '^tokenizer: there is no run in /nowhere$',
    ),
}


@pytest.mark.parametrize('name', WRONG)
def test_one_line_and_the_workdir_stays_free(tar, tmp_path, name):
    options, message = WRONG[name]
    cfg = _config(tar)
    with cfg.ignore_type():
        cfg.update_from_flattened_dict(options)
    with pytest.raises(console.UserError, match=message) as error:
        _train(cfg, tmp_path / 'w')
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'w' / 'config.json').exists()


def test_the_classes_of_a_folder(tmp_path):
    """A model gets as many classes as there are directories, unless the config says more.

    config.json says how many.
    """
    for name, colour in (('a', 'red'), ('b', 'blue')):
        (tmp_path / 'images' / name).mkdir(parents=True)
        Image.new('RGB', (40, 50), colour).save(tmp_path / 'images' / name / '1.png')
    cfg = _config('', **{'data.name': 'folder', 'data.path': str(tmp_path / 'images')})
    setting, _ = train._set_up(cfg, str(tmp_path / 'w'))
    assert setting.ar.condition.num_classes == 2
    assert len(setting.source) == 2
    assert load_config(str(tmp_path / 'w')).data.num_classes == 2
    images = snapshots.examples(setting).images
    np.testing.assert_array_equal(images[:, 5, 5], [[1, -1, -1], [-1, -1, 1]])
    cfg = _config(
        '', **{'data.name': 'folder', 'data.path': str(tmp_path / 'images'), 'data.num_classes': 5}
    )
    assert train._set_up(cfg, str(tmp_path / 'v'))[0].ar.condition.num_classes == 5


def _folder(root, **sizes):
    """A folder with a class of each name, of one image of the given (width, height)."""
    for name, size in sizes.items():
        (root / name).mkdir(parents=True)
        pixels = np.arange(3 * size[0] * size[1], dtype=np.uint32) % 251
        image = Image.fromarray(pixels.astype(np.uint8).reshape(size[1], size[0], 3))
        image.save(root / name / '1.png')
    return str(root)


def test_the_start_says_what_the_classes_are(tmp_path, monkeypatch, capsys):
    """Also what was left out; and the names are kept with the run."""
    images = _folder(tmp_path / 'images', cat=(40, 50), dog=(40, 50))
    (tmp_path / 'images' / 'owl').mkdir()
    (tmp_path / 'images' / 'top.png').write_bytes(b'')
    cfg = _config('', **{'data.name': 'folder', 'data.path': images})

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, '_train', stop)
    with pytest.raises(KeyboardInterrupt):
        _train(cfg, tmp_path / 'w')
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('2 training images; '))
    assert lines[start + 1] == '3 classes: cat, dog, owl'
    assert lines[start + 2] == (
        'left out: 1 image(s) beside the directories of the classes; classes without images: owl'
    )
    assert json.loads((tmp_path / 'w' / 'classes.json').read_text()) == ['cat', 'dog', 'owl']
    (tmp_path / 'images' / 'dog').rename(tmp_path / 'images' / 'puma')
    with pytest.raises(UserError, match='class 1 was dog, the data now have owl'):
        _train(cfg, tmp_path / 'w')


def test_images_with_captions_need_no_labels(tmp_path):
    """A column of widths beside one of heights is refused for classes alone."""
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    images = _folder(tmp_path / 'images', a=(40, 50), b=(50, 40))
    found = [pathlib.Path(images, name, '1.png').read_bytes() for name in 'ab']
    columns = {'image': found, 'width': [40, 50], 'height': [50, 40]}
    path = tmp_path / 'a.parquet'
    parquet.write_table(pa.table(columns), path)
    texts = tmp_path / 'texts.tsv'
    texts.write_text('a.parquet [0]\ta cat\na.parquet [1]\ta dog\n')
    cfg = packaged.load(f'own:data=parquet:{path},captions={texts},smoke')
    assert '2 images in 1 class' in ' '.join(cfg.reasons)
    source = training_images.open_data(cfg).source
    assert [source[i]['captions'] for i in range(2)] == [('a cat',), ('a dog',)]
    check, _ = host_checks.check_data('parquet', str(path), needs_labels=False)
    assert check.status == 'ok'
    packed = str(tmp_path / 'packed')
    with pytest.raises(UserError, match='several columns that may hold labels'):
        data_sets.pack(f'parquet:{path}', packed)
    data_sets.pack(f'parquet:{path}', packed, labels='none')
    assert sources.ArrayRecords(packed).num_classes == 1
    with pytest.raises(UserError, match="--labels is uniform: --mode=pack takes 'none' alone"):
        data_sets.pack(f'parquet:{path}', packed, labels='uniform')
    with pytest.raises(UserError, match='several columns that may hold labels, width, height'):
        training_images.open_data(packaged.load(f'own:data=parquet:{path},smoke'))


def test_captions_that_are_refused_leave_the_workdir_free(tmp_path):
    """Once the missing word is in the list, the same command trains."""
    images = _folder(tmp_path / 'images', a=(40, 50), b=(50, 40))
    (tmp_path / 'texts.tsv').write_text('a/1.png\tcat\nb/1.png\tdog\n')
    words = tmp_path / 'words.txt'
    words.write_text('cat\n')
    options = {'data.name': 'folder', 'data.path': images, 'ar.vocabulary': str(words)}
    options |= {'data.captions': f'{tmp_path}/texts.tsv', 'data.max_broken': 0.01}
    cfg = _config('', **options, **{'ar.condition': 'text', 'ar.text_tokens': 2})
    with pytest.raises(UserError, match="'dog' has 'dog', which the vocabulary does not know"):
        train._set_up(cfg, str(tmp_path / 'w'))
    assert not (tmp_path / 'w').exists()
    words.write_text('cat\ndog\n')
    setting, _ = train._set_up(cfg, str(tmp_path / 'w'))
    assert len(setting.source) == 2


def test_a_head_is_distilled_with_the_vocabulary_of_its_teacher(tmp_path, monkeypatch):
    """Another list of as many words would give all captions other numbers."""
    for name, text in (('a', 'cat\ndog\n'), ('b', 'dog\ncat\n'), ('c', 'cat\ndog\n')):
        (tmp_path / f'{name}.txt').write_text(text)
    cfgs = []
    for name in 'abc':
        cfg = schema.default()
        cfg.init_from = 'RUN'
        cfg.ar.update(condition='text', vocabulary=str(tmp_path / f'{name}.txt'))
        cfgs.append(cfg)
    teacher = types.SimpleNamespace(config=cfgs[0])
    monkeypatch.setattr(origins, 'load_teacher', lambda workdir, mesh: teacher)
    monkeypatch.setattr(origins, 'check_finished', lambda key, workdir: None)
    with pytest.raises(UserError, match='init_from: RUN has another vocabulary: give --config'):
        origins.read_teacher(cfgs[1], None)
    assert origins.read_teacher(cfgs[2], None) is teacher


def test_processes_read_the_same_captions(tmp_path, monkeypatch):
    """Files may lie elsewhere, but what a model reads of them must be the same everywhere."""
    images = _folder(tmp_path / 'images', a=(40, 50), b=(50, 40))
    compared = []

    def differing(numbers):
        compared.append(numbers)
        return [i for i, number in enumerate(numbers) if number != compared[0][i]]

    monkeypatch.setattr(agreement.hosts, 'count', lambda: 2)
    monkeypatch.setattr(agreement.hosts, 'differing', differing)
    for number, (words, captions, same) in enumerate(
        (
            ('cat\ndog\n', 'a/1.png\tcat\nb/1.png\tdog\n', True),
            ('cat\ndog\n', 'a/1.png\tcat\nb/1.png\tdog\n', True),
            ('dog\ncat\n', 'a/1.png\tcat\nb/1.png\tdog\n', False),
            ('cat\ndog\n', 'a/1.png\tcat\nb/1.png\tcat\n', False),
        )
    ):
        vocabulary = tmp_path / f'{number}.txt'
        table = tmp_path / f'{number}.tsv'
        vocabulary.write_text(words)
        table.write_text(captions)
        options = {'data.captions': str(table), 'ar.vocabulary': str(vocabulary)}
        options |= {'data.name': 'folder', 'data.path': images}
        cfg = _config('', **options, **{'ar.condition': 'text', 'ar.text_tokens': 2})
        source = training_images.open_data(cfg).source
        if same:
            agreement.check_same(cfg, source)
            continue
        with pytest.raises(UserError, match='differ in what the model reads of captions: start'):
            agreement.check_same(cfg, source)
    # A process whose model reads no texts compares as many values.
    classes = _config('', **{'data.name': 'folder', 'data.path': images})
    with pytest.raises(UserError, match=r'differ in ar\.condition'):
        agreement.check_same(classes, training_images.open_data(classes).source)
    assert len({len(numbers) for numbers in compared}) == 1


def test_texts_are_not_accumulated():
    """Their loss is no mean over images. Runs that were trained so are opened all the same."""
    values = {'ar.text_weight': 0.2, 'ar_training.accumulate': 2}
    cfg = checks.check(schema.changed(packaged.load('composed:smoke'), values))
    with pytest.raises(UserError, match=r'ar_training.accumulate: the loss of texts is a mean'):
        train._check_parts(cfg, '/none', sharding.make_mesh())
    checks.check_training(schema.changed(cfg, {'ar_training.steps': 0}))


def test_processes_are_compared_before_they_read_weights(tmp_path, monkeypatch):
    """Where one alone has a tokenizer, the others would wait for it without end."""
    cfg = _idx(tmp_path / 'data')
    compared = []
    monkeypatch.setattr(
        agreement.hosts, 'differing', lambda numbers: compared.append(numbers) or []
    )
    source = training_images.open_data(cfg).source
    for changes in ({}, {'tokenizer': '/a'}, {'tokenizer': '/b'}, {'data.path': '/b'}):
        agreement.check_same(schema.changed(cfg, changes), source)
    assert compared[0] != compared[1] == compared[2]
    assert compared[3] == compared[0]

    def refuse(cfg, source):
        raise UserError('the processes differ')

    monkeypatch.setattr(agreement, 'check_same', refuse)
    monkeypatch.setattr(origins, 'load_tokenizer', lambda *_: pytest.fail('weights are read'))
    with pytest.raises(UserError, match='the processes differ'):
        train._set_up(schema.changed(cfg, {'tokenizer': '/a'}), str(tmp_path / 'w'))


def test_a_training_ends_with_the_parameters_that_are_sampled(tmp_path, monkeypatch):
    """`sampling.ema_decay` decides, for the looks and at the end, as where the run is read."""
    cfg = _idx(tmp_path / 'data', **{'watch.every': 1, 'watch.classes': 1})
    setting, _ = train._set_up(cfg, str(tmp_path / 'w'))
    stage = ar_stage(setting.ar, setting.vae, {}, cfg.ar_training)
    state = TrainState(params='weights', opt_state=None, ema=('mean',), step=0)
    seen = []

    def trained(*arguments, watch, **options):
        watch.look(1, state, None)
        return state, 2.0

    monkeypatch.setattr(train.loop, 'train', trained)
    monkeypatch.setattr(train.snapshots, 'held_out', lambda *_: None)

    def look(step, params, writer):
        seen.append(params)

    for rate, expected in ((None, 'mean'), (0.9, 'mean'), (0, 'weights')):
        assert train._run_stage(setting, stage, look, rate) == (expected, 2.0)
        assert seen.pop() == expected


def test_grey_models_are_trained_on_image_files(tmp_path):
    images = _folder(tmp_path / 'images', a=(40, 50), b=(50, 40))
    cfg = _config('', **{'data.name': 'folder', 'data.path': images, 'vae.image_channels': 1})
    setting, _ = train._set_up(cfg, str(tmp_path / 'w'))
    reading = training_images.open_data(cfg).reading
    with data_batches.batches(setting.source, batch_size=4, seed=0, **reading) as batches:
        assert next(batches)['image'].shape == (4, *setting.vae.image_shape) == (4, 32, 32, 1)
    shown = snapshots.examples(setting).images
    grey = Image.open(f'{images}/a/1.png').convert('RGB')
    expected = Image.fromarray(augment.center_crop(grey, 32)).convert('L')
    np.testing.assert_allclose((shown[0, ..., 0] + 1) * 127.5, np.asarray(expected), atol=1e-4)


def test_what_cannot_be_shown_is_left_out_of_the_examples(tmp_path):
    """An image of one column, a broken one and one that is gone, after all the training."""
    size = 512  # at which the column would have 1,024,000 rows
    images = _folder(tmp_path / 'images', a=(1, 2000), b=(40, 50), c=(40, 50), d=(50, 40))
    (tmp_path / 'images' / 'b' / '1.png').write_bytes(b'broken')
    grid = {'vae.grid': (size // 4, size // 4)}
    cfg = _config('', **{'data.name': 'folder', 'data.path': images}, **grid)
    setting, _ = train._set_up(cfg, str(tmp_path / 'w'))
    (tmp_path / 'images' / 'c' / '1.png').unlink()
    assert snapshots.examples(setting).images.shape == (1, size, size, 3)
    (tmp_path / 'images' / 'd' / '1.png').unlink()
    with pytest.raises(UserError, match='none of the 4 images can be shown'):
        snapshots.examples(setting)


def test_only_synsets_of_imagenet_are_read_as_stored(tar, tmp_path):
    assert training_images.open_data(_config(tar)).reading['transform'].as_stored
    images = _folder(tmp_path / 'images', n01440764=(9, 9), cat=(9, 9))
    cfg = _config('', **{'data.name': 'folder', 'data.path': images})
    assert not training_images.open_data(cfg).reading['transform'].as_stored


@pytest.mark.slow
def test_a_tokenizer_of_another_size(tar, tokenizer, tmp_path):
    options = {'tokenizer_training.steps': 0, 'tokenizer': str(tokenizer[0]), 'vae.latent_dim': 4}
    with pytest.raises(
        console.UserError, match=r'has another tokenizer .vae\.latent_dim 8 → 4. than this config'
    ):
        _train(_config(tar, **options), tmp_path / 'w')


@pytest.fixture(scope='module')
def tokenizer_only(tar, tmp_path_factory):
    """Config and workdir of a run that trained a tokenizer alone, as its end leaves them.

    The numbers in the checkpoint are any, so that nothing need be compiled.
    """
    cfg = _config(tar, **{'ar_training.steps': 0})
    directory = tmp_path_factory.mktemp('tokenizer_only')
    claim(cfg, directory)
    stage = adversarial.tokenizer_stage(build.build_vae(cfg), cfg.tokenizer_training)
    like = state.abstract_state(stage, sharding.make_mesh())
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    arrays = arrays.replace(step=np.int32(4), params=tiny_config.random_arrays(like.params), ema=())
    saved = checkpoint.Checkpoints(directory / 'tokenizer' / 'checkpoints')
    saved.save(4, arrays, {}, 0.0)
    saved.close()
    return cfg, directory, arrays.params


def _accepted(monkeypatch, *arguments):
    """The config of a command line that the program finds no fault in, None without --config."""
    command = ['main', *map(str, arguments)]
    monkeypatch.setattr(sys, 'argv', command)  # ml_collections takes overrides from there.
    with flagsaver.flagsaver():
        rest = main._parse_flags(command)
        main._check_usage(rest, main._MODE.value, main._given())
        return None if main._CONFIG.value is None else checks.check(main._CONFIG.value)


@pytest.mark.slow
def test_the_advice_of_a_tokenizer_alone_is_accepted(tar, tokenizer_only, tmp_path, monkeypatch):
    """What report.html and the last lines of such a run advise: to score it, and to train an AR
    model on it.
    """
    cfg, directory, params = tokenizer_only
    setting = snapshots.Setting(cfg, str(directory), None, None, None, None)
    said = train._summary(setting, {'vae/psnr': 20.0})
    flags = re.findall(r'--[\w.]+(?:=\w+)?', said)
    assert flags == ['--mode=evaluate', '--images=NPZ', '--workdir', '--config.tokenizer']
    mode, images, another, with_this = flags
    assert _accepted(monkeypatch, mode, images, f'--workdir={directory}') is None
    run, _ = open_run.open_run(str(directory), tokenizer_only=True)
    chex.assert_trees_all_equal(run.vae_params, params)

    of_ar = ('--config=configs/ar_b.py:smoke', f'{another}={tmp_path / "ar"}')
    asked = _accepted(monkeypatch, *of_ar, f'{with_this}={directory}')
    assert asked.tokenizer == str(directory)
    assert asked.ar_training.steps > 0
    # The same config, with the AR model's steps again and with or without the tokenizer's own.
    for steps in (0, 4):
        key = with_this.removeprefix('--config.')
        options = {'tokenizer_training.steps': steps, key: str(directory)}
        setting, start = train._set_up(_config(tar, **options), str(tmp_path / f'ar{steps}'))
        assert setting.cfg.tokenizer == str(directory)
        chex.assert_trees_all_equal(start.tokenizer, params)


@pytest.mark.parametrize('options', [{}, {'ar_training.batch_size': 16}, {'sampling.num_steps': 3}])
def test_the_advice_to_train_on_its_tokenizer_elsewhere_is_accepted(
    tar, tokenizer_only, tmp_path, options
):
    """An AR model asked for in the workdir of a tokenizer alone: what the refusal says helps."""
    _, directory, params = tokenizer_only
    with pytest.raises(UserError, match='begun with another config') as refusal:
        train._set_up(_config(tar, **options), str(directory))
    advice = re.search(r'give --config\.(tokenizer)=(.*) in another --workdir$', str(refusal.value))
    cfg = _config(tar, **options, **{advice[1]: advice[2]})
    setting, start = train._set_up(cfg, str(tmp_path / 'ar'))
    chex.assert_trees_all_equal(start.tokenizer, params)
    assert setting.cfg.ar_training.steps == 4


_KILLED = """
import os, signal, sys, time
from sphere_ar_jax.runtime import checkpoint
from tests.commands import test_train
save = checkpoint.Checkpoints.save
def kill_after(self, step, *rest):
    save(self, step, *rest)
    if step == 2:
        self._manager.wait_until_finished()
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = kill_after
test_train._train(getattr(test_train, sys.argv[1])(sys.argv[2]), sys.argv[3])
"""


def _tokenizer_alone(tar):
    return _config(tar, **{'ar_training.steps': 0})


def _both_directions(directory):
    """A run of texts and images in both orders, on a folder of images with two captions each."""
    options = {'data.name': 'folder', 'data.path': f'{directory}/images'}
    options |= {'data.captions': f'{directory}/texts.tsv', 'watch.every': 0}
    options |= {'tokenizer': f'{directory}/tokenizer', 'tokenizer_training.steps': 0}
    options |= {'ar.condition': 'text', 'ar.text_tokens': 8, 'ar.text_weight': 0.5}
    return _config('', **options)


def _killed(config, images, workdir):
    """Runs a training that SIGKILL ends once the checkpoint of step 2 is written."""
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', _KILLED, config.__name__, str(images), str(workdir)]
    killed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr


@pytest.mark.slow
def test_killed_and_resumed(tar, tokenizer, tmp_path):
    """The discriminator and its statistics are resumed too: every bit of the state is that of an
    undisturbed run.
    """
    _killed(_tokenizer_alone, tar, tmp_path / 'w')
    _train(_tokenizer_alone(tar), tmp_path / 'w')
    states = []
    for workdir in (tmp_path / 'w', tokenizer[0]):
        found = loop.checkpoint.Checkpoints(f'{workdir}/tokenizer/checkpoints', read_only=True)
        assert found.steps()[-1] == 4
        states.append(noted_fingerprint(workdir / 'tokenizer', 4))
        found.close()
    assert states[0] == states[1]
    assert len(states[0]) > 100


@pytest.mark.slow
def test_a_model_of_both_directions_is_killed_and_resumed(tmp_path):
    """The draws of captions, of dropped ones and of both orders go on where they were."""
    _folder(tmp_path / 'images', a=(40, 50), b=(50, 40), c=(40, 40), d=(50, 50))
    lines = [f'{name}/1.png\t{text} {name}' for name in 'abcd' for text in ('the', 'one')]
    (tmp_path / 'texts.tsv').write_text('\n'.join(lines))
    alone = schema.changed(_both_directions(tmp_path), {'tokenizer': None})
    tiny_config.random_tokenizer(alone, tmp_path / 'tokenizer')
    _train(_both_directions(tmp_path), tmp_path / 'undisturbed')
    _killed(_both_directions, tmp_path, tmp_path / 'w')
    assert not (tmp_path / 'w' / 'report.html').exists()
    _train(_both_directions(tmp_path), tmp_path / 'w')
    states = []
    for workdir in (tmp_path / 'w', tmp_path / 'undisturbed'):
        found = loop.checkpoint.Checkpoints(f'{workdir}/ar/checkpoints', read_only=True)
        assert found.steps()[-1] == 4
        states.append(noted_fingerprint(workdir / 'ar', 4))
        found.close()
    assert states[0] == states[1]
    assert len(states[0]) > 100


def test_a_workdir_in_which_another_training_runs_is_refused(tar, tmp_path):
    """The second one names the first, and changes nothing."""
    with files.owned(str(tmp_path), 'a training'):
        before = sorted((p, p.stat().st_mtime) for p in tmp_path.rglob('*'))
        with pytest.raises(console.UserError, match=r'in use by a training, process \d+ on '):
            _train(_config(tar), tmp_path)
        assert sorted((p, p.stat().st_mtime) for p in tmp_path.rglob('*')) == before


def _photos(directory, images=20):
    """A folder of two classes with so many drawn pictures of 60 to 600 pixels in each."""
    path = directory / 'train.tar'
    directory.mkdir()
    stand_in.write_tar(str(path), SYNSETS[:2], images, broken=0)
    with tarfile.open(path) as outer:
        for member in outer.getmembers():
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                place = directory / 'photos' / member.name.removesuffix('.tar')
                inner.extractall(place, filter='data')
    return directory / 'photos'


@pytest.mark.slow
def test_the_config_of_ones_own_images(tmp_path, capsys):
    """:smoke on 40 pictures: both stages, every line of what is derived, and a page."""
    cfg = packaged.load(f'own:data=folder:{_photos(tmp_path / "data")},smoke')
    cfg.data.holdout_files = 0.2
    metrics = _train(checks.check(cfg), tmp_path / 'w')
    out = capsys.readouterr().out
    for line in own.lines(cfg):
        assert out.count(line) == 1
    assert 'from 40 images in 2 classes, as counted there' in out
    assert 5 < metrics['vae/psnr'] < 40
    for stage, name in (('tokenizer', 'heldout_psnr'), ('ar', 'heldout_loss')):
        lines = metric_writer.read_scalars(f'{tmp_path}/w/{stage}/metrics.jsonl', (name,))
        assert lines
        assert all(line['step'] % 10 == 0 for line in lines)
    page = (tmp_path / 'w' / 'report.html').read_text()
    assert 'gives held-out images back' in page
    assert page.count('<img') == 3
    assert own.lines(cfg)[0] in page
    assert (tmp_path / 'w' / 'ar' / 'samples_0000020.png').exists()
    assert load_run(str(tmp_path / 'w')).ar.condition.num_classes == 2


def _idx(directory, **options):
    """The config of the smallest run on IDX files of 14×14 pixels, which become 16×16."""
    write(directory, shape=(14, 14))
    (directory / 'classes.txt').write_text('bag\nboot\ncoat\n')
    cfg = tiny_config.get_config()
    cfg.data.update(name='idx', path=str(directory), classifier_steps=3)
    cfg.update_from_flattened_dict(options)
    return checks.check(cfg)


def test_a_run_finds_its_data_from_any_directory(tmp_path, monkeypatch):
    """Its config has paths from the root, and names of data sets as they are."""
    monkeypatch.chdir(tmp_path)
    cfg = _idx(tmp_path / 'data', **{'data.path': 'data'})
    train._set_up(cfg, str(tmp_path / 'w'))
    kept = load_config(str(tmp_path / 'w'))
    assert kept.data.path == f'{tmp_path}/data'
    assert kept.data.captions is None
    (tmp_path / 'pets').mkdir()
    for name, path, found in (
        ('hf', 'pets', f'{tmp_path}/pets'),
        ('hf', 'owner/pets', 'owner/pets'),
        ('tfds', 'pets', 'pets'),
        ('folder', 'gs://bucket/pets', 'gs://bucket/pets'),
    ):
        options = {'data.name': name, 'data.path': path, 'data.captions': 'beside'}
        changed = agreement.with_absolute_paths(schema.changed(cfg, options))
        assert (changed.data.path, changed.data.captions) == (found, 'beside')


def test_idx_files_are_opened_with_their_classes(tmp_path):
    """Training and doctor open them; a model of another size and too few samples are refused."""
    cfg = _idx(tmp_path / 'data')
    setting, _ = train._set_up(cfg, str(tmp_path / 'w'))
    assert setting.ar.condition.num_classes == 3
    assert len(setting.source) == 12
    assert len(setting.data.heldout) == 6
    assert snapshots.examples(setting).images.shape == (6, 16, 16, 1)
    assert load_config(str(tmp_path / 'w')).data.num_classes == 3
    found, _ = host_checks.check_data('idx', str(tmp_path / 'data'))
    assert found.text.endswith('12 images to train on, 3 classes: bag, boot, coat')
    for values, message in (
        ({'data.num_classes': 2}, 'has 3 classes, but the model 2'),
        ({'sampling.num_images': 2}, 'must be at least 4'),
        ({'vae.grid': (8, 8)}, r'vae makes images of \(32, 32, 1\) .* data idx has \(16, 16, 1\)'),
        ({'data.path': None}, r'give --config\.data\.path, of the idx data'),
    ):
        with pytest.raises(UserError, match=message) as error:
            train._set_up(_idx(tmp_path / 'data', **values), str(tmp_path / 'v'))
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='at least one for each of 50 classes'):
        training_images._check_labels(cfg, types.SimpleNamespace(num_classes=50))
    with pytest.raises(UserError, match='IDX files are packed already'):
        data_sets.pack(f'idx:{tmp_path}/data', str(tmp_path / 'packed'))


@pytest.mark.slow
def test_a_run_on_idx_files(tmp_path):
    """It is trained, scored and reported; --mode=evaluate repeats the scores from kept weights."""
    metrics = _train(_idx(tmp_path / 'data'), tmp_path / 'w')
    page = (tmp_path / 'w' / 'report.html').read_text()
    assert '40 images, drawn class by class' in page
    assert 'samples/feature_frechet' in page
    assert json.loads((tmp_path / 'w' / 'classes.json').read_text()) == ['bag', 'boot', 'coat']
    kept = (tmp_path / 'w' / 'classifier.npz').stat().st_mtime_ns
    (tmp_path / 'data').rename(tmp_path / 'moved')
    like = load_config(str(tmp_path / 'w'))
    like.data.path = str(tmp_path / 'moved')
    with libraries_promote():
        scores = evaluate.evaluate(str(tmp_path / 'w'), like=like)
    assert (tmp_path / 'w' / 'classifier.npz').stat().st_mtime_ns == kept
    for name in ('samples/accuracy', 'samples/feature_frechet', 'real/feature_frechet'):
        assert scores[name] == metrics[name]


def test_samples_of_idx_files_are_scored_and_summed_up(tmp_path, monkeypatch):
    """The end of a run, with real held-out images in place of samples and reconstructions."""
    cfg = _idx(tmp_path / 'data', **{'sampling.num_images': 6})
    setting, _ = train._set_up(cfg, str(tmp_path / 'w'))
    images = snapshots.examples(setting).images
    monkeypatch.setattr(snapshots, '_reconstruct', lambda *_, **__: {'vae/psnr': 20.0})
    monkeypatch.setattr(snapshots.on_mesh, 'draw_images', lambda *_, **__: (images, None))
    metrics, _ = snapshots.score(setting, Run(cfg, setting.vae, {}, setting.ar, {}))
    assert metrics['samples/accuracy'] == metrics['classifier/accuracy']
    assert (tmp_path / 'w' / 'samples.png').exists()
    assert (tmp_path / 'w' / 'classifier.npz').exists()
    assert '6 images, drawn class by class' in train._summary(setting, metrics)


@pytest.mark.parametrize(
    'error, passes',
    [
        (console.TemporaryError('the bucket says no'), True),
        (OSError(errno.EIO, 'Input/output error', '/runs/vae'), True),
        (UserError('the bucket holds something else'), False),
        (PermissionError(errno.EACCES, 'Permission denied', '/runs/vae'), False),
    ],
)
def test_a_start_that_may_succeed_later_ends_so(tmp_path, monkeypatch, error, passes):
    """Launchers start again after a TemporaryError, whatever was read when it came."""

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(origins, 'load_tokenizer', refuse)
    cfg = tiny_config.get_config()
    cfg.tokenizer = '/runs/vae'
    with pytest.raises(UserError, match=r'^tokenizer: ') as caught:
        origins.read_tokenizer(cfg, sharding.make_mesh())
    assert isinstance(caught.value, console.TemporaryError) == passes
    monkeypatch.setattr(train, '_set_up', refuse)
    with pytest.raises(UserError, match=r'bucket|/runs/vae') as caught:
        train.train(cfg, str(tmp_path), 'command', 0.0)
    assert isinstance(caught.value, console.TemporaryError) == passes


def test_images_in_memory_can_be_read_by_other_processes():
    """A config of them names data.workers, which composed digits are slow enough for."""
    cfg = tiny_config.get_config()
    cfg.data.workers = 3
    found = training_images.open_data(cfg)
    assert found.reading['workers'] == 3
    again = pickle.loads(pickle.dumps(found.source))
    chex.assert_trees_all_equal(again[5], found.source[5])
    composed = build.open_data_set(packaged.load('composed:smoke')).train
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(composed))[7], composed[7])
