"""SphereAR-H at 256×256: the published model, recipe and sampler (spec §5–§8; 943,854,096 parameters, tokenizer apart).

Command:   python -m sphere_ar_jax.benchmark --config=configs/ar_h.py --output=/tmp/bench
Hardware:  an accelerator
Result:    seconds of every part, training steps included (BUILD_NOTES.md, "Speed"). There is no ImageNet source here
           yet: `main` cannot train it.

:fast      the sampler of the fewest evaluations that lost nothing on the digits (BUILD_NOTES.md, "Fewer
           evaluations"). It was chosen on digits: its FID on ImageNet has not been measured.
"""

from sphere_ar_jax import config


def get_config(arg=''):
    """arg: '' or 'fast'."""
    return config.published_ar('H', arg)
