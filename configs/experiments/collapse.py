r"""Where do Gaussian tokens collapse? A map around claim 1.

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/collapse.py
Result:    On the digits spherical tokens lose less than Gaussian ones at guidance 32, by 2.7
           [1.8, 3.6] in Fréchet distance, and so with 4 or 2 evaluations, after a fifth of the
           training, and with 64 tokens. No sample loses its contrast
           (docs/experiments/collapse/page.md). Fashion-MNIST is not measured yet.

Gaussian and power-spherical tokens are drawn where errors should tell most: at guidance up to 32,
with fewer evaluations, after a fifth of the training, and with four times as many tokens. The rows
share their models with the other experiments, but for the last two settings.

Words after a colon: fashion takes Fashion-MNIST in place of the digits, where images have 64 tokens
as they are, and smoke shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start(
        'collapse',
        arg,
        'Collapse: where do Gaussian tokens fail?',
        'A sample is collapsed where the standard deviation of its pixels lies below a quarter of '
        "the 1% quantile of real images'. ",
    )
    short = c.base.copy_and_resolve_references().ar_training
    experiments.shorten(short, 1 / 5)
    keys = ('steps', 'warmup_steps', 'ema_decay')
    settings = {
        '': {},
        '_evaluations_4': {'sampling': {'num_steps': 4}},
        '_evaluations_2': {'sampling': {'num_steps': 2}},
        '_short': {'ar_training': {key: short[key] for key in keys}},
    }
    if 'fashion' not in arg.split(','):
        settings['_tokens_64'] = {'vae': {'grid': (8, 8), 'channels': (32, 96)}}
    c.claim = (
        'Under large guidance, with few evaluations, after a short training and with more tokens, '
        'Gaussian tokens collapse, and spherical ones do not.'
    )
    c.caveat = 'What would change it: sequences of hundreds of tokens, and larger images.'
    c.rows = experiments.rows()
    comparisons = []
    for name, changes in settings.items():
        for row in ('gaussian', 'power_spherical'):
            c.rows[row + name] = experiments.merged(experiments.LATENTS[row], changes)
        pair = f'power_spherical{name} gaussian{name}'
        comparisons += [f'{pair} collapsed_degradation', f'{pair} frechet_degradation']
    c.guidance_scales = (1.5, 4.0, 8.0, 16.0, 32.0)
    c.comparisons = tuple(comparisons)
    c.map = tuple(f'power_spherical{name} gaussian{name}' for name in settings)
    return experiments.finish(c, arg)
