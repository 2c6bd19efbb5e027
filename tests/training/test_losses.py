import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.flow import guidance, paths, solvers
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.models import ar
from sphere_ar_jax.models.conditions import classes
from sphere_ar_jax.models.heads import HEADS, mean_velocity
from sphere_ar_jax.models.judges import discriminators
from sphere_ar_jax.models.posteriors import PowerSpherical
from sphere_ar_jax.models.posteriors.spherical import SphericalTokens
from sphere_ar_jax.models.vae import autoencode
from sphere_ar_jax.sphere import geodesics, geometry
from sphere_ar_jax.training import losses
from sphere_ar_jax.training.state import quickly_compiled


def _assert_gradients(gradients, golden, prefix, tolerance):
    """Every gradient's norm, and the whole gradient where the golden has it."""
    tensors = torch_names.to_torch(gradients)
    norms = [name for name in golden if name.startswith(f'{prefix}gradnorm/')]
    assert len(norms) == len(tensors)
    for name in norms:
        short = name.removeprefix(f'{prefix}gradnorm/')
        tensor = tensors[short if short in tensors else f'vae.{short}']
        np.testing.assert_allclose(
            np.linalg.norm(tensor), golden[name], rtol=tolerance(short), err_msg=short
        )
    for name in [name for name in golden if name.startswith(f'{prefix}grad/')]:
        short = name.removeprefix(f'{prefix}grad/')
        ours = tensors[short if short in tensors else f'vae.{short}']
        scale = np.abs(golden[name]).max()
        np.testing.assert_allclose(
            ours / scale, golden[name] / scale, atol=tolerance(short), err_msg=short
        )


@pytest.fixture(scope='module')
def autoencoded(tiny_vae):
    """(images, draws) → (reconstructions, tokens, posterior) of the golden S-VAE, compiled."""
    model, params = tiny_vae
    run = jax.jit(lambda params, images, draws: autoencode(model, params, images, lambda q: draws))
    return functools.partial(run, params)


def test_flow_loss_and_gradients(golden, tiny_ar, autoencoded):
    model, params = tiny_ar
    _, z, _ = autoencoded(golden['images'], (golden['train_beta'], golden['train_tangent']))
    t_normal = golden['train_t_normal'].reshape(2, 3, 16)
    noise = golden['train_noise'].reshape(2, 3, 16, 8)

    def loss(p):
        return model.apply({'params': p}, golden['class_id'], z, (t_normal, noise), method='loss')

    (value, scalars), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(value, golden['train_loss'], rtol=1e-5)
    assert scalars['token_norm'].shape == ()
    assert np.isfinite(scalars['token_norm'])
    _assert_gradients(gradients, golden, '', lambda _: 1e-4)


@pytest.mark.slow
def test_tokenizer_loss_and_gradients(golden, tiny_vae):
    """Decoder gradients to 1e-4 and, since our Beta gradient is the implicit one too, encoder
    gradients likewise.
    """
    model, params = tiny_vae
    draws = golden['vae_beta'], golden['vae_tangent']
    images = golden['images']
    weights = {'kl_weight': 0.004, 'l2_weight': 0.0}

    def loss(p):
        results = autoencode(model, p, images, lambda q: draws)
        value, scalars = losses.reconstruction_loss(images, *results, **weights)
        return value, (scalars, results[0])

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (value, (scalars, recon)), gradients = found
    np.testing.assert_allclose(scalars['l1'], golden['vae_l1'], rtol=1e-5)
    np.testing.assert_allclose(scalars['kl'], golden['vae_kl'], rtol=1e-5)
    np.testing.assert_allclose(value, golden['vae_l1'] + 0.004 * golden['vae_kl'], rtol=1e-5)
    np.testing.assert_allclose(scalars['token_norm'], np.sqrt(8), rtol=1e-5)
    np.testing.assert_allclose(recon, golden['vae_recon'], rtol=1e-4, atol=1e-4)
    _assert_gradients(gradients, golden, 'vae_', lambda _: 1e-4)


def test_l2_weight(golden, autoencoded):
    results = autoencoded(golden['images'], (golden['vae_beta'], golden['vae_tangent']))
    loss = functools.partial(losses.reconstruction_loss, kl_weight=0.0, l2_weight=2.0)
    value, scalars = jax.jit(loss)(golden['images'], *results)
    squared = np.mean((golden['vae_recon'] - golden['images']) ** 2)
    np.testing.assert_allclose(value, golden['vae_l1'] + 2 * squared, rtol=1e-4)
    np.testing.assert_allclose(scalars['psnr'], 10 * np.log10(4 / squared), rtol=1e-4)


def _posterior(mu, kappa=20.0):
    mu = (mu / np.linalg.norm(mu, axis=-1, keepdims=True)).astype(np.float32)
    kappa = np.full(mu.shape[:-1], kappa, np.float32)
    return SphericalTokens(mu, kappa, PowerSpherical.DENSITY)


_statistics = jax.jit(lambda posterior: posterior.statistics())


def test_latents_that_are_well():
    """Uniform directions: a spread of 1 in each dimension to the accuracy of a sample, no mean
    direction.
    """
    posterior = _posterior(np.random.default_rng(0).normal(size=(40, 256, 16)))
    scalars = {name: float(value) for name, value in _statistics(posterior).items()}
    # The spread is at most 1, because the squares sum to d.
    assert 0.97 < scalars['spread_min'] < scalars['spread_mean'] < 1.0 + 1e-6
    np.testing.assert_allclose(scalars['spread_mean'], 1, atol=1e-3)
    assert scalars['mean_direction'] < 5 / np.sqrt(40 * 256)
    assert scalars['dead_share'] == 0
    np.testing.assert_allclose(scalars['kappa'], 20, rtol=1e-6)
    np.testing.assert_allclose(scalars['kl'], np.mean(jax.jit(posterior.kl)()), rtol=1e-6)
    assert PowerSpherical().faults(scalars) is None


@pytest.mark.parametrize('dead', [1, 4, 12])
def test_dead_dimensions_are_counted(dead):
    mu = np.random.default_rng(1).normal(size=(8, 64, 16))
    mu[..., :dead] *= 1e-3
    scalars = {name: float(value) for name, value in _statistics(_posterior(mu)).items()}
    np.testing.assert_allclose(scalars['dead_share'], dead / 16, rtol=1e-6)
    assert scalars['spread_min'] < 0.01
    assert (
        PowerSpherical().faults(scalars).startswith(f'{dead / 16:.0%} of the dimensions are dead')
    )
    mu[..., 0] = 1e-3 + 0.5 * mu[..., -1]  # alive again
    assert float(_statistics(_posterior(mu))['dead_share']) == pytest.approx((dead - 1) / 16)


def test_latents_that_are_all_alike():
    alike = _posterior(np.broadcast_to(np.arange(1.0, 9.0), (4, 16, 8)), kappa=1.0)
    scalars = {name: float(value) for name, value in _statistics(alike).items()}
    np.testing.assert_allclose(scalars['spread_mean'], 0, atol=1e-6)
    np.testing.assert_allclose(scalars['mean_direction'], 1, rtol=1e-6)
    assert scalars['dead_share'] == 1
    message = PowerSpherical().faults(scalars)
    for part in (
        'kappa is 1.00, at its floor',
        'KL is 0.0',
        'norm 1.00',
        '100% of the dimensions are dead',
    ):
        assert part in message
    assert '\n' not in message
    well = dict(kappa=20.0, kl=3.0, mean_direction=0.1, dead_share=0.0)
    assert PowerSpherical().faults(well) is None
    for name, value, part in (
        ('kappa', 1.05, 'ignores the image'), ('kl', 0.05, 'KL is 0.050'),
        ('mean_direction', 0.95, 'same way'), ('dead_share', 0.0625, '6% of the dimensions'),
        ('kl', float('nan'), 'not finite'),
    ):  # fmt: skip
        said = PowerSpherical().faults(well | {name: value})
        assert part in said
        assert ';' not in said


def test_adversarial_losses_in_closed_form():
    real, fake = (
        np.random.default_rng(i).normal(0, 2, (2, 3, 4)).astype(np.float32) for i in range(2)
    )

    def sigmoid(x):
        return 1 / (1 + np.exp(-x.astype(np.float64)))

    logistic = -(np.log(sigmoid(real)).mean() + np.log(1 - sigmoid(fake)).mean()) / 2
    hinge = (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()) / 2
    for name, of_discriminator, of_generator, slope in (
        ('hinge', hinge, -fake.mean(), -np.ones_like(fake)),
        ('vanilla', logistic, -fake.mean(), -np.ones_like(fake)),
        ('non_saturating', logistic, -np.log(sigmoid(fake)).mean(), sigmoid(fake) - 1),
    ):  # fmt: skip
        discriminator, generator = discriminators.ADVERSARIAL[name]
        found = jax.jit(discriminator)(real, fake)
        np.testing.assert_allclose(found, of_discriminator, rtol=1e-5)
        value, gradient = jax.jit(jax.value_and_grad(generator))(fake)
        np.testing.assert_allclose(value, of_generator, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope / fake.size, rtol=1e-4, atol=1e-8)
    to_real, to_fake = jax.jit(jax.grad(discriminators.logistic_loss, (0, 1)))(real, fake)
    np.testing.assert_allclose(to_real, (sigmoid(real) - 1) / 2 / real.size, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(to_fake, sigmoid(fake) / 2 / fake.size, rtol=1e-4, atol=1e-8)
    # No logarithm of 0 is taken.
    assert np.isfinite(discriminators.logistic_loss(np.float32(-1e4), np.float32(1e4)))


def test_draws_depend_on_the_sample_not_on_the_batch():
    """The draws of a batch are those of its rows, wherever the batch is cut."""
    sample_keys = jax.jit(losses.sample_keys, static_argnums=2)
    keys = sample_keys(jax.random.key(0), 7, 6)
    head = HEADS['flow'](8, 16, 2, 1)
    draws = jax.jit(lambda keys: head.draws(keys, (2, 16, 8)))
    whole = draws(keys)
    chex.assert_shape(whole, [(2, 6, 16), (2, 6, 16, 8)])
    parts = [draws(keys[i : i + 2]) for i in (0, 2, 4)]
    chex.assert_trees_all_equal(whole, jax.tree.map(lambda *p: np.concatenate(p, axis=1), *parts))
    others = sample_keys(jax.random.key(0), 8, 6)
    assert not np.array_equal(jax.random.key_data(keys), jax.random.key_data(others))


def test_label_dropout():
    keys = losses.sample_keys(jax.random.key(0), 0, 4000)
    labels = np.arange(4000, dtype=np.int32) % 10
    condition = classes.Classes(10, 4, 16)
    drop = jax.jit(condition.drop)
    dropped = np.asarray(drop(keys, labels, np.float32(0.1)))
    share = np.mean(dropped == 10)
    assert abs(share - 0.1) < 5 * np.sqrt(0.09 / 4000)
    np.testing.assert_array_equal(dropped[dropped != 10], labels[dropped != 10])
    np.testing.assert_array_equal(drop(keys, labels, np.float32(0)), labels)


def _euclidean(t, w, x, memory, v):
    """A step of Adams–Bashforth in a plane, as `_geodesic` is on the sphere."""
    del t
    return solvers.step(w, x, memory, v)


def _geodesic(t, w, x, memory, v):
    return paths.Geodesic(x.shape[-1]).step((t, w), x, memory, v)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('word', 'start', 'step', 'between', 'along'),
    [
        ('mean_velocity', lambda x: x, _euclidean, lambda x, y: y - x, lambda x, v: v),
        ('geodesic_mean_velocity', geometry.project, _geodesic, geodesics.log, geodesics.tangent),
    ],
    ids=['straight', 'geodesic'],
)
def test_distillation_loss_against_a_loop_over_tokens(
    golden, tiny_ar, word, start, step, between, along
):
    """The targets by the sampler's own solver, token by token, from conditions of the golden model;
    the new head starts as the teacher's velocity; and gradients reach the new head alone.
    """
    teacher_model, teacher = tiny_ar
    head = teacher_model.head
    new_head = HEADS[word](head.latent_dim, head.width, head.depth, head.groups)
    teacher_model = teacher_model.clone(head=new_head.teacher())
    if word == 'mean_velocity':
        assert new_head.teacher() == head.clone(parent=None)
    model = teacher_model.clone(head=new_head)
    head = (
        jax.jit(model.init_params, **quickly_compiled())(jax.random.key(0))['head']
        | teacher['head']
    )
    student = teacher | {'head': head}
    z = jnp.asarray(golden['z'])
    noise = jax.random.normal(jax.random.key(1), z.shape)
    scales = guidance.guidance_scales(2.0, 16, 'linear')

    def loss(student, teacher, transformer=False):
        arguments = (golden['class_id'], z, noise, scales, (1, 2), 4)
        return mean_velocity.distillation_loss(
            model, student, teacher, *arguments, transformer=transformer
        )[0]

    value, (gradient, of_teacher) = jax.jit(jax.value_and_grad(loss, (0, 1)))(student, teacher)
    beside = [gradient[name] for name in gradient if name != 'head']
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves((of_teacher, beside)))
    assert all(
        np.any(np.asarray(gradient['head'][name]['kernel']) != 0)
        for name in ('span2', 'time1', 'final_linear')
    )
    # A transformer that is trained, too, begins as the teacher's.
    trained = jax.jit(jax.value_and_grad(lambda *params: loss(*params, True), (0, 1)))
    other_value, (with_transformer, of_teacher) = trained(student, teacher)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(of_teacher))
    chex.assert_trees_all_close(with_transformer['head'], gradient['head'], rtol=1e-4, atol=1e-6)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(with_transformer['stack']))

    apart, params = ar.unstacked(teacher_model, teacher)
    null = jnp.full_like(golden['class_id'], 10)
    conditions = apart.apply(
        {'params': params}, jnp.append(golden['class_id'], null), jnp.concatenate([z, z]),
        method='conditions'
    )  # fmt: skip
    velocity = jax.jit(
        lambda x, t, c: teacher_model.apply(
            {'params': teacher}, x, c, jnp.full(len(x), t), method=lambda m, *a: m.head.velocity(*a)
        )
    )
    errors = []
    for k in range(16):
        c = conditions[:, k]
        x = start(noise[:, k])
        memory = jnp.zeros((3, 8))
        path = [x]
        table = solvers.table('ab2', 4)
        for t, w in zip(table.t, table.weights, strict=True):
            v = guidance.guide(velocity(x, t, c[:3]), velocity(x, t, c[3:]), scales[k])
            x, memory = step(t, w, x, memory, v)
            path.append(x)
        for first, last in ((0, 4), (0, 2), (2, 4)):
            u = between(path[first], path[last]) / ((last - first) / 4)
            begun = along(path[first], velocity(path[first], first / 4, c[:3]))
            errors.append(jnp.square(begun - u))
    np.testing.assert_allclose(value, np.mean(errors), rtol=1e-4)
