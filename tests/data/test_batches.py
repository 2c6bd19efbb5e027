import contextlib
import errno
import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import chex
import numpy as np
import pytest
from sklearn.datasets import load_digits

from sphere_ar_jax.data import augment, digits
from sphere_ar_jax.data import batches as data_batches
from sphere_ar_jax.runtime.console import TemporaryError, UserError
from tests.fake_images import Epochs, Pictures

ROOT = pathlib.Path(__file__).parents[2]


def _take(iterator, n):
    return [next(iterator) for _ in range(n)]


def _rows(batches):
    return np.concatenate([batch['image'].reshape(len(batch['image']), -1) for batch in batches])


class Numbered:
    """A source whose images are their own index."""

    image_shape = (1, 1, 1)
    num_classes = 3

    def __len__(self):
        return 48

    def __getitem__(self, index):
        return {'image': np.full((1, 1, 1), index, np.float32), 'label': np.int32(index % 3)}


def test_digits_are_the_real_ones_and_the_split_is_clean():
    train, heldout = digits.splits(3, 0.2)
    assert (len(train), len(heldout)) == (1438, 359)
    real = load_digits()

    def key(images):
        return sorted(map(bytes, np.ascontiguousarray(images).reshape(len(images), -1)))

    assert key(np.concatenate([train.pixels, heldout.pixels]) * 16) == key(real.images)
    assert sorted(train.labels.tolist() + heldout.labels.tolist()) == sorted(real.target.tolist())
    again = digits.Digits('heldout', seed=3)
    np.testing.assert_array_equal(again.pixels, heldout.pixels)
    assert not np.array_equal(digits.Digits('heldout', seed=4).pixels, heldout.pixels)


def test_digit_items():
    source = digits.Digits('train', seed=0)
    item = source[5]
    chex.assert_shape(item['image'], source.image_shape)
    assert item['image'].dtype == np.float32
    assert item['label'].dtype == np.int32
    assert item['image'].min() >= -1
    assert item['image'].max() <= 1
    np.testing.assert_allclose(
        digits.shrink((item['image'] + 1) / 2)[..., 0], source.pixels[5], atol=1e-7
    )


def test_enlarge_and_shrink_are_inverse():
    images = np.random.default_rng(0).normal(size=(3, 4, 5, 2))
    assert digits.enlarge(images).shape == (3, 8, 10, 2)
    np.testing.assert_allclose(digits.shrink(digits.enlarge(images)), images)


def test_every_epoch_has_every_image_once_in_its_own_order():
    order = (
        _rows(_take(data_batches.batches(Numbered(), batch_size=8, seed=0), 18))
        .ravel()
        .reshape(3, 48)
    )
    for epoch in order:
        assert sorted(epoch) == list(range(48))
    assert not np.array_equal(order[0], order[1])
    assert not np.array_equal(order[1], order[2])


def test_a_function_of_the_seed_alone():
    same = [
        _rows(_take(data_batches.batches(Numbered(), batch_size=8, seed=5, threads=t), 9))
        for t in (1, 4)
    ]
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(
        same[0], _rows(_take(data_batches.batches(Numbered(), batch_size=8, seed=6), 9))
    )


@pytest.mark.parametrize('hosts', [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(hosts):
    alone = _take(data_batches.batches(Numbered(), batch_size=8, seed=0), 9)
    for shares in (
        np.arange(8).reshape(hosts, -1),
        np.arange(8).reshape(-1, hosts).T,
        [[5], [0, 1, 2, 3, 4, 6, 7]],
    ):
        parts = [
            _take(data_batches.batches(Numbered(), batch_size=8, seed=0, rows=np.array(rows)), 9)
            for rows in shares
        ]
        for rows, part in zip(shares, parts, strict=True):
            for whole, mine in zip(alone, part, strict=True):
                np.testing.assert_array_equal(mine['image'], whole['image'][rows])


def test_the_order_is_that_of_earlier_versions():
    """Recorded before the position came from the step."""
    order = (
        _rows(_take(data_batches.batches(Numbered(), batch_size=8, seed=7), 2))
        .ravel()
        .astype(int)
        .tolist()
    )
    assert order == [28, 9, 0, 45, 29, 30, 17, 6, 10, 22, 36, 26, 42, 2, 47, 16]


def _global_batches(source, steps, first_step, hosts, batch_size=16, **options):
    """The batches of `steps` steps, loaded by so many processes, one after the other, and put
    together.
    """
    parts = []
    for rows in np.split(np.arange(batch_size), hosts):
        with data_batches.batches(
            source, batch_size=batch_size, seed=3, first_step=first_step, rows=rows, **options
        ) as part:
            parts.append(_take(part, steps))
    return [
        {name: np.concatenate([part[name] for part in step]) for name in ('image', 'label')}
        for step in zip(*parts, strict=True)
    ]


def _equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert set(a) == set(b) == {'image', 'label'}
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def test_a_resume_with_other_processes_goes_on_bit_for_bit():
    """8, 4, 1, 8 processes after another: the augmented batches of an undisturbed run; no image
    twice in an epoch, none left out, though 50 images are no multiple of the 16 of a batch.
    """
    source = Pictures(50)
    transform = augment.Augmentation(32, decay_from=0, decay_to=3)
    whole = _global_batches(source, 14, 0, 1, transform=transform)
    pieces = []
    step = 0
    for hosts, steps, threads in ((8, 3, 1), (4, 5, 3), (1, 2, 2), (8, 4, 2)):
        pieces += _global_batches(source, steps, step, hosts, transform=transform, threads=threads)
        step += steps
    _equal(pieces, whole)
    labels = np.concatenate([batch['label'] for batch in pieces])
    for epoch in range(4):
        assert sorted(labels[50 * epoch : 50 * epoch + 50]) == list(range(50))
    assert whole[0]['image'].shape == (16, 32, 32, 3)
    assert whole[0]['image'].dtype == np.float32
    assert whole[0]['label'].dtype == np.int32


@pytest.fixture(scope='module')
def one_by_one():
    """The first 100 images of 7, in batches of one."""
    batches = _global_batches(Pictures(7), 100, 0, 1, 1, transform=Epochs())
    return np.concatenate([batch['image'] for batch in batches])


@pytest.mark.parametrize('batch_size', [2, 24, 48, 10])
def test_batches_of_any_size_are_pieces_of_one_stream(one_by_one, batch_size):
    """What is handed over at a time (16 images or fewer) shows nowhere."""
    ours = _global_batches(Pictures(7), 96 // batch_size, 0, 2, batch_size, transform=Epochs())
    ours = np.concatenate([batch['image'] for batch in ours])
    np.testing.assert_array_equal(ours, one_by_one[: len(ours)])
    np.testing.assert_array_equal(one_by_one[:, 0], np.arange(100) // 7)  # the epoch
    assert len(set(one_by_one[:, 1])) == 100  # draws of their own in every epoch


def test_the_epoch_goes_on_across_a_resume():
    batch = _global_batches(Pictures(10), 1, 1000, 1, 16, transform=Epochs())[0]
    np.testing.assert_array_equal(batch['image'][:, 0], np.arange(16_000, 16_016) // 10)


def test_state_is_checked():
    iterator = data_batches.batches(Numbered(), batch_size=8, seed=0, first_step=3)
    _take(iterator, 4)
    state = iterator.get_state()
    assert state == json.loads(json.dumps(state)) == {'examples': 56, 'images': 48, 'seed': 0}
    data_batches.batches(Numbered(), batch_size=8, seed=0, first_step=7).check_state(state)
    for options, old in (
        ({'batch_size': 16, 'seed': 0, 'first_step': 7}, state),
        ({'batch_size': 8, 'seed': 1, 'first_step': 7}, state),
        ({'batch_size': 8, 'seed': 0, 'first_step': 6}, state),
        ({'batch_size': 8, 'seed': 0, 'first_step': 7}, {'next_index': 7}),
        ({'batch_size': 8, 'seed': 0, 'first_step': 7}, state | {'images': 47}),
    ):  # fmt: skip
        with pytest.raises(UserError, match='the checkpoint belongs to other data') as error:
            data_batches.batches(Numbered(), **options).check_state(old)
        assert '\n' not in str(error.value)


BROKEN = (3, 17, 31)


def test_broken_images_are_replaced(capfd):
    """By hand: the attempts' indices are the first draws of (seed, position, attempt); their labels
    come along.
    """
    whole = Pictures(50)
    source = Pictures(50, BROKEN)
    transform = augment.Augmentation(32)
    good = _global_batches(whole, 7, 0, 1, transform=transform)
    capfd.readouterr()
    with data_batches.batches(
        source, batch_size=16, seed=3, transform=transform, max_broken=0.2
    ) as iterator:
        ours = _take(iterator, 7)
        expected = []
        tried = 0
        for position, label in enumerate(np.concatenate([batch['label'] for batch in good])):
            attempt = 0
            tried += 1
            while label in BROKEN:
                attempt += 1
                tried += 1
                label = np.random.default_rng((3, position, attempt)).integers(50)
            expected.append(label)
        labels = np.concatenate([batch['label'] for batch in ours])
        np.testing.assert_array_equal(labels, expected)
        assert (iterator.seen, iterator.broken) == (tried, tried - 112)
        assert 6 <= tried - 112 <= 12
    same = ~np.isin(np.concatenate([batch['label'] for batch in good]), BROKEN)
    np.testing.assert_array_equal(
        np.concatenate([b['image'] for b in ours])[same],
        np.concatenate([b['image'] for b in good])[same],
    )
    said = capfd.readouterr().err.splitlines()
    assert sorted(said) == [
        f'class/{i}.JPEG is broken: another image takes its place' for i in (17, 3, 31)
    ]
    _equal(_global_batches(source, 7, 0, 4, transform=transform, max_broken=0.2), ours)


def test_the_last_broken_image_is_named_where_later_batches_have_none():
    options = dict(batch_size=16, seed=3, transform=augment.Augmentation(32))
    none = np.full((16, 8), -1)
    broken = none.copy()
    broken[:, 0] = np.arange(16)
    lacks = np.zeros((16, 8), bool)
    with data_batches.batches(Pictures(50, ()), max_broken=0.01, **options) as iterator:
        iterator._count(broken, lacks)
        for _ in range(4):
            iterator._count(none, lacks)
        with pytest.raises(UserError, match=r'^16 of 112 images .*; the last one is class/15.JPEG'):
            iterator._count(none, lacks)


@pytest.mark.parametrize(
    ('broken', 'seen', 'share', 'expected'),
    [
        (1, 101, 0.001, False),  # one broken image may be chance
        (2, 101, 0.001, True),
        (1300, 1_281_167, 0.001, False),
        (1400, 1_281_167, 0.001, True),
        (100, 100, 1.0, False),
    ],
)
def test_how_many_broken_images_are_too_many(broken, seen, share, expected):
    assert data_batches.are_too_many(broken, seen, share) == expected


def test_what_a_source_says_of_an_image_is_said_once(tmp_path):
    class Unreadable(Pictures):
        def __getitem__(self, i):
            raise UserError('x.jpg cannot be read: no such file')

    options = dict(batch_size=2, seed=3, transform=augment.Augmentation(32))
    with (
        data_batches.batches(Unreadable(5, ()), max_broken=1.0, **options) as iterator,
        pytest.raises(UserError, match=r'^x\.jpg cannot be read: no such file'),
    ):
        next(iterator)


def test_too_many_broken_images_stop_the_run(capfd):
    options = dict(batch_size=16, seed=3, transform=augment.Augmentation(32))
    with data_batches.batches(Pictures(50, BROKEN), max_broken=0.01, **options) as iterator:
        _take(iterator, 5)  # 80 images and their replacements, fewer than 100
        assert iterator.seen < 100
        assert iterator.broken > 0.04 * iterator.seen
        with pytest.raises(
            UserError,
            match=r'^\d+ of \d+ images are broken, more than the share max_broken = 0.01; ',
        ):
            _take(iterator, 2)
    with (
        data_batches.batches(Pictures(5, range(5)), max_broken=1.0, **options) as iterator,
        pytest.raises(
            UserError, match=r'^8 images in turn are broken, the last one class/\d.JPEG: '
        ),
    ):
        next(iterator)
    capfd.readouterr()


def test_an_error_of_the_source_is_one_line():
    source = Pictures(50, missing=[3])
    with (
        data_batches.batches(source, batch_size=16, seed=3) as iterator,
        pytest.raises(UserError) as error,
    ):
        _take(iterator, 4)
    assert str(error.value) == 'class/3.JPEG cannot be read: OSError: the disk is gone'


@pytest.mark.parametrize('failures, ends', [(3, False), (4, True)])
def test_a_disk_that_comes_back_ends_no_training(monkeypatch, capfd, failures, ends):
    """The image is read again, even where the source has made a line of the error."""
    monkeypatch.setattr(data_batches, 'PAUSES', (0, 0, 0))
    left = [failures]

    class Unsteady(Numbered):
        def __getitem__(self, i):
            if i == 3 and left[0]:
                left[0] -= 1
                try:
                    raise OSError(errno.EIO, 'Input/output error')
                except OSError as error:
                    raise UserError(f'3.jpg cannot be read: {error}') from None
            return super().__getitem__(i)

    options = dict(batch_size=16, seed=3)
    expected = _take(data_batches.batches(Numbered(), **options), 7)
    with data_batches.batches(Unsteady(), **options) as iterator:
        if ends:
            line = r'^3\.jpg cannot be read: .*Input/output error$'
            with pytest.raises(TemporaryError, match=line):
                _take(iterator, 7)
        else:
            _equal(_take(iterator, 7), expected)
    line = '3.jpg cannot be read: [Errno 5] Input/output error; it is read again in 0 s'
    assert capfd.readouterr().err.splitlines() == [line] * 3


def test_closed_is_closed():
    with data_batches.batches(Numbered(), batch_size=8, seed=0) as iterator:
        next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match='closed'):
        next(iterator)


def test_no_images_are_refused():
    with pytest.raises(UserError, match='there are no images'):
        data_batches.batches(Pictures(0), batch_size=16, seed=3)


def _children():
    return {p.pid for p in multiprocessing.active_children()}


@pytest.mark.slow
def test_worker_processes_change_nothing(capfd):
    """Images that are broken among the rest; errors arrive in one line; no process stays behind."""
    source = Pictures(50, BROKEN)
    transform = augment.Augmentation(32)
    before = _children()
    expected = _global_batches(source, 7, 1, 1, 48, transform=transform, max_broken=0.2)
    capfd.readouterr()
    ours = _global_batches(source, 7, 1, 1, 48, transform=transform, max_broken=0.2, workers=2)
    _equal(ours, expected)
    assert _children() == before
    said = capfd.readouterr().err.splitlines()
    assert sorted(said) == sorted(
        f'class/{i}.JPEG is broken: another image takes its place' for i in BROKEN
    )
    with (
        data_batches.batches(
            Pictures(50, missing=[3]), batch_size=16, seed=3, workers=1
        ) as iterator,
        pytest.raises(UserError, match=r'^class/3.JPEG cannot be read: OSError: the disk is gone$'),
    ):
        _take(iterator, 4)
    assert _children() == before


DRIVER = """
import multiprocessing, os, signal, sys, threading, time
from grain._src.python.ipc.shared_memory_array import SharedMemoryArray
from sphere_ar_jax.data import augment
from sphere_ar_jax.data import batches
from sphere_ar_jax.runtime.console import UserError
from tests.fake_images import Pictures

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in \
the background without it
    iterator = batches.batches(
        Pictures(50), batch_size=32, seed=0, transform=augment.Augmentation(32), workers=2, \
threads=1
    )
    next(iterator)
    workers = [p.pid for p in multiprocessing.active_children()]
    arrived, end = [], time.monotonic() + 60
    signal.signal(signal.SIGTERM, lambda *_: arrived.append(0))  # as training does
    print(*workers, flush=True)
    if sys.argv[1] == 'killed worker':
        os.kill(workers[0], signal.SIGKILL)
    elif sys.argv[1] == 'Ctrl-C as memory is freed':
        free, freed = SharedMemoryArray.__del__, []
        def interrupted(array):
            free(array)
            freed.append(array.shape)
            if threading.current_thread() is threading.main_thread() or len(freed) == 50:
                SharedMemoryArray.__del__ = free
                signal.raise_signal(signal.SIGINT)
        SharedMemoryArray.__del__ = interrupted
    try:
        while sys.argv[1] != 'end' and len(arrived) < 50 and time.monotonic() < end:
            next(iterator)
            arrived += arrived[:1]
        print('the end', flush=True)
    except UserError as error:
        print(error, flush=True)
        iterator.close()
"""


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    # The program is a file, because worker processes read the main program again.
    path = tmp_path_factory.mktemp('driver') / 'driver.py'
    path.write_text(DRIVER)
    return path


def _alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    'what',
    [
        pytest.param('end', marks=pytest.mark.slow),
        pytest.param('killed worker', marks=pytest.mark.slow),
        pytest.param('SIGTERM', marks=pytest.mark.slow),
        pytest.param('Ctrl-C', marks=pytest.mark.slow),
        pytest.param('Ctrl-C as memory is freed', marks=pytest.mark.slow),
        pytest.param('killed', marks=pytest.mark.slow),
    ],
)
def test_nothing_hangs(driver, tmp_path, what):
    """At the end of a program that does not close; when a worker dies; at Ctrl-C, which a terminal
    sends to all processes, also while Grain frees an array, where Python cannot raise; no worker
    outlives a main process that was killed. Workers leave SIGTERM to the main process, which still
    reads a few batches here.
    """
    with open(tmp_path / 'errors', 'w') as errors_file:
        process = subprocess.Popen(
            [sys.executable, str(driver), what], stdout=subprocess.PIPE, stderr=errors_file,
            text=True, env=os.environ | {'PYTHONPATH': str(ROOT)}, start_new_session=True,
        )  # fmt: skip
        too_long = threading.Timer(150, os.killpg, (process.pid, signal.SIGKILL))
        too_long.start()
        try:
            workers = [int(pid) for pid in process.stdout.readline().split()]
            assert len(workers) == 2
            if what == 'Ctrl-C':
                os.killpg(process.pid, signal.SIGINT)
            elif what == 'SIGTERM':
                os.killpg(process.pid, signal.SIGTERM)
            elif what == 'killed':
                process.kill()
            output = process.stdout.read()
            process.wait()
            end = time.monotonic() + 20
            while any(map(_alive, workers)) and time.monotonic() < end:
                time.sleep(0.1)
            errors = (tmp_path / 'errors').read_text()
            assert not any(map(_alive, workers)), errors
            assert not too_long.finished.is_set(), errors
        finally:
            too_long.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
    if what == 'killed worker':
        assert re.fullmatch(
            r'reading images stopped: .*terminated unexpectedly with exit code -9.*\n', output
        ), output
    elif what.startswith('Ctrl-C'):
        assert process.returncode == -signal.SIGINT, errors
        assert errors.rstrip().endswith('KeyboardInterrupt'), errors
        assert errors.count('Traceback') == 1, errors  # that of the main process
    elif what in ('end', 'SIGTERM'):
        assert process.returncode == 0, errors
        assert output == 'the end\n', errors
        assert not errors, errors
