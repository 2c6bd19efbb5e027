"""What the user sees of a job: progress bars, sizes, and errors in one line.

The doctor imports this module where packages may be missing, so that it imports none at the top.
"""

import math
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TextIO


class UserError(ValueError):
    """An error that the user can put right; the message is one line that says how.

    It ends the program with exit code 2.
    """


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


class Bar(Protocol):
    """A progress bar, called with the number of units done so far."""

    def __call__(self, done: int, total: int | None = ...) -> None:
        """Shows how many units are done, of `total` or of those that the bar was opened with."""


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
      The text with every character escaped that is not printable, and '…' where it is cut.
    """
    shown = repr(text[:most])[1:-1]
    return shown if len(text) <= most else f'{shown}…'


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
