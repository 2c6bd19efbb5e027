"""The class tokens of a run for data with other classes."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.training.tuning import transfer


@pytest.mark.parametrize(
    ('old', 'new', 'counts', 'expected'),
    [
        (('cat', 'dog'), ('ant', 'dog', 'cat'), (2, 3), [None, 1, 0]),
        (('cat', 'dog'), ('dog',), (2, 3), [1, None, None]),  # the model has room for more
        (None, ('dog',), (4, 1), [None]),
        (None, None, (3, 2), [None, None]),
        (None, None, (3, 3), [0, 1, 2]),
    ],
)
def test_classes_are_found_by_their_names(old, new, counts, expected):
    assert transfer.origins(old, new, *counts) == expected


def test_new_classes_begin_with_the_mean_of_the_old():
    table = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    params = {'cls_embedding': jnp.asarray(table), 'norm': jnp.ones(3)}
    found = transfer.with_classes(params, [None, 2, None, 0])
    mean = table[:3].mean(axis=0)  # without the null class, which comes last and is kept
    expected = np.stack([mean, table[2], mean, table[0], table[3]])
    chex.assert_trees_all_close(found['cls_embedding'], expected, rtol=1e-6)
    assert found['norm'] is params['norm']


def test_the_line_names_what_is_new():
    line = transfer.describe([0, None, None], ('cat', 'dog'))
    assert line == (
        'class tokens: 1 of 3 classes keep theirs, 2 begin with the mean of the old ones (dog, 2)'
    )
    assert transfer.describe([1, 0], None) == 'class tokens: 2 of 2 classes keep theirs'
