"""Builds the objects that a config describes. Nothing else picks parts by name."""

import dataclasses

from sphere_ar_jax.config import schema
from sphere_ar_jax.flow import plan
from sphere_ar_jax.models import ar, vae


def dtype(config):
    """The dtype of the computation."""
    return schema.DTYPES[config.dtype]


def build_vae(config):
    """The S-VAE that the config describes."""
    options = config.vae.to_dict()
    return vae.VAE(
        **{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in options.items()}, dtype=dtype(config)
    )


def build_ar(config):
    """The AR model that the config describes. Raises ConfigError where the number of classes is not known yet."""
    if schema.num_classes(config) is None:
        raise schema.ConfigError(
            f'data.num_classes: say how many classes the model knows ({config.data.name} does not)'
        )
    return ar.AR(
        **config.ar.to_dict(),
        num_classes=schema.num_classes(config),
        grid=tuple(config.vae.grid),
        latent_dim=config.vae.latent_dim,
        dtype=dtype(config),
        average=config.init_from is not None,
    )


def build_sampler(config):
    """The sampler's compiled-in options."""
    s = config.sampling.to_dict()
    if s['guidance_interval'] is not None:
        s['guidance_interval'] = tuple(s['guidance_interval'])
    return plan.Options(**{field.name: s[field.name] for field in dataclasses.fields(plan.Options)})
