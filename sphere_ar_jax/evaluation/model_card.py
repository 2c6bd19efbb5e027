"""Model cards: what README.md of shared weights says of a run, in the Markdown of Hugging Face.

A card says what the run's own files say, and no more. Its licence is for the owner of the weights
to choose.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from sphere_ar_jax import __version__
from sphere_ar_jax.config import schema
from sphere_ar_jax.data.files.listing import first_names
from sphere_ar_jax.evaluation import page
from sphere_ar_jax.runtime import console, files
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import generation
from sphere_ar_jax.training.run import Run

_CARD = """---
library_name: sphere_ar_jax
# The licence of these weights is yours to choose: a line as `license: apache-2.0` says it.
tags:
- image-generation
- autoregressive
- flow-matching
- jax
---

# {title}

{method}

## Use

In a checkout of `sphere_ar_jax`, after `pip install -e '.[hub]'`:

```python
import sphere_ar_jax

run = sphere_ar_jax.load('{source}'){comment}
{use}
```

`model.safetensors` has the tensors under the names of the public PyTorch code, and `config.json`
has all sizes. Neither PyTorch nor TensorFlow is needed.

## Model

{sizes}

## Training

{training}

{scores}"""

_METHOD = (
    'A [SphereAR](https://arxiv.org/abs/2509.24335) model (Ke & Xue, arXiv 2509.24335) in JAX, of '
    '`sphere_ar_jax`. '
)
_WHOLE = (
    'It generates images token by token: an S-VAE makes continuous tokens on a hypersphere, and a '
    'causal transformer with a flow-matching head draws them in raster order.'
)
_TOKENIZER = 'This is the S-VAE alone, which makes continuous tokens on a hypersphere of an image.'


class Scores(NamedTuple):
    """Scores of a run.

    Attributes:
      protocol: how they were taken, in a sentence or two.
      rows: (name, value, what it means) of each.
    """

    protocol: str
    rows: list[tuple[str, float, str]]


_NO_SCORES = 'No scores of these weights are known.'
# Numbers of a run that say nothing about its weights.
_OF_MACHINES = ('wall_s/', 'peak_rss_mb')
_FIDELITY = {
    'fid': 'Fréchet Inception distance',
    'sfid': 'Fréchet distance in spatial features of Inception',
    'inception_score': 'Inception Score',
    'precision': 'improved precision, k = 3',
    'recall': 'improved recall, k = 3',
}
_OF_CLASSIFIER = {
    'classifier_frechet': "Fréchet distance in a classifier's features; it is not FID",
    'classifier_frechet_heldout': "Fréchet distance to held-out images in a classifier's features",
    'classifier_frechet_floor': (
        "Fréchet distance between training and held-out images in a classifier's features"
    ),
    'classifier/balanced_accuracy': 'mean over classes of its accuracy on held-out real images',
    'samples/balanced_accuracy': 'mean over classes of the share read as the class asked for',
}


def _read(path: str) -> dict[str, Any]:
    """What a JSON file of a run says, {} where there is none."""
    if not epath.Path(path).exists():
        return {}
    found = files.read_json(path)
    return found if isinstance(found, dict) else {}


def _rows(found: Mapping[str, Any], meanings: Mapping[str, str]) -> list[tuple[str, float, str]]:
    """The finite numbers among some scores, in their order."""
    return [
        (name, value, meanings.get(name, ''))
        for name, value in found.items()
        if type(value) in (int, float)
        and math.isfinite(value)
        and name not in ('seed', 'parameters')
    ]


def scores(workdir: str, run: Run, finished: bool) -> list[Scores]:
    """The scores that a workdir holds of these very weights.

    Args:
      workdir: the directory of the run.
      run: the run. Scores of `--mode=evaluate` count where they note the checksum of its weights.
      finished: whether the weights are those of the run's end, whose scores metrics.json has.

    Raises:
      UserError: a file of scores is damaged.
    """
    found = []
    parameters = generation.parameters_crc(run)
    evaluation = _read(os.path.join(workdir, 'evaluation.json'))
    samples = evaluation.get('samples')
    shown_by_posterior = run.vae.posterior.shown.items()
    meanings = page.MEANING | _OF_CLASSIFIER | {f'vae/{k}': v for k, v in shown_by_posterior}
    if (
        isinstance(samples, dict)
        and samples.get('parameters') == parameters
        and 'fid' in evaluation
    ):
        reference = evaluation.get('reference', {})
        protocol = (
            f'The ADM protocol on {samples.get("images")} samples against '
            f'`{os.path.basename(str(reference.get("file")))}` of {reference.get("images")} images.'
        )
        note = evaluation.get('note')
        protocol += f' {note}' if note else ''
        shown = {name: evaluation[name] for name in _FIDELITY if name in evaluation}
        found.append(Scores(protocol, _rows(shown, _FIDELITY)))
    elif evaluation.get('parameters') == parameters:
        found.append(
            Scores(f'By `--mode=evaluate`. {_drawn(evaluation)}', _rows(evaluation, meanings))
        )
    else:
        metrics = _read(os.path.join(workdir, 'metrics.json')) if finished else {}
        rows = [row for row in _rows(metrics, meanings) if not row[0].startswith(_OF_MACHINES)]
        if rows:
            drawn = ''
            if any(row[0].startswith('samples/') for row in rows):
                about = {
                    'seed': run.config.seed,
                    'sampling': run.config.sampling.to_dict(),
                    'dtype': run.config.dtype,
                }
                drawn = f' {_drawn(about)}'
            found.append(Scores(f'At the end of the training.{drawn}', rows))
    return found


def _drawn(evaluation: Mapping[str, Any]) -> str:
    """How the samples of an evaluation were drawn."""
    settings = evaluation.get('sampling', {})
    scale = settings.get('guidance_scale')
    guided = 'no guidance' if scale is None else f'guidance scale {scale}'
    # Evaluations of earlier versions do not note it.
    dtype = evaluation.get('dtype')
    computed = '' if dtype is None else f', computed in {dtype}'
    return (
        f'{settings.get("num_images")} samples of seed {evaluation.get("seed")}, solver '
        f'{settings.get("solver")} with {settings.get("num_steps")} steps, {guided}{computed}.'
    )


def _count(params: PyTree) -> str:
    """The number of parameters for people to read."""
    return f'{sum(leaf.size for leaf in jax.tree.leaves(params)):,}'


def _sizes(run: Run) -> list[str]:
    """The table of a model's sizes."""
    height, width, channels = run.vae.image_shape
    rows: list[tuple[str, object]] = [
        ('images', f'{height} × {width} pixels, {channels} channel(s)'),
        ('tokens', f'{run.vae.grid[0]} × {run.vae.grid[1]} of {run.vae.latent_dim} numbers'),
        ("tokenizer's parameters", _count(run.vae_params)),
    ]
    if run.ar_params is not None:
        ar = run.config.ar
        rows += [
            ("AR model's parameters", _count(run.ar_params)),
            ('blocks, width, heads', f'{ar.depth}, {ar.width}, {ar.heads}'),
            ("the flow head's layers, width", f'{ar.head_depth}, {ar.head_width}'),
        ]
        rows.append(('classes', schema.num_classes(run.config)))
    return console.markdown(('', ''), rows)


def _training(
    run: Run, names: Sequence[str] | None, done: Mapping[str, tuple[int, int] | None]
) -> list[str]:
    """What the run was trained on, and how long; arguments as of `text`."""
    cfg = run.config
    lines = [f'- kind of data: `{cfg.data.name}`']
    if names and run.ar_params is not None:
        shown = first_names([name.replace('`', '') for name in names], 10)
        lines.append(f'- classes: `{shown}`')
    stages = ['tokenizer']
    if run.ar_params is not None:
        stages.append('ar')
    for stage in stages:
        said = 'converted weights'
        if cfg.fine_tuning.init_from is not None:
            said = 'the weights of another run'
        if (found := done[stage]) is not None:
            steps, batch_size = found
            said = f'{steps:,} steps of {batch_size} images'
        lines.append(f'- {"AR model" if stage == "ar" else stage}: {said}')
    tuning = cfg.fine_tuning
    if tuning.init_from is not None:
        how = f', by factors of rank {tuning.lora_rank}' if tuning.lora_rank else ''
        lines.append(f'- fine-tuned from the weights of another run{how}')
    return [*lines, f'- seed {cfg.seed}, computed in {cfg.dtype}']


def text(
    run: Run,
    names: Sequence[str] | None,
    done: Mapping[str, tuple[int, int] | None],
    found: Sequence[Scores],
    source: str | None,
) -> str:
    """A model card.

    Args:
      run: the run, with the weights that are shared.
      names: the names of its classes, None where they are not known.
      done: (steps, images of a step) of its stages, 'tokenizer' and 'ar'; None for one that was
        converted.
      found: what is known of its quality, see `scores`.
      source: hf://USER/NAME, None where it is not known yet.
    """
    is_whole = run.ar_params is not None
    parts = []
    for one in found:
        parts += [one.protocol, '']
        rows = ((f'`{name}`', f'{value:.4g}', meaning) for name, value, meaning in one.rows)
        parts += [*console.markdown(('score', 'value', 'meaning'), rows), '']
    use = 'images = run.sample([0, 0, 0])' if is_whole else "tokens = run.encode(['image.png'])"
    return _CARD.format(
        title='SphereAR' if source is None else source.rpartition('/')[2],
        method=_METHOD + (_WHOLE if is_whole else _TOKENIZER),
        source=source or 'hf://USER/NAME',
        comment='' if source else '  # or the path of this directory',
        use=use,
        sizes='\n'.join(_sizes(run)),
        training='\n'.join([*_training(run, names, done), f'- sphere_ar_jax {__version__}']),
        scores='\n'.join(['## Scores', '', *(parts or [_NO_SCORES, ''])]),
    )
