import hashlib

import pytest

from sphere_ar_jax.data import imagenet
from sphere_ar_jax.runtime.console import UserError

ANCHORS = {
    0: ('n01440764', 'tench'), 1: ('n01443537', 'goldfish'), 22: ('n01614925', 'bald eagle'),
    88: ('n01818515', 'macaw'), 134: ('n02012849', 'crane'), 207: ('n02099601', 'golden retriever'),
    250: ('n02110185', 'Siberian husky'), 281: ('n02123045', 'tabby'), 360: ('n02444819', 'otter'),
    388: ('n02510455', 'giant panda'), 417: ('n02782093', 'balloon'), 517: ('n03126707', 'crane'),
    638: ('n03710637', 'maillot'), 744: ('n04008634', 'projectile'),
    817: ('n04285008', 'sports car'), 933: ('n07697313', 'cheeseburger'),
    979: ('n09468604', 'valley'), 980: ('n09472597', 'volcano'), 985: ('n11939491', 'daisy'),
    999: ('n15075141', 'toilet tissue'),
}  # fmt: skip


def _names(k):
    return imagenet.classes()[k][1].split(', ')


def _error(text):
    with pytest.raises(UserError) as error:
        imagenet.find(text)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_classes():
    synsets = [synset for synset, _ in imagenet.classes()]
    assert len(synsets) == len(set(synsets)) == 1000
    assert synsets == sorted(synsets)
    for k, (synset, names) in enumerate(imagenet.classes()):
        assert len(synset) == 9
        assert synset[0] == 'n'
        assert synset[1:].isdecimal()
        assert all(name and name == name.strip() and name.isascii() for name in _names(k)), names
        assert len(set(_names(k))) == len(_names(k))


def test_against_other_lists():
    """SHA-256 of two public lists, line by line: Keras' imagenet_class_index.json has each class's
    first name, timm's imagenet_synsets.txt with imagenet_synset_to_lemma.txt all of them.
    """

    def digest(lines):
        return hashlib.sha256('\n'.join(lines).encode()).hexdigest()

    keras = [
        f'{synset} {names.split(", ")[0].replace(" ", "_")}' for synset, names in imagenet.classes()
    ]
    timm = [f'{synset} {names}' for synset, names in imagenet.classes()]
    assert digest(keras) == '069abdf959ced31a64132cd2402353359a166b81bbbbbad69b57df7511587da9'
    assert digest(timm) == 'b6e5b90376a998304703176bc829997a99fc461ecbb75e855db80b3d5b76d827'


def test_known_classes():
    for k, (synset, name) in ANCHORS.items():
        assert imagenet.classes()[k][0] == synset
        assert _names(k)[0] == name


def test_find_by_id_synset_and_every_name():
    owners = {}
    for k, (synset, names) in enumerate(imagenet.classes()):
        assert imagenet.find(str(k)) == imagenet.find(synset) == k
        for name in names.split(', '):
            owners.setdefault(name.casefold(), []).append(k)
    shared = {name: ks for name, ks in owners.items() if len(ks) > 1}
    assert len(shared) == 19
    assert {'crane', 'maillot', 'cardigan', 'panda', 'missile'} <= set(shared)
    for name, ks in owners.items():
        if name not in shared:
            assert imagenet.find(name) == ks[0]
    for name, ks in shared.items():
        message = _error(name)
        assert all(f'{k} = {imagenet.classes()[k][0]} (' in message for k in ks)


def test_find_is_lenient_in_spelling_only():
    assert (
        imagenet.find('Golden_Retriever')
        == imagenet.find('  GOLDEN  retriever ')
        == imagenet.find('N02099601')
        == 207
    )
    assert imagenet.find('maillot, tank suit') == 639
    assert imagenet.find('Cardigan Welsh corgi') == 264
    assert 'golden retriever' in _error('golden retreiver')
    for text in ('retrie', '1000', '-1', 'n02099602', '', 'a\nb', '9' * 5000, 'xyzzy'):
        assert repr(text) in _error(text)
    assert 'give 0 … 999' in _error('1000')


def test_errors_in_words():
    assert _error('crane') == (
        "'crane' may be class 134 = n02012849 (crane) or 517 = n03126707 (crane): give the number"
    )
    assert (
        _error('xyzzy')
        == "ImageNet has no class 'xyzzy': give 0 … 999, a synset or an English name"
    )
    assert _error('daisi').startswith("ImageNet has no class 'daisi': similar names are daisy")
    assert _error('retriever') == (
        "ImageNet has no class 'retriever': similar names are flat-coated retriever, "
        'curly-coated retriever, golden retriever, Labrador retriever, Chesapeake Bay retriever'
    )
