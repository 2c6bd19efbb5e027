"""Says what a host has for a run, and what it lacks, on one screen.

  python -m sphere_ar_jax.doctor [--config=FILE[:VARIANT] [--config.KEY=VALUE …]]
                                 [--workdir=DIR|gs://BUCKET/DIR]
                                 [--data=KIND:PATH] [--timeout=SECONDS]

Run it on every host before the program. It takes the flags of `main` as well, and says which of
them it ignores. With a --mode other than train it does not check what a training needs.

Every check ends with ok, WARN (it will run, but perhaps not as meant) or FAIL (it will not), and
with what to do. A check that has not answered after 60 s (--timeout), as storage and drivers may,
has failed too. The exit code is 1 if anything failed, 2 for wrong flags.

Every check is a function of plain arguments that returns a `Check`, in `commands.host_checks`.
Sizes are in bytes. Functions do their own imports, so that the doctor can report a package that is
missing or broken.
"""

import logging
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sphere_ar_jax.commands import host_checks

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

    from sphere_ar_jax.data import small, sources
    from sphere_ar_jax.runtime.types import PyTree
    from sphere_ar_jax.training.state import Stage


def examine(
    cfg: 'ConfigDict | None',
    workdir: str | None,
    data: str | None,
    examination: host_checks.Examination,
    trains: bool = True,
) -> None:
    """Runs all checks.

    Args:
      cfg: a config that has not been checked yet, or None.
      workdir: the directory of the run, an absolute path or gs://…; None where not known.
      data: the value of --data, or None.
      examination: runs the checks and prints them.
      trains: whether to check what a training needs.
    """
    import jax

    from sphere_ar_jax.config import schema
    from sphere_ar_jax.runtime import joining, sharding

    e = examination
    slow = 'have the other processes been started? --timeout=SECONDS waits longer'
    e.run('processes', joining.join, slow=slow)
    if e.failed:  # asking for a device now would wait for the other processes without end
        return
    slow = 'does another program hold them?'
    seen = e.run('devices', lambda: (jax.devices(), jax.local_devices()), slow=slow)
    if seen is None:
        return
    devices, local = seen
    limit = sharding.memory_limit(local[0], len(local))
    text = f'process {jax.process_index()} of {jax.process_count()}, with {len(local)} device(s)'
    e.say(host_checks.Check('processes', 'ok', text))
    e.say(host_checks.check_devices(devices, local, limit, host_checks.device_files()))
    saved: dict[str, host_checks.Saved] = {}
    source = _examine_data(cfg if trains else None, data, e)
    trainings = None
    if cfg is not None:
        own = data is None or schema.num_classes(cfg) is None
        trainings = e.run('config', lambda: _trainings(cfg, source if own else None, trains))
    if cfg is not None and trainings is not None:
        images = source if data is None else None
        saved = _examine_run(cfg, images, trainings, limit, e)
    slow = 'is the storage there, and are you logged in?'
    if workdir is not None:
        e.check('workdir', lambda: host_checks.check_workdir(workdir, saved), slow=slow)
    if cfg is not None and trainings is not None:
        e.check('inputs', lambda: host_checks.check_inputs(cfg, workdir), slow=slow)
    e.check('cache', lambda: host_checks.check_cache(os.environ))


def _examine_run(
    cfg: 'ConfigDict',
    source: 'sources.Images | small.Split | None',
    trainings: 'dict[str, tuple[Stage, PyTree]]',
    limit: int | None,
    examination: host_checks.Examination,
) -> dict[str, host_checks.Saved]:
    """Checks the captions of a config's images, its mesh and its memory.

    Args:
      cfg: a checked config.
      source: its images, None where they are not known.
      trainings: see `_trainings`.
      limit: bytes of a device, None where not known.
      examination: runs the checks and prints them.

    Returns:
      What each stage saves, {} where the mesh cannot be.
    """
    from sphere_ar_jax.config import build

    if source is not None and build.has_captions(cfg):
        examination.check('captions', lambda: host_checks.check_captions(cfg, source))
    found = examination.run('mesh', lambda: host_checks.run_checks(cfg, trainings, limit))
    if found is None:
        return {}
    of_run, saved = found
    for one in of_run:
        examination.say(one)
    return saved


def _trainings(
    cfg: 'ConfigDict', source: 'sources.Images | small.Split | None', trains: bool
) -> 'dict[str, tuple[Stage, PyTree]] | None':
    """Checks a config, and counts classes as a training does.

    Args:
      cfg: the config.
      source: its images, None where they are not known.
      trains: whether a training is examined.

    Returns:
      The trainings, see `programs.stages`; None where there are none, or the number of classes is
      not known because the images could not be opened.

    Raises:
      UserError: the config is impossible, or knows fewer classes than there are.
    """
    from sphere_ar_jax.config import build, schema
    from sphere_ar_jax.config.checks import check, check_training
    from sphere_ar_jax.measure import programs

    check(cfg)
    if not trains:
        return None
    check_training(cfg)
    if source is not None:
        build.count_classes(cfg, source)
    if schema.num_classes(cfg) is None:
        return None
    return programs.stages(cfg)


def _examine_data(
    cfg: 'ConfigDict | None', data: str | None, examination: host_checks.Examination
) -> 'sources.Images | small.Split | None':
    """Checks the data of --data, or else of a config, or neither. Returns the images if found."""
    from sphere_ar_jax.config import build, checks, recipes
    from sphere_ar_jax.data import small

    if data is None and cfg is None:
        return None

    def opened() -> 'tuple[host_checks.Check, sources.Images | small.Split]':
        if data is not None:
            needs_labels = cfg is None or not build.has_captions(cfg)
            return host_checks.check_data(
                *recipes.data_set(data), needs_labels=needs_labels, progress=examination.progress
            )
        assert cfg is not None  # by the lines above
        d = cfg.data
        if d.name in small.KINDS:
            checks.check(cfg)
            return host_checks.check_small(d.name, d.path, build.open_data_set(cfg).train)
        needs_labels = not build.has_captions(cfg)
        return host_checks.check_data(
            d.name, d.path, d.split, d.data_dir, needs_labels, examination.progress
        )

    slow = 'is the storage there? The doctor alone waits longer with --timeout=SECONDS'
    found = examination.run('data', opened, slow=slow)
    if found is None:
        return None
    check, source = found
    examination.say(check)
    return source


def _flags(argv: list[str]) -> 'tuple[FlagValues, list[str]]':
    """Parses the command line. Raises what absl and config files raise.

    Returns:
      (values of the doctor's own flags, the words that only `main` knows).
    """
    from absl import flags
    from ml_collections import config_flags

    from sphere_ar_jax import main
    from sphere_ar_jax.runtime import console
    from sphere_ar_jax.runtime.console import UserError

    # Flags of its own, since `main` has flags of the same names.
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        'config', None, 'Configuration file.', flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string(
        'workdir', None, 'Directory of the run, local or gs://…', flag_values=values
    )
    flags.DEFINE_enum('mode', 'train', list(main.MODES), 'As for `main`.', flag_values=values)
    flags.DEFINE_string(
        'data', None, 'KIND:PATH, in place of the data of the config.', flag_values=values
    )
    flags.DEFINE_float('timeout', 60, 'Seconds that a check may take.', 1e-3, flag_values=values)
    rest = values(argv, known_only=True)[1:]
    unknown = _unknown(rest, flags.FLAGS)
    if unknown is not None:
        raise UserError(f'{unknown} is no flag of sphere_ar_jax.main')
    for name in ('workdir', 'data'):
        console.require_value(f'--{name}', values[name].value)
    if not math.isfinite(values.timeout):
        raise UserError(f'--timeout is {values.timeout}: give seconds')
    return values, rest


def _unknown(words: list[str], known: Iterable[str]) -> str | None:
    """The first word that is neither a flag that is known nor the value behind one.

    Args:
      words: what the doctor's own flags leave of a command line.
      known: the names of flags.
    """
    names = set(known)
    value_follows = False
    for word in words:
        if word.startswith('-'):
            name, equals, _ = word.lstrip('-').partition('=')
            if not {name, name.removeprefix('no')} & names:
                return word
            value_follows = not equals
        elif not value_follows:
            return word
        else:
            value_follows = False
    return None


def _of_command(cfg: 'ConfigDict', workdir: str | None) -> 'ConfigDict':
    """The config of the command line as it is looked at; raises what config files raise.

    That of an experiment is looked at as the run of its first row and seed.
    """
    from sphere_ar_jax.config import beside, experiments, schema

    # A config file that failed to load says so only when it is read.
    dict(cfg.items())
    if schema.is_experiment(cfg):
        return experiments.row(experiments.check(cfg), next(iter(cfg.rows)), cfg.seeds[0])
    return cfg if workdir is None else beside.with_kept_vocabulary(cfg, workdir)


def _ended(check: host_checks.Check) -> int:
    """Prints the check after which nothing more can be looked at. Returns the exit code."""
    print('\n'.join(host_checks.lines(check)))
    return 1


def main(argv: list[str]) -> int:
    """Examines this host.

    Args:
      argv: the program's name and its flags.

    Returns:
      The exit code.
    """
    if '--help' in argv:
        assert __doc__ is not None
        print(__doc__.split('\n\nEvery check is')[0])
        return 0
    started = time.perf_counter()
    versions = host_checks.check_versions()
    if versions.status == 'FAIL':
        return _ended(versions)
    # This package logs the tracebacks even of errors that it raises.
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    try:
        import sphere_ar_jax.commands.train  # noqa: F401, it imports all that a run needs
        from sphere_ar_jax.config import packaged
        from sphere_ar_jax.runtime.console import one_line
        from sphere_ar_jax.runtime.files import absolute

        values, rest = _flags(packaged.with_paths(argv))
        workdir = None if values.workdir is None else absolute(values.workdir)
        cfg = None if values.config is None else _of_command(values.config, workdir)
    except ImportError as error:
        text = f'cannot be imported: {error}; pip install -e .'
        return _ended(host_checks.Check('package', 'FAIL', text))
    except Exception as error:  # a config file may raise anything
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 2
    examination = host_checks.Examination(values.timeout)
    print(f'{platform.node()}, {platform.platform(terse=True)}, {os.cpu_count()} CPUs')
    examination.say(versions)
    if rest:
        examination.say(host_checks.Check('flags', 'ok', f'not looked at: {" ".join(rest)}'))
    trains = values.mode in ('train', 'experiment')
    if not trains:
        text = f'of --mode={values.mode} only the machine and the workdir are looked at'
        examination.say(host_checks.Check('flags', 'ok', text))
    examine(cfg, workdir, values.data, examination, trains)
    seconds = time.perf_counter() - started
    print(f'{examination.failed} failed, {examination.warned} warning(s), {seconds:.0f} s')
    sys.stdout.flush()
    if examination.stuck:
        # A check that does not answer would hold up an ordinary exit, too.
        os._exit(1)
    return 1 if examination.failed else 0


if __name__ == '__main__':
    from sphere_ar_jax.runtime import console

    console.run(main)
