"""--mode=evaluate: scores a run, or samples alone."""

import json

from etils import epath

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.data import digits
from sphere_ar_jax.evaluation import snapshots, tokenizer
from sphere_ar_jax.evaluation.fidelity import image_sets, inception_weights, protocol
from sphere_ar_jax.interop.lpips import read
from sphere_ar_jax.runtime import console, files
from sphere_ar_jax.runtime.console import UserError


def evaluate(
    workdir,
    *,
    samples=None,
    reference=None,
    inception=None,
    images=None,
    lpips=None,
    vgg=None,
    like=None,
):
    """Scores a run, or samples alone, and writes WORKDIR/evaluation.json.

    Args:
      samples, reference: npz files for `protocol.evaluate`. inception: its network's weights (.pb
        or .pth). images: npz with real images (arr_0) for the tokenizer's scores. lpips, vgg:
        LPIPS' linear weights and VGG16's.
      Without samples and images a run on the digits is scored by the digits' protocol.
    Returns:
      what was written.
    """
    scores = {}
    if (samples is None) != (reference is None):
        raise UserError('give --samples=NPZ and --reference=NPZ together')
    if samples is not None and inception is None:
        raise UserError(
            'give --inception=classify_image_graph_def.pb (or the .pth of pytorch-fid, torch-fidelity)'
        )
    if inception is not None and samples is None and images is None:
        raise UserError(
            '--inception is for --samples and --reference, or for --images: give those too'
        )
    weights = None if inception is None else inception_weights.load(inception)
    if samples is not None:
        scores = protocol.evaluate(samples, reference, weights, progress=console.bars())
    if images is not None:
        run, _ = open_run.open_run(workdir, like, tokenizer_only=True)
        judge = None if lpips is None else read(lpips, vgg)
        batches = image_sets.read_images(images, min(run.config.sampling.batch_size, 64))
        scores['tokenizer'] = tokenizer.score_tokenizer(
            run,
            batches,
            network=weights,
            lpips=judge,
            progress=console.bar(None, 'reconstructions'),
        )
    if not scores:
        run, mesh = open_run.open_run(workdir, like)
        if run.config.data.name != 'digits':
            raise UserError(
                'give --samples, --reference and --inception, or --images: only digits have scores of their own'
            )
        train, heldout = digits.splits(run.config.seed, run.config.data.holdout)
        setting = snapshots.Setting(run.config, workdir, mesh, run.vae, run.ar, train, heldout)
        scores, _ = snapshots.score_digits(setting, run.vae_params, run.ar_params)
    path = f'{workdir}/evaluation.json'
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    files.write_json(path, scores)
    print(json.dumps(scores, indent=2))
    print(f'wrote {path}')
    return scores
