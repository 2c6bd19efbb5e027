"""The classes of ImageNet (ILSVRC2012) by id, synset and name.

Dimensions:
  k  class id, 0 … 999: the place of the class's synset among all of them, sorted
"""

import difflib
import functools
import importlib.resources

from sphere_ar_jax.runtime.console import UserError


@functools.cache
def classes():
    """All 1,000 classes in order of id: a tuple of (synset, names), as ('n02099601', 'golden
    retriever').

    synset: of WordNet 3.0. names: all that ILSVRC2012's own list has, English and Latin, separated
    by ', '.
    """
    text = (
        importlib.resources.files('sphere_ar_jax.data')
        .joinpath('imagenet_classes.txt')
        .read_text('utf-8')
    )
    return tuple(
        tuple(line.split(' ', 1)) for line in text.splitlines() if not line.startswith('#')
    )


@functools.cache
def _ids():
    """{text, case folded: ids of the classes that it may mean, in order}: ids, synsets, names and
    lists of names.
    """
    ids = {}
    for k, (synset, names) in enumerate(classes()):
        for text in {text.casefold() for text in (str(k), synset, names, *names.split(', '))}:
            ids.setdefault(text, []).append(k)
    return ids


def find(text):
    """The id k (int) of the class that a text means.

    Args:
      text: an id '207', a synset 'n02099601' or a name 'golden retriever': any one of the class's
        names, or all of them ('maillot, tank suit'); upper or lower case, spaces or underscores.
    Raises UserError, in one line: for a name that two classes share (there are 19) with both, else
    with names that contain it as a word, or are like it.
    """
    wanted = ' '.join(text.replace('_', ' ').split()).casefold()
    found = _ids().get(wanted, [])
    if len(found) == 1:
        return found[0]
    describe = lambda k: f'{k} = {classes()[k][0]} ({classes()[k][1]})'
    if found:
        raise UserError(
            f'{text!r} may be class {" or ".join(map(describe, found))}: give the number'
        )
    names = {name.casefold(): name for _, names in classes() for name in names.split(', ')}
    longer = [
        name for name in names if wanted in name.split()
    ]  # 'retriever': what a user would look for
    similar = [names[match] for match in (longer or difflib.get_close_matches(wanted, names))[:5]]
    hint = (
        f'similar names are {", ".join(similar)}'
        if similar
        else 'give 0 … 999, a synset or an English name'
    )
    raise UserError(f'ImageNet has no class {text!r}: {hint}')
