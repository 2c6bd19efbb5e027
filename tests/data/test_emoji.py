"""Emoji: their captions, categories and pictures, from a package of the test's own making."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from configs.emoji import get_config
from sphere_ar_jax.config import build, checks
from sphere_ar_jax.data import augment, sources
from sphere_ar_jax.data.captions import table
from sphere_ar_jax.data.files.emoji import Emoji
from sphere_ar_jax.runtime.console import UserError

ENTRIES = [
    {
        'name': 'WAVING HAND SIGN',
        'short_names': ['wave'],
        'image': '1f44b.png',
        'category': 'People & Body',
        'skin_variations': {
            '1F3FD': {'image': '1f44b-1f3fd.png'},
            '1F3FB-1F3FF': {'image': '1f44b-1f3fb-1f3ff.png'},
        },
    },
    {'name': 'GRINNING FACE', 'short_names': ['grinning'], 'image': '1f600.png', 'category': 'A'},
    {'name': 'BANANA', 'short_names': ['banana'], 'image': 'banana.png', 'category': 'Food'},
    {'name': None, 'short_names': ['two_words'], 'image': 'none.png', 'category': 'Food'},
]


@pytest.fixture
def package(tmp_path):
    """A package of five pictures. A sixth that the list names is missing."""
    pictures = tmp_path / 'img' / 'google' / '64'
    pictures.mkdir(parents=True)
    (tmp_path / 'img' / 'google' / 'sheets').mkdir()
    (tmp_path / 'emoji.json').write_text(json.dumps(ENTRIES))
    names = ('1f44b', '1f44b-1f3fd', '1f44b-1f3fb-1f3ff', '1f600', 'none')
    for number, name in enumerate(names):
        pixels = np.full((64, 64, 4), 40 * number, np.uint8)
        pixels[..., 3] = 255
        pixels[:8, :8, 3] = 0  # a transparent corner
        Image.fromarray(pixels).save(pictures / f'{name}.png')
    return tmp_path


def test_names_tones_and_categories(package):
    found = sources.open_source('emoji', str(package))
    assert isinstance(found, Emoji)
    assert [found.captions(i) for i in range(len(found))] == [
        ('waving hand sign', 'wave'),
        ('waving hand sign, medium skin tone', 'wave, medium skin tone'),
        ('waving hand sign, light and dark skin tones', 'wave, light and dark skin tones'),
        ('grinning face', 'grinning'),
        ('two words',),
    ]
    assert found.class_names == ('A', 'Food', 'People & Body')
    assert found.num_classes == 3
    np.testing.assert_array_equal(found.labels, [2, 2, 2, 0, 1])
    assert found.left_out == '1 emoji without a picture (banana.png)'
    assert found.name(3) == 'A/1f600.png'
    image = np.asarray(augment.decode(found[1]['image']))
    assert image.shape == (64, 64, 3)
    # Where nothing is drawn, the ground is white.
    np.testing.assert_array_equal(image[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(image[9, 9], [40, 40, 40])
    again = pickle.loads(pickle.dumps(found))
    assert again[2] == found[2]


def test_the_captions_are_those_that_the_images_have(package):
    cfg = checks.check(get_config(f'data=emoji:{package}'))
    assert (cfg.data.name, cfg.data.captions, cfg.ar.condition) == ('emoji', 'beside', 'text')
    found = table.with_captions(sources.open_source('emoji', str(package)), cfg.data.captions)
    record = found[1]
    assert record['captions'] == ('waving hand sign, medium skin tone', 'wave, medium skin tone')
    assert record['label'] == 2
    assert found.left_out == '1 emoji without a picture (banana.png)'


def test_features_of_the_captions_stand_in_place_of_their_bytes(package, tmp_path):
    emoji = Emoji(package)
    texts = sorted({text for i in range(len(emoji)) for text in emoji.captions(i)})
    values = np.random.default_rng(0).normal(size=(len(texts), 2, 5))
    np.savez(tmp_path / 'features.npz', texts=texts, features=values)
    cfg = checks.check(get_config(f'data=emoji:{package},features={tmp_path}/features.npz'))
    assert (cfg.data.captions, cfg.ar.condition) == ('beside', 'features')
    assert cfg.ar.feature_shape == (2, 5)
    label = build.encode_prompt(cfg, texts[1])
    np.testing.assert_array_equal(label, values[1].astype(np.float32))


def test_what_is_no_package_says_so_in_one_line(package, tmp_path):
    def refused(path):
        with pytest.raises(UserError) as error:
            Emoji(path)
        message = str(error.value)
        assert '\n' not in message
        return message

    assert 'is no package of emoji with emoji.json and img/SET/64' in refused(tmp_path / 'img')
    for content in (
        '[1]',
        '{}',
        '[{}]',
        '[{"image": "a.png", "skin_variations": [1]}]',
        '[{"image": "a.png", "short_names": 5}]',
    ):
        (package / 'emoji.json').write_text(content)
        assert 'is no list of emoji' in refused(package)
    for content in ('[{', '[' * 100_000):
        (package / 'emoji.json').write_text(content)
        assert 'emoji.json cannot be read: ' in refused(package)
    (package / 'emoji.json').write_text(json.dumps([{'image': 'other.png'}]))
    assert 'none of the pictures that emoji.json names' in refused(package)
    (package / 'img' / 'apple' / '64').mkdir(parents=True)
    assert 'several sets of pictures, apple, google: leave one there' in refused(package)
