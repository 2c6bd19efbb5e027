"""The schema of the configuration: every key with its type and its published default.

`default()` is the schema. A file in configs/ starts from it, changes values and returns it.
ml_collections refuses unknown keys and wrong types; `checks.check` refuses impossible values.
"""

import difflib
import json
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from sphere_ar_jax.models.sizes import VARIANTS

# Dtypes that a computation may have.
DTYPES = ('float32', 'bfloat16')

# Where a run may be logged besides its own files, see `metric_writer.Logs`.
LOGGING = ('tensorboard', 'wandb')

# The number of classes of each kind of data; None where only the data says it. The kinds are those
# of `sources.open_source` and of `small`, and latents that --mode=encode wrote.
DATA: dict[str, int | None] = {
    'digits': 10,
    'idx': None,
    'imagenet': 1000,
    'folder': None,
    'array_records': None,
    'tfds': None,
    'hf': None,
    'webdataset': None,
    'parquet': None,
    'latents': None,
    'emoji': None,
    'composed': 1,
}

# Those of them that need no path.
WITHOUT_PATH = ('digits', 'composed')

# Those of them whose images have captions in place of classes.
CAPTIONED = ('composed',)


def _training(**values: Any) -> ConfigDict:
    """The keys that all trainings have; `values` replaces defaults and adds keys."""
    common = dict(
        steps=100_000,
        batch_size=256,
        learning_rate=1e-4,
        final_learning_rate=1e-4,
        warmup_steps=0,
        # Steps from which the learning rate rises and falls anew: the `steps` that a run had before
        # it was prolonged, ascending.
        restarts=(),
        weight_decay=0.05,
        b1=0.9,
        b2=0.95,
        clip_norm=1.0,
        # Rate of the EMA; 0 keeps none.
        ema_decay=0.0,
        # Rates of further EMAs, which are kept besides the first.
        more_ema_decays=(),
        # Whether the rates of all EMAs rise to these values from 0.1, see `state.ramped`.
        ema_ramp=False,
        # Pieces of a batch whose gradients are computed one after the other, to save memory.
        accumulate=1,
        log_every=100,
        checkpoint_every=1000,
        # Number of newest checkpoints that are kept.
        keep=2,
        # Checkpoints at multiples of this number of steps are kept for good; 0 keeps none.
        keep_every=0,
    )
    return ConfigDict(common | values)


def default() -> ConfigDict:
    """The config with every key there is, locked, so that an unknown key is an error.

    Models, optimizers and losses have the published values of SphereAR-B at 256×256
    (docs/method.md, "Sizes" and "Training"). The numbers of steps, the data and the sampling are
    stand-ins that a config file replaces.
    """
    config = ConfigDict(
        dict(
            seed=0,
            # What a config file says of the values that it has derived, a line each, see
            # `own.lines`. The start of a training prints them; they change nothing.
            reasons=(),
            # Any of LOGGING.
            logging=('tensorboard',),
            # Dtype of the computation, one of DTYPES; parameters are always float32.
            dtype='float32',
            # Devices along each axis, see `sharding`; −1 takes as many as there are.
            mesh=dict(data=-1, fsdp=1, tensor=1),
            data=dict(
                # A key of DATA.
                name='digits',
                # Path of the tar or of the directory; for tfds and hf the name of the data set.
                path=config_dict.placeholder(str),
                # Split and directory of tfds and hf; their default directory, if not given.
                split='train',
                data_dir=config_dict.placeholder(str),
                # Share of the digits that is held out.
                holdout=0.2,
                # Share of image files that is held out, see `sources.split`. IDX files have a test
                # split of their own.
                holdout_files=0.0,
                # Training steps of the network that judges samples. The digits have another judge.
                classifier_steps=1600,
                # Number of classes of the AR model; as many as the data has, if not given.
                num_classes=config_dict.placeholder(int),
                # The classes of a small data set that are taken, ascending numbers from 0; all, if
                # not given. The model counts them anew.
                classes=(),
                # The ends (low, high) of the uniform distribution of which each image of a small
                # data set draws a factor of its brightness; (), if images stay as they are.
                brightness=(),
                # How often each pixel of a small data set is repeated along both axes, for the same
                # images in more tokens.
                enlarge=1,
                # Random crops give way to centre crops between these two epochs.
                crop_until=(350, 375),
                # Where captions are, for texts as a condition: a .jsonl, .json or .tsv file, or
                # 'beside' for those that the images have themselves, see `captions.table`.
                captions=config_dict.placeholder(str),
                # Whether training images are mirrored left to right with probability ½.
                flip=True,
                # A run stops above this share of images that cannot be decoded.
                max_broken=0.001,
                # Whether JPEG's decoder may scale down, which is faster but not exact.
                draft=False,
                # Processes that load images; 0 loads them in threads of this one.
                workers=0,
                # Threads in each process that loads images of files.
                threads=16,
            ),
            vae=dict(
                grid=(16, 16),
                latent_dim=16,
                image_channels=3,
                # The backbones hybrid and cnn read it.
                stem=64,
                # The number of stages gives the pixels of a token, 2^(stages − 1) along each axis.
                # The last stage has the width; vit reads nothing of the others.
                channels=(64, 64, 128, 256, 512),
                # The backbones hybrid and vit read these five.
                encoder_depth=6,
                decoder_depth=12,
                heads=8,
                remat=False,
                unroll=1,
                # Words of `models.backbones` and `models.posteriors`.
                backbone='hybrid',
                posterior='power_spherical',
                # The standard deviation of the posterior 'sigma_vae'; others do not read it.
                sigma=0.5,
                # How much faster kappa grows than the published one, for short trainings. The
                # posteriors 'power_spherical' and 'vmf' read it.
                kappa_scale=1.0,
                # What the decoder reads: 'latents', or 'projected' onto the sphere.
                decoder_input='latents',
                # Radius R of the sphere of tokens and projections; √latent_dim, if not given.
                radius=config_dict.placeholder(float),
            ),
            ar=dict(
                VARIANTS['B'],
                # Words of `models.conditions` and `models.heads`.
                condition='classes',
                head='flow',
                class_tokens=16,
                # Of the condition 'text': 'bytes', or the path of a list of words (.txt) or of a
                # tokenizer.json, and the numbers of it that a caption has at most.
                vocabulary='bytes',
                text_tokens=64,
                # Of the condition 'features': an npz of texts and features of another model
                # (`data.captions.features`), and the places of a text and the features of a place;
                # None takes those of the file.
                features=config_dict.placeholder(str),
                feature_shape=config_dict.placeholder(tuple),
                # Of the condition 'text': blocks of a transformer in front that reads captions in
                # both directions.
                text_encoder_depth=0,
                # Likewise: the weight of the texts' cross-entropy beside 1 for the head's loss, if
                # the model writes texts, too (`joint.Joint`). None reads them alone.
                text_weight=config_dict.placeholder(float),
                # Then also the weight of the losses of what comes first in a sequence, an image
                # without a text or a text without an image; 0 leaves them untrained.
                alone_weight=1.0,
                # What the model reads and draws: 'latents', 'projected' onto the sphere,
                # 'standardised' by the statistics of the training images, or 'polar', a direction
                # and a length (`vae.TOKEN_SPACES`).
                token_space='latents',
                # The weight of the length's loss of the head 'direction_magnitude', beside 1 for
                # the direction's; others do not read it.
                magnitude_weight=1.0,
                # Standard deviation of the noise that a token's flow starts from.
                prior_scale=1.0,
                # Whether blocks are computed again in the backward pass; None leaves that to the
                # memory of the device, see `state.step_for_memory`.
                remat=config_dict.placeholder(bool),
                unroll=1,
                # Whether the sampler runs the kernels of `models.fused` on GPUs: fewer and larger
                # ones than XLA's.
                fused=False,
            ),
            # A workdir whose tokenizer is taken; none is trained then.
            tokenizer=config_dict.placeholder(str),
            tokenizer_training=_training(
                kl_weight=0.004,
                l2_weight=0.0,
                perceptual_weight=1.0,
                # The two files of LPIPS' weights.
                lpips=config_dict.placeholder(str),
                vgg=config_dict.placeholder(str),
                disc_weight=0.5,
                disc_start=20_000,
                discriminator='patchgan',
                disc_loss='hinge',
            ),
            ar_training=_training(
                batch_size=512,
                learning_rate=3e-4,
                final_learning_rate=1e-5,
                warmup_steps=20_000,
                ema_decay=0.9999,
                copies=4,
                label_dropout=0.1,
                # Dtype of the frozen tokenizer's computation; '' takes the config's `dtype`.
                encoder_dtype='',
            ),
            watch=dict(
                # Steps between looks at the model while it is trained; 0 never looks.
                every=0,
                # Classes of the grid of samples, and images of each class.
                classes=8,
                columns=8,
                # Samples whose FID is computed at each look; 0 computes none.
                fid_images=0,
                # Files for that FID: Inception's weights and the reference statistics.
                inception=config_dict.placeholder(str),
                reference=config_dict.placeholder(str),
            ),
            # A finished workdir whose head is distilled; nothing else is trained then.
            init_from=config_dict.placeholder(str),
            distillation_training=_training(
                head='mean_velocity',
                # Whether the transformer is trained with the head. It begins as the teacher's.
                transformer=False,
                ema_decay=0.9999,
                # Steps of the teacher's solver, and the warp of their times; 1 keeps them equal.
                teacher_steps=16,
                teacher_shift=1.0,
                levels=(1, 2),
                guidance='linear',
                guidance_scale=4.5,
            ),
            fine_tuning=dict(
                # A finished or converted workdir whose models are trained on; classes may differ.
                init_from=config_dict.placeholder(str),
                # Patterns of the AR model's parameters that stay as they are, and texts
                # 'PATTERN=FACTOR' of learning rates; see `fine_tuning`.
                freeze=(),
                multipliers=(),
                # Rank of the factors that are trained in place of the transformer's kernels; 0
                # trains the kernels.
                lora_rank=0,
            ),
            # Most of these keys are explained at `plan.Options` and `build.Sampler`.
            sampling=dict(
                num_images=1000,
                batch_size=250,
                solver='euler_maruyama',
                num_steps=100,
                last_step=config_dict.placeholder(float),
                guidance=config_dict.placeholder(str),
                guidance_scale=config_dict.placeholder(float),
                temperature=1.0,
                first_token_apart=config_dict.placeholder(bool),
                guidance_interval=config_dict.placeholder(tuple),
                noise_scale=config_dict.placeholder(float),
                shift=config_dict.placeholder(float),
                final_steps=config_dict.placeholder(int),
                annealing=config_dict.placeholder(str),
                # Rate of the EMA to sample with; the first one, if not given. 0 takes the weights
                # themselves.
                ema_decay=config_dict.placeholder(float),
            ),
        )
    )
    # The key may also be None, which a plain False in the dictionary would not allow.
    config.ar.remat = False
    return config.lock()


def is_experiment(config: ConfigDict) -> bool:
    """Whether a config is that of an experiment, whose runs are compared (`config.experiments`)."""
    return 'comparisons' in config


def num_classes(config: ConfigDict) -> int | None:
    """The number of classes that the AR model knows, without the null class.

    None where only the data says it and has not been opened yet.
    """
    if config.data.num_classes:
        return config.data.num_classes
    if config.data.classes:
        return len(config.data.classes)
    return DATA[config.data.name]


def changed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy of a config with other values, {dotted key: value}; the config stays as it is."""
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(values)
    return other


def leaves(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Flattens a nested dictionary to {dotted name: value}; `prefix` precedes all names."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    found = {}
    for key, value in tree.items():
        found.update(leaves(value, f'{prefix}{key}.'))
    return found


def unknown(key: str) -> str | None:
    """The message about a dotted key that no config has, None where configs have it."""
    sections = default()
    names = list(leaves(sections.to_dict()))
    if key in names:
        return None
    close = difflib.get_close_matches(key, names, 1, 0.5)
    hint = f'did you mean {close[0]}?' if close else f'its sections are {", ".join(sections)}'
    return f'the config has no key {key}; {hint}'


# Keys that may change between two starts in one workdir: where things are, speed, how often to log
# and save, sampling, and what helps a run that broke off because its loss was not finite.
_FREE = re.compile(
    r'mesh\..*|sampling\..*|watch\..*|tokenizer|reasons|logging'
    # A run keeps its vocabulary in its workdir, and compares it. A file of features may grow.
    r'|ar\.(vocabulary|features)'
    r'|data\.(path|data_dir|captions|workers|threads|max_broken|classifier_steps)'
    r'|.*\.(lpips|vgg|log_every|checkpoint_every|keep|keep_every|remat|unroll|fused)'
    r'|.*\.(learning_rate|final_learning_rate|clip_norm)'
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences of two configs that a run cannot go on across.

    Options of the distillation count only where one of the two configs distils a head, and the
    place of its teacher only where the other one has none. Options of the tokenizer's training do
    not count where both take the tokenizer from another workdir. The number of classes does not
    count where both models read texts.

    Args:
      old: the config that the run was begun with, as `as_dict` gives it.
      new: the other one, likewise.

    Returns:
      'KEY OLD → NEW' for each difference.
    """
    before = leaves(old)
    after = leaves(new)
    distilled = before.get('init_from') is not None or after.get('init_from') is not None
    read_texts = all(v.get('ar.condition') in ('text', 'features') for v in (before, after))
    no_tokenizer = all(v.get('tokenizer') or v.get('init_from') for v in (before, after))
    found = []
    for name in {**before, **after}:
        if _FREE.fullmatch(name):
            continue
        if name == 'data.num_classes' and read_texts:
            continue
        if name == 'init_from' and None not in (before.get(name), after.get(name)):
            continue  # The teacher was moved. Its weights are compared.
        if name.startswith('distillation_training.') and not distilled:
            continue
        if name.startswith('tokenizer_training.') and no_tokenizer:
            continue
        if before.get(name) != after.get(name):
            found.append(f'{name} {before.get(name)} → {after.get(name)}')
    return found


def as_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain values that JSON takes.

    A `config.json` holds this dictionary, and `differences` compares two of them.
    """
    return json.loads(config.to_json_best_effort())
