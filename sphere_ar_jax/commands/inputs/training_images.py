"""The training images of a run, with their captions."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sphere_ar_jax.config import build, checks
from sphere_ar_jax.data import augment, batches, imagenet, small, sources
from sphere_ar_jax.data.captions import captioned, vocabulary
from sphere_ar_jax.runtime import checkpoint, console
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree


class Data(NamedTuple):
    """The images of a run.

    Attributes:
      source: the images to train on.
      data: the small data set that these belong to, or None.
      heldout: images that are never trained on, or None.
      reading: what else `loop.train` needs to read the source.
      encoded_by: the hash of the tokenizer that latents were encoded with, None for images.
    """

    source: Any
    data: small.DataSet | None
    heldout: Any
    reading: dict[str, Any]
    encoded_by: str | None = None


def _check_labels(cfg: ConfigDict, train: small.Split) -> None:
    """Raises UserError unless every class of a small data set gets a sample to be scored."""
    if cfg.sampling.num_images < train.num_classes:
        raise UserError(
            f'sampling.num_images is {cfg.sampling.num_images}, '
            f'but must be at least one for each of {train.num_classes} classes'
        )


def _with_captions(cfg: ConfigDict, data: Data) -> Data:
    """Makes labels of the images' captions, where the AR model reads texts.

    Raises:
      UserError: the images have no captions.
    """
    if not build.has_captions(cfg):
        return data
    captioned.first_caption(data.source, f'data {cfg.data.name}')
    transform = build.captioning(cfg, data.reading.get('transform'))
    heldout = data.heldout
    if heldout is not None:
        heldout = captioned.FirstCaption(heldout, build.caption_encoder(cfg))
    return data._replace(heldout=heldout, reading=data.reading | {'transform': transform})


def open_data(cfg: ConfigDict) -> Data:
    """Opens the training images, with the captions that the model reads.

    The arguments and errors are those of `_open_images`, and images must have the captions.
    """
    return _with_captions(cfg, _open_images(cfg))


def _open_images(cfg: ConfigDict) -> Data:
    """Opens the training images.

    Where neither the config nor the kind of data says how many classes there are, this sets
    cfg.data.num_classes to the number found.

    Raises:
      UserError: there are no images, or they have more classes than the model.
    """
    d = cfg.data
    if d.name in small.KINDS:
        data = build.open_data_set(cfg)
        build.count_classes(cfg, data.train)
        checks.check_image_shape(d.name, data.train.image_shape, build.build_vae(cfg).image_shape)
        _check_labels(cfg, data.train)
        return Data(data.train, data, data.heldout, {'workers': d.workers})
    if not d.path:
        raise UserError(f'give --config.data.path, of the {d.name} data')
    source = build.open_files(cfg, console.bar(None, 'reading the tar', 'byte'))
    if isinstance(source, sources.Latents):
        training, heldout = sources.split(source, d.holdout_files)
        reading = dict(workers=d.workers, threads=d.threads)
        return Data(training, None, heldout, reading, source.tokenizer)
    size, _, channels = build.build_vae(cfg).image_shape
    decay_from, decay_to = d.crop_until
    # The exact recipe of ImageNet knows neither EXIF nor transparency.
    as_stored = imagenet.are_synsets(source.class_names)
    reading = dict(
        transform=augment.Augmentation(
            size, decay_from, decay_to, d.draft, as_stored, channels, d.flip
        ),
        workers=d.workers,
        threads=d.threads,
        max_broken=d.max_broken,
    )
    training, heldout = sources.split(source, d.holdout_files)
    return Data(training, None, heldout, reading)


def check_latents(cfg: ConfigDict, encoded_by: str | None, vae_params: PyTree) -> None:
    """Raises UserError where latents were encoded by another tokenizer than the run's.

    `encoded_by` is None where there are images.
    """
    if encoded_by is None:
        return
    trained = {name: value for name, value in vae_params.items() if name != 'statistics'}
    if checkpoint.digest(trained) != encoded_by:
        raise UserError(
            f'{cfg.data.path} was encoded with another tokenizer than that of this run: encode the '
            'images again by --mode=encode, with the --workdir that --config.tokenizer names'
        )


def describe_captions(cfg: ConfigDict, source: Any) -> list[str]:
    """Reads some captions and says in lines what the first one is, and which are broken or cut off.

    Args:
      cfg: a checked config whose AR model reads texts.
      source: images whose records have captions.

    Raises:
      UserError: there are none, or more are broken than `data.max_broken` lets pass.
    """
    first = captioned.first_caption(source, f'data {cfg.data.name}')
    said = [f"captions, the first one: '{console.printable(first, 80)}'"]
    looked = captioned.look(source, captioned.LOOKED_AT, build.caption_encoder(cfg))
    most = cfg.data.max_broken
    if batches.are_too_many(looked.broken * looked.images, looked.images, most):
        raise UserError(
            f'{looked.broken:.1%} of the captions that were looked at are broken, more than '
            f'data.max_broken = {most}: {looked.reasons[0]}; mend them, leave such images out, or '
            'raise --config.data.max_broken'
        )
    if looked.reasons:
        said.append(f'other images take the place of broken captions, as: {looked.reasons[0]}')
    if not build.reads_features(cfg):
        cut = vocabulary.describe_cut(
            looked.all_texts, build.open_vocabulary(cfg), cfg.ar.text_tokens
        )
        said += [cut] if cut else []
    return said
