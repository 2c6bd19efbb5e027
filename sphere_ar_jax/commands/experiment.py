"""--mode=experiment: one of the paper's claims, by several seeds (docs/experiments)."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from sphere_ar_jax.config import experiments, schema
from sphere_ar_jax.experiments import experiment as runner
from sphere_ar_jax.runtime.console import UserError


def experiment(
    config: ConfigDict,
    name: str,
    workdir: str,
    command: str,
    seeds: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Runs what an experiment still lacks.

    Args:
      config: its config.
      name: the name of its config file, and of its directory in the workdir.
      workdir: an absolute path, which experiments share.
      command: what the page says to type.
      seeds: whole numbers as text, in place of the config's seeds.

    Returns:
      What results.json holds.

    Raises:
      UserError: the config is that of a run, or a value is impossible; one line.
    """
    if not schema.is_experiment(config):
        raise UserError(
            'this is the config of a run: give --config=configs/experiments/NAME.py, or '
            '--mode=train'
        )
    if seeds is not None:
        if not all(seed.isdecimal() for seed in seeds):
            raise UserError(f'--seeds is {",".join(seeds)}, but must be whole numbers: --seeds=0,1')
        config.seeds = tuple(int(seed) for seed in seeds)
    return runner.run(experiments.check(config), name, workdir, command)
