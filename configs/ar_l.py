"""SphereAR-L at 256×256: the published model, recipe and sampler (spec §5–§8; 476,380,176 parameters, tokenizer apart).

Command:   python -m sphere_ar_jax.main --mode=convert --checkpoint=hf://guolinke/SphereAR/SphereAR_L.pt --workdir=DIR
           python -m sphere_ar_jax.main --mode=sample --workdir=DIR      (50,000 images, linear guidance 4.6, 100 steps)
Hardware:  one accelerator that holds the parameters in float32, or several: batches are split over them. Hours on
           accelerators have not been measured; two CPU cores: BUILD_NOTES.md, "Speed".
Result:    1.54 FID, 295.9 IS, .80 precision, .63 recall by --mode=evaluate,
           as the paper says (arXiv 2509.24335, 50,000 images, ADM's protocol).
           Not reproduced here: neither the published weights nor ImageNet's statistics could be had.

There is no ImageNet source here yet: `main` cannot train it. Its speed: python -m sphere_ar_jax.benchmark
--config=configs/ar_l.py --output=DIR.

:fast      the sampler of the fewest evaluations that lost nothing on the digits (BUILD_NOTES.md, "Fewer
           evaluations"). It was chosen on digits: its FID on ImageNet has not been measured.
"""

from sphere_ar_jax import config


def get_config(arg=''):
    """arg: '' or 'fast'."""
    return config.published_ar('L', arg)
