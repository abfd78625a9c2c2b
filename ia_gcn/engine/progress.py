"""Progress of a run: a bar on a terminal; elsewhere, single lines."""

from __future__ import annotations

import sys

from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from tqdm import tqdm

# Seconds between two lines: a tenth of the time that has passed, within these.
SHORTEST, LONGEST = 5, 60

# Iterations over which the median of a loss is taken.
WINDOW = 20


class ProgressBar(tqdm):
    """tqdm's bar; where standard error is no terminal, lines on standard output."""

    # No thread that redraws the bar in between.
    monitor_interval = 0

    def __init__(self, iterable=None, desc: str = "", **kwargs):
        """As tqdm's."""
        self.is_bar = sys.stderr.isatty()
        figures = "{n_fmt}/{total_fmt}, ETA {remaining}, {rate_fmt}{postfix}"
        kwargs.update(
            {"file": sys.stderr, "dynamic_ncols": True, "bar_format": "{desc} |{bar}| " + figures}
            if self.is_bar
            else {
                "file": _Lines(),
                "position": 0,
                "mininterval": SHORTEST,
                "bar_format": "{desc} " + figures,
            }
        )
        # A mean over the whole run, including evaluations and checkpoints.
        super().__init__(iterable, desc, miniters=1, smoothing=0, **kwargs)

    def display(self, *args, **kwargs):
        if not self.is_bar:
            passed = self.format_dict["elapsed"]
            self.mininterval = min(LONGEST, max(SHORTEST, passed / 10))
        return super().display(*args, **kwargs)

    def close(self):
        if not (self.disable or self.is_bar) and self.n == self.last_print_n:
            self.leave = False  # the last line has been printed
        super().close()


class _Lines:
    """The file of a bar that is printed as lines."""

    def write(self, text: str) -> None:
        # tqdm returns to the line's beginning, and covers what was there with spaces.
        text = " ".join(text.split())
        if text:
            print(text, flush=True)

    def flush(self) -> None:
        pass


class ProgressWriter(EventWriter):
    """Shows iteration, epoch, time left, losses, learning rate, and mAP as soon as there is one.

    For detectron2's PeriodicWriter with a period of 1: the first line comes after the first
    iteration.
    """

    def __init__(self, max_iter: int, iterations_per_epoch: int):
        self._max_iter = max_iter
        self._per_epoch = iterations_per_epoch
        self._bar = None

    def write(self) -> None:
        storage = get_event_storage()
        done = min(storage.iter + 1, self._max_iter)
        if self._bar is None:
            # Nothing is shown yet: there is no loss to show.
            self._bar = ProgressBar(
                desc="iteration", total=self._max_iter, initial=done, unit="it", delay=1e-9
            )
            self._show(storage, done)
            self._bar.refresh()
        elif done > self._bar.n:
            self._show(storage, done)
            self._bar.update(done - self._bar.n)
        if done == self._max_iter:
            self.close()

    def _show(self, storage: EventStorage, done: int) -> None:
        epochs = round(self._max_iter / self._per_epoch, 1)
        figures = [f"epoch {done / self._per_epoch:.1f}/{epochs:g}"] if epochs >= 1 else []
        losses = {name: x for name, x in storage.histories().items() if "loss" in name}
        figures += [f"{name} {x.median(WINDOW):.4g}" for name, x in losses.items()]
        latest = storage.latest()
        if "lr" in latest:
            figures.append(f"lr {latest['lr'][0]:.2g}")
        figures += [
            f"{name.replace('multi_label/', '')} {value:.2f}"
            for name, (value, _) in latest.items()
            if name.endswith("mAP")
        ]
        self._bar.set_postfix_str(", ".join(figures), refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
