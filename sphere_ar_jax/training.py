"""Training: the state, the two step factories and the one loop (spec §8).

Dimensions:
  B  images of the global batch; `batch` is {'image': (B, H, W, c), 'label': (B,)}
"""

import dataclasses
import json
import math
import signal
import sys
import time
import zlib
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from clu import parameter_overview

from sphere_ar_jax import checkpoint, data, flow, hosts, losses, metric_writer, optimizer, perceptual, sharding


class NonFiniteError(RuntimeError):
    """The loss or the gradient is no number any more."""


class Preempted(RuntimeError):
    """A signal (number) arrived; the state has been saved."""

    def __init__(self, number, step, steps):
        super().__init__(f'{signal.Signals(number).name}: saved at step {step} of {steps}; the same command goes on')
        self.number = number


class TrainState(flax.struct.PyTreeNode):
    """step () int32, the parameters, the optimizer's state, and EMAs of the parameters: a tuple, one for each rate."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any

    @property
    def eval_params(self):
        """What sampling and evaluation use: the EMA of the first rate where there is one."""
        return self.ema[0] if self.ema else self.params


class Stage(NamedTuple):
    """One of the two trainings.

    Attributes:
      name: also its directory. options: its section of the config. init: key → TrainState.
      step: (state, frozen, batch) → (state, scalars). frozen: parameters that it reads but does not train.
      shown: the scalars for the console. about: what the frozen parameters are, for messages. warn: function of logged
      scalars → what is wrong with them in words, or None. model: the frozen parameters' module, noted in checkpoints.
    """

    name: str
    options: Any
    init: Any
    step: Any
    frozen: Any
    shown: tuple
    about: str = ''
    warn: Any = lambda scalars: None
    model: Any = None


class Watch(NamedTuple):
    """Every so many steps of a training, look(step, eval_params, `metric_writer.MetricWriter`) is called."""

    every: int
    look: Any


def ema_decays(options):
    """The rates of a stage's EMAs, the first of them the one to sample with."""
    return ((options.ema_decay,) if options.ema_decay else ()) + tuple(options.more_ema_decays)


def value_and_grad(loss, parts):
    """`jax.value_and_grad` of a loss (params, frozen, batch, keys) → (loss, scalars), as the mean over `parts` pieces
    of the batch, of which one is in memory at a time."""
    compute = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return compute

    def mean(params, frozen, batch, keys):
        # every parts-th row: pieces are split over the devices as the batch is
        split = lambda a: a.reshape(len(a) // parts, parts, *a.shape[1:]).swapaxes(0, 1)
        pieces = jax.tree.map(split, (batch, keys))
        run = lambda piece: compute(params, frozen, *piece)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, jax.tree.map(lambda a: a[0], pieces))
        )
        total, _ = jax.lax.scan(lambda total, piece: (jax.tree.map(jnp.add, total, run(piece)), None), zeros, pieces)
        return jax.tree.map(lambda x: x / parts, total)

    return mean


def build_optimizer(options):
    """(schedule, optimizer) of a stage's options, see `optimizer`."""
    schedule = optimizer.learning_rate(
        options.learning_rate, options.warmup_steps, options.steps, options.final_learning_rate
    )
    tx = optimizer.adamw(
        schedule, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay, clip_norm=options.clip_norm
    )
    return schedule, tx


def _stage(name, options, seed, init_params, loss, frozen, shown, about=''):
    """A Stage from its loss (params, frozen, batch, keys (B,)) → (loss, scalars)."""
    schedule, tx = build_optimizer(options)
    decays, compute = ema_decays(options), value_and_grad(loss, options.accumulate)

    def init(key):
        params = init_params(key)
        return TrainState(jnp.int32(0), params, tx.init(params), copies(params, decays))

    def step(state, frozen, batch):
        keys = losses.sample_keys(jax.random.key(seed), state.step, len(batch['label']))
        (value, scalars), grads = compute(state.params, frozen, batch, keys)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_emas(state.ema, params, decays)
        scalars |= dict(loss=value, grad_norm=optax.tree.norm(grads), learning_rate=schedule(state.step))
        return TrainState(state.step + 1, params, opt_state, ema), scalars

    return Stage(name, options, init, step, frozen, shown, about)


def copies(params, decays):
    """The EMAs at the start: a copy of the parameters for each rate."""
    return tuple(jax.tree.map(jnp.copy, params) for _ in decays)


def update_emas(emas, params, decays):
    """Each EMA by its rate, see `optimizer.update_ema`."""
    return tuple(optimizer.update_ema(ema, params, decay) for ema, decay in zip(emas, decays, strict=True))


def tokenizer_weights(vae, options, lpips_params):
    """The weights of `losses.reconstruction_loss`, and LPIPS, computed in the S-VAE's dtype.

    Raises ValueError where LPIPS has a weight but no parameters.
    """
    if options.perceptual_weight and lpips_params is None:
        raise ValueError('there are no lpips_params for the perceptual loss: give them, or perceptual_weight=0')
    return dict(
        kl_weight=options.kl_weight, l2_weight=options.l2_weight, perceptual_weight=options.perceptual_weight,
        distance=lambda a, b: perceptual.LPIPS(vae.dtype).apply({'params': lpips_params}, a, b),
    )  # fmt: skip


def tokenizer_stage(vae, options, seed, lpips_params=None):
    """Trains the S-VAE by `losses.tokenizer_loss`; lpips_params: of `perceptual.LPIPS`, where it has a weight."""

    def loss(params, lpips_params, batch, keys):
        draws = lambda posterior: losses.posterior_draws(keys, posterior)
        weights = tokenizer_weights(vae, options, lpips_params)
        return losses.tokenizer_loss(vae, params, batch['image'], draws, **weights)

    shown = 'loss', 'psnr', 'kl', 'kappa'
    stage = _stage('tokenizer', options, seed, vae.init_params, loss, lpips_params, shown, 'LPIPS network')
    return stage._replace(warn=losses.collapse)


def ar_stage(ar, vae, vae_params, options, seed):
    """Trains the AR model by `losses.flow_loss` on tokens drawn afresh at each step from the frozen S-VAE.

    With options.encoder_dtype the S-VAE computes in that; its tokens are float32 all the same.
    """
    if options.encoder_dtype:
        vae = vae.clone(dtype=jnp.dtype(options.encoder_dtype))

    def loss(params, vae_params, batch, keys):
        posterior_keys, flow_keys, label_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        z, _ = losses.draw_tokens(vae, vae_params, batch['image'], posterior_keys)
        draws = losses.flow_draws(flow_keys, options.copies, *z.shape[1:])
        class_id = losses.drop_labels(label_keys, batch['label'], ar.num_classes, options.label_dropout)
        return losses.flow_loss(ar, params, class_id, z, *draws)

    shown = 'loss', 'grad_norm', 'token_norm'
    return _stage('ar', options, seed, ar.init_params, loss, vae_params, shown, 'tokenizer')._replace(model=vae)


def distillation_stage(ar, vae, vae_params, ar_params, options, seed):
    """Trains a head of few evaluations by `losses.distillation_loss`, from the trained head of a frozen AR model.

    ar: with average=True. ar_params: of the trained model, average=False. The state holds the new head alone.
    """

    def init_head(key):
        return ar.init_params(key)['head'] | ar_params['head']  # only the embedding of the step's width is new

    def loss(head, frozen, batch, keys):
        vae_params, ar_params = frozen
        posterior_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        z, _ = losses.draw_tokens(vae, vae_params, batch['image'], posterior_keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(noise_keys)
        scales = flow.guidance_scales(options.guidance_scale, ar.num_tokens, options.guidance)
        return losses.distillation_loss(
            ar, head, ar_params, batch['label'], z, noise, scales, options.levels, options.teacher_steps
        )

    frozen = vae_params, ar_params
    return _stage('distillation', options, seed, init_head, loss, frozen, ('loss', 'one_step'), 'tokenizer or teacher')


def frozen_identity(stage):
    """What a checkpoint notes of the parameters that a stage does not train, {} where there are none.

    weights: a hash, 8 hexadecimal digits, of all their bits. model: its options, where the stage names a module.
    """
    if not jax.tree.leaves(stage.frozen):
        return {}
    weights = f'{zlib.crc32(json.dumps(checkpoint.fingerprint(stage.frozen)).encode()):08x}'
    how = ('parent', 'name', 'dtype', 'remat', 'unroll')  # it is computed, not what
    fields = dataclasses.fields(stage.model) if stage.model is not None else ()
    model = {field.name: getattr(stage.model, field.name) for field in fields if field.name not in how}
    return json.loads(json.dumps({'weights': weights, 'model': model}))  # tuples become lists


class FrozenError(ValueError):
    """A checkpoint was trained on another tokenizer (or teacher) than the one that is there now."""


def check_frozen(stage, here, data_state, directory):
    """Raises FrozenError unless the checkpoint's frozen parameters, by its `data_state`, are those of the stage, whose
    `frozen_identity` is `here`."""
    trained_on = data_state.get('frozen', {})
    if here and trained_on != here:
        old, new = trained_on.get('model', {}), here['model']
        changed = [f'{name} {old.get(name)} → {new[name]}' for name in new if old.get(name) != new[name]]
        what = '; '.join([f'weights {trained_on.get("weights")} → {here["weights"]}', *changed])
        raise FrozenError(f'{directory} was trained on another {stage.about} than is given ({what})')


def abstract_state(stage, mesh):
    """The shapes, dtypes and shardings of a stage's state."""
    return sharding.abstract(mesh, jax.eval_shape(stage.init, jax.random.key(0)))


def jitted_step(stage, mesh, state):
    """The step of a stage, to be compiled for a mesh; its result takes the place of the state that it is given.

    state: laid out on the mesh, abstract or not."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = sharding.keep_rows_split(mesh, stage.step)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


class _Signals:
    """While open, SIGTERM and SIGINT are noted in `arrived` instead of ending the process; a second one ends it."""

    def __enter__(self):
        self.arrived = self._last = 0
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, _):
        self.arrived = number
        signal.signal(number, self._previous[number])

    def agreed(self, now=False):
        """The number of a signal that reached any process, 0 for none: the same in all, which call it at each step.

        It is one call late, so that the device is never idle, but for `now`."""
        before, self._last = self._last, hosts.largest(self.arrived)
        return int(self._last if now else before)

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _check_finite(scalars, step, checkpoints, stage):
    """Raises NonFiniteError where the loss or the gradient of `step` is not finite. Waits for that step.

    A checkpoint of the step before holds the very parameters that failed: it is set aside.
    """
    if all(math.isfinite(float(scalars[name])) for name in ('loss', 'grad_norm')):
        return
    checkpoints.set_aside([s for s in checkpoints.steps() if s == step - 1])
    steps = checkpoints.steps()
    last = f'the last good checkpoint, step {steps[-1]}, was not touched' if steps else 'there is no checkpoint yet'
    raise NonFiniteError(
        f'{stage.name}: loss {scalars["loss"]}, gradient norm {scalars["grad_norm"]} at step {step}; {last}. '
        f'Try the same command with a lower --config.{stage.name}_training.learning_rate'
    )


def _averages(scalars):
    """clu averages of a step's scalars: (empty collection, function that takes one step's scalars in)."""
    names = {name: clu_metrics.Average.from_output(name) for name in scalars}
    collection = clu_metrics.Collection.create(**names)
    return collection.empty(), jax.jit(lambda a, s: a.merge(collection.single_from_model_output(**s)))


def converted(directory, like):
    """The parameters that a PyTorch checkpoint was converted to in a stage's directory, or None; `like`: abstract."""
    weights = checkpoint.Checkpoints(f'{directory}/weights', read_only=True)
    found = weights.restore(like)
    weights.close()
    return None if found is None else found[0]


_SETTLED = 500  # steps, before which a stage's warnings are of an untrained model


def train(stage, source, directory, *, seed, mesh, reading=None, watch=None):
    """Runs a stage from its newest whole checkpoint, or from `converted` weights, or from the start, to its last step.

    A function of (config, seed) alone: however often it was killed and started again, the state is the same bit for bit
    on the same machine. (Only logged averages differ where a start falls between two log lines.) All processes of a run
    call it; on other numbers of them, or another mesh, the state is the same up to rounding.

    Args:
      stage: `Stage`. source: see `data`. directory: for checkpoints, events and metrics.jsonl. seed: of
      initialisation and data order. mesh: see `sharding`. reading: a dict of what else `data.batches` takes: transform,
      threads, workers, max_broken. watch: `Watch` or None.
    Returns:
      (state, seconds it took, those of earlier starts up to their last checkpoint included).
    Raises:
      NonFiniteError, Preempted, FrozenError, checkpoint.DamagedError, data.DataError.
    """
    options, started = stage.options, time.perf_counter()
    abstract = abstract_state(stage, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if said := sharding.describe_not_split(mesh, abstract):
        print(f'{stage.name}: {said}', flush=True)
    checkpoints = checkpoint.Checkpoints(f'{directory}/checkpoints', options.keep, options.keep_every)
    restored = checkpoints.restore(abstract)
    before, frozen = 0.0, frozen_identity(stage)
    if restored is None:
        state = jax.jit(stage.init, out_shardings=shardings)(jax.random.key(seed))
        weights = converted(directory, abstract.params)
        if weights is not None:
            state = state.replace(params=weights, ema=copies(weights, state.ema))
        print(parameter_overview.get_parameter_overview(state.params, include_stats=False, max_lines=12), flush=True)
    else:
        state, data_state, before = restored
        check_frozen(stage, frozen, data_state, directory)
        print(f'{stage.name}: goes on from step {int(state.step)}', flush=True)
    elapsed = lambda: before + time.perf_counter() - started
    step = int(state.step)
    if step >= options.steps:
        checkpoints.close()
        return state, before
    batches = data.batches(
        source, batch_size=options.batch_size, seed=seed, first_step=step,
        rows=sharding.local_rows(mesh, options.batch_size), **reading or {},
    )  # fmt: skip
    if restored is not None:
        batches.check_state(data_state['batches'])
    step_fn = jitted_step(stage, mesh, abstract)
    writer = metric_writer.MetricWriter(directory, stage.name, step, options.steps)
    pending = warned = None
    print(f'{stage.name}: compiling', flush=True)

    try:
        with _Signals() as signals:
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
                        values |= dict(seconds_per_step=seconds, images_per_second=options.batch_size / seconds)
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
                    _check_finite(pending, step, checkpoints, stage)  # nothing that is not finite is ever saved
                    checkpoints.save(step, state, {'batches': batches.get_state(), 'frozen': frozen}, elapsed())
                if arrived:
                    raise Preempted(arrived, step, options.steps)
            checkpoints.wait()
            if arrived := signals.agreed(now=True):  # at the last step, or while its state was saved
                raise Preempted(arrived, step, options.steps)
    finally:
        batches.close()
        checkpoints.close()
        writer.close()
    return state, elapsed()
