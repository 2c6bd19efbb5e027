"""Corruptions against closed forms, and what their draws depend on."""

import chex
import numpy as np
import pytest
from PIL import Image, ImageFilter

from sphere_ar_jax.data.shifted import corruptions
from sphere_ar_jax.data.shifted.corruptions import CORRUPTIONS, SEVERITIES, Shift
from sphere_ar_jax.runtime.console import UserError


def _images(n=3, side=16, channels=3):
    shape = (n, side, side, channels)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize('word', CORRUPTIONS)
def test_an_image_depends_on_its_number_alone(word):
    images = _images()
    for severity in SEVERITIES:
        whole = corruptions.corrupt(images, Shift(word, severity), 7)
        chex.assert_shape(whole, images.shape)
        assert whole.dtype == np.uint8
        one = corruptions.corrupt(images[2:], Shift(word, severity), 7, [2])
        np.testing.assert_array_equal(one, whole[2:])
    other = corruptions.corrupt(images, Shift(word, 5), 8)
    assert np.array_equal(other, whole) == (word != 'noisy')


@pytest.mark.parametrize('word', CORRUPTIONS)
def test_severities_go_further_from_the_image(word):
    """The mean distance from a picture with a bright bar grows; half a turn brings some back."""
    images = np.zeros((1, 32, 32, 1), np.uint8)
    images[:, 4:16, 14:18] = 255
    found = [corruptions.corrupt(images, Shift(word, s), 0).astype(float) for s in SEVERITIES]
    distances = [np.abs(changed - images).mean() for changed in found]
    assert distances[0] > 0
    assert np.all(np.diff(distances[:4]) > 0)
    assert distances[4] > distances[0]


def test_inverted():
    images = _images()
    inverted = corruptions.corrupt(images, Shift('inverted', 5), 0)
    np.testing.assert_array_equal(inverted, 255 - images)
    mixed = corruptions.corrupt(images, Shift('inverted', 1), 0)
    np.testing.assert_allclose(mixed, 0.4 * images + 0.6 * (255.0 - images), atol=0.5 + 1e-9)


def test_rotated():
    images = _images(side=15)
    for severity, turns in ((4, 1), (5, 2)):
        rotated = corruptions.corrupt(images, Shift('rotated', severity), 0)
        np.testing.assert_array_equal(rotated, np.rot90(images, turns, (1, 2)))
    # By another library, inside of the circle that no border reaches.
    tilted = corruptions.corrupt(images[..., :1], Shift('rotated', 2), 0)[0, ..., 0]
    expected = Image.fromarray(images[0, ..., 0]).rotate(30, Image.Resampling.BILINEAR)
    y, x = np.indices(tilted.shape) - 7
    inside = y**2 + x**2 < 36
    np.testing.assert_allclose(tilted[inside].astype(int), np.asarray(expected)[inside], atol=3)


def test_noisy():
    images = np.full((2, 64, 64, 3), 128, np.uint8)
    noise = corruptions.corrupt(images, Shift('noisy', 2), 3).astype(float) - 128
    # 12,288 numbers an image: the standard error of the deviation is 0.14.
    np.testing.assert_allclose(noise.std((1, 2, 3)), 0.12 * 255, atol=0.7)
    np.testing.assert_allclose(noise.mean((1, 2, 3)), 0, atol=1.4)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05


def test_thickened():
    images = _images(channels=1)
    for severity in SEVERITIES:
        assert np.all(corruptions.corrupt(images, Shift('thickened', severity), 0) >= images)
    # A radius of 1.5 pixels reaches 3×3 of them, PIL's largest value of a square.
    thick = corruptions.corrupt(images, Shift('thickened', 2), 0)
    for before, after in zip(images[..., 0], thick[..., 0], strict=True):
        expected = Image.fromarray(before).filter(ImageFilter.MaxFilter(3))
        np.testing.assert_array_equal(after[1:-1, 1:-1], np.asarray(expected)[1:-1, 1:-1])
    # A point becomes a disc, here of radius 3.
    point = np.zeros((1, 16, 16, 1), np.uint8)
    point[0, 8, 8] = 200
    disc = corruptions.corrupt(point, Shift('thickened', 5), 0)[0, ..., 0]
    y, x = np.indices((16, 16)) - 8
    np.testing.assert_array_equal(disc, np.where(y**2 + x**2 <= 9, 200, 0))


def test_words_and_severities():
    assert corruptions.parse('noisy:3') == ('noisy', 3)
    for text in ('noisy', 'noisy:', 'noisy:6', 'blurred:3', ''):
        with pytest.raises(UserError, match='is no corruption: write WORD:SEVERITY, as noisy:3'):
            corruptions.parse(text)
    with pytest.raises(ValueError, match='images must be uint8'):
        corruptions.corrupt(np.zeros((1, 8, 8, 1)), Shift('noisy', 1), 0)
