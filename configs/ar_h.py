"""SphereAR-H at 256×256: the published model, recipe and sampler (spec §5–§8; 943,854,096 parameters, tokenizer apart).

Command:   python -m sphere_ar_jax.main --config=configs/ar_h.py:data=/data/ILSVRC2012_img_train.tar --workdir=DIR \\
               --config.tokenizer=VAE     (the workdir of configs/vae.py, or of a converted vae.pt)
Hardware:  accelerators; 400 epochs are 1,000,800 steps of 512 images. With the argument tpu that batch fits every slice
           of TPUs from v5e-16 on, as their compiler lays it out (13.9 of 16 GiB a chip there, 5.7 of 32 on v6e-256);
           at half of all peak rates it would take 0.40 days on v6e-256, 1.8 on v4-128, 12.7 on v5e-16. No TPU has run
           it yet: BUILD_NOTES.md, "The TPU compiler". The step on two CPU cores: there, "Speed".
Result:    1.34 FID, 300.0 IS, .80 precision, .64 recall by --mode=evaluate,
           as the paper says (arXiv 2509.24335, 50,000 images, ADM's protocol).
           Not reproduced here: neither ImageNet, nor the published weights could be had.

The published weights, converted instead of trained, and 50,000 images (linear guidance 4.5, 100 steps):

           python -m sphere_ar_jax.main --mode=convert --checkpoint=hf://guolinke/SphereAR/SphereAR_H.pt --workdir=DIR
           python -m sphere_ar_jax.main --mode=sample --workdir=DIR

Arguments after the colon, separated by commas:

data=…     a path of ImageNet's training tar, or KIND:PATH of folder, array_records or tfds (tfds:NAME)
batch=N    images a step; the number of epochs stays
dtype=…    bfloat16 or float32 (the default) of the computation
tpu        what slices of TPUs want: bfloat16, and --config.mesh.fsdp=4: every chip keeps a quarter of the state, where
           optimizer and EMA would move more memory than the model. What else a slice takes: --mode=compile. Blocks
           are computed again in the backward pass (remat) with or without; --config.ar.remat=False where memory is
           plenty: it computes a fifth less, and moves more memory.
512        512×512 pixels, 32×32 tokens; not a published model
fast       the sampler of the fewest evaluations that lost nothing on the digits (BUILD_NOTES.md, "Fewer
           evaluations"). It was chosen on digits: its FID on ImageNet has not been measured.
smoke      20 steps of a shallow model on 64×64 pixels, to see that everything runs, on a CPU, in about a minute:
           python -m sphere_ar_jax.main --config=configs/ar_h.py:smoke,data=/tmp/stand_in/ILSVRC2012_img_train.tar \\
               --config.tokenizer=/tmp/vae_smoke --workdir=/tmp/ar_h_smoke
"""

from sphere_ar_jax.config import recipes


def get_config(arg=''):
    """arg: see above."""
    return recipes.published_ar('H', arg)
