"""Records with captions as what a model trains on: an encoded caption becomes the label."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from sphere_ar_jax.data.batches import Record, Source, Transform
from sphere_ar_jax.data.files.listing import BrokenCaptionError
from sphere_ar_jax.data.sources import spread
from sphere_ar_jax.runtime.console import UserError

Encode: TypeAlias = Callable[[str], np.ndarray]  # what turns a caption into a label

# Images that are looked at for captions.
LOOKED_AT = 100


class Captioning:
    """A transform that makes a record's label of one of its captions.

    It is picklable, for worker processes.
    """

    def __init__(self, encode: Encode, image: Transform | None = None):
        """Makes the transform.

        Args:
          encode: turns a caption into a label; picklable.
          image: the transform of the image, or None.
        """
        self._encode = encode
        self._image = image

    def __call__(self, record: Record, epoch: int, rng: np.random.Generator) -> Record:
        """{'image', 'captions', …} → {'image', 'label'}.

        The image's own draws come first. Then one of several captions is drawn.

        Raises:
          BrokenImageError: the image cannot be decoded.
          BrokenCaptionError: the record has no caption, or one that cannot be encoded.
        """
        captions = record['captions']
        if not captions:
            raise BrokenCaptionError('it has no caption')
        found = record if self._image is None else self._image(record, epoch, rng)
        chosen = captions[int(rng.integers(len(captions)))] if len(captions) > 1 else captions[0]
        try:
            label = self._encode(chosen)
        except UserError as error:
            raise BrokenCaptionError(str(error)) from None
        return {'image': found['image'], 'label': label}


class FirstCaption:
    """A source whose labels are the first captions, for images that are looked at.

    Attributes:
      source: the source that it is made of.
    """

    def __init__(self, source: Any, encode: Encode):
        """Makes the source; `encode` is that of `Captioning`."""
        self.source = source
        self._captioning = Captioning(encode)

    def __getattr__(self, name: str) -> Any:
        # What is not said here is as in the source. A copy made by pickle has no source at first.
        if name == 'source':
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        first = record | {'captions': record['captions'][:1]}
        return self._captioning(first, 0, np.random.default_rng(0))


class Looked(NamedTuple):
    """Captions that were looked at.

    Attributes:
      texts: the first captions of images, where they can be encoded.
      all_texts: all captions that can be encoded.
      reasons: what is wrong with the others, in one line each.
      broken: the share of images, of 1, that a training would find broken: an image with several
        captions counts by the share of those that cannot be encoded.
      images: how many images were looked at.
    """

    texts: list[str]
    all_texts: list[str]
    reasons: list[str]
    broken: float
    images: int


def look(source: Source, most: int, encode: Encode) -> Looked:
    """Reads all captions of at most so many images, spread evenly over a source.

    Args:
      source: images with captions.
      most: images that are looked at.
      encode: that of `Captioning`.
    """
    texts = []
    all_texts = []
    reasons = []
    broken = 0.0
    numbers = spread(len(source), most)
    for i in numbers:
        where = source.name(i) if hasattr(source, 'name') else f'image {i}'
        try:
            captions = source[i]['captions']
            if not captions:
                raise BrokenCaptionError(f'{where} has no caption')
        except BrokenCaptionError as error:
            reasons.append(str(error))
            broken += 1
            continue
        found = [_why_not(caption, encode) for caption in captions]
        wrong = [f'{where}: {reason}' for reason in found if reason]
        reasons += wrong
        broken += len(wrong) / len(captions)
        right = [text for text, reason in zip(captions, found, strict=True) if not reason]
        all_texts += right
        if not found[0]:
            texts.append(captions[0])
    return Looked(texts, all_texts, reasons, broken / len(numbers), len(numbers))


def _why_not(caption: str, encode: Encode) -> str:
    """Why a caption cannot be encoded, '' where it can."""
    try:
        encode(caption)
    except UserError as error:
        return str(error)
    return ''


def first_caption(source: Source, where: str) -> str:
    """The first caption of a source, which must have captions.

    Args:
      source: the images.
      where: what they are, for the message.

    Raises:
      UserError: its records have no captions, or none of 100 images, spread evenly over the source,
        has one that is a text.
    """
    reason = f'{where} has no captions, which the AR model reads'
    numbers = spread(len(source), LOOKED_AT)
    for i in numbers:
        try:
            record = source[i]
        except BrokenCaptionError as error:
            reason = str(error)
            continue
        if 'captions' not in record:
            break
        if record['captions']:
            return record['captions'][0]
        reason = f'{where}: none of the {len(numbers)} images that were looked at has a caption'
    raise UserError(reason)
