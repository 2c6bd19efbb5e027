"""What a host has for a run, and what it lacks, on one screen: run it on every host before the
program.

  python -m sphere_ar_jax.doctor [--config=FILE[:VARIANT] [--config.KEY=VALUE …]]
  [--workdir=DIR|gs://BUCKET/DIR]
                                 [--data=KIND:PATH] [--timeout=SECONDS]

Takes the words of `main` as well, and says which it does not look at; with another --mode than
train it looks at no training. Every check ends with ok, WARN (it will run, but perhaps not as
meant) or FAIL (it will not), and with what to do. Exit code 1 if anything failed, 2 for wrong
flags. A check that has not answered after 60 s (--timeout), as storage and drivers may, has failed
too.

Every check is a function of plain arguments that returns a `Check`. Sizes are bytes. What a check
needs is imported in it, for that a package is missing or broken is what the doctor is there to say.
"""

import logging
import os
import platform
import sys
import time

from sphere_ar_jax.commands import checks


def examine(cfg, workdir, data, examination, trains=True):
    """All checks. cfg: a config, not checked yet, or None. workdir, data: as given by flags, or
    None. trains: whether a training is to be looked at.
    """
    import jax

    from sphere_ar_jax.config import recipes
    from sphere_ar_jax.config.checks import check
    from sphere_ar_jax.measure import programs
    from sphere_ar_jax.runtime import joining

    e = examination
    e.run(
        'processes',
        joining.join,
        slow='have the other processes been started? --timeout=SECONDS waits longer',
    )
    if e.failed:  # a device asked for now would wait for the others without end
        return
    seen = e.run(
        'devices',
        lambda: (jax.devices(), jax.local_devices()),
        slow='does another program hold them?',
    )
    if seen is None:
        return
    devices, local = seen
    limit = checks.memory_limit(local[0], len(local))
    text = f'process {jax.process_index()} of {jax.process_count()}, with {len(local)} device(s)'
    e.say(checks.Check('processes', 'ok', text))
    e.say(checks.check_devices(devices, local, limit, checks.device_files()))
    disk = 0
    trainings = None if cfg is None else e.run('config', lambda: programs.stages(check(cfg)))
    if trainings is not None and trains:
        found, disk = e.run('mesh', lambda: checks.run_checks(cfg, trainings, limit)) or ((), 0)
        for one in found:
            e.say(one)
    storage = 'is the storage there, and are you logged in?'
    if workdir is not None:
        e.check('workdir', lambda: checks.check_workdir(workdir, disk), slow=storage)
    source = None
    if data is not None:
        source = recipes.data_set(data)
    elif cfg is not None and trains:
        source = cfg.data.name, cfg.data.path, cfg.data.split, cfg.data.data_dir
    if source is not None:
        slow = "a large tar's index takes minutes, once: --timeout=1800"
        e.check('data', lambda: checks.check_data(*source), slow=slow)
    if trainings is not None and trains:
        e.check('inputs', lambda: checks.check_inputs(cfg, workdir), slow=storage)
    e.check('cache', lambda: checks.check_cache(os.environ))


def _flags(argv):
    """(values of the flags, the words that are of `main` alone). Raises what absl and config files
    raise.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()  # of its own: `main` has flags of the same names
    config_flags.DEFINE_config_file(
        'config', None, 'Configuration file.', flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string(
        'workdir', None, 'Directory of the run, local or gs://…', flag_values=values
    )
    flags.DEFINE_string('mode', 'train', 'As for `main`.', flag_values=values)
    flags.DEFINE_string(
        'data', None, 'KIND:PATH, in place of the data of the config.', flag_values=values
    )
    flags.DEFINE_float('timeout', 60, 'Seconds that a check may take.', 1e-3, flag_values=values)
    return values, values(argv, known_only=True)[1:]


def _ended(check):
    """Says the check after which nothing more can be looked at. Returns the exit code."""
    print('\n'.join(checks.lines(check)))
    return 1


def main(argv):
    """Examines this host. Returns the exit code."""
    if '--help' in argv:
        print(__doc__.split('\n\nEvery check is')[0])
        return 0
    started = time.perf_counter()
    versions = checks.check_versions()
    if versions.status == 'FAIL':
        return _ended(versions)
    logging.getLogger('gcsfs').setLevel(
        logging.CRITICAL
    )  # it logs tracebacks of what it raises all the same
    try:
        import sphere_ar_jax.commands.train  # noqa: F401, all that a run imports
        from sphere_ar_jax.config import packaged
        from sphere_ar_jax.runtime.console import one_line

        values, rest = _flags(packaged.with_paths(argv))
        cfg = values.config
        if cfg is not None:
            dict(cfg.items())  # a config file that failed to load says so only when it is read
    except ImportError as error:
        return _ended(
            checks.Check('package', 'FAIL', f'cannot be imported: {error}; pip install -e .')
        )
    except Exception as error:  # also whatever a config file raises
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 2
    examination = checks.Examination(values.timeout)
    print(f'{platform.node()}, {platform.platform(terse=True)}, {os.cpu_count()} CPUs')
    examination.say(versions)
    if rest:
        examination.say(checks.Check('flags', 'ok', f'not looked at: {" ".join(rest)}'))
    trains = values.mode == 'train'
    if not trains:
        text = f'of --mode={values.mode} only the machine and the workdir are looked at'
        examination.say(checks.Check('flags', 'ok', text))
    examine(cfg, values.workdir, values.data, examination, trains)
    seconds = time.perf_counter() - started
    print(f'{examination.failed} failed, {examination.warned} warning(s), {seconds:.0f} s')
    sys.stdout.flush()
    if examination.stuck:
        os._exit(1)  # what did not answer would hold up the end too
    return 1 if examination.failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
