r"""Check 1 at small size: does the norm of a token carry anything that images need?

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/magnitude.py
Result:    Five seeds: a direction and a length draw worse than a sphere, and worse than Gaussian
           tokens. In the brightness of samples no difference was found
           (docs/experiments/magnitude/page.md).

Tokens on a sphere, Gaussian tokens, and Gaussian tokens drawn as a direction and a length
(docs/method.md, "Direction and magnitude") are compared on two variants of the data: as they are,
and with a brightness of each image's own, drawn from U(0.2, 1) (docs/method.md, "Brightness").

Words after a colon: fashion takes Fashion-MNIST with three seeds in place of the digits, and smoke
shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments

FAMILIES = {
    'power_spherical': experiments.LATENTS['power_spherical'],
    'gaussian': experiments.LATENTS['gaussian'],
    'direction_magnitude': {
        'vae': {'posterior': 'gaussian'},
        'ar': {'token_space': 'polar', 'head': 'direction_magnitude'},
    },
}
BRIGHT = {'data': {'brightness': (0.2, 1.0)}}


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start(
        'magnitude',
        arg,
        'Magnitude: does the norm of a token carry anything?',
        'In the rows bright_… all real images are darkened by factors from U(0.2, 1). The distance '
        'of the brightness is the 1-D Wasserstein distance between the mean pixels of samples and '
        'those of held-out images. ',
    )
    c.claim = (
        'The norm of a token carries nothing that images need: tokens on a sphere draw better '
        'images than tokens with a free norm, and their brightness is as well distributed, also '
        'where each image has a brightness of its own.'
    )
    c.caveat = (
        'What would change it: data whose magnitudes matter more than one factor an image, and '
        'another weight of the length in the loss.'
    )
    bright = {f'bright_{row}': experiments.merged(f, BRIGHT) for row, f in FAMILIES.items()}
    c.rows = experiments.rows(**FAMILIES, **bright)
    pairs = (
        'power_spherical direction_magnitude',
        'power_spherical gaussian',
        'direction_magnitude gaussian',
    )
    c.comparisons = tuple(
        ' '.join([*(variant + row for row in pair.split()), score])
        for variant in ('', 'bright_')
        for pair in pairs
        for score in ('brightness_distance', 'frechet_best')
    )
    c.guidance_scales = (1.0, 1.5, 2.0, 3.0)
    return experiments.finish(c, arg)
