"""Builds the objects that a config describes. Nothing else picks parts by name."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from sphere_ar_jax.config import schema
from sphere_ar_jax.flow import plan
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.backbones import BACKBONES
from sphere_ar_jax.models.conditions import CONDITIONS
from sphere_ar_jax.models.heads import HEADS
from sphere_ar_jax.models.posteriors import POSTERIORS
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime.console import UserError, pick

# Keys of the section `vae` that are not fields of a backbone.
_TOKENIZER_KEYS = ('grid', 'latent_dim', 'backbone', 'posterior')


class Sampler(NamedTuple):
    """How a run is sampled: what is compiled, and the numbers that may change without compiling.

    Attributes:
      options: see `plan.Options`. guidance_scale: s, None without guidance. temperature: factor of
        x₀'s noise.
    """

    options: plan.Options
    guidance_scale: float | None = None
    temperature: float = 1.0


def dtype(config: ConfigDict) -> Any:
    """The dtype of the computation."""
    return getattr(jnp, config.dtype)


def build_vae(config: ConfigDict) -> VAE:
    """The tokenizer that the config describes."""
    c = config.vae
    fields = {}
    for name, value in c.to_dict().items():
        if name not in _TOKENIZER_KEYS:
            fields[name] = tuple(value) if isinstance(value, list | tuple) else value
    backbone = pick(BACKBONES, 'vae.backbone', c.backbone)(**fields, dtype=dtype(config))
    posterior = pick(POSTERIORS, 'vae.posterior', c.posterior)()
    return VAE(tuple(c.grid), c.latent_dim, backbone, posterior, dtype(config))


def build_ar(config: ConfigDict) -> AR:
    """The AR model that the config describes. Raises UserError where the number of classes is not
    known yet.
    """
    c = config.ar
    num_classes = schema.num_classes(config)
    if num_classes is None:
        raise UserError(
            f'data.num_classes: say how many classes the model knows ({config.data.name} does not)'
        )
    if config.init_from is None:
        head = pick(HEADS, 'ar.head', c.head)
    else:
        head = pick(HEADS, 'distillation_training.head', config.distillation_training.head)
    speed = {'remat': c.remat, 'unroll': c.unroll, 'dtype': dtype(config)}
    condition = pick(CONDITIONS, 'ar.condition', c.condition)
    return AR(
        c.depth,
        c.heads,
        c.width,
        condition(num_classes, c.class_tokens, c.width),
        head(config.vae.latent_dim, c.head_width, c.head_depth, c.head_groups, **speed),
        tuple(config.vae.grid),
        config.vae.latent_dim,
        **speed,
    )


def build_sampler(config: ConfigDict) -> Sampler:
    """The sampler that the config describes."""
    s = config.sampling.to_dict()
    if s['guidance_interval'] is not None:
        s['guidance_interval'] = tuple(s['guidance_interval'])
    options = plan.Options(
        **{field.name: s[field.name] for field in dataclasses.fields(plan.Options)}
    )
    return Sampler(options, s['guidance_scale'], s['temperature'])
