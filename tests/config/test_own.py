"""configs/own.py: what it derives from a folder of images, and what it says of it."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sphere_ar_jax.config import build, checks, own, packaged, schema
from sphere_ar_jax.data import augment
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import workdir
from tests.data.test_idx import write as write_idx

COUNTS = (50, 500, 2000, 50_000, 1_000_000)


def _config(images, classes, **wishes):
    """The checked config that follows from so many images."""
    config = schema.default()
    config.data.update(name='folder', path='/images')
    wished = own.Wishes(**wishes)
    own.apply(config, own.decide(own.Counted(images, classes, 'as counted there'), wished))
    return checks.check(config)


def _folder(path, count, classes=('owl', 'wren')):
    """A folder of tiny images, each of one colour."""
    for i in range(count):
        place = path / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 24), (i, 0, 0)).save(place / f'{i}.png')
    return path


@pytest.mark.parametrize('images', COUNTS)
@pytest.mark.parametrize('classes', [1, 10, 1000])
@pytest.mark.parametrize('size', own.SIZES)
def test_every_derived_config_is_possible(images, classes, size):
    """And shorter than the published training, with averages and warm-ups that fit its steps."""
    config = _config(images, classes, size=size)
    assert build.build_vae(config).image_shape == (size, size, 3)
    t = config.ar_training
    epochs = t.steps * t.batch_size / (images * (1 - config.data.holdout_files))
    assert 2000 <= t.steps < 1_000_800
    assert epochs > 10
    assert t.warmup_steps <= t.steps / 10
    assert config.tokenizer_training.steps < t.steps
    # The average looks back over a part of the training, and forgets how it began.
    assert 1 / (1 - t.ema_decay) <= t.steps / 10
    assert checks.share_of_start(t.ema_decay, t.steps, t.ema_ramp) < 1e-3
    assert not any('still' in line for line in checks.advice(config, images))
    first, last = config.data.crop_until
    assert epochs * 0.8 <= first + 1
    assert last <= epochs
    assert (config.sampling.guidance is None) == (t.label_dropout == 0) == (classes == 1)
    assert 0 < config.watch.every <= t.steps / 4
    assert config.data.holdout_files == (0.0 if images < 200 else 0.05)
    assert max(t.log_every, t.checkpoint_every) <= t.steps / 5


def test_more_images_are_seen_more_often_together_and_less_often_each():
    runs = [_config(images, 10) for images in COUNTS]
    seen = [c.ar_training.steps * c.ar_training.batch_size for c in runs]
    assert seen == sorted(seen)
    each = [total / images for total, images in zip(seen, COUNTS, strict=True)]
    assert each == sorted(each, reverse=True)
    # Four times as many images: twice as many are seen.
    assert np.isclose(seen[3] / seen[2], math.sqrt(25), rtol=0.05)
    widths = [c.ar.width for c in runs]
    assert widths == sorted(widths)
    assert len(set(widths)) == 4
    # 300 epochs of 2,000 images, but for those held out; the words of the line count 1,900.
    assert np.isclose(each[2], 300 * 0.95**0.5, rtol=0.01)
    (line,) = (line for line in runs[2].reasons if line.startswith('ar_training.steps='))
    assert line.startswith('ar_training.steps=9100: each image is seen 307 times.')


def test_an_hour_on_a_small_gpu():
    """The account of docs/own_images.md: operations of an image, from `costs.flops`, and rates."""
    config = _config(2000, 10)
    seen = {
        name: config[name].steps * config[name].batch_size
        for name in ('tokenizer_training', 'ar_training')
    }
    operations = 6.5e9 * seen['tokenizer_training'] + 12.8e9 * seen['ar_training']
    assert np.isclose(operations, 1.02e16, rtol=0.01)
    assert operations / 5e12 < 40 * 60


def test_values_with_spaces_are_shown_as_they_are():
    config = schema.default()
    values = {
        'data.path': '/my birds: new/"a"=b',
        'data.captions': 'texts.tsv',
        'vae.grid': (8, 8),
        'ar_training.steps': 7,
    }
    own.apply(config, (own.Decision(values, 'it is so: see vae.grid=(9,9) there.'),))
    line = (
        'data.path="/my birds: new/\\"a\\"=b" data.captions=texts.tsv vae.grid=(8,8) '
        'ar_training.steps=7: it is so: see vae.grid=(9,9) there.'
    )
    assert own.lines(config) == [line]
    config.data.path = '/mybirds:new/"a"=b'
    assert own.lines(config) == [f'{line} Overridden: data.path="/mybirds:new/\\"a\\"=b".']


def test_each_value_has_one_reason_and_each_reason_is_said():
    decisions = own.decide(own.Counted(2000, 3, 'as counted there'), own.Wishes(size=128))
    keys = [key for decision in decisions for key in decision.values]
    assert len(keys) == len(set(keys))
    assert all(decision.reason.endswith('.') for decision in decisions)
    config = _config(2000, 3, size=128)
    assert own.lines(config) == [decision.line() for decision in decisions]
    assert config.reasons[0].startswith(
        'derived for 128×128 pixels from 2,000 images in 3 classes, as counted there.'
    )
    config.ar_training.steps = 7700
    config.vae.grid = (8, 8)
    changed = [line for line in own.lines(config) if 'Overridden' in line]
    assert [line.split('Overridden: ')[1] for line in changed] == [
        'vae.grid=(8,8).',
        'ar_training.steps=7700.',
    ]
    assert own.lines(schema.default()) == []
    # They survive config.json, and are nothing that a run is compared by.
    again = checks.from_dict(json.loads(config.to_json_best_effort()))
    assert own.lines(again) == own.lines(config)
    again.reasons = ()
    assert not schema.differences(schema.as_dict(config), schema.as_dict(again))


def test_few_images_are_learnt_by_heart_and_that_is_said():
    assert 'learnt by heart' in _config(50, 1).reasons[0]
    assert 'learnt by heart' not in _config(500, 1).reasons[0]


def test_images_without_a_caption_do_not_count(tmp_path):
    """A table that names a part of the images decides the sizes."""
    images = _folder(tmp_path / 'images', 6)
    (tmp_path / 'a.tsv').write_text('owl/0.png\tan owl\nwren/1.png\ta wren\n')
    assert own.count('folder', images).images == 6
    assert own.count('folder', images, str(tmp_path / 'a.tsv')).images == 2
    config = packaged.load(f'own:data=folder:{images},captions={tmp_path}/a.tsv')
    assert 'from 2 images' in config.reasons[0]


@pytest.mark.parametrize('size', own.SIZES)
@pytest.mark.parametrize('side', [16, 28, 40, 64])
def test_idx_files_are_enlarged_to_the_models_size(size, side, tmp_path):
    write_idx(tmp_path, shape=(side, side))
    config = checks.check(packaged.load(f'own:data=idx:{tmp_path},size={size}'))
    data = build.open_data_set(config)
    assert data.train.image_shape == build.build_vae(config).image_shape == (size, size, 1)
    assert any(line.startswith('data.enlarge=') for line in config.reasons)


def test_epochs_and_steps_are_asked_for():
    by_epochs = _config(160, 10, epochs=200).ar_training
    assert by_epochs.steps == 2000
    assert by_epochs.warmup_steps == 100
    config = _config(2000, 10, steps=100)
    assert config.ar_training.steps == 100
    assert config.tokenizer_training.steps == 75
    assert config.ar_training.warmup_steps == 5
    assert config.ar_training.ema_decay == 0.9


def test_the_number_of_images_is_told():
    """It takes the place of what is assumed of a hub, in the lengths as in the sizes."""
    told = packaged.load('own:data=hf:nobody/birds,images=50000,epochs=10')
    assert '50,000 images in 10 classes, as images= says' in told.reasons[0]
    training = told.ar_training
    assert training.steps == round(10 * 0.95 * 50_000 / training.batch_size)
    assert told.ar.depth == 12


def test_the_words_of_the_config(tmp_path):
    data = f'data=folder:{_folder(tmp_path / "images", 6)}'
    plain = checks.check(packaged.load(f'own:{data}'))
    assert plain.data.flip
    assert plain.data.crop_until[1] > 0
    assert plain.vae.image_channels == 3
    assert '6 images in 2 classes, as counted there' in plain.reasons[0]
    other = checks.check(packaged.load(f'own:{data},size=256,no_flip,whole,grey,epochs=3'))
    assert build.build_vae(other).image_shape == (256, 256, 1)
    assert not other.data.flip
    assert tuple(other.data.crop_until) == (0, 0)
    smoke = checks.check(packaged.load(f'own:{data},smoke'))
    assert smoke.ar_training.steps == 20
    assert smoke.vae.grid == plain.vae.grid
    for words, message in (
        ('size=64', 'say which images: data=folder:DIR'),
        (f'{data},size=96', 'size=96: use one of 64, 128, 256'),
        (f'{data},size=big', 'size=big: give a whole number'),
        (f'{data},steps=0', 'steps=0: give a whole number of at least 1'),
        (f'{data},steps=5,epochs=5', 'give epochs= or steps=, not both'),
        (f'{data},flip,no_flip', 'give flip or no_flip, not both'),
        (f'{data},crop,whole', 'give crop or whole, not both'),
        (f'{data},huge', "no variant 'huge'"),
        ('data=digits', 'configs/digits.py'),
        (f'data={tmp_path}', 'write data=folder:'),
        ('data=hf:nobody/birds,epochs=5', 'epochs= needs the number of images, which hf:nobody/b'),
        ('data=hf:nobody/birds,images=0', 'images=0: give a whole number of at least 1'),
    ):
        with pytest.raises(ValueError, match=message) as error:
            packaged.load(f'own:{words}')
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('data', 'said'),
    [
        ('folder:/no/such/birds', 'which is assumed: birds cannot be counted here'),
        ('tfds:mnist', 'which is assumed: a TFDS data set'),
        ('hf:nobody/birds', 'which is assumed: a data set of a hub'),
        ('/data/train.tar', '1,281,167 images in 1,000 classes, which is assumed: a tar'),
    ],
)
def test_what_cannot_be_counted_is_assumed_in_words(data, said):
    config = checks.check(packaged.load(f'own:data={data}'))
    assert said in config.reasons[0]


def test_images_of_one_directory_are_unconditional(tmp_path):
    place = _folder(tmp_path, 3, ('all',)) / 'all'
    config = checks.check(packaged.load(f'own:data=folder:{place}'))
    assert '3 images in 1 class,' in config.reasons[0]
    assert config.sampling.guidance is None
    assert config.ar_training.label_dropout == 0
    config.data.num_classes = 1
    assert build.build_ar(config).condition.num_classes == 1
    assert build.build_sampler(config).options.guidance is None


def test_images_with_captions_are_drawn_for_texts(tmp_path):
    """Also where all images lie in one directory, which without captions is unconditional."""
    Image.new('RGB', (20, 24)).save(tmp_path / '1.png')
    config = packaged.load(f'own:data=folder:{tmp_path},captions=beside')
    checks.check(config)
    assert config.ar.condition == 'text'
    assert config.data.captions == 'beside'
    assert config.sampling.guidance == 'constant'
    assert config.sampling.guidance_scale == 1.5
    assert config.sampling.num_images == 1000
    assert config.watch.classes == 8
    assert config.ar_training.label_dropout == 0.1
    assert any('reads captions in place of classes' in line for line in own.lines(config))


def test_images_with_captions_are_drawn_for_features_of_the_texts(tmp_path):
    Image.new('RGB', (20, 24)).save(tmp_path / '1.png')
    np.savez(tmp_path / 'f.npz', texts=['a bird', 'an owl'], features=np.ones((2, 3, 4)))
    words = f'own:data=folder:{tmp_path},features={tmp_path}/f.npz'
    config = packaged.load(f'{words},captions=beside')
    checks.check(config)
    assert (config.ar.condition, config.data.captions) == ('features', 'beside')
    assert config.ar.features == f'{tmp_path}/f.npz'
    assert config.ar.feature_shape == (3, 4)
    assert any('reads the features of captions' in line for line in own.lines(config))
    with pytest.raises(ValueError, match='features= are those of captions: give captions=, too'):
        packaged.load(words)


def test_a_flip_is_left_out():
    """Without it a picture of letters keeps its sides; nothing else of the crop changes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, format='PNG')
    content = file.getvalue()
    with_flips = augment.Augmentation(32)
    without = augment.Augmentation(32, flip=False)
    mirrored = 0
    for seed in range(20):
        a, b = (
            transform({'image': content, 'label': 0}, 0, np.random.default_rng(seed))['image']
            for transform in (with_flips, without)
        )
        mirrored += not np.array_equal(a, b)
        assert np.array_equal(a, b) or np.array_equal(a[:, ::-1], b)
    assert 3 < mirrored < 17


def test_a_folder_that_has_grown_is_named(tmp_path):
    """A run is not silently given the config of other images."""
    images = _folder(tmp_path / 'images', 20)
    word = f'own:data=folder:{images},smoke,epochs=4'
    workdir.claim(checks.check(packaged.load(word)), tmp_path)
    workdir.claim(checks.check(packaged.load(word)), tmp_path)
    _folder(images, 40)
    with pytest.raises(UserError, match='begun with another config') as error:
        workdir.claim(checks.check(packaged.load(word)), tmp_path)
    message = str(error.value)
    assert 'from 20 images in 2 classes' in message
    assert 'from 40 images in 2 classes' in message
    assert 'put the folder back as it was, or use another --workdir' in message
    assert 'ar_training.steps 10 → 20' in message
    assert '\n' not in message


def test_reading_the_config_needs_no_jax(tmp_path):
    code = (
        'import sys; sys.modules["jax"] = None; from sphere_ar_jax.config import packaged; '
        f'print(packaged.load("own:data=folder:{_folder(tmp_path, 2)}").reasons[0])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=100, check=True
    )
    assert 'from 2 images in 2 classes' in done.stdout
