"""The S-VAE at 256×256: the published tokenizer and its adversarial recipe (75,393,297 parameters).

Command:   python -m sphere_ar_jax.main --config=configs/vae.py:data=/data/ILSVRC2012_img_train.tar
--workdir=DIR \\
               --config.tokenizer_training.lpips=vgg.pth
               --config.tokenizer_training.vgg=vgg16-397923af.pth
Hardware:  accelerators; 100 epochs are 500,400 steps of 256 images. With the argument tpu that
batch fits every slice
           of TPUs from v5e-16 on, as their compiler lays it out (9.0 of 16 GiB a chip there, 1.7 of
           32 on v6e-256); at half of all peak rates it would take 0.04 days on v6e-256, 0.24 on
           v4-128, 0.86 on v5e-16. No TPU has run it yet: docs/speed.md, "Compile ahead for TPU
           slices". The step on two CPU cores, and how many cores feed an accelerator: there, too.
Result:    reconstructions. No published rFID is known to us. Nothing was trained on ImageNet here.

The two files are LPIPS' weights, of taming-transformers and of torchvision; without them:
--config.tokenizer_training.perceptual_weight=0. The published tokenizer, converted instead of
trained:

           python -m sphere_ar_jax.main --mode=convert --checkpoint=hf://guolinke/SphereAR/vae.pt
           --workdir=DIR

Arguments after the colon, separated by commas:

data=…     a path of ImageNet's training tar, or KIND:PATH of folder, array_records or tfds
(tfds:NAME) batch=N    images a step; the number of epochs stays dtype=…    bfloat16 or float32 (the
default) of the computation tpu        what slices of TPUs want: bfloat16 512        512×512 pixels,
32×32 tokens; not a published model smoke      20 steps of a shallow S-VAE on 64×64 pixels, to see
that everything runs, on a CPU, in about a minute:
           python -m sphere_ar_jax.data.stand_in /tmp/stand_in python -m sphere_ar_jax.main
           --config=configs/vae.py:smoke,data=/tmp/stand_in/ILSVRC2012_img_train.tar \\
               --workdir=/tmp/vae_smoke
"""

from sphere_ar_jax.config import recipes


def get_config(arg=''):
    """arg: see above."""
    return recipes.published_vae(arg)
