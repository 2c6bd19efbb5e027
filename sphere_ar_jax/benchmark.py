r"""The benchmark: what each part costs, beside the machine's limits and the public PyTorch code.

    python -m sphere_ar_jax.benchmark --config=configs/ar_b.py --output=/tmp/bench \
        [--against=CHECKOUT]

There are up to three sides: ours and, with --against, the public code twice, compiled and eager.
Each side prepares a part in a process of its own, so that start, compilation and peak memory are
that side's alone. The sides then take turns, --repeats times each, so that the runs of a ratio were
measured under like conditions. The results are a table on the screen, OUTPUT/benchmark.json and
OUTPUT/benchmark.md.
"""

import os

from absl import flags
from ml_collections import ConfigDict, config_flags

from sphere_ar_jax.config import build, checks, packaged, schema
from sphere_ar_jax.flow import plan
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.measure import compare, our_parts
from sphere_ar_jax.runtime import console
from sphere_ar_jax.runtime.console import UserError, one_line

# These flags are not absl's global ones, because `main` has flags of the same names.
_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Configuration file, with its argument after a colon.', flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Directory for benchmark.json and benchmark.md.', flag_values=_FLAGS
)
_PARTS = flags.DEFINE_list(
    'parts', None, 'Parts to run, all but `sample` if not given.', flag_values=_FLAGS
)
_BATCH = flags.DEFINE_integer(
    'batch_size', 8, 'Images drawn or decoded at a time.', 1, flag_values=_FLAGS
)
_TRAIN_BATCH = flags.DEFINE_integer(
    'train_batch_size',
    None,
    'Images of a training step; batch_size if not given.',
    1,
    flag_values=_FLAGS,
)
_REPEATS = flags.DEFINE_integer(
    'repeats', 5, 'Timed runs of each part and side.', 1, flag_values=_FLAGS
)
_AGAINST = flags.DEFINE_string(
    'against',
    None,
    'Checkout of guolinke/SphereAR to run beside ours; needs torch.',
    flag_values=_FLAGS,
)
_SIDES = flags.DEFINE_multi_enum(
    'side',
    ['compiled', 'eager'],
    ['compiled', 'eager'],
    'How the public code is run.',
    flag_values=_FLAGS,
)
_CURVES = flags.DEFINE_bool(
    'curves', False, 'Also cost against batch, tokens, depth and steps.', flag_values=_FLAGS
)


def _check_against(checkout: str, cfg: ConfigDict) -> None:
    """Raises UserError unless `checkout` is the public code and can sample by the config."""
    if not os.path.isdir(os.path.join(checkout, 'SphereAR')):
        raise UserError(f'{checkout} is no checkout of guolinke/SphereAR')
    torch_names.require_public(
        build.build_vae(cfg), build.build_head(cfg), build.build_condition(cfg)
    )
    published = plan.Options(num_steps=cfg.sampling.num_steps, guidance=cfg.sampling.guidance)
    is_published = build.build_sampler(cfg).options == published
    if not is_published or cfg.sampling.guidance is None or cfg.init_from is not None:
        raise UserError(
            'the public code samples by euler_maruyama with guidance alone: '
            'use a config that does, without :fast'
        )


def main(argv: list[str]) -> None:
    """Parses the command line and measures.

    Args:
      argv: the command line, with the program's name first.

    Raises:
      UserError: there is a fault that the user can put right; the message is one line.
    """
    console.parse(packaged.with_paths(argv), _FLAGS, __doc__)
    try:
        if _CONFIG.value is not None and schema.is_experiment(_CONFIG.value):
            raise UserError(
                'this is the config of an experiment: give that of a run, as configs/digits.py'
            )
        cfg = None if _CONFIG.value is None else checks.check(_CONFIG.value)
    except Exception as error:  # A config file may raise anything.
        raise UserError(one_line(error)) from None
    # Several processes share the accelerator, so none may take all of its memory.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    if cfg is None or _OUTPUT.value is None:
        raise UserError('give --config=configs/NAME.py and --output=DIR')
    names = _PARTS.value or [part for part in our_parts.PARTS if part != 'sample']
    unknown = [part for part in names if part not in our_parts.PARTS]
    if unknown:
        raise UserError(f'no part {unknown[0]}; there are {", ".join(our_parts.PARTS)}')
    if _AGAINST.value:
        _check_against(_AGAINST.value, cfg)
    compare.run(
        cfg,
        name=' '.join(a.removeprefix('--config=') for a in argv if a.startswith('--config')),
        output=_OUTPUT.value,
        names=names,
        batch=_BATCH.value,
        train_batch=_TRAIN_BATCH.value or _BATCH.value,
        repeats=_REPEATS.value,
        checkout=_AGAINST.value,
        sides=_SIDES.value,
        with_curves=_CURVES.value,
    )


if __name__ == '__main__':
    console.run(main)
