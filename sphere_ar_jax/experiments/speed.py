"""Steps per second of the rows' tokenizers, measured in turns (claim 4)."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, experiments
from sphere_ar_jax.experiments import runs
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.training import state as training_state

# Each row makes so many steps before it is the next one's turn.
STEPS = 10
# So many turns each row has. Its time is the median of them.
TURNS = 7


def _steps(cfg: ConfigDict, mesh: Mesh) -> Callable[[], None]:
    """A function that makes `STEPS` training steps of a config's tokenizer and waits for them."""
    stage = runs.tokenizer_stage(cfg)
    abstract = training_state.abstract_state(stage, mesh)
    state: Any = training_state.initialise(stage, abstract, cfg.seed)
    train = build.open_data_set(cfg).train
    examples = [train[i % len(train)] for i in range(cfg.tokenizer_training.batch_size)]
    images = np.stack([example['image'] for example in examples])
    labels = np.stack([example['label'] for example in examples])
    batch = sharding.place_batch(mesh, {'image': images, 'label': labels})
    step = training_state.jitted_step(stage, mesh, abstract)

    def run() -> None:
        nonlocal state
        for _ in range(STEPS):
            state, _ = step(state, stage.frozen, batch, np.uint32(cfg.seed))
        jax.block_until_ready(state)

    return run


def measure(config: ConfigDict, seed: int, mesh: Mesh) -> dict[str, float]:
    """Times the training steps of all rows' tokenizers, one row after the other and round again.

    So all rows see the same machine, whatever else it does.

    Args:
      config: the experiment's config.
      seed: the seed of the rows.
      mesh: the devices.

    Returns:
      {row: steps per second}.
    """
    steps = {row: _steps(experiments.row(config, row, seed), mesh) for row in config.rows}
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    for run in steps.values():
        run()  # compiles
    for _ in range(TURNS):
        for row, run in steps.items():
            started = time.perf_counter()
            run()
            seconds[row].append(time.perf_counter() - started)
    return {row: STEPS / statistics.median(times) for row, times in seconds.items()}
