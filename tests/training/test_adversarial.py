import json
import shutil
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from sphere_ar_jax.config import schema
from sphere_ar_jax.interop import lpips, torch_names
from sphere_ar_jax.models import vae
from sphere_ar_jax.models.judges import discriminators
from sphere_ar_jax.models.judges.lpips import LPIPS
from sphere_ar_jax.models.posteriors import spherical
from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import adversarial, loop, losses
from sphere_ar_jax.training.state import abstract_state
from tests import tiny_config, torch_gan
from tests.conftest import GOLDENS, accurate, libraries_promote

PUBLIC = dict(np.load(GOLDENS / 'adversarial.npz'))
pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def standard_promotion():
    with libraries_promote():
        yield


def _options(**values):
    published = dict(
        discriminator='patchgan', disc_loss='hinge', disc_start=20_000, disc_weight=0.5,
        perceptual_weight=1.0, l2_weight=0.0, kl_weight=0.004,
    )  # fmt: skip
    return ConfigDict(schema.default().tokenizer_training.to_dict() | published | values)


class Images:
    """48 images of 24×24 pixels with 3 channels: waves, of which each has its own length and
    colour.
    """

    def __len__(self):
        return 48

    def __getitem__(self, index):
        y, x, c = np.meshgrid(np.arange(24), np.arange(24), np.arange(3), indexing='ij')
        wave = np.sin(x * (0.1 + index / 48) + y * 0.2 + c + index)
        return {'image': wave.astype(np.float32), 'label': np.int32(index % 3)}


def _moments(network, params, opt_state):
    """The 16 elements of each tensor that the golden holds: (parameters, first moments, norms of
    the whole moments).
    """
    if network == 'vae':

        def tensors(tree):
            return {n.removeprefix('vae.'): a for n, a in torch_names.to_torch(tree).items()}
    else:

        def tensors(tree):
            return torch_gan.to_torch(tree, torch_gan.PATCHGAN)

    params = tensors(params)
    moments = tensors(optax.tree.get(opt_state, 'mu'))

    def chosen(a):
        return np.ravel(a)[np.linspace(0, a.size - 1, min(16, a.size)).astype(int)]

    names = PUBLIC[f'{network}/names']
    rows = (np.concatenate([chosen(t[n]) for n in names]) for t in (params, moments))
    return *rows, np.array([np.linalg.norm(moments[n]) for n in names])


@pytest.mark.slow
def test_three_steps_of_the_public_training(golden, tiny_vae, lpips_files, monkeypatch):
    """Terms, gradients' norms, both networks' parameters and first moments after each step.

    The adversarial weight is 0 in the first step: of the discriminator only the kernels move, by
    decay. Adam's first steps are nearly lr·sign(gradient), so that a gradient which is rounding
    alone moves a parameter by as much as any: from the second step on the two programs are no
    longer at the same point. The tolerances of gradients are less than half of what the public code
    in float64 differs by from itself in float32. If each parameter is moved by the last digit of
    float32, the norm of the S-VAE's gradient changes by up to 7e-5, 2.7e-3 and 6e-3 in the three
    steps.
    """
    draws = [jnp.stack([PUBLIC[f'{i}/{name}'] for i in range(3)]) for name in ('beta', 'tangent')]
    monkeypatch.setattr(
        losses, 'sample_keys', lambda key, step, batch: tuple(d[step] for d in draws)
    )
    monkeypatch.setattr(spherical.SphericalTokens, 'draws', lambda q, keys: keys)
    lr = 1e-5
    options = _options(disc_start=2, learning_rate=lr, final_learning_rate=lr, weight_decay=0.5)
    stage = adversarial.tokenizer_stage(tiny_vae[0], options, lpips.load(*lpips_files))
    state = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(stage.init, jax.random.key(0))
    )
    disc_params = torch_gan.by_formula(state.disc_params, torch_gan.PATCHGAN)
    state = state.replace(params=tiny_vae[1], disc_params=disc_params)
    step = jax.jit(stage.step, compiler_options=accurate())
    certain = {'vae': True, 'disc': True}
    for i, (tolerance, of_lr) in enumerate(((1e-4, 0.02), (5e-3, 0.1), (1e-2, 0.2))):
        state, scalars = step(
            state, stage.frozen, {'image': golden['images'], 'label': np.zeros(3, np.int32)}, 0
        )
        public = {k.removeprefix(f'{i}/'): v for k, v in PUBLIC.items() if k.startswith(f'{i}/')}
        weight = 0.5 * (i > 0)
        for ours, theirs in dict(
            kl='kl_loss', l1='recon_loss', perceptual='p_loss', loss='loss'
        ).items():
            np.testing.assert_allclose(scalars[ours], public[theirs], rtol=3e-5, err_msg=ours)
        np.testing.assert_allclose(weight * scalars['adversarial'], public['gen_loss'], atol=1e-5)
        np.testing.assert_allclose(
            weight * scalars['discriminator'], public['disc_loss'], atol=1e-5
        )
        np.testing.assert_allclose(scalars['grad_norm'], public['grad_norm'], rtol=tolerance)
        np.testing.assert_allclose(
            scalars['disc_grad_norm'], public['disc_grad_norm'], rtol=1e-3 if i else 1e-5
        )
        for network, *trees in (
            ('vae', state.params, state.opt_state),
            ('disc', state.disc_params, state.disc_opt_state)
        ):  # fmt: skip
            params, moments, norms = _moments(network, *trees)
            expected = public[f'{network}/m']
            largest = np.abs(public[f'{network}/m']).max()
            np.testing.assert_allclose(moments, expected, atol=tolerance * largest)
            # Processors round otherwise: the smallest tensors' norms show what the whole backward
            # pass rounds.
            small = 1e-5 * public[f'{network}/norms'].max()
            np.testing.assert_allclose(
                norms, public[f'{network}/norms'], rtol=2 * tolerance, atol=small
            )
            if largest:  # else only decay moves the parameters
                certain[network] &= np.abs(expected) > 1e-3 * largest
            error = np.abs(params - public[f'{network}/p'])
            assert np.mean(certain[network]) > 0.8
            assert np.max(error[certain[network]] if largest else error) < of_lr * lr


@pytest.fixture(scope='module')
def small():
    """(S-VAE, options) of a quick stage for `Images`, without LPIPS; the discriminator's weight
    begins at step 3.
    """
    model = vae.s_vae(
        grid=(12, 12), latent_dim=8, stem=4, channels=(4, 16), encoder_depth=1, decoder_depth=1,
        heads=2
    )  # fmt: skip
    options = _options(
        perceptual_weight=0.0, batch_size=8, steps=4, disc_start=3, log_every=2, checkpoint_every=2
    )
    return model, options


def _stage(model, options):
    with tiny_config.narrow_patchgan():
        stage = adversarial.tokenizer_stage(model, options)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))

    def init(_):
        """Waves for parameters: compiled in a fraction of the time that true ones take."""
        state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

        def wave(a):
            return 0.1 * jnp.sin(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)

        params, disc_params = jax.tree.map(wave, (state.params, state.disc_params))
        return state.replace(params=params, disc_params=disc_params)

    return stage._replace(init=init)


def _train(small, directory, mesh):
    return loop.train(_stage(*small), Images(), str(directory), seed=0, mesh=mesh)[0]


@pytest.fixture(scope='module')
def whole(small, tmp_path_factory):
    """(state after four steps on all devices, the directory of that training)."""
    directory = tmp_path_factory.mktemp('whole')
    with libraries_promote():
        return _train(small, directory, sharding.make_mesh()), directory


@pytest.mark.slow
def test_stopped_and_started_again_bit_for_bit(small, whole, tmp_path):
    """Two steps, then two more from their checkpoint, are four steps: both networks, optimizers,
    running statistics.
    """
    state, directory = whole
    shutil.copytree(directory, tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again/checkpoints/4')
    resumed = _train(small, tmp_path / 'again', sharding.make_mesh())
    assert isinstance(resumed, adversarial.AdversarialState)
    assert int(resumed.step) == 4
    assert checkpoint.fingerprint(resumed) == checkpoint.fingerprint(state)
    assert not resumed.ema
    assert resumed.eval_params is resumed.params
    lines = [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]
    names = (
        'loss l1 kl kappa psnr adversarial discriminator logits_real logits_fake grad_norm '
        'disc_grad_norm dead_share'
    )
    assert [line['step'] for line in lines] == [2, 4]
    assert set(names.split()) <= set(lines[0])
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[0]['disc_grad_norm'] == 0 < lines[1]['disc_grad_norm']


@pytest.mark.parametrize('disc_start, atol', [(100, 1e-5), (1, 5e-3)], ids=['before', 'from'])
def test_the_same_on_many_devices(small, disc_start, atol):
    """One step before disc_start and one from it on, to rounding, BatchNorm over the whole batch.

    Not more steps: Adam's first ones go by the signs of gradients, where rounding decides over
    those near 0. BatchNorm of reconstructions that are almost constant, as here, makes much of
    rounding (2e-3 of the largest gradient with JAX 0.11, 1e-6 without the discriminator); batches
    normalised device by device would differ by as much as they are."""
    if jax.device_count() == 1:
        pytest.skip('one device')
    model, options = small
    stage = _stage(model, ConfigDict(options.to_dict() | {'disc_start': disc_start}))
    records = [Images()[i] for i in range(8)]
    batch = {name: np.stack([record[name] for record in records]) for name in records[0]}

    def step(mesh):
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(stage, mesh))
        state = jax.jit(stage.init, out_shardings=shardings)(jax.random.key(0))
        placed = sharding.place_batch(mesh, batch)
        return jax.device_get(jax.jit(stage.step)(state, None, placed, 0))

    one, scalars = step(sharding.make_mesh(1))
    every, others = step(sharding.make_mesh())
    assert (scalars['disc_grad_norm'] > 1e-3) == (disc_start == 1)
    chex.assert_trees_all_close(others, scalars, rtol=1e-4, atol=1e-6)
    for a, b in ((one.opt_state, every.opt_state), (one.disc_opt_state, every.disc_opt_state)):
        a, b = (optax.tree.get(tree, 'mu') for tree in (a, b))
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(a))
        chex.assert_trees_all_close(a, b, rtol=0, atol=atol * largest)


@pytest.mark.slow
@pytest.mark.parametrize('disc_loss', discriminators.ADVERSARIAL)
def test_every_choice_makes_a_step(disc_loss):
    """StyleGAN with each of the losses, EMA and bfloat16: shapes and dtypes stay."""
    model = vae.s_vae(
        grid=(4, 4),
        channels=(8, 16, 16),
        stem=8,
        encoder_depth=1,
        decoder_depth=1,
        heads=2,
        dtype=jnp.bfloat16,
    )
    options = _options(discriminator='stylegan', disc_loss=disc_loss, ema_decay=0.9)
    stage = adversarial.tokenizer_stage(model, options)
    lpips_params = jax.eval_shape(
        LPIPS().init, jax.random.key(0), *[jnp.zeros((1, 16, 16, 3))] * 2
    )['params']
    abstract = abstract_state(stage, sharding.make_mesh())
    batch = {'image': jnp.zeros((2, 16, 16, 3)), 'label': jnp.zeros(2, jnp.int32)}
    state, scalars = jax.eval_shape(stage.step, abstract, lpips_params, batch, 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    assert {s.dtype for s in scalars.values()} == {jnp.dtype('float32')}
    assert not any(s.shape for s in scalars.values())


def test_an_old_state_with_running_statistics_goes_on(tmp_path, capsys):
    """Up to version 0.1 a checkpoint held the discriminator's running statistics, which nothing
    read.
    """

    class OldState(adversarial.AdversarialState):
        disc_stats: Any

    statistics = {'norm1': {'mean': jnp.arange(3.0), 'var': jnp.ones(3)}}
    fields = (
        jnp.int32(3),
        {'a': jnp.ones(2)},
        (),
        ({'a': jnp.full(2, 5.0)},),
        {'b': jnp.zeros(2)},
        (),
    )
    old = OldState(*fields, statistics)
    state = adversarial.AdversarialState(*fields)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(3, old, {}, 0.0)
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    found = checkpoints.restore(like)[0]
    checkpoints.close()
    assert capsys.readouterr().err == ''  # its fingerprint was checked, the statistics' with it
    assert type(found) is adversarial.AdversarialState
    chex.assert_trees_all_equal(found, state)


def test_options_that_cannot_be(small):
    model, options = small

    def make(model=model, **values):
        return adversarial.tokenizer_stage(model, ConfigDict(options.to_dict() | values))

    for message, wrong in (
        (
            "'wgan', but must be one of hinge, vanilla, non_saturating",
            lambda: make(disc_loss='wgan'),
        ),
        ('at least 24×24', lambda: make(model.clone(grid=(8, 8)))),
    ):
        with pytest.raises(UserError, match=message) as raised:
            wrong()
        assert '\n' not in str(raised.value)
    stage = make(perceptual_weight=1.0)
    batch = {'image': jnp.zeros((2, 24, 24, 3)), 'label': jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match='no lpips_params'):
        jax.eval_shape(stage.step, jax.eval_shape(stage.init, jax.random.key(0)), None, batch, 0)
