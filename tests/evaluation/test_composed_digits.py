"""Scores of composed digits: what the reader sees, and what counts as right."""

import dataclasses

import chex
import numpy as np
import pytest

from sphere_ar_jax.data import small
from sphere_ar_jax.data.captions import composed
from sphere_ar_jax.data.captions.composed import Composition, Thing
from sphere_ar_jax.evaluation.captioned import composed_digits


@pytest.fixture(scope='module')
def data():
    return small.open_data_set('composed', None, 0, 0.2)


def ramp():
    """An image whose pixels tell their place: 32·y + x, over 1,024."""
    return np.arange(1024.0).reshape(32, 32) / 1024


BESIDE = Composition((Thing(3), Thing(8, small=True)))
ABOVE = dataclasses.replace(BESIDE, upright=True)
ROWS = Composition(tuple(Thing(k) for k in (4, 1, 8, 8)))


@pytest.mark.parametrize(
    ('composition', 'places'),
    [
        (BESIDE, [np.s_[4:28, 0:16], np.s_[4:28, 16:32]]),
        (ABOVE, [np.s_[0:16, 4:28], np.s_[16:32, 4:28]]),
        (ROWS, [np.s_[0:16, 0:16], np.s_[0:16, 16:32], np.s_[16:32, 0:16], np.s_[16:32, 16:32]]),
    ],
)
def test_windows_show_one_digit_each(composition, places):
    found = composed_digits.windows(ramp() + 1, composition)
    chex.assert_shape(found, (len(places), 24, 24))
    for window, place in zip(found, places, strict=True):
        part = ramp()[place] + 1
        height, width = part.shape
        inside = window[(24 - height) // 2 :, (24 - width) // 2 :][:height, :width]
        np.testing.assert_array_equal(inside, part)
        np.testing.assert_allclose(window.sum(), part.sum())


class _Network:
    """Reads what it is told to read."""

    def __init__(self, answers):
        self.answers = np.asarray(answers)

    def predict(self, windows):
        assert len(windows) == len(self.answers)
        return self.answers


def _reader(answers):
    reader = composed_digits.Reader.__new__(composed_digits.Reader)
    reader._network = _Network(answers)
    return reader


def test_an_image_is_right_where_all_its_digits_are():
    pixels = np.stack([ramp()] * 4)
    wanted = [BESIDE, BESIDE, ABOVE, ROWS]
    # Right; the digits exchanged; a wrong size; the last digit wrong.
    answers = [3, 18, 18, 3, 3, 8, 4, 1, 8, 7]
    read = _reader(answers).read(pixels, wanted)
    np.testing.assert_array_equal(read.digits, [True, False, True, False])
    np.testing.assert_array_equal(read.sizes, [True, False, False, True])
    np.testing.assert_array_equal(read.all, [True, False, False, False])


def test_shares_are_those_of_each_group(data):
    wishes = [
        composed_digits.Asked('seen', BESIDE),
        composed_digits.Asked('held_out', ABOVE),
        composed_digits.Asked('seen', BESIDE),
        composed_digits.Asked('rows', ROWS),
    ]
    answers = [3, 18, 3, 8, 3, 3, 4, 1, 8, 8]
    images = np.stack([2 * ramp()[..., None] - 1] * 4)
    found = composed_digits.scores(_reader(answers), data, images, wishes)
    assert found == {
        'samples/seen': 0.5,
        'samples/seen_digits': 0.5,
        'samples/held_out': 0.0,
        'samples/held_out_digits': 1.0,
        'samples/rows': 1.0,
        'samples/rows_digits': 1.0,
    }
    text = composed_digits.summary(4, found | {k.replace('samples', 'real'): 0.75 for k in found})
    assert 'in 50.0% of the images' in text
    assert 'in 0.0% of those' in text
    assert '75.0%' in text


def test_groups_are_asked_for_in_turn(data):
    wishes = composed_digits.asked(data, 100)
    assert len(wishes) == 100
    assert [wish.group for wish in wishes[:4]] == ['seen', 'held_out', 'rows', 'seen']
    held_out = composed.held_out_pairs(0)
    for wish in wishes:
        assert (wish.composition.pairs() <= held_out) == (wish.group == 'held_out')
        assert (len(wish.composition.things) == 4) == (wish.group == 'rows')
    # A longer list begins alike.
    assert composed_digits.asked(data, 200)[:100] == wishes


def test_the_reader_learns_to_read(data, tmp_path):
    """After a few steps it reads sizes, whose truth is the height of the ink."""
    small_data = data._replace(train=composed.Composed('train', 0, count=600))
    reader = composed_digits.Reader(small_data, 60, str(tmp_path))
    found = composed_digits.floor(reader, composed_digits.real_images(data))
    wishes = composed_digits.asked(data, 200)
    rng = np.random.default_rng(1)
    pixels = np.stack([data.heldout.draw(wish.composition, rng) for wish in wishes])
    read = reader.read(pixels, [wish.composition for wish in wishes])
    assert read.sizes.mean() > 0.8
    assert 0 <= found['real/held_out'] <= found['real/held_out_digits'] <= 1
    # The weights are kept.
    again = composed_digits.Reader(small_data, 60, str(tmp_path), progress=None)
    np.testing.assert_array_equal(
        again.read(pixels, [wish.composition for wish in wishes]).digits, read.digits
    )


def test_captions_are_right_word_by_word():
    """Either of two digits may come first; all else must be as the grammar has it."""
    pair = Composition((Thing(3, thick=True), Thing(7, small=True)), upright=True)
    rows = Composition(tuple(Thing(digit) for digit in (4, 1, 8, 8)))
    assert rows.captions() == {'two rows: 4 1 / 8 8'}
    wishes = [
        *(composed_digits.Asked('seen', pair) for _ in range(4)),
        composed_digits.Asked('held_out', pair),
        composed_digits.Asked('rows', rows),
    ]
    texts = [
        'a thick three above a small seven',
        'a small seven below a thick three',
        'a thick three above a seven',
        'a small seven above a thick three',
        '',
        'two rows: 4 1 / 8 8',
    ]
    found = composed_digits.caption_scores(texts, wishes)
    assert found == {'captions/seen': 0.5, 'captions/held_out': 0.0, 'captions/rows': 1.0}
