"""The published models and their training on ImageNet, as configs, and what those of configs/ take
after the colon.

Source: the paper (arXiv 2509.24335) and the public SphereAR code.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import schema
from sphere_ar_jax.models.sizes import VARIANTS

# The sampler of the fewest evaluations that lost nothing on the digits, see BUILD_NOTES.md, "Fewer
# evaluations".
FAST = dict(solver='ab2', num_steps=10, shift=1.5)

# Guidance at which the published models were scored.
PUBLISHED_SCALES = {'B': 4.5, 'L': 4.6, 'H': 4.5}

# Images of ImageNet's training set.
IMAGENET = 1_281_167


def arguments(file, arg, words, values=()):
    """What follows a config file's colon, 'WORD,NAME=VALUE,…' → (words given, {name: value given}).

    Raises ValueError, one line, for words and names other than those of `words` and `values`.
    """
    given = [part.partition('=') for part in arg.split(',') if part]
    for name, equals, _ in given:
        if name not in (values if equals else words):
            known = [*words, *(f'{name}=…' for name in values)]
            raise ValueError(
                f'{file} has no variant {name + equals!r}: it takes {", ".join(known)}'
            )
    return {name for name, equals, _ in given if not equals}, {
        name: v for name, equals, v in given if equals
    }


def data_set(text):
    """'KIND:PATH', 'digits', or the path of ImageNet's tar → (kind, a key of `schema.DATA`, path)."""
    kind, _, path = text.partition(':')
    return (kind, path) if kind in schema.DATA else ('imagenet', text)


def _published(file, arg, words, section, epochs, batch):
    """The published models on ImageNet, `section` trained for so many epochs; arg: what all
    published configs take.
    """
    words, values = arguments(
        file, arg, ('smoke', '512', 'tpu', *words), ('batch', 'data', 'dtype')
    )
    c = schema.default()
    c.data.update(name='imagenet', max_broken=0.001)
    if 'data' in values:
        c.data.name, c.data.path = data_set(values['data'])
    c.dtype = values.get('dtype', 'bfloat16' if 'tpu' in words else 'float32')
    if '512' in words:
        c.vae.grid = (32, 32)
    batch = int(values.get('batch', 8 if 'smoke' in words else batch))
    c[section].update(batch_size=batch, steps=epochs * (IMAGENET // batch))
    if 'smoke' in words:
        c.vae.update(grid=(8, 8) if '512' in words else (4, 4), encoder_depth=1, decoder_depth=1)
        c[section].update(
            steps=20, warmup_steps=min(5, c[section].warmup_steps), log_every=5, checkpoint_every=10
        )
        c.watch.every = 10
        c.data.max_broken = 0.5
    return c, words


def published_vae(arg=''):
    """The published S-VAE and its recipe; `arg` as configs/vae.py says. Raises ValueError for
    another.
    """
    c, words = _published('configs/vae.py', arg, (), 'tokenizer_training', 100, 256)
    c.ar_training.steps = 0
    if 'smoke' in words:
        c.tokenizer_training.update(disc_start=10, perceptual_weight=0.0)  # its weights are files
    return c


def published_ar(size: str, arg: str = '') -> ConfigDict:
    """The published AR model, its recipe and its sampler: configs/ar_b.py, ar_l.py and ar_h.py.

    Args:
      size: one of `VARIANTS`. arg: words after the config file's colon, separated by commas: data=…
        a path of ImageNet's training tar, or KIND:PATH of folder, array_records or tfds (tfds:NAME)
        batch=N    images a step; the number of epochs stays dtype=…    bfloat16 or float32 (the
        default) of the computation tpu        what slices of TPUs want: bfloat16, and
        --config.mesh.fsdp=4, so that every chip keeps a quarter of the state, where optimizer and
        EMA would move more memory than the model. What else a slice takes: --mode=compile. Blocks
        are computed again in the backward pass (remat) with or without; --config.ar.remat=False
        where memory is plenty: it computes a fifth less, and moves more memory. 512        512×512
        pixels, 32×32 tokens; not a published model fast       the sampler of the fewest evaluations
        that lost nothing on the digits (BUILD_NOTES.md, "Fewer evaluations"). It was chosen on
        digits: its FID on ImageNet has not been measured. smoke      20 steps of a shallow model on
        64×64 pixels, to see that everything runs, on a CPU, in a minute: python -m
        sphere_ar_jax.main --config.tokenizer=/tmp/vae_smoke --workdir=/tmp/ar_smoke \\
        --config=configs/ar_b.py:smoke,data=/tmp/stand_in/ILSVRC2012_img_train.tar
    Raises ValueError, one line, for other words.

    The published weights, converted instead of trained, and 50,000 images:

        python -m sphere_ar_jax.main --mode=convert
        --checkpoint=hf://guolinke/SphereAR/SphereAR_B.pt --workdir=DIR python -m sphere_ar_jax.main
        --mode=sample --workdir=DIR
    """
    c, words = _published(f'configs/ar_{size.lower()}.py', arg, ('fast',), 'ar_training', 400, 512)
    c.ar.update(VARIANTS[size])
    c.tokenizer_training.steps = 0
    c.ar.remat = 'smoke' not in words
    c.mesh.fsdp = 4 if 'tpu' in words else 1
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
        c.ar.update(depth=2, head_depth=c.ar.head_groups)
        c.ar_training.update(ema_decay=0.9)
        c.sampling.update(num_images=64, batch_size=16, num_steps=10)
        c.watch.update(classes=4, columns=4)
    return c


def of_checkpoint(sizes):
    """The config of a PyTorch checkpoint, from `torch_sizes.sizes`: a model that was not published
    gets B's recipe.
    """
    c = published_ar(sizes.name or 'B')
    c.vae.update(sizes.vae)
    c.tokenizer_training.update(
        perceptual_weight=0.0, disc_weight=0.0
    )  # the file holds no discriminator
    if sizes.ar is not None:
        c.ar.update(sizes.ar)
        c.data.num_classes = sizes.num_classes
    return c
