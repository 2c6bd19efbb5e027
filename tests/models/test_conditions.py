"""Labels that Python callers give: whole numbers of the model's classes, or one line."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.config import build
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.conditions import Classes, check_labels
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.sampling.tokens import sample_tokens
from tests import tiny_config

CLASSES = Classes(num_classes=10, length=1, width=4)
BAD = {
    'the null class': ([3, 10], 'labels must lie between 0 and 9, but go from 3 to 10'),
    'above it': ([3, 11], 'labels must lie between 0 and 9'),
    'below 0': ([-1, 3], 'labels must lie between 0 and 9'),
    'wraps in 32 bits': ([2**32 + 3], 'labels must lie between 0 and 9'),
    'a fraction': ([2.7, 1.0], 'labels must be whole numbers between 0 and 9, but are float'),
    'whole as a float': ([2.0], 'labels must be whole numbers between 0 and 9, but are float'),
    'NaN': ([float('nan')], 'labels must be whole numbers between 0 and 9, but are float'),
    'truth values': ([True, False], 'labels must be whole numbers between 0 and 9, but are bool'),
    'words': (['cat'], 'labels must be whole numbers between 0 and 9, but are <U3'),
    'nothing': ([None], 'labels must be whole numbers between 0 and 9, but are object'),
}  # fmt: skip


@pytest.fixture(scope='module')
def run():
    return tiny_config.random_run()


def _forms(labels):
    """The same labels as a list, as NumPy's and, where it has such, as JAX's array."""
    yield labels
    array = np.array(labels)
    yield array
    narrow = array.dtype.kind not in 'iu' or np.abs(array).max() < 2**31
    if array.dtype.kind in 'biuf' and narrow:
        yield jnp.asarray(array)


@pytest.mark.parametrize('what', BAD)
def test_labels_that_are_no_classes(what):
    labels, message = BAD[what]
    for form in _forms(labels):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            CLASSES.check(form)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('labels', [[], 3, [[1, 2]], np.zeros((0,), np.int32)])
def test_labels_are_one_for_each_image(labels):
    with pytest.raises(UserError, match=r'labels must be (a list of numbers|whole numbers)'):
        CLASSES.check(labels)


def test_labels_of_all_kinds_of_whole_numbers_pass():
    for dtype in (np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64):
        CLASSES.check(np.array([0, 9, 3], dtype))
    CLASSES.check(jnp.array([0, 9]))
    CLASSES.check([0, 9])


def test_only_the_dtype_of_traced_labels_is_checked():
    @jax.jit
    def checked(labels):
        check_labels(labels, 10)
        return labels

    assert checked(jnp.array([99])) == 99
    with pytest.raises(UserError, match='but are float32'):
        checked(jnp.array([1.0]))


@pytest.mark.parametrize('what', BAD)
def test_every_way_to_sample_refuses_them(run, what):
    labels, message = BAD[what]
    options = Options(num_steps=2)
    keys = jax.random.split(jax.random.key(0), len(labels))
    sampler = build.build_sampler(run.config)
    for form in _forms(labels):
        with pytest.raises(UserError, match=re.escape(message)):
            sample_tokens(run.ar, run.ar_params, form, keys, options)
        with pytest.raises(UserError, match=re.escape(message)):
            on_mesh.draw_images(run, sampler, form, seed=0, mesh=sharding.make_mesh(1))


def test_the_model_takes_the_null_class_and_no_other_number_more(run):
    """Guidance and training give it themselves."""

    def embed(labels):
        return run.ar.condition.apply({'params': run.ar_params}, labels, method='embed')

    assert np.isfinite(embed(np.array([0, 10]))).all()
    for labels in ([11], [-1]):
        with pytest.raises(UserError, match='labels must lie between 0 and 10'):
            embed(np.array(labels))
    with pytest.raises(UserError, match='but are float'):
        embed(np.array([2.7]))


@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.int32])
def test_the_null_class_is_beyond_what_narrow_labels_hold(dtype):
    many = Classes(num_classes=1000, length=1, width=4)
    labels = jnp.array([3, 99], dtype)
    null = many.null(labels)
    chex.assert_trees_all_equal(null, jnp.array([1000, 1000], jnp.int32))
    keys = jax.random.split(jax.random.key(0), 2)
    chex.assert_trees_all_equal(many.drop(keys, labels, 1.0), null)
    kept = many.drop(keys, labels, 0.0)
    chex.assert_trees_all_equal(kept, labels.astype(jnp.int32))


def test_labels_of_a_narrow_dtype_are_guided_alike(run):
    sampler = build.build_sampler(run.config)
    keys = jax.random.split(jax.random.key(0), 2)
    wide, narrow = (
        sample_tokens(
            run.ar,
            run.ar_params,
            np.array([3, 9], dtype),
            keys,
            sampler.options,
            guidance_scale=sampler.guidance_scale,
        )
        for dtype in (np.int32, np.uint8)
    )
    chex.assert_trees_all_equal(wide, narrow)


@pytest.mark.parametrize('index', [[0], [0, 1, 2], [0.5, 1], [-1, 0], [0, 2**31], [[0, 1]]])
def test_numbers_of_noise_are_one_for_each_image(run, index):
    sampler = build.build_sampler(run.config)
    with pytest.raises(UserError, match='index must be 2 whole numbers'):
        on_mesh.draw_images(
            run, sampler, [1, 2], seed=0, index=np.array(index), mesh=sharding.make_mesh(1)
        )
