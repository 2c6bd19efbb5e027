"""What the trainings are made of, and what they begin with."""

import chex
import jax
import pytest

from sphere_ar_jax.config import build, checks
from sphere_ar_jax.training import stages
from tests.tiny_config import get_config, random_params


@pytest.mark.parametrize('transformer', [False, True])
def test_a_distillation_begins_as_its_teacher(transformer):
    """Only the embedding of the step's width is new, and the program that makes it holds no array.

    On several hosts a compiled program cannot hold the teacher's arrays.
    """
    cfg = get_config('distilled')
    cfg.init_from = '/the/teacher'
    cfg.distillation_training.transformer = transformer
    ar = build.build_ar(checks.check(cfg))
    teacher = random_params(ar.clone(head=ar.head.teacher()), seed=1)
    options = cfg.distillation_training
    stage = stages.distillation_stage(ar, build.build_vae(cfg), {}, teacher, options)
    key = jax.random.key(0)
    held = jax.make_jaxpr(stage.init)(key).consts
    theirs = {id(leaf) for leaf in jax.tree.leaves(teacher)}
    assert not theirs & {id(array) for array in held}
    fresh = stage.init(key).params
    begun = stage.begin(fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(begun, fresh)
    # The step takes the memory of its state, and the teacher is needed further.
    assert not theirs & {id(leaf) for leaf in jax.tree.leaves(begun)}
    whole = stages.student_params(teacher, begun, options)
    new = {name: whole['head'][name] for name in ('span1', 'span2')}
    chex.assert_trees_all_equal(whole, teacher | {'head': teacher['head'] | new})
    chex.assert_trees_all_equal(new, {name: ar.init_params(key)['head'][name] for name in new})
