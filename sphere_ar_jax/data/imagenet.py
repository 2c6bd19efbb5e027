"""The classes of ImageNet (ILSVRC2012) by id, synset and name.

Dimensions:
  k  class id, 0 … 999: the place of the class's synset among all of them, sorted
"""

import difflib
import functools
import importlib.resources
from collections.abc import Iterable

from sphere_ar_jax.runtime.console import UserError


@functools.cache
def classes() -> tuple[tuple[str, str], ...]:
    """Reads all 1,000 classes in order of id.

    Returns:
      A tuple of (synset, names), as ('n02099601', 'golden retriever'). The synset is that of
      WordNet 3.0. `names` has all names of ILSVRC2012's own list, English and Latin, separated by
      ', '.
    """
    file = importlib.resources.files('sphere_ar_jax.data').joinpath('imagenet_classes.txt')
    found = []
    for line in file.read_text('utf-8').splitlines():
        if not line.startswith('#'):
            synset, names = line.split(' ', 1)
            found.append((synset, names))
    return tuple(found)


def are_synsets(names: Iterable[str] | None) -> bool:
    """Whether all names of classes are synsets of ILSVRC2012, and there are any."""
    given = set(names or ())
    return bool(given) and given <= {synset for synset, _ in classes()}


@functools.cache
def _ids() -> dict[str, list[int]]:
    """Lists, for each text that may mean a class, the ids that it may mean.

    The texts are ids, synsets, names and lists of names, all case folded. The ids are in order.
    """
    ids: dict[str, list[int]] = {}
    for k, (synset, names) in enumerate(classes()):
        texts = (str(k), synset, names, *names.split(', '))
        for text in {text.casefold() for text in texts}:
            ids.setdefault(text, []).append(k)
    return ids


def _describe(k: int) -> str:
    """Describes a class, as '207 = n02099601 (golden retriever)'."""
    synset, names = classes()[k]
    return f'{k} = {synset} ({names})'


def find(text: str) -> int:
    """Finds the id k of the class that a text means.

    Args:
      text: an id ('207'), a synset ('n02099601'), one of the class's names ('golden retriever') or
        all of them ('maillot, tank suit'). Case does not matter, and underscores count as spaces.

    Returns:
      k, 0 … 999.

    Raises:
      UserError: no class has this name; the message, one line, suggests names that contain the text
        as a word or are spelled like it. Or two classes share the name, as is so for 19 names; the
        message names both.
    """
    wanted = ' '.join(text.replace('_', ' ').split()).casefold()
    found = _ids().get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        candidates = ' or '.join(map(_describe, found))
        raise UserError(f'{text!r} may be class {candidates}: give the number')
    names = {name.casefold(): name for _, names in classes() for name in names.split(', ')}
    # A user who asks for 'retriever' means one of the names that have this word.
    matches = [name for name in names if wanted in name.split()]
    if not matches:
        matches = difflib.get_close_matches(wanted, names)
    if matches:
        hint = 'similar names are ' + ', '.join(names[match] for match in matches[:5])
    else:
        hint = 'give 0 … 999, a synset or an English name'
    raise UserError(f'ImageNet has no class {text!r}: {hint}')
