"""Shared by all tests: strict promotion rules and the tiny golden model (goldens/README.md)."""

import atexit
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import tarfile
import tempfile

import jax
import numpy as np
import pytest

from sphere_ar_jax.evaluation.fidelity import inception_weights
from sphere_ar_jax.interop import torch_file, torch_names, torch_sizes
from sphere_ar_jax.models import ar, vae

# Most of the tests' time is compilation, of which these flags leave a fifth. Processes that tests
# start inherit them.
QUICK = '--xla_backend_optimization_level=0'
# XLA of JAX 0.11, and of the libtpu of that time, has no other emitters and ends the process that
# gives it the flag.
EMITTERS_ARE_A_CHOICE = (
    jax.__version_info__ < (0, 11) and importlib.util.find_spec('libtpu') is None
)
if EMITTERS_ARE_A_CHOICE:
    QUICK += ' --xla_cpu_use_fusion_emitters=false'
# XLA reads the variable when JAX is first asked for its devices.
if QUICK not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {QUICK}'.strip()

# Programs that several tests compile alike are compiled once; the processes that tests start share
# them too. The process that makes the directory removes it.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='sphere_ar_jax_tests')
    atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

# What tests start hears Ctrl-C, even where a shell's `&` started the tests, which ignores it for
# all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')

# For tests of what optax and jax.nn.dot_product_attention (in bfloat16) promote inside themselves.
libraries_promote = functools.partial(jax.numpy_dtype_promotion, 'standard')


# The files that take longest, longest first.
LONGEST = (
    'runtime/test_hosts.py',
    'training/test_loop.py',
    'commands/test_train.py',
    'test_main.py',
    'test_documents.py',
    'experiments/test_experiment.py',
    'measure/test_compile_ahead.py',
    'runtime/test_sharding.py',
    'training/test_adversarial.py',
    'commands/test_draw.py',
    'test_benchmark.py',
    'commands/test_fine_tuning.py',
    'test_notebook.py',
    'evaluation/test_fidelity.py',
    'sampling/test_tokens.py',
    'sphere/test_von_mises_fisher.py',
    'sphere/test_power_spherical.py',
    'models/test_posteriors.py',
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first, so that no process has one of them alone at the end."""
    here = pathlib.Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def forced_devices(count: int) -> str:
    """XLA's flags for a process that a test starts with so many forced host devices."""
    return f'{QUICK} --xla_force_host_platform_device_count={count}'


def accurate() -> dict[str, int | bool] | None:
    """Options of `jax.jit` that undo `QUICK`, for a test whose tolerances need the default's order
    of sums.
    """
    if jax.default_backend() != 'cpu':
        return None
    options = {'xla_backend_optimization_level': 3}
    if EMITTERS_ARE_A_CHOICE:
        options['xla_cpu_use_fusion_emitters'] = True
    return options


def noted_fingerprint(stage, step):
    """The fingerprint of every bit of a state, as a checkpoint in a stage's directory has it."""
    metadata = pathlib.Path(stage) / 'checkpoints' / str(step) / 'meta' / 'metadata'
    return json.loads(metadata.read_text())['fingerprint']


def compiled(model, params, method=None):
    """A method of a model with its parameters, as one program.

    Applied step by step, every step would be compiled alone, which takes several times as long.
    """

    def apply(params, *arguments):
        return model.apply({'params': params}, *arguments, method=method)

    return functools.partial(jax.jit(apply), params)


GOLDENS = pathlib.Path(__file__).parent / 'goldens'
# (number in torchvision's list, input channels, output channels) of VGG16's convolutions
VGG16 = (
    (0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256),
    (14, 256, 256), (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512),
    (28, 512, 512),
)  # fmt: skip


@pytest.fixture(scope='session')
def old_runs(tmp_path_factory):
    """The directory of runs that an earlier version finished (goldens/README.md). Tests that change
    one copy it first.

    They are digits, one distilled from it, and a converted PyTorch checkpoint.
    """
    directory = tmp_path_factory.mktemp('old_runs')
    with tarfile.open(GOLDENS / 'old_runs.tar.xz') as archive:
        archive.extractall(directory, filter='data')
    path = directory / 'distilled' / 'config.json'
    values = json.loads(path.read_text())
    values['init_from'] = str(directory / 'digits')  # the place that it was moved to
    path.write_text(json.dumps(values))
    return directory


@pytest.fixture(scope='session')
def golden():
    """Tensors measured on the public PyTorch code, images as NHWC."""
    tensors = dict(np.load(GOLDENS / 'tiny.npz'))
    for name in [n for n in tensors if n.endswith('_nchw')]:
        tensors[name.removesuffix('_nchw')] = tensors.pop(name).transpose(0, 2, 3, 1)
    tensors['class_id'] = tensors['class_id'].astype(np.int32)
    return tensors


@pytest.fixture(scope='session')
def torch_tensors():
    """The `model` entry of the golden checkpoint, whose tensors the goldens were measured with."""
    return torch_sizes.state_dict(torch_file.open_file(GOLDENS / 'tiny.pt'), ema=False)


@pytest.fixture(scope='session')
def tiny_vae(torch_tensors):
    """(model, parameters) of the golden S-VAE."""
    options = json.loads((GOLDENS / 'tiny.json').read_text())
    model = vae.s_vae(
        grid=(4, 4), latent_dim=options['latent_dim'], channels=tuple(options['vae']['cnn_chs']),
        heads=1, encoder_depth=options['vae']['encoder_vit_layers'],
        decoder_depth=options['vae']['decoder_vit_layers'],
    )  # fmt: skip
    return model, torch_names.from_torch(
        torch_tensors, jax.eval_shape(model.init_params, jax.random.key(0))
    )


@pytest.fixture(scope='session')
def tiny_ar(torch_tensors):
    """(model, parameters) of the golden AR model."""
    options = json.loads((GOLDENS / 'tiny.json').read_text())
    model = ar.sphere_ar(
        depth=options['n_layer'], heads=options['n_head'], width=options['dim'],
        head_depth=options['diff_layers'], head_width=options['diff_dim'],
        head_groups=options['diff_adanln_layers'], grid=(4, 4), num_classes=options['num_classes'],
        class_tokens=options['cls_token_num'], latent_dim=options['latent_dim'],
    )  # fmt: skip
    return model, torch_names.from_torch(
        torch_tensors, jax.eval_shape(model.init_params, jax.random.key(0))
    )


@pytest.fixture(scope='session')
def inception_params():
    """The golden Inception's parameters, by formula from their place in the list
    (goldens/README.md).
    """

    def tensor(i, name, shape):
        n = np.random.RandomState(i).standard_normal(int(np.prod(shape))).reshape(shape)
        if len(shape) > 1:
            n *= 1.4 / np.sqrt(np.prod(shape[1:]))
        elif name.endswith('running_var'):
            n = 1 + 0.2 * np.abs(n)
        else:
            n = 0.1 * n + name.endswith('bn.weight')
        return n.astype(np.float32)

    rows = json.loads((GOLDENS / 'inception.json').read_text())
    return inception_weights.from_torch(
        {name: tensor(i, name, shape) for i, (name, _, shape) in enumerate(rows)}
    )


@pytest.fixture(scope='session')
def lpips_files():
    """(lin, vgg): the tensors of LPIPS's two files by the goldens' formula (goldens/README.md)."""

    def tensor(i, shape):
        return np.random.RandomState(i).standard_normal(shape)

    lin = {}
    vgg = {'classifier.0.weight': np.zeros(1)}
    for i, (n, before, channels) in enumerate(VGG16):
        kernel = tensor(2 * i, (channels, before, 3, 3)) * (1.4 / np.sqrt(before * 9))
        vgg[f'features.{n}.weight'] = kernel.astype(np.float32)
        vgg[f'features.{n}.bias'] = (0.05 * tensor(2 * i + 1, channels)).astype(np.float32)
    for i, channels in enumerate((64, 128, 256, 512, 512)):
        weight = 0.1 * np.abs(tensor(2 * len(VGG16) + i, (1, channels, 1, 1)))
        lin[f'lin{i}.model.1.weight'] = weight.astype(np.float32)
    return lin, vgg
