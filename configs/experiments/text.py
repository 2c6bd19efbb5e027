r"""Texts on composed digits: is what was asked for drawn, and what is shown written?

Command:   python -m sphere_ar_jax.main --mode=experiment --workdir=DIR \
               --config=configs/experiments/text.py
Result:    Not measured yet (docs/experiments/README.md).

Rows are trained as configs/composed.py is, in half the steps, with three seeds; those named joint
with its word joint.
What is read back and what is written is explained in docs/text.md, "Composed digits". The word
smoke after a colon shows in minutes that everything runs.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments

# The model writes captions, too (docs/text.md, "Both directions").
WRITING = {'ar': {'text_weight': 0.05, 'alone_weight': 0.0}}


def get_config(arg: str = '') -> ConfigDict:
    """The config of the experiment; arg: the words behind the colon."""
    c = experiments.start(
        'text', arg, 'Text to image: is what was asked for drawn?', data='composed'
    )
    c.kind = 'captions'
    c.claim = (
        'Tokens on the sphere draw what a caption asks for more often than Gaussian ones do, '
        'for pairs of digits that were trained on and for new ones, and a model of both '
        'directions more often than one that only draws.'
    )
    c.caveat = (
        'Whether a model of both directions loses at most 0.02 is read from the lower end of its '
        'intervals. What would change it: photographs, whose captions say less of what is seen.'
    )
    c.rows = experiments.rows(
        power_spherical={},
        gaussian=experiments.LATENTS['gaussian'],
        encoder={'ar': {'text_encoder_depth': 2}},
        joint_power_spherical=WRITING,
        joint_gaussian=experiments.merged(experiments.LATENTS['gaussian'], WRITING),
    )
    # Gaussian tokens have another weight of the KL term, too: elsewhere it moves them as much as
    # the choice of the family does (docs/experiments/README.md, "In short").
    (weak,) = experiments.add_kl_weights(c, 'gaussian', (4 * c.base.tokenizer_training.kl_weight,))
    c.num_images = 1500
    c.guidance_scales = (1.0, 2.0, 3.5, 5.0)
    c.common_guidance = 3.5
    c.comparisons = (
        'power_spherical gaussian held_out_best',
        'power_spherical gaussian seen_best',
        'power_spherical gaussian rows_best',
        'power_spherical gaussian held_out_common',
        f'power_spherical {weak} held_out_best',
        f'power_spherical {weak} seen_best',
        f'power_spherical {weak} rows_best',
        'encoder power_spherical held_out_best',
        'joint_power_spherical power_spherical held_out_best',
        'joint_power_spherical power_spherical seen_best',
        'joint_power_spherical joint_gaussian held_out_best',
        'joint_power_spherical joint_gaussian captions_held_out',
        'joint_power_spherical joint_gaussian captions_nats',
    )
    return experiments.finish(c, arg)
