"""The S-VAE at 256×256: the published tokenizer and its recipe (spec §3, §8; 75,393,297 parameters).

Command:   python -m sphere_ar_jax.main --mode=convert --checkpoint=hf://guolinke/SphereAR/vae.pt --workdir=DIR
           python -m sphere_ar_jax.main --mode=evaluate --workdir=DIR --images=REAL.npz --inception=FILE
Hardware:  anything with 2 GB for a batch of 8; two CPU cores decode that in 1.6 s (BUILD_NOTES.md, "Speed").
Result:    rFID, PSNR, SSIM, LPIPS, κ and KL of reconstructions. No published value is known to us.

There is no ImageNet source here yet, and no adversarial or perceptual loss: `main` cannot train it.
"""

from sphere_ar_jax import config


def get_config(arg=''):
    """arg: none."""
    if arg:
        raise ValueError(f'configs/vae.py has no variant {arg!r}')
    return config.published_ar('B')
