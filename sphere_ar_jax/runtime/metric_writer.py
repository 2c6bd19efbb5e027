"""Where numbers of a run go: a JSON-lines file, TensorBoard, Weights & Biases, and the console.

clu's own writers import TensorFlow; tensorboardX writes the same event files without it. The
JSON-lines file and the console are always there; the config's `logging` names the others. See
`docs/sharing.md`, "TensorBoard and wandb".
"""

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self, TextIO

import numpy as np
from etils import epath
from tensorboardX import summary as tensorboard
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from sphere_ar_jax.runtime import files, hosts
from sphere_ar_jax.runtime.console import UserError, one_line

_FLUSH = 10  # seconds between writes to the event file
# Likewise, and for metrics.jsonl, in a bucket: each time the whole file is sent there again.
_FLUSH_TO_BUCKET = 300


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
        self._pause = _FLUSH_TO_BUCKET if files.is_remote(directory) else _FLUSH
        with files.naming(self._path):
            self._writer = EventsWriter(self._path)
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=purge_step, session_log=start))
        self._flushed = 0.0

    def add(self, summary: Any, step: int) -> None:
        """Adds a summary of a step."""
        with files.naming(self._path):
            self._writer.write_event(Event(summary=summary, step=step, wall_time=time.time()))
            if time.monotonic() - self._flushed > self._pause:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is not written yet, and closes the file."""
        with files.naming(self._path):
            self._writer.close()


def _import_wandb() -> Any:
    """The package wandb. Raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logging has 'wandb', which needs another package: pip install wandb"
        ) from None
    return wandb


class WandbRun:
    """A run of Weights & Biases. All starts in a workdir are one run, whose id the workdir keeps.

    Where there is no API key, the run is kept below WORKDIR/wandb until `wandb sync` uploads it.
    """

    def __init__(self, workdir: str, config: Mapping[str, Any]) -> None:
        """Begins the run of a workdir, or goes on with it.

        Args:
          workdir: the directory of the run; WORKDIR/wandb.json keeps the id.
          config: what the run's page shows as its config.

        Raises:
          UserError: the package is missing, or its server refuses the run.
        """
        self._wandb = _import_wandb()
        run_id, self._began = _kept(workdir)
        self._last = -1  # the last step of wandb's own
        mode = os.environ.get('WANDB_MODE') or None
        is_local = '://' not in workdir
        try:
            if mode is None and not self._wandb.login(prompt=False, verify=False):
                mode = 'offline'
                where = f'{workdir}/wandb' if is_local else './wandb'
                print(
                    f'wandb: no API key, so that the run stays in {where}; `wandb sync` uploads it'
                )
            self._run = self._wandb.init(
                project=os.environ.get('WANDB_PROJECT', 'sphere_ar_jax'),
                name=os.path.basename(workdir.rstrip('/')),
                id=run_id,
                resume='allow',
                config=dict(config),
                dir=workdir if is_local else None,
                mode=mode,
                settings=self._wandb.Settings(silent=True, console='off'),
            )
        except (self._wandb.Error, ValueError) as error:
            raise UserError(
                f'wandb: {one_line(error)}; WANDB_MODE=offline keeps the run on this machine'
            ) from None

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Records values of a stage, which has steps of its own.

        Args:
          stage: the stage's name, which precedes the names of the values.
          step: the step.
          values: numbers, or pictures as uint8 (height, width, c), by name.
        """
        own_step = f'{stage}/step'
        self._run.define_metric(f'{stage}/*', step_metric=own_step)
        shown = {f'{stage}/{name}': self._shown(value) for name, value in values.items()}
        self._run.log({own_step: step, **shown}, step=self._next())

    def conclude(self, values: Mapping[str, Any]) -> None:
        """Sets what the run has come to: numbers, or pictures as uint8 (height, width, c)."""
        shown = {name: self._shown(value) for name, value in values.items()}
        self._run.summary.update({k: v for k, v in shown.items() if isinstance(v, int | float)})
        pictures = {k: v for k, v in shown.items() if not isinstance(v, int | float)}
        if pictures:
            self._run.log(pictures, step=self._next())

    def close(self, code: int) -> None:
        """Ends the run on its page with the exit code of the process."""
        self._run.finish(exit_code=code)

    def _next(self) -> int:
        """The next step of wandb's own: milliseconds since the first start in the workdir.

        These steps rise from one start to the next. wandb drops what does not rise, and joins the
        parts of a run that was kept on this machine only where their steps do not overlap.
        """
        self._last = max(self._last + 1, int(1000 * (time.time() - self._began)))
        return self._last

    def _shown(self, value: Any) -> Any:
        """A value as wandb takes it."""
        return self._wandb.Image(value) if isinstance(value, np.ndarray) else value


def _kept(workdir: str) -> tuple[str, float]:
    """The id of a workdir's run of Weights & Biases, and when it began, in seconds of the epoch.

    Both are from WORKDIR/wandb.json, or new.
    """
    path = epath.Path(workdir, 'wandb.json')
    if not path.exists():
        files.write_json(path, {'id': secrets.token_hex(4), 'began': time.time()})
    found = files.read_json(path)
    values = found if isinstance(found, dict) else {}
    name = values.get('id')
    began = values.get('began')
    is_id = isinstance(name, str) and name.isalnum() and name.isascii()
    if not is_id or not isinstance(began, int | float):
        raise UserError(f'{path} has no id of a run: remove it, and a new run of wandb begins')
    return str(name), float(began)


class Logs(NamedTuple):
    """Where numbers of a run go besides metrics.jsonl and the console.

    Attributes:
      tensorboard: whether they go to TensorBoard's event files.
      wandb: the run of Weights & Biases that they go to, or None.
    """

    tensorboard: bool = True
    wandb: WandbRun | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, words: Collection[str], workdir: str, config: Mapping[str, Any]
    ) -> Iterator[Self]:
        """A context in which a run can be logged. Only its first process opens anything.

        Args:
          words: the config's `logging`.
          workdir: the directory of the run.
          config: the config by name.

        Raises:
          UserError: see `WandbRun`.
        """
        run = None
        if 'wandb' in words and hosts.is_first():
            run = WandbRun(workdir, config)
        code = 1
        try:
            yield cls('tensorboard' in words, run)
            code = 0
        finally:
            if run is not None:
                run.close(code)

    def conclude(
        self,
        workdir: str,
        scores: Mapping[str, float],
        config: str,
        pictures: Mapping[str, np.ndarray],
    ) -> None:
        """Records what a run has come to. TensorBoard's part lies in the workdir itself.

        Args:
          workdir: the directory of the run.
          scores: the final numbers by name.
          config: the config as text, for TensorBoard; Weights & Biases has it already.
          pictures: uint8 (height, width, c) by name.
        """
        if not hosts.is_first():
            return
        if self.tensorboard:
            with contextlib.closing(_Events(workdir, 0)) as events:
                events.add(tensorboard.text('config', f'```\n{config}\n```'), 0)
                for name, value in scores.items():
                    events.add(tensorboard.scalar(name, value), 0)
                for name, pixels in pictures.items():
                    events.add(tensorboard.image(name, pixels, dataformats='HWC'), 0)
        if self.wandb is not None:
            self.wandb.conclude({**scores, **pictures})


# Where numbers go unless the config says otherwise.
DEFAULT = Logs()


def require(words: Collection[str]) -> None:
    """Raises UserError where a word of the config's `logging` needs a package that is missing."""
    if 'wandb' in words and hosts.is_first():
        _import_wandb()


class MetricWriter:
    """Writes the scalars of one training stage and shows its progress.

    In a terminal it shows a progress bar with the time left, elsewhere a plain line at every
    `write`. Where a run has several processes, only the first one writes and shows anything.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        name: str,
        step: int,
        total: int,
        logs: Logs = DEFAULT,
    ) -> None:
        """Opens the files of a directory, which is made if needed.

        Args:
          directory: where `metrics.jsonl` and the event files are.
          name: the stage's name, for the console.
          step: the step that the stage goes on from. Later lines of `metrics.jsonl`, left by a run
            that was killed, are dropped.
          total: the number of steps of the stage.
          logs: where else the numbers go.
        """
        self._name = name
        self._wandb = logs.wandb
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
        self._flushed = time.monotonic()
        self._file: TextIO | None = None
        # Nothing can be added to a file in a bucket, so that such a file is written anew.
        if '://' not in str(directory):
            self._file = open(path, 'a', buffering=1)  # noqa: SIM115, closed by close()
        self._events = _Events(os.fspath(directory), step + 1) if logs.tensorboard else None
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
          shown: names that the console shows, where there is such a scalar.
        """
        if self._silent:
            return
        line = json.dumps({'step': step, **scalars}) + '\n'
        if self._file is not None:
            with files.naming(self._path):
                self._file.write(line)
        else:
            self._text += line
            if time.monotonic() - self._flushed > _FLUSH_TO_BUCKET:
                self.flush()
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add(tensorboard.scalar(name, value), step)
        if self._wandb is not None:
            self._wandb.log(self._name, step, scalars)
        text = ', '.join(f'{name} {scalars[name]:.4g}' for name in shown if name in scalars)
        if self._bar.disable:
            speed = scalars.get('seconds_per_step')
            left = '' if speed is None else f', {(self._total - step) * speed:.0f} s left'
            print(f'{self._name} {step}/{self._total}{left}: {text}', flush=True)
        else:
            self._bar.set_postfix_str(text)

    def flush(self) -> None:
        """Writes what is not written yet of `metrics.jsonl`, as before a checkpoint.

        A run that goes on from the checkpoint then finds the lines of all steps before it.
        """
        if self._silent or self._file is not None:  # On a disk each line is written at once.
            return
        with files.naming(self._path):
            self._path.write_text(self._text)
        self._flushed = time.monotonic()

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Adds a picture, uint8 (height, width, c), to where numbers go besides the lines."""
        if self._silent:
            return
        if self._events is not None:
            self._events.add(tensorboard.image(name, pixels, dataformats='HWC'), step)
        if self._wandb is not None:
            self._wandb.log(self._name, step, {name: pixels})

    def close(self) -> None:
        """Closes the files and the progress bar."""
        if self._silent:
            return
        with contextlib.ExitStack() as stack:  # One that fails does not keep the others open.
            stack.callback(self._bar.close)
            stack.callback(self.flush)
            if self._events is not None:
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


class JsonLines:
    """A file to which one dictionary after the other is added, and which a kill leaves readable.

    Attributes:
      lines: the dictionaries that were there when it was opened, see `read_scalars`.
    """

    def __init__(self, path: str | os.PathLike[str], needed: Collection[str]) -> None:
        """Reads the file; `needed` are names that every line must have.

        The file is written again without lines that are damaged or cut off.
        """
        self._path = path
        self.lines = read_scalars(path, needed)
        content = ''.join(json.dumps(line) + '\n' for line in self.lines)
        files.write_bytes(path, content.encode())

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line to the file."""
        with files.naming(self._path), open(self._path, 'a') as f:
            f.write(json.dumps(line) + '\n')
