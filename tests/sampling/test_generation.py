"""Many images to one file: the same however they are batched, killed and started again."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import scipy.stats

from sphere_ar_jax.config import build
from sphere_ar_jax.models import ar
from sphere_ar_jax.runtime import files, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import autoencoding, batching, generation, on_mesh
from tests import tiny_config
from tests.conftest import forced_devices

ROOT = pathlib.Path(__file__).parents[2]
N = 20


@pytest.fixture(scope='module')
def run():
    return tiny_config.random_run()


@pytest.fixture(scope='module')
def labels():
    return generation.draw_labels('uniform', N, 10, 0)


def _generate(run, labels, path, *, batch_size=4, seed=5, **options):
    generation.generate(
        run, labels, seed, str(path), batch_size=batch_size, mesh=sharding.make_mesh(1), **options
    )
    with np.load(path) as file:
        assert sorted(file) == ['arr_0', 'arr_1']
        return file['arr_0'], file['arr_1']


def _process(code, *arguments, devices=1, **options):
    """A process that runs `code` with this test's model, on so many forced host devices."""
    env = os.environ | {
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': forced_devices(devices),
    }
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, arguments)], cwd=ROOT, env=env, **options
    )


def _floats(run, labels, batch_size, mesh):
    sampler = build.build_sampler(run.config)
    images, _ = on_mesh.draw_images(run, sampler, labels, seed=5, batch_size=batch_size, mesh=mesh)
    return images


def _tokens(run, labels, mesh):
    """The tokens of the first 8 images, one on each device at a time."""
    s = run.config.sampling
    model = ar.unstacked(run.ar, run.ar_params)
    draw = on_mesh.program(model[0], run.vae, build.build_sampler(run.config).options, mesh)
    parts = []
    for start in range(0, 8, mesh.size):
        rows = np.arange(start, start + mesh.size, dtype=np.int32)
        batch = sharding.place_batch(mesh, (labels[rows], rows))
        parts.append(
            draw(
                model[1],
                run.vae_params,
                *batch,
                on_mesh.sampling_key(5),
                s.guidance_scale,
                s.temperature,
            )[1].z
        )
    return np.concatenate([np.asarray(part) for part in parts])


_EIGHT = """
import sys
import numpy as np
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.sampling import generation
from tests import tiny_config
from tests.sampling import test_generation
run, mesh = tiny_config.random_run(), sharding.make_mesh()
assert mesh.size == 8
labels = generation.draw_labels('uniform', test_generation.N, 10, 0)
generation.generate(run, labels, 5, sys.argv[1] + '.npz', batch_size=8, mesh=mesh)
np.save(sys.argv[1], test_generation._floats(run, labels, 8, mesh))
np.save(sys.argv[1] + '_tokens', test_generation._tokens(run, labels, mesh))
"""


@pytest.mark.slow
def test_the_file_holds_the_images_whatever_batches_and_devices(run, labels, tmp_path):
    """Image i is a function of (seed, i, label): one row at a time, seven, or one on each of eight
    devices.

    Bit for bit where every device has one row; other batches to a rounding, for their matrix
    products add otherwise."""
    with _process(_EIGHT, tmp_path / 'eight', devices=8) as process:
        one = _floats(run, labels, 1, sharding.make_mesh(1))
        images, kept = _generate(run, labels, tmp_path / 'one.npz', batch_size=1)
        other, _ = _generate(run, labels, tmp_path / 'seven.npz', batch_size=7)
        floats = _floats(run, labels, 7, sharding.make_mesh(1))
        assert process.wait(300) == 0
    eight = np.load(tmp_path / 'eight.npy')
    assert eight.dtype == np.float32
    np.testing.assert_array_equal(eight, one)
    tokens = _tokens(run, labels, sharding.make_mesh(1))
    assert tokens.dtype == np.float32
    assert np.abs(tokens[1:] - tokens[:-1]).min(axis=(1, 2)).max() > 0
    np.testing.assert_array_equal(np.load(tmp_path / 'eight_tokens.npy'), tokens)
    assert (tmp_path / 'one.npz').stat().st_size == (tmp_path / 'eight.npz').stat().st_size
    with np.load(tmp_path / 'eight.npz') as file:
        np.testing.assert_array_equal(file['arr_0'], images)
        np.testing.assert_array_equal(file['arr_1'], labels)

    assert images.dtype == np.uint8
    assert images.shape == (N, 16, 16, 1)
    np.testing.assert_array_equal(kept, labels)
    np.testing.assert_array_equal(
        images, np.clip(np.float32(127.5) * one + 128, 0, 255).astype(np.uint8)
    )
    # Otherwise the rest of the test would show nothing.
    assert images.std() > 10
    assert (images[1:] != images[:-1]).any((1, 2, 3)).all()
    np.testing.assert_allclose(floats, one, atol=1e-5)
    assert np.abs(other.astype(int) - images).max() <= 1
    shorter, _ = _generate(run, labels[:5], tmp_path / 'five.npz', batch_size=1)
    np.testing.assert_array_equal(shorter, images[:5])
    turned, _ = _generate(run, labels[::-1].copy(), tmp_path / 'turned.npz', batch_size=1)
    np.testing.assert_array_equal((turned == images).all((1, 2, 3)), labels[::-1] == labels)
    assert list(generation.images(tmp_path / 'one.npz'))[3].tobytes() == images[3].tobytes()
    assert len(list(generation.images(tmp_path / 'one.npz'))) == N


_SLOW = """
import sys, time
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.sampling import generation
from tests import tiny_config
from tests.sampling import test_generation
def progress(done):
    print(done, flush=True)
    time.sleep(0.2)
labels = generation.draw_labels('uniform', test_generation.N, 10, 0)
generation.generate(
    tiny_config.random_run(), labels, 5, sys.argv[1],
    batch_size=4, mesh=sharding.make_mesh(), progress=progress
)
"""


@pytest.mark.slow
def test_goes_on_after_a_kill(run, labels, tmp_path):
    path = tmp_path / 'a.npz'
    parts = tmp_path / 'a.npz.parts'
    with _process(_SLOW, path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == '0\n'
        while not (parts / '00000000.npy').exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout]
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    before = {f: f.stat().st_mtime_ns for f in parts.glob('0*.npy')}
    kept = sum(len(np.load(f)) for f in before)
    assert 4 <= kept < N
    assert kept >= max(said, default=4)
    calls = []

    def progress(done):
        calls.append(done)
        assert not path.exists()
        assert {f: f.stat().st_mtime_ns for f in before} == before

    resumed = _generate(run, labels, path, progress=progress)
    assert calls == list(range(kept, N + 1, 4))
    assert not parts.exists()
    assert not list(tmp_path.glob('*.tmp'))
    _generate(run, labels, tmp_path / 'b.npz')
    assert path.read_bytes() == (tmp_path / 'b.npz').read_bytes()
    np.testing.assert_array_equal(resumed[1], labels)

    changed = path.stat().st_mtime_ns
    calls.clear()
    generation.generate(
        run, labels, 5, str(path), batch_size=8, mesh=sharding.make_mesh(1), progress=calls.append
    )
    assert calls == [N]
    assert path.stat().st_mtime_ns == changed


class _Stop(Exception):
    pass


def _stop_at(count):
    def progress(done):
        if done >= count:
            raise _Stop

    return progress


@pytest.fixture(scope='module')
def whole(run, labels, tmp_path_factory):
    return _generate(run, labels, tmp_path_factory.mktemp('whole') / 'a.npz')[0]


def _flipped(content, at):
    """Bytes with one bit flipped."""
    content = bytearray(content)
    content[at] ^= 4
    return bytes(content)


@pytest.mark.parametrize(
    'damage', [
        lambda b: b[:-1], lambda b: b[:-5], lambda b: b[:9], lambda b: b'',
        lambda b: b'\0' * len(b), lambda b: _flipped(b, 130), lambda b: _flipped(b, -9),
        lambda b: _flipped(b, -1), lambda b: _flipped(b, 70), lambda b: b + b'\0',
    ],
    ids=[
        'one byte short', 'five bytes short', 'in the header', 'empty', 'zeros', 'a bit of a pixel',
        'a bit of the last pixel', 'a bit of the checksum', 'a bit of the header', 'one byte more',
    ],
)  # fmt: skip
def test_a_damaged_part_alone_is_drawn_again(run, labels, whole, tmp_path, capsys, damage):
    path = tmp_path / 'a.npz'
    calls = []
    with pytest.raises(_Stop):
        _generate(run, labels, path, progress=_stop_at(12))
    part = tmp_path / 'a.npz.parts' / '00000004.npy'
    part.write_bytes(damage(part.read_bytes()))
    images, _ = _generate(run, labels, path, progress=calls.append)
    assert calls == [8, 12, 16, 20]  # the parts before and after it are kept
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert '00000004.npy' in said[0]
    assert 'drawn again' in said[0]
    np.testing.assert_array_equal(images, whole)


def test_a_part_that_is_damaged_before_all_are_put_together(run, labels, whole, tmp_path):
    path = tmp_path / 'a.npz'
    part = tmp_path / 'a.npz.parts' / '00000008.npy'

    def damage_at_the_end(done):
        if done == N:
            part.write_bytes(_flipped(part.read_bytes(), 200))

    with pytest.raises(UserError, match=r'00000008.npy was damaged .* the same command draws'):
        _generate(run, labels, path, progress=damage_at_the_end)
    assert not path.exists()
    calls = []
    images, _ = _generate(run, labels, path, progress=calls.append)
    assert calls == [16, 20]
    np.testing.assert_array_equal(images, whole)


def test_parts_of_earlier_versions_have_no_checksum_and_are_taken(run, labels, whole, tmp_path):
    path = tmp_path / 'a.npz'
    with pytest.raises(_Stop):
        _generate(run, labels, path, progress=_stop_at(8))
    for start in (0, 4):
        with open(tmp_path / 'a.npz.parts' / f'{start:08d}.npy', 'wb') as f:
            np.save(f, whole[start : start + 4])
    calls = []
    images, _ = _generate(run, labels, path, progress=calls.append)
    assert calls == [8, 12, 16, 20]
    np.testing.assert_array_equal(images, whole)


def _with_a_broken_class(run, number):
    """The run with NaN in the tokens of one class, so that its images alone are not finite."""
    table = np.array(run.ar_params['cls_embedding'])
    table[number] = np.nan
    return run._replace(ar_params={**run.ar_params, 'cls_embedding': table})


def test_images_that_are_not_finite_are_never_written(run, tmp_path):
    broken = _with_a_broken_class(run, 7)
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 8, 9, 7, 1, 7, 0, 1, 2, 3, 4, 5, 6, 8], np.int32)
    path = tmp_path / 'a.npz'
    for begun in (0, 8):  # the second start goes on from what is finite
        calls = []
        with pytest.raises(
            batching.NonFiniteSamples,
            match=r'^2 of the images 8 to 11 are not finite \(numbers 9, 11\).*are kept;',
        ) as error:
            _generate(broken, labels, path, progress=calls.append)
        assert error.value.indices == [9, 11]
        assert '\n' not in str(error.value)
        assert isinstance(error.value, UserError)  # the exit code is 2
        assert calls == list(range(begun, 9, 4))
    parts = tmp_path / 'a.npz.parts'
    assert sorted(f.name for f in parts.iterdir()) == ['00000000.npy', '00000004.npy', 'about.json']
    assert not path.exists()


def test_sampled_arrays_that_are_not_finite_are_refused(run):
    broken = _with_a_broken_class(run, 7)
    with pytest.raises(batching.NonFiniteSamples, match='2 of the images 4 to 6') as error:
        on_mesh.draw_images(
            broken, build.build_sampler(run.config), [1, 2, 3, 4, 7, 1, 7], seed=0, batch_size=4,
            mesh=sharding.make_mesh(1),
        )  # fmt: skip
    assert error.value.indices == [4, 6]


def test_ten_images_that_are_not_finite_are_named():
    finite = np.arange(16) >= 12
    with pytest.raises(batching.NonFiniteSamples) as error:
        batching.require_finite(finite, 100)
    assert error.value.indices == list(range(100, 112))
    assert '12 of the images 100 to 115' in str(error.value)
    assert '(numbers 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, …)' in str(error.value)
    batching.require_finite(finite[12:], 100)


def test_reconstructions_that_are_not_finite_are_refused():
    """With the posterior that compiles fastest."""
    cfg = tiny_config.get_config()
    cfg.vae.posterior = 'gaussian'
    vae = build.build_vae(cfg)
    params = tiny_config.random_params(vae)
    images = np.zeros((4, 16, 16, 1), np.float32)
    images[2] = np.inf
    with pytest.raises(batching.NonFiniteSamples, match='1 of the images 10 to 13') as error:
        autoencoding.reconstruct(
            vae, params, images, jax.random.key(0), 4, sharding.make_mesh(1), first=10
        )
    assert error.value.indices == [12]


def test_two_samplers_of_one_file(run, labels, whole, tmp_path):
    """The second is refused while the first draws; afterwards nothing of the lock is left."""
    path = tmp_path / 'a.npz'
    said = []

    def second(done):
        if done == 8:
            with pytest.raises(UserError, match=r'a\.npz\.parts is in use by a sampling') as error:
                _generate(run, labels, path)
            said.append(str(error.value))

    images, _ = _generate(run, labels, path, progress=second)
    assert len(said) == 1
    assert f'process {os.getpid()} on ' in said[0]
    assert '\n' not in said[0]
    np.testing.assert_array_equal(images, whole)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['a.npz', 'a.npz.json']


def test_the_lock_of_a_killed_sampler_is_taken_over(run, labels, tmp_path):
    path = tmp_path / 'a.npz'
    (tmp_path / 'a.npz.parts').mkdir()
    for name in ('lock', 'lock.json'):
        (tmp_path / 'a.npz.parts' / name).write_text('process 1 on elsewhere\n')
    _generate(run, labels[:4], path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['a.npz', 'a.npz.json']


def test_the_lock_is_released_before_its_directory_goes(run, labels, tmp_path, monkeypatch):
    """NFS would keep a file that is open, and with it the directory."""
    removed = []

    def remove(directory, **options):
        removed.append(sorted(os.listdir(directory)))
        shutil.rmtree(directory, **options)

    monkeypatch.setattr(generation, 'shutil', types.SimpleNamespace(rmtree=remove))
    _generate(run, labels[:4], tmp_path / 'a.npz')
    assert removed == [['00000000.npy', 'about.json']]
    assert sorted(f.name for f in tmp_path.iterdir()) == ['a.npz', 'a.npz.json']


def test_samples_that_are_there_take_no_lock(run, labels, tmp_path):
    path = tmp_path / 'a.npz'
    images, _ = _generate(run, labels[:4], path)
    with files.owned(f'{path}.parts', 'a sampling'):
        again, _ = _generate(run, labels[:4], path)
    np.testing.assert_array_equal(images, again)


def test_other_batches_go_on_with_the_parts_there_are(run, labels, whole, tmp_path):
    path = tmp_path / 'a.npz'
    calls = []
    with pytest.raises(_Stop):
        _generate(run, labels, path, progress=_stop_at(8))
    images, _ = _generate(run, labels, path, batch_size=7, progress=calls.append)
    assert calls == [8, 15, 20]
    np.testing.assert_array_equal(images[:8], whole[:8])
    assert np.abs(images.astype(int) - whole).max() <= 1


def test_the_file_is_whole_or_not_there(run, labels, whole, tmp_path, monkeypatch):
    path = tmp_path / 'a.npz'
    calls = []

    write = np.lib.format.write_array

    def full(file, array, **options):
        if array.dtype == np.int32:  # the labels, after the images
            raise OSError(28, 'No space left on device')
        write(file, array, **options)

    with monkeypatch.context() as m, pytest.raises(OSError, match='No space'):
        m.setattr(np.lib.format, 'write_array', full)
        _generate(run, labels, path)
    assert not path.exists()
    images, _ = _generate(run, labels, path, progress=calls.append)
    assert calls == [N]  # only put together
    np.testing.assert_array_equal(images, whole)


def _moved(params):
    """The parameters with one bit of one number changed."""
    leaves, tree = jax.tree.flatten(params)
    last = np.array(leaves[-1])
    last.view(np.uint32).reshape(-1)[-1] ^= 1
    return tree.unflatten([*leaves[:-1], last])


OTHERS = {
    'seed': lambda run, labels: (run, labels, dict(seed=6)),
    'labels': lambda run, labels: (run, (labels + (np.arange(N) == 3)) % 10, {}),
    'number': lambda run, labels: (run, labels[:-1], {}),
    'guidance': lambda run, labels: (tiny_config.random_run(guidance_scale=1.6), labels, {}),
    'temperature': lambda run, labels: (tiny_config.random_run(temperature=0.9), labels, {}),
    'steps': lambda run, labels: (tiny_config.random_run(num_steps=3), labels, {}),
    'AR weights': lambda run, labels: (run._replace(ar_params=_moved(run.ar_params)), labels, {}),
    'S-VAE weights': lambda run, labels: (
        run._replace(vae_params=_moved(run.vae_params)),
        labels,
        {},
    ),
    'heads': lambda run, labels: (run._replace(ar=run.ar.clone(heads=1)), labels, {}),
}


@pytest.fixture(scope='module')
def begun(run, labels, tmp_path_factory):
    """Paths of samples that are done, and of others that broke off."""
    directory = tmp_path_factory.mktemp('begun')
    _generate(run, labels, directory / 'done.npz')
    with pytest.raises(_Stop):
        _generate(run, labels, directory / 'half.npz', progress=_stop_at(8))
    return directory


@pytest.mark.parametrize('other', OTHERS)
def test_samples_of_other_settings_are_refused(run, labels, begun, other):
    changed, chosen, options = OTHERS[other](run, labels)
    for name, where in (('done.npz', 'done.npz holds'), ('half.npz', 'half.npz.parts holds')):
        with pytest.raises(
            UserError, match=f'{where} samples of other settings: .*--output'
        ) as error:
            _generate(changed, chosen, begun / name, **options)
        assert '\n' not in str(error.value)
    assert sorted(f.name for f in (begun / 'half.npz.parts').iterdir()) == [
        '00000000.npy',
        '00000004.npy',
        'about.json',
    ]


def test_samples_of_unknown_settings_are_refused(run, labels, tmp_path):
    np.savez(tmp_path / 'a.npz', arr_0=np.zeros(3))
    for about in (None, '{"seed": ', '[]'):
        if about is not None:
            (tmp_path / 'a.npz.json').write_text(about)
        with pytest.raises(UserError, match='other settings'):
            _generate(run, labels, tmp_path / 'a.npz')
    (tmp_path / 'b.npz.parts').mkdir()
    (tmp_path / 'b.npz.parts' / 'about.json').write_text('{"seed": ')
    with pytest.raises(UserError, match='other settings'):
        _generate(run, labels, tmp_path / 'b.npz')


def test_uniform_labels():
    """Chi-square below its 99.9% quantile, at a fixed seed; each a function of seed and place
    alone.
    """
    labels = generation.draw_labels('uniform', 20_000, 1000, 0)
    assert labels.dtype == np.int32
    assert labels.min() == 0
    assert labels.max() == 999
    counts = np.bincount(labels, minlength=1000)
    assert np.sum((counts - 20.0) ** 2 / 20) < scipy.stats.chi2.ppf(0.999, 999)
    assert np.sum((counts - 20.0) ** 2 / 20) > scipy.stats.chi2.ppf(0.001, 999)  # drawn, not dealt
    np.testing.assert_array_equal(generation.draw_labels('uniform', 77, 1000, 0), labels[:77])
    assert np.mean(generation.draw_labels('uniform', 20_000, 1000, 1) == labels) < 0.01


def test_balanced_labels():
    labels = generation.draw_labels('balanced', 25, 10, 3)
    assert labels.dtype == np.int32
    assert labels.tolist() == [*range(10), *range(10), *range(5)]


def test_labels_of_a_file(tmp_path):
    expected = [3, 0, 9, 9]
    (tmp_path / 'a.txt').write_text('3\n0\n9 # the last class\n9\n')
    (tmp_path / 'row.txt').write_text('3 0 9 9')
    np.save(tmp_path / 'a.npy', np.array(expected, np.uint8))
    for name in ('a.txt', 'row.txt', 'a.npy'):
        labels = generation.draw_labels(str(tmp_path / name), 4, 10, 0)
        assert labels.dtype == np.int32
        assert labels.tolist() == expected
    (tmp_path / 'one.txt').write_text('7')
    assert generation.draw_labels(str(tmp_path / 'one.txt'), 1, 10, 0).tolist() == [7]


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('short.txt', b'1\n2\n', 'must hold 4 whole numbers, but holds int64 (2,)'),
        ('empty.txt', b'', 'must hold 4 whole numbers, but holds int64 (0,)'),
        ('table.txt', b'1 2\n3 4\n', 'must hold 4 whole numbers, but holds int64 (2, 2)'),
        ('words.txt', b'1\n2\ncat\n4\n', 'is not a list of whole numbers'),
        ('half.txt', b'1\n2\n0.5\n4\n', 'is not a list of whole numbers'),
        ('huge.txt', b'1\n2\n3\n' + b'9' * 30, 'is not a list of whole numbers'),
        ('null.txt', b'1\n2\n3\n10\n', 'labels must lie between 0 and 9, but go from 1 to 10'),
        ('below.txt', b'1\n2\n3\n-1\n', 'labels must lie between 0 and 9'),
        ('bytes.txt', b'\x89PNG\xff\xfe\0', 'is not a list of whole numbers'),
        ('floats.npy', np.zeros(4), 'must hold 4 whole numbers, but holds float64 (4,)'),
        ('object.npy', np.array([1, 'a', None, 2], object), 'is not a whole npy file'),
        ('empty.npy', b'', 'is not a whole npy file'),
        ('text.npy', b'1 2 3 4', 'is not a whole npy file'),
        ('zip.npy', 'npz', 'is not a whole npy file'),
        ('vast.npy', 'vast', 'is not a whole npy file'),
        ('deep.npy', 'deep', 'is not a whole npy file'),
        ('escape.txt', b'1\n\x1b[31mred\n', r"could not convert string '\x1b[31mred'"),
        ('escapes.npy', b'\x93NUMPY\1\0\x76\0\x1b[31m' + b'\x1b' * 200, 'is not a whole npy'),
        ('none.txt', None, 'there is no file'),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings('ignore:loadtxt')
def test_each_bad_file_of_labels_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    elif content == 'npz':
        with open(path, 'wb') as f:
            np.savez(f, a=np.arange(4))
    elif content == 'deep':
        path.write_bytes(b'\x93NUMPY\1\0' + (9000).to_bytes(2, 'little') + b'(' * 9000)
    elif content == 'vast':
        with open(path, 'wb') as f:
            np.lib.format.write_array_header_1_0(
                f, {'descr': '<i8', 'fortran_order': False, 'shape': (2**50,)}
            )
    with pytest.raises(UserError, match=re.escape(message)) as error:
        generation.draw_labels(str(path), 4, 10, 0)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < len(str(path)) + 300


def test_what_a_file_says_of_itself(run, labels, tmp_path):
    """Beside the samples: the settings they were drawn with, for people too."""
    _generate(run, labels[:4], tmp_path / 'a.npz')
    about = json.loads((tmp_path / 'a.npz.json').read_text())
    assert about['seed'] == 5
    assert about['dtype'] == 'float32'
    assert about['sampling']['guidance_scale'] == 1.5
    assert about['sampling']['num_images'] == 4
    assert 'batch_size' not in about['sampling']
