import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from sphere_ar_jax.data import augment
from sphere_ar_jax.data.pixels import to_float
from tests.conftest import GOLDENS
from tests.fake_images import encode, picture


@pytest.fixture(scope='module')
def crops():
    return dict(np.load(GOLDENS / 'crops.npz'))


class Replay:
    """Draws that were recorded as rows (low, high, drawn); asks that the ranges are the recorded
    ones.
    """

    def __init__(self, rows):
        self.rows = rows.tolist()

    def __call__(self, low, high):
        expected_low, expected_high, drawn = self.rows.pop(0)
        assert (low, high) == (expected_low, expected_high)
        return drawn


def _public_crop(image, size, shorter, y, x):
    """The recipe by PIL alone: the whole image resized, then cut."""
    while min(image.size) >= 2 * shorter:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    image = image.resize(
        tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC
    )
    return np.array(image)[y : y + size, x : x + size]


@pytest.mark.parametrize('i', range(5))
def test_center_crop_is_the_golden_one(crops, i):
    np.testing.assert_array_equal(
        augment.center_crop(Image.fromarray(crops[f'crop{i}/in']), 32), crops[f'crop{i}/out32']
    )


@pytest.mark.parametrize('i', range(4))
def test_random_crop_is_the_golden_one(crops, i):
    draw = Replay(crops[f'rcrop{i}/draws'])
    pixels = augment.crop(
        Image.fromarray(crops[f'crop{i}/in']), 32, augment.draw_shorter_side(32, draw), draw
    )
    np.testing.assert_array_equal(pixels, crops[f'rcrop{i}/out32'])
    assert not draw.rows


def test_what_is_not_computed_changes_no_bit():
    """Random sizes from far smaller than the crop to many times larger, long and thin ones too,
    crops at every edge.
    """
    rng = np.random.default_rng(0)
    for k in range(1500):
        height, width = np.exp(rng.uniform(np.log(3), np.log(300), 2)).astype(int)
        if max(height, width) > 20 * min(height, width):
            continue
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        drawn = []

        def draw(low, high):
            drawn.append(int((low, high - 1, rng.integers(low, high))[k % 3]))
            return drawn[-1]

        size = int(rng.integers(8, 49))
        ours = augment.crop(image, size, augment.draw_shorter_side(size, draw), draw)
        np.testing.assert_array_equal(
            ours, _public_crop(image, size, *drawn), err_msg=f'{width} × {height}, {drawn}'
        )


def test_shorter_side_reaches_both_its_ends():
    rng = np.random.default_rng(0)
    drawn = {augment.draw_shorter_side(256, rng.integers) for _ in range(2000)}
    assert drawn == set(range(256, 321))
    assert augment.draw_shorter_side(33, lambda low, high: high - 1) == 42  # ⌈41.25⌉


def test_aug_ratio_is_the_golden_schedule():
    golden = np.load(GOLDENS / 'optimizer.npz')
    ours = [augment.aug_ratio(int(epoch)) for epoch in golden['aug_epochs']]
    np.testing.assert_allclose(ours, golden['aug_ratio'], rtol=1e-12, atol=1e-12)
    assert [augment.aug_ratio(epoch, 2, 6) for epoch in range(8)] == [
        1,
        1,
        1,
        0.75,
        0.5,
        0.25,
        0,
        0,
    ]
    assert [augment.aug_ratio(epoch, 3, 3) for epoch in (2, 3, 4)] == [1, 0, 0]


def test_to_float_rounds_as_published():
    x = np.arange(256, dtype=np.uint8)
    y = to_float(x)
    assert y.dtype == np.float32 and y[0] == -1 and y[255] == 1
    np.testing.assert_array_equal(y, (x.astype(np.float32) / 255.0 - 0.5) * 2.0)
    assert np.any(y != (x / 127.5 - 1).astype(np.float32))  # which would not be the same


def test_every_mode_becomes_rgb():
    """Against PIL's own conversion of the image before it was encoded, where the format keeps it
    exactly.
    """
    rgb = Image.fromarray(picture(3))
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(picture(4)[..., 0]))
    palette = rgb.quantize(17)
    for image, kind in (
        (rgb, 'PNG'), (rgb.convert('L'), 'PNG'), (rgb.convert('LA'), 'PNG'), (alpha, 'PNG'),
        (palette, 'PNG'), (rgb.convert('1'), 'PNG'), (rgb, 'BMP'), (rgb, 'PPM'), (rgb, 'TIFF'),
    ):  # fmt: skip
        ours = augment.decode(encode(image, kind))
        assert ours.mode == 'RGB'
        np.testing.assert_array_equal(
            np.asarray(ours), np.asarray(image.convert('RGB')), err_msg=f'{image.mode} {kind}'
        )
    # The alpha channel is dropped, not blended.
    np.testing.assert_array_equal(np.asarray(augment.decode(encode(alpha, 'PNG'))), picture(3))


def test_every_jpeg_becomes_rgb():
    rgb = Image.fromarray(picture(3, 64, 64))
    for image in (rgb, rgb.convert('L'), rgb.convert('CMYK')):
        for options in ({}, {'progressive': True}, {'subsampling': 0}):
            ours = augment.decode(encode(image, 'JPEG', quality=95, **options))
            assert ours.mode == 'RGB' and ours.size == (64, 64)
            error = np.abs(np.asarray(ours).astype(int) - np.asarray(image.convert('RGB')))
            assert error.mean() < 6, (image.mode, options)


def test_exif_rotation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter to see it upright
    content = encode(picture(1), 'JPEG', exif=exif)
    assert Image.open(io.BytesIO(content)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(
        augment.decode(content), augment.decode(encode(picture(1), 'JPEG'))
    )


def _bomb(width, height):
    """A PNG that is small, but says it is large."""

    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return (
        b'\x89PNG\r\n\x1a\n'
        + header
        + chunk(b'IDAT', zlib.compress(bytes(10_000)))
        + chunk(b'IEND', b'')
    )


BROKEN = {
    'empty': b'',
    'text': b'no image at all',
    'half a JPEG': encode(picture(0))[:700],
    'the head of a JPEG': encode(picture(0))[:100],
    'half a progressive JPEG': encode(picture(0), progressive=True)[:700],
    'half a PNG': encode(picture(0), 'PNG')[:300],
    'a format that is not read': encode(picture(0), 'GIF'),
    'more pixels than PIL allows': _bomb(20_000, 20_000),
    'more pixels than we allow': _bomb(10_000, 10_000),
}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('content', BROKEN.values(), ids=list(BROKEN))
def test_broken_images_are_told(content):
    assert len(encode(picture(0))) > 900 and not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(augment.BrokenImageError) as error:
        augment.decode(content)
    assert str(error.value) and '\n' not in str(error.value)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_bomb_is_not_unpacked():
    with pytest.raises(augment.BrokenImageError, match=r'^10000 × 9000 pixels are more than'):
        augment.decode(_bomb(10_000, 9000))


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_damage_raises_nothing_else():
    rng = np.random.default_rng(0)
    for kind in ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF'):
        content = encode(picture(0, 24, 24), kind)
        broken = 0
        for _ in range(150):
            damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
            for _ in range(rng.integers(0, 9)):
                damaged[rng.integers(min(len(damaged), 200))] = rng.integers(256)
            try:
                assert augment.decode(bytes(damaged)).mode == 'RGB'
            except augment.BrokenImageError:
                broken += 1
        assert broken > 20, kind


def test_a_long_thin_image_is_no_bomb():
    thin = Image.fromarray(np.zeros((1, 40_000, 3), np.uint8))
    with pytest.raises(augment.BrokenImageError, match='10240000 × 256 pixels'):
        augment.center_crop(thin, 256)


def test_draft_is_another_size_only_where_the_image_is_large():
    small = encode(picture(1, 60, 80))
    large = encode(picture(1, 140, 180))
    np.testing.assert_array_equal(augment.decode(small, 32), augment.decode(small))
    assert augment.decode(large, 32).size == (45, 35)  # a quarter; an eighth would be below 32
    assert augment.decode(encode(picture(1, 140, 180), 'PNG'), 32).size == (180, 140)


def _by_hand(image, ratio, rng):
    """The augmentation from its documented draws and PIL alone."""
    pixels = image
    rng = np.random.default_rng(rng)
    if rng.random() < ratio:
        shorter = int(rng.integers(32, 41))
        scale = shorter / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        y = int(rng.integers(0, height - 32 + 1))
        x = int(rng.integers(0, width - 32 + 1))
    else:
        shorter = 32
        scale = 32 / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        y = (height - 32) // 2
        x = (width - 32) // 2
    pixels = _public_crop(image, 32, shorter, y, x)
    if rng.integers(0, 2):
        pixels = pixels[:, ::-1]
    return (pixels.astype(np.float32) / 255.0 - 0.5) * 2.0


@pytest.mark.parametrize(('epoch', 'ratio'), [(0, 1), (363, 0.48), (399, 0)])
def test_augmentation_is_a_function_of_its_rng(epoch, ratio):
    transform = augment.Augmentation(32)
    content = encode(picture(2, 50, 63))
    image = augment.decode(content)
    results = []
    for seed in range(24):
        ours = transform(
            {'image': content, 'label': np.int32(7)}, epoch, np.random.default_rng(seed)
        )
        assert (
            ours['image'].shape == (32, 32, 3)
            and ours['image'].dtype == np.float32
            and ours['label'] == 7
        )
        np.testing.assert_array_equal(ours['image'], _by_hand(image, ratio, seed))
        results.append(ours['image'].tobytes())
    # centre crops differ by their flip alone
    assert (len(set(results)) == 2) == (ratio == 0)
