"""The door from Python: `sphere_ar_jax.load` opens a trained run. See `docs/python.md`."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from sphere_ar_jax.commands import checkpoints, open_run
from sphere_ar_jax.config import beside, build, checks, schema
from sphere_ar_jax.evaluation import class_names
from sphere_ar_jax.runtime import files, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling.model import Model
from sphere_ar_jax.training.run import load_run, with_ar


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Model:
    """Opens a trained or converted run.

    The weights are those that `--mode=sample` takes: EMAs where there are any. The tokenizer's are
    read at once, and the AR model's when they are first needed. Nothing else of the checkpoints is
    read.

    >>> import sphere_ar_jax
    >>> run = sphere_ar_jax.load('/tmp/digits')
    >>> run.sample([3, 1, 4]).shape
    (3, 16, 16, 1)
    >>> fast = sphere_ar_jax.load('/tmp/digits', config={'sampling.num_steps': 5})
    >>> fast.sample([3, 1, 4]).shape
    (3, 16, 16, 1)

    Args:
      path: a workdir, also gs://…; a directory that `--mode=export` has written, also as
        hf://OWNER/REPOSITORY; or a published checkpoint as hf://OWNER/REPOSITORY/FILE. The latter
        is fetched and converted at the first time, into ~/.cache/sphere_ar_jax/converted.
      mesh: devices that compute, all devices if None.
      batch_size: images that are computed at once, at most; None takes `sampling.batch_size` of the
        run's config.
      config: values in place of those of the run's config, {dotted key: value}: its dtype, its
        sampler, or where its tokenizer is now. None changes nothing.

    Returns:
      The model.

    Raises:
      UserError: there is no run, a checkpoint must be converted first or cannot be, the batch
        size is not at least 1, or `config` has a key or value that this run cannot take.
      OSError: there is no checkpoint of the tokenizer yet.
    """
    given = os.fspath(path)
    if given.startswith('hf://') and given.strip('/').count('/') == 3:
        workdir = checkpoints.fetched(given)
    elif given.startswith('hf://'):
        workdir = checkpoints.converted_once(given)
    else:
        # The AR model is read later, when the current directory may be another one.
        workdir = files.absolute(given)
        if epath.Path(workdir).is_file():
            raise UserError(
                f'{given} is a file, not the workdir of a run: convert it by sphere-ar '
                f'--mode=convert --checkpoint={given} --workdir=DIR, then load DIR'
            )
    cfg = open_run.config_of(workdir)
    if config:
        cfg = checks.check(beside.with_values(cfg, config))
    mesh = sharding.make_mesh() if mesh is None else mesh
    # Only the training of the AR model measures the statistics that some token spaces need.
    is_whole = build.build_vae(cfg).num_statistics > 0
    run = load_run(workdir, mesh, tokenizer_only=not is_whole, cfg=cfg)
    names = None
    find: Callable[[str], Any]
    if build.has_captions(cfg):
        find = functools.partial(build.encode_prompt, cfg)
    else:
        names = class_names.of_run(workdir, cfg)
        known = schema.num_classes(cfg)
        assert known is not None  # the model was built with it
        find = functools.partial(class_names.find, names=names, known=known)
    return Model(
        run,
        mesh=mesh,
        batch_size=batch_size,
        read_ar=None if is_whole else functools.partial(with_ar, run, workdir, mesh),
        class_names=names,
        find=find,
    )
