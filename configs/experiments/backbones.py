r"""Claim 4 at small size: three backbones of the tokenizer.

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/backbones.py
Result:    On the digits the hybrid draws worse images than the transformer, whether it draws better
           ones than convolutions is undecided, and the transformer trains 1.5 times as fast as both
           (docs/experiments/backbones/page.md). Fashion-MNIST is not measured yet.

The backbones have the same number of parameters within 5%.

Words after a colon: fashion takes Fashion-MNIST with three seeds in place of the digits, and smoke
shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments, packaged, recipes

_BACKBONE = ('backbone', 'stem', 'channels', 'encoder_depth', 'decoder_depth')


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start(
        'backbones',
        arg,
        'Backbones: hybrid, pure convolutions, pure transformer',
        "The backbones' parameters agree within 5%. ",
    )
    c.claim = (
        'The hybrid backbone is nearly as fast as a pure transformer and much faster than pure '
        'convolutions (5.81, 7.19 and 2.25 steps/s at 256×256), and draws the best images.'
    )
    c.caveat = (
        'What would change it: images of 256×256, where convolutions at full resolution take most '
        'of the time, and an accelerator.'
    )
    sizes = recipes.BACKBONES['digits']
    # The backbone of the digits, also where the data's config has another one.
    digits = packaged.load('digits').vae
    c.base.vae.update({key: digits[key] for key in _BACKBONE})
    c.rows = experiments.rows(hybrid={}, cnn={'vae': sizes['cnn']}, vit={'vae': sizes['vit']})
    c.comparisons = (
        'hybrid cnn frechet_best',
        'hybrid vit frechet_best',
        'hybrid cnn psnr',
        'hybrid vit psnr',
        'hybrid cnn tokenizer_steps_per_second',
        'vit hybrid tokenizer_steps_per_second',
    )
    return experiments.finish(c, arg)
