"""The state of a training, and what a training stage is.

Dimensions:
  B  images of the global batch; `batch` is {'image': (B, H, W, c), 'label': (B,)}, or has latents
     in place of the images, see `vae.batch_posterior`
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from sphere_ar_jax.runtime import checkpoint, console, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import losses, optimizer

# One step's images and labels.
Batch: TypeAlias = dict[str, Any]
# What one step has to log, each () float32.
Scalars: TypeAlias = dict[str, jax.Array]
# A loss, called as loss(params, frozen, batch, keys).
Loss: TypeAlias = Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, Scalars]]


class TrainState(flax.struct.PyTreeNode):
    """The state of a training.

    Attributes:
      step: () int32, the number of steps done.
      params: the parameters.
      opt_state: the optimizer's state.
      ema: EMAs of the parameters, a tuple with one for each rate.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any

    @property
    def eval_params(self) -> PyTree:
        """The parameters to sample with: the EMA of the first rate, if there is one."""
        return self.ema[0] if self.ema else self.params


def _same(params: PyTree) -> PyTree:
    """The parameters that a stage trains, where they are those of the model."""
    return params


def no_warning(scalars: dict[str, float]) -> str | None:
    """Finds nothing wrong in the logged scalars."""
    del scalars
    return None


class Stage(NamedTuple):
    """One of the trainings: of the tokenizer, of the AR model, or of a distilled head.

    Attributes:
      name: its name, also that of its directory.
      options: its section of the config.
      init: key → `TrainState`.
      step: (state, frozen, batch, seed) → (state, scalars). The seed is that of all draws. The
        compiled program takes it as an argument, so that runs of other seeds find it in the
        compilation cache.
      frozen: parameters that it reads but does not train.
      shown: names of the scalars that the console shows, where the stage's loss has them.
      about: what the frozen parameters are, for messages.
      warn: logged scalars → what is wrong with them in words, or None.
      model: the module of the frozen parameters, which checkpoints note, or None.
      loss: the loss without an update, for images that are held out, or None.
      begin: fresh parameters → those that the training begins with. None begins with converted
        weights where there are any, and else with the fresh ones.
      to_model: the parameters that are trained → those of the whole model.
      without_remat: the same stage in fewer operations and more memory, or None; see
        `step_for_memory`.
    """

    name: str
    options: ConfigDict
    init: Callable[[jax.Array], Any]
    step: Callable[..., tuple[Any, Scalars]]
    frozen: PyTree
    shown: tuple[str, ...]
    about: str = ''
    warn: Callable[[dict[str, float]], str | None] = no_warning
    model: Any = None
    loss: Loss | None = None
    begin: Callable[[PyTree], PyTree] | None = None
    to_model: Callable[[PyTree], PyTree] = _same
    without_remat: 'Stage | None' = None


def ema_decays(options: ConfigDict) -> tuple[float, ...]:
    """The rates of a stage's EMAs, the one to sample with first."""
    first = (options.ema_decay,) if options.ema_decay else ()
    return first + tuple(options.more_ema_decays)


def value_and_grad(loss: Loss, parts: int) -> Callable[..., tuple[tuple[jax.Array, Scalars], Any]]:
    """`jax.value_and_grad` of a loss, as the mean over pieces of the batch.

    The pieces are computed one after the other, so that activations are kept for one at a time.

    Args:
      loss: the loss; its value and scalars are means over images.
      parts: number of the pieces, a divisor of B.

    Returns:
      A function (params, frozen, batch, keys) → ((loss, scalars), gradient).
    """
    compute = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return compute

    def mean(params, frozen, batch, keys):
        def split(a):
            # A piece has every parts-th row, so that it is split over the devices as the batch is.
            return a.reshape(len(a) // parts, parts, *a.shape[1:]).swapaxes(0, 1)

        def run(piece):
            return compute(params, frozen, *piece)

        def add(total, piece):
            return jax.tree.map(jnp.add, total, run(piece)), None

        pieces = jax.tree.map(split, (batch, keys))
        shapes = jax.eval_shape(run, jax.tree.map(lambda a: a[0], pieces))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, pieces)
        return jax.tree.map(lambda x: x / parts, total)

    return mean


def build_optimizer(
    options: ConfigDict, scale: optax.GradientTransformation | None = None
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate's schedule and the optimizer of a stage's options.

    `scale`, if given, changes the optimizer's updates.
    """
    schedule = optimizer.learning_rate(
        options.learning_rate,
        options.warmup_steps,
        options.steps,
        options.final_learning_rate,
        tuple(options.restarts),
    )
    tx = optimizer.adamw(
        schedule,
        b1=options.b1,
        b2=options.b2,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
    )
    return schedule, tx if scale is None else optax.chain(tx, scale)


def make_stage(
    name: str,
    options: ConfigDict,
    init_params: Callable[[jax.Array], PyTree],
    loss: Loss,
    frozen: PyTree,
    shown: tuple[str, ...],
    scale: optax.GradientTransformation | None = None,
    **fields: Any,
) -> Stage:
    """Makes a stage that descends one loss.

    Args:
      name: see `Stage`.
      options: see `Stage`.
      init_params: key → parameters.
      loss: called with one key for each image, keys (B,).
      frozen: see `Stage`.
      shown: see `Stage`.
      scale: see `build_optimizer`.
      **fields: the other fields of `Stage`.

    Returns:
      The stage.
    """
    schedule, tx = build_optimizer(options, scale)
    decays = ema_decays(options)
    compute = value_and_grad(loss, options.accumulate)

    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        return TrainState(jnp.int32(0), params, tx.init(params), copies(params, len(decays)))

    def step(
        state: TrainState, frozen: PyTree, batch: Batch, seed: ArrayLike
    ) -> tuple[TrainState, Scalars]:
        size = len(jax.tree.leaves(batch)[0])
        keys = losses.sample_keys(jax.random.key(seed), state.step, size)
        (value, scalars), grads = compute(state.params, frozen, batch, keys)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_emas(state.ema, params, rates_now(options, state.step))
        scalars |= dict(
            loss=value, grad_norm=optax.tree.norm(grads), learning_rate=schedule(state.step)
        )
        return TrainState(state.step + 1, params, opt_state, ema), scalars

    return Stage(name, options, init, step, frozen, shown, loss=loss, **fields)


def copies(params: PyTree, count: int) -> tuple[PyTree, ...]:
    """So many copies of parameters, as which their EMAs begin."""
    return tuple(jax.tree.map(jnp.copy, params) for _ in range(count))


def ramped(decay: float, steps: jax.Array) -> jax.Array:
    """The rate of a ramped EMA at one step: min(decay, (1 + n)/(10 + n)), () float32.

    Args:
      decay: the rate that it rises to.
      steps: n, () int32, the optimizer steps that were done before this one: 0 at the first step,
        whose rate is 0.1.
    """
    n = steps.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def rates_now(options: ConfigDict, steps: jax.Array) -> tuple[float | jax.Array, ...]:
    """The rates of a stage's EMAs at one step, in the order of `ema_decays`.

    Args:
      options: the stage's section of the config.
      steps: () int32, the number of steps done before this one.
    """
    decays = ema_decays(options)
    if not options.ema_ramp:
        return decays
    return tuple(ramped(decay, steps) for decay in decays)


def update_emas(
    emas: Iterable[PyTree], params: PyTree, decays: Iterable[float | jax.Array]
) -> tuple[PyTree, ...]:
    """The next EMAs: decay·ema + (1 − decay)·params for each EMA and its rate.

    See `docs/method.md`, "EMA".
    """
    return tuple(
        optax.incremental_update(params, ema, 1 - decay)
        for ema, decay in zip(emas, decays, strict=True)
    )


def frozen_identity(stage: Stage) -> dict[str, Any]:
    """What a checkpoint notes of the parameters that a stage does not train.

    Returns:
      {} where there are none, else a dictionary of
        weights: a hash of all their bits, 8 hexadecimal digits.
        model: the options in which `Stage.model` differs from its defaults; {} where it is None.
    """
    if not jax.tree.leaves(stage.frozen):
        return {}
    weights = checkpoint.digest(stage.frozen)
    return {'weights': weights, 'model': {} if stage.model is None else _differing(stage.model)}


# Fields of a module that say how something is computed, not what.
_HOW = ('parent', 'name', 'dtype', 'remat', 'unroll', 'scan', 'fused')


def _options(module: Any) -> dict[str, Any]:
    """All options of a module and of the modules in it, by name, as JSON gives them back.

    The class of an inner module is an option too, under the name of its field.
    """
    found = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in _HOW:
            continue
        if dataclasses.is_dataclass(value):
            found[field.name] = type(value).__name__
            found |= _options(value)
        else:
            found[field.name] = value
    return json.loads(json.dumps(found))  # Tuples become lists.


def _differing(module: Any) -> dict[str, Any]:
    """The options of a module that differ from its defaults.

    Only these are noted, so that old runs stay valid when the module gets a new field.
    """
    defaults = _options(type(module)())
    return {name: value for name, value in _options(module).items() if value != defaults.get(name)}


def check_frozen(
    stage: Stage,
    here: dict[str, Any],
    data_state: dict[str, Any],
    directory: str | os.PathLike[str],
) -> None:
    """Checks that a checkpoint was trained on the frozen parameters of the stage.

    Args:
      stage: the stage.
      here: its `frozen_identity`.
      data_state: what the checkpoint notes.
      directory: the stage's directory, for the message.

    Raises:
      UserError: it was trained on others.
    """
    if not here:
        return
    trained_on = data_state.get('frozen', {})
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    if stage.model is not None:
        defaults = _options(type(stage.model)())
        known = _options(stage.model)
        noted = trained_on.get('model', {})
        # An older version of the model may have noted options that are gone.
        old = defaults | {name: value for name, value in noted.items() if name in known}
        new = defaults | here['model']
    changed = [
        f'{name} {old.get(name)} → {new.get(name)}'
        for name in old | new
        if old.get(name) != new.get(name)
    ]
    if trained_on.get('weights') != here['weights'] or changed:
        what = '; '.join([f'weights {trained_on.get("weights")} → {here["weights"]}', *changed])
        raise UserError(f'{directory} was trained on another {stage.about} than is given ({what})')


def abstract_state(stage: Stage, mesh: Mesh) -> Any:
    """The state of a stage as ShapeDtypeStructs that are laid out on a mesh."""
    return sharding.abstract(mesh, jax.eval_shape(stage.init, jax.random.key(0)))


def quickly_compiled() -> dict[str, Any]:
    """Options of `jax.jit` for a program that runs once.

    On CPUs LLVM then needs a sixth of the time for a tokenizer's initialisation, whose values stay
    the same bit for bit (BUILD_NOTES.md, "Tests"). A level that XLA_FLAGS names is kept.
    """
    option = 'xla_backend_optimization_level'
    if jax.default_backend() != 'cpu' or option in os.environ.get('XLA_FLAGS', ''):
        return {}
    return {'compiler_options': {option: 1}}


def initialise(stage: Stage, abstract: PyTree, seed: int) -> TrainState:
    """The state of a stage at its start, laid out as its `abstract_state` says."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(stage.init, out_shardings=shardings, **quickly_compiled())(jax.random.key(seed))


def jitted_step(stage: Stage, mesh: Mesh, state: Any) -> Any:
    """The jitted step of a stage. It donates the state: the result takes its memory.

    Args:
      stage: the stage.
      mesh: the mesh that the step runs on.
      state: the stage's state, abstract or not, laid out on the mesh.

    Returns:
      The function (state, frozen, batch, seed) → (state, scalars), not compiled yet; see `Stage`.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = sharding.keep_rows_split(mesh, stage.step)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


# The share of a device's memory that a step may take. The rest is for programs beside it.
ROOM = 0.8


class ChosenStep(NamedTuple):
    """The step that `step_for_memory` chose.

    Attributes:
      run: (state, frozen, batch, seed) → (state, scalars), jitted or compiled.
      without_remat: whether it is that of `Stage.without_remat`.
      text: what was chosen and why, in a sentence; '' where there was no choice.
    """

    run: Any
    without_remat: bool
    text: str


def step_for_memory(
    stage: Stage, mesh: Mesh, arguments: tuple[Any, ...], before: bool | None = None
) -> ChosenStep:
    """The step of a stage, or that of `Stage.without_remat` where the memory suffices for it.

    It suffices where XLA lays the compiled step out in `ROOM` of what the device may use. On
    several devices and on TPUs the stage's own step is taken: there are more operations in it, but
    it moves less memory.

    Args:
      stage: the stage.
      mesh: the mesh that the step runs on.
      arguments: (state, frozen, batch, seed), with the state abstract or not.
      before: what was chosen when the run began, which stays: the steps differ by rounding. None
        stands for a run that begins.
    """
    own = ChosenStep(jitted_step(stage, mesh, arguments[0]), False, '')
    device = mesh.devices.flat[0]
    if stage.without_remat is None or mesh.size > 1 or device.platform == 'tpu' or before is False:
        return own
    limit = sharding.memory_limit(device, jax.local_device_count())
    if limit is None:
        return own
    jitted = jitted_step(stage.without_remat, mesh, arguments[0])
    compiled = jitted.lower(*arguments).compile()
    sizes = compiled.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    text = f'{console.size(needed)} of {console.size(limit)}'
    if needed > ROOM * limit and before is None:
        text = f'activations are computed again (remat): to keep them takes {text}'
        return own._replace(text=text)
    return ChosenStep(compiled, True, f'activations are kept, which takes {text}')


def converted(directory: str | os.PathLike[str], like: PyTree) -> PyTree | None:
    """The parameters that were converted from a PyTorch checkpoint.

    Args:
      directory: a stage's directory.
      like: the parameters, abstract.

    Returns:
      The parameters, or None where there was no conversion.
    """
    # A training in this workdir would begin with random weights, were they only moved away.
    remedy = 'convert the weights, or take them from their run, once more into another --workdir'
    weights = checkpoint.Checkpoints(f'{directory}/weights', read_only=True, remedy=remedy)
    found = weights.restore(like)
    weights.close()
    return None if found is None else found[0]
