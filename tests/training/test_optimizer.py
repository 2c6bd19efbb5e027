import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.models import ar, vae
from sphere_ar_jax.training import optimizer
from sphere_ar_jax.training.state import update_emas
from tests.conftest import GOLDENS, libraries_promote

OURS = {
    'proj_in.weight': ('proj_in', 'kernel'), 'proj_in.bias': ('proj_in', 'bias'),
    'cls_embedding.weight': ('cls_embedding', 'embedding'), 'body.weight': ('body', 'kernel'),
    'body.bias': ('body', 'bias'), 'norm.weight': ('norm', 'scale'),
}  # fmt: skip


@pytest.fixture(scope='module')
def recipe():
    return np.load(GOLDENS / 'optimizer.npz')


def _tree(recipe, prefix):
    tree = {}
    for theirs, (module, name) in OURS.items():
        tree.setdefault(module, {})[name] = jnp.asarray(recipe[f'{prefix}/{theirs}'])
    return tree


@libraries_promote()
def test_six_steps_of_adamw_and_ema(recipe):
    schedule = optimizer.learning_rate(3e-4, 4, 12, 1e-5)
    tx = optimizer.adamw(schedule)
    params = ema = _tree(recipe, 'p0')
    state = tx.init(params)
    for s in range(6):
        gradients = _tree(recipe, f'g{s}')
        np.testing.assert_allclose(optax.tree.norm(gradients), recipe['gnorm'][s], rtol=1e-6)
        np.testing.assert_allclose(schedule(s), recipe['lr'][s], rtol=1e-6)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        ema = update_emas((ema,), params, (0.9,))[0]
        for ours, theirs in zip(
            jax.tree.leaves(params), jax.tree.leaves(_tree(recipe, f'p{s + 1}')), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(
        jax.tree.leaves(ema), jax.tree.leaves(_tree(recipe, 'ema6')), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@libraries_promote()
def test_published_schedule(recipe):
    schedule = optimizer.learning_rate(3e-4, 20_000, int(recipe['ar_sched_total']), 1e-5)
    ours = [float(schedule(step)) for step in recipe['ar_sched_steps']]
    np.testing.assert_allclose(ours, recipe['ar_sched_lr'], rtol=2e-5, atol=1e-10)


@libraries_promote()
def test_constant_schedule():
    schedule = optimizer.learning_rate(1e-4, 0, 1000, 1e-4)
    np.testing.assert_allclose([schedule(s) for s in (0, 1, 500, 1000, 2000)], 1e-4, rtol=1e-6)


@libraries_promote()
def test_a_schedule_with_restarts():
    """Up to a restart it is the shorter one; then it rises from its floor and falls again."""
    short = optimizer.learning_rate(1e-3, 4, 20, 1e-5)
    schedule = optimizer.learning_rate(1e-3, 4, 50, 1e-5, (20,))
    np.testing.assert_allclose(
        [schedule(s) for s in range(20)], [short(s) for s in range(20)], rtol=1e-6
    )

    def by_hand(s):
        if s < 4:
            return 1e-5 + (1e-3 - 1e-5) * s / 4
        return 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * (s - 4) / 26)) / 2

    np.testing.assert_allclose(
        [schedule(20 + s) for s in range(31)], [by_hand(s) for s in range(31)], rtol=1e-5
    )


@pytest.mark.parametrize('model', [ar.sphere_ar(**ar.VARIANTS['B']), vae.VAE()], ids=['B', 'vae'])
def test_decay_mask_is_the_published_rule(model):
    """Decay exactly where the PyTorch tensor has two dimensions or more and no excluded name."""
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    mask = optimizer.decay_mask(shapes)
    assert jax.tree.structure(mask) == jax.tree.structure(shapes)
    # carry the mask through the conversion: each leaf filled with its own mask value
    filled = jax.tree.map(lambda m, s: np.broadcast_to(np.float32(m), s.shape), mask, shapes)
    small = {name: bool(t.ravel()[0]) for name, t in _first_elements(filled).items()}
    for name, shape in torch_names.torch_shapes(shapes).items():
        expected = len(shape) >= 2 and not any(
            word in name for word in ('proj_in', 'cls_embedding')
        )
        assert small[name] == expected, name


def _first_elements(tree):
    """{PyTorch name: an array of one element} without making the full-size tensors."""
    import flax.traverse_util as traverse

    elements = {}
    for path, leaf in traverse.flatten_dict(tree, sep='/').items():
        name, stacked, _ = torch_names._rule(path)
        for i in range(int(np.prod(leaf.shape[:stacked]))):
            elements[name.format(i)] = leaf[(0,) * leaf.ndim].reshape(1)
    return elements
