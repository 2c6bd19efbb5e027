import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from sphere_ar_jax import adversarial, checkpoint, config, convert, losses, perceptual, sharding, training, vae
from tests import torch_gan
from tests.conftest import GOLDENS, libraries_promote

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def standard_promotion():
    with libraries_promote():
        yield


def _options(**values):
    published = dict(
        discriminator='patchgan', disc_loss='hinge', disc_start=20_000, disc_weight=0.5, perceptual_weight=1.0,
        l2_weight=0.0, kl_weight=0.004,
    )  # fmt: skip
    return ConfigDict(config.default().tokenizer_training.to_dict() | published | values)


class Images:
    """48 images of 32×32 pixels with 3 channels: waves, of which each has its own length and colour."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        y, x, c = np.meshgrid(np.arange(32), np.arange(32), np.arange(3), indexing='ij')
        wave = np.sin(x * (0.1 + index / 48) + y * 0.2 + c + index)
        return {'image': wave.astype(np.float32), 'label': np.int32(index % 3)}


@pytest.fixture(scope='module')
def small():
    """An S-VAE for `Images`."""
    return vae.VAE(
        grid=(4, 4), latent_dim=8, stem=4, channels=(4, 8, 16, 16), encoder_depth=1, decoder_depth=1, heads=2
    )  # fmt: skip


def _samples(tensors, names):
    """The elements of each tensor that the golden holds."""
    row = []
    for name in names:
        a = np.asarray(tensors[name]).ravel()
        row.append(a[np.linspace(0, a.size - 1, min(16, a.size)).astype(int)])
    return np.concatenate(row)


def test_three_steps_of_the_public_training(golden, tiny_vae, lpips_files, monkeypatch):
    """Losses, gradients' norms, both optimizers' moments, parameters and running statistics after each step; the
    adversarial weight is 0 in the first."""
    public = dict(np.load(GOLDENS / 'adversarial.npz'))
    draws = [jnp.stack([public[f'{i}/{name}'] for i in range(3)]) for name in ('beta', 'tangent')]
    monkeypatch.setattr(losses, 'sample_keys', lambda key, step, batch: tuple(d[step] for d in draws))
    monkeypatch.setattr(losses, 'posterior_draws', lambda keys, posterior: keys)
    model, params = tiny_vae
    stage = adversarial.tokenizer_stage(model, _options(disc_start=2, learning_rate=1e-5, final_learning_rate=1e-5, weight_decay=0.5), 0, perceptual.load(*lpips_files))
    state = jax.jit(stage.init)(jax.random.key(0))
    disc_params = torch_gan.by_formula(state.disc_params, torch_gan.PATCHGAN)
    state = state.replace(params=params, disc_params=disc_params)
    step = jax.jit(stage.step)
    for i in range(3):
        before, (state, scalars) = state, step(state, stage.frozen, {'image': golden['images'], 'label': np.zeros(3)})
        weight = 0.5 * (i > 0)
        print(i, {k: float(v) for k, v in scalars.items()})
        for name, value in dict(
            kl_loss='kl', recon_loss='l1', p_loss='perceptual', loss='loss', grad_norm='grad_norm',
            disc_grad_norm='disc_grad_norm',
        ).items():
            print(name, float(scalars[value])/ public[f'{i}/{name}'] - 1)
        print(weight * scalars['adversarial'] - public[f'{i}/gen_loss'], weight * scalars['discriminator'] - public[f'{i}/disc_loss'])
        stats = state.disc_stats
        for kind in ('mean', 'var'):
            ours = np.concatenate([stats[f'norm{k}'][kind] for k in (1, 2, 3)])
            print(kind, np.abs(ours - public[f'{i}/running_{kind}']).max())
        for network, tree, opt, convert_ in (
            ('vae', state.params, state.opt_state, lambda t: {n.removeprefix('vae.'): a for n, a in convert.to_torch(t).items()}),
            ('disc', state.disc_params, state.disc_opt_state, lambda t: torch_gan.to_torch(t, torch_gan.PATCHGAN)),
        ):
            names = public[f'{network}/names']
            get = lambda what: convert_(optax.tree.get(opt, what))
            mu = get('mu')
            norms = np.array([np.linalg.norm(mu[n]) for n in names])
            ref = public[f'{i}/{network}/norms']
            print(network, 'norms', np.max(np.abs(norms / np.maximum(ref, 1e-30) - 1)))
            m, v, p = _samples(mu, names), _samples(get('nu'), names), _samples(convert_(tree), names)
            M, V, P = (public[f'{i}/{network}/{k}'] for k in 'mvp')
            print('  m', np.abs(m - M).max() / max(1e-30, np.abs(M).max()), 'p', np.sort(np.abs(p - P))[::-1][:12] / 1e-5)
            well = np.abs(M) > 1e-3 * np.abs(M).max()
            print('  well', well.mean(), np.abs(p - P)[well].max() / 1e-5 if well.any() else None)
