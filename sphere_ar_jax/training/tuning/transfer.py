"""Takes the weights of a run into the workdir of its fine-tuning, as a conversion would.

`WORKDIR/tokenizer/weights` and `WORKDIR/ar/weights` are written once. The run that they came from
is not needed afterwards.

Dimensions:
  k  classes of the run that is read     C  class tokens     D  width of the AR model
"""

import contextlib
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from sphere_ar_jax.runtime import checkpoint, hosts, sharding
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import standardisation
from sphere_ar_jax.training.run import Run
from sphere_ar_jax.training.tuning.tuned import CLASS_TABLE


def is_done(workdir: str | os.PathLike[str]) -> bool:
    """Whether a workdir has the weights of an AR model, which are written last."""
    return bool(checkpoint.Checkpoints(f'{workdir}/ar/weights', read_only=True).steps())


def origins(
    old: Sequence[str] | None, new: Sequence[str] | None, old_count: int, new_count: int
) -> list[int | None]:
    """Says where the tokens of each new class come from.

    Where both data name their classes, names decide. Where none does and there are as many classes
    as before, classes stay what they were.

    Args:
      old: the names of the run's classes, or None.
      new: the names of the new data's classes, or None.
      old_count: k.
      new_count: the number of classes of the new model.

    Returns:
      For each new class the old class of its name, None where there is none.
    """
    if old is None and new is None and old_count == new_count:
        return list(range(old_count))
    known = {name: i for i, name in enumerate((old or ())[:old_count])}
    found = [known.get(name) for name in (new or ())[:new_count]]
    return found + [None] * (new_count - len(found))


def describe(rows: Sequence[int | None] | None, new: Sequence[str] | None) -> str:
    """What becomes of the class tokens, in one line; `rows` is None where texts are read."""
    if rows is None:
        return 'the tokens of texts are kept'
    taken = sum(row is not None for row in rows)
    fresh = [i for i, row in enumerate(rows) if row is None]
    line = f'class tokens: {taken} of {len(rows)} classes keep theirs'
    if not fresh:
        return line
    named = [new[i] if new is not None and i < len(new) else str(i) for i in fresh[:4]]
    more = ', …' if len(fresh) > len(named) else ''
    return f'{line}, {len(fresh)} begin with the mean of the old ones ({", ".join(named)}{more})'


def with_classes(params: PyTree, rows: Sequence[int | None] | None) -> PyTree:
    """Gives the parameters of an AR model other classes.

    Args:
      params: the parameters. Their class table is (k + 1, C, D), the null class last.
      rows: for each new class the row that it takes, or None, which stands for the mean of the k
        classes. None in place of all rows leaves the parameters as they are.

    Returns:
      The parameters with a table of len(rows) + 1 rows. The null class is kept.
    """
    if rows is None:
        return params
    table = params[CLASS_TABLE]
    k = len(table) - 1
    index = jnp.array([k + 1 if row is None else row for row in (*rows, k)], jnp.int32)
    mean = jnp.mean(table[:k], axis=0, keepdims=True)
    return params | {CLASS_TABLE: jnp.concatenate([table, mean])[index]}


def _write(directory: str, params: PyTree) -> None:
    """Writes DIRECTORY/weights, unless they are there."""
    with contextlib.closing(checkpoint.Checkpoints(f'{directory}/weights')) as weights:
        if not weights.steps():
            weights.save(0, params, {}, 0.0)


def take(
    workdir: str,
    base: Run,
    origin: str,
    rows: Sequence[int | None] | None,
    mesh: Mesh,
    tokenizer: bool,
) -> None:
    """Writes the weights of a run into a workdir. All processes call it.

    Args:
      workdir: the workdir of the fine-tuning.
      base: the run.
      origin: the run's workdir.
      rows: see `with_classes`.
      mesh: the devices.
      tokenizer: whether the tokenizer's weights are taken, too.
    """
    if tokenizer:
        _write(f'{workdir}/tokenizer', base.vae_params)
    statistics = standardisation.path(origin)
    mine = standardisation.path(workdir)
    if statistics.exists() and hosts.is_first():
        # They go on being those of the tokens that the AR model knows, if its tokenizer is kept.
        mine.parent.mkdir(parents=True, exist_ok=True)
        epath.Path(statistics).copy(mine, overwrite=True)
    hosts.wait()
    change = functools.partial(with_classes, rows=None if rows is None else tuple(rows))
    shapes = jax.eval_shape(change, base.ar_params)
    params = jax.jit(change, out_shardings=sharding.tree_shardings(mesh, shapes))(base.ar_params)
    _write(f'{workdir}/ar', params)
