"""Looks at a model while it is trained."""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import small, sources
from sphere_ar_jax.data.captions import captioned
from sphere_ar_jax.evaluation import heldout, snapshots
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import autoencoding, batching
from sphere_ar_jax.training import state
from tests import tiny_config


def _stage():
    """A stage whose loss is the mean of |w·image| plus a draw for each image."""

    def loss(params, frozen, batch, keys):
        draws = jax.vmap(jax.random.uniform)(keys)
        value = jnp.mean(jnp.abs(params['w'] * batch['image']).mean((1, 2, 3)) + frozen * draws)
        return value, {'psnr': jnp.mean(batch['image']), 'token_norm': value}

    options = tiny_config.get_config().ar_training
    options.batch_size = 4
    return state.make_stage('ar', options, lambda key: {}, loss, np.float32(0), ())


@pytest.mark.parametrize('count', [3, 10, 25, 30])
def test_all_classes_are_drawn_for_fid(count):
    labels = snapshots._all_classes(count, 10)
    chex.assert_shape(labels, (count,))
    times = np.bincount(labels, minlength=10)
    assert set(times) <= {count // 10, -(-count // 10)}
    # The odd ones lie evenly among the classes.
    assert abs(labels.mean() - 4.5) < 0.5


def test_the_loss_of_held_out_images():
    """The mean over whole batches of the stage's own loss, with the same draws at every look."""
    images = np.random.default_rng(0).normal(size=(10, 2, 2, 1)).astype(np.float32)
    batch = {'image': images, 'label': np.arange(10, dtype=np.int32)}
    mesh = sharding.make_mesh(min(4, jax.device_count()))  # which divide the batch of 4
    held = heldout.HeldOut(_stage(), batch, 0, mesh)
    found = held.scalars({'w': np.float32(3)})
    assert set(found) == {'heldout_loss', 'heldout_psnr'}
    size = min(4, sharding.whole_rows(mesh, 10))
    assert held._size == size
    taken = images[: 10 // size * size]
    np.testing.assert_allclose(found['heldout_loss'], 3 * np.abs(taken).mean(), rtol=1e-5)
    np.testing.assert_allclose(found['heldout_psnr'], taken.mean(), atol=1e-6)
    noisy = _stage()._replace(frozen=np.float32(5))
    noisy = heldout.HeldOut(noisy, batch, 0, mesh)
    first = noisy.scalars({'w': np.float32(3)})['heldout_loss']
    assert first > found['heldout_loss'] + 1
    assert noisy.scalars({'w': np.float32(3)})['heldout_loss'] == first
    # Numbers that are not finite are no loss to plot.
    assert set(held.scalars({'w': np.float32(np.nan)})) == {'heldout_psnr'}


def test_training_images_of_all_classes_are_shown(tmp_path):
    """The files of a class lie together. Others stand in for those that cannot be shown."""
    for i in range(12):
        place = tmp_path / 'ab'[i // 6]
        place.mkdir(exist_ok=True)
        Image.new('L', (16, 16), 20 * i).save(place / f'{i:02}.png')
    source = sources.ImageFolder(tmp_path)
    vae = mock.Mock(image_shape=(16, 16, 1))
    cfg = tiny_config.get_config()
    setting = snapshots.Setting(cfg, '', sharding.make_mesh(), vae, None, source)

    def shown():
        images = snapshots.examples(setting, 4).images
        chex.assert_shape(images, (4, 16, 16, 1))
        return ((images[:, 0, 0, 0] + 1) * 127.5 / 20).round().astype(int).tolist()

    assert shown() == [0, 4, 7, 11]
    (tmp_path / 'a' / '04.png').write_bytes(b'broken')
    assert shown() == [0, 7, 11, 1]


@pytest.mark.slow
def test_held_out_images_are_shown_and_looked_at(tmp_path):
    """They come from the held-out part, spread over its classes; the digits have their own."""
    for i in range(60):
        place = tmp_path / 'ab'[i // 30]
        place.mkdir(exist_ok=True)
        Image.new('L', (16, 16), i).save(place / f'{i}.png')
    training, out = sources.split(sources.ImageFolder(tmp_path), 0.3)
    vae = mock.Mock(image_shape=(16, 16, 1))
    cfg = tiny_config.get_config()
    mesh = sharding.make_mesh()
    setting = snapshots.Setting(cfg, '', mesh, vae, None, training, None, None, out)
    shown = ((snapshots.examples(setting, 5).images[:, 0, 0, 0] + 1) * 127.5).round().astype(int)
    names = {int(out.name(i)[2:-4]) for i in range(len(out))}
    assert set(shown.tolist()) <= names
    assert shown.min() < 30 <= shown.max()
    assert len(snapshots.held_out(setting, _stage())._images['label']) == len(out)
    assert snapshots.held_out(setting._replace(heldout=None), _stage()) is None
    # The images of one process alone cannot be those of all.
    with (
        mock.patch.object(snapshots.hosts, 'differing', return_value=[0]),
        pytest.raises(UserError, match=r'^an image was read in some processes of this run alone'),
    ):
        snapshots.examples(setting, 5)
    assert snapshots.examples(setting, 5).split == 'held-out'
    for i in range(len(out)):
        (tmp_path / out.name(i)).unlink()
    assert snapshots.examples(setting, 5).split == 'training'
    data = small.open_data_set('digits', None, 0, 0.2)
    digits = setting._replace(data=data, source=data.train, heldout=data.heldout)
    images = snapshots.held_out(digits, _stage())._images
    assert images['image'].shape == (256, 16, 16, 1)
    assert set(images['label']) == set(range(10))


@pytest.fixture
def not_finite():
    return batching.NonFiniteSamples([0, 1], 0, 2)


def _said(capsys):
    """The only line on stderr; nothing is on stdout."""
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ''
    return line


def test_samples_that_are_not_finite_do_not_end_the_training(
    tmp_path, capsys, monkeypatch, not_finite
):
    monkeypatch.setattr(snapshots, '_grid', mock.Mock())
    monkeypatch.setattr(snapshots, '_draw_grid', mock.Mock(side_effect=not_finite))
    writer = mock.Mock()
    snapshots.look_at_samples(mock.Mock(), mock.Mock(), str(tmp_path), 40, writer)
    line = _said(capsys)
    assert line.startswith('step 40: no picture, 2 of the images 0 to 1 are not finite')
    assert not list(tmp_path.iterdir())
    assert not writer.mock_calls


def test_reconstructions_that_are_not_finite_do_not_end_the_training(
    tmp_path, capsys, monkeypatch, not_finite
):
    monkeypatch.setattr(autoencoding, 'reconstruct', mock.Mock(side_effect=not_finite))
    writer = mock.Mock()
    setting = mock.Mock(workdir=str(tmp_path))
    images = np.zeros((2, 4, 4, 1), np.float32)
    snapshots.look_at_reconstructions(setting, {}, images, 40, writer)
    assert _said(capsys).startswith('step 40: no picture, 2 of the images 0 to 1')
    assert not list(tmp_path.iterdir())
    assert not writer.mock_calls


class _Captioned(list):
    """A source of captions alone."""

    def __getitem__(self, i):
        return {'captions': (super().__getitem__(i),)}


def _of_captions(train, heldout, tmp_path):
    """What `_captions` reads of a run whose vocabulary has the words cat and dog."""
    (tmp_path / 'words.txt').write_text('cat\ndog\n')
    cfg = schema.default()
    cfg.ar.update(condition='text', vocabulary=str(tmp_path / 'words.txt'), text_tokens=1)
    encode = build.caption_encoder(cfg)
    kept = None if heldout is None else captioned.FirstCaption(_Captioned(heldout), encode)
    return snapshots.Setting(cfg, '', None, None, None, _Captioned(train), heldout=kept)


def test_captions_that_cannot_be_read_are_passed_over(tmp_path):
    """A picture asks for others, at last for those of training images, and never ends a run."""
    some = _of_captions(['cat'] * 9, ['owl', 'dog', 'dog', 'owl', 'dog', 'owl'], tmp_path)
    assert snapshots._captions(some, 2) == ['dog', 'dog']
    none = _of_captions(['cat'] * 9, ['owl'], tmp_path)
    assert snapshots._captions(none, 1) == ['cat']
    # The others of the held-out images stay where one of them cannot be read.
    most = _of_captions(['cat'] * 9, ['dog'] * 7 + ['owl'], tmp_path)
    assert snapshots._captions(most, 8) == ['dog'] * 7
    assert snapshots._captions(most, 2000) == ['dog'] * 7
    few = _of_captions(['owl', 'cat', 'owl', 'dog'], None, tmp_path)
    assert snapshots._captions(few, 2) == ['cat', 'dog']
    with pytest.raises(UserError, match="'owl' has 'owl', which the vocabulary does not know"):
        snapshots._captions(_of_captions(['owl'], None, tmp_path), 1)
