r"""Text to image on emoji: 3,786 coloured pictures of 64×64 pixels with their names.

Command:   python -m sphere_ar_jax.main --config=configs/emoji.py --workdir=/tmp/emoji
Data:      npm pack emoji-datasource-google, then tar xzf emoji-datasource-google-*.tgz -C /tmp
           puts them where this config looks for them, /tmp/package.
Hardware:  One CPU core (AMD EPYC, about 95 GFLOP/s): tokenizer 8 min 46 s, AR
           model 53 min. On two cores it is not measured.
Result:    One seed: tokenizer PSNR 25.0 dB, 57% of the samples read as the category asked for, and
           none learned by heart; colours and outlines, no finer shapes (docs/text.md).

  python -m sphere_ar_jax.main --mode=grid --workdir=/tmp/emoji \
      --prompt='waving hand sign, medium skin tone'

Words after the colon, separated by commas:

data=emoji:DIR  Another directory of a package of emoji.
features=FILE   Features of the captions that another model has computed, an npz, in place of the
                captions' bytes (docs/text.md).
smoke           The same path in few steps, to see that everything runs. Its pictures show nothing.

The captions are the names in lower case, with the skin tone where there is one, read byte by byte
(docs/text.md). 5% of the pictures are held out. A picture has 8×8 tokens of d = 32 on a sphere. The
models are those of configs/composed.py, but for the number of tokens.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.config import packaged, recipes

DATA = 'emoji:/tmp/package'


def get_config(arg: str = '') -> ConfigDict:
    """The config of emoji.

    Args:
      arg: the words after the colon, see above.

    Raises:
      ValueError: another word was given; one line.
    """
    words, values = recipes.arguments('configs/emoji.py', arg, ('smoke',), ('data', 'features'))
    c = packaged.load('composed:smoke' if 'smoke' in words else 'composed')
    kind, path = recipes.data_set(values.get('data', DATA))
    c.data.update(
        name=kind,
        path=path,
        captions='beside',
        holdout_files=0.05,
        flip=False,
        crop_until=(0, 0),
    )
    c.vae.update(grid=(8, 8), image_channels=3)
    c.ar.vocabulary = 'bytes'
    c.ar.text_tokens = 64
    if 'features' in values:
        c.ar.condition = 'features'
        c.ar.features = values['features']
    c.sampling.guidance_scale = 2.0
    if 'smoke' not in words:
        # Each category has about as many samples as half of its real pictures.
        c.sampling.num_images = 1900
        c.tokenizer_training.steps = 1200
        c.ar_training.steps = 4000
    return c
