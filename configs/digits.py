r"""SphereAR on scikit-learn's 1,797 handwritten digits: the whole method in minutes on a laptop.

Command:   python -m sphere_ar_jax.main --config=configs/digits.py --workdir=/tmp/digits
Hardware:  2 CPU cores, 1.6 GB; 3 to 17 minutes, all compilation included. Nothing is downloaded.
Result:    samples/accuracy 0.992, samples/frechet 0.125, mean of three seeds (docs/evaluation.md)

Words after the colon, separated by commas:

smoke      The same path in about a minute, to see that everything runs. Its pictures show no
           digits yet.

           python -m sphere_ar_jax.main --config=configs/digits.py:smoke --workdir=/tmp/digits_smoke

fast       The sampler with the fewest evaluations that lost nothing
           (docs/fewer_evaluations.md).
distilled  A head of one or two evaluations with guidance within, distilled from a finished run of
           the same seed. The transformer learns, too (docs/method.md, "Mean-velocity
           distillation").

           python -m sphere_ar_jax.main --config=configs/digits.py:distilled \
               --config.init_from=/tmp/digits --workdir=/tmp/digits_distilled

riemannian
           A head whose flow follows the geodesics of the sphere (docs/method.md, "Riemannian
           head"), with 20 evaluations a token. One seed: samples/accuracy 0.984, samples/frechet
           0.111; the flow head with 101 evaluations, on the same tokens, 0.988 and 0.112. With
           distilled, a head of one or two evaluations is distilled from such a run.

cnn, vit   Another backbone of the tokenizer with as many parameters, within 3%, in place of the
           hybrid (docs/method.md, "Backbone").

           python -m sphere_ar_jax.main --config=configs/digits.py:cnn --workdir=/tmp/digits_cnn

Images are 8×8 scans enlarged to 16×16, 4×4 tokens of d = 8 on a sphere of radius √8. These are the
differences from the ImageNet recipe (configs/vae.py, configs/ar_b.py):

- The models are smaller.
- Learning rates are larger, with warm-up and cosine in both stages.
- The tokenizer's loss has an L2 term in place of the perceptual and the adversarial one.
- The EMA is shorter.
- Each token has 2 noisy copies instead of 4.
- Guidance is constant. The linear schedule leaves the first token unguided, and with 16 tokens that
  is much of the digit.
"""

from ml_collections import ConfigDict

from sphere_ar_jax import config
from sphere_ar_jax.config import recipes


def get_config(arg: str = '') -> ConfigDict:
    """The config of the digits.

    Args:
      arg: the words after the colon.

    Raises:
      ValueError: another word was given, or two backbones; one line.
    """
    backbones = recipes.BACKBONES['digits']
    known = ('smoke', 'fast', 'distilled', 'riemannian', *backbones)
    words, _ = recipes.arguments('configs/digits.py', arg, known)
    c = config.default()
    c.data.name = 'digits'
    c.vae.update(
        grid=(4, 4),
        latent_dim=8,
        image_channels=1,
        stem=16,
        channels=(16, 32, 96),
        encoder_depth=1,
        decoder_depth=2,
        heads=4,
        unroll=2,
    )
    recipes.set_backbone(c, words, 'digits')
    c.ar.update(
        depth=3,
        heads=4,
        width=96,
        head_depth=4,
        head_width=128,
        head_groups=2,
        class_tokens=4,
        unroll=4,
    )
    common = dict(
        batch_size=64,
        learning_rate=2e-3,
        final_learning_rate=1e-5,
        log_every=50,
        checkpoint_every=250,
    )
    c.tokenizer_training.update(common, steps=800, warmup_steps=50, kl_weight=0.004, l2_weight=1.0)
    c.tokenizer_training.update(perceptual_weight=0.0, disc_weight=0.0)
    c.ar_training.update(common, steps=1500, warmup_steps=100, ema_decay=0.995, copies=2)
    c.sampling.update(
        num_images=1000, batch_size=250, num_steps=100, guidance='constant', guidance_scale=1.5
    )
    c.distillation_training.update(
        common,
        steps=3000,
        warmup_steps=100,
        learning_rate=1e-3,
        ema_decay=0.995,
        transformer=True,
        teacher_steps=10,  # the sampler of `fast`
        teacher_shift=1.5,
        guidance='constant',
        guidance_scale=1.5,
    )
    if 'riemannian' in words:
        c.ar.head = 'riemannian'
        # Measured so; the recipe above was tried with straight paths alone.
        c.distillation_training.update(
            head='geodesic_mean_velocity',
            steps=1500,
            transformer=False,
            teacher_steps=16,
            teacher_shift=1.0,
        )
        c.sampling.update(solver='ab2', num_steps=20)
    if 'fast' in words:
        c.sampling.update(recipes.FAST)
    if 'smoke' in words:
        short = dict(steps=12, warmup_steps=4, log_every=4, checkpoint_every=6)
        c.tokenizer_training.update(short)
        c.ar_training.update(short, ema_decay=0.9)
        c.distillation_training.update(short, ema_decay=0.9)
        c.sampling.update(num_images=200, batch_size=200, num_steps=10)
    if 'distilled' in words:
        c.init_from = ''  # The checks refuse this until the user gives a workdir.
        c.sampling.update(recipes.DISTILLED)
    return c
