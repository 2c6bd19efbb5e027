"""The names of a run's classes: kept in its workdir, found by what is typed, shown above pictures.

A training writes the names of its source to WORKDIR/classes.json, a list in the order of the
labels. For ImageNet these are synsets, whose English names are known besides.

Dimensions:
  k  label of a class
"""

import difflib
import os
import sys
from collections.abc import Iterable, Sequence

from etils import epath
from ml_collections import ConfigDict

from sphere_ar_jax.config import schema
from sphere_ar_jax.data import imagenet
from sphere_ar_jax.data.files.listing import first_names, shown
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError

_FILE = 'classes.json'


def _read(workdir: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """Reads the names that a workdir keeps, None where it keeps none.

    Raises:
      ValueError: the file is damaged.
    """
    path = epath.Path(workdir, _FILE)
    try:
        names = files.read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path} is no list of names')
    return tuple(names)


def _difference(before: Sequence[str] | None, names: Sequence[str] | None) -> str:
    """Says which class has another name than before; '' where none has."""
    if before is None or names is None:
        return ''
    if len(before) == len(names) == 1:
        return ''  # A single class has the name of its directory, which may have been moved.
    for k, (old, new) in enumerate(zip(before, names, strict=False)):
        if old != new:
            return f'class {k} was {shown(old)}, the data now have {shown(new)}'
    return ''


def require(
    workdir: str | os.PathLike[str], config: ConfigDict, names: Sequence[str] | None
) -> None:
    """Refuses images whose classes have other names than those that a run was trained on.

    Args:
      workdir: the directory of the run.
      config: its config.
      names: the names of the images' classes, None where they have none.

    Raises:
      UserError: a class has another name, or the names that the workdir keeps are damaged.
    """
    difference = _difference(of_run(workdir, config), names)
    if difference:
        raise UserError(
            f'{workdir} was trained on other classes ({difference}): give images of its own '
            f'classes; where only names changed, remove {workdir}/{_FILE}'
        )


def keep(workdir: str | os.PathLike[str], names: Sequence[str] | None) -> None:
    """Writes the names of a run's classes to WORKDIR/classes.json.

    A file that is damaged is replaced, and a line on stderr says so.

    Args:
      workdir: the directory of the run.
      names: the names in the order of the labels, None where the data have none.

    Raises:
      UserError: the run was begun with classes of other names, so that labels would change their
        meaning.
    """
    if names is None:
        return
    try:
        before = _read(workdir)
    except ValueError:
        print(f'{workdir}/{_FILE} is damaged: it is written anew', file=sys.stderr)
        before = None
    difference = _difference(before, names)
    if difference:
        raise UserError(
            f'{workdir} was begun with other classes ({difference}): give the names back to the '
            f'directories, or use another --workdir; where only names changed, remove '
            f'{workdir}/{_FILE}'
        )
    if before is None or len(before) < len(names):
        files.write_json(f'{workdir}/{_FILE}', list(names))


def of_run(workdir: str | os.PathLike[str], config: ConfigDict) -> tuple[str, ...] | None:
    """The names of a run's classes, in the order of the labels; None where they are not known.

    Runs on ImageNet that keep no names, as converted ones, have its 1,000 synsets.

    Args:
      workdir: the directory of the run.
      config: its config.

    Raises:
      UserError: the names that the workdir keeps are damaged.
    """
    try:
        names = _read(workdir)
    except ValueError:
        raise UserError(
            f'{workdir}/{_FILE} is damaged: remove it and give numbers, or start the training '
            'again, which writes it anew'
        ) from None
    if names is not None:
        return names
    synsets = tuple(synset for synset, _ in imagenet.classes())
    if config.data.name == 'imagenet' and schema.num_classes(config) == len(synsets):
        return synsets
    return None


def _own(text: str, names: Sequence[str]) -> int | None:
    """The label of the class that has a name: exactly, or else but for upper and lower case.

    Raises:
      UserError: several names differ from the text only in case.
    """
    if text in names:
        return names.index(text)
    same = [name for name in names if name.casefold() == text.casefold()]
    if len(same) > 1:
        raise UserError(f'{text!r} may be {" or ".join(map(shown, same))}: give the exact name')
    return names.index(same[0]) if same else None


def _unknown(text: str, names: Sequence[str] | None, known: int) -> UserError:
    """The error for a text that means no class."""
    said = f'{shown(text)!r} is no class'
    if names is None or text.isdecimal():
        return UserError(f'{said}: this model knows the numbers 0 to {known - 1}')
    lower = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(text.casefold(), lower, 5)
    if close:
        similar = ', '.join(shown(lower[name]) for name in close)
        return UserError(f'{said} of this run: similar names are {similar}')
    return UserError(f'{said} of this run, which has {describe(len(names), names)}')


def find(text: str, names: Sequence[str] | None, known: int) -> int:
    """Finds the label k of the class that a text means.

    Args:
      text: one of the names, a number, or, where the names are ImageNet's synsets, any name that
        `imagenet.find` knows. A name goes before a number: '2' is the class that is named 2, if
        there is one.
      names: the names of the classes, see `of_run`.
      known: the number of classes that the model knows.

    Returns:
      k, 0 … known − 1.

    Raises:
      UserError: there is no such class; one line, which lists names like it.
    """
    if names is not None:
        own = _own(text, names)
        if own is not None and own < known:
            return own
    if text.isdecimal():
        # Python reads no number of thousands of digits.
        if len(text) < 20 and int(text) < known:
            return int(text)
        raise _unknown(text, names, known)
    if names is None or not imagenet.are_synsets(names):
        raise _unknown(text, names, known)
    synset = imagenet.classes()[imagenet.find(text)][0]
    if synset not in names:
        raise _unknown(text, titles(range(len(names)), names), known)
    return names.index(synset)


def titles(labels: Iterable[int], names: Sequence[str] | None) -> list[str]:
    """A title for each class, in printable characters.

    It is the class's own name; its number and first English name where all names are ImageNet's
    synsets; its number alone where it has no name.

    Args:
      labels: k of each class.
      names: the names of the classes, see `of_run`.
    """
    english = dict(imagenet.classes()) if imagenet.are_synsets(names) else {}
    found = []
    for k in labels:
        if names is None or k >= len(names):
            found.append(str(k))
        elif english:
            found.append(f'{k} {english[names[k]].split(",")[0]}')
        else:
            found.append(shown(names[k]))
    return found


def describe(count: int, names: Sequence[str] | None) -> str:
    """The number of classes and their first names, as '3 classes: cat, dog, owl'."""
    classes = f'{count} class' if count == 1 else f'{count} classes'
    return f'{classes}: {first_names(names, 5)}' if names else classes
