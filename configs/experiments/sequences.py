r"""Longer sequences at small size: 16, 64 and 256 tokens of the same images (check 3).

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/sequences.py
Result:    Undecided with 16 tokens, reproduced with 64, undecided with 256
           (docs/experiments/sequences). Fashion-MNIST: undecided with 64 and 256
           (docs/experiments/sequences_fashion). The drift of the norm was not measured.

A token stands for 4×4, 2×2 or 1×1 pixels of the digits' 16×16. For 256 tokens the images are
enlarged to 32×32, because a tokenizer has at least one stage that halves them. Fréchet distance and
accuracy are taken on the 8×8 pixels of the scans for all of them. There are three seeds, since the
longest rows take an hour on one core. The digits' rows of 256 tokens have batches of 16 images in
place of 64. Their AR models see as many images in all, in four times as many steps, and have one
noisy copy of a token in place of two. Their tokenizers see a quarter of the images. The rows of 64
tokens share their models with configs/experiments/collapse.py.

Words after a colon: fashion takes Fashion-MNIST with 64 and 256 tokens in place of the digits, and
smoke shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments

ROWS = ('power_spherical', 'gaussian')


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    is_fashion = 'fashion' in arg.split(',')
    c = experiments.start(
        'sequences',
        arg,
        f'Longer sequences: {"64 and 256" if is_fashion else "16, 64 and 256"} tokens',
        'Rows of more tokens have tokens of fewer pixels. '
        'The drift of the norm is |mean over the last quarter of the positions / mean over the '
        'first quarter − 1|, before projection, at guidance 1.5, of its ratio to the norm that '
        'tokens of training images have at the same position. ',
    )
    sizes = {
        16: {},
        64: {'vae': {'grid': (8, 8), 'channels': (32, 96)}},
        256: {
            'vae': {'grid': (16, 16), 'channels': (32, 96)},
            'data': {'enlarge': 2},
            'tokenizer_training': {'batch_size': 16},
            'ar_training': {'batch_size': 16, 'steps': 3000, 'copies': 1},
        },
    }
    if is_fashion:
        sizes = {64: {}, 256: {'vae': {'grid': (16, 16), 'channels': (128, 128)}}}
    c.claim = (
        'The longer the sequence, the more scale errors add up: Gaussian tokens fall behind '
        'spherical ones, and their norms drift.'
    )
    c.caveat = (
        'What would change it: larger images, in which more tokens carry more information, and '
        'training until no row gains any more.'
    )
    c.rows = experiments.rows()
    comparisons = []
    for length, changes in sizes.items():
        for row in ROWS:
            c.rows[f'{row}_{length}'] = experiments.merged(experiments.LATENTS[row], changes)
        pair = f'power_spherical_{length} gaussian_{length}'
        scores = ('frechet_best', 'frechet_degradation', 'norm_drift', 'collapsed_degradation')
        comparisons += [f'{pair} {score}' for score in scores]
    shortest = min(sizes)
    longest = max(sizes)
    comparisons += [
        f'power_spherical_{longest} power_spherical_{shortest} frechet_best',
        f'power_spherical_{shortest} power_spherical_{longest} seconds_per_image',
    ]
    c.seeds = (0, 1, 2)
    c.guidance_scales = (1.0, 1.5, 2.0, 4.0, 8.0)
    c.comparisons = tuple(comparisons)
    return experiments.finish(c, arg)
