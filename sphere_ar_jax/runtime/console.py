"""What the user sees of a job: progress bars, sizes, and what they can put right in one line."""

import math
import re
import signal
import sys
from typing import Any


class UserError(ValueError):
    """Something that the user can put right; the message is one line that says how. The program
    ends with code 2.
    """


class Preempted(Exception):
    """A signal (number) arrived; the state of the training has been saved."""

    def __init__(self, number: int, step: int, steps: int):
        super().__init__(
            f'{signal.Signals(number).name}: saved at step {step} of {steps}; the same command goes on'
        )
        self.number = number


def pick(parts: dict[str, Any], key: str, word: str) -> Any:
    """The part that a word names. Raises UserError, one line that names the key, for a word that
    names none.
    """
    if word not in parts:
        raise UserError(f'{key} is {word!r}, but must be one of {", ".join(parts)}')
    return parts[word]


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, cut to so many characters; its class's name where it
    has no message.
    """
    lines = (getattr(error, 'strerror', None) or str(error)).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def size(count):
    """Bytes for people, as '1.9 GiB'."""
    unit = min(int(math.log(max(count, 1), 1024)), 4)
    return f'{count / 1024**unit:.{1 if unit else 0}f} {("B", "KiB", "MiB", "GiB", "TiB")[unit]}'


def markdown(columns, rows):
    """A Markdown table as a list of lines."""
    cells = [f'| {" | ".join(map(str, row))} |' for row in (columns, *rows)]
    return [cells[0], '|' + '---|' * len(columns), *cells[1:]]


def bar(total, name, unit='image', lines=None):
    """A progress bar with time left; where nobody watches (no terminal), a line at every quarter.

    Args:
      total: of units, None if unknown. lines: the file that those go to, stdout if None.
    Returns:
      function (done, total=total) to be called with the number of units done so far.
    """
    from tqdm import tqdm  # the doctor needs this module where packages may be missing

    shown_bar = tqdm(total=total, desc=name, unit=unit, disable=not sys.stderr.isatty())
    shown = -1

    def progress(done, total=total):
        nonlocal shown
        if not shown_bar.disable:
            shown_bar.total = total
            shown_bar.update(done - shown_bar.n)
        elif total and done * 4 // total > shown:
            shown = done * 4 // total
            print(f'{name}: {done} of {total}', file=lines, flush=True)

    return progress


def bars(lines=None):
    """A `bar` for each part of a job: function (part, done, total). lines: see there."""
    parts = {}

    def progress(part, done, total):
        if part not in parts:
            parts[part] = bar(total, part, lines=lines)
        parts[part](done, total)

    return progress


def one_line(error):
    """An exception's message in one line; of a traceback inside a message, the last line."""
    message = str(
        error.args[0] if error.args and isinstance(error, KeyError | AttributeError) else error
    )
    hint = re.search(r'Did you mean .*', message)  # ml_collections prints all keys before it
    if hint:
        return hint.group()
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if any(line.startswith('Traceback') for line in lines) else ' '.join(lines)
