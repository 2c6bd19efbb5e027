r"""A tokenizer and an AR model on a folder of your own images, sized by how many there are.

Command:   python -m sphere_ar_jax.main --config=configs/own.py:data=folder:/data/birds,size=64 \
               --workdir=/tmp/birds
Data:      A directory for each class, DIR/CLASS/NAME.jpg, or all images in one directory, which
           then are a single class without guidance. Or images with captions.
Hardware:  Sized for one small GPU: 2,000 images of 64×64 pixels take 1.0·10¹⁶ operations, which is
           34 minutes at 5 TFLOP/s. This is reckoned. It was not measured on a GPU.
Result:    Not measured. The recipe is that of configs/digits.py in larger models.

Sizes, steps, warm-up, EMA and crops are derived from the number of images, their size and the
classes by `config.own.decide`. The start of a training prints each value with its reason.

Words after the colon, separated by commas:

data=…         KIND:PATH of folder, array_records, webdataset, parquet, idx, emoji, hf (hf:NAME),
               tfds (tfds:NAME) or latents, or the path of a tar like ImageNet's. It must be given.
size=N         Pixels along a side: 64 (the default), 128 or 256.
images=N       The number of images, where they cannot be counted beforehand (tfds, hf).
epochs=N       The AR model sees each image so often. The tokenizer trains three quarters of its
               steps in any case.
steps=N        Steps of the AR model, in place of epochs.
flip, no_flip  Whether images are mirrored left to right at random. They are, unless no_flip is
               given: a flip spoils letters.
crop, whole    Random crops (the default), or always the whole square in the middle.
grey           A model of grey images.
captions=…     Draw for texts, not for classes: a .jsonl, .json or .tsv file, or beside
               (docs/text.md). A flip spoils texts that say left and right.
features=FILE  Draw for features of these texts that another model has computed, an npz
               (docs/text.md).
smoke          20 steps of the smallest models, to see that everything runs; its pictures show
               nothing. The tokenizer's backbone is vit, and no images are held out. It takes 120
               CPU seconds, nearly all of them compilation, when nothing is compiled yet.
"""

import os

from ml_collections import ConfigDict

from sphere_ar_jax import config
from sphere_ar_jax.config import own, recipes, schema

_FILE = 'configs/own.py'
_WORDS = ('flip', 'no_flip', 'crop', 'whole', 'grey', 'smoke')
_VALUES = ('data', 'size', 'images', 'epochs', 'steps', 'captions', 'features')


def _wishes(words: set[str], values: dict[str, str]) -> own.Wishes:
    """What the words after the colon ask for.

    Raises:
      ValueError: they contradict each other, or a number is wrong; one line.
    """
    for one, other in (('flip', 'no_flip'), ('crop', 'whole')):
        if one in words and other in words:
            raise ValueError(f'give {one} or {other}, not both')
    if 'features' in values and 'captions' not in values:
        raise ValueError('features= are those of captions: give captions=, too')
    counts = {key: values[key] for key in ('size', 'epochs', 'steps') if key in values}
    numbers = {key: recipes.whole_number(key, text) for key, text in counts.items()}
    if 'epochs' in numbers and 'steps' in numbers:
        raise ValueError('give epochs= or steps=, not both')
    size = numbers.get('size', 64)
    if size not in own.SIZES:
        known = ', '.join(map(str, own.SIZES))
        raise ValueError(f'size={size}: use one of {known}')
    # A run keeps paths from the root. `beside` is none: each text lies beside its image.
    places = {
        key: os.path.abspath(os.path.expanduser(values[key]))
        for key in ('captions', 'features')
        if key in values and (key, values[key]) != ('captions', 'beside')
    }
    return own.Wishes(
        size=size,
        steps=numbers.get('steps'),
        epochs=numbers.get('epochs'),
        grey='grey' in words,
        flip='no_flip' not in words,
        crop='whole' not in words,
        captions=places.get('captions', values.get('captions')),
        features=places.get('features'),
        smoke='smoke' in words,
    )


def _counted(kind: str, path: str, wishes: own.Wishes, images: str | None) -> own.Counted:
    """What is known of the data set, with the number of images that the words give, if any.

    Raises:
      ValueError: epochs of images are asked for whose number nobody knows; one line.
    """
    found = own.count(kind, path, wishes.captions)
    if images is not None:
        number = recipes.whole_number('images', images)
        return found._replace(images=number, how='as images= says', is_guess=False)
    if found.is_guess and wishes.epochs is not None:
        raise ValueError(
            f'epochs= needs the number of images, which {kind}:{path} does not tell beforehand: '
            'give images=, too, or steps= in place of epochs='
        )
    return found


def get_config(arg: str = '') -> ConfigDict:
    """The config of a folder of images.

    Args:
      arg: the words after the colon, see above.

    Raises:
      ValueError: the data are not given, or a word is wrong; one line.
    """
    words, values = recipes.arguments(_FILE, arg, _WORDS, _VALUES)
    if 'data' not in values:
        raise ValueError('say which images: data=folder:DIR after the colon')
    kind, path = recipes.data_set(values['data'])
    if kind in schema.WITHOUT_PATH:
        raise ValueError(f'data {kind} has a config of its own: configs/{kind}.py')
    wishes = _wishes(words, values)
    if kind == 'latents':
        wishes = wishes._replace(flip=False, crop=False)
    c = config.default()
    c.data.update(name=kind, path=path)
    own.apply(c, own.decide(_counted(kind, path, wishes, values.get('images')), wishes))
    return c
