"""The job of --mode=compile: the programs of a config, compiled for TPUs that are not there, and
what they will take.

libtpu has the TPUs' compiler and needs no TPU. For each slice and each program: whether it fits a
chip's memory, and by what; operations; bytes that a chip moves in its memory and sends to others,
read from the compiled program; the least time by the rates of `devices`; and, of training steps,
that no chip has other chips' images.

What is counted how:
  memory       of one device, as the compiler laid it out. Results that take the place of arguments
  count once. FLOPs        matrix products and convolutions of the whole batch by `costs.flops`:
  those of the model, and those that
               are computed, with what remat computes again.
  HBM, ICI     of one chip by `hlo.Program`: loops as often as they run; what is sent, by the ring
  algorithms. Loops
               whose length is data (rejection sampling) count as one round.
  least time   the longest of FLOPs / peak rate, HBM bytes / its rate, sent bytes / ICI rate: all at
  their published
               peak, all links of a chip in use, all three at the same time. No real step is as
               fast.

Dimensions:
  B  images of the global batch
"""

import contextlib
import importlib.util
import math
import os
import pathlib
import re
import sys
import tempfile
import time

import jax
from jax.experimental.compilation_cache import compilation_cache

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.measure import costs, hlo, programs
from sphere_ar_jax.measure.devices import GiB, find_slice
from sphere_ar_jax.runtime import files, sharding
from sphere_ar_jax.runtime.console import UserError, first_line, markdown, size

# What a program's memory holds, for people.
NAMES = {
    **programs.NAMES,
    'batch': 'images',
    'rows': 'images',
    'temporaries': 'activations and other temporaries',
}

# Elements for each image from which on an array is an activation: keys, labels, draws of one number
# are smaller.
ACTIVATION = 64

NO_REMEDY = 'use more chips, or fewer images'

ASSUMED = (
    "The least time assumes the chips' published peak rates, bfloat16 products, ring algorithms over all links of a "
    'chip, and that computing, HBM and ICI go on at the same time: no real step is as fast.'
)


class OutOfMemoryError(RuntimeError):
    """A program does not fit. needed, available: bytes, None where the compiler does not say."""

    def __init__(self, needed=None, available=None):
        super().__init__(
            'more than there is'
            if needed is None
            else f'{size(needed)} needed, {size(available)} there'
        )
        self.needed, self.available = needed, available


@contextlib.contextmanager
def _uncached():
    """Without the cache of compiled programs: one from there has no text, and a TPU's cannot be
    read without a TPU.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # JAX asks whether there is one but once
    try:
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', before)
        compilation_cache.reset_cache()


def compile_work(work):
    """(the compiled program, its instructions as text). Raises OutOfMemoryError where it does not
    fit the device.
    """
    with (
        _uncached(),
        tempfile.TemporaryDirectory() as directory,
    ):  # `as_text` fails for some TPU programs
        options = {'xla_dump_to': directory, 'xla_dump_hlo_as_text': True}
        try:
            compiled = work.function.lower(*work.arguments).compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            found = re.findall(r'([\d.]+)([KMGT])\b', str(error))
            sizes = [float(n) * 1024 ** (1 + 'KMGT'.index(unit)) for n, unit in found]
            raise OutOfMemoryError(*(sizes[:2] if len(sizes) > 1 else ())) from None
        (file,) = pathlib.Path(directory).glob('*after_optimizations.txt')
        return compiled, file.read_text()


def memory(compiled, groups):
    """{what: bytes of one device}: `groups` of the arguments, results that are kept beside them,
    temporaries, code.
    """
    m = compiled.memory_analysis()
    found = {name: costs.device_bytes(tree) for name, tree in groups.items()}
    found |= {
        'padding': max(0, m.argument_size_in_bytes - sum(found.values())),
        'results': m.output_size_in_bytes - m.alias_size_in_bytes,
        'temporaries': m.temp_size_in_bytes,
        'code': m.generated_code_size_in_bytes,
    }
    return {name: int(size) for name, size in found.items() if size}


def measure(work, chip):
    """What a program takes on a chip, as a dict of plain values; see the top. Raises
    OutOfMemoryError.
    """
    compiled, text = compile_work(work)
    program = hlo.Program(text, work.lengths)
    parts, sent = memory(compiled, work.groups), program.collectives()
    moved, share = program.memory_traffic(), chip.devices / work.devices
    seconds = {
        'compute': work.computed * share / chip.flops,
        'hbm': moved * chip.devices / chip.hbm_rate,
        'ici': sum(t.sent for t in sent.values()) * chip.devices / chip.ici,
    }
    return {
        'memory': parts,
        'total_bytes': sum(parts.values()),
        'device_bytes': chip.hbm // chip.devices,
        'flops': work.flops,
        'flops_computed': work.computed,
        'flops_device': work.computed / work.devices,
        'hbm_bytes': moved,
        'intensity': work.computed / work.devices / moved,
        'collectives': {
            kind: {'count': t.count, 'sent_bytes': t.sent} for kind, t in sorted(sent.items())
        },
        'open_loops': program.open_loops,
        'seconds': seconds,
        'least_seconds': max(seconds.values()),
        'bound': max(seconds, key=seconds.get),
    }


def _step(cfg, name, mesh):
    """The program of a training step."""
    return next(work for work in programs.training_works(cfg, mesh) if work.name == f'{name} step')


def replicated(cfg, name, mesh):
    """What a training step has on one device of other devices' images: `hlo.unsplit` of the step
    with another batch.

    [] as it should be. A batch of any number of images is split in the same way; this one, of a
    prime number of images for each part of the mesh, can be told from all sizes of the model. On a
    mesh that does not split a batch there is nothing to find.
    """
    parts = sharding.batch_parts(mesh)
    if parts == 1:
        return []
    stage, frozen = programs.stages(cfg)[name]
    ar, vae = build.build_ar(cfg), build.build_vae(cfg)
    params = jax.tree.leaves((jax.eval_shape(stage.init, jax.random.key(0)), frozen))
    sizes = {size for leaf in params for size in leaf.shape} | {*vae.image_shape}
    sizes |= {ar.num_tokens, ar.num_tokens + ar.condition.length - 1, ar.num_tokens + 4}
    batch = parts * next(p for p in (11, 17, 19, 23, 29, 31, 37) if all(size % p for size in sizes))
    key = f'{name}_training'
    work = _step(
        schema.changed(cfg, {f'{key}.batch_size': batch * cfg[key].accumulate}), name, mesh
    )
    shapes = {
        shape
        for shape in costs.shapes(work.function, *work.arguments)
        if any(n and n % batch == 0 for n in shape) and math.prod(shape) >= ACTIVATION * batch
    }
    return hlo.unsplit(hlo.Program(compile_work(work)[1]), shapes, batch, **mesh.shape)


def _remedies(cfg, name, mesh):
    """[{key: value}] of changes that may make a training step fit, the cheapest first."""
    model, key = {'tokenizer': 'vae'}.get(name, 'ar'), f'{name}_training'
    remat = {} if cfg[model].remat else {f'{model}.remat': True}
    splits = [
        n for n in (4, 16) if mesh.size % n == 0 and n > cfg.mesh.fsdp >= 1 and cfg.mesh.tensor == 1
    ]
    splits = [{'mesh.data': -1, 'mesh.fsdp': n} for n in splits]
    found = [remat, *splits, *(remat | split for split in splits)]
    options, parts = cfg[key], mesh.size
    whole = (
        name == 'tokenizer' and options.disc_weight
    )  # a discriminator needs its whole batch at once
    divisors = [n for n in (2, 4, 8, 16) if options.batch_size % (parts * n) == 0]
    pieces = [] if whole else [n for n in divisors if n > options.accumulate]
    found += [remat | {f'{key}.accumulate': n} for n in pieces]
    found += [remat | split | {f'{key}.accumulate': n} for split in splits for n in pieces[-1:]]
    found += (
        [remat | {f'{key}.batch_size': options.batch_size // n} for n in divisors] if whole else []
    )
    return [change for i, change in enumerate(found) if change and change not in found[:i]]


def _remedy(cfg, name, mesh, say):
    """What makes a training step fit, for people: flags, and the bytes of a device with them."""
    for change in _remedies(cfg, name, mesh):
        flags = ' '.join(f'--config.{key}={value}' for key, value in change.items())
        other = schema.changed(cfg, change)
        try:
            work = _step(
                other, name, sharding.make_mesh(**other.mesh, devices=list(mesh.devices.flat))
            )
            needed = sum(memory(compile_work(work)[0], work.groups).values())
            return f'fits with {flags} ({size(needed)})'
        except OutOfMemoryError as error:
            say(f'  tried {flags}: {error}')
    return NO_REMEDY


def _lines(r):
    """A program's result as lines for the console."""
    yield f'{r["part"]}, {r["slice"]} ({r["mesh"]}), {r["batch"]} images, {r["dtype"]}'
    if not r['fits']:
        yield f'  DOES NOT FIT: {r["why"]}; {r["remedy"]}'
        return
    parts = ', '.join(
        f'{NAMES.get(name, name)} {size(n)}' for name, n in r['memory'].items() if n >= 2**20
    )
    yield f'  fits: {size(r["total_bytes"])} of {size(r["device_bytes"])} on each device: {parts}'
    again = r['flops_computed'] / r['flops'] - 1
    yield f'  {r["flops"]:.3g} FLOPs' + (f' (and {again:.0%} more, recomputed)' if again else '')
    yield f'  HBM: {r["hbm_bytes"] / 1e9:.3g} GB moved by a device, {r["intensity"]:.3g} FLOPs a byte'
    if r['not_split']:
        yield f'  {r["not_split"]}'
    for kind, t in r['collectives'].items():
        yield f'  {kind}: {t["count"]:.0f} times, {t["sent_bytes"] / 1e9:.3g} GB sent by a device'
    s = r['seconds']
    times = f'compute {s["compute"]:.3g} s, HBM {s["hbm"]:.3g} s, ICI {s["ici"]:.3g} s'
    rate = (
        f', {r["batch"] / r["devices"] / r["least_seconds"]:.3g} images a second and device at most'
    )
    whole = f', {r["days"]:.3g} days of {r["steps"]} steps' if r['steps'] else rate
    yield f'  at least {r["least_seconds"]:.3g} s ({times}){whole}'
    if r['replicated'] is None:
        return
    if not r['replicated']:
        yield "  no device has anything of another one's images"
        return
    _, shape, opcode, place = r['replicated'][0]
    count = len(r['replicated'])
    yield f"  NOT SPLIT: each device has {count} arrays of others' images, the largest {shape}, {opcode} of {place}"


def table(results):
    """Results as a Markdown table."""
    head = ('part', 'slice', 'images', 'fits', 'GiB a device', 'of them activations and temporaries', 'PFLOPs a step',
            'sent GB', 'HBM GB', 'least s', 'bound by', 'days', 'days at half the rates')  # fmt: skip
    rows = []
    for r in results:
        cells = [r['part'], r['slice'], r['batch']]
        if r['fits']:
            sent = sum(t['sent_bytes'] for t in r['collectives'].values()) / 1e9
            days = [f'{r["days"]:.3g}', f'{2 * r["days"]:.3g}'] if r['steps'] else ['', '']
            cells += [
                'yes', f'{r["total_bytes"] / GiB:.1f} of {r["device_bytes"] / GiB:.0f}',
                f'{r["memory"].get("temporaries", 0) / GiB:.1f}', f'{r["flops"] / 1e15:.3g}', f'{sent:.3g}',
                f'{r["hbm_bytes"] / 1e9:.3g}', f'{r["least_seconds"]:.3g}', r['bound'], *days,
            ]  # fmt: skip
        else:
            cells += [f'no: {r["why"]}', r['remedy'], *[''] * 8]
        rows.append(cells)
    return '\n'.join(markdown(head, rows))


def devices_of(piece):
    """The devices of a `devices.Slice`, without any. Raises UserError where libtpu is not installed
    or refuses.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise UserError("the TPUs' compiler is not installed: pip install -e '.[tpu-compiler]'")
    # What libtpu would else ask of Google's machines, or complain of. Nothing here holds a TPU:
    # others may compile.
    os.environ.update(
        TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE=piece.name,
        ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_MIN_LOG_LEVEL='3', TPU_STDERR_LOG_LEVEL='3',
    )  # fmt: skip
    from jax.experimental import topologies  # imports libtpu

    try:
        return topologies.get_topology_desc(
            platform='tpu', topology_name=piece.topology, chip_config_name=piece.chip.setting
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'{piece.name}: libtpu says {first_line(error)}') from None


def _examine(cfg, piece, mesh, work, audit, say):
    """One program on one slice, as a dict of plain values."""
    r = {
        'part': work.name, 'slice': piece.name, 'chips': piece.chips, 'devices': work.devices, 'batch': work.images,
        'dtype': cfg.dtype,
        'mesh': ', '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or '1 device',
        'remat': bool(cfg.vae.remat if work.name == 'tokenizer step' else cfg.ar.remat), 'steps': work.steps,
        'not_split': sharding.describe_not_split(mesh, work.groups) if work.devices > 1 else '', 'fits': True,
    }  # fmt: skip
    name, started = work.name.removesuffix(' step'), time.perf_counter()
    try:
        r |= measure(work, piece.chip)
    except OutOfMemoryError as error:
        remedy = _remedy(cfg, name, mesh, say) if work.steps else NO_REMEDY
        return r | {
            'fits': False,
            'why': str(error),
            'remedy': remedy,
            'needed_bytes': error.needed,
        }
    r['compile_seconds'] = time.perf_counter() - started
    if work.steps:
        r['days'] = r['least_seconds'] * work.steps / 86400
    r['replicated'] = replicated(cfg, name, mesh) if work.steps and audit else None
    return r


def run(cfg, topology, parts=tuple(programs.WORKS), output=None, audit=True):
    """Compiles a config's programs for slices of TPUs; prints what they take, and a table in the
    end.

    Args:
      cfg: a config. topology: names of slices as `devices.find_slice` takes them, separated by
        commas.
      parts: of `programs.WORKS`. output: a JSON file for everything, written after each program.
      audit: whether each training step is compiled once more, to look for what is replicated.
    Returns:
      a list of dicts, one for each program and slice. Raises UserError, one line, for unknown
        names, sizes that do not
      go together, and where there is no compiler.
    """
    say = lambda text: print(text, flush=True)
    try:
        pieces = [find_slice(name) for name in topology.split(',')]
    except ValueError as error:
        raise UserError(f'--topology: {error}') from None
    if unknown := [part for part in parts if part not in programs.WORKS]:
        raise UserError(f'--parts: there is no {unknown[0]}; there are {", ".join(programs.WORKS)}')
    jax.config.update('jax_platforms', 'cpu')  # what computes here
    results = []
    for piece in pieces:
        try:
            mesh = sharding.make_mesh(**cfg.mesh, devices=devices_of(piece))
        except ValueError as error:
            raise UserError(f'{piece.name}: {error}') from None
        for part in parts:
            for work in programs.WORKS[part](cfg, mesh):
                if work.devices > 1 and (why := sharding.misfit(mesh, work.images)):
                    raise UserError(
                        f'{work.name} for {piece.name}: {why}: use another batch size or mesh'
                    )
                print(f'{work.name} for {piece.name}: compiling', file=sys.stderr, flush=True)
                results.append(_examine(cfg, piece, mesh, work, audit, say))
                for line in _lines(results[-1]):
                    say(line)
                if output is not None:
                    files.write_json(output, results)
    say(f'\n{table(results)}\n{ASSUMED}')
    return results
