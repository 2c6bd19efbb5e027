"""Data sources and the Grain pipeline.

A source is a random-access sequence of {'image', 'label': int32 ()} with the attribute
`num_classes` and, if its images can be broken, a method `name(index)`. An image is float32 (H, W,
c) in [−1, 1], or whatever the transform takes.

Dimensions:
  B  images of the global batch      b  those of them that this process loads      n  images of the
  source
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
import weakref

import grain
import numpy as np
from absl import flags

from sphere_ar_jax.data import augment
from sphere_ar_jax.runtime.console import UserError, first_line

_ENDLESS = 2**60  # rows: more than any run sees
_ATTEMPTS = 8  # images in turn that may be broken
_JUDGED_FROM = 100  # images seen, before the share of the broken ones counts
_PART = (
    16  # images that threads and processes hand over at a time: more costs memory, fewer costs time
)


def _one_line(error):
    return f'{type(error).__name__}: {first_line(error, 300)}'


class _Loader:
    """Row i of all rows that a process loads, from its first step on → a record. Picklable, for
    worker processes.
    """

    def __init__(self, source, transform, seed, first_step, rows, batch_size):
        self.source, self.transform, self.seed = source, transform, seed
        self.first_step, self.rows, self.batch_size = first_step, rows, batch_size
        self.order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def name(self, index):
        return self.source.name(index) if hasattr(self.source, 'name') else f'image {index}'

    def _load(self, index, epoch, rng):
        try:
            record = self.source[index]
            return record if self.transform is None else self.transform(record, epoch, rng)
        except (augment.BrokenImageError, MemoryError):
            raise
        except Exception as error:
            raise UserError(f'{self.name(index)} cannot be read: {_one_line(error)}') from error

    def __call__(self, i):
        step, row = divmod(i, len(self.rows))
        position = (self.first_step + step) * self.batch_size + int(self.rows[row])
        index, broken = int(self.order[position]), np.full(_ATTEMPTS, -1)
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng((self.seed, position, attempt))
            if attempt:
                index = int(rng.integers(len(self.source)))
            try:
                return self._load(index, position // len(self.source), rng) | {'broken': broken}
            except augment.BrokenImageError as error:
                broken[attempt], reason = index, error
        raise UserError(
            f'{_ATTEMPTS} images in turn are broken, the last one {self.name(index)}: {reason}'
        )


def _start_worker(*_):
    """In a worker process: signals are the main process's business, and without that there is
    nothing to do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _join(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _close_all(iterators):
    """Drops them as well: Grain's destructors are loud if they run when the interpreter is half
    gone.
    """
    while iterators:
        iterators.pop().close()


class Batches:
    """What `batches` returns: an endless iterator, and a context manager that closes it.

    Attributes:
      seen: images that this process has tried to decode since its start. broken: how many of them
        it could not.
    """

    def __init__(self, loader, first_step, dataset, max_broken):
        self._loader, self._step, self._max_broken = loader, first_step, max_broken
        self._iterators = [iter(dataset)]  # none, once it is closed
        self._close = weakref.finalize(self, _close_all, self._iterators)  # at exit too
        self._named = set()
        self.seen = self.broken = 0

    def __iter__(self):
        return self

    def __next__(self):
        if not self._iterators:
            raise ValueError('these batches are closed')
        try:
            batch = next(self._iterators[0])
        except UserError as error:  # to which Grain may have added lines
            raise UserError(first_line(error, 2000)) from error
        except Exception as error:  # of Grain, for a worker that died
            raise UserError(f'reading images stopped: {_one_line(error)}') from error
        self._count(batch.pop('broken'))
        self._step += 1
        return batch

    def _count(self, broken):
        """broken (b, attempts): indices of broken images, −1 where there is none."""
        found = broken[broken >= 0].tolist()
        self.seen += len(broken) + len(found)
        self.broken += len(found)
        for index in found:
            if index not in self._named:
                self._named.add(index)
                print(
                    f'{self._loader.name(index)} is broken: another image takes its place',
                    file=sys.stderr,
                )
        if self.seen >= _JUDGED_FROM and self.broken > self._max_broken * self.seen:
            raise UserError(
                f'{self.broken} of {self.seen} images are broken, more than the share max_broken = {self._max_broken}; '
                f'the last one is {self._loader.name(found[-1])}'
            )

    def get_state(self):
        """What a checkpoint notes, to be checked by `check_state`; the position itself follows from
        the step.
        """
        loader = self._loader
        return {
            'examples': self._step * loader.batch_size,
            'images': len(loader.source),
            'seed': loader.seed,
        }

    def check_state(self, state):
        """Raises UserError if `state`, of a checkpoint, is not of this place in this order of these
        images.
        """
        if (ours := self.get_state()) != state:
            raise UserError(
                f'the checkpoint belongs to other data: it notes {state}, the run would go on from {ours}. '
                f'Give it the batch size, the images and the seed that it had, or start in another directory'
            )

    def close(self):
        """Ends threads and worker processes."""
        self._close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def batches(
    source,
    *,
    batch_size,
    seed,
    transform=None,
    first_step=0,
    rows=None,
    threads=2,
    workers=0,
    max_broken=0.01,
):
    """An endless iterator over shuffled batches, a function of (seed, step) alone: not of
    processes, threads, workers.

    Row r of the global batch of step k is at the position q = k·B + r; its epoch is ⌊q/n⌋ for n
    images, and each epoch has all of them in an order of its own. A process loads some rows of
    every global batch. All random draws for an image are made from numpy.random.default_rng((seed,
    q, attempt)).

    An image that is broken is replaced: its attempt was 0, and attempt a = 1, 2, … takes the image
    with the index rng.integers(n), the first draw of that attempt's rng, and its label. Broken
    images are named once on stderr.

    Args:
      source: see the module. batch_size: B. seed: of order and draws.
      transform: function (record of the source, epoch, rng) → {'image', 'label'}, which may raise
        augment.BrokenImageError; picklable, if there are workers. None: the source's own records.
      first_step: k of the first batch. rows: (b,) ints, those to load, see `sharding.local_rows`;
        None: all.
      threads: that read ahead, in each process that reads.
      workers: processes that read, 0 for none but this one. They cost seconds to start, need the
        main program to be guarded by `if __name__ == '__main__'`, and hand images over in /dev/shm,
        which containers may keep too small.
      max_broken: the run stops at the first batch after which ≥ 100 images were tried by this
        process since its start, replacements included, and a larger share than this was broken;
        also where 8 in turn are.
    Returns:
      `Batches`, of {'image': (b, H, W, c) float32, 'label': (b,) int32}. Its `next` raises
        UserError, one line, for
      too many broken images, for any other error of source or transform, and if a worker dies.
    Raises:
      UserError: there are no images.
    """
    if not len(source):
        raise UserError('there are no images to train on')
    rows = np.arange(batch_size) if rows is None else rows
    loader = _Loader(source, transform, seed, first_step, rows, batch_size)
    part = math.gcd(len(rows), _PART)
    parts = len(rows) // part
    ahead = -(-parts // max(workers, 1))  # one batch, beside what is being read
    dataset = grain.MapDataset.range(_ENDLESS).map(loader).batch(part)
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + ahead)
    )
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags, which only programs of absl parse
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    dataset = dataset.batch(parts, batch_fn=_join)
    if workers:
        # In a thread: freeing what workers hand over runs Python code, in which a Ctrl-C would be
        # lost
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)
    return Batches(loader, first_step, dataset, max_broken)
