"""The one training loop."""

import math
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
from clu import metrics as clu_metrics
from clu import parameter_overview

from sphere_ar_jax.data import batches as data_batches
from sphere_ar_jax.runtime import checkpoint, hosts, metric_writer, sharding
from sphere_ar_jax.runtime.console import Preempted, UserError
from sphere_ar_jax.training import state as training_state


class NonFiniteError(UserError):
    """The loss or the gradient is no number any more."""


class Signals:
    """While open, SIGTERM and SIGINT are noted in `arrived` instead of ending the process; a second
    one ends it.
    """

    def __enter__(self):
        self.arrived = self._last = 0
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, _):
        self.arrived = number
        signal.signal(number, self._previous[number])

    def agreed(self, now=False):
        """The number of a signal that reached any process, 0 for none: the same in all, which call
        it at each step.

        It is one call late, so that the device is never idle, but for `now`."""
        before, self._last = self._last, hosts.largest(self.arrived)
        return int(self._last if now else before)

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Watch(NamedTuple):
    """Every so many steps of a training, look(step, eval_params, `metric_writer.MetricWriter`) is
    called.
    """

    every: int
    look: Any


def _check_finite(scalars, step, checkpoints, stage):
    """Raises NonFiniteError where the loss or the gradient of `step` is not finite. Waits for that
    step.

    A checkpoint of the step before holds the very parameters that failed: it is set aside.
    """
    if all(math.isfinite(float(scalars[name])) for name in ('loss', 'grad_norm')):
        return
    checkpoints.set_aside([s for s in checkpoints.steps() if s == step - 1])
    steps = checkpoints.steps()
    last = (
        f'the last good checkpoint, step {steps[-1]}, was not touched'
        if steps
        else 'there is no checkpoint yet'
    )
    raise NonFiniteError(
        f'{stage.name}: loss {scalars["loss"]}, gradient norm {scalars["grad_norm"]} at step {step}; {last}. '
        f'Try the same command with a lower --config.{stage.name}_training.learning_rate'
    )


def _averages(scalars):
    """clu averages of a step's scalars: (empty collection, function that takes one step's scalars
    in).
    """
    names = {name: clu_metrics.Average.from_output(name) for name in scalars}
    collection = clu_metrics.Collection.create(**names)
    return collection.empty(), jax.jit(
        lambda a, s: a.merge(collection.single_from_model_output(**s))
    )


_SETTLED = 500  # steps, before which a stage's warnings are of an untrained model


def train(stage, source, directory, *, seed, mesh, reading=None, watch=None):
    """Runs a stage from its newest whole checkpoint, or from `converted` weights, or from the
    start, to its last step.

    A function of (config, seed) alone: however often it was killed and started again, the state is
    the same bit for bit on the same machine. (Only logged averages differ where a start falls
    between two log lines.) All processes of a run call it; on other numbers of them, or another
    mesh, the state is the same up to rounding.

    Args:
      stage: `Stage`. source: see `data`. directory: for checkpoints, events and metrics.jsonl.
        seed: of
      initialisation and data order. mesh: see `sharding`. reading: a dict of what else
      `batches.batches` takes: transform, threads, workers, max_broken. watch: `Watch` or None.
    Returns:
      (state, seconds it took, those of earlier starts up to their last checkpoint included).
    Raises:
      NonFiniteError, Preempted, UserError.
    """
    options, started = stage.options, time.perf_counter()
    abstract = training_state.abstract_state(stage, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if said := sharding.describe_not_split(mesh, abstract):
        print(f'{stage.name}: {said}', flush=True)
    checkpoints = checkpoint.Checkpoints(
        f'{directory}/checkpoints', options.keep, options.keep_every
    )
    restored = checkpoints.restore(abstract)
    before, frozen = 0.0, training_state.frozen_identity(stage)
    if restored is None:
        state = training_state.initialise(stage, shardings, seed)
        weights = training_state.converted(directory, abstract.params)
        if weights is not None:
            state = state.replace(params=weights, ema=training_state.copies(weights, state.ema))
        print(
            parameter_overview.get_parameter_overview(
                state.params, include_stats=False, max_lines=12
            ),
            flush=True,
        )
    else:
        state, data_state, before = restored
        training_state.check_frozen(stage, frozen, data_state, directory)
        print(f'{stage.name}: goes on from step {int(state.step)}', flush=True)
    elapsed = lambda: before + time.perf_counter() - started
    step = int(state.step)
    if step >= options.steps:
        checkpoints.close()
        return state, before
    batches = data_batches.batches(
        source, batch_size=options.batch_size, seed=seed, first_step=step,
        rows=sharding.local_rows(mesh, options.batch_size), **reading or {},
    )  # fmt: skip
    if restored is not None:
        batches.check_state(data_state['batches'])
    step_fn = training_state.jitted_step(stage, mesh, abstract)
    writer = metric_writer.MetricWriter(directory, stage.name, step, options.steps)
    pending = warned = None
    print(f'{stage.name}: compiling', flush=True)

    try:
        with Signals() as signals:
            while step < options.steps:
                batch = sharding.place_batch(mesh, next(batches))
                state, scalars = step_fn(state, stage.frozen, batch)
                if pending is None:
                    empty, accumulate = _averages(scalars)
                    averages = empty
                    jax.block_until_ready(scalars)
                    mark = step + 1, time.perf_counter()  # compilation is no training speed
                else:  # one step late, so that the device is never idle
                    _check_finite(pending, step, checkpoints, stage)
                step, pending = step + 1, scalars
                averages = accumulate(averages, scalars)
                writer.advance()
                if step % options.log_every == 0 or step == options.steps:
                    values = {name: float(value) for name, value in averages.compute().items()}
                    if step > mark[0]:
                        seconds = (time.perf_counter() - mark[1]) / (step - mark[0])
                        values |= dict(
                            seconds_per_step=seconds, images_per_second=options.batch_size / seconds
                        )
                    writer.write(step, values, stage.shown)
                    wrong = stage.warn(values) if step >= _SETTLED else None
                    if wrong and wrong != warned and hosts.is_first():
                        print(f'{stage.name}: step {step}: {wrong}', file=sys.stderr)
                    warned = wrong
                    averages, mark = empty, (step, time.perf_counter())
                if watch is not None and step % watch.every == 0:
                    watch.look(step, state.eval_params, writer)
                    mark = step, time.perf_counter()
                arrived = signals.agreed()
                if step % options.checkpoint_every == 0 or step == options.steps or arrived:
                    _check_finite(
                        pending, step, checkpoints, stage
                    )  # nothing that is not finite is ever saved
                    checkpoints.save(
                        step, state, {'batches': batches.get_state(), 'frozen': frozen}, elapsed()
                    )
                if arrived:
                    raise Preempted(arrived, step, options.steps)
            checkpoints.wait()
            if arrived := signals.agreed(
                now=True
            ):  # at the last step, or while its state was saved
                raise Preempted(arrived, step, options.steps)
    finally:
        batches.close()
        checkpoints.close()
        writer.close()
    return state, elapsed()
