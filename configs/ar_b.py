"""SphereAR-B at 256×256: the published model, recipe and sampler (spec §5–§8; 204,499,216 parameters, tokenizer apart).

Command:   python -m sphere_ar_jax.benchmark --config=configs/ar_b.py --output=/tmp/bench
Hardware:  any; 2 CPU cores and 4 GB for the sampler at 8 images
Result:    seconds of every part, training steps included (BUILD_NOTES.md, "Speed"). There is no ImageNet source here
           yet: `main` cannot train it.

:fast      the sampler of the fewest evaluations that lost nothing on the digits (BUILD_NOTES.md, "Fewer
           evaluations"). It was chosen on digits: its FID on ImageNet has not been measured.
"""

from sphere_ar_jax import ar, config


def get_config(arg=''):
    """arg: '' or 'fast'."""
    if arg not in ('', 'fast'):
        raise ValueError(f'configs/ar_b.py has no variant {arg!r}: use configs/ar_b.py or configs/ar_b.py:fast')
    c = config.default()
    c.data.name = 'synthetic'
    c.ar.update(ar.VARIANTS['B'])
    c.tokenizer_training.steps = 100 * 5004  # epochs of 1,281,167 images in batches of 256
    c.ar_training.steps = 400 * 2502  # in batches of 512
    c.sampling.update(num_images=50_000, batch_size=256, num_steps=100, guidance='linear', guidance_scale=4.5)
    if arg == 'fast':
        c.sampling.update(config.FAST)
    return c
