"""Shuffled batches of a source of images, by Grain.

A source (`Source`) is a random-access sequence of records {'image', 'label': int32 ()}. It has the
attribute `num_classes` and, if its images can be broken, a method `name(index)` for messages. An
image is whatever the transform takes; without a transform it is float32 (H, W, c) in [−1, 1], or
other arrays stand in its place, as those of `latents.Latents`, which batches then have too.

Dimensions:
  B  images of the global batch
  b  those of them that this process loads
  n  images of the source
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from absl import flags

from sphere_ar_jax.data import augment
from sphere_ar_jax.data.files.listing import BrokenCaptionError
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError, first_line, refusal

if TYPE_CHECKING:
    import grain

_ENDLESS = 2**60  # rows, more than any run sees
_ATTEMPTS = 8  # images that are tried in turn for one row
PAUSES: tuple[float, ...] = (1, 5, 25)  # seconds before an image is read once more
_JUDGED_FROM = 100  # images tried before the share of broken ones can stop a run
# Images that threads and processes hand over at a time. More cost memory, fewer cost time.
_PART = 16

# One image with its label, or a batch of them.
Record: TypeAlias = dict[str, Any]
# Turns a record of the source into one of a batch, called as transform(record, epoch, rng).
Transform: TypeAlias = Callable[[Record, int, np.random.Generator], Record]


class Source(Protocol):
    """What `batches` needs of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def are_too_many(broken: float, seen: int, share: float) -> bool:
    """Whether more images are broken than a share lets pass, and more than chance explains.

    Chance may add three standard deviations of the share, 3 √(share / seen).

    Args:
      broken: how many are broken.
      seen: how many were tried, at least 1.
      share: the share that may be broken, in (0, 1].
    """
    return broken / seen > share + 3 * (share / seen) ** 0.5


def _one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {first_line(error, 300)}'


class _Loader:
    """Loads the i-th record of this process, counted from its first step.

    It is picklable, for worker processes.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | None,
        seed: int,
        first_step: int,
        rows: np.ndarray,
        batch_size: int,
    ):
        self.source = source
        self.transform = transform
        self.seed = seed
        self.first_step = first_step
        self.rows = rows
        self.batch_size = batch_size
        # Imported here, because it takes a while, and only trainings need it.
        import grain

        self.order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def name(self, index: int) -> str:
        """Names an image in messages."""
        if hasattr(self.source, 'name'):
            return self.source.name(index)
        return f'image {index}'

    def _read(self, index: int) -> Record:
        """Reads a record of the source, after each of `PAUSES` again if what fails may pass."""
        for pause in PAUSES:
            try:
                return self.source[index]
            except Exception as error:
                if not files.may_pass(error):
                    raise
                line = f'{first_line(error)}; it is read again in {pause} s'
                print(line, file=sys.stderr, flush=True)
            time.sleep(pause)
        return self.source[index]

    def _load(self, index: int, epoch: int, rng: np.random.Generator) -> Record:
        """Loads an image. Errors but BrokenImageError and MemoryError are or become UserErrors.

        They become TemporaryErrors where what fails may pass.
        """
        try:
            record = self._read(index)
            return record if self.transform is None else self.transform(record, epoch, rng)
        except (augment.BrokenImageError, MemoryError):
            raise
        except Exception as error:
            line = f'{self.name(index)} cannot be read: {_one_line(error)}'
            if isinstance(error, UserError):
                line = str(error)
            raise refusal(line, may_pass=files.may_pass(error)) from error

    def __call__(self, i: int) -> Record:
        """Loads record i, or a replacement if its image is broken.

        The record has two further entries (attempts,). 'broken' is the index of the image for each
        attempt that failed, and −1 for the others. 'lacks_caption' says whether it failed because
        there was no caption that can be read.
        """
        step, row = divmod(i, len(self.rows))
        position = (self.first_step + step) * self.batch_size + int(self.rows[row])
        index = int(self.order[position])
        broken = np.full(_ATTEMPTS, -1)
        lacks_caption = np.zeros(_ATTEMPTS, bool)
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng((self.seed, position, attempt))
            if attempt:
                index = int(rng.integers(len(self.source)))
            try:
                record = self._load(index, position // len(self.source), rng)
                return record | {'broken': broken, 'lacks_caption': lacks_caption}
            except augment.BrokenImageError as error:
                broken[attempt] = index
                lacks_caption[attempt] = isinstance(error, BrokenCaptionError)
                reason = error
        raise UserError(
            f'{_ATTEMPTS} images in turn are broken, the last one {self.name(index)}: {reason}'
        )


def _start_worker(*_: Any) -> None:
    """Makes a worker ignore signals, which the main process handles, and end when that one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this runs in a worker
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _join(parts: Sequence[Record]) -> Record:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _close_all(iterators: list[Any]) -> None:
    """Closes the iterators and empties the list.

    Grain's destructors are loud if they run when the interpreter is half gone.
    """
    while iterators:
        iterators.pop().close()


class Batches:
    """An endless iterator over batches, and a context manager that closes it; see `batches`.

    Attributes:
      seen: number of images that this process has tried to decode since its start.
      broken: how many of them could not be decoded, or had no caption that can be read.
    """

    def __init__(
        self,
        loader: _Loader,
        first_step: int,
        dataset: 'grain.IterDataset',
        max_broken: float,
    ):
        self._loader = loader
        self._step = first_step
        self._max_broken = max_broken
        self._iterators = [iter(dataset)]  # empty once these batches are closed
        # This closes them at the exit of the interpreter too.
        self._close = weakref.finalize(self, _close_all, self._iterators)
        self._named: set[int] = set()
        self.seen = 0
        self.broken = 0
        self._lack_caption = 0
        self._last_broken = ''

    def __iter__(self) -> 'Batches':
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Loads the next batch.

        Returns:
          {'image': (b, H, W, c) float32, 'label': (b,) int32}.

        Raises:
          UserError: too many images are broken, the source or the transform failed in another way,
            or a worker died; one line.
          TemporaryError: an image could not be read for a while, though it may be later.
          ValueError: these batches are closed.
        """
        if not self._iterators:
            raise ValueError('these batches are closed')
        try:
            batch = next(self._iterators[0])
        except UserError as error:  # Grain may have added lines to it
            raise type(error)(first_line(error, 2000)) from error
        except Exception as error:  # Grain raises it where a worker died
            raise UserError(f'reading images stopped: {_one_line(error)}') from error
        self._count(batch.pop('broken'), batch.pop('lacks_caption'))
        self._step += 1
        return batch

    def _count(self, broken: np.ndarray, lacks_caption: np.ndarray) -> None:
        """Counts and names the broken images of a batch; raises UserError if they are too many.

        Args:
          broken: (b, attempts), indices of broken images, −1 where there is none.
          lacks_caption: (b, attempts) bool, which of them have no caption that can be read.
        """
        found = broken[broken >= 0].tolist()
        lacking = lacks_caption[broken >= 0].tolist()
        self.seen += len(broken) + len(found)
        self.broken += len(found)
        self._lack_caption += sum(lacking)
        for index, lacks in zip(found, lacking, strict=True):
            self._last_broken = self._loader.name(index)
            if index not in self._named:
                self._named.add(index)
                what = 'has no caption that can be read' if lacks else 'is broken'
                print(f'{self._last_broken} {what}: another image takes its place', file=sys.stderr)
        if self.seen >= _JUDGED_FROM and are_too_many(self.broken, self.seen, self._max_broken):
            texts = ''
            if self._lack_caption:
                texts = f' ({self._lack_caption} of them have no caption that can be read)'
            raise UserError(
                f'{self.broken} of {self.seen} images are broken{texts}, '
                f'more than the share max_broken = {self._max_broken}; '
                f'the last one is {self._last_broken}'
            )

    def get_state(self) -> dict[str, int]:
        """Gives what a checkpoint stores so that `check_state` can compare it later.

        A restart does not need it to find its place, which follows from the step.
        """
        loader = self._loader
        return {
            'examples': self._step * loader.batch_size,
            'images': len(loader.source),
            'seed': loader.seed,
        }

    def check_state(self, state: dict[str, int]) -> None:
        """Checks that a checkpoint's state belongs to this place in this order of these images.

        Args:
          state: what `get_state` gave when the checkpoint was written.

        Raises:
          UserError: the batch size, the number of images, the seed or the step is another.
        """
        ours = self.get_state()
        if ours != state:
            raise UserError(
                f'the checkpoint belongs to other data: it notes {state}, '
                f'the run would go on from {ours}. Give it the batch size, the images and the seed '
                'that it had, or start in another directory'
            )

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._close()

    def __enter__(self) -> 'Batches':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    first_step: int = 0,
    rows: np.ndarray | None = None,
    threads: int = 2,
    workers: int = 0,
    max_broken: float = 0.01,
) -> Batches:
    """Makes an endless iterator over shuffled batches, which are a function of (seed, step) alone.

    They do not depend on the number of processes, threads or workers. Row r of the global batch of
    step k is at the position q = k·B + r. Its epoch is ⌊q/n⌋ for n images, and each epoch has all
    images in an order of its own. A process loads some rows of every global batch. All random draws
    for an image are made from numpy.random.default_rng((seed, q, attempt)).

    Attempt 0 takes the image at position q. If that image is broken, attempts a = 1, 2, … replace
    it and its label by those of the index rng.integers(n), the first draw of the attempt's rng.
    Broken images are named once on stderr.

    Args:
      source: the images, see the module's docstring.
      batch_size: B.
      seed: determines the order and all draws.
      transform: function (record of the source, epoch, rng) → {'image', 'label'}, which may raise
        augment.BrokenImageError. It must be picklable if there are workers. None gives the source's
        own records.
      first_step: k of the first batch.
      rows: (b,) ints, the rows to load, see `sharding.local_rows`; None loads all.
      threads: number of threads that read ahead, in each process that reads.
      workers: number of processes that read; with 0 this process reads. They cost seconds to start,
        need the main program to be guarded by `if __name__ == '__main__'`, and hand images over in
        /dev/shm, which containers may keep too small.
      max_broken: the run stops when more than this share of the images that this process has
        tried since its start, replacements included, is broken, see `are_too_many`. The share is
        judged from 100 images on. It also stops where 8 images in turn are broken.

    Returns:
      `Batches` of {'image': (b, H, W, c) float32, 'label': (b,) int32}. Its `next` raises
      UserError, one line, for too many broken images, for any other error of source or transform,
      and if a worker dies.

    Raises:
      UserError: there are no images.
    """
    # See `_Loader`.
    import grain

    if not len(source):
        raise UserError('there are no images to train on')
    if rows is None:
        rows = np.arange(batch_size)
    loader = _Loader(source, transform, seed, first_step, rows, batch_size)
    part = math.gcd(len(rows), _PART)
    parts = len(rows) // part
    ahead = -(-parts // max(workers, 1))  # one batch, besides what is being read
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + ahead)
    dataset = grain.MapDataset.range(_ENDLESS).map(loader).batch(part).to_iter_dataset(reading)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags, which only programs of absl parse
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    dataset = dataset.batch(parts, batch_fn=_join)
    if workers:
        # This runs in a thread, because freeing what workers hand over runs Python code, in which
        # a Ctrl-C would be lost.
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)
    return Batches(loader, first_step, dataset, max_broken)
