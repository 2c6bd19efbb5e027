"""What the user sees of a program: its flags and its end, progress bars, errors in one line.

The doctor imports this module where packages may be missing, so that it imports none at the top.
"""

import _thread
import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TextIO

if TYPE_CHECKING:
    from absl.flags import FlagValues


class UserError(ValueError):
    """An error that the user can put right; the message is one line that says how.

    It ends the program with exit code 2.
    """


class TemporaryError(UserError):
    """A fault of a disk, a network or a bucket that may pass, after which the same command goes on.

    It ends the program with exit code 75, which is EX_TEMPFAIL of sysexits.h.
    """


def refusal(message: str, *, may_pass: bool) -> UserError:
    """Makes the error of a fault that ends the program: a TemporaryError where it may pass."""
    return TemporaryError(message) if may_pass else UserError(message)


def require_value(name: str, value: object) -> None:
    """Raises UserError where the value of a flag or of a key of the config is ''."""
    if value == '':
        raise UserError(f'{name} is empty: give a value, or leave it out')


class Preempted(Exception):
    """A signal arrived, and the state of the training has been saved.

    Attributes:
      number: the number of the signal.
    """

    def __init__(self, number: int, step: int, steps: int) -> None:
        """Makes the exception and its message.

        Args:
          number: the number of the signal.
          step: the step at which the state was saved.
          steps: the number of steps of the whole training.
        """
        name = signal.Signals(number).name
        super().__init__(f'{name}: saved at step {step} of {steps}; the same command goes on')
        self.number = number


class Interrupts:
    """Answers Ctrl-C at once, also while Python waits for XLA to compile.

    Python hears a signal only between two of its own instructions, of which there are none during a
    compilation. A thread hears it at once: it says so at the first Ctrl-C, and ends the process at
    the second one, unless a training has a state that is not saved yet.
    """

    SILENCE = 0.5  # seconds in which Python mostly hears a signal itself

    def __init__(self) -> None:
        """Makes an object that watches nothing yet."""
        self._heard = threading.Event()
        self._keeps = False
        self._own = 0  # signals that come from `_lost`, not from the user
        self._end: Callable[[int, str], object] = lambda code, line: None

    def watch(self, end: Callable[[int, str], object]) -> None:
        """Begins to watch, in the main thread of a program, unless it ignores Ctrl-C.

        Args:
          end: is called with the exit code and a line before a second Ctrl-C ends the process.
        """
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        if threading.current_thread() is not threading.main_thread():
            return  # Python hears signals in the main thread alone.
        self._end = end
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._raise)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()
        show = sys.unraisablehook

        def hook(it: 'sys.UnraisableHookArgs') -> None:
            if isinstance(it.exc_value, KeyboardInterrupt):
                self._lost()
            else:
                show(it)

        sys.unraisablehook = hook

    def keep(self, keeps: bool) -> None:
        """Says whether the process has a state that a second Ctrl-C must not take."""
        self._keeps = keeps

    def _raise(self, number: int, frame: Any) -> None:
        """The handler of SIGINT."""
        self._heard.set()
        signal.default_int_handler(number, frame)

    def _lost(self) -> None:
        """Interrupts again, since a callback of the garbage collector, say, swallowed the error."""
        self._own += 1
        again = threading.Timer(0.01, _thread.interrupt_main)
        again.daemon = True
        again.start()

    def _listen(self, reading: int) -> None:
        """Waits for signals to the end of the process."""
        count = 0
        while True:
            for number in os.read(reading, 64):
                if number != signal.SIGINT:
                    continue
                if self._own:
                    self._own -= 1
                    continue
                count += 1
                self._answer(count)

    def _answer(self, count: int) -> None:
        """Answers the Ctrl-C of this number."""
        code = 128 + signal.SIGINT
        if self._keeps:
            return  # The training saves its state, ends and says so itself.
        if count > 1:
            self._end(code, 'interrupted')
            print('interrupted', file=sys.stderr, flush=True)
            os._exit(code)
        if count == 1 and not self._heard.wait(self.SILENCE) and not self._keeps:
            line = 'interrupted: ends when the compilation is over; press Ctrl-C again to end now'
            print(line, file=sys.stderr, flush=True)


interrupts = Interrupts()


class Bar(Protocol):
    """A progress bar, called with the number of units done so far."""

    def __call__(self, done: int, total: int | None = ...) -> None:
        """Shows how many units are done, of `total` or of those that the bar was opened with."""


def parse(argv: Sequence[str], values: 'FlagValues', about: str | None, *words: str) -> list[str]:
    """Parses the command line of a program.

    `--help` prints what the program does and its flags, and ends it with the exit code 0.

    Args:
      argv: the program's name, its flags and its words.
      values: the flags that it has; they take the values given.
      about: the program's docstring.
      *words: the names of the words that are no flags, as messages call them.

    Returns:
      The words, as many as `words`.

    Raises:
      UserError: a flag or its value is unknown, or there are more words or fewer.
    """
    if '--help' in argv:
        print(f'{about}\n{values.get_help()}', flush=True)
        sys.exit(0)
    for name in values:
        values[name].unparse()  # An earlier call may have set it.
    try:
        found = values(list(argv))[1:]
    except Exception as error:  # A config file may raise anything.
        raise UserError(one_line(error)) from None
    if len(found) > len(words):
        raise UserError(f'{found[len(words)]} is no flag: see --help')
    if len(found) < len(words):
        raise UserError(f'give {" and ".join(words[len(found) :])}: see --help')
    return found


def print_anything() -> None:
    """Makes stdout and stderr show '?' for letters that a terminal lacks, and not fail on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='replace')


def end_unheard() -> NoReturn:
    """Ends the program after its reader has gone, as `head` does, with the exit code of SIGPIPE."""
    # What is still in the buffer has nowhere to go, and Python would complain at its exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def run(program: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a program and ends the process.

    Errors that the user can put right are one line on stderr, with the exit code of `exit_code`.
    Ctrl-C ends the process with 130, and a reader that has gone with 141.

    Args:
      program: is called with the command line, and returns the exit code or None for 0.
    """
    print_anything()
    try:
        code = program(sys.argv)
        sys.stdout.flush()
    except BrokenPipeError:
        end_unheard()
    except (UserError, OSError) as error:
        print(f'error: {said(error)}', file=sys.stderr)
        code = exit_code(error)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code or 0)


def pick(parts: Mapping[str, Any], key: str, word: str) -> Any:
    """Returns the part that a word of the config names.

    Args:
      parts: the parts by word.
      key: the config's key that has the word, for the message.
      word: the word.

    Returns:
      The part.

    Raises:
      UserError: no part has this name; the message lists those there are.
    """
    if word not in parts:
        raise UserError(f'{key} is {word!r}, but must be one of {", ".join(parts)}')
    return parts[word]


def printable(text: str, most: int = 200) -> str:
    """A text of a file, fit to be printed: short, in one line, and without signs for the terminal.

    Args:
      text: the text, of any length.
      most: number of its characters that are shown.

    Returns:
      The text, escaped where a character is not printable, with '…' where it is cut.
    """
    part = text[:most]
    shown = part if part.isprintable() else repr(part)[1:-1]
    return shown if len(text) <= most else f'{shown}…'


def some(names: Sequence[str], most: int = 10) -> str:
    """The first few names of a file, fit to be printed, and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(printable(name, 100) for name in names[:most]) + more


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, or the name of its class where it has no message.

    Args:
      error: the error.
      most: the line is cut to this number of characters.
    """
    text = getattr(error, 'strerror', None) or str(error)
    lines = text.strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def size(count: float) -> str:
    """A number of bytes for people to read, as '1.9 GiB'."""
    units = ('B', 'KiB', 'MiB', 'GiB', 'TiB')
    power = min(int(math.log(max(count, 1), 1024)), 4)
    if power < 4 and round(count / 1024**power, 1) >= 1024:
        power += 1
    decimals = 1 if power else 0
    return f'{count / 1024**power:.{decimals}f} {units[power]}'


def markdown(columns: Sequence[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table as a list of lines."""
    cells = [f'| {" | ".join(map(str, row))} |' for row in (columns, *rows)]
    return [cells[0], '|' + '---|' * len(columns), *cells[1:]]


def bar(total: int | None, name: str, unit: str = 'image', lines: TextIO | None = None) -> Bar:
    """Opens a progress bar with the time left.

    Where stderr is not a terminal, it prints a line at every quarter instead.

    Args:
      total: number of units, None if unknown.
      name: what goes on.
      unit: what is counted.
      lines: the file that the lines go to, stdout if None.

    Returns:
      The bar, to be called with the number of units done so far.
    """
    from tqdm import tqdm  # The doctor needs this module where packages may be missing.

    shown_bar = tqdm(total=total, desc=name, unit=unit, disable=not sys.stderr.isatty())
    shown = -1

    def progress(done: int, total: int | None = total) -> None:
        nonlocal shown
        if not shown_bar.disable:
            shown_bar.total = total
            shown_bar.update(done - shown_bar.n)
        elif total and done * 4 // total > shown:
            shown = done * 4 // total
            print(f'{name}: {done} of {total}', file=lines, flush=True)

    return progress


def bars(lines: TextIO | None = None) -> Callable[[str, int, int | None], None]:
    """Opens a `bar` for each part of a job, once the part begins.

    Args:
      lines: as in `bar`.

    Returns:
      A function (part, done, total), to be called with the name of a part, the number of its units
      done so far, and their total.
    """
    parts: dict[str, Bar] = {}

    def progress(part: str, done: int, total: int | None) -> None:
        if part not in parts:
            parts[part] = bar(total, part, lines=lines)
        parts[part](done, total)

    return progress


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes under a name the wall time, in seconds, that the block of a `with` takes."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def one_line(error: BaseException) -> str:
    """The message of an exception in one line; of a traceback in it only the last line remains."""
    message = str(error)
    if error.args and isinstance(error, KeyError | AttributeError):
        message = str(error.args[0])  # str() of a KeyError would put quotes around it.
    hint = re.search(r'Did you mean .*', message)  # ml_collections prints all keys before it.
    if hint:
        return hint.group()
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if any(line.startswith('Traceback') for line in lines):
        return lines[-1]
    return ' '.join(lines)


# What a full disk, a quota or a limit on the size of files says.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a disk or a network says that may be there again in a moment.
_PASSING = (
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
)


def passes(error: OSError) -> bool:
    """Whether an error is of a disk or a network that may come back."""
    return error.errno in _PASSING or isinstance(error, (TimeoutError, ConnectionError))


def exit_code(error: Exception) -> int:
    """The exit code of an error that ends a program with one line: 75 if it may pass, else 2."""
    temporary = isinstance(error, TemporaryError)
    return 75 if temporary or (isinstance(error, OSError) and passes(error)) else 2


def said(error: Exception) -> str:
    """What is said of an error that the user can put right, in one line."""
    if isinstance(error, OSError) and error.filename:
        if isinstance(error, FileNotFoundError):
            return f'there is no file {error.filename}'
        if error.errno in _NO_ROOM:
            return (
                f'{error.filename} cannot be written ({error.strerror}): '
                'make room, and the same command goes on'
            )
        if error.strerror:
            return f'{error.filename}: {error.strerror}'
    return one_line(error)
