"""A config file: the config of the run in a workdir, as in --config=own_config.py:WORKDIR.

`main` takes it where a command line overrides keys of a run's own config.
"""

from ml_collections import ConfigDict

from sphere_ar_jax.runtime.files import absolute
from sphere_ar_jax.training.run import load_config


def get_config(workdir: str) -> ConfigDict:
    """Reads the config of the run in a workdir."""
    return load_config(absolute(workdir))
