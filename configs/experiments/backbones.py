r"""Claim 4 on the digits: three backbones of the tokenizer.

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/backbones.py
Result:    docs/experiments/backbones.md

The backbones have the same number of parameters within 5%.
The word smoke after a colon shows in two minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments, recipes


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: '' or 'smoke'."""
    c = experiments.on_digits("The backbones' parameters agree within 5%. ")
    c.title = 'Backbones: hybrid, pure convolutions, pure transformer'
    c.claim = (
        'The hybrid backbone is nearly as fast as a pure transformer and much faster than pure '
        'convolutions (5.81, 7.19 and 2.25 steps/s at 256×256), and draws the best images.'
    )
    sizes = recipes.BACKBONES['digits']
    c.rows = experiments.rows(hybrid={}, cnn={'vae': sizes['cnn']}, vit={'vae': sizes['vit']})
    c.guidance_scales = (1.0, 1.5, 2.0, 3.0, 4.0)
    c.comparisons = (
        'hybrid cnn frechet_best',
        'hybrid vit frechet_best',
        'hybrid cnn psnr',
        'hybrid vit psnr',
        'hybrid cnn tokenizer_steps_per_second',
        'vit hybrid tokenizer_steps_per_second',
    )
    return experiments.finish(c, 'backbones', arg)
