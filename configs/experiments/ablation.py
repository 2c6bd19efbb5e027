r"""Claim 2 at small size: the order of the latent families.

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/ablation.py
Result:    On the digits the first step is reproduced, the second undecided, the third contradicted
           (docs/experiments/ablation/page.md). On Fashion-MNIST all three are undecided
           (docs/experiments/ablation_fashion/page.md).

The paper's four rows, and two or three more. The Gaussian rows are trained with three weights of
the KL term, that of the other rows, a quarter and four times of it. The best weight stands for the
row.

On the digits there is a row power_spherical_kappa_16, which was added after the other verdicts. Its
kappa grows 16 times as fast, so that its reconstructions after these few steps are as good as those
of the Gaussian rows. It tells whether reconstruction is what the sphere lacks here. On
Fashion-MNIST the kappa of power_spherical itself grows 10 times as fast.

Words after a colon: fashion takes Fashion-MNIST with three seeds in place of the digits, and smoke
shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start(
        'ablation',
        arg,
        'Latent families: does the sphere draw better images?',
        'The Gaussian rows have three KL weights, and the one with the least mean Fréchet distance '
        'stands for the row. ',
    )
    c.claim = (
        'From worst to best: gaussian, gaussian_decoder_norm, gaussian_norm, power_spherical '
        '(FID 2.97, 2.89, 2.68, 2.52 at size L).'
    )
    c.caveat = (
        'What would change it: a tokenizer with perceptual and adversarial losses on large images, '
        'as the paper has it, since the KL term then competes with other losses.'
    )
    c.rows = experiments.rows(**experiments.LATENTS)
    weight = c.base.tokenizer_training.kl_weight
    for name in ('gaussian', 'gaussian_decoder_norm', 'gaussian_norm'):
        c.variants[name] = experiments.add_kl_weights(c, name, (weight / 4, 4 * weight))
    c.comparisons = (
        'power_spherical gaussian_norm frechet_best',
        'gaussian_norm gaussian_decoder_norm frechet_best',
        'gaussian_decoder_norm gaussian frechet_best',
        'power_spherical gaussian frechet_best',
        'power_spherical gaussian frechet_common',
        'power_spherical gaussian accuracy_best',
        'power_spherical sigma_vae frechet_best',
        'power_spherical vmf frechet_best',
    )
    if 'fashion' not in arg.split(','):
        c.rows['power_spherical_kappa_16'] = {'vae': {'kappa_scale': 16.0}}
        c.comparisons += (
            'power_spherical_kappa_16 power_spherical psnr',
            'power_spherical_kappa_16 power_spherical frechet_best',
            'power_spherical_kappa_16 gaussian_norm frechet_best',
        )
    return experiments.finish(c, arg)
