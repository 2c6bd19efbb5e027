"""A training stage that trains a part of its model, or factors of low rank, see `Tuning`.

Its state holds what is trained and nothing else. All else is a frozen input of the step, as the
tokenizer is. Frozen parameters thus have no gradient, no moments, no EMA and no decay, and the
gradient's norm does not count them.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sphere_ar_jax.config.fine_tuning import Tuning
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import state as training_state
from sphere_ar_jax.training.tuning import lora

# The path of the table of class tokens, which is trained beside factors of low rank: its rows may
# be new.
CLASS_TABLE = 'cls_embedding'


class Selection(NamedTuple):
    """The parameters that a fine-tuning trains.

    Attributes:
      trained: paths of the parameters that are trained themselves.
      factored: paths of the kernels that get factors.
    """

    trained: frozenset[str]
    factored: frozenset[str]


def _flat(params: PyTree) -> dict[str, jax.Array]:
    """Parameters by their paths."""
    return flatten_dict(params, sep='/')


def _matching(key: str, pattern: str, paths: Collection[str]) -> set[str]:
    """The paths in which a pattern is found.

    Raises:
      UserError: there are none.
    """
    found = {path for path in paths if re.search(pattern, path)}
    if not found:
        names = sorted(paths)
        some = ', '.join(names[:: max(1, len(names) // 4)][:4])
        raise UserError(
            f'{key}: {pattern!r} is found in no path of the {len(names)} parameters there are, '
            f'as {some}'
        )
    return found


def select(params: PyTree, tuning: Tuning) -> Selection:
    """Selects what a fine-tuning trains.

    Args:
      params: the model's parameters, abstract or not.
      tuning: the wishes.

    Returns:
      The selection.

    Raises:
      UserError: a pattern matches nothing, or nothing is left to train; one line.
    """
    paths = set(_flat(params))
    free = set(paths)
    for pattern in tuning.freeze:
        free -= _matching('fine_tuning.freeze', pattern, paths)
    factored: set[str] = set()
    if tuning.lora_rank:
        factored = {path for path in free if lora.is_product(path)}
        free &= {CLASS_TABLE}
    if not free | factored:
        raise UserError('fine_tuning.freeze leaves nothing to train: freeze less')
    selection = Selection(frozenset(free), frozenset(factored))
    _paths_of_multipliers(_trained_paths(selection), tuning.multipliers)
    return selection


def _trained_paths(selection: Selection) -> set[str]:
    """The paths of all leaves that are trained, factors among them."""
    factors = {f'{path}/{name}' for path in selection.factored for name in (lora.A, lora.B)}
    return {*selection.trained, *factors}


def _paths_of_multipliers(
    paths: Iterable[str], multipliers: Iterable[tuple[str, float]]
) -> list[tuple[float, set[str]]]:
    """The paths that each multiplier takes: those that it matches and no earlier multiplier does.

    Raises:
      UserError: a pattern matches nothing that is trained.
    """
    paths = set(paths)
    taken: set[str] = set()
    found = []
    for pattern, factor in multipliers:
        mine = _matching('fine_tuning.multipliers', pattern, paths)
        found.append((factor, mine - taken))
        taken |= mine
    return found


def _scaled(
    paths: Iterable[str], multipliers: Iterable[tuple[str, float]]
) -> optax.GradientTransformation | None:
    """Multiplies the updates of the parameters that multipliers match; None without multipliers."""

    def masked(factor: float, mine: set[str]) -> optax.GradientTransformation:
        def mask(updates: PyTree) -> PyTree:
            return unflatten_dict({path: path in mine for path in _flat(updates)}, sep='/')

        return optax.masked(optax.scale(factor), mask)

    found = _paths_of_multipliers(paths, multipliers)
    return optax.chain(*(masked(*pair) for pair in found)) if found else None


def tuned_stage(stage: training_state.Stage, tuning: Tuning, base: PyTree) -> training_state.Stage:
    """Makes the stage that trains what a fine-tuning asks for.

    Args:
      stage: the stage that trains all of the model, of `state.make_stage`.
      tuning: what is trained.
      base: the parameters that the fine-tuning begins with. Those that it does not train are frozen
        inputs of the step.

    Returns:
      The stage. Its `to_model` gives the parameters of the whole model, factors merged.

    Raises:
      UserError: see `select`.
    """
    selection = select(base, tuning)
    flat = _flat(base)
    rest = {path: leaf for path, leaf in flat.items() if path not in selection.trained}

    def init_params(key: jax.Array) -> PyTree:
        fresh = _flat(stage.init(key).params)
        trained = {path: fresh[path] for path in selection.trained}
        kernels = {path: flat[path] for path in selection.factored}
        return unflatten_dict(trained | lora.init(kernels, tuning.lora_rank, key), sep='/')

    def begin(params: PyTree) -> PyTree:
        # Copies, since the step takes the memory of its state.
        trained = {path: jnp.copy(flat[path]) for path in selection.trained}
        return unflatten_dict(_flat(params) | trained, sep='/')

    def whole(params: PyTree, others: dict[str, jax.Array]) -> PyTree:
        return unflatten_dict(lora.merged(others | _flat(params)), sep='/')

    def loss(params, frozen, batch, keys):
        inner, others = frozen
        assert stage.loss is not None  # `make_stage` gives it
        return stage.loss(whole(params, others), inner, batch, keys)

    def to_model(params: PyTree) -> PyTree:
        return unflatten_dict(lora.merged(rest | _flat(params), whole=True), sep='/')

    without_remat = None
    if stage.without_remat is not None:
        without_remat = tuned_stage(stage.without_remat, tuning, base)
    return training_state.make_stage(
        stage.name,
        stage.options,
        init_params,
        loss,
        frozen=(stage.frozen, rest),
        shown=stage.shown,
        scale=_scaled(_trained_paths(selection), tuning.multipliers),
        about=f'{stage.about} or other weights',
        warn=stage.warn,
        model=stage.model,
        begin=begin,
        to_model=to_model,
        without_remat=without_remat,
    )


def of_workdir(
    stage: training_state.Stage, tuning: Tuning, directory: str, mesh: Mesh
) -> training_state.Stage:
    """The stage of a fine-tuning that begins with the weights in its directory.

    Args:
      stage: the stage that trains all of the model.
      tuning: what is trained. Where it asks for nothing, all is.
      directory: the stage's directory.
      mesh: where the weights go.

    Returns:
      The stage, the same one where nothing is asked for.

    Raises:
      FileNotFoundError: the directory has no weights yet.
      UserError: see `select`.
    """
    if tuning == Tuning():
        return stage
    base = training_state.converted(directory, training_state.abstract_state(stage, mesh).params)
    if base is None:
        raise FileNotFoundError(f'{directory} has no weights to begin with yet')
    return tuned_stage(stage, tuning, base)
