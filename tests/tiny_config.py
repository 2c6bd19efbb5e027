"""The smallest digits run there is, for tests: --config=tests/tiny_config.py."""

import functools
from unittest import mock

import jax
import numpy as np

from sphere_ar_jax.config import build, checks, schema
from sphere_ar_jax.models.judges import discriminators
from sphere_ar_jax.runtime import checkpoint, files
from sphere_ar_jax.training import run
from sphere_ar_jax.training.stages import ar_stage, tokenizer_stage

LONG = 12, 32  # steps of the tokenizer, whose steps take longer, and of the AR model


def get_config(arg=''):
    """Both stages, or with 'distilled' that one, in a few steps of a few images.

    Quality is none of its business.
    """
    c = schema.default()
    c.vae.update(
        grid=(4, 4),
        latent_dim=8,
        image_channels=1,
        stem=4,
        channels=(4, 8, 16),
        encoder_depth=1,
        decoder_depth=1,
        heads=2,
    )
    c.ar.update(
        depth=1, heads=2, width=16, head_depth=2, head_width=16, head_groups=1, class_tokens=2
    )
    training = dict(
        steps=6, batch_size=16, learning_rate=1e-3, warmup_steps=2, log_every=2, checkpoint_every=6
    )
    c.tokenizer_training.update(training, perceptual_weight=0.0, disc_weight=0.0)
    c.ar_training.update(training, ema_decay=0.9, copies=2)
    c.sampling.update(
        num_images=40, batch_size=16, num_steps=2, guidance='linear', guidance_scale=1.5
    )
    c.distillation_training.update(
        training, guidance='constant', guidance_scale=1.5, ema_decay=0.9, teacher_steps=2
    )
    if arg == 'distilled':
        c.init_from = ''
        c.sampling.update(solver='euler', num_steps=2, guidance=None, guidance_scale=None)
    return c


def long_config(checkpoint_every=1):
    """LONG steps of both stages, logged at each."""
    c = get_config()
    for options, steps in zip((c.tokenizer_training, c.ar_training), LONG, strict=True):
        options.update(steps=steps, checkpoint_every=checkpoint_every, log_every=1)
    return c


def narrow_patchgan():
    """A context in which PatchGAN begins with 4 channels in place of 64.

    Without the compiler's optimisation its convolutions take most of a step.
    """
    narrow = functools.partial(discriminators.PatchGAN, width=4)
    return mock.patch.dict(discriminators.KINDS, patchgan=narrow)


def stages(cfg):
    """The tokenizer's stage, and the AR's on a random tokenizer."""
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)
    tokenizer = tokenizer_stage(vae, cfg.tokenizer_training)
    return tokenizer, ar_stage(ar, vae, random_params(vae), cfg.ar_training)


def random_arrays(shapes, seed=0):
    """Float32 arrays in the shapes of a tree: normal with deviation 0.2, around 1 where there is
    one dimension.
    """
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: (draw(x.shape) * 0.2 + (x.ndim == 1)).astype(np.float32), shapes)


@functools.cache
def _shapes(model):
    """The shapes of a model's parameters, traced once for all tests of a process."""
    return jax.eval_shape(model.init_params, jax.random.key(0))


def random_params(model, seed=0):
    """Parameters of a model without compiling their initialisation, none of them left at zero."""
    return random_arrays(_shapes(model), seed)


def random_tokenizer(cfg, workdir):
    """Makes the workdir of a tokenizer of this config that needs no training. Returns its path."""
    weights = checkpoint.Checkpoints(f'{workdir}/tokenizer/weights')
    weights.save(0, random_params(build.build_vae(cfg)), {}, 0.0)
    weights.close()
    checked = checks.check(cfg.copy_and_resolve_references())
    files.write_json(f'{workdir}/config.json', schema.as_dict(checked))
    return str(workdir)


def random_run(cfg=None, **sampling):
    """An untrained `run.Run` whose images do depend on everything: no parameter is left at zero."""
    cfg = get_config() if cfg is None else cfg
    cfg.sampling.update(sampling)
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)
    return run.Run(cfg, vae, random_params(vae), ar, random_params(ar))
