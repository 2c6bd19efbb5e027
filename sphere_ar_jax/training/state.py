"""The state of a training, and what a training stage is.

Dimensions:
  B  images of the global batch; `batch` is {'image': (B, H, W, c), 'label': (B,)}
"""

import dataclasses
import json
import zlib
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import losses, optimizer


class TrainState(flax.struct.PyTreeNode):
    """step () int32, the parameters, the optimizer's state, and EMAs of the parameters: a tuple,
    one for each rate.
    """

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
      step: (state, frozen, batch) → (state, scalars). frozen: parameters that it reads but does not
        train.
      shown: the scalars for the console. about: what the frozen parameters are, for messages. warn:
        function of logged
      scalars → what is wrong with them in words, or None. model: the frozen parameters' module,
        noted in checkpoints.
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


def ema_decays(options):
    """The rates of a stage's EMAs, the first of them the one to sample with."""
    return ((options.ema_decay,) if options.ema_decay else ()) + tuple(options.more_ema_decays)


def value_and_grad(loss, parts):
    """`jax.value_and_grad` of a loss (params, frozen, batch, keys) → (loss, scalars), as the mean
    over `parts` pieces of the batch, of which one is in memory at a time.
    """
    compute = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return compute

    def mean(params, frozen, batch, keys):
        # every parts-th row: pieces are split over the devices as the batch is
        split = lambda a: a.reshape(len(a) // parts, parts, *a.shape[1:]).swapaxes(0, 1)
        pieces = jax.tree.map(split, (batch, keys))
        run = lambda piece: compute(params, frozen, *piece)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(run, jax.tree.map(lambda a: a[0], pieces)),
        )
        total, _ = jax.lax.scan(
            lambda total, piece: (jax.tree.map(jnp.add, total, run(piece)), None), zeros, pieces
        )
        return jax.tree.map(lambda x: x / parts, total)

    return mean


def build_optimizer(options):
    """(schedule, optimizer) of a stage's options, see `optimizer`."""
    schedule = optimizer.learning_rate(
        options.learning_rate, options.warmup_steps, options.steps, options.final_learning_rate
    )
    tx = optimizer.adamw(
        schedule,
        b1=options.b1,
        b2=options.b2,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
    )
    return schedule, tx


def make_stage(name, options, seed, init_params, loss, frozen, shown, **fields):
    """A Stage from its loss (params, frozen, batch, keys (B,)) → (loss, scalars); fields: what else
    it has.
    """
    schedule, tx = build_optimizer(options)
    decays, compute = ema_decays(options), value_and_grad(loss, options.accumulate)

    def init(key):
        params = init_params(key)
        return TrainState(jnp.int32(0), params, tx.init(params), copies(params, decays))

    def step(state, frozen, batch):
        keys = losses.sample_keys(jax.random.key(seed), state.step, len(batch['image']))
        (value, scalars), grads = compute(state.params, frozen, batch, keys)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_emas(state.ema, params, decays)
        scalars |= dict(
            loss=value, grad_norm=optax.tree.norm(grads), learning_rate=schedule(state.step)
        )
        return TrainState(state.step + 1, params, opt_state, ema), scalars

    return Stage(name, options, init, step, frozen, shown, **fields)


def copies(params, decays):
    """The EMAs at the start: a copy of the parameters for each rate."""
    return tuple(jax.tree.map(jnp.copy, params) for _ in decays)


def update_emas(emas, params, decays):
    """decay·ema + (1 − decay)·params for each EMA and its rate."""
    return tuple(
        optax.incremental_update(params, ema, 1 - decay)
        for ema, decay in zip(emas, decays, strict=True)
    )


def frozen_identity(stage):
    """What a checkpoint notes of the parameters that a stage does not train, {} where there are
    none.

    weights: a hash, 8 hexadecimal digits, of all their bits. model: the options in which the
    stage's module, if it names one, differs from the defaults.
    """
    if not jax.tree.leaves(stage.frozen):
        return {}
    weights = f'{zlib.crc32(json.dumps(checkpoint.fingerprint(stage.frozen)).encode()):08x}'
    return {'weights': weights, 'model': {} if stage.model is None else _differing(stage.model)}


# Fields of a module that say how it is computed, not what.
_HOW = ('parent', 'name', 'dtype', 'remat', 'unroll', 'scan')


def _options(module: Any) -> dict[str, Any]:
    """All options of a module and of the parts in it, by name, as JSON takes them; of a part also
    its class.
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
    return json.loads(json.dumps(found))  # tuples become lists


def _differing(module: Any, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Those of a module's options that differ from its defaults, so that a field that is new
    refuses no old run.

    Args:
      options: those of an older version of the module, which may lack some or have some that are
        gone; else its own.
    """
    defaults = _options(type(module)())
    mine = _options(module)
    options = (
        mine
        if options is None
        else {name: value for name, value in options.items() if name in mine}
    )
    return {name: value for name, value in options.items() if value != defaults.get(name)}


def check_frozen(stage, here, data_state, directory):
    """Raises UserError unless the checkpoint's frozen parameters, by its `data_state`, are those of
    the stage, whose `frozen_identity` is `here`.
    """
    if not here:
        return
    trained_on = data_state.get('frozen', {})
    old, new = {}, {}
    if stage.model is not None:
        defaults = _options(type(stage.model)())
        old = defaults | _differing(stage.model, trained_on.get('model', {}))
        new = defaults | here['model']
    changed = [
        f'{name} {old.get(name)} → {new.get(name)}'
        for name in old | new
        if old.get(name) != new.get(name)
    ]
    if trained_on.get('weights') != here['weights'] or changed:
        what = '; '.join([f'weights {trained_on.get("weights")} → {here["weights"]}', *changed])
        raise UserError(f'{directory} was trained on another {stage.about} than is given ({what})')


def abstract_state(stage, mesh):
    """The shapes, dtypes and shardings of a stage's state."""
    return sharding.abstract(mesh, jax.eval_shape(stage.init, jax.random.key(0)))


def quickly_compiled() -> dict[str, Any]:
    """Options of `jax.jit` for a program that runs once.

    On CPUs LLVM then spends a sixth of the time on a tokenizer's initialisation, whose values stay
    the same bit for bit (BUILD_NOTES.md, "Tests").
    """
    on_cpu = jax.default_backend() == 'cpu'
    return {'compiler_options': {'xla_backend_optimization_level': 1}} if on_cpu else {}


def initialise(stage: Stage, shardings: Any, seed: int) -> TrainState:
    """The state of a stage at its start, laid out by a tree of shardings."""
    return jax.jit(stage.init, out_shardings=shardings, **quickly_compiled())(jax.random.key(seed))


def jitted_step(stage, mesh, state):
    """The step of a stage, to be compiled for a mesh; its result takes the place of the state that
    it is given.

    state: laid out on the mesh, abstract or not."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = sharding.keep_rows_split(mesh, stage.step)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def converted(directory, like):
    """The parameters that a PyTorch checkpoint was converted to in a stage's directory, or None;
    `like`: abstract.
    """
    weights = checkpoint.Checkpoints(f'{directory}/weights', read_only=True)
    found = weights.restore(like)
    weights.close()
    return None if found is None else found[0]
