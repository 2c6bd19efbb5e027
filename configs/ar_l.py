"""SphereAR-L at 256×256: the published model, recipe and sampler (spec §5–§8; 476,380,176 parameters, tokenizer apart).

Command:   python -m sphere_ar_jax.main --config=configs/ar_l.py:data=/data/ILSVRC2012_img_train.tar --workdir=DIR \\
               --config.tokenizer=VAE     (the workdir of configs/vae.py, or of a converted vae.pt)
Hardware:  accelerators; 400 epochs are 1,000,800 steps of 512 images. Hours have not been measured; the step on two
           CPU cores: BUILD_NOTES.md, "Speed".
Result:    1.54 FID, 295.9 IS, .80 precision, .63 recall by --mode=evaluate,
           as the paper says (arXiv 2509.24335, 50,000 images, ADM's protocol).
           Not reproduced here: neither ImageNet, nor the published weights could be had.

The published weights, converted instead of trained, and 50,000 images (linear guidance 4.6, 100 steps):

           python -m sphere_ar_jax.main --mode=convert --checkpoint=hf://guolinke/SphereAR/SphereAR_L.pt --workdir=DIR
           python -m sphere_ar_jax.main --mode=sample --workdir=DIR

Arguments after the colon, separated by commas:

data=…     a path of ImageNet's training tar, or KIND:PATH of folder, array_records or tfds (tfds:NAME)
batch=N    images a step; the number of epochs stays
dtype=…    bfloat16 or float32 (the default) of the computation
512        512×512 pixels, 32×32 tokens; not a published model
fast       the sampler of the fewest evaluations that lost nothing on the digits (BUILD_NOTES.md, "Fewer
           evaluations"). It was chosen on digits: its FID on ImageNet has not been measured.
smoke      20 steps of a shallow model on 64×64 pixels, to see that everything runs, on a CPU, in about a minute:
           python -m sphere_ar_jax.main --config=configs/ar_l.py:smoke,data=/tmp/stand_in/ILSVRC2012_img_train.tar \\
               --config.tokenizer=/tmp/vae_smoke --workdir=/tmp/ar_l_smoke
"""

from sphere_ar_jax import recipes


def get_config(arg=''):
    """arg: see above."""
    return recipes.published_ar('L', arg)
