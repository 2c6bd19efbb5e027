r"""The S-VAE at 256×256: the published tokenizer and its recipe (75,393,297 parameters).

Command:   python -m sphere_ar_jax.main --workdir=DIR \
               --config=configs/vae.py:data=/data/ILSVRC2012_img_train.tar \
               --config.tokenizer_training.lpips=vgg.pth \
               --config.tokenizer_training.vgg=vgg16-397923af.pth
Hardware:  Accelerators. 100 epochs are 500,400 steps of 256 images. With the word tpu that batch
           fits every slice of TPUs from v5e-16 on, as their compiler lays it out (9.0 of 16 GiB a
           chip there, 1.7 of 32 on v6e-256). At half of all peak rates the training would
           take 0.04 days on v6e-256, 0.24 on v4-128, 0.86 on v5e-16. No TPU has run it yet; see
           docs/speed.md, "Compile ahead for TPU slices". That page also has the time of a step on
           two CPU cores, and the number of cores that feed an accelerator.
Result:    Reconstructions. No published rFID is known. Nothing was trained on ImageNet yet.

The recipe is adversarial, see docs/method.md, "Tokenizer losses" and "Adversarial training". The
two files are LPIPS' weights, from taming-transformers and from torchvision; without them give
--config.tokenizer_training.perceptual_weight=0. This command converts the published tokenizer
instead of training one:

           python -m sphere_ar_jax.main --mode=convert --workdir=DIR \
               --checkpoint=hf://guolinke/SphereAR/vae.pt

Words after the colon, separated by commas:

data=…     A path of ImageNet's training tar, or KIND:PATH of folder, array_records, webdataset,
           parquet, hf (hf:NAME) or tfds (tfds:NAME).
batch=N    Images a step. The number of epochs stays.
dtype=…    bfloat16 or float32 (the default) of the computation.
tpu, gpu   The setting for slices of TPUs, and for GPUs: bfloat16.
512        512×512 pixels, 32×32 tokens. This is not a published model.
cnn, vit   Another backbone with as many parameters, within 2%, in place of the hybrid
           (docs/method.md, "Backbone"). These are not published models, and nothing was trained.
smoke      20 steps of a shallow S-VAE on 64×64 pixels, to see that everything runs. It takes about
           two minutes on a CPU:

           python -m sphere_ar_jax.data.stand_in /tmp/stand_in
           python -m sphere_ar_jax.main --workdir=/tmp/vae_smoke \
               --config=configs/vae.py:smoke,data=/tmp/stand_in/ILSVRC2012_img_train.tar
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import recipes


def get_config(arg: str = '') -> ConfigDict:
    """The config of the S-VAE; arg: the words after the colon."""
    return recipes.published_vae(arg)
