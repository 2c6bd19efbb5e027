"""Which column of a table holds the images and which the labels, and what labels mean.

Dimensions:
  n  rows     k  classes
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sphere_ar_jax.data.files.listing import BrokenCaptionError, escaped, first_names, shown
from sphere_ar_jax.runtime.console import UserError

# Names of columns, and of keys of JSON objects, that hold captions.
CAPTIONS = ('text', 'caption', 'captions')
# The most classes that integer labels may have. Larger ones are numbers of something else.
MOST_CLASSES = 2**20


def first_of(entry: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value under the first of some keys that an object has, None where it has none.

    Values that are null or empty do not count, nor do texts of spaces alone.
    """
    return next((entry[key] for key in keys if not _is_empty(entry.get(key))), None)


def _is_empty(value: Any) -> bool:
    """Whether a value of an object says nothing: null, spaces, or a list of such values."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | tuple):
        return all(map(_is_empty, value))
    return value is None


def captions_of(where: str, value: object) -> tuple[str, ...]:
    """The captions of an image: a string or a list of strings, without empty ones.

    Args:
      where: names the image in messages.
      value: what its file or its row has; None is no caption.

    Raises:
      BrokenCaptionError: it is something else.
    """
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise BrokenCaptionError(f'{where} has a caption that is no text')
    return tuple(text.strip() for text in texts if text.strip())


def captions_of_row(where: str, read: Callable[[], Mapping[str, Any]]) -> tuple[str, ...]:
    """The captions of a row of a table, of the first column of `CAPTIONS` that has some.

    Args:
      where: names the row in messages.
      read: reads its columns.

    Raises:
      BrokenCaptionError: it has something else than a text, or bytes that are no UTF-8.
    """
    try:
        row = read()
    except UnicodeDecodeError:
        raise BrokenCaptionError(f'{where} has a caption that is no text') from None
    return captions_of(where, first_of(row, CAPTIONS))


class Labels(NamedTuple):
    """The labels of all images of a source.

    Attributes:
      labels: (n,) int32, 0 … num_classes − 1.
      num_classes: k.
      class_names: k names, or None where they are not known.
    """

    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] | None


def choose(
    where: str, what: str, candidates: Sequence[str], name: str, needed: bool = True
) -> str | None:
    """Chooses a column: the only candidate, or the one that has a certain name.

    Args:
      where: names the table in messages.
      what: what the column holds, for messages, as 'images'.
      candidates: the columns that may hold it.
      name: the column that is taken where there are several.
      needed: whether several columns without that name are an error.

    Returns:
      The column, None where there are no candidates, or where several cannot be told apart and none
        is needed.

    Raises:
      UserError: there are several, none of which has the name, and one is needed.
    """
    if name in candidates:
        return name
    if len(candidates) > 1 and needed:
        raise UserError(
            f'{where} has several columns that may hold {what}, {first_names(candidates, 6)}: '
            f'name the one to take {name!r}'
        )
    return candidates[0] if len(candidates) == 1 else None


def labels_of(
    where: str, values: Sequence[int | str | None], names: Sequence[str] | None = None
) -> Labels:
    """What the values of a column of labels mean.

    Integers are labels, and texts are the names of classes, whose labels are their places among
    all names, sorted.

    Args:
      where: names the table in messages.
      values: n values, all integers or all texts.
      names: the names of the classes of integer labels, where they are known.

    Raises:
      UserError: a row has no label, None or −1; or labels are negative, of different kinds, of
        another kind, as many as names or more, or `MOST_CLASSES` or more.
    """
    missing = sum(value is None or value == -1 for value in values)
    if missing:
        raise UserError(
            f'{where}: {missing} of {len(values)} images have no label: '
            'take a split in which all have one'
        )
    if all(isinstance(value, str) for value in values):
        found = sorted({str(value) for value in values})
        place = {name: k for k, name in enumerate(found)}
        labels = np.array([place[str(value)] for value in values], np.int32)
        return Labels(labels, len(found), tuple(map(escaped, found)))
    if any(isinstance(value, str) for value in values):
        raise UserError(f'{where} has numbers and texts as labels: use one of the two')
    numbers = []
    for value in values:
        if not isinstance(value, int):
            raise UserError(
                f'{where} has the label {shown(str(value))}, a {type(value).__name__}: make the '
                'column one of whole numbers or of texts'
            )
        numbers.append(int(value))
    least = min(numbers, default=0)
    most = max(numbers, default=0)
    count = most + 1 if names is None else len(names)
    if least < 0 or most >= min(count, MOST_CLASSES):
        is_id = ': is the column one of ids?' if most >= MOST_CLASSES else ''
        raise UserError(
            f'{where} has labels from {least} to {most}, but they must lie between 0 and '
            f'{min(count, MOST_CLASSES) - 1}{is_id}'
        )
    class_names = None if names is None else tuple(map(escaped, names))
    return Labels(np.array(numbers, np.int32), count, class_names)


def or_one_class(read: Callable[[], Labels | None], needed: bool, n: int, name: str) -> Labels:
    """Reads the labels of n images. Images without labels are a single class.

    Args:
      read: reads the labels; None where there are none.
      needed: whether labels that cannot be told are an error. A model that reads captions needs no
        labels.
      n: number of images.
      name: the name of the single class.

    Raises:
      UserError: `read` raises it, and labels are needed.
    """
    try:
        found = read()
    except UserError:
        if needed:
            raise
        found = None
    if found is None:
        return Labels(np.zeros(n, np.int32), 1, (escaped(name),))
    return found
