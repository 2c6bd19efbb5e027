"""The radius of the sphere: everything follows it, and nothing changes where it is not given."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sphere_ar_jax.config import build, checks
from sphere_ar_jax.flow import paths
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.models.heads import FlowHead, GeodesicMeanVelocity, MeanVelocity, Riemannian
from sphere_ar_jax.models.heads.mean_velocity import Segments
from sphere_ar_jax.models.posteriors import PowerSpherical, VonMisesFisher
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling.model import sphere_radius
from sphere_ar_jax.sampling.tokens import draw
from sphere_ar_jax.sphere import geometry
from sphere_ar_jax.training import run, stages, state
from tests.tiny_config import get_config, random_arrays, random_params

D = 8
ROOT = D**0.5
SPHERES = (PowerSpherical, VonMisesFisher)


@pytest.mark.parametrize('family', SPHERES)
def test_directions_do_not_depend_on_the_radius(family):
    """Tokens are R/√d times as long, draw by draw; KL and statistics stay what they are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 16, D + 1)).astype(np.float32)
    draws = rng.uniform(size=(2, 16)), rng.normal(size=(2, 16, D - 1))
    draws = jax.tree.map(np.float32, draws)

    def numbers(family, x, draws):
        q = family(x)
        z = q.sample(draws)
        return z, q.mode(), family.project(3 * z), q.kl(), q.statistics()

    *plain, kl, scalars = jax.jit(functools.partial(numbers, family()))(x, draws)
    larger = functools.partial(numbers, family(radius=0.7))
    *tokens, kl_here, scalars_here = jax.jit(larger)(x, draws)
    chex.assert_trees_all_equal((kl_here, scalars_here), (kl, scalars))
    for here, there in zip(tokens, plain, strict=True):
        chex.assert_shape(here, (2, 16, D))
        np.testing.assert_allclose(np.linalg.norm(here, axis=-1), 0.7, rtol=1e-6)
        np.testing.assert_allclose(here, 0.7 / ROOT * np.asarray(there), rtol=1e-5, atol=1e-7)


def _twice_as_large(params, names):
    """Parameters of a model that computes the same with all tokens twice as long."""
    flat = traverse_util.flatten_dict(params, sep='/')
    factors = {
        'post_quant_proj/kernel': 0.5,
        'proj_in/kernel': 0.5,
        'head/input_proj/kernel': 0.5,
        'head/final_linear/kernel': 2.0,
        'head/final_linear/bias': 2.0,
    }
    for name in names:
        flat[name] = flat[name] * np.float32(factors[name])
    return traverse_util.unflatten_dict(flat, sep='/')


_OF_AR = ('proj_in/kernel', 'head/input_proj/kernel', 'head/final_linear/kernel',
          'head/final_linear/bias')  # fmt: skip


@pytest.mark.parametrize(
    ('head_class', 'solver', 's'),
    [
        (FlowHead, 'euler_maruyama', 2.0),
        (Riemannian, 'mixing', 1.0),
        (MeanVelocity, 'euler', 2.0),
        (GeodesicMeanVelocity, 'euler', 1.0),
    ],
)
def test_a_head_of_twice_the_radius_is_the_same_in_other_units(head_class, solver, s):
    """Its loss, and its tokens by a solver that takes noise."""
    rng = np.random.default_rng(4)
    c = rng.normal(size=(2, 3, 6)).astype(np.float32)
    z = geometry.project(rng.normal(size=(2, 3, D)).astype(np.float32))
    options = Options(solver, 2, guidance=None)
    noise = rng.normal(size=(options.num_draws(1), 2, D)).astype(np.float32)
    found = []
    for unit, fields in ((1.0, {}), (2.0, {'radius': 2 * ROOT, 'prior_scale': s})):
        head = head_class(D, 4, 1, 1, scan=False, **fields)
        draws = _draws(head, unit)

        def init(key, head=head, draws=draws):
            return head.init(key, c, z, draws, method='loss')['params']

        params = random_arrays(jax.eval_shape(init, jax.random.key(0)))
        if fields:
            params = _twice_as_large({'head': params}, _OF_AR[1:])['head']

        @jax.jit
        def numbers(params, z, head=head, draws=draws):
            loss, _ = head.apply({'params': params}, c, z, draws, method='loss')
            table = jax.tree.map(lambda a: a[0], head.prepare(params, options.plan(1)))
            return loss, head.draw_token(params, c[:, 0], noise, table, None)

        found.append(numbers(params, unit * z))
    (loss, token), (loss_here, token_here) = found
    chex.assert_shape((token, token_here), (2, D))
    chex.assert_tree_all_finite(found)
    np.testing.assert_allclose(loss_here, loss, rtol=1e-6)
    np.testing.assert_allclose(token_here, 2 * token, rtol=1e-5, atol=1e-5)


def _draws(head, unit):
    """Draws of the loss of 2 images with 3 tokens."""
    rng = np.random.default_rng(5)
    if isinstance(head, MeanVelocity):
        x, u = unit * rng.normal(size=(2, 1, 6, D)).astype(np.float32)
        return Segments(x, np.zeros(1, np.float32), np.ones(1, np.float32), u)
    draws = rng.normal(size=(2, 2, 3)), rng.normal(size=(2, 2, 3, D))
    return jax.tree.map(np.float32, draws)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('head', 'solver', 'larger'),
    [
        ('flow', 'euler_maruyama', {'vae.radius': 2 * ROOT, 'ar.prior_scale': 2.0}),
        ('riemannian', 'mixing', {'vae.radius': 2 * ROOT}),
    ],
)
def test_twice_the_radius_is_the_same_model_in_other_units(head, solver, larger):
    """Loss, tokens and images of models whose weights stand for lengths of twice the unit.

    The flow head gets noise of twice the length, too. Powers of two are exact.
    """
    labels = np.array([3, 1], np.int32)
    keys = jax.random.split(jax.random.key(1), 2)
    batch = {'image': np.random.default_rng(2).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)}
    batch['label'] = labels
    found = []
    for changes in ({}, larger):
        cfg = get_config()
        cfg.ar.head = head
        cfg.sampling.solver = solver
        cfg.update_from_flattened_dict(changes)
        vae = build.build_vae(checks.check(cfg))
        ar = build.build_ar(cfg)
        vae_params = random_params(vae)
        ar_params = random_params(ar)
        if changes:
            vae_params = _twice_as_large(vae_params, ['post_quant_proj/kernel'])
            ar_params = _twice_as_large(ar_params, _OF_AR)
        stage = stages.ar_stage(ar, vae, vae_params, cfg.ar_training)
        options = build.build_sampler(cfg).options

        @jax.jit
        def numbers(ar_params, vae_params, stage=stage, ar=ar, vae=vae, options=options):
            loss, scalars = stage.loss(ar_params, vae_params, batch, keys)
            z, raw = draw(ar, ar_params, labels, keys, options, 1.5, project=vae.project)
            images = vae.apply({'params': vae_params}, z, method='decode_tokens')
            return loss, scalars, z, raw, images

        found.append(jax.device_get(numbers(ar_params, vae_params)))
    (loss, scalars, z, raw, images), here = found
    chex.assert_tree_all_finite(found)
    np.testing.assert_allclose(np.linalg.norm(here[2], axis=-1), 2 * ROOT, rtol=1e-6)
    lengths = {'token_norm': 2, 'angle': 1}
    scalars = {name: lengths[name] * value for name, value in scalars.items()}
    chex.assert_trees_all_close(here[:2], (loss, scalars), rtol=1e-5)
    chex.assert_trees_all_close(here[2:4], (2 * z, 2 * raw), atol=1e-3)
    chex.assert_trees_all_close(here[4], images, atol=1e-3)


@pytest.mark.slow
def test_a_distilled_head_follows_trajectories_of_twice_the_length():
    """Its loss is that of the published radius where teacher and head stand for twice the unit."""
    keys = jax.random.split(jax.random.key(6), 2)
    batch = {'image': np.random.default_rng(7).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)}
    batch['label'] = np.array([3, 1], np.int32)
    found = []
    for changes in ({}, {'vae.radius': 2 * ROOT, 'ar.prior_scale': 2.0}):
        cfg = get_config('distilled')
        cfg.update_from_flattened_dict(changes)
        vae = build.build_vae(cfg)
        cfg.init_from = '/the/teacher'
        ar = build.build_ar(checks.check(cfg))
        params = random_params(ar)
        teacher = random_params(ar.clone(head=ar.head.teacher()), seed=1)
        if changes:
            params = _twice_as_large(params, _OF_AR)
            teacher = _twice_as_large(teacher, _OF_AR)
        frozen = (random_params(vae), teacher)
        options = cfg.distillation_training
        stage = stages.distillation_stage(ar, vae, *frozen, options)
        found.append(jax.jit(stage.loss)(params['head'], frozen, batch, keys))
    chex.assert_tree_all_finite(found)
    chex.assert_trees_all_close(*found, rtol=1e-5)


def test_the_scale_of_the_loss_does_not_depend_on_the_radius():
    """Velocities z − x₀ have the mean square 2 of the published radius, drawn by NumPy.

    Those along geodesics are R·θ long, and keep the mean square that they have at √d.
    """
    rng = np.random.default_rng(3)
    unit = rng.normal(size=(50_000, D))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    noise = rng.normal(size=unit.shape)
    angle = np.arccos(np.sum(unit[::2] * unit[1::2], axis=-1))
    for radius, s in ((None, 1.0), (ROOT / 4, 1.0), (4 * ROOT, 1.0), (ROOT / 4, 0.25), (None, 3.0)):
        R = ROOT if radius is None else radius
        straight = paths.Straight(D, radius, s)
        assert straight.weighted(np.mean((R * unit - s * noise) ** 2)) == pytest.approx(2, rel=0.02)
        geodesic = paths.Geodesic(D, radius)
        assert geodesic.weighted(np.mean((R * angle) ** 2) / D) == pytest.approx(np.mean(angle**2))


def test_without_a_radius_the_loss_is_the_published_program():
    """Nothing is multiplied: operation by operation it is the loss as docs/method.md writes it."""
    head = FlowHead(D, 4, 1, 1)
    c = jnp.zeros((2, 3, 6))
    z = jnp.zeros((2, 3, D))
    draws = (jnp.zeros((4, 2, 3)), jnp.zeros((4, 2, 3, D)))

    def init(key):
        return head.init(key, c, z, draws, method='loss')

    def written_out(head, c, z, draws):
        t_normal, noise = draws
        z = jax.lax.stop_gradient(z)
        t = jax.nn.sigmoid(t_normal)
        copies = jnp.broadcast_to(z, noise.shape)
        column = t[..., None]
        x_t = (1 - column) * noise + column * copies
        u_t = copies - noise
        v = head.velocities(x_t, c, t)
        predicted = x_t + (1 - t[..., None]) * v
        error = jnp.square(v - u_t)
        return jnp.mean(error), {'token_norm': jnp.mean(jnp.linalg.norm(predicted, axis=-1))}

    def program(method):
        def run(params):
            return head.apply(params, c, z, draws, method=method)

        return str(jax.make_jaxpr(run)(params))

    params = jax.eval_shape(init, jax.random.key(0))
    assert program('loss') == program(written_out)


def test_the_radius_is_that_of_the_projection():
    """Also twice √d, where a point of twos lies on the sphere itself."""
    for radius in (None, 2 * ROOT, 0.5):
        vae = VAE((4, 4), D, posterior=PowerSpherical(radius), radius=radius)
        assert sphere_radius(vae) == pytest.approx(ROOT if radius is None else radius)
    assert sphere_radius(vae.clone(token_space='standardised')) is None
    assert sphere_radius(vae.clone(token_space='projected')) == pytest.approx(0.5)


@pytest.mark.parametrize('wrong', [0.0, -1.0, float('nan'), float('inf')])
def test_radii_that_are_none(wrong):
    for make in (*SPHERES, VAE, functools.partial(FlowHead, D, 4, 1, 1)):
        with pytest.raises(ValueError, match='radius must be a number above 0, not'):
            make(radius=wrong)
    with pytest.raises(ValueError, match='prior_scale must be a number above 0, not'):
        FlowHead(D, 4, 1, 1, prior_scale=wrong)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match=r'the radius None and the tokenizer 2\.0: give both'):
        VAE(posterior=PowerSpherical(), radius=2.0)
    with pytest.raises(ValueError, match='has no length to change: leave it at 1'):
        Riemannian(D, 4, 1, 1, prior_scale=2.0)
    gaussian = {'vae.posterior': 'gaussian', 'vae.radius': 2.0}
    for changes, message in (
        ({'vae.radius': 0.0}, 'vae.radius is 0.0, but must be above 0'),
        ({'vae.radius': float('nan')}, 'vae.radius is nan, but must be above 0'),
        ({'vae.radius': float('inf')}, 'vae.radius is inf, but must be finite'),
        ({'ar.prior_scale': 0.0}, 'ar.prior_scale is 0.0, but must be above 0'),
        ({'ar.head': 'riemannian', 'ar.prior_scale': 2.0}, 'leave it at 1'),
        (gaussian, 'latents of vae.posterior gaussian lie on no sphere, .*: leave it out'),
        (gaussian | {'ar.token_space': 'standardised'}, 'lie on no sphere, .*: leave it out'),
    ):
        cfg = get_config()
        cfg.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=message) as refused:
            checks.check(cfg)
        assert '\n' not in str(refused.value)
    # Where the decoder alone reads a sphere, the head's loss has no radius.
    cfg.update_from_flattened_dict(gaussian | {'vae.decoder_input': 'projected'})
    assert build.build_head(checks.check(cfg)).radius is None
    cfg.ar.token_space = 'projected'
    assert build.build_head(checks.check(cfg)).radius == 2.0


def test_models_of_two_radii_refuse_each_other(old_runs):
    """A config does not take a tokenizer of another radius, and no AR model goes on behind one."""
    cfg = run.load_config(str(old_runs / 'digits'))
    cfg.update(tokenizer=str(old_runs / 'digits'))
    cfg.vae.radius = 2.0
    with pytest.raises(UserError, match=r'has another tokenizer \(vae\.radius None → 2\.0\)'):
        run.load_tokenizer(cfg, sharding.make_mesh())
    vae = build.build_vae(cfg)
    params = {'weights': np.ones(2, np.float32)}
    stage = stages.ar_stage(build.build_ar(cfg), vae, params, cfg.ar_training)
    here = state.frozen_identity(stage)
    noted = {'frozen': {'weights': here['weights'], 'model': {}}}
    with pytest.raises(UserError, match=r'radius None → 2\.0') as refused:
        state.check_frozen(stage, here, noted, 'ar')
    assert '\n' not in str(refused.value)
