"""Compiling ahead of time: the reader of programs against programs whose numbers are known, and the
job on CPUs.

With libtpu installed the slow tests compile for real TPUs.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sphere_ar_jax.config import build, checks, packaged
from sphere_ar_jax.flow import solvers
from sphere_ar_jax.measure import compile_ahead, costs, devices, hlo, programs
from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.ar import unstacked
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.sampling.tokens import sample_tokens
from tests import tiny_config
from tests.conftest import forced_devices, libraries_promote

ROOT = pathlib.Path(__file__).parents[2]
CUDA = 'jax_cuda12_plugin'
needs_cuda = pytest.mark.skipif(importlib.util.find_spec(CUDA) is None, reason=f'needs {CUDA}')
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')

# Every kind of collective, in a loop of 5, at the top, in a fusion, in halves, and in two fusions;
# one array lies in a TPU's own memory.
HLO = """
HloModule hand, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%scattered (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %reduced = f32[64]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %mine = f32[16]{0} dynamic-slice(%reduced, %zero), dynamic_slice_sizes={16}
}

%begun (p.1: f32[64]) -> f32[512] {
  %p.1 = f32[64]{0} parameter(0)
  ROOT %early = f32[512]{0} all-gather(%p.1), channel_id=3, \
replica_groups=[1,8]<=[8], dimensions={0}
}

%ended (p.2: f32[64]) -> f32[512] {
  %p.2 = f32[64]{0} parameter(0)
  ROOT %late = f32[512]{0} all-gather(%p.2), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
}

%turned (t: f32[64]) -> f32[8,8] {
  %t = f32[64]{0} parameter(0)
  ROOT %square = f32[8,8]{1,0} bitcast(%t)
}

%nested (s.2: f32[64]) -> f32[8,8] {
  %s.2 = f32[64]{0} parameter(0)
  %inner = f32[8,8]{1,0} fusion(%s.2), kind=kLoop, calls=%turned
  ROOT %product = f32[8,8]{1,0} dot(%inner, %inner), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%sliced (whole: f32[5,128], i: s32[]) -> f32[128] {
  %whole = f32[5,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,128]{1,0} dynamic-slice(%whole, %i, %zero), dynamic_slice_sizes={1,128}
  ROOT %flat = f32[128]{0} bitcast(%row)
}

%body (state: (s32[], f32[128], f32[5,128])) -> (s32[], f32[128], f32[5,128]) {
  %state = (s32[], f32[128]{0}, f32[5,128]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = f32[128]{0} get-tuple-element(%state), index=1
  %all = f32[5,128]{1,0} get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %w = f32[128]{0} fusion(%all, %n), kind=kLoop, calls=%sliced
  %y = f32[128]{0} all-reduce(%w), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %out = (s32[], f32[128]{0}, f32[5,128]{1,0}) tuple(%next, %y, %all)
}

%condition (state.1: (s32[], f32[128], f32[5,128])) -> pred[] {
  %state.1 = (s32[], f32[128]{0}, f32[5,128]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] compare(%n.1, %end), direction=LT
}

ENTRY %main (x.1: f32[128], all.1: f32[5,128], y.1: bf16[100], s.1: f32[64]) -> f32[128] {
  %x.1 = f32[128]{0} parameter(0)
  %all.1 = f32[5,128]{1,0} parameter(1)
  %y.1 = bf16[100]{0:T(256)(128)(2,1)} parameter(2)
  %s.1 = f32[64]{0} parameter(3)
  %start = s32[] constant(0)
  %state.2 = (s32[], f32[128]{0}, f32[5,128]{1,0}) tuple(%start, %x.1, %all.1)
  %loop = (s32[], f32[128]{0}, f32[5,128]{1,0}) while(%state.2), condition=%condition, body=%body
  %gather = (f32[128]{0}, f32[1024]{0}) all-gather-start(%x.1), \
replica_groups=mesh['a'=2,'b'=4] {'a','b'}
  %gathered = f32[1024]{0} all-gather-done(%gather)
  %permuted = bf16[100]{0:T(256)(128)(2,1)S(1)} collective-permute(%y.1), \
source_target_pairs={{0,1},{1,0}}
  %begin = f32[512]{0} fusion(%s.1), kind=kCustom, calls=%begun
  %end.1 = f32[512]{0} fusion(%s.1), kind=kCustom, calls=%ended
  %multiplied = f32[8,8]{1,0} fusion(%s.1), kind=kOutput, calls=%nested
  %scatter = f32[16]{0} fusion(%s.1), kind=kCustom, calls=%scattered, \
metadata={op_name="all-reduce-scatter"}
  ROOT %result = f32[128]{0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_by_hand():
    """Ring algorithms: an all-reduce of n devices sends 2(n − 1)/n of its bytes, a gather (n − 1)/n
    of its result.
    """
    program = hlo.Program(HLO)
    assert program.devices == 8
    assert program.open_loops == 0
    assert program.collectives() == {
        'all-reduce': (5, 5 * 2 * 3 / 4 * 512),
        'all-gather': (2, 7 / 8 * (4096 + 2048)),
        'collective-permute': (1, 512),  # 100 numbers of 2 bytes fill a tile of 256
        'reduce-scatter': (1, 3 / 4 * 256),
    }


def test_memory_traffic_by_hand():
    """A slice reads what it takes; what lies in a chip's own memory costs nothing; loops count as
    often as they run.
    """
    loop = 5 * ((512 + 512 + 4) + (512 + 512) + 3 * 4) + 6 * (4 + 4 + 1)
    once = (512 + 4096) + 512 + 2 * (256 + 2048) + 2 * 256 + (256 + 64)
    assert hlo.Program(HLO).memory_traffic() == loop + once


# What the GPUs' compiler makes of a loop of 5 products, attention, and a sum over 8 devices.
KERNELS = """
HloModule gpu, num_partitions=8

%one_more (n: s32[]) -> s32[] {
  %n = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %more = s32[] add(%n, %one)
}

%smaller (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %compared = pred[] compare(%a, %b), direction=LT
}

%dot (a.1: bf16[8,8]) -> bf16[8,8] {
  %a.1 = bf16[8,8]{1,0} parameter(0)
  ROOT %product = bf16[8,8]{1,0} dot(%a.1, %a.1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%body (s: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %s = (s32[], bf16[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[8,8]{1,0} get-tuple-element(%s), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%one_more
  %y = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%dot, \
backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  ROOT %out = (s32[], bf16[8,8]{1,0}) tuple(%next, %y)
}

%condition (s.1: (s32[], bf16[8,8])) -> pred[] {
  %s.1 = (s32[], bf16[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] fusion(%i.1, %end), kind=kLoop, calls=%smaller
}

ENTRY %main (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %copy.1 = bf16[8,8]{1,0} copy(%p)
  %start = (s32[], bf16[8,8]{1,0}) tuple(%zero, %copy.1)
  %loop = (s32[], bf16[8,8]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %x.1 = bf16[8,8]{1,0} get-tuple-element(%loop), index=1
  %att = (bf16[8,8]{1,0}, u8[0]{0}) custom-call(%x.1, %x.1, %x.1), \
custom_call_target="__cudnn$fmhaSoftmax"
  %o = bf16[8,8]{1,0} get-tuple-element(%att), index=0
  %mm = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%o, %o), custom_call_target="__cublas$lt$matmul"
  %m = bf16[8,8]{1,0} get-tuple-element(%mm), index=0
  %begin = bf16[8,8]{1,0} all-reduce-start(%m), replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %done = bf16[8,8]{1,0} all-reduce-done(%begin)
}
"""

# A product that runs beside others: a call of a library inside a computation of its own.
ASYNC = """HloModule jit_g, is_scheduled=true

%inner (q: bf16[8,8]) -> bf16[8,8] {
  %q = bf16[8,8]{1,0} parameter(0)
  %mm = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%q, %q), custom_call_target="__cublas$lt$matmul"
  ROOT %m = bf16[8,8]{1,0} get-tuple-element(%mm), index=0
}

ENTRY %main (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  %begun = ((bf16[8,8]{1,0}), bf16[8,8]{1,0}, s32[]) async-start(%p), calls=%inner
  ROOT %done = bf16[8,8]{1,0} async-done(%begun)
}
"""


def test_kernels_by_hand():
    """A loop's condition starts none, its body as many as it runs, and both halves of a collective
    are one.
    """
    assert hlo.Program(KERNELS).kernels() == {
        'Triton': 5,
        'XLA': 5,
        'collective': 1,
        'copy': 1,
        'cuBLAS': 1,
        'cuDNN': 1,
    }
    assert hlo.Program(ASYNC).kernels() == {'cuBLAS': 1}


def test_room_to_work_in_is_no_traffic():
    """A call of a GPU's library reads its operands and writes its first result."""
    loop = 5 * ((4 + 4) + (128 + 128)) + 6 * (4 + 4 + 1)
    copy = 128 + 128
    attention = 3 * 128 + 128
    product = 2 * 128 + 128
    summed = 128
    assert hlo.Program(KERNELS).memory_traffic() == loop + copy + attention + product + summed


@pytest.mark.parametrize(
    'which', ['branch_computations={%no, %yes}', 'true_computation=%yes, false_computation=%no']
)
def test_a_branch_runs_as_often_as_it_is_taken(which):
    text = f"""
HloModule hand

%no (a: f32[4]) -> f32[4] {{
  ROOT %a = f32[4]{{0}} parameter(0)
}}

%yes (b: f32[4]) -> f32[4] {{
  %b = f32[4]{{0}} parameter(0)
  ROOT %twice = f32[4]{{0}} add(%b, %b)
}}

ENTRY %main (p: pred[], x: f32[4]) -> f32[4] {{
  %p = pred[] parameter(0)
  %x = f32[4]{{0}} parameter(1)
  ROOT %either = f32[4]{{0}} conditional(%p, %x, %x), {which}
}}
"""
    found = hlo.Program(text, taken=0.25).instructions
    times = {instruction.name: times for instruction, _, times in found}
    assert times['twice'] == 0.25
    assert times['a'] == 0.75


def test_loops_of_open_length():
    text = HLO.replace('direction=LT', 'direction=NE')
    assert hlo.Program(text).open_loops == 1
    assert hlo.Program(text).collectives()['all-reduce'].count == 1
    assert hlo.Program(text, lengths=(11,)).collectives()['all-reduce'].count == 11
    with pytest.raises(ValueError, match='no program'):
        hlo.Program('nothing')


def test_unsplit_by_hand():
    """A batch of 2·3·7 images, of 5 numbers each, on 2 × 3 devices: a device's own array has 35
    numbers.
    """

    def array(shape):
        return hlo.Program(
            HLO.replace('f32[128]{0} all-reduce(%w)', f'f32[{shape}]{{1,0}} all-reduce(%w)')
        )

    def find(shape):
        return hlo.unsplit(array(shape), {(42, 5)}, 42, 2, 3)

    assert find('7,5') == find('35,1') == find('5,42000') == find('6,34') == find('128,1') == []
    # The first three are whole; the last two are split along one axis.
    for shape in ('42,5', '5,42', '1,210', '21,5', '14,5'):
        ((size, text, opcode, _),) = find(shape)
        assert (size, text, opcode) == (
            4 * np.prod([int(n) for n in shape.split(',')]),
            f'f32[{shape}]',
            'all-reduce',
        )
    # Seven images of 30 numbers each, which are partial sums, are as many as 42 images of 5.
    assert find('7,30') == find('7,15,4') == find('30,7') == []
    assert find('7,6,5') != [] != find('2,7,15')
    # The second one has 6 times as many numbers, so that only its shape tells whose array it is.
    both = {(42, 5), (42, 5, 6)}
    assert (
        hlo.unsplit(array('210,1'), both, 42, 2, 3)
        == []
        != hlo.unsplit(array('42,5'), both, 42, 2, 3)
    )
    # 42 rows of 5 are 7 images of 6 rows, too, if there are 42 such images.
    assert hlo.unsplit(array('42,5'), {(42, 5), (42, 6, 5)}, 42, 2, 3) == []
    assert hlo.unsplit(array('42,5'), {(42, 5), (2, 42, 3, 5)}, 42, 2, 3) == []


def _read(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return hlo.Program(compiled.as_text()), compiled.cost_analysis()


def test_memory_traffic_is_what_xla_counts():
    """Without loops the compiler's own count is right; with one it counts the body once."""

    def f32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def step(x, w):
        return jnp.tanh(x @ w) + x

    program, analysis = _read(lambda x, w: step(step(x, w), w).sum(0), f32(256, 256), f32(256, 256))
    assert program.memory_traffic() == pytest.approx(analysis['bytes accessed'], rel=0.01)
    once, _ = _read(step, f32(256, 256), f32(256, 256))

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (step(x, w), None), x, None, length=50)[0]

    program, analysis = _read(loop, f32(256, 256), f32(256, 256))
    assert program.memory_traffic() == pytest.approx(50 * once.memory_traffic(), rel=0.2)
    assert analysis['bytes accessed'] < 5 * once.memory_traffic()


def test_shapes_on_the_way():
    def f(x):
        y, z = jax.lax.scan(lambda c, a: (c + a.sum(), a @ a.T), 0.0, x)
        return jax.lax.cond(y > 0, lambda: z[0].ravel(), lambda: jnp.zeros(9))

    assert costs.shapes(jax.jit(f), jnp.zeros((5, 3, 4))) >= {(), (3, 3), (5, 3, 3), (4, 3), (9,)}
    assert (7, 2) in costs.shapes(jax.checkpoint(lambda x: jnp.sin(x).T.sum()), jnp.zeros((2, 7)))


def test_slices_have_two_names():
    for text in ('v6e-256', 'v6e:16x16'):
        piece = devices.find_slice(text)
        assert (piece.name, piece.topology, piece.chips) == ('v6e-256', 'v6e:16x16', 256)
    for text, topology, count in (
        ('v4-128', 'v4:4x4x4', 64),
        ('v5p-64', 'v5p:2x4x4', 32),
        ('v5e-16', 'v5e:4x4', 16),
        ('v5litepod-16', 'v5e:4x4', 16),
    ):
        piece = devices.find_slice(text)
        assert (piece.topology, piece.chips) == (topology, count)
    piece = devices.find_slice('h100-8')
    assert (piece.chips, piece.shape, piece.chip.is_gpu) == (8, '1x1x8', True)
    for chip in devices.CHIPS.values():
        assert all(
            count == np.prod([int(n) for n in shape.split('x')])
            for count, shape in chip.shapes.items()
        )
    for text, known in (
        ('v6e-255', r'there are v6e-1 \(v6e:1x1\)'),
        ('v5p:2x2', 'v5p-8'),
        ('v9', 'known are v4'),
        ('', 'known are v4'),
    ):
        with pytest.raises(ValueError, match=known):
            devices.find_slice(text)


def test_gpus_are_described_as_their_compiler_asks():
    chips = [chip for chip in devices.CHIPS.values() if chip.is_gpu]
    assert [chip.name for chip in chips] == ['a100', 'h100', 'h200', 'b200']
    assert len({tuple(chip.target) for chip in chips}) == 1
    text = devices.target_config(devices.CHIPS['h100'])
    assert 'core_count: 132 ' in text
    assert 'cuda_compute_capability { major: 9 }' in text
    assert 'device_memory_size: 84942979072 ' in text
    assert ' major: 9 ' not in text.split('cuda_')[0]
    assert text.count('{') == text.count('}') == 3


def test_what_a_gpu_cannot_hold_does_not_fit(monkeypatch):
    """Their compiler does not refuse what is larger than the card."""
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=0,
        output_size_in_bytes=0,
        alias_size_in_bytes=0,
        generated_code_size_in_bytes=0,
        temp_size_in_bytes=80 * 2**30,
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: analysis)
    monkeypatch.setattr(compile_ahead, 'compile_work', lambda work: (compiled, KERNELS))
    work = programs.Work('x', None, (), {}, 1, 1, 1)
    with pytest.raises(compile_ahead.OutOfMemoryError, match=r'80\.0 GiB needed, 79\.1 GiB there'):
        compile_ahead.measure(work, devices.CHIPS['h100'])
    found = compile_ahead.measure(work, devices.CHIPS['h200'])
    assert found['device_bytes'] == 151397597184
    assert found['kernels']['Triton'] == 5


def test_what_does_not_fit_is_read():
    said = (
        'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total '
        'memory required for HLO temporaries (159.64G) exceeds available HBM '
        '(31.24G). HLO module: jit_step.'
    )

    def compile(**_):
        raise jax.errors.JaxRuntimeError(said)

    lowered = types.SimpleNamespace(compile=compile)
    work = programs.Work('x', types.SimpleNamespace(lower=lambda: lowered), (), {}, 1, 1, 1)
    with pytest.raises(
        compile_ahead.OutOfMemoryError, match=r'159\.6 GiB needed, 31\.2 GiB there'
    ) as error:
        compile_ahead.compile_work(work)
    assert error.value.needed == pytest.approx(159.64 * 2**30)
    said = 'RESOURCE_EXHAUSTED: no numbers'
    with pytest.raises(compile_ahead.OutOfMemoryError, match=r'^more than there is$') as error:
        compile_ahead.compile_work(work)
    assert error.value.needed is None


@libraries_promote()
def test_operations_of_the_sampler():
    """Counted from its parts, they are those of the whole sampler with the solver's loop written
    out.
    """
    cfg = tiny_config.get_config()
    cfg.ar.update(head_depth=4, head_groups=2)
    cfg.sampling.update(num_steps=3)
    ar, _ = unstacked(build.build_ar(cfg), {})
    options = build.build_sampler(cfg).options
    params = jax.eval_shape(
        lambda key: transformer.unstack(build.build_ar(cfg).init_params(key)), jax.random.key(0)
    )

    def written_out(velocity, x, rows, noise=None, *, count, prepare, chunk, take, advance):
        state = x, jnp.zeros_like(x)
        for i in range(len(rows[0])):
            prepared = take(prepare(jnp.array([i])), jnp.int32(0))
            state = advance(
                jax.tree.map(lambda a: a[i], rows),
                *state,
                velocity(state[0], prepared),
                *(() if noise is None else noise[:1]),
            )
        return state[0]

    def sample(params, labels):
        keys = jax.vmap(jax.random.key)(labels)
        return sample_tokens(ar, params, labels, keys, options, jnp.float32(1.5))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, 'integrate', written_out)
        whole = costs.flops(sample, params, jax.ShapeDtypeStruct((6,), jnp.int32))
    assert programs._tokens_flops(ar, params, 6, options) == whole


def _fake(monkeypatch):
    monkeypatch.setattr(compile_ahead, 'devices_of', lambda piece: jax.devices()[: piece.chips])


@pytest.mark.slow
@libraries_promote()
def test_the_job_on_this_machine(monkeypatch, tmp_path, capsys):
    """All of it but the TPU: one CPU device in place of a v6e-1. Its numbers are the compiler's."""
    _fake(monkeypatch)
    compiled = []
    compile_work = compile_ahead.compile_work
    monkeypatch.setattr(
        compile_ahead,
        'compile_work',
        lambda work: compiled.append(compile_work(work)) or compiled[-1],
    )
    cfg = tiny_config.get_config()
    cfg.tokenizer = '/somewhere'
    cfg.ar.remat = True
    results = compile_ahead.run(cfg, 'v6e-1', output=str(tmp_path / 'all.json'))
    assert json.loads((tmp_path / 'all.json').read_text()) == results
    assert [r['part'] for r in results] == ['ar step', 'tokens', 'decode', 'reconstruct']
    assert all(r['fits'] and r['slice'] == 'v6e-1' for r in results)
    ar, _, decode, _ = results
    analysis = compiled[0][0].memory_analysis()
    assert ar['memory']['temporaries'] == analysis.temp_size_in_bytes
    whole = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )
    assert whole <= ar['total_bytes'] <= whole + analysis.output_size_in_bytes
    n = costs.tree_bytes(jax.eval_shape(build.build_ar(cfg).init_params, jax.random.key(0)))
    assert ar['memory']['params'] == ar['memory']['ema'] == n
    assert 2 * n <= ar['memory']['opt_state'] < 2 * n + 64
    assert ar['flops_computed'] > ar['flops']
    assert decode['flops_computed'] == decode['flops']
    s = ar['seconds']
    assert s['compute'] == ar['flops_computed'] / 918e12
    assert s['hbm'] == ar['hbm_bytes'] / 1640e9
    assert s['links'] == 0
    assert ar['least_seconds'] == max(s.values())
    assert ar['days'] == ar['least_seconds'] * 6 / 86400
    out = capsys.readouterr().out
    assert 'ar step, v6e-1 (1 device), 16 images, float32' in out
    assert '| ar step | v6e-1 | 16 | yes |' in out
    assert 'more, recomputed' in out
    assert "no device has anything of another one's images" in out
    assert 'images a second and device at most' in out


def test_programs_are_compiled_anew_each_time(tmp_path):
    """From JAX's cache they would come without text; nor are they kept there, which others are
    again afterwards.
    """

    def cached():
        return sorted(path.name for path in tmp_path.glob('*-cache'))

    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    work = programs.Work(
        'x', jax.jit(lambda x: x @ x), (jax.ShapeDtypeStruct((5, 5), jnp.float32),), {}, 1, 1, 1
    )
    try:
        jax.config.update('jax_compilation_cache_dir', str(tmp_path))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
        compilation_cache.reset_cache()
        jax.jit(lambda x: x + 5)(jnp.ones(7)).block_until_ready()
        kept = cached()
        assert kept
        texts = [compile_ahead.compile_work(work)[1] for _ in range(2)]
        assert 'f32[5,5]' in texts[0]
        assert texts[0] == texts[1]
        assert cached() == kept
        jax.jit(lambda x: x + 6)(jnp.ones(7)).block_until_ready()
        assert len(cached()) > len(kept)
    finally:
        jax.config.update('jax_compilation_cache_dir', before[0])
        jax.config.update('jax_persistent_cache_min_compile_time_secs', before[1])
        compilation_cache.reset_cache()


@pytest.mark.slow
@libraries_promote()
def test_a_remedy_is_tried(monkeypatch, capsys):
    """What does not fit until it has remat and two pieces gets both."""
    _fake(monkeypatch)
    sizes = dict.fromkeys(('argument', 'output', 'alias', 'generated_code'), 0) | {
        'temp': 3 * 2**30
    }
    analysis = types.SimpleNamespace(
        **{f'{name}_size_in_bytes': size for name, size in sizes.items()}
    )
    fits_at = 3
    tried = []

    def compile_work(work):
        tried.append(work)
        if len(tried) < fits_at:
            raise compile_ahead.OutOfMemoryError(40 * 2**30, 31 * 2**30)
        return types.SimpleNamespace(memory_analysis=lambda: analysis), HLO

    monkeypatch.setattr(compile_ahead, 'compile_work', compile_work)
    cfg = tiny_config.get_config()
    cfg.tokenizer = '/somewhere'
    (result,) = compile_ahead.run(cfg, 'v6e-1', ('train',))
    assert not result['fits']
    assert result['needed_bytes'] == 40 * 2**30
    flags = '--config.ar.remat=True --config.ar_training.accumulate=2'
    assert result['remedy'] == f'fits with {flags} (3.0 GiB)'
    assert (
        f'DOES NOT FIT: 40.0 GiB needed, 31.0 GiB there; fits with {flags}'
        in capsys.readouterr().out
    )
    assert [work.computed > work.flops for work in tried] == [False, True, True]
    monkeypatch.setattr(
        compile_ahead, 'replicated', lambda *_: [(4, 'f32[1]', 'all-gather', 'here')]
    )
    fits_at = 1
    tried.clear()
    compile_ahead.run(cfg, 'v6e-1', ('train',))
    assert (
        "NOT SPLIT: each device has 1 arrays of others' images, the largest f32[1]"
        in capsys.readouterr().out
    )
    fits_at = 99
    (result,) = compile_ahead.run(cfg, 'v6e-1', ('train',))
    assert result['remedy'] == 'use more chips, or fewer images'


def test_bad_input_is_one_line(monkeypatch):
    cfg = tiny_config.get_config()
    for topology, parts, message in (
        ('v6e-3', tuple(programs.WORKS), '--topology: there is no slice v6e-3; there are v6e-1 '),
        ('v6e-4,gpu', tuple(programs.WORKS), "--topology: 'gpu' names no chip"),
        (
            'v6e-4',
            ('train', 'cook'),
            '--parts: there is no cook; there are train, sample, evaluate',
        ),
    ):
        with pytest.raises(UserError, match=message):
            compile_ahead.run(cfg, topology, parts)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, 'find_spec', lambda name: None)
        with pytest.raises(UserError, match=r"pip install -e '.\[tpu-compiler\]'"):
            compile_ahead.run(cfg, 'v6e-4')
        with pytest.raises(UserError, match=r"pip install -e '.\[gpu-compiler\]'"):
            compile_ahead.run(cfg, 'h100-8')
    _fake(monkeypatch)
    cfg.mesh.fsdp = 3
    with pytest.raises(UserError, match='not possible with 1 device'):
        compile_ahead.run(cfg, 'v6e-1')


MESHES = {'data': {}, 'fsdp': {'data': 2, 'fsdp': 4}, 'tensor': {'data': 4, 'tensor': 2}}


@libraries_promote()
def _on_eight_devices(cases, broken):
    """Prints what the tests below assert; in a process of its own, with 8 forced CPU devices."""
    found = {}
    cfg = tiny_config.get_config()
    compile_work = compile_ahead.compile_work
    if broken:
        sharding.keep_rows_split = lambda mesh, function: function
    for stage, axes in cases:
        texts = []
        compile_ahead.compile_work = lambda work: (
            None,
            texts.append(compile_work(work)[1]) or texts[0],
        )
        replicated = compile_ahead.replicated(cfg, stage, sharding.make_mesh(**MESHES[axes]))
        found[f'{stage} {axes}'] = replicated, hlo.Program(texts[0]).collectives()
    print(json.dumps(found))


def _spawn(cases, broken=False):
    env = os.environ | {
        'XLA_FLAGS': forced_devices(8),
        'PYTHONPATH': str(ROOT),
        'JAX_PLATFORMS': 'cpu',
    }
    code = (
        'from tests.measure import test_compile_ahead; '
        f'test_compile_ahead._on_eight_devices({cases}, {broken})'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


LAYOUTS = (
    ('ar', 'data'),
    ('ar', 'fsdp'),
    ('ar', 'tensor'),
    ('tokenizer', 'data'),
    ('tokenizer', 'fsdp'),
    ('tokenizer', 'tensor'),
)


@pytest.fixture(scope='module')
def layouts():
    """What `_spawn` finds for each of LAYOUTS."""
    return dict(zip(LAYOUTS, _spawn(list(LAYOUTS)).values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('stage, axes', LAYOUTS)
def test_no_device_has_images_of_another(layouts, stage, axes):
    replicated, sent = layouts[stage, axes]
    assert replicated == []
    if axes == 'data':  # gradients are summed, once, and nothing else is sent
        cfg = tiny_config.get_config()
        model = build.build_ar(cfg) if stage == 'ar' else build.build_vae(cfg)
        gradients = costs.tree_bytes(jax.eval_shape(model.init_params, jax.random.key(0)))
        assert set(sent) == {'all-reduce'}
        assert 2 * 7 / 8 * gradients <= sent['all-reduce'][1] <= 1.1 * 2 * 7 / 8 * gradients + 4096


@pytest.mark.slow
def test_images_of_another_device_are_seen():
    """Where nothing says that rows stay split, they do not."""
    ((replicated, _),) = _spawn([('ar', 'fsdp')], broken=True).values()
    assert len(replicated) > 10
    assert any('all-reduce' in opcode for _, _, opcode, _ in replicated)


@pytest.mark.slow
def test_the_programs_of_sampling_are_those_that_run():
    run = tiny_config.random_run(guidance=None, guidance_scale=None)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    tokens, decode = on_mesh.sampling_programs(
        run.ar, run.vae, build.build_sampler(run.config).options, mesh
    )
    draw = on_mesh.program(run.ar, run.vae, build.build_sampler(run.config).options, mesh)
    rows = sharding.place_batch(mesh, (np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32)))
    arguments = *rows, jax.random.key(0), None, jnp.float32(1)
    images, drawn = draw(run.ar_params, run.vae_params, *arguments)
    np.testing.assert_array_equal(drawn.z, tokens(run.ar_params, *arguments).z)
    np.testing.assert_array_equal(images, decode(run.vae_params, drawn.z))


@pytest.mark.slow
def test_inception_looks_at_colours_only():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def names(cfg):
        return [work.name for work in programs.evaluation_works(cfg, mesh)]

    grey = tiny_config.get_config()
    colours = tiny_config.get_config()
    colours.vae.image_channels = 3
    assert names(grey) == ['reconstruct']
    assert names(colours) == ['features', 'reconstruct']


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('name', ['v4-8', 'v5e-4', 'v5p-8', 'v6e-4', 'tpu7x-8'])
def test_libtpu_knows_the_slices(name):
    piece = devices.find_slice(name)
    assert len(compile_ahead.devices_of(piece)) == piece.chips * piece.chip.devices


@pytest.mark.slow
@needs_libtpu
def test_memory_traffic_on_tpus():
    """Products in fusions in fusions: the compiler's own count, without a loop, is right."""
    mesh = sharding.make_mesh(devices=compile_ahead.devices_of(devices.find_slice('v6e-4')))

    def array(*shape, spec):
        return jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, spec)
        )

    def step(x, w, v):
        hidden = jax.nn.gelu(x @ w)
        return (hidden @ v).astype(jnp.float32).sum(0), hidden

    whole = array(4096, 16384, spec=sharding.P()), array(16384, 4096, spec=sharding.P())
    arguments = array(65536, 4096, spec=sharding.P('data')), *whole
    compiled, text = compile_ahead.compile_work(
        programs.Work('x', jax.jit(step), arguments, {}, 1, 1, 1)
    )
    program = hlo.Program(text)
    assert program.memory_traffic() == pytest.approx(
        compiled.cost_analysis()['bytes accessed'], rel=0.01
    )
    assert program.collectives() == {'all-reduce': (1, 2 * 3 / 4 * 4 * 4096)}


@pytest.mark.slow
@needs_libtpu
@libraries_promote()
def test_the_job_for_tpus(tmp_path):
    cfg = tiny_config.get_config()
    results = compile_ahead.run(cfg, 'v6e-4', output=str(tmp_path / 'all.json'))
    assert len(results) == 5
    assert all(r['fits'] for r in results)
    assert all(not r['replicated'] for r in results if r['steps'])


@pytest.mark.slow
@needs_libtpu
@libraries_promote()
def test_the_cache_is_read_without_padding_on_tpus():
    """XLA keeps the layout in which rows and heads, 32 · 12 here, fill the last axis."""
    cfg = _two_layers('ar_b:tpu')
    cfg.mesh.fsdp = 1
    cfg.sampling.batch_size = 16
    mesh = sharding.make_mesh(devices=compile_ahead.devices_of(devices.find_slice('v6e-1')))
    work = programs.WORKS['sample'](cfg, mesh)[0]
    _, text = compile_ahead.compile_work(work)
    loops = ' '.join(line for line in text.splitlines() if ' while(' in line)
    assert set(re.findall(r'bf16\[271,64,384\]{([\d,]+)', loops)) == {'2,1,0'}
    assert 'bf16[32,12,271,64]' not in loops


def _two_layers(words):
    """A config with two layers of everything, 16 or 64 images a step and 32 to sample."""
    cfg = packaged.load(words)
    cfg.vae.update(encoder_depth=2, decoder_depth=2)
    cfg.ar.update(depth=2, head_depth=2, head_groups=1)
    cfg.tokenizer_training.batch_size = 16
    cfg.ar_training.batch_size = 64
    cfg.sampling.update(batch_size=32, num_steps=4)
    if words == 'fashion':
        cfg.data.num_classes = 10  # its files would say it
    return checks.check(cfg)


@pytest.mark.slow
@needs_libtpu
@libraries_promote()
@pytest.mark.parametrize('words', ['digits:riemannian', 'composed', 'composed:joint'])
def test_other_heads_and_texts_compile_for_tpus(words):
    """Training and sampling on four chips, none of which has images of another."""
    cfg = _two_layers(words)
    cfg.tokenizer_training.steps = 0
    found = compile_ahead.run(cfg, 'v6e-4', ('train', 'sample'))
    assert [r['part'] for r in found] == ['ar step', 'tokens', 'decode']
    for r in found:
        assert r['fits']
        assert r['flops'] > 0
        assert not r['replicated']
        assert not r['not_split']


@pytest.mark.slow
@needs_cuda
@libraries_promote()
@pytest.mark.parametrize('words', ['dtype=bfloat16', '512,dtype=bfloat16', 'gpu'])
def test_the_job_for_gpus(words, tmp_path):
    """Training and sampling on eight cards; cuDNN computes attention in both."""
    output = str(tmp_path / 'all.json')
    found = compile_ahead.run(_two_layers(f'ar_b:{words}'), 'h100-8', ('train', 'sample'), output)
    assert [r['part'] for r in found] == ['ar step', 'tokens', 'decode']
    assert all(r['fits'] and r['kernels']['cuDNN'] > 0 for r in found)
    assert found[0]['replicated'] == []
    assert set(found[0]['collectives']) == {'all-reduce'}
    assert found[1]['collectives'] == {}
    assert json.loads((tmp_path / 'all.json').read_text()) == found


@pytest.mark.slow
@needs_cuda
def test_the_compiler_for_gpus_needs_no_driver():
    """JAX is asked for no platform here. Its plugin's own check would ask NVIDIA's driver."""
    command = [sys.executable, '-m', 'sphere_ar_jax.main', '--mode=compile', '--parts=sample']
    flags = ['--config=digits:fast', '--noaudit', '--topology=h100-1', '--config.ar.depth=1']
    environ = {name: value for name, value in os.environ.items() if name != 'JAX_PLATFORMS'}
    done = subprocess.run([*command, *flags], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '| tokens | h100-1 |' in done.stdout


@pytest.mark.slow
@needs_cuda
@libraries_promote()
@pytest.mark.parametrize('words', ['dtype=bfloat16', '512,dtype=bfloat16'])
@pytest.mark.parametrize('card', ['h100-1', 'a100-1'])
def test_cudnn_computes_the_attention_of_gpus(words, card):
    """It does at the lengths of both resolutions, forward and in reverse."""
    cfg = _two_layers(f'ar_b:{words}')
    mesh = sharding.make_mesh(devices=compile_ahead.devices_of(devices.find_slice(card)))
    work = compile_ahead._step(cfg, 'ar', mesh)
    _, text = compile_ahead.compile_work(work)
    assert '"__cudnn$fmhaSoftmax"' in text
    assert '"__cudnn$fmhaSoftmaxBackward"' in text
    ar = build.build_ar(cfg)
    length = ar.num_tokens + ar.condition.length - 1
    assert not re.search(rf'\[[\d,]*\b{length},{length}\b[\d,]*\]', text)


@pytest.mark.slow
@needs_cuda
@libraries_promote()
@pytest.mark.parametrize('card', ['h100-1', 'a100-1'])
def test_the_samplers_own_kernels_compile_for_gpus(card):
    """Two layers of head and transformer: 2 · 2 + 2 kernels an evaluation, 2 · 5 a token."""
    cfg = _two_layers('ar_b:gpu')
    mesh = sharding.make_mesh(devices=compile_ahead.devices_of(devices.find_slice(card)))
    started = []
    for fused in (True, False):
        cfg.ar.fused = fused
        work = programs.WORKS['sample'](cfg, mesh)[0]
        _, text = compile_ahead.compile_work(work)
        assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == (16 if fused else 0)
        started.append(sum(hlo.Program(text, work.lengths).kernels().values()))
    assert started[0] < 0.6 * started[1]


# The models of emoji are those of composed. configs/own.py and distillation need files.
CONFIGS = (
    'digits',
    'digits:cnn',
    'digits:vit',
    'digits:riemannian',
    'fashion',
    'composed',
    'composed:joint',
    'vae',
    'vae:512',
    'ar_b',
    'ar_l:512,dtype=bfloat16',
    'ar_h:gpu',
)


@pytest.mark.slow
@needs_cuda
@libraries_promote()
@pytest.mark.parametrize('cards', ['h100-1', 'h100-8'])
@pytest.mark.parametrize('words', CONFIGS)
def test_all_programs_compile_for_gpus(words, cards):
    """Training, sampling and evaluation; no card has images of another."""
    cfg = _two_layers(words)
    found = compile_ahead.run(cfg, cards, ('train', 'sample', 'evaluate'))
    parts = [r['part'] for r in found]
    assert parts[-1] == 'reconstruct'
    assert 'decode' in parts
    assert any(r['steps'] for r in found)
    for r in found:
        assert r['fits']
        assert sum(r['kernels'].values()) > 0
        assert not r['replicated']
        assert not r['not_split']
