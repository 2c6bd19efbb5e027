"""Where numbers of a run go: a JSON-lines file, TensorBoard events, and the console.

clu's own writers import TensorFlow; tensorboardX writes the same event files without it.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TextIO

import numpy as np
from etils import epath
from tensorboardX import summary as tensorboard
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from sphere_ar_jax.runtime import files, hosts

_FLUSH = 10  # seconds between writes to the event file


class _Events:
    """Writes TensorBoard events.

    `tensorboardX.SummaryWriter` writes in a thread. Once that fails, as on a full disk, its caller
    waits for ever. Here errors are raised where the events are added.
    """

    def __init__(self, directory: str, purge_step: int) -> None:
        """Opens a new event file in a directory.

        Args:
          directory: where it is.
          purge_step: TensorBoard forgets earlier events from this step on.
        """
        self._path = os.path.join(directory, 'events')
        with files.naming(self._path):
            self._writer = EventsWriter(self._path)
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=purge_step, session_log=start))
        self._flushed = 0.0

    def add(self, summary: Any, step: int) -> None:
        """Adds a summary of a step."""
        with files.naming(self._path):
            self._writer.write_event(Event(summary=summary, step=step, wall_time=time.time()))
            if time.monotonic() - self._flushed > _FLUSH:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is not written yet, and closes the file."""
        with files.naming(self._path):
            self._writer.close()


class MetricWriter:
    """Writes the scalars of one training stage and shows its progress.

    In a terminal it shows a progress bar with the time left, elsewhere a plain line at every
    `write`. Where a run has several processes, only the first one writes and shows anything.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str, step: int, total: int) -> None:
        """Opens the files of a directory, which is made if needed.

        Args:
          directory: where `metrics.jsonl` and the event files are.
          name: the stage's name, for the console.
          step: the step that the stage goes on from. Later lines of `metrics.jsonl`, left by a run
            that was killed, are dropped.
          total: the number of steps of the stage.
        """
        self._name = name
        self._total = total
        self._silent = not hosts.is_first()
        if self._silent:
            return
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        path = os.path.join(directory, 'metrics.jsonl')
        self._text = ''.join(
            json.dumps(line) + '\n' for line in read_scalars(path) if line['step'] <= step
        )
        self._path = epath.Path(path)
        files.write_bytes(path, self._text.encode())
        self._file: TextIO | None = None
        # Nothing can be added to a file in a bucket, so that such a file is written anew.
        if '://' not in str(directory):
            self._file = open(path, 'a', buffering=1)  # noqa: SIM115, closed by close()
        self._events = _Events(os.fspath(directory), step + 1)
        bar = '{desc} {percentage:3.0f}% |{bar}| {n}/{total} steps, {remaining} left{postfix}'
        self._bar = tqdm(
            total=total, initial=step, desc=name, bar_format=bar, disable=not sys.stderr.isatty()
        )

    def advance(self) -> None:
        """Moves the progress bar on by one step."""
        if not self._silent:
            self._bar.update()

    def write(self, step: int, scalars: Mapping[str, float], shown: Iterable[str]) -> None:
        """Records the scalars of a step.

        Args:
          step: their step.
          scalars: values by name.
          shown: the names of those that the console shows.
        """
        if self._silent:
            return
        line = json.dumps({'step': step, **scalars}) + '\n'
        with files.naming(self._path):
            if self._file is not None:
                self._file.write(line)
            else:
                self._text += line
                self._path.write_text(self._text)
        for name, value in scalars.items():
            self._events.add(tensorboard.scalar(name, value), step)
        text = ', '.join(f'{name} {scalars[name]:.4g}' for name in shown)
        if self._bar.disable:
            speed = scalars.get('seconds_per_step')
            left = '' if speed is None else f', {(self._total - step) * speed:.0f} s left'
            print(f'{self._name} {step}/{self._total}{left}: {text}', flush=True)
        else:
            self._bar.set_postfix_str(text)

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Adds a picture, uint8 (height, width, c), to the TensorBoard events."""
        if not self._silent:
            self._events.add(tensorboard.image(name, pixels, dataformats='HWC'), step)

    def close(self) -> None:
        """Closes the files and the progress bar."""
        if self._silent:
            return
        with contextlib.ExitStack() as stack:  # One that fails does not keep the others open.
            stack.callback(self._bar.close)
            stack.callback(self._events.close)
            if self._file is not None:
                stack.enter_context(files.naming(self._path))
                stack.callback(self._file.close)


def _scalars(line: bytes, needed: Collection[str]) -> dict[str, Any] | None:
    """A line as a dictionary, or None where it is damaged or lacks one of the names needed."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(name in found for name in needed):
        return None
    return found if isinstance(found.get('step', 0), int) else None


def read_scalars(
    path: str | os.PathLike[str], needed: Collection[str] = ('step',)
) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl` as dictionaries; [] if there is no such file.

    A line that was cut off when its process was killed is left out. So are damaged ones, which a
    line on stderr counts.

    Args:
      path: the file.
      needed: names that every line must have. A `step` must be a whole number.

    Returns:
      The whole lines, in order.
    """
    if not epath.Path(path).exists():
        return []
    *lines, last = epath.Path(path).read_bytes().split(b'\n')
    found = [_scalars(line, needed) for line in lines]
    whole = [scalars for scalars in found if scalars is not None]
    damaged = len(found) - len(whole)
    if damaged and hosts.is_first():
        print(
            f'{path}: {damaged} of {len(found)} lines are damaged and left out',
            file=sys.stderr,
            flush=True,
        )
    end = _scalars(last, needed)
    return whole if end is None else [*whole, end]
