r"""Text to image on composed digits: two or four of scikit-learn's scans, drawn for a caption.

Command:   python -m sphere_ar_jax.main --config=configs/composed.py --workdir=/tmp/composed
Data:      Nothing is downloaded. Images of 32×32 pixels are made from the scans, with captions as
           'a thick three left of a small seven' or 'two rows: 4 1 / 8 8' (docs/text.md).
Hardware:  One CPU core (AMD EPYC, about 95 GFLOP/s): tokenizer 5 min 36 s, AR
           model 54 min. On two cores it is not measured.
Result:    One seed: tokenizer PSNR 31.8 dB, samples/seen 0.98 (real images 0.97), samples/held_out
           0.92 (0.96), samples/rows 1.00 (0.99); docs/text.md.

  python -m sphere_ar_jax.main --mode=grid --workdir=/tmp/composed \
      --prompt='a thick three left of a small seven'

Words after the colon, separated by commas:

joint      The model also writes captions: sequences of a text and an image in either order. One
           seed: samples/seen 0.92, samples/held_out 0.90, samples/rows 0.99, captions/seen 0.75,
           captions/held_out 0.76, captions/rows 0.94.
smoke      The same path in few steps, to see that everything runs. Its pictures show no digits yet.

The transformer reads the words of a caption, those of composed_words.txt, in place of class tokens.
Images have 4×4 tokens of d = 32 on a sphere of radius √32. The models are those of
configs/fashion.py, but for these:

- A token stands for 8×8 pixels in place of 4×4, so that an image has 16 of them.
- The transformer is deeper, since it reads, too.
- There are more steps, and guidance is 3.5 in place of 1.6.
- The weight of the KL term is 0.0003 in place of 0.001. The tokenizer then loses less of small
  digits.
"""

import pathlib

from ml_collections import ConfigDict

from sphere_ar_jax.config import packaged, recipes


def get_config(arg: str = '') -> ConfigDict:
    """The config of composed digits.

    Args:
      arg: the words after the colon, see above.

    Raises:
      ValueError: another word was given; one line.
    """
    words, _ = recipes.arguments('configs/composed.py', arg, ('smoke', 'joint'))
    smoke = 'smoke' in words
    c = packaged.load('fashion:smoke' if smoke else 'fashion')
    c.data.name = 'composed'
    c.data.path = None
    c.vae.update(grid=(4, 4), latent_dim=32, channels=(128, 128, 128, 128))
    c.ar.condition = 'text'
    c.ar.vocabulary = str(pathlib.Path(__file__).with_name('composed_words.txt'))
    c.ar.text_tokens = 10
    c.ar.depth = 6
    if 'joint' in words:
        c.ar.update(text_weight=0.05, alone_weight=0.0)
    c.sampling.guidance_scale = 3.5
    c.watch.classes = 6
    if smoke:
        c.sampling.update(num_images=96, batch_size=96)  # as many of each group of captions
    else:
        c.tokenizer_training.update(steps=2400, kl_weight=0.0003)
        c.ar_training.steps = 20_000
    return c
