"""What the user sees of a job: progress bars, sizes, and what they can put right in one line.

The doctor imports this module where packages may be missing, so that it needs none.
"""

import math
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TextIO


class UserError(ValueError):
    """Something that the user can put right; the message is one line that says how.

    The program ends with code 2.
    """


class Preempted(Exception):
    """A signal arrived, and the state of the training has been saved.

    Attributes:
      number: the number of the signal.
    """

    def __init__(self, number: int, step: int, steps: int) -> None:
        """Words the message.

        Args:
          number: the number of the signal.
          step: the step at which the state was saved.
          steps: all steps of the training.
        """
        name = signal.Signals(number).name
        super().__init__(f'{name}: saved at step {step} of {steps}; the same command goes on')
        self.number = number


class Bar(Protocol):
    """A progress bar, called with the number of units done so far and the total, if it is new."""

    def __call__(self, done: int, total: int | None = ...) -> None:
        """Shows how many of `total` units are done; the total is the bar's own if not given."""


def pick(parts: Mapping[str, Any], key: str, word: str) -> Any:
    """The part that a word names.

    Args:
      parts: the parts by word.
      key: the config's key that has the word, for the message.
      word: the word.

    Returns:
      The part.

    Raises:
      UserError: the word names none.
    """
    if word not in parts:
        raise UserError(f'{key} is {word!r}, but must be one of {", ".join(parts)}')
    return parts[word]


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, or the name of its class where it has no message.

    Args:
      error: the error.
      most: the number of characters that the line is cut to.
    """
    text = getattr(error, 'strerror', None) or str(error)
    lines = text.strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def size(count: float) -> str:
    """Words a number of bytes for people, as '1.9 GiB'."""
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

    Where nobody watches (no terminal), it prints a line at every quarter instead.

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
      A function (part, done, total), to be called with the part's name and progress.
    """
    parts: dict[str, Bar] = {}

    def progress(part: str, done: int, total: int | None) -> None:
        if part not in parts:
            parts[part] = bar(total, part, lines=lines)
        parts[part](done, total)

    return progress


def one_line(error: BaseException) -> str:
    """The message of an exception in one line: the last one where a traceback stands inside."""
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
