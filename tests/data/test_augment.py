import io
import json
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from sphere_ar_jax.data import augment
from sphere_ar_jax.data.pixels import to_float
from tests.conftest import GOLDENS
from tests.fake_images import encode, picture

CASES = GOLDENS.parent / 'cases'


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
    assert y.dtype == np.float32
    assert y[0] == -1
    assert y[255] == 1
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
        ours = augment.decode(encode(image, kind), as_stored=True)
        assert ours.mode == 'RGB'
        np.testing.assert_array_equal(
            np.asarray(ours), np.asarray(image.convert('RGB')), err_msg=f'{image.mode} {kind}'
        )
    # The recipe of ImageNet drops the alpha channel.
    stored = augment.decode(encode(alpha, 'PNG'), as_stored=True)
    np.testing.assert_array_equal(np.asarray(stored), picture(3))
    # All else lays it on white. PIL rounds twice, hence the tolerance.
    share = picture(4)[..., :1] / 255
    np.testing.assert_allclose(
        np.asarray(augment.decode(encode(alpha, 'PNG'))),
        picture(3) * share + 255 * (1 - share),
        atol=1,
    )


def test_every_jpeg_becomes_rgb():
    rgb = Image.fromarray(picture(3, 64, 64))
    for image in (rgb, rgb.convert('L'), rgb.convert('CMYK')):
        for options in ({}, {'progressive': True}, {'subsampling': 0}):
            ours = augment.decode(encode(image, 'JPEG', quality=95, **options))
            assert ours.mode == 'RGB'
            assert ours.size == (64, 64)
            error = np.abs(np.asarray(ours).astype(int) - np.asarray(image.convert('RGB')))
            assert error.mean() < 6, (image.mode, options)


def _halves(name, **options):
    """(size, mean colour of the upper half, of the lower half) of a case."""
    image = augment.decode((CASES / 'images' / name).read_bytes(), **options)
    assert image.mode == 'RGB'
    pixels = np.asarray(image, float)
    middle = len(pixels) // 2
    return image.size, pixels[:middle].mean((0, 1)), pixels[middle:].mean((0, 1))


WHITE = (255, 255, 255)
RED = (255, 0, 0)
MAGENTA = (255, 0, 255)


@pytest.mark.parametrize(
    ('name', 'upper', 'lower'),
    [
        ('grey_alpha.png', (200, 200, 200), WHITE),
        ('transparent_magenta.png', MAGENTA, WHITE),
        ('two_frames.gif', RED, RED),
        ('two_frames.webp', RED, RED),
    ],
)
def test_what_is_transparent_lies_on_white_and_the_first_frame_counts(name, upper, lower):
    found = _halves(name)
    np.testing.assert_allclose(found[1], upper)
    np.testing.assert_allclose(found[2], lower)


def test_every_case_has_its_test():
    """What `expected.json` says of each file is asked for in this file, by its name."""
    known = json.loads((CASES / 'images' / 'expected.json').read_text())
    text = pathlib.Path(__file__).read_text()
    assert len(known) == 11
    assert all(name in text for name in known)


def test_transparent_entries_of_a_palette_lie_on_white():
    content = (CASES / 'images' / 'palette_transparency.png').read_bytes()
    image = Image.open(io.BytesIO(content))
    indices = np.asarray(image)
    palette = np.array(image.getpalette()).reshape(-1, 3)
    expected = palette[indices]
    is_transparent = indices == image.info['transparency']
    expected[is_transparent] = 255
    assert 0 < is_transparent.sum() < is_transparent.size
    np.testing.assert_array_equal(np.asarray(augment.decode(content)), expected)


@pytest.mark.parametrize('as_stored', [False, True])
@pytest.mark.parametrize('name', ['grey16.png', 'grey16.tif'])
def test_grey_of_16_bits_keeps_its_shades(name, as_stored):
    content = (CASES / 'images' / name).read_bytes()
    values = np.asarray(Image.open(io.BytesIO(content)), float)
    ours = np.asarray(augment.decode(content, as_stored=as_stored))
    assert values.max() > 65_000
    assert len(np.unique(ours)) > 60
    for channel in range(3):
        np.testing.assert_array_equal(ours[..., channel], np.round(values / 257))


def _grey16():
    """All values of 16 bits, (256, 256)."""
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


def test_every_way_to_write_grey_of_16_bits():
    values = _grey16()
    expected = np.round(values / 257)
    white_is_zero = TiffImagePlugin.ImageFileDirectory_v2()
    white_is_zero[262] = 0
    tiff = encode(Image.fromarray(values), 'TIFF', tiffinfo=white_is_zero)
    header = b'P5 256 256 65535\n'
    for content, wanted in (
        (encode(Image.fromarray(values), 'PNG'), expected),
        (encode(Image.fromarray(values), 'TIFF'), expected),
        (encode(Image.fromarray(values.astype(np.int32)), 'TIFF'), expected),
        (header + values.astype('>u2').tobytes(), expected),
        (tiff, 255 - expected),
    ):
        ours = np.asarray(augment.decode(content))[..., 0]
        np.testing.assert_array_equal(ours, wanted)


def test_one_grey_value_may_be_transparent():
    """At 1, 2, 4 and 16 bits, where PNG counts the value in its own bits."""
    for bits, row, value, expected in (
        (1, [0b01000000], 1, [0, 255]),
        (2, [0b01100000], 2, [85, 255]),
        (4, [0x3A], 10, [51, 255]),
        (16, [0x10, 0x10, 0xC0, 0x00], 0xC000, [16, 255]),
    ):
        ours = augment.decode(_png(2, 1, bits, bytes(row), transparent=value))
        assert np.asarray(ours)[0, :, 0].tolist() == expected, bits


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ((CASES / 'images' / 'float01.tif').read_bytes(), 'float images have no agreed range'),
        (encode(np.full((4, 4), 70_000, np.int32), 'TIFF'), 'grey values beyond 16 bits'),
        (encode(np.full((4, 4), -1, np.int32), 'TIFF'), 'grey values beyond 16 bits'),
        (encode(Image.new('LAB', (4, 4)), 'TIFF'), 'CIELAB images are not read'),
    ],
    ids=['float', 'large', 'negative', 'lab'],
)
def test_images_without_an_agreed_range_are_refused_by_name(content, message):
    for as_stored in (False, True):
        with pytest.raises(augment.BrokenImageError, match=message):
            augment.decode(content, as_stored=as_stored)


def test_photographs_are_turned_but_not_those_of_imagenet():
    size, upper, lower = _halves('orientation6.jpg')
    assert size == (40, 64)
    assert upper[0] > 240 > 15 > upper[2]
    assert lower[2] > 240 > 15 > lower[0]
    size, *_ = _halves('orientation6.jpg', as_stored=True)
    assert size == (64, 40)
    content = (CASES / 'images' / 'orientation6.jpg').read_bytes()
    assert augment.decode(content, draft=10).size == (10, 16)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_data_leave_the_pixels():
    content = encode(picture(1), 'JPEG', exif=b'Exif\x00\x00MM\x00*' + b'\xff' * 60)
    np.testing.assert_array_equal(
        augment.decode(content), augment.decode(encode(picture(1), 'JPEG'))
    )


def test_what_follows_an_image_is_ignored():
    size, *_ = _halves('trailing_garbage.jpg')
    assert size == (64, 40)


def test_an_image_of_one_row_or_column_is_cropped_or_named():
    row = augment.decode((CASES / 'images' / 'tall1x2000.png').read_bytes())
    column = row.transpose(Image.Transpose.TRANSPOSE)
    assert (row.size, column.size) == ((2000, 1), (1, 2000))
    for image, sides in ((row, '512000 × 256'), (column, '256 × 512000')):
        assert augment.center_crop(image, 32).shape == (32, 32, 3)
        with pytest.raises(augment.BrokenImageError, match=f'{sides} pixels are more than'):
            augment.center_crop(image, 256)


def test_grey_models_see_grey_by_the_weights_of_itu_601():
    content = encode(picture(2, 32, 32), 'PNG')
    transform = augment.Augmentation(32, decay_from=0, decay_to=0, channels=1)
    ours = transform({'image': content, 'label': 0}, 0, np.random.default_rng(1))['image']
    expected = picture(2, 32, 32) @ np.array([0.299, 0.587, 0.114])
    drawn = np.random.default_rng(1)
    drawn.random()
    if drawn.integers(0, 2):
        expected = expected[:, ::-1]
    assert ours.shape == (32, 32, 1)
    np.testing.assert_allclose((ours[..., 0] + 1) * 127.5, expected, atol=1)


def _png(width, height, bits, row, transparent):
    """A grey PNG whose rows are all alike, with a transparent value."""

    def chunk(kind, data):
        check = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + check

    header = struct.pack('>IIBBBBB', width, height, bits, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'tRNS', struct.pack('>H', transparent))
        + chunk(b'IDAT', zlib.compress((b'\0' + row) * height))
        + chunk(b'IEND', b'')
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
    'a format that is not read': encode(picture(0), 'ICO'),
    'half a GIF': encode(picture(0), 'GIF')[:900],
    'more pixels than PIL allows': _bomb(20_000, 20_000),
    'more pixels than we allow': _bomb(10_000, 10_000),
}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('content', BROKEN.values(), ids=list(BROKEN))
def test_broken_images_are_told(content):
    assert len(encode(picture(0))) > 900
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(augment.BrokenImageError) as error:
        augment.decode(content)
    assert str(error.value)
    assert '\n' not in str(error.value)
    assert ' at 0x' not in str(error.value)  # no addresses of objects


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_bomb_is_not_unpacked():
    with pytest.raises(augment.BrokenImageError, match=r'^10000 × 9000 pixels are more than'):
        augment.decode(_bomb(10_000, 9000))


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_damage_raises_nothing_else():
    rng = np.random.default_rng(0)
    for kind in augment.FORMATS:
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
        assert ours['image'].shape == (32, 32, 3)
        assert ours['image'].dtype == np.float32
        assert ours['label'] == 7
        np.testing.assert_array_equal(ours['image'], _by_hand(image, ratio, seed))
        results.append(ours['image'].tobytes())
    # centre crops differ by their flip alone
    assert (len(set(results)) == 2) == (ratio == 0)
