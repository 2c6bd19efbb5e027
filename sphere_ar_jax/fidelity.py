r"""Scores images against a reference by the ADM protocol, without TensorFlow.

    python -m sphere_ar_jax.fidelity VIRTUAL_imagenet256_labeled.npz samples.npz \
        --weights=classify_image_graph_def.pb

The scores are FID, sFID, Inception Score, precision and recall, as in OpenAI's guided-diffusion
`evaluations/evaluator.py` (Dhariwal & Nichol 2021, arXiv 2105.05233), to which published numbers on
ImageNet refer. `protocol` computes them; `docs/evaluation.md` says how exact they are.
"""

import argparse
import json
import sys

from sphere_ar_jax.evaluation.fidelity import inception_weights, protocol
from sphere_ar_jax.runtime import console
from sphere_ar_jax.runtime.console import UserError


def main() -> None:
    """Scores two npz files and prints the scores as JSON.

    An error that the user can put right ends the program with one line.
    """
    parser = argparse.ArgumentParser('python -m sphere_ar_jax.fidelity')
    parser.add_argument('reference', help='npz of reference images or statistics')
    parser.add_argument('samples', help='npz with the samples, arr_0')
    parser.add_argument(
        '--weights', required=True, help='classify_image_graph_def.pb, or a .pth file'
    )
    parser.add_argument('--batch_size', type=int, default=64, help='images at a time')
    arguments = parser.parse_args()
    try:
        params = inception_weights.load(arguments.weights)
        scores = protocol.evaluate(
            arguments.samples,
            arguments.reference,
            params,
            batch_size=arguments.batch_size,
            progress=console.bars(sys.stderr),
        )
    except (OSError, UserError) as error:
        sys.exit(f'error: {error}')
    print(json.dumps(scores, indent=2))
    protocol.warn(scores)


if __name__ == '__main__':
    main()
