"""--mode=evaluate scores a run, or samples alone; --mode=reference makes what they need."""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import beside, build, recipes, schema
from sphere_ar_jax.data import small, sources
from sphere_ar_jax.evaluation import class_names, snapshots, tokenizer
from sphere_ar_jax.evaluation.fidelity import (
    image_sets,
    inception_weights,
    protocol,
    statistics,
)
from sphere_ar_jax.evaluation.fidelity import reference as references
from sphere_ar_jax.interop.lpips import check_paths, read
from sphere_ar_jax.runtime import console, files
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import generation
from sphere_ar_jax.training.run import Run


def _check_files(
    samples: str | None, reference: str | None, inception: str | None, images: str | None
) -> None:
    """Raises UserError for files that are not given together as they must be."""
    if (samples is None) != (reference is None):
        raise UserError('give --samples=NPZ and --reference=NPZ together')
    if samples is not None and inception is None:
        raise UserError(
            'give --inception=classify_image_graph_def.pb '
            '(or the .pth of pytorch-fid, torch-fidelity)'
        )
    if inception is not None and samples is None and images is None:
        raise UserError(
            '--inception is for --samples and --reference, or for --images: give those too'
        )


def _score_tokenizer(
    run: Run,
    images: str,
    network: PyTree | None,
    lpips: str | None,
    vgg: str | None,
) -> dict[str, Any]:
    """The scores of a run's tokenizer on images; the network is Inception's parameters."""
    judge = None if lpips is None else read(lpips, vgg)
    batches = image_sets.read_images(images, min(run.config.sampling.batch_size, 64))
    bar = console.bar(None, 'reconstructions')
    scores = tokenizer.score_tokenizer(run, batches, network=network, lpips=judge, progress=bar)
    return scores | {'dtype': run.config.dtype, 'parameters': generation.parameters_crc(run)}


def _score_run(workdir: str, like: ConfigDict | None) -> dict[str, Any]:
    """The scores of a run that need nothing but its own data.

    A run on a small data set is scored by the protocol of such sets, all others by a classifier.
    """
    run, mesh = open_run.open_run(workdir, like)
    own = beside.for_the_images(open_run.config_of(workdir), like)
    d = own.data
    cfg = schema.changed(run.config, {f'data.{key}': value for key, value in d.items()})
    setting = snapshots.Setting(cfg, workdir, mesh, run.vae, run.ar, None)
    if d.name in small.KINDS:
        data = build.open_data_set(own)
        class_names.require(workdir, cfg, getattr(data.train, 'class_names', None))
        setting = setting._replace(source=data.train, data=data)
        scores, _ = snapshots.score(setting, run)
    elif d.path is None:
        raise UserError(
            'give --samples, --reference and --inception, or --images; or, for scores by a '
            f'classifier, --config.data.path of the {d.name} data'
        )
    else:
        sources.require_images(d.name, d.path)
        source = build.open_files(own, console.bar(None, 'reading the tar', 'byte'))
        if not build.has_captions(cfg):
            class_names.require(workdir, cfg, source.class_names)
        training, heldout = sources.split(source, d.holdout_files)
        setting = setting._replace(source=training, heldout=heldout)
        scores = snapshots.score_by_classifier(setting, run)
    return {
        **scores,
        'seed': run.config.seed,
        'sampling': run.config.sampling.to_dict(),
        'dtype': run.config.dtype,
        'parameters': generation.parameters_crc(run),
    }


def evaluate(
    workdir: str,
    *,
    samples: str | None = None,
    reference: str | None = None,
    inception: str | None = None,
    images: str | None = None,
    lpips: str | None = None,
    vgg: str | None = None,
    like: ConfigDict | None = None,
) -> dict[str, Any]:
    """Scores a run, or samples alone, and writes WORKDIR/evaluation.json.

    Without samples and images a run is scored by its own data: a small data set by the protocol of
    such sets, others in the features of a classifier.

    Args:
      workdir: the directory of the run; for samples alone any directory.
      samples: an npz or a directory of samples to score by `protocol.evaluate`.
      reference: an npz of images or statistics, or a directory of images, to compare them with.
      inception: the weights of the Inception network (.pb or .pth).
      images: an npz (arr_0) or a directory of real images on which the tokenizer is scored.
      lpips: LPIPS' linear weights (vgg.pth); None leaves the tokenizer's LPIPS score out.
      vgg: VGG16's weights, which LPIPS needs too.
      like: a config whose sampler is taken, see `open_run.open_run`.

    Returns:
      The scores, as written.

    Raises:
      UserError: files are missing, damaged or do not go together.
    """
    _check_files(samples, reference, inception, images)
    scores: dict[str, Any] = {}
    weights = None if inception is None else inception_weights.load(inception)
    run = None
    if images is not None:
        # All is opened before anything is computed, so that a wrong path costs no scores.
        run, _ = open_run.open_run(workdir, like, tokenizer_only=True)
        image_sets.count_images(images)
        if lpips is not None:
            check_paths(lpips, vgg)
    if samples is not None and reference is not None:
        scores = protocol.evaluate(samples, reference, weights, progress=console.bars())
    if run is not None and images is not None:
        scores['tokenizer'] = _score_tokenizer(run, images, weights, lpips, vgg)
    if not scores:
        scores = _score_run(workdir, like)
    path = f'{workdir}/evaluation.json'
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    files.write_json(path, scores)
    print(json.dumps(scores, indent=2))
    protocol.warn(scores)
    protocol.warn(scores.get('tokenizer', {}))
    print(f'wrote {path}')
    return scores


def write_reference(
    data: str,
    size: int,
    output: str,
    *,
    inception: str | None = None,
    num_images: int = references.KEPT,
    split: str | None = None,
    data_dir: str | None = None,
) -> None:
    """Writes statistics and images of a data set to an npz, to compare samples with.

    Args:
      data: KIND:PATH, see `recipes.data_set`.
      size: the side of the crops, that of the samples.
      output: the npz.
      inception: the weights of the Inception network (.pb or .pth); None writes images alone.
      num_images: images to keep in the file.
      split: the split of tfds or hf, None for 'train'.
      data_dir: the directory of tfds or hf, None for its default.

    Raises:
      UserError: the images are a small data set or cannot be read, or the file cannot be written.
    """
    kind, path = recipes.data_set(data)
    if kind in small.KINDS:
        raise UserError(
            f'{small.KINDS[kind].noun} have scores of their own: '
            '--mode=evaluate --workdir=DIR compares a run with them'
        )
    if not output.endswith('.npz'):
        raise UserError(f'--output is {output}, but must end in .npz')
    if files.is_remote(output):
        raise UserError(f'--output is {output}: a reference is written to a local disk')
    sources.check_split(kind, split, data_dir)
    epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
    weights = None if inception is None else inception_weights.load(inception)
    bar = console.bar(None, 'reading the tar', 'byte')
    # Statistics need no labels. Those of a folder decide which images a training takes.
    needs_labels = kind == 'folder'
    sources.require_images(kind, path)
    source = sources.open_source(kind, path, split or 'train', data_dir, bar, needs_labels)
    print(f'{len(source)} images of {class_names.describe(source.num_classes, source.class_names)}')
    if source.left_out:
        print(f'left out: {source.left_out}')
    crops = references.Crops(source, size)
    progress = console.bar(len(source), 'reference')
    found = references.write(output, crops, weights, kept=num_images, progress=progress)
    if crops.broken:
        first = min(crops.broken.items())[1]
        print(f'left out: {len(crops.broken)} image(s) that cannot be decoded; the first: {first}')
    made_of = 'without statistics, since there is no --inception'
    if weights is not None:
        made_of = f'with statistics of {found["images"]}'
    print(f'wrote {output}: {found["kept"]} images of {size}×{size} pixels, {made_of}')
    note = statistics.note(found['images'] or None)
    if note is not None:
        print(note)
