"""Texts for images, from tokens that are the most probable ones or are drawn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.models.vae import draw_batch_tokens, image_keys
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.sampling import autoencoding, captioning
from sphere_ar_jax.training.run import Run
from tests import tiny_config


def test_the_likelihood_of_texts_behind_drawn_tokens():
    """By the pass of training, on tokens of the keys that the seed stands for."""
    texts = {'ar.condition': 'text', 'ar.text_tokens': 5, 'ar.text_weight': 0.2}
    cfg = schema.changed(tiny_config.get_config(), texts)
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)
    run = Run(cfg, vae, tiny_config.random_params(vae), ar, tiny_config.random_params(ar, seed=1))
    images = np.random.default_rng(0).uniform(-1, 1, (3, *vae.image_shape)).astype(np.float32)
    labels = np.array([[7, 8, 0, 0, 0], [9, 9, 9, 9, 9], [0, 0, 0, 0, 0]], np.int32)
    how = {'batch_size': 2, 'mesh': sharding.make_mesh(1)}
    keys = image_keys(jax.random.key(4), jnp.arange(3))
    folded = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    tokens = {
        True: draw_batch_tokens(vae, run.vae_params, {'image': images}, folded),
        False: autoencoding.encoder(vae)(run.vae_params, images),
    }
    assert np.abs(tokens[True] - tokens[False]).max() > 0.1
    for drawn, z in tokens.items():
        found = captioning.nats(run, images, labels, seed=4, drawn=drawn, **how)
        expected = ar.apply({'params': run.ar_params}, labels, z, method='nats')
        chex.assert_trees_all_close(found, expected, rtol=1e-4)
        written = captioning.write(run, images, seed=4, drawn=drawn, **how)
        chex.assert_shape(written, labels.shape)
        np.testing.assert_array_equal(
            written[1:],
            captioning.write(run, images, seed=4, drawn=drawn, **how | {'batch_size': 3})[1:],
        )
