"""Builds the objects that a config describes. Nothing else picks parts by name."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sphere_ar_jax.config import schema
from sphere_ar_jax.data import small, sources
from sphere_ar_jax.data.batches import Transform
from sphere_ar_jax.data.captions import captioned, features, table, vocabulary
from sphere_ar_jax.flow import plan
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.backbones import BACKBONES
from sphere_ar_jax.models.conditions import CONDITIONS, Classes, Condition, Features, Text
from sphere_ar_jax.models.heads import HEADS, Head, check_solver
from sphere_ar_jax.models.joint import Joint
from sphere_ar_jax.models.posteriors import POSTERIORS
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime.console import UserError, pick
from sphere_ar_jax.runtime.types import Progress

# Keys of the section `vae` that are not fields of a backbone.
_TOKENIZER_KEYS = (
    'grid', 'latent_dim', 'backbone', 'posterior', 'sigma', 'kappa_scale', 'decoder_input', 'radius'
)  # fmt: skip
# Fields of a backbone whose values follow from the key `vae.channels`.
_FROM_CHANNELS = {'patch_size', 'width'}
# Keys of the section `ar` that are fields of some heads.
_HEAD_KEYS = ('magnitude_weight', 'fused')


def open_data_set(config: ConfigDict) -> small.DataSet:
    """Opens the small data set of a run.

    Args:
      config: the run's config; its kind of data must be one of `small.KINDS`.

    Raises:
      UserError: see `small.open_data_set`.
    """
    d = config.data
    data = small.open_data_set(d.name, d.path, config.seed, d.holdout, d.classes, d.brightness)
    return small.enlarged(data, d.enlarge)


def count_classes(cfg: ConfigDict, source: sources.Images | small.Split) -> None:
    """Sets cfg.data.num_classes where neither the config nor the kind of data says it.

    Args:
      cfg: a config.
      source: its images.

    Raises:
      UserError: the images have more classes than the model, and it does not read texts.
    """
    known = schema.num_classes(cfg)
    if known is None:
        cfg.data.num_classes = source.num_classes
    elif source.num_classes > known and not has_captions(cfg):
        where = cfg.data.path or f'data {cfg.data.name}'
        raise UserError(f'{where} has {source.num_classes} classes, but the model {known}')


def open_files(config: ConfigDict, progress: Progress = lambda done, total: None) -> Any:
    """Opens the images of a run that are no small data set, or latents in their place.

    Where neither the config nor the kind of data says how many classes there are, this sets
    config.data.num_classes to the number found.

    Args:
      config: the run's config, with the path of the data.
      progress: called while a tar is read for the first time, see `sources.open_source`.

    Returns:
      The source, with the captions that the config names.

    Raises:
      UserError: there are no images or no captions, or the images have more classes than the model.
    """
    d = config.data
    needs_labels = not has_captions(config)
    source = sources.open_source(d.name, d.path, d.split, d.data_dir, progress, needs_labels)
    count_classes(config, source)
    return source if d.captions is None else table.with_captions(source, d.captions)


class Sampler(NamedTuple):
    """How a run is sampled: what is compiled, and the numbers that change without compiling.

    Attributes:
      options: what is compiled, see `plan.Options`.
      guidance_scale: s (docs/method.md, "Guidance"), one for all images or (n,), one for each; None
        without guidance.
      temperature: the factor of x₀'s noise (docs/method.md, "Temperature").
    """

    options: plan.Options
    guidance_scale: float | np.ndarray | None = None
    temperature: float = 1.0


def dtype(config: ConfigDict) -> Any:
    """The dtype of the computation, `jnp.float32` or `jnp.bfloat16`."""
    return getattr(jnp, config.dtype)


def backbone_fields(config: ConfigDict) -> set[str]:
    """The names of the fields of the backbone that the config names.

    Raises:
      UserError: there is no such backbone.
    """
    backbone_class: Any = pick(BACKBONES, 'vae.backbone', config.vae.backbone)
    return {field.name for field in dataclasses.fields(backbone_class)}


def unread_keys(config: ConfigDict) -> list[str]:
    """The keys of the section `vae` that the backbone does not read.

    Raises:
      UserError: there is no such backbone.
    """
    fields = backbone_fields(config)
    if fields & _FROM_CHANNELS:
        fields.add('channels')
    return [name for name in config.vae if name not in _TOKENIZER_KEYS and name not in fields]


def _posterior_fields(config: ConfigDict) -> tuple[str, ...]:
    """The names of the fields of the posterior that the config names.

    Raises:
      UserError: there is no such posterior.
    """
    posterior_class: Any = pick(POSTERIORS, 'vae.posterior', config.vae.posterior)
    return tuple(field.name for field in dataclasses.fields(posterior_class))


def latents_on_a_sphere(config: ConfigDict) -> bool:
    """Whether the posterior's latents lie on the sphere of the key `vae.radius`.

    Raises:
      UserError: there is no such posterior.
    """
    return 'radius' in _posterior_fields(config)


def on_a_sphere(config: ConfigDict) -> bool:
    """Whether all tokens of the AR model lie on the sphere of the key `vae.radius`.

    Raises:
      UserError: there is no such posterior.
    """
    if config.ar.token_space == 'latents':
        return latents_on_a_sphere(config)
    return config.ar.token_space == 'projected'


def reads_radius(config: ConfigDict) -> bool:
    """Whether anything in the tokenizer lies on a sphere, or is projected onto one.

    Raises:
      UserError: there is no such posterior.
    """
    is_projected = 'projected' in (config.vae.decoder_input, config.ar.token_space)
    return is_projected or latents_on_a_sphere(config)


def build_vae(config: ConfigDict) -> VAE:
    """The tokenizer that the config describes (docs/method.md, "Tokenizer").

    A backbone gets the keys of the section `vae` that are its fields. One with the fields
    `patch_size` and `width` has them from `vae.channels`, so that they are what they would be in a
    backbone of convolutions.
    """
    c = config.vae
    backbone_class = pick(BACKBONES, 'vae.backbone', c.backbone)
    values = c.to_dict() | {'patch_size': 2 ** (len(c.channels) - 1), 'width': c.channels[-1]}
    fields = {}
    for name in backbone_fields(config) & set(values):
        value = values[name]
        # Fields of Flax modules must be hashable.
        fields[name] = tuple(value) if isinstance(value, list | tuple) else value
    backbone = backbone_class(**fields, dtype=dtype(config))
    posterior_class = pick(POSTERIORS, 'vae.posterior', c.posterior)
    options = {name: c[name] for name in _posterior_fields(config)}
    return VAE(
        tuple(c.grid),
        c.latent_dim,
        backbone,
        posterior_class(**options),
        dtype(config),
        c.decoder_input,
        config.ar.token_space,
        c.radius,
    )


def _head_class(config: ConfigDict) -> Callable[..., Head]:
    """The head that the config's words name, the distilled one where one is distilled."""
    if config.init_from is None:
        return pick(HEADS, 'ar.head', config.ar.head)
    return pick(HEADS, 'distillation_training.head', config.distillation_training.head)


def recomputes(section: ConfigDict) -> bool:
    """Whether a model computes activations again in the backward pass.

    It does where its section's `remat` is None, but `state.step_for_memory` may decide otherwise.
    """
    return section.remat is None or section.remat


def build_head(config: ConfigDict) -> Head:
    """The head of the AR model that the config describes.

    Raises:
      ValueError: the head cannot have such a radius or prior_scale.
    """
    c = config.ar
    fields = (build_vae(config).token_dim, c.head_width, c.head_depth, c.head_groups)
    head_class: Any = _head_class(config)
    known = {field.name for field in dataclasses.fields(head_class)}
    options = {name: c[name] for name in _HEAD_KEYS if name in known}
    return head_class(
        *fields,
        **options,
        remat=recomputes(c),
        unroll=c.unroll,
        dtype=dtype(config),
        radius=config.vae.radius if on_a_sphere(config) else None,
        prior_scale=c.prior_scale,
    )


def has_captions(config: ConfigDict) -> bool:
    """Whether images are drawn for texts, as tokens or as features, and not for classes."""
    return config.ar.condition in ('text', 'features')


def reads_features(config: ConfigDict) -> bool:
    """Whether texts are features that another model has computed."""
    return config.ar.condition == 'features'


def writes_texts(config: ConfigDict) -> bool:
    """Whether the AR model writes texts for images, too."""
    return config.ar.text_weight is not None


def open_vocabulary(config: ConfigDict) -> vocabulary.Vocabulary:
    """The vocabulary of a config with captions.

    Raises:
      UserError: it cannot be opened.
    """
    return vocabulary.open_vocabulary(config.ar.vocabulary)


def encode_prompt(config: ConfigDict, text: str) -> np.ndarray:
    """A text as a label of a config with captions.

    Raises:
      UserError: the text is empty; or see `vocabulary.encode_prompt` and `features.TextFeatures`.
    """
    if reads_features(config):
        vocabulary.check_prompt(text)
        return open_features(config)(text)
    return vocabulary.encode_prompt(text, open_vocabulary(config), config.ar.text_tokens)


def encode_captions(config: ConfigDict, texts: Sequence[str]) -> np.ndarray:
    """Captions of the data as labels (n, …), see `caption_encoder`."""
    encode = caption_encoder(config)
    return np.stack([encode(text) for text in texts])


def open_features(config: ConfigDict) -> features.TextFeatures:
    """The features of texts that a config names.

    Raises:
      UserError: there is no such file, or the model reads features of another shape.
    """
    c = config.ar
    if c.features is None:
        raise UserError('give --config.ar.features=FILE.npz, the features of the texts')
    found = features.open_features(c.features)
    if c.feature_shape is not None and found.shape != tuple(c.feature_shape):
        raise UserError(
            f'{c.features} has features {found.shape}, but the model reads {tuple(c.feature_shape)}'
        )
    return found


def caption_encoder(config: ConfigDict) -> captioned.Encode:
    """What turns a caption of the data into a label of a config with captions; it is picklable.

    The label is (T,) int32, see `vocabulary.CaptionEncoder`, or (T, F) float32, see
    `features.TextFeatures`.

    Raises:
      UserError: see `open_features`.
    """
    if reads_features(config):
        return open_features(config)
    c = config.ar
    return vocabulary.CaptionEncoder(c.vocabulary, c.text_tokens)


def captioning(config: ConfigDict, image: Transform | None = None) -> Transform | None:
    """The transform of the records of a training.

    Args:
      config: a config.
      image: the transform of the images, None where they stay as they are.

    Returns:
      The same, or one that makes labels of captions too, where images are drawn for texts.
    """
    if not has_captions(config):
        return image
    return captioned.Captioning(caption_encoder(config), image)


def build_condition(config: ConfigDict) -> Condition:
    """The condition of the AR model that the config describes (docs/method.md, "Condition").

    Raises:
      UserError: the number of classes is not known yet, or the vocabulary cannot be opened.
    """
    c = config.ar
    condition_class = pick(CONDITIONS, 'ar.condition', c.condition)
    if condition_class is Text:
        return Text(
            open_vocabulary(config).size,
            c.text_tokens,
            c.width,
            encoder_depth=c.text_encoder_depth,
            heads=c.heads,
            dtype=dtype(config),
        )
    if condition_class is Features:
        return Features(*c.feature_shape, c.width)
    num_classes = schema.num_classes(config)
    if num_classes is None:
        raise UserError(
            f'data.num_classes: say how many classes the model knows ({config.data.name} does not)'
        )
    return Classes(num_classes, c.class_tokens, c.width)


def build_ar(config: ConfigDict) -> AR:
    """The AR model that the config describes (docs/method.md, "Autoregressive model").

    Raises:
      UserError: see `build_condition`.
    """
    c = config.ar
    speed = {'remat': recomputes(c), 'unroll': c.unroll, 'dtype': dtype(config)}
    token_dim = build_vae(config).token_dim
    head = build_head(config)
    condition = build_condition(config)
    grid = tuple(config.vae.grid)
    sizes = (c.depth, c.heads, c.width, condition, head, grid, token_dim)
    if c.text_weight is None:
        return AR(*sizes, fused=c.fused, **speed)
    return Joint(
        *sizes, fused=c.fused, text_weight=c.text_weight, alone_weight=c.alone_weight, **speed
    )


def build_sampler(config: ConfigDict) -> Sampler:
    """The sampler that the config describes (docs/method.md, "Sampling").

    Raises:
      ValueError: an option has no use, a value is not possible, or the head has another solver.
    """
    s = config.sampling.to_dict()
    if s['guidance_interval'] is not None:
        s['guidance_interval'] = tuple(s['guidance_interval'])
    chosen = {field.name: s[field.name] for field in dataclasses.fields(plan.Options)}
    options = plan.Options(**chosen)
    check_solver(_head_class(config), options.solver)
    return Sampler(options, s['guidance_scale'], s['temperature'])
