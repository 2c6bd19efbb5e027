r"""Claim 3 at small size: how errors go on from token to token.

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/propagation.py
Result:    Undecided on the digits: a radial error grows by 0.58 [-0.10, 1.25] less in
           power_spherical than in gaussian (docs/experiments/propagation/page.md).

Tokens are disturbed radially and tangentially, and derivatives by forward mode say what the later
tokens do to first order (docs/method.md, "Propagation of errors").

Words after a colon: fashion takes Fashion-MNIST with three seeds in place of the digits, and smoke
shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start('propagation', arg, 'Propagation: radial and tangential errors')
    c.kind = 'propagation'
    c.claim = (
        'Projection after each token removes the radial part of the error, which otherwise '
        'accumulates while tokens are drawn one after the other.'
    )
    c.method = (
        'A token of a drawn sequence is disturbed by 1%, 3% or 10% of its norm, along itself or '
        'across, and the sampler goes on with the same noise. The growth is the root mean square '
        'change of the later tokens over the size of the smallest disturbance. '
        'Forward-mode derivatives predict it to first order. '
        'Norms before projection are measured with projection after each token, never, and only '
        'before decoding. A row whose decoder projects by itself is not drawn without it.'
    )
    c.caveat = (
        'What would change it: longer sequences, and models whose errors are not those of a short '
        'training on few images.'
    )
    shown = ('gaussian', 'gaussian_norm', 'power_spherical')
    c.rows = experiments.rows(**{row: experiments.LATENTS[row] for row in shown})
    c.comparisons = (
        'power_spherical gaussian radial_growth',
        'power_spherical gaussian tangential_growth',
        'power_spherical gaussian_norm radial_growth',
    )
    return experiments.finish(c, arg)
