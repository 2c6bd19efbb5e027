r"""SphereAR-B at 256×256: the published model, recipe and sampler.

The model has 204,499,216 parameters besides the tokenizer's.

Command:   python -m sphere_ar_jax.main --workdir=DIR \
               --config=configs/ar_b.py:data=/data/ILSVRC2012_img_train.tar \
               --config.tokenizer=VAE
           VAE is the workdir of configs/vae.py, or of a converted vae.pt.
Hardware:  Accelerators. 400 epochs are 1,000,800 steps of 512 images. With the word tpu that batch
           fits every slice of TPUs from v5e-16 on, as their compiler lays it out (5.4 of 16 GiB a
           chip there, 1.4 of 32 on v6e-256). At half of all peak rates the training would take 0.10
           days on v6e-256, 0.38 on v4-128, 3.6 on v5e-16. No TPU has run it yet.
Result:    1.92 FID, 277.8 IS, .81 precision, .61 recall (arXiv 2509.24335, table 1; 50,000
           images, guidance 4.5). Not reproduced yet.

`recipes.published_ar` lists the words after the colon, and shows how to convert the published
weights instead of training.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import recipes


def get_config(arg: str = '') -> ConfigDict:
    """The config of SphereAR-B; arg: the words after the colon."""
    return recipes.published_ar('B', arg)
