"""The training loop, which runs every stage."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from clu import metrics as clu_metrics
from clu import parameter_overview
from jax.sharding import Mesh

from sphere_ar_jax.data import batches as data_batches
from sphere_ar_jax.runtime import checkpoint, console, hosts, metric_writer, sharding
from sphere_ar_jax.runtime.console import Preempted, UserError
from sphere_ar_jax.training import state as training_state


class NonFiniteError(UserError):
    """The loss or the gradient is not finite any more."""


class Signals:
    """A context that notes SIGTERM and SIGINT instead of letting them end the process.

    A second signal of the same kind ends it.

    Attributes:
      arrived: the number of the signal that this process got, 0 for none.
    """

    def __enter__(self) -> Self:
        self.arrived = 0
        self._last: int | jax.Array = 0
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _: Any) -> None:
        self.arrived = number
        signal.signal(number, self._previous[signal.Signals(number)])

    def agreed(self, now: bool = False) -> int:
        """The number of a signal that reached any process, the same in all processes.

        All processes must call it at each step.

        Args:
          now: answer for this call. Otherwise the answer is one call late, so that the device is
            never idle.

        Returns:
          The signal's number, 0 for none.
        """
        before = self._last
        self._last = hosts.largest(self.arrived)
        return int(self._last if now else before)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


# The scalars of a step that must be finite, those of them that a stage has, in words.
_MUST_BE_FINITE = {
    'loss': 'loss',
    'grad_norm': 'gradient norm',
    'discriminator': "discriminator's loss",
    'disc_grad_norm': "discriminator's gradient norm",
}


class Watch(NamedTuple):
    """A look at the model from time to time while it is trained.

    Attributes:
      every: the number of steps between looks.
      look: called as look(step, state, `metric_writer.MetricWriter`).
    """

    every: int
    look: Callable[[int, training_state.TrainState, metric_writer.MetricWriter], Any]


def _check_finite(
    scalars: training_state.Scalars,
    step: int,
    checkpoints: checkpoint.Checkpoints,
    stage: training_state.Stage,
) -> None:
    """Waits for a step, and checks that its losses and gradients are finite.

    If they are not, a checkpoint of the step before holds the very parameters that failed, so it is
    set aside.

    Raises:
      NonFiniteError: they are not.
    """
    checked = [name for name in _MUST_BE_FINITE if name in scalars]
    if all(math.isfinite(float(scalars[name])) for name in checked):
        return
    failed = [s for s in checkpoints.steps() if s == step - 1]
    checkpoints.set_aside(failed)
    steps = checkpoints.steps()
    last = 'there is no checkpoint to go on from'
    if steps:
        last = f'the last good checkpoint, step {steps[-1]}, was not touched'
    if failed:
        last += (
            f' (that of step {step - 1} has the weights that failed, and is now damaged-{step - 1})'
        )
    section = f'{stage.name}_training'
    remedy = f'a lower --config.{section}.learning_rate'
    if stage.options.final_learning_rate > 0.5 * stage.options.learning_rate:
        remedy += f', and a --config.{section}.final_learning_rate that is not above it'
    values = ', '.join(f'{_MUST_BE_FINITE[name]} {scalars[name]}' for name in checked)
    raise NonFiniteError(
        f'{stage.name}: {values} at step {step}; {last}. Try the same command with {remedy}'
    )


def _averages(scalars: training_state.Scalars) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Averages of the scalars of steps, by clu.

    Returns:
      (an empty collection, a function that adds one step's scalars to a collection).
    """
    names = {name: clu_metrics.Average.from_output(name) for name in scalars}
    collection = clu_metrics.Collection.create(**names)

    def add(averages, scalars):
        return averages.merge(collection.single_from_model_output(**scalars))

    return collection.empty(), jax.jit(add)


# The step from which a stage warns. Before, a warning would only say that the model is untrained.
_SETTLED = 500


class _Log:
    """What a stage logs: averages of its scalars since the last line, its speed and warnings."""

    def __init__(self, stage: training_state.Stage, writer: metric_writer.MetricWriter) -> None:
        self._stage = stage
        self._writer = writer
        self._warned: str | None = None

    def start(self, step: int, scalars: training_state.Scalars) -> None:
        """Begins once the first step is computed, so that the speed leaves out compilation."""
        self._empty, self._accumulate = _averages(scalars)
        self._averages = self._empty
        jax.block_until_ready(scalars)
        self.restart_clock(step)

    def restart_clock(self, step: int) -> None:
        """Measures the speed from this step on."""
        self._since = step
        self._time = time.perf_counter()

    def add(self, scalars: training_state.Scalars) -> None:
        """Takes in the scalars of one step."""
        self._averages = self._accumulate(self._averages, scalars)
        self._writer.advance()

    def write(self, step: int) -> None:
        """Writes a line of the averages up to a step, and a warning if they look wrong."""
        values = {name: float(value) for name, value in self._averages.compute().items()}
        if step > self._since:
            seconds = (time.perf_counter() - self._time) / (step - self._since)
            values['seconds_per_step'] = seconds
            values['images_per_second'] = self._stage.options.batch_size / seconds
        self._writer.write(step, values, self._stage.shown)
        wrong = self._stage.warn(values) if step >= _SETTLED else None
        if wrong and wrong != self._warned and hosts.is_first():
            print(f'{self._stage.name}: step {step}: {wrong}', file=sys.stderr)
        self._warned = wrong
        self._averages = self._empty
        self.restart_clock(step)


def _say_what_is_not_split(stage: training_state.Stage, mesh: Mesh, abstract: Any) -> None:
    """Prints a line where the mesh cannot split a stage's state as `sharding.RULES` ask."""
    said = sharding.describe_not_split(mesh, abstract)
    if said:
        print(f'{stage.name}: {said}', flush=True)


def _begin(
    stage: training_state.Stage,
    checkpoints: checkpoint.Checkpoints,
    directory: str,
    abstract: Any,
    frozen: dict[str, Any],
    seed: int,
) -> tuple[Any, dict[str, Any] | None, float]:
    """Restores the newest checkpoint of a stage, or makes the state of its start.

    `abstract` and `frozen` are the stage's `state.abstract_state` and `state.frozen_identity`.

    Returns:
      (state, data_state, seconds). data_state is what the checkpoint notes beside the state, None
        without a checkpoint. The seconds are those of earlier starts.
    """
    restored = checkpoints.restore(abstract)
    if restored is not None:
        state, data_state, seconds = restored
        training_state.check_frozen(stage, frozen, data_state, directory)
        print(f'{stage.name}: goes on from step {int(state.step)}', flush=True)
        return state, data_state, seconds
    state = training_state.initialise(stage, abstract, seed)
    if stage.begin is None:
        weights = training_state.converted(directory, abstract.params)
    else:
        weights = stage.begin(state.params)
    if weights is not None:
        state = state.replace(params=weights, ema=training_state.copies(weights, len(state.ema)))
    overview = parameter_overview.get_parameter_overview(
        state.params, include_stats=False, max_lines=12
    )
    print(overview, flush=True)
    return state, None, 0.0


class _Step:
    """The step of a stage, which is chosen when the first batch is there.

    Attributes:
      without_remat: what was chosen, see `state.step_for_memory`; None before the first step of a
        run.
    """

    def __init__(
        self,
        stage: training_state.Stage,
        mesh: Mesh,
        seed: int,
        abstract: Any,
        data_state: dict[str, Any] | None,
    ):
        """Prepares the step.

        Args:
          stage: the stage.
          mesh: the mesh that it runs on.
          seed: the seed of all draws.
          abstract: the stage's state, abstract.
          data_state: what the checkpoint notes that the run goes on from; None where it begins.
        """
        self.without_remat: bool | None = None
        if data_state is not None:
            self.without_remat = data_state.get('without_remat', False)
        self._stage = stage
        self._mesh = mesh
        self._seed = np.uint32(seed)
        self._abstract = abstract
        self._run: Any = None

    def __call__(self, state: Any, batch: training_state.Batch) -> tuple[Any, Any]:
        """Takes one step: (state, batch) → (state, scalars)."""
        arguments = (self._stage.frozen, batch, self._seed)
        if self._run is None:
            chosen = training_state.step_for_memory(
                self._stage, self._mesh, (self._abstract, *arguments), self.without_remat
            )
            self._run = chosen.run
            self.without_remat = chosen.without_remat
            if chosen.text:
                print(f'{self._stage.name}: {chosen.text}', flush=True)
        return self._run(state, *arguments)


def train(
    stage: training_state.Stage,
    source: Any,
    directory: str,
    *,
    seed: int,
    mesh: Mesh,
    reading: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    logs: metric_writer.Logs = metric_writer.DEFAULT,
) -> tuple[Any, float]:
    """Runs a stage to its last step.

    It goes on from its newest whole checkpoint. Without one it begins with the weights of
    `state.converted`, or else with fresh ones. The result is a function of (config, seed) alone:
    however often the run was killed and started again, the state is the same bit for bit on the
    same machine. Only logged averages differ where a start falls between two log lines, and a look
    is left out where the run was stopped between its save and its end. All processes of a run call
    it. On another number of processes or another mesh, the state is the same up to rounding.

    Args:
      stage: the stage.
      source: the images, see `data.batches.batches`.
      directory: where checkpoints, events and metrics.jsonl go.
      seed: seed of the initialisation, of the order of the data and of all draws.
      mesh: see `sharding`.
      reading: further arguments of `data.batches.batches`: transform, threads, workers, max_broken.
      watch: a look at the model from time to time.
      logs: where its numbers and pictures go besides metrics.jsonl.

    Returns:
      (the state, the seconds it took, with those of earlier starts up to their last checkpoint).

    Raises:
      NonFiniteError: the loss or the gradient is not finite.
      Preempted: a signal arrived.
      UserError: the checkpoints cannot be read or written, or belong to another tokenizer or other
        data, or the images cannot be read.
      OSError: what is logged cannot be written.
    """
    options = stage.options
    started = time.perf_counter()
    abstract = training_state.abstract_state(stage, mesh)
    _say_what_is_not_split(stage, mesh, abstract)
    checkpoints = checkpoint.Checkpoints(
        f'{directory}/checkpoints', options.keep, options.keep_every
    )
    frozen = training_state.frozen_identity(stage)
    state, data_state, before = _begin(stage, checkpoints, directory, abstract, frozen, seed)
    step = int(state.step)
    if step >= options.steps:
        checkpoints.close()
        return state, before
    started -= before  # as if earlier starts had come right before this one
    batches = data_batches.batches(
        source,
        batch_size=options.batch_size,
        seed=seed,
        first_step=step,
        rows=sharding.local_rows(mesh, options.batch_size),
        **(reading or {}),
    )
    if data_state is not None:
        batches.check_state(data_state['batches'])
    step_fn = _Step(stage, mesh, seed, abstract, data_state)
    pending = None  # the scalars of the step before

    with contextlib.ExitStack() as stack:  # One that fails does not keep the others open.
        stack.callback(console.interrupts.keep, False)
        stack.callback(batches.close)
        stack.callback(checkpoints.close)
        writer = metric_writer.MetricWriter(directory, stage.name, step, options.steps, logs)
        stack.callback(writer.close)
        log = _Log(stage, writer)
        print(f'{stage.name}: compiling', flush=True)
        with Signals() as signals:
            while step < options.steps:
                batch = sharding.place_batch(mesh, next(batches))
                state, scalars = step_fn(state, batch)
                if pending is None:
                    log.start(step + 1, scalars)
                    console.interrupts.keep(True)  # From here on there is a state to lose.
                else:  # The check is one step late, so that the device is never idle.
                    _check_finite(pending, step, checkpoints, stage)
                step += 1
                pending = scalars
                log.add(scalars)
                last = step == options.steps
                if step % options.log_every == 0 or last:
                    log.write(step)
                arrived = signals.agreed()
                if step % options.checkpoint_every == 0 or last or arrived:
                    # Nothing that is not finite is ever saved.
                    _check_finite(pending, step, checkpoints, stage)
                    noted = {
                        'batches': batches.get_state(),
                        'frozen': frozen,
                        'without_remat': step_fn.without_remat,
                    }
                    writer.flush()
                    checkpoints.save(step, state, noted, time.perf_counter() - started)
                if arrived:
                    raise Preempted(arrived, step, options.steps)
                # After the save, so that a look that fails loses no steps.
                if watch is not None and step % watch.every == 0:
                    watch.look(step, state, writer)
                    log.restart_clock(step)
            checkpoints.wait()
            # A signal may have arrived at the last step, or while its state was saved.
            arrived = signals.agreed(now=True)
            if arrived:
                raise Preempted(arrived, step, options.steps)
    return state, time.perf_counter() - started
