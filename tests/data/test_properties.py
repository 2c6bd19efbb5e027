"""What holds for every image, size and draw, on inputs that hypothesis looks for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sphere_ar_jax.data import augment, digits, pixels


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size=st.sampled_from([1, 8, 16, 31]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_crop_is_a_part_of_the_resized_image(width, height, size, seed):
    """The crop that is cut while it is resized equals the one that is cut from the whole resized
    image.
    """
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    drawn = []

    def draw(low, high):
        drawn.append(int(rng.integers(low, high)))
        return drawn[-1]

    crop = augment.crop(image, size, augment.draw_shorter_side(size, draw), draw)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8
    shorter, y, x = drawn
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    whole = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    np.testing.assert_array_equal(crop, np.asarray(whole)[y : y + size, x : x + size])


@settings(max_examples=60, deadline=None)
@given(epoch=st.integers(0, 1000), start=st.integers(0, 500), length=st.integers(0, 500))
def test_the_share_of_random_crops_only_falls(epoch, start, length):
    now = augment.aug_ratio(epoch, start, start + length)
    later = augment.aug_ratio(epoch + 1, start, start + length)
    assert 0 <= later <= now <= 1
    assert now == 1 or epoch >= start
    assert now == 0 or epoch < start + length


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_shrunken_digit_is_the_digit_before_it_was_enlarged(factor, n, seed):
    images = np.random.default_rng(seed).normal(size=(n, 8, 8, 1))
    np.testing.assert_allclose(
        digits.shrink(digits.enlarge(images, factor), factor), images, rtol=1e-12
    )


def test_bytes_come_back_from_the_models_range():
    """Every byte survives the way to [−1, 1] and back.

    The rounding is that of the published code: clip(127.5·x + 128), cut off.
    """
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(pixels.to_uint8(pixels.to_float(values)), values)
