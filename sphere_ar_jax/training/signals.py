"""Signals that end a training after its state was saved."""

import signal

from sphere_ar_jax.runtime import hosts
from sphere_ar_jax.runtime.console import Stopped


class Preempted(Stopped):
    """A signal (number) arrived; the state has been saved. The exit code is 128 + the number, as shells have it."""

    def __init__(self, number: int, step: int, steps: int):
        message = f'{signal.Signals(number).name}: saved at step {step} of {steps}; the same command goes on'
        super().__init__(message, 128 + number, hosts.is_first())


class Signals:
    """While open, SIGTERM and SIGINT are noted in `arrived` instead of ending the process; a second one ends it."""

    def __enter__(self):
        self.arrived = self._last = 0
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, _):
        self.arrived = number
        signal.signal(number, self._previous[number])

    def agreed(self, now=False):
        """The number of a signal that reached any process, 0 for none: the same in all, which call it at each step.

        It is one call late, so that the device is never idle, but for `now`."""
        before, self._last = self._last, hosts.largest(self.arrived)
        return int(self._last if now else before)

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
