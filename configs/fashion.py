r"""SphereAR on Fashion-MNIST: 70,000 grey images of 28×28 pixels, ten classes of clothes.

Command:   python -m sphere_ar_jax.main --config=configs/fashion.py --workdir=/tmp/fashion
Data:      The four files of https://github.com/zalandoresearch/fashion-mnist, or of the Debian
           package dataset-fashion-mnist, which puts them where this config looks for them.
Hardware:  Two CPU cores (AMD EPYC, about 95 GFLOP/s each): about 22 min 30 s in all, of these the
           tokenizer 260 s, the AR model 967, sampling 29, scoring 72.
Result:    Three runs of two seeds: tokenizer PSNR 32.7 to 33.4 dB, samples/accuracy 0.895 to 0.913
           where real test images have 0.915, samples/feature_frechet 0.451 to 0.611 where as many
           real test images have 0.18 (docs/evaluation.md).

Words after the colon, separated by commas:

data=idx:DIR   Another directory of IDX files, as those of MNIST, KMNIST or EMNIST.
fast           The sampler of the fewest evaluations that lost nothing on the digits
               (docs/fewer_evaluations.md). The experiments on Fashion-MNIST draw with
               it. It was not compared with the default sampler.
distilled      A head of one or two evaluations with guidance within, distilled with the transformer
               from a finished run of the same seed. Its Fréchet distance is larger than that run's
               (docs/fewer_evaluations.md).

               python -m sphere_ar_jax.main --config=configs/fashion.py:distilled \
                   --config.init_from=/tmp/fashion --workdir=/tmp/fashion_distilled

smoke          The same path in few steps, to see that everything runs, in two minutes on one core.
               Its pictures show no clothes yet, and its classifier is weak.

Images are filled up to 32×32 pixels: 8×8 tokens of d = 16 on a sphere of radius 4. These are the
differences from configs/digits.py:

- The tokenizer's backbone is vit. In steps that take as long, it reconstructs better than the
  hybrid: after 300 steps 22.7 dB in place of 21.6, both with a kappa_scale of 1.
- kappa grows 10 times as fast. After 800 steps of 64 images the tokenizer reaches 31.7 dB in place
  of 27.2 (docs/method.md, "Posterior"). The weight of the KL term is a quarter.
- Steps have 32 images, and those of the AR model 16, with one noisy copy of a token in place of 2.
  There are more steps.
- Transformer and head are wider, and a token takes 20 evaluations in place of 101.
- Guidance is 1.6 in place of 1.5.
"""

from ml_collections import ConfigDict

from sphere_ar_jax import config
from sphere_ar_jax.config import recipes

DATA = 'idx:/usr/share/datasets/fashion-mnist'


def get_config(arg: str = '') -> ConfigDict:
    """The config of Fashion-MNIST, or of another data set in IDX files.

    Args:
      arg: the words after the colon, see above.

    Raises:
      ValueError: another word was given; one line.
    """
    known = ('fast', 'distilled', 'smoke')
    words, values = recipes.arguments('configs/fashion.py', arg, known, ('data',))
    c = config.default()
    kind, path = recipes.data_set(values.get('data', DATA))
    c.data.update(name=kind, path=path)
    c.vae.update(
        grid=(8, 8),
        latent_dim=16,
        image_channels=1,
        backbone='vit',
        kappa_scale=10.0,
        channels=(128, 128, 128),
        encoder_depth=2,
        decoder_depth=2,
        heads=4,
        unroll=2,
    )
    c.ar.update(
        depth=4,
        heads=4,
        width=128,
        head_depth=4,
        head_width=128,
        head_groups=2,
        class_tokens=4,
        unroll=4,
    )
    c.tokenizer_training.update(
        steps=1200,
        batch_size=32,
        learning_rate=2e-3,
        final_learning_rate=1e-5,
        warmup_steps=100,
        kl_weight=0.001,
        l2_weight=1.0,
        perceptual_weight=0.0,
        disc_weight=0.0,
        log_every=50,
        checkpoint_every=250,
    )
    c.ar_training.update(
        steps=6600,
        batch_size=16,
        learning_rate=1.5e-3,
        final_learning_rate=1e-5,
        warmup_steps=300,
        ema_decay=0.999,
        copies=1,
        log_every=100,
        checkpoint_every=500,
    )
    c.sampling.update(
        num_images=1000,
        batch_size=250,
        solver='ab2',
        num_steps=20,
        guidance='constant',
        guidance_scale=1.6,
    )
    c.distillation_training.update(
        steps=3000,
        batch_size=16,
        learning_rate=5e-4,
        final_learning_rate=1e-5,
        warmup_steps=100,
        ema_decay=0.995,
        transformer=True,
        teacher_steps=10,  # the sampler of `fast`
        teacher_shift=1.5,
        guidance='constant',
        guidance_scale=1.5,
        log_every=50,
        checkpoint_every=250,
    )
    if 'fast' in words:
        c.sampling.update(recipes.FAST)
    if 'smoke' in words:
        short = dict(steps=20, warmup_steps=5, log_every=10, checkpoint_every=10)
        c.data.classifier_steps = 50
        c.tokenizer_training.update(short)
        c.ar_training.update(short, ema_decay=0.9)
        c.distillation_training.update(short, ema_decay=0.9)
        c.sampling.update(recipes.FAST, num_images=100, batch_size=100)
    if 'distilled' in words:
        c.init_from = ''  # The checks refuse this until the user gives a workdir.
        c.sampling.update(recipes.DISTILLED)
    return c
