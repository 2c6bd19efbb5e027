"""The benchmark: what each part costs, how near it is to what the machine can do, and beside the
public PyTorch code.

    python -m sphere_ar_jax.benchmark --config=configs/ar_b.py --output=/tmp/bench
    [--against=CHECKOUT]

Every part is prepared in a process of its own, one for each side (ours; with --against also the
public code, compiled and eager), so that start, compilation and peak memory are its own. The sides
then take turns, --repeats times each, so that a ratio compares minutes that were alike. Results: a
table on the screen, OUTPUT/benchmark.json and .md.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from sphere_ar_jax.config import build, checks, packaged
from sphere_ar_jax.flow import plan
from sphere_ar_jax.measure import compare, our_parts
from sphere_ar_jax.runtime.console import one_line

_FLAGS = flags.FlagValues()  # of its own: `main` has flags of the same names
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


def _fail(message):
    sys.exit(f'error: {message}')


def main(argv):
    """Parses the command line and measures; what the user can put right ends it with one line."""
    if '--help' in argv:
        return print(f'{__doc__}\n{_FLAGS.main_module_help()}')
    try:
        rest = _FLAGS(packaged.with_paths(argv))[1:]
        cfg = None if _CONFIG.value is None else checks.check(_CONFIG.value)
    except Exception as error:  # also whatever a config file raises
        _fail(one_line(error))
    os.environ.setdefault(
        'XLA_PYTHON_CLIENT_PREALLOCATE', 'false'
    )  # processes share the accelerator
    if rest:
        _fail(f'{rest[0]} is no flag')
    if cfg is None or _OUTPUT.value is None:
        _fail('give --config=configs/NAME.py and --output=DIR')
    names = _PARTS.value or [part for part in our_parts.PARTS if part != 'sample']
    unknown = [part for part in names if part not in our_parts.PARTS]
    if unknown:
        _fail(f'no part {unknown[0]}; there are {", ".join(our_parts.PARTS)}')
    if _AGAINST.value:
        if not os.path.isdir(os.path.join(_AGAINST.value, 'SphereAR')):
            _fail(f'{_AGAINST.value} is no checkout of guolinke/SphereAR')
        plain = build.build_sampler(cfg).options == plan.Options(
            num_steps=cfg.sampling.num_steps, guidance=cfg.sampling.guidance
        )
        if not plain or cfg.sampling.guidance is None or cfg.init_from is not None:
            _fail(
                'the public code samples by euler_maruyama with guidance alone: use a config that does, without :fast'
            )
    name = ' '.join(a.removeprefix('--config=') for a in argv if a.startswith('--config'))
    compare.run(
        cfg, name, _OUTPUT.value, names, _BATCH.value, _TRAIN_BATCH.value or _BATCH.value, _REPEATS.value,
        _AGAINST.value, _SIDES.value, _CURVES.value,
    )  # fmt: skip


if __name__ == '__main__':
    main(sys.argv)
