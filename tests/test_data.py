import chex
import numpy as np
import pytest
from sklearn.datasets import load_digits

from sphere_ar_jax import data


def _take(iterator, n):
    return [next(iterator) for _ in range(n)]


def _rows(batches):
    return np.concatenate([batch['image'].reshape(len(batch['image']), -1) for batch in batches])


class Numbered:
    """A source whose images are their own index."""

    image_shape, num_classes = (1, 1, 1), 3

    def __len__(self):
        return 48

    def __getitem__(self, index):
        return {'image': np.full((1, 1, 1), index, np.float32), 'label': np.int32(index % 3)}


def test_digits_are_the_real_ones_and_the_split_is_clean():
    train, heldout, everything = (data.Digits(split, seed=3) for split in ('train', 'heldout', 'all'))
    assert (len(train), len(heldout), len(everything)) == (1438, 359, 1797)
    real = load_digits()
    key = lambda images: sorted(map(bytes, np.ascontiguousarray(images).reshape(len(images), -1)))
    assert key(np.concatenate([train.pixels, heldout.pixels]) * 16) == key(real.images)
    assert sorted(train.labels.tolist() + heldout.labels.tolist()) == sorted(real.target.tolist())
    again = data.Digits('heldout', seed=3)
    np.testing.assert_array_equal(again.pixels, heldout.pixels)
    assert not np.array_equal(data.Digits('heldout', seed=4).pixels, heldout.pixels)


def test_digit_items():
    source = data.Digits('train', seed=0)
    item = source[5]
    chex.assert_shape(item['image'], source.image_shape)
    assert item['image'].dtype == np.float32 and item['label'].dtype == np.int32
    assert item['image'].min() >= -1 and item['image'].max() <= 1
    np.testing.assert_allclose(data.shrink((item['image'] + 1) / 2)[..., 0], source.pixels[5], atol=1e-7)


def test_enlarge_and_shrink_are_inverse():
    images = np.random.default_rng(0).normal(size=(3, 4, 5, 2))
    assert data.enlarge(images).shape == (3, 8, 10, 2)
    np.testing.assert_allclose(data.shrink(data.enlarge(images)), images)


def test_every_epoch_has_every_image_once_in_its_own_order():
    order = _rows(_take(data.batches(Numbered(), batch_size=8, seed=0), 18)).ravel().reshape(3, 48)
    for epoch in order:
        assert sorted(epoch) == list(range(48))
    assert not np.array_equal(order[0], order[1]) and not np.array_equal(order[1], order[2])


def test_a_function_of_the_seed_alone():
    same = [_rows(_take(data.batches(Numbered(), batch_size=8, seed=5, threads=t), 9)) for t in (1, 4)]
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(same[0], _rows(_take(data.batches(Numbered(), batch_size=8, seed=6), 9)))


@pytest.mark.parametrize('hosts', [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(hosts):
    alone = _take(data.batches(Numbered(), batch_size=8, seed=0), 9)
    parts = [
        _take(data.batches(Numbered(), batch_size=8, seed=0, process_index=p, process_count=hosts), 9)
        for p in range(hosts)
    ]
    for step, batch in enumerate(alone):
        joined = np.concatenate([part[step]['image'] for part in parts])
        np.testing.assert_array_equal(joined, batch['image'])


def test_state_goes_on_where_it_was():
    iterator = data.batches(Numbered(), batch_size=8, seed=0)
    _take(iterator, 7)
    state = iterator.get_state()
    expected = _rows(_take(iterator, 5))
    other = data.batches(Numbered(), batch_size=8, seed=0)
    other.set_state(state)
    np.testing.assert_array_equal(_rows(_take(other, 5)), expected)


def test_uneven_batches_are_refused():
    with pytest.raises(ValueError, match='not a multiple'):
        data.batches(Numbered(), batch_size=9, seed=0, process_count=2)
