r"""SphereAR on Fashion-MNIST: 70,000 grey images of 28×28 pixels, ten classes of clothes.

Command:   python -m sphere_ar_jax.main --config=configs/fashion.py --workdir=/tmp/fashion
Data:      The four files of https://github.com/zalandoresearch/fashion-mnist, or of the Debian
           package dataset-fashion-mnist, which puts them where this config looks for them.
Hardware:  Sized for 2 CPU cores. The whole run has not been timed.
Result:    Not measured. A smaller one (ar.width 96, ar.head_depth 2, 1 copy, 800 steps of the
           tokenizer, ab2 with 20 evaluations), one seed: tokenizer PSNR 24.0 dB, samples/accuracy
           0.853 where real test images have 0.915, samples/feature_frechet 1.61 where they have
           0.016. Its clothes have the right shapes and little texture (docs/evaluation.md).

Words after the colon, separated by commas:

data=idx:DIR   Another directory of IDX files, as those of MNIST, KMNIST or EMNIST.
fast           The sampler of the fewest evaluations that lost nothing on the digits
               (BUILD_NOTES.md, "Fewer evaluations").
smoke          The same path in few steps, to see that everything runs. Its pictures show no clothes
               yet, and its classifier is weak.

Images are filled up to 32×32 pixels: 8×8 tokens of d = 16 on a sphere of radius 4. The recipe is
that of configs/digits.py with a wider transformer and head; it was not tuned on these images.
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
    words, values = recipes.arguments('configs/fashion.py', arg, ('fast', 'smoke'), ('data',))
    c = config.default()
    kind, path = recipes.data_set(values.get('data', DATA))
    c.data.update(name=kind, path=path)
    c.vae.update(
        grid=(8, 8),
        latent_dim=16,
        image_channels=1,
        stem=16,
        channels=(16, 32, 96),
        encoder_depth=1,
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
    common = dict(
        batch_size=64,
        learning_rate=2e-3,
        final_learning_rate=1e-5,
        log_every=50,
        checkpoint_every=250,
    )
    c.tokenizer_training.update(common, steps=1000, warmup_steps=50, kl_weight=0.004, l2_weight=1.0)
    c.tokenizer_training.update(perceptual_weight=0.0, disc_weight=0.0)
    c.ar_training.update(common, steps=1500, warmup_steps=100, ema_decay=0.995, copies=2)
    c.sampling.update(
        num_images=1000, batch_size=250, num_steps=100, guidance='constant', guidance_scale=1.5
    )
    if 'fast' in words:
        c.sampling.update(recipes.FAST)
    if 'smoke' in words:
        c.data.classifier_steps = 50
        c.tokenizer_training.update(steps=20, warmup_steps=5, log_every=10, checkpoint_every=10)
        c.ar_training.update(
            steps=20, warmup_steps=5, ema_decay=0.9, log_every=10, checkpoint_every=10
        )
        c.sampling.update(recipes.FAST, num_images=100, batch_size=100)
    return c
