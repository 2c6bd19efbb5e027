r"""Open question 3 at small size: the radius of the sphere.

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/radius.py
Result:    On the digits spheres of 2√d and 4√d draw worse images than that of √d, and for smaller
           ones it is undecided. With the noise scaled, too, the radius matters little, and √d/4
           draws better ones than √d (docs/experiments/radius/page.md). On Fashion-MNIST, where
           these two rows alone were measured, it is undecided (docs/experiments/README.md). So √d
           stays the default.

The paper sets R = √d, so that tokens are as long as the noise from which they are drawn. Here R is
1/4 to 4 times as large, with the noise as it is (rows radius_…), and with the noise scaled by the
same factor (rows scaled_…). Two rows of one radius share a tokenizer. The comparisons of radius_1
with the rows scaled_… were added after the other verdicts.

Words after a colon: fashion takes Fashion-MNIST with three seeds in place of the digits, and smoke
shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments

# R/√d by the end of a row's name. radius_1 has the published sphere, and no row of scaled noise.
FACTORS = {'quarter': 0.25, 'half': 0.5, '1': 1.0, '2': 2.0, '4': 4.0}


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start(
        'radius',
        arg,
        'Does the radius of the sphere matter?',
        'The loss of the head is divided by its scale, which grows with the radius. ',
    )
    c.claim = (
        'Tokens on the sphere of radius √d, which are as long as the noise, are drawn better than '
        'those of another radius, and these are drawn better from noise of their own length.'
    )
    c.caveat = (
        'What would change it: learning rates tuned for each radius, an autoregressive model or a '
        'decoder that divides its input by the radius, and more steps of the solver.'
    )
    root = c.base.vae.latent_dim**0.5
    c.rows = experiments.rows()
    for end, factor in FACTORS.items():
        # The published radius is the default, so that the row shares its models with others.
        c.rows[f'radius_{end}'] = {} if factor == 1 else {'vae': {'radius': factor * root}}
    others = [end for end in FACTORS if end != '1']
    for end in others:
        noise = {'ar': {'prior_scale': FACTORS[end]}}
        c.rows[f'scaled_{end}'] = experiments.merged(c.rows[f'radius_{end}'].to_dict(), noise)
    c.comparisons = (
        *(f'radius_1 radius_{end} frechet_best' for end in others),
        *(f'scaled_{end} radius_{end} frechet_best' for end in others),
        *(f'radius_1 scaled_{end} frechet_best' for end in others),
    )
    c.curves = {
        'noise as it is': tuple(f'radius_{end}' for end in FACTORS),
        'noise of the same length': tuple(
            f'scaled_{end}' if end in others else f'radius_{end}' for end in FACTORS
        ),
    }
    c.curves_at = tuple(FACTORS.values())
    c.curves_over = 'radius R/√d'
    c.guidance_scales = (1.0, 1.5, 2.0, 3.0)
    return experiments.finish(c, arg)
