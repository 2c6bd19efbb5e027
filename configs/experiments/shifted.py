r"""Shifted data at small size: how fast do tokens leave the training set (check 2)?

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/shifted.py
Result:    On the digits the norms of tokens on the sphere move less. Whether these tokens stay
           nearer to the training set is undecided against two Gaussian families and contradicted
           against sigma_vae (docs/experiments/shifted/page.md). Fashion-MNIST is not measured.

The first quarter or half of inverted, rotated, noisy and thickened images goes through the
tokenizer of each row, and the row's model draws the other tokens (docs/shifted.md).

Words after a colon: fashion takes Fashion-MNIST with three seeds in place of the digits, and smoke
shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start(
        'shifted', arg, 'Shifted data: how fast do tokens leave the training set?'
    )
    c.kind = 'shifted'
    c.claim = (
        'Behind a prefix that is unlike the training images, tokens on a sphere stay nearer to '
        'the training set than Gaussian ones, whose norms can run away.'
    )
    c.method = (
        'The first quarter or half of the tokens of 200 held-out images is kept, clean or after '
        'one of four corruptions in three severities, and the model draws the others at guidance '
        f'{c.common_guidance}. '
        'The distance of a token is that to the nearest training token at its position, over the '
        'same distance of held-out tokens, and its norm is that before projection over the mean '
        'norm of the training tokens. '
        'Scores are what corrupted prefixes change against clean ones, and a lead is the '
        'difference of two rows, seed by seed. '
        'A sample is collapsed where the pixels of its drawn part have a standard deviation below '
        "a quarter of the 1% quantile of real images'."
    )
    c.caveat = (
        'What would change it: longer sequences, in which tokens have time to leave or to return.'
    )
    shown = ('gaussian', 'gaussian_norm', 'power_spherical', 'sigma_vae')
    c.rows = experiments.rows(**{row: experiments.LATENTS[row] for row in shown})
    c.num_images = 200
    c.comparisons = (
        'power_spherical gaussian shifted_distance',
        'power_spherical gaussian shifted_slope',
        'power_spherical gaussian shifted_norm',
        'power_spherical gaussian shifted_collapsed',
        'power_spherical gaussian_norm shifted_distance',
        'power_spherical sigma_vae shifted_distance',
    )
    return experiments.finish(c, arg)
