r"""Text to image on composed digits: is what was asked for drawn, also for new compositions?

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/text.py
Result:    Not measured yet (docs/experiments/README.md).

Rows are trained as configs/composed.py is, with three seeds. What is read back is explained in
docs/text.md, "Composed digits". The word smoke after a colon shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start(
        'text', arg, 'Text to image: is what was asked for drawn?', data='composed'
    )
    c.kind = 'captions'
    c.claim = (
        'Tokens on the sphere draw what a caption asks for at least as often as Gaussian ones do, '
        'for pairs of digits that were trained on and for new ones.'
    )
    c.caveat = 'What would change it: photographs, whose captions say less of what is seen.'
    c.rows = experiments.rows(
        power_spherical={},
        gaussian=experiments.LATENTS['gaussian'],
    )
    c.num_images = 1500
    c.guidance_scales = (1.0, 1.5, 2.0, 3.0, 4.0)
    c.common_guidance = 2.0
    c.comparisons = (
        'power_spherical gaussian held_out_best',
        'power_spherical gaussian seen_best',
        'power_spherical gaussian rows_best',
        'power_spherical gaussian held_out_common',
    )
    return experiments.finish(c, arg)
