"""The names of a run's classes: kept, found and shown."""

import json

import pytest

from sphere_ar_jax.config import recipes, schema
from sphere_ar_jax.data import imagenet
from sphere_ar_jax.evaluation import class_names
from sphere_ar_jax.runtime.console import UserError

# As directories are sorted.
NUMBERED = tuple(sorted(str(k) for k in range(12)))
PETS = ('Cat', 'cat', 'dog', 'owl\\x1b')
SYNSETS = tuple(synset for synset, _ in imagenet.classes())
FEW = ('n01440764', 'n02099601', 'n02510455')  # tench, golden retriever, giant panda


def _config(name, num_classes):
    c = schema.default()
    c.data.update(name=name, num_classes=num_classes)
    return c


def test_own_names_go_before_numbers():
    """Directories 0 … 11 are sorted as text, and `2` is the one named 2."""
    assert NUMBERED[:4] == ('0', '1', '10', '11')
    for name in NUMBERED:
        k = class_names.find(name, NUMBERED, 12)
        assert NUMBERED[k] == name
        assert class_names.titles([k], NUMBERED) == [name]
    assert class_names.find('2', NUMBERED, 12) == 4
    # Numbers that are no names are labels.
    assert class_names.find('2', PETS, 4) == 2
    assert class_names.find('2', None, 4) == 2
    with pytest.raises(UserError, match='no class'):
        class_names.find('9' * 5000, None, 4)


def test_own_names_are_found_exactly_or_but_for_their_case():
    assert class_names.find('cat', PETS, 4) == 1
    assert class_names.find('DOG', PETS, 4) == 2
    with pytest.raises(UserError, match="'CAT' may be Cat or cat: give the exact name"):
        class_names.find('CAT', PETS, 4)


def test_images_of_other_classes_are_refused(tmp_path):
    cfg = _config('folder', 2)
    class_names.keep(tmp_path, ('cat', 'dog'))
    for names in (('cat', 'dog'), ('cat', 'dog', 'owl'), None):
        class_names.require(tmp_path, cfg, names)
    message = (
        r'was trained on other classes \(class 0 was cat, the data now have dog\): give images'
    )
    with pytest.raises(UserError, match=message):
        class_names.require(tmp_path, cfg, ('dog', 'cat'))
    class_names.require(tmp_path / 'new', cfg, ('dog', 'cat'))  # whose classes are not known


def test_what_is_no_class_is_answered_with_the_runs_own():
    names = ('house cat', 'dog', 'owl')
    for text, message in (
        ('house-cat', "'house-cat' is no class of this run: similar names are house cat"),
        ('goldfish', "'goldfish' is no class of this run, which has 3 classes: house cat, dog, ow"),
        ('3', "'3' is no class: this model knows the numbers 0 to 2"),
    ):
        with pytest.raises(UserError) as caught:
            class_names.find(text, names, 3)
        assert str(caught.value).startswith(message)
        assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match="'cat' is no class: this model knows the numbers 0 to 6"):
        class_names.find('cat', None, 7)


def test_imagenets_names_are_for_synsets_only():
    assert class_names.find('golden retriever', SYNSETS, 1000) == 207
    assert class_names.find('n02099601', SYNSETS, 1000) == class_names.find('207', SYNSETS, 1000)
    assert class_names.titles([207, 388], SYNSETS) == ['207 golden retriever', '388 giant panda']
    # A run on three of them has labels 0, 1 and 2.
    assert class_names.find('Golden_Retriever', FEW, 3) == 1
    assert class_names.find('n02510455', FEW, 3) == 2
    assert class_names.titles([1], FEW) == ['1 golden retriever']
    with pytest.raises(UserError, match="'goldfish' is no class of this run, which has 3 classes"):
        class_names.find('goldfish', FEW, 3)
    # A thousand classes of one's own are not ImageNet's.
    own = tuple(f'bird {k}' for k in range(1000))
    assert class_names.titles([207, 999], own) == ['bird 207', 'bird 999']
    with pytest.raises(UserError, match='is no class of this run'):
        class_names.find('golden retriever', own, 1000)
    assert class_names.titles([0, 1], ('n01440764', 'cat')) == ['n01440764', 'cat']
    assert class_names.titles([0, 3], ('cat', 'dog')) == ['cat', '3']


def test_where_the_names_of_a_run_come_from(tmp_path):
    config = _config('folder', 1000)
    assert class_names.of_run(tmp_path, config) is None
    assert class_names.of_run(tmp_path, _config('imagenet', None)) == SYNSETS
    assert class_names.of_run(tmp_path, recipes.published_ar('B')) == SYNSETS
    assert class_names.of_run(tmp_path, _config('imagenet', 12)) is None
    class_names.keep(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    class_names.keep(tmp_path, ('é', 'cat'))
    assert json.loads((tmp_path / 'classes.json').read_text()) == ['é', 'cat']
    for name in ('folder', 'imagenet'):
        assert class_names.of_run(tmp_path, _config(name, 1000)) == ('é', 'cat')


def test_labels_do_not_change_their_meaning(tmp_path):
    class_names.keep(tmp_path, ('cat', 'dog'))
    class_names.keep(tmp_path, ('cat', 'dog'))
    with pytest.raises(UserError, match=r'class 1 was dog, the data now have deer') as caught:
        class_names.keep(tmp_path, ('cat', 'deer', 'dog'))
    assert '\n' not in str(caught.value)
    class_names.keep(tmp_path, ('cat', 'dog', 'owl'))
    assert class_names.of_run(tmp_path, _config('folder', 3)) == ('cat', 'dog', 'owl')


def test_images_of_one_class_may_be_moved(tmp_path):
    """Their class has the name of the directory."""
    class_names.keep(tmp_path, ('birds',))
    class_names.keep(tmp_path, ('moved_birds',))
    assert class_names.of_run(tmp_path, _config('folder', 1)) == ('birds',)
    (tmp_path / 'two').mkdir()
    class_names.keep(tmp_path / 'two', ('cat', 'dog'))
    with pytest.raises(UserError, match='class 0 was cat, the data now have fish'):
        class_names.keep(tmp_path / 'two', ('fish',))


@pytest.mark.parametrize('content', ['', '["cat"', '{}', '[1]', '[' * 100_000, '\x00\udc80'])
def test_damaged_names_are_refused_and_a_training_writes_them_anew(tmp_path, content, capsys):
    (tmp_path / 'classes.json').write_bytes(content.encode('utf-8', 'surrogateescape'))
    with pytest.raises(UserError, match=r'classes.json is damaged: remove it'):
        class_names.of_run(tmp_path, _config('folder', 1))
    class_names.keep(tmp_path, ('cat',))
    assert 'is damaged: it is written anew' in capsys.readouterr().err
    assert class_names.of_run(tmp_path, _config('folder', 1)) == ('cat',)


def test_how_classes_are_described():
    assert class_names.describe(3, ('cat', 'dog', 'owl')) == '3 classes: cat, dog, owl'
    assert class_names.describe(1, ('cat',)) == '1 class: cat'
    assert class_names.describe(5, tuple('abcde')) == '5 classes: a, b, c, d, e'
    assert class_names.describe(1000, SYNSETS) == (
        '1000 classes: n01440764, n01443537, n01484850, …'
    )
    assert class_names.describe(7, None) == '7 classes'
    line = class_names.describe(2, ('\x1b[31m', 'n' * 10_000))
    assert line.isprintable()
    assert len(line) < 300
