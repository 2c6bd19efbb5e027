r"""Scores images against a reference by the ADM protocol, without TensorFlow.

    python -m sphere_ar_jax.fidelity VIRTUAL_imagenet256_labeled.npz samples.npz \
        --weights=classify_image_graph_def.pb

The scores are FID, sFID, Inception Score, precision and recall, as in OpenAI's guided-diffusion
`evaluations/evaluator.py` (Dhariwal & Nichol 2021, arXiv 2105.05233), to which published numbers on
ImageNet refer. `protocol` computes them; `docs/evaluation.md` says how exact they are.
"""

import json
import sys

from absl import flags

from sphere_ar_jax.evaluation.fidelity import inception_weights, protocol
from sphere_ar_jax.runtime import console
from sphere_ar_jax.runtime.console import UserError

# These flags are not absl's global ones, because `main` has flags of its own.
_FLAGS = flags.FlagValues()
_WEIGHTS = flags.DEFINE_string(
    'weights', None, 'classify_image_graph_def.pb, or a .pth file.', flag_values=_FLAGS
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 64, 'Images at a time.', lower_bound=1, flag_values=_FLAGS
)


def main(argv: list[str]) -> None:
    """Scores two npz files and prints the scores as JSON.

    Args:
      argv: the command line, with the program's name first.

    Raises:
      UserError: a flag or a file is wrong; the message is one line.
    """
    reference, samples = console.parse(argv, _FLAGS, __doc__, 'REFERENCE.npz', 'SAMPLES.npz')
    if _WEIGHTS.value is None:
        raise UserError('give --weights=classify_image_graph_def.pb, or a .pth file')
    params = inception_weights.load(_WEIGHTS.value)
    scores = protocol.evaluate(
        samples,
        reference,
        params,
        batch_size=_BATCH_SIZE.value,
        progress=console.bars(sys.stderr),
    )
    print(json.dumps(scores, indent=2))
    protocol.warn(scores)


if __name__ == '__main__':
    console.run(main)
