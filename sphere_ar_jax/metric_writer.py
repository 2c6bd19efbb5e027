"""Where numbers of a run go: a JSON-lines file, TensorBoard events, and the console.

clu's own writers import TensorFlow; tensorboardX writes the same event files without it.
"""

import json
import os
import sys

import tensorboardX
from tqdm import tqdm


class MetricWriter:
    """Writes scalars of one training stage and shows its progress.

    In a terminal: a progress bar with time left. Elsewhere: a plain line at every `write`.
    Lines of `metrics.jsonl` after `step` (written by a run that was killed) are dropped when it opens.
    """

    def __init__(self, directory, name, step, total):
        os.makedirs(directory, exist_ok=True)
        self._path, self._name, self._total = os.path.join(directory, 'metrics.jsonl'), name, total
        kept = [line for line in read_scalars(self._path) if line['step'] <= step]
        temporary = self._path + '.tmp'
        with open(temporary, 'w') as f:
            f.writelines(json.dumps(line) + '\n' for line in kept)
        os.replace(temporary, self._path)
        self._file = open(self._path, 'a', buffering=1)  # noqa: SIM115, closed by close()
        self._events = tensorboardX.SummaryWriter(directory, purge_step=step + 1, flush_secs=10)
        bar = '{desc} {percentage:3.0f}% |{bar}| {n}/{total} steps, {remaining} left{postfix}'
        self._bar = tqdm(total=total, initial=step, desc=name, bar_format=bar, disable=not sys.stderr.isatty())

    def advance(self):
        """One more step is done."""
        self._bar.update()

    def write(self, step, scalars, shown):
        """Records {name: float} at a step; `shown` are the names that the console shows."""
        self._file.write(json.dumps({'step': step, **scalars}) + '\n')
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        text = ', '.join(f'{name} {scalars[name]:.4g}' for name in shown)
        if self._bar.disable:
            speed = scalars.get('seconds_per_step')
            left = '' if speed is None else f', {(self._total - step) * speed:.0f} s left'
            print(f'{self._name} {step}/{self._total}{left}: {text}', flush=True)
        else:
            self._bar.set_postfix_str(text)

    def picture(self, name, step, pixels):
        """Adds uint8 (height, width, c) to the TensorBoard events."""
        self._events.add_image(name, pixels, step, dataformats='HWC')

    def close(self):
        self._bar.close()
        self._events.close()
        self._file.close()


def read_scalars(path):
    """The lines of a `metrics.jsonl` as dictionaries, [] if there is no file; a line cut off by a kill is left out."""
    lines = []
    if os.path.exists(path):
        with open(path) as f:
            for line in f:
                try:
                    lines.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
    return lines
