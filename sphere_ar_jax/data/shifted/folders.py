"""Folders of images in other styles, as ImageNet-Sketch and ImageNet-R, with a model's own labels.

ImageNet-R has 200 of ImageNet's 1,000 synsets. The place of a synset among them is not its label.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from sphere_ar_jax.data import sources
from sphere_ar_jax.data.files.listing import shown
from sphere_ar_jax.runtime.console import UserError


class Pictures(NamedTuple):
    """Files of pictures with their classes.

    Attributes:
      files: the paths, class by class.
      labels: the label of each file, as the model counts the classes, or the numbers of its text.
    """

    files: list[str]
    labels: list[Any]


def labelled(path: str | os.PathLike[str], find: Callable[[str], int]) -> Pictures:
    """The pictures of a folder that has a directory for each class, see `sources.ImageFolder`.

    Args:
      path: the folder, PATH/CLASS/…/NAME.jpg.
      find: gives the label of the class that a directory's name means.

    Raises:
      UserError: the folder cannot be read, or a directory with images is no class of the model; one
        line.
    """
    source = sources.ImageFolder(path)
    places = source.labels.tolist()
    labels = {}
    for place in sorted(set(places)):
        try:
            labels[place] = find(source.class_names[place])
        except UserError as error:
            raise UserError(
                f'{shown(source.path)}: {error}; or give --classes, one for all images or one for '
                'each'
            ) from None
    files = [source.file(i) for i in range(len(source))]
    return Pictures(files, [labels[place] for place in places])


def spread(pictures: Pictures, most: int) -> Pictures:
    """At most so many of the pictures, evenly spread over their order and so over the classes."""
    chosen = sources.spread(len(pictures.files), most)
    return Pictures(
        [pictures.files[i] for i in chosen],
        [pictures.labels[i] for i in chosen],
    )
