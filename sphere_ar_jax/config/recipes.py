"""The published models and their training on ImageNet, as configs.

The module also parses the words that follow the colon of a config file, as in configs/vae.py:smoke.

Source: the paper (arXiv 2509.24335) and the public SphereAR code; see docs/method.md, "Sizes" and
"Training".
"""

import os
import re
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from sphere_ar_jax.config import schema
from sphere_ar_jax.models.sizes import VARIANTS
from sphere_ar_jax.runtime.console import UserError

# The sampler of the fewest evaluations that lost nothing on the digits, see
# docs/fewer_evaluations.md.
FAST: dict[str, Any] = dict(solver='ab2', num_steps=10, shift=1.5)

# The sampler of a distilled head, which has its guidance within.
DISTILLED: dict[str, Any] = dict(
    solver='euler', num_steps=2, shift=None, guidance=None, guidance_scale=None
)

# Guidance at which the published models were scored (docs/method.md, "Guidance").
PUBLISHED_SCALES = {'B': 4.5, 'L': 4.6, 'H': 4.5}

# Sizes of the other backbones with as many parameters as the hybrid, within 5%: values of the
# section `vae`, for the digits and for the published image sizes (docs/method.md, "Backbone").
BACKBONES: dict[str, dict[str, dict[str, Any]]] = {
    'digits': {
        'cnn': dict(backbone='cnn', channels=(16, 32, 72)),
        'vit': dict(backbone='vit', channels=(112, 112, 112)),
    },
    'published': {
        'cnn': dict(backbone='cnn', channels=(64, 64, 128, 384, 768)),
        'vit': dict(backbone='vit', encoder_depth=7, decoder_depth=15),
    },
}

# Images of ImageNet's training set.
IMAGENET = 1_281_167


def whole_number(name: str, text: str) -> int:
    """The positive whole number of a word NAME=TEXT.

    Raises:
      ValueError: it is none; one line.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f'{name}={text}: give a whole number of at least 1')
    return int(text)


def arguments(
    file: str, arg: str, words: Collection[str], values: Collection[str] = ()
) -> tuple[set[str], dict[str, str]]:
    """Parses what follows a config file's colon, as 'WORD,NAME=VALUE,…'.

    Args:
      file: the config file, for messages.
      arg: the text after the colon.
      words: the words that may be given.
      values: the names that may be given with a value.

    Returns:
      (words given, {name: value given}).

    Raises:
      ValueError: another word or name was given; one line.
    """
    found_words = set()
    found_values = {}
    for part in arg.split(','):
        if not part:
            continue
        name, equals, value = part.partition('=')
        if name not in (values if equals else words):
            known = [*words, *(f'{name}=…' for name in values)]
            raise ValueError(
                f'{file} has no variant {name + equals!r}: it takes {", ".join(known)}'
            )
        if equals:
            found_values[name] = value
        else:
            found_words.add(name)
    return found_words, found_values


# What the section `data` says of latents, which are of centre crops.
LATENTS = {'flip': False, 'crop_until': (0, 0)}


def _kind_of(directory: str) -> str:
    """The kind of data that a directory seems to hold."""
    signs = {
        'images.json': 'array_records',
        'latents.json': 'latents',
        'dataset_dict.json': 'hf',
        'state.json': 'hf',
        '-idx3-ubyte': 'idx',
        '.parquet': 'parquet',
        '.tar': 'webdataset',
    }
    names = os.listdir(directory)
    for sign, kind in signs.items():
        if any(sign in name for name in names):
            return kind
    return 'folder'


def set_backbone(config: ConfigDict, given: Collection[str], sizes: str) -> None:
    """Gives a config the backbone that is among the words after the colon, if one is.

    Args:
      config: the config to change.
      given: the words.
      sizes: a key of `BACKBONES`.

    Raises:
      ValueError: two backbones were given; one line.
    """
    words = [word for word in BACKBONES[sizes] if word in given]
    if len(words) > 1:
        raise ValueError(f'a tokenizer has one backbone: use one of {", ".join(words)}')
    for word in words:
        config.vae.update(BACKBONES[sizes][word])


def data_set(text: str) -> tuple[str, str]:
    """Splits the text that names a data set.

    Args:
      text: 'KIND:PATH', 'digits', or the path of ImageNet's tar.

    Returns:
      (the kind, a key of `schema.DATA`; the path, '' for the digits).

    Raises:
      UserError: the text is empty or the path of a directory, it begins with an unknown kind, or
        it has no path where its kind needs one, or one where it has none.
    """
    kind, colon, path = text.partition(':')
    if kind in schema.DATA and not path and kind not in schema.WITHOUT_PATH:
        raise UserError(f'data={text} names no place: write data={kind}:PATH')
    if kind in schema.WITHOUT_PATH and path:
        raise UserError(f'data {kind} has no path: write data={kind}')
    if kind in schema.DATA:
        return kind, path
    if not text:
        raise UserError('data= names no place: write data=KIND:PATH')
    place = os.path.expanduser(text)
    if os.path.isdir(place):
        raise UserError(f'{text} is a directory: write data={_kind_of(place)}:{text}')
    if colon and re.fullmatch(r'\w+', kind) and not os.path.exists(place):
        kinds = ', '.join(name for name in schema.DATA if name not in schema.WITHOUT_PATH)
        raise UserError(f'there is no kind of data {kind!r}: write KIND:PATH with one of {kinds}')
    return 'imagenet', text


def _published(
    file: str, arg: str, words: Collection[str], section: str, epochs: int, batch: int
) -> tuple[ConfigDict, set[str]]:
    """What the configs of all published models share.

    Args:
      file: the config file, for messages.
      arg: the text after the colon.
      words: the words that this config takes besides those that all take.
      section: the section of the training on ImageNet.
      epochs: the length of this training.
      batch: images a step, unless `arg` gives their number.

    Returns:
      (config, words given).
    """
    given, values = arguments(
        file,
        arg,
        ('smoke', '512', 'tpu', 'gpu', *BACKBONES['published'], *words),
        ('batch', 'data', 'dtype'),
    )
    c = schema.default()
    c.data.update(name='imagenet', max_broken=0.001)
    if 'data' in values:
        kind, path = data_set(values['data'])
        c.data.name = kind
        c.data.path = path
        if kind == 'latents':
            c.data.update(LATENTS)
    c.dtype = values.get('dtype', 'bfloat16' if given & {'tpu', 'gpu'} else 'float32')
    set_backbone(c, given, 'published')
    if '512' in given:
        c.vae.grid = (32, 32)
    size = 8 if 'smoke' in given else batch
    if 'batch' in values:
        size = whole_number('batch', values['batch'])
    if size > IMAGENET:
        raise ValueError(f'batch={size}: ImageNet has {IMAGENET} images')
    c[section].update(batch_size=size, steps=epochs * (IMAGENET // size))
    if 'tpu' in given:
        # A step may take 10 ms on a large slice, and each writes to a bucket.
        c[section].update(log_every=500, checkpoint_every=5000)
    if 'smoke' in given:
        grid = (8, 8) if '512' in given else (4, 4)
        c.vae.update(grid=grid, encoder_depth=1, decoder_depth=1)
        warmup = min(5, c[section].warmup_steps)
        c[section].update(steps=20, warmup_steps=warmup, log_every=5, checkpoint_every=10)
        c.watch.every = 10
        c.data.max_broken = 0.5
    return c, given


def published_vae(arg: str = '') -> ConfigDict:
    """The published S-VAE and its recipe (docs/method.md, "Tokenizer").

    Args:
      arg: words after the config file's colon, see configs/vae.py.

    Raises:
      ValueError: another word was given; one line.
    """
    c, words = _published('configs/vae.py', arg, (), 'tokenizer_training', 100, 256)
    c.ar_training.steps = 0
    if 'smoke' in words:
        # LPIPS' weights are files, which a smoke test goes without.
        c.tokenizer_training.update(disc_start=10, perceptual_weight=0.0)
    return c


def published_ar(size: str, arg: str = '') -> ConfigDict:
    r"""The published AR model, its recipe and its sampler: configs/ar_b.py, ar_l.py and ar_h.py.

    The words that `arg` takes, separated by commas:

      data=…     A path of ImageNet's training tar, or KIND:PATH of folder, array_records,
                 webdataset, parquet, emoji, hf (hf:NAME), tfds (tfds:NAME) or latents.
      batch=N    Images a step. The number of epochs stays.
      dtype=…    bfloat16 or float32 (the default) of the computation.
      tpu        Settings for slices of TPUs: bfloat16, fewer checkpoints and lines of the log
                 (every 5,000 and 500 steps), and mesh.fsdp = 4, so that every chip keeps a
                 quarter of the state. Otherwise optimizer and EMA would move more memory than
                 the model does. --mode=compile reports what the programs need on a slice. Blocks
                 are computed again in the backward pass (remat). --config.ar.remat=False computes
                 a fifth less, but moves more memory.
      gpu        Settings for GPUs: bfloat16, and the sampler's own kernels (ar.fused), which are
                 fewer and larger than XLA's. They have not run on a GPU yet (docs/speed.md, "The
                 sampler's own kernels").
      512        512×512 pixels, 32×32 tokens. This is not a published model.
      cnn, vit   Another backbone of the tokenizer, as in configs/vae.py.
      fast       The sampler of the fewest evaluations that lost nothing on the digits
                 (docs/fewer_evaluations.md). Its FID on ImageNet has not been measured.
      smoke      20 steps of a shallow model on 64×64 pixels, to see that everything runs. It takes
                 a minute on a CPU:

        python -m sphere_ar_jax.main --workdir=/tmp/ar_smoke --config.tokenizer=/tmp/vae_smoke \
            --config=configs/ar_b.py:smoke,data=/tmp/stand_in/ILSVRC2012_img_train.tar

    These commands convert the published weights instead of training, and draw 50,000 images:

        python -m sphere_ar_jax.main --mode=convert --workdir=DIR \
            --checkpoint=hf://guolinke/SphereAR/SphereAR_B.pt
        python -m sphere_ar_jax.main --mode=sample --workdir=DIR

    Args:
      size: one of `VARIANTS`.
      arg: words after the config file's colon, see above.

    Raises:
      ValueError: another word was given; one line.
    """
    c, words = _published(f'configs/ar_{size.lower()}.py', arg, ('fast',), 'ar_training', 400, 512)
    c.ar.update(VARIANTS[size])
    c.tokenizer_training.steps = 0
    c.ar.remat = True if 'tpu' in words else None
    c.mesh.fsdp = 4 if 'tpu' in words else 1
    c.ar.fused = 'gpu' in words
    c.sampling.update(
        num_images=50_000,
        batch_size=256,
        num_steps=100,
        guidance='linear',
        guidance_scale=PUBLISHED_SCALES[size],
    )
    if 'fast' in words:
        c.sampling.update(FAST)
    if 'smoke' in words:
        c.ar.update(depth=2, head_depth=c.ar.head_groups, remat=False)
        c.ar_training.update(ema_decay=0.9)
        c.sampling.update(num_images=64, batch_size=16, num_steps=10)
        c.watch.update(classes=4, columns=4)
    return c


def of_checkpoint(sizes: Any) -> ConfigDict:
    """The config of a PyTorch checkpoint; a model that was not published gets the recipe of B.

    Args:
      sizes: the `torch_sizes.Sizes` of the checkpoint.
    """
    c = published_ar(sizes.name or 'B')
    c.vae.update(sizes.vae)
    # The checkpoint has neither a discriminator nor the weights of LPIPS.
    c.tokenizer_training.update(perceptual_weight=0.0, disc_weight=0.0)
    if sizes.ar is not None:
        c.ar.update(sizes.ar)
        c.data.num_classes = sizes.num_classes
    return c
