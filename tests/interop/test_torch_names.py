import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.interop import torch_file, torch_names, torch_sizes
from sphere_ar_jax.models import ar, vae
from sphere_ar_jax.models.heads import Riemannian
from sphere_ar_jax.models.posteriors import PowerSpherical
from sphere_ar_jax.runtime.console import UserError
from tests.conftest import GOLDENS

KEYS = GOLDENS / 'keys'


def _published(name):
    """{name: something with the shape} of a published file."""
    shapes = json.loads((KEYS / f'{name}.json').read_text())
    return {key: jax.ShapeDtypeStruct(shape, np.float16) for key, shape in shapes.items()}


def _abstract(model):
    return jax.eval_shape(model.init_params, jax.random.key(0))


@pytest.mark.parametrize('name', ['vae', 'SphereAR_B', 'SphereAR_L', 'SphereAR_H'])
def test_full_size_names_and_sizes_are_the_published_ones(name):
    """Every tensor of the published key lists, and none else.

    The sizes that they tell build those very models.
    """
    tensors = _published(name)
    sizes = torch_sizes.sizes(
        tensors, argparse.Namespace(image_size=256, latent_dim=16, num_classes=1000, lr=3e-4)
    )
    cfg = schema.default()
    cfg.vae.update(sizes.vae)
    ours = torch_names.torch_shapes(_abstract(build.build_vae(cfg)))
    assert build.build_vae(cfg) == vae.VAE()
    if name == 'vae':
        assert sizes[1:] == (None, None, None)
    else:
        cfg.ar.update(sizes.ar)
        assert cfg.ar.to_dict() == schema.default().ar.to_dict() | ar.VARIANTS[name[-1]]
        assert (sizes.name, sizes.num_classes) == (name[-1], 1000)
        ours |= torch_names.torch_shapes(_abstract(ar.sphere_ar(**ar.VARIANTS[name[-1]])))
    assert ours == {key: tuple(t.shape) for key, t in tensors.items() if 'freqs_cis' not in key}


def test_sizes_of_the_golden_model(torch_tensors, tiny_ar, tiny_vae):
    args = torch_file.open_file(GOLDENS / 'tiny.pt')['args']
    sizes = torch_sizes.sizes(torch_tensors, args, heads=2)
    assert vae.s_vae(**sizes.vae) == tiny_vae[0]
    shared = dict(
        grid=sizes.vae['grid'], latent_dim=sizes.vae['latent_dim'], num_classes=sizes.num_classes
    )
    assert ar.sphere_ar(**sizes.ar, **shared) == tiny_ar[0]
    assert sizes.name is None
    assert torch_sizes.sizes(torch_tensors).ar['heads'] == 1  # 64 wide


def test_sizes_that_disagree_are_refused(torch_tensors):
    wide = jax.ShapeDtypeStruct((20, 16, 2), np.float32)
    for tensors, args, message in (
        (
            torch_tensors,
            dict(latent_dim=16),
            'latent dimensions disagree: 8 by vae.post_quant_proj.weight, 16 by args',
        ),
        (torch_tensors, dict(image_size=128), 'numbers of tokens disagree'),
        (torch_tensors, dict(num_classes=9), 'numbers of classes disagree'),
        (torch_tensors, dict(cls_token_num=5), 'numbers of class tokens disagree'),
        (
            torch_tensors,
            dict(model='SphereAR-B'),
            'models disagree: none that was published by shapes, B by args',
        ),
        (
            _published('SphereAR_B'),
            dict(model='SphereAR-L'),
            'models disagree: B by shapes, L by args',
        ),
        (
            torch_tensors | {'vae.encoder.freqs_cis': wide},
            {},
            'head dimensions disagree: 32 by vae.encoder',
        ),
        (torch_tensors | {'proj_in.weight': np.zeros(64)}, {}, r'proj_in.weight has shape \(64,\)'),
        ({'vae.x': np.zeros(3)}, {}, 'it has 0 modules vae.encoder.patchify'),
        ({'fc.weight': np.zeros(3)}, {}, 'no tensor vae.…, but fc.weight'),
        (
            {k: v for k, v in torch_tensors.items() if k != 'proj_in.weight'},
            {},
            'it lacks proj_in.weight',
        ),
        (torch_tensors | {'layers.5000.x': np.zeros(1)}, {}, 'it has 5001 modules layers'),
    ):
        with pytest.raises(UserError, match=message):
            torch_sizes.sizes(tensors, argparse.Namespace(**args))
    with pytest.raises(UserError, match='numbers of heads disagree: 10 by heads, 12 by SphereAR-B'):
        torch_sizes.sizes(_published('SphereAR_B'), heads=10)
    with pytest.raises(UserError, match='3 heads do not divide the width 64; give heads'):
        torch_sizes.sizes(torch_tensors, heads=3)


def test_a_tokenizer_alone_needs_to_say_its_grid(torch_tensors):
    tensors = {
        k: v for k, v in torch_tensors.items() if k.startswith('vae.') and 'freqs_cis' not in k
    }
    with pytest.raises(UserError, match='the grid of tokens cannot be told'):
        torch_sizes.sizes(tensors)
    assert torch_sizes.sizes(tensors, argparse.Namespace(image_size=64)).vae['grid'] == (4, 4)


HUGE = (2**60, 2**200, 2**13 << 1, 0, -64)


@pytest.mark.parametrize('image_size', HUGE)
def test_a_grid_without_end_is_refused_before_anything_is_made(torch_tensors, image_size):
    """A tokenizer's own file has no table that would contradict `args`."""
    tensors = {
        k: v for k, v in torch_tensors.items() if k.startswith('vae.') and 'freqs_cis' not in k
    }
    with pytest.raises(UserError, match=r'^args.image_size is .*, but an image has'):
        torch_sizes.sizes(tensors, argparse.Namespace(image_size=image_size))


@pytest.mark.parametrize(
    'name, shape, message',
    [
        ('pos_for_diff.weight', (2**40, 0), r'pos_for_diff.weight has shape \(1099511627776, 0\)'),
        ('cls_embedding.weight', (2**47, 0), 'cls_embedding.weight has shape'),
        ('pos_for_diff.weight', (2**18, 64), 'the grid has 262144 tokens, but may have 256×256'),
    ],
)
def test_sizes_without_numbers_behind_them_are_refused(torch_tensors, name, shape, message):
    tensors = {k: v for k, v in torch_tensors.items() if 'freqs_cis' not in k}
    tensors[name] = jax.ShapeDtypeStruct(shape, np.float32)
    with pytest.raises(UserError, match=message):
        torch_sizes.sizes(tensors)


def test_names_of_a_file_are_printed_short_and_without_escapes(torch_tensors, tiny_vae):
    bad = '\x1b[31m' + 'x.' * 20_000_000
    a = np.zeros(1)
    with pytest.raises(UserError) as error:
        torch_sizes.sizes({bad: a})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
    names = {f'vae.{i}{bad[:100_000]}': a for i in range(30)}
    with pytest.raises(UserError) as error:
        torch_names.from_torch(dict(torch_tensors) | names, tiny_vae[1])
    lines = str(error.value).split('\n')
    assert '30 unexpected' in lines[0]
    assert len(lines) == 1 + torch_names.MOST_NAMED
    assert all(line.isprintable() and len(line) < 300 for line in lines)


def test_state_dict_picks_and_strips(torch_tensors):
    a = np.zeros(1)
    b = np.ones(1)
    both = {'model': {'_orig_mod.module.x': a}, 'ema': {'module._orig_mod.x': b}, 'epochs': 3}
    assert torch_sizes.state_dict(both)['x'] is b
    assert torch_sizes.state_dict(both, ema=False)['x'] is a
    assert torch_sizes.state_dict({'model': {'x': a}, 'ema': None})['x'] is a
    assert list(torch_sizes.state_dict({'module.x.module.y': a})) == ['x.module.y']
    averaged = {'n_averaged': a, 'module.vae._orig_mod.x': b}
    assert list(torch_sizes.state_dict({'ema': averaged})) == ['vae.x']
    for tree, message in (
        (
            {'weights': {'x': a}, 'epoch': 3},
            "the file has the keys 'weights', 'epoch': expected ema, model or tensors",
        ),
        (
            {'model': {'x': a, 'step': 3}},
            "its entry model has the keys 'x', 'step': expected tensors alone",
        ),
        ({'model': [3]}, 'its entry model is a list: expected tensors alone'),
        (a, 'the file is a ndarray: expected ema, model'),
        ({}, 'the file is a dict: expected ema, model'),
        ({'module.x': a, 'x': b}, 'with and without module. or _orig_mod.'),
    ):
        with pytest.raises(UserError, match=message):
            torch_sizes.state_dict(tree)
    ema = torch_sizes.state_dict(torch_file.open_file(GOLDENS / 'tiny.pt'))
    assert set(ema) == set(torch_tensors)
    assert not np.array_equal(ema['proj_in.weight'], torch_tensors['proj_in.weight'])


def test_conversion_round_trip(torch_tensors, tiny_ar, tiny_vae):
    back = torch_names.to_torch(tiny_ar[1]) | torch_names.to_torch(tiny_vae[1])
    assert set(back) == {name for name in torch_tensors if 'freqs_cis' not in name}
    for name, tensor in back.items():
        np.testing.assert_array_equal(
            tensor, np.asarray(torch_tensors[name], np.float32), err_msg=name
        )


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (np.full(64, np.nan, np.float16), 'norm.weight has numbers that are not finite'),
        (np.ones(64, np.int8), 'norm.weight holds int8, but must hold floats'),
    ],
)
def test_tensors_that_are_no_weights_are_refused(torch_tensors, tiny_ar, value, message):
    with pytest.raises(UserError, match=message):
        torch_names.from_torch(torch_tensors | {'norm.weight': value}, tiny_ar[1])


def test_export_is_what_was_read(torch_tensors, tiny_ar, tiny_vae, tmp_path):
    """Every public tensor, float32, without change; the RoPE tables, computed here, within
    rounding.
    """
    torch_names.export(tmp_path / 'all.safetensors', *tiny_vae, tiny_ar[1])
    written = safetensors.numpy.load_file(tmp_path / 'all.safetensors')
    assert set(written) == set(torch_tensors)
    for name, tensor in written.items():
        assert tensor.dtype == np.float32
        close = dict(atol=1e-6) if 'freqs_cis' in name else dict(rtol=0, atol=0)
        np.testing.assert_allclose(
            tensor, np.asarray(torch_tensors[name], np.float32), **close, err_msg=name
        )
    again = torch_names.from_torch(written, tiny_ar[1])
    jax.tree.map(np.testing.assert_array_equal, again, tiny_ar[1])
    torch_names.export(tmp_path / 'vae.safetensors', *tiny_vae)
    assert set(safetensors.numpy.load_file(tmp_path / 'vae.safetensors')) == {
        n for n in written if n[:4] == 'vae.'
    }
    with pytest.raises(UserError, match='head/span1/kernel has no PyTorch name'):
        torch_names.to_torch({'head': {'span1': {'kernel': np.zeros((2, 2))}}})


def test_standardised_tokens_are_not_exported(tiny_vae, tmp_path):
    """The public model would read other tokens than the AR model was trained on."""
    model, params = tiny_vae
    standardised = model.clone(token_space='standardised')
    path = tmp_path / 'a.safetensors'
    polar = model.clone(token_space='polar')
    with pytest.raises(UserError, match=r'has no ar\.token_space polar'):
        torch_names.require_public(polar)
    with pytest.raises(UserError, match=r'has no ar\.token_space standardised'):
        torch_names.export(path, standardised, standardised.with_statistics(params))
    assert not path.exists()
    torch_names.export(path, model.clone(token_space='projected'), params)
    assert path.exists()


def test_other_spheres_and_noise_are_not_public(tiny_ar, tiny_vae):
    """The names would fit, but the public code would sample something else."""
    model, _ = tiny_vae
    head = tiny_ar[0].head
    torch_names.require_public(model, head)
    root = model.latent_dim**0.5
    torch_names.require_public(model.clone(radius=root, posterior=PowerSpherical(root)), head)
    larger = model.clone(radius=2.0, posterior=PowerSpherical(2.0))
    faster = model.clone(posterior=PowerSpherical(kappa_scale=8.0))
    geodesic = Riemannian(head.latent_dim, head.width, head.depth, head.groups)
    for vae_model, other, message in (
        (larger, None, rf'vae\.radius √{model.latent_dim} alone, not 2\.0: such a run'),
        (faster, None, r'vae\.kappa_scale 1 alone, not 8\.0: such a run'),
        (model, head.clone(prior_scale=2.0), r'ar\.prior_scale 1 alone, not 2\.0: such a run'),
        (model, geodesic, r'ar\.head FlowHead alone, not Riemannian: such a run'),
    ):
        with pytest.raises(UserError, match=message) as refused:
            torch_names.require_public(vae_model, other)
        assert '\n' not in str(refused.value)


def test_all_that_does_not_fit_is_listed_at_once(torch_tensors, tiny_ar, tiny_vae):
    like = _abstract(tiny_ar[0])
    wrong = dict(torch_tensors)
    wrong['layers.1.attention.wo.wieght'] = wrong.pop('layers.1.attention.wo.weight')
    del wrong['norm.weight']
    wrong |= {'proj_in.bias': np.zeros(3), 'zzz': np.zeros(1)}
    with pytest.raises(UserError) as error:
        torch_names.from_torch(wrong, like)
    assert str(error.value).splitlines() == [
        'the checkpoint does not fit the model: 2 missing, 2 unexpected and 1 mis-shaped tensors',
        'missing: layers.1.attention.wo.weight (nearest: layers.1.attention.wo.wieght)',
        'missing: norm.weight',
        'unexpected: layers.1.attention.wo.wieght (nearest: layers.1.attention.wo.weight)',
        'unexpected: zzz',
        'shape: proj_in.bias has (3,), but the model needs (64,)',
    ]
    torch_names.from_torch(wrong, _abstract(tiny_vae[0]))  # the other model is whole
    with pytest.raises(UserError, match=re.escape('unexpected: vae.more')):
        torch_names.from_torch(torch_tensors | {'vae.more': np.zeros(1)}, _abstract(tiny_vae[0]))


# Reads a file as `main` would, and says how much memory that took at its peak and how much the
# parameters take.
_READ = """
import sys
import jax
from sphere_ar_jax.interop import torch_file
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.interop import torch_sizes
from sphere_ar_jax.models import ar
from sphere_ar_jax.models import vae
tree = torch_file.open_file(sys.argv[1])
tensors = torch_sizes.state_dict(tree)
sizes = torch_sizes.sizes(tensors, tree.get('args'))
shared = dict(
    num_classes=sizes.num_classes, grid=sizes.vae['grid'], latent_dim=sizes.vae['latent_dim']
)
models = vae.s_vae(**sizes.vae), ar.sphere_ar(**sizes.ar, **shared)
params = [
    torch_names.from_torch(tensors, jax.eval_shape(m.init_params, jax.random.key(0)))
    for m in models
]
peak = 1024 * next(
    int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')
)
last = params[1]['stack']['blocks']['mlp']['w2']['kernel'][-1]
print(peak, sum(a.nbytes for a in jax.tree.leaves(params)), last[7, 3], sizes.name)
"""


@pytest.mark.slow
def test_reading_the_largest_model_takes_its_parameters_and_little_more(tmp_path):
    """SphereAR-H with EMA, fp16, 4.1 GB: within the float32 parameters + 1 GB, Python and JAX
    included.
    """
    from tests import torch_writer as w

    shapes = json.loads((KEYS / 'SphereAR_H.json').read_text())
    noise = np.random.default_rng(0).normal(size=2**25).astype(np.float16)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}

    def entry(e):
        return w.dictionary(
            {
                name: w.tensor(w.storage(f'{e}{i}', sizes[name]), shape)
                for i, (name, shape) in enumerate(shapes.items())
            }
        )

    storages = {f'{e}{i}': (e, n) for e in 'me' for i, n in enumerate(sizes.values())}

    def write(archive, name, data):
        archive.writestr(
            name, data if isinstance(data, bytes) else noise[data[0] == 'e' :][: data[1]].tobytes()
        )

    path = pathlib.Path(tmp_path / 'H.pt')
    try:
        value = w.dictionary({'model': entry('m'), 'ema': entry('e')})
        w.zip_file(value, storages, file=path, write=write)
        assert path.stat().st_size > 4e9
        env = os.environ | {'PYTHONPATH': str(GOLDENS.parent.parent)}
        out = subprocess.run(
            [sys.executable, '-c', _READ, path],
            env=env,
            capture_output=True,
            text=True,
            timeout=3000,
            check=True,
        )
    finally:
        path.unlink(missing_ok=True)
    peak, params, last, name = out.stdout.split()
    print(f'peak {int(peak) / 1e9:.2f} GB, parameters {int(params) / 1e9:.2f} GB')
    assert name == 'H'
    assert int(params) == 4 * (943_854_096 + 75_393_297)
    # The number is that of `ema`; (out, in) = (1280, 3584), and ours is transposed.
    assert float(last) == noise[1 + 3 * 3584 + 7]
    assert int(peak) < int(params) + 1e9
