"""What holds for every config and every label, on inputs that hypothesis looks for."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_ar_jax.config import checks, schema
from sphere_ar_jax.models.conditions import Classes
from sphere_ar_jax.runtime.console import UserError
from tests.tiny_config import get_config

NUMBERS = [
    name for name, value in schema.leaves(schema.default().to_dict()).items() if type(value) is int
]
REALS = [
    name
    for name, value in schema.leaves(schema.default().to_dict()).items()
    if type(value) is float
]
CLASSES = Classes(10, 4, 16)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.tuples(st.sampled_from(NUMBERS), st.integers(-3, 70)),
        st.tuples(st.sampled_from(REALS), st.floats(-2, 2, allow_nan=False)),
    )
)
def test_a_value_is_taken_or_refused_in_one_line(override):
    """Whatever one key is set to, the config is read back the same from JSON, or refused in one
    line.
    """
    name, value = override
    config = get_config()
    config.update_from_flattened_dict({name: value})
    try:
        checks.check(config)
    except UserError as error:
        assert '\n' not in str(error)
        assert len(str(error)) > 10
        return
    values = json.loads(json.dumps(schema.as_dict(config)))
    again = checks.from_dict(values)
    assert schema.as_dict(again) == schema.as_dict(config)
    assert schema.differences(schema.as_dict(again), values) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5))
def test_labels_are_checked(labels):
    if all(0 <= label < 10 for label in labels):
        CLASSES.check(np.array(labels))
        return
    with pytest.raises(ValueError, match='labels must lie between 0 and 9'):
        CLASSES.check(np.array(labels))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=5))
def test_labels_that_are_no_whole_numbers_are_refused(labels):
    with pytest.raises(ValueError, match='must be whole numbers'):
        CLASSES.check(np.array(labels, float))
