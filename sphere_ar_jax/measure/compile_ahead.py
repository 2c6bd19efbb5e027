"""The job of --mode=compile: a config's programs, compiled for TPUs and GPUs that are not there.

libtpu has the TPUs' compiler and needs no TPU. JAX's CUDA plugin has the GPUs' compiler and needs
no GPU. For each slice and each program this module finds:

- whether it fits a chip's memory, and what takes how much of that;
- its operations;
- the bytes that a chip moves in its memory and sends to others, read from the compiled program;
- the least time by the rates of `devices`;
- of a GPU, the kernels that it starts, by what they are made with;
- for training steps, that no chip has other chips' images.

What is counted how:
  memory       of one device, as the compiler laid it out. Results that take the place of arguments
               count once.
  FLOPs        matrix products and convolutions of the whole batch, by `costs.flops`: those of the
               model, and those that are computed, with what remat computes again.
  HBM, links   of one chip, by `hlo.Program`. Loops count as often as they run; those whose length
               is data (rejection sampling) count as one round. What is sent follows from the ring
               algorithms.
  least time   the longest of FLOPs / peak rate, HBM bytes / their rate, and sent bytes / the rate
               of the links. All three go on at the same time at their published peak, with all
               links of a chip in use, so that no real step is as fast.
  kernels      of one GPU, by `hlo.Program.kernels`.

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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.measure import costs, hlo, programs
from sphere_ar_jax.measure.devices import Chip, GiB, Slice, find_slice, target_config
from sphere_ar_jax.runtime import files, sharding
from sphere_ar_jax.runtime.console import UserError, first_line, markdown, size
from sphere_ar_jax.runtime.types import PyTree

# {key of the config: value}
Change: TypeAlias = dict[str, Any]
# What was found of one program on one slice, in plain values.
Result: TypeAlias = dict[str, Any]

# What a program's memory holds → its name for people.
NAMES = {
    **programs.NAMES,
    'batch': 'images',
    'rows': 'images',
    'temporaries': 'activations and other temporaries',
}

# From so many elements for each image on, an array is an activation. Keys, labels and draws of one
# number are smaller.
ACTIVATION = 64

NO_REMEDY = 'use more chips, or fewer images'

ASSUMED = (
    "The least time assumes the chips' published peak rates, bfloat16 products, ring algorithms "
    'over all links of a chip, and that computing, HBM and links go on at the same time: no real '
    'step is as fast.'
)


class OutOfMemoryError(RuntimeError):
    """A program does not fit.

    Attributes:
      needed: bytes; None where the compiler does not say.
      available: bytes; None where the compiler does not say.
    """

    def __init__(self, needed: float | None = None, available: float | None = None):
        message = 'more than there is'
        if needed is not None and available is not None:
            message = f'{size(needed)} needed, {size(available)} there'
        super().__init__(message)
        self.needed = needed
        self.available = available


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Turns the cache of compiled programs off.

    A program from the cache has no text, and one for a TPU cannot be read without a TPU.
    """
    # JAX's options are attributes that its types do not list.
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # JAX asks only once whether there is a cache.
    try:
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', before)
        compilation_cache.reset_cache()


def _of_one_gpu(work: programs.Work) -> AbstractContextManager[Any]:
    """Returns a context that tells Pallas the card of a program for one GPU.

    On several devices the program's own mesh tells it.
    """
    placed = [a.sharding for a in jax.tree.leaves(work.arguments) if a.sharding is not None]
    devices = list(placed[0].device_set) if placed else []
    if len(devices) != 1 or devices[0].platform != 'gpu':
        return contextlib.nullcontext()
    card = Mesh(devices, ('card',)).abstract_mesh.abstract_device
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card))


def compile_work(work: programs.Work) -> tuple[Any, str]:
    """Compiles a program.

    Args:
      work: the program.

    Returns:
      the compiled program (`jax.stages.Compiled`), and its instructions as text.

    Raises:
      OutOfMemoryError: the program does not fit the device.
    """
    # The text comes from a dump, because `as_text` fails for some TPU programs.
    with _uncached(), tempfile.TemporaryDirectory() as directory:
        options = {
            'xla_dump_to': directory,
            'xla_dump_hlo_as_text': True,
            'xla_gpu_enable_triton_gemm': False,
        }
        try:
            with _of_one_gpu(work):
                lowered = work.function.lower(*work.arguments)
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            found = re.findall(r'([\d.]+)([KMGT])\b', str(error))
            counts = [float(n) * 1024 ** (1 + 'KMGT'.index(unit)) for n, unit in found]
            raise OutOfMemoryError(*(counts[:2] if len(counts) > 1 else ())) from None
        (file,) = pathlib.Path(directory).glob('*after_optimizations.txt')
        return compiled, file.read_text()


def memory(compiled: Any, groups: Mapping[str, PyTree]) -> dict[str, int]:
    """What a program holds in the memory of one device.

    Args:
      compiled: the first result of `compile_work`.
      groups: {name: a part of the arguments}.

    Returns:
      {name: bytes} of the groups, of the padding of arguments, of results that are kept beside
      them, of temporaries and of code. What takes nothing is left out.
    """
    m = compiled.memory_analysis()
    found = {name: costs.device_bytes(tree) for name, tree in groups.items()}
    found |= {
        'padding': max(0, m.argument_size_in_bytes - sum(found.values())),
        'results': m.output_size_in_bytes - m.alias_size_in_bytes,
        'temporaries': m.temp_size_in_bytes,
        'code': m.generated_code_size_in_bytes,
    }
    return {name: int(count) for name, count in found.items() if count}


def measure(work: programs.Work, chip: Chip) -> Result:
    """What a program takes on a chip, counted as the top of this module says.

    Args:
      work: the program.
      chip: of the devices that it is laid out for.

    Raises:
      OutOfMemoryError: the program does not fit.
    """
    compiled, text = compile_work(work)
    program = hlo.Program(text, work.lengths, work.taken)
    parts = memory(compiled, work.groups)
    sent = program.collectives()
    moved = program.memory_traffic()
    total = sum(parts.values())
    there = chip.hbm // chip.devices
    # The GPUs' compiler lays out whatever it is given.
    if total > there:
        raise OutOfMemoryError(total, there)
    share = chip.devices / work.devices
    seconds = {
        'compute': work.computed * share / chip.flops,
        'hbm': moved * chip.devices / chip.hbm_rate,
        'links': sum(t.sent for t in sent.values()) * chip.devices / chip.link_rate,
    }
    return {
        'memory': parts,
        'total_bytes': total,
        'device_bytes': there,
        'flops': work.flops,
        'flops_computed': work.computed,
        'flops_device': work.computed / work.devices,
        'hbm_bytes': moved,
        'intensity': work.computed / work.devices / moved,
        'collectives': {
            kind: {'count': t.count, 'sent_bytes': t.sent} for kind, t in sorted(sent.items())
        },
        'open_loops': program.open_loops,
        'kernels': program.kernels() if chip.is_gpu else None,
        'seconds': seconds,
        'least_seconds': max(seconds.values()),
        'bound': max(seconds, key=seconds.__getitem__),
    }


def _step(cfg: ConfigDict, name: str, mesh: Mesh) -> programs.Work:
    """The program of a training step, by the stage's name."""
    return next(work for work in programs.training_works(cfg, mesh) if work.name == f'{name} step')


def replicated(cfg: ConfigDict, name: str, mesh: Mesh) -> list[tuple[int, str, str, str]]:
    """The arrays of other devices' images that one device has in a training step.

    There should be none. The step is compiled with another batch, which the mesh splits in the same
    way: each part of the mesh gets a prime number of images that divides no size of the model, so
    that arrays of images can be told from all others.

    Args:
      cfg: a checked config.
      name: of the stage.
      mesh: the devices. Where it does not split a batch there is nothing to find.

    Returns:
      The arrays that `hlo.unsplit` finds.
    """
    parts = sharding.batch_parts(mesh)
    if parts == 1:
        return []
    stage, frozen = programs.stages(cfg)[name]
    ar = build.build_ar(cfg)
    vae = build.build_vae(cfg)
    params = jax.tree.leaves((jax.eval_shape(stage.init, jax.random.key(0)), frozen))
    sizes = {size for leaf in params for size in leaf.shape} | {*vae.image_shape}
    # Lengths of sequences: tokens of an image, inputs in front of them, and those of the tokenizer.
    sizes |= {ar.num_tokens, ar.front, ar.num_tokens + ar.front - 1, ar.num_tokens + 4}
    primes = (11, 17, 19, 23, 29, 31, 37)
    batch = parts * next(p for p in primes if all(size % p for size in sizes))
    key = f'{name}_training'
    other = schema.changed(cfg, {f'{key}.batch_size': batch * cfg[key].accumulate})
    work = _step(other, name, mesh)
    shapes = {
        shape
        for shape in costs.shapes(work.function, *work.arguments)
        if any(n and n % batch == 0 for n in shape) and math.prod(shape) >= ACTIVATION * batch
    }
    _, text = compile_work(work)
    return hlo.unsplit(hlo.Program(text), shapes, batch, **mesh.shape)


def _remedies(cfg: ConfigDict, name: str, mesh: Mesh) -> list[Change]:
    """Changes of the config that may make a training step fit, the cheapest first."""
    model = 'vae' if name == 'tokenizer' else 'ar'
    key = f'{name}_training'
    options = cfg[key]
    remat: Change = {} if build.recomputes(cfg[model]) else {f'{model}.remat': True}
    splits: list[Change] = []
    for n in (4, 16):
        if mesh.size % n == 0 and n > cfg.mesh.fsdp >= 1 and cfg.mesh.tensor == 1:
            splits.append({'mesh.data': -1, 'mesh.fsdp': n})
    divisors = [n for n in (2, 4, 8, 16) if options.batch_size % (mesh.size * n) == 0]
    # A discriminator and the loss of texts need the whole batch at once, so that it can only become
    # smaller.
    pieces: list[int] = []
    fractions: list[int] = []
    is_whole = options.disc_weight if name == 'tokenizer' else build.writes_texts(cfg)
    if is_whole:
        fractions = divisors
    else:
        pieces = [n for n in divisors if n > options.accumulate]
    found = [remat, *splits, *(remat | split for split in splits)]
    found += [remat | {f'{key}.accumulate': n} for n in pieces]
    found += [remat | split | {f'{key}.accumulate': n} for split in splits for n in pieces[-1:]]
    found += [remat | {f'{key}.batch_size': options.batch_size // n} for n in fractions]
    return [change for i, change in enumerate(found) if change and change not in found[:i]]


def _remedy(cfg: ConfigDict, name: str, mesh: Mesh) -> str:
    """What makes a training step fit, for people: flags, and the bytes of a device with them."""
    for change in _remedies(cfg, name, mesh):
        flags = ' '.join(f'--config.{key}={value}' for key, value in change.items())
        other = schema.changed(cfg, change)
        try:
            other_mesh = sharding.make_mesh(**other.mesh, devices=list(mesh.devices.flat))
            work = _step(other, name, other_mesh)
            compiled, _ = compile_work(work)
            needed = sum(memory(compiled, work.groups).values())
            return f'fits with {flags} ({size(needed)})'
        except OutOfMemoryError as error:
            _say(f'  tried {flags}: {error}')
    return NO_REMEDY


def _time_line(r: Result) -> str:
    """The least time of a program's result, as a line for the console."""
    s = r['seconds']
    times = f'compute {s["compute"]:.3g} s, HBM {s["hbm"]:.3g} s, links {s["links"]:.3g} s'
    if r['steps']:
        whole = f'{r["days"]:.3g} days of {r["steps"]} steps'
    else:
        rate = r['batch'] / r['devices'] / r['least_seconds']
        whole = f'{rate:.3g} images a second and device at most'
    return f'  at least {r["least_seconds"]:.3g} s ({times}), {whole}'


# The share of a GPU's memory that JAX takes where no variable says more.
_PREALLOCATED = 0.75


def _lines(r: Result) -> Iterator[str]:
    """A program's result as lines for the console."""
    yield f'{r["part"]}, {r["slice"]} ({r["mesh"]}), {r["batch"]} images, {r["dtype"]}'
    if not r['fits']:
        yield f'  DOES NOT FIT: {r["why"]}; {r["remedy"]}'
        return
    parts = ', '.join(
        f'{NAMES.get(name, name)} {size(n)}' for name, n in r['memory'].items() if n >= 2**20
    )
    yield f'  fits: {size(r["total_bytes"])} of {size(r["device_bytes"])} on each device: {parts}'
    if r['kernels'] is not None and r['total_bytes'] > _PREALLOCATED * r['device_bytes']:
        needed = math.ceil(100 * r['total_bytes'] / r['device_bytes']) / 100
        yield (
            f'  JAX gives a program {_PREALLOCATED:.0%} of a GPU, and this one needs more: set '
            f'XLA_CLIENT_MEM_FRACTION={needed:.2f} or higher'
        )
    again = r['flops_computed'] / r['flops'] - 1
    yield f'  {r["flops"]:.3g} FLOPs' + (f' (and {again:.0%} more, recomputed)' if again else '')
    moved = f'{r["hbm_bytes"] / 1e9:.3g} GB'
    yield f'  HBM: {moved} moved by a device, {r["intensity"]:.3g} FLOPs a byte'
    if r['not_split']:
        yield f'  {r["not_split"]}'
    for kind, t in r['collectives'].items():
        yield f'  {kind}: {t["count"]:.0f} times, {t["sent_bytes"] / 1e9:.3g} GB sent by a device'
    if r['kernels'] is not None:
        kinds = ', '.join(f'{n:,.0f} {kind}' for kind, n in r['kernels'].items())
        yield f'  {sum(r["kernels"].values()):,.0f} kernels: {kinds}'
    yield _time_line(r)
    if r['replicated'] is None:
        return
    if not r['replicated']:
        yield "  no device has anything of another one's images"
        return
    _, shape, opcode, place = r['replicated'][0]
    found = f"{len(r['replicated'])} arrays of others' images"
    yield f'  NOT SPLIT: each device has {found}, the largest {shape}, {opcode} of {place}'


def table(results: Iterable[Result]) -> str:
    """The results of `run` as a Markdown table."""
    head = (
        'part', 'slice', 'images', 'fits', 'GiB a device', 'of them activations and temporaries',
        'PFLOPs a step', 'sent GB', 'HBM GB', 'least s', 'bound by', 'days',
        'days at half the rates',
    )  # fmt: skip
    rows = []
    for r in results:
        cells = [r['part'], r['slice'], r['batch']]
        if r['fits']:
            sent = sum(t['sent_bytes'] for t in r['collectives'].values()) / 1e9
            cells += [
                'yes',
                f'{r["total_bytes"] / GiB:.1f} of {r["device_bytes"] / GiB:.0f}',
                f'{r["memory"].get("temporaries", 0) / GiB:.1f}',
                f'{r["flops"] / 1e15:.3g}',
                f'{sent:.3g}',
                f'{r["hbm_bytes"] / 1e9:.3g}',
                f'{r["least_seconds"]:.3g}',
                r['bound'],
                f'{r["days"]:.3g}' if r['steps'] else '',
                f'{2 * r["days"]:.3g}' if r['steps'] else '',
            ]
        else:
            cells += [f'no: {r["why"]}', r['remedy'], *[''] * 8]
        rows.append(cells)
    return '\n'.join(markdown(head, rows))


def _require(package: str, kind: str, extra: str) -> None:
    """Raises UserError unless the package that has the compiler for such chips is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"the {kind}' compiler is not installed: pip install -e '.[{extra}]'")


def _tpus(piece: Slice) -> Any:
    """The description of a slice by libtpu."""
    _require('libtpu', 'TPUs', 'tpu-compiler')
    # Without these libtpu asks Google's machines, or complains. Several processes may load it,
    # because none here holds a TPU.
    os.environ.update(
        TPU_SKIP_MDS_QUERY='1',
        TPU_WORKER_HOSTNAMES='localhost',
        TPU_ACCELERATOR_TYPE=piece.name,
        ALLOW_MULTIPLE_LIBTPU_LOAD='1',
        TPU_MIN_LOG_LEVEL='3',
        TPU_STDERR_LOG_LEVEL='3',
    )
    from jax.experimental import topologies  # This imports libtpu.

    return topologies.get_topology_desc(
        platform='tpu', topology_name=piece.topology, chip_config_name=piece.chip.setting
    )


def _gpus(piece: Slice) -> Any:
    """The description of the cards of one host by JAX's CUDA plugin."""
    _require('jax_cuda12_plugin', 'GPUs', 'gpu-compiler')
    from jax.experimental import topologies

    jax.devices()  # JAX finds its plugins here.
    return topologies.get_topology_desc(
        platform='cuda',
        topology_name='',
        topology=piece.shape,
        target_config=target_config(piece.chip),
    )


def devices_of(piece: Slice) -> Sequence[Any]:
    """The devices of a slice, described by their compiler on a machine that has none of them.

    Args:
      piece: the slice.

    Raises:
      UserError: the compiler is not installed, or refuses.
    """
    describe = _gpus if piece.chip.is_gpu else _tpus
    try:
        return describe(piece).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'{piece.name}: the compiler says {first_line(error)}') from None


def _examine(
    cfg: ConfigDict,
    piece: Slice,
    mesh: Mesh,
    work: programs.Work,
    audit: bool,
) -> Result:
    """Compiles and counts one program for one slice.

    Args:
      cfg: a checked config.
      piece: the slice.
      mesh: its devices.
      work: the program.
      audit: whether arrays that are not split are looked for.
    """
    model = cfg.vae if work.name == 'tokenizer step' else cfg.ar
    not_split = sharding.describe_not_split(mesh, work.groups) if work.devices > 1 else ''
    r = {
        'part': work.name,
        'slice': piece.name,
        'chips': piece.chips,
        'devices': work.devices,
        'batch': work.images,
        'dtype': cfg.dtype,
        'mesh': ', '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or '1 device',
        'remat': build.recomputes(model),
        'steps': work.steps,
        'not_split': not_split,
        'fits': True,
    }
    name = work.name.removesuffix(' step')
    started = time.perf_counter()
    try:
        r |= measure(work, piece.chip)
    except OutOfMemoryError as error:
        remedy = _remedy(cfg, name, mesh) if work.steps else NO_REMEDY
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


def _pieces(topology: str) -> list[Slice]:
    """The slices of names separated by commas. Raises UserError for an unknown one."""
    try:
        return [find_slice(name) for name in topology.split(',')]
    except ValueError as error:
        raise UserError(f'--topology: {error}') from None


def _mesh_of(cfg: ConfigDict, piece: Slice) -> Mesh:
    """The config's mesh on a slice. Raises UserError where the sizes do not go together."""
    try:
        return sharding.make_mesh(**cfg.mesh, devices=devices_of(piece))
    except ValueError as error:
        raise UserError(f'{piece.name}: {error}') from None


def _say(text: str) -> None:
    print(text, flush=True)


def run(
    cfg: ConfigDict,
    topology: str,
    parts: Collection[str] = tuple(programs.WORKS),
    output: str | None = None,
    audit: bool = True,
) -> list[Result]:
    """Compiles a config's programs for slices of TPUs, or for the GPUs of a host.

    It prints what they take, and a table in the end.

    Args:
      cfg: a checked config.
      topology: names of slices as `devices.find_slice` takes them, separated by commas.
      parts: keys of `programs.WORKS`.
      output: a JSON file for everything, written after each program; None writes none.
      audit: whether each training step is compiled once more, to look for what is replicated.

    Returns:
      one dict of plain values for each program and slice.

    Raises:
      UserError: a name is unknown, sizes do not go together, or there is no compiler; the message
        is one line.
    """
    pieces = _pieces(topology)
    if unknown := [part for part in parts if part not in programs.WORKS]:
        raise UserError(f'--parts: there is no {unknown[0]}; there are {", ".join(programs.WORKS)}')
    jax.config.update('jax_platforms', 'cpu')  # The CPU does what is computed here.
    results: list[Result] = []
    for piece in pieces:
        mesh = _mesh_of(cfg, piece)
        works = (work for part in parts for work in programs.WORKS[part](cfg, mesh))
        for work in works:
            if work.devices > 1 and (why := sharding.misfit(mesh, work.images)):
                raise UserError(
                    f'{work.name} for {piece.name}: {why}: use another batch size or mesh'
                )
            print(f'{work.name} for {piece.name}: compiling', file=sys.stderr, flush=True)
            results.append(_examine(cfg, piece, mesh, work, audit))
            for line in _lines(results[-1]):
                _say(line)
            if output is not None:
                files.write_json(output, results)
    _say(f'\n{table(results)}\n{ASSUMED}')
    return results
