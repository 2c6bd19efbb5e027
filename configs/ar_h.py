r"""SphereAR-H at 256×256: the published model, recipe and sampler.

The model has 943,854,096 parameters besides the tokenizer's.

Command:   python -m sphere_ar_jax.main --workdir=DIR \
               --config=configs/ar_h.py:data=/data/ILSVRC2012_img_train.tar \
               --config.tokenizer=VAE
           VAE is the workdir of configs/vae.py, or of a converted vae.pt.
Hardware:  Accelerators. 400 epochs are 1,000,800 steps of 512 images. With the word tpu that batch
           fits every slice of TPUs from v5e-16 on, as their compiler lays it out (13.9 of 16 GiB a
           chip there, 5.7 of 32 on v6e-256). At half of all peak rates the training would take 0.40
           days on v6e-256, 1.8 on v4-128, 12.7 on v5e-16. No TPU has run it yet.
Result:    1.34 FID, 300.0 IS, .80 precision, .64 recall (arXiv 2509.24335, table 1; 50,000
           images, guidance 4.5). Not reproduced yet.

`recipes.published_ar` lists the words after the colon, and shows how to convert the published
weights instead of training.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import recipes


def get_config(arg: str = '') -> ConfigDict:
    """The config of SphereAR-H; arg: the words after the colon."""
    return recipes.published_ar('H', arg)
