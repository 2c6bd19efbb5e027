r"""Claim 1 at small size: do tokens on a sphere stay stable under large guidance?

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/guidance.py
Result:    Undecided on the digits: from its best guidance to 8, gaussian loses 0.34 [-0.06, 0.75]
           more Fréchet distance than power_spherical. It loses 0.43 [0.15, 0.70] more than vmf
           (docs/experiments/guidance/page.md). Undecided on Fashion-MNIST: 0.27 [-0.09, 0.64]
           more than power_spherical, with three seeds (docs/experiments/guidance_fashion/page.md).

Six latent families (docs/method.md, "Posterior" and "Token spaces") are trained with five seeds
each. Samples are drawn at nine guidance scales.

Words after a colon: fashion takes Fashion-MNIST with three seeds in place of the digits, and smoke
shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start('guidance', arg, 'Guidance: do tokens on a sphere stay stable?')
    c.claim = (
        'Under large guidance spherical tokens stay stable, and Gaussian ones degrade (Figure 4).'
    )
    c.caveat = (
        'What would change it: more tokens an image, over which a scale error could add up, and '
        'images whose classes overlap more.'
    )
    c.rows = experiments.rows(**experiments.LATENTS)
    c.comparisons = (
        'power_spherical gaussian frechet_degradation',
        'power_spherical gaussian accuracy_degradation',
        'power_spherical gaussian collapsed_degradation',
        'power_spherical sigma_vae frechet_degradation',
        'vmf gaussian frechet_degradation',
        'gaussian_norm gaussian frechet_degradation',
    )
    return experiments.finish(c, arg)
