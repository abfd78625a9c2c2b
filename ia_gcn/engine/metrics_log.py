"""metrics.json of a training, which is the same whether the run was cut and resumed or not."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Dict

from detectron2.engine import HookBase
from detectron2.utils.events import JSONWriter

# Iterations over which JSONWriter takes the median of a scalar.
WINDOW = 20

# Scalars that are times, and another run's own.
TIMES = frozenset({"data_time", "eta_seconds", "rank_data_time", "time"})


class MetricsWriter(JSONWriter):
    """detectron2's JSONWriter, which can go back to where it was when a checkpoint was written."""

    def __init__(self, path: str):
        super().__init__(path, WINDOW)
        self._path = Path(path)

    def write(self) -> None:
        """As JSONWriter's.

        Raises:
            OSError: the disk is full; it names the file.
        """
        try:
            super().write()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def place(self) -> Dict[str, int]:
        """The number of whole lines, and the last iteration in them."""
        return {"lines": self._path.read_bytes().count(b"\n"), "last_write": self._last_write}

    def go_back(self, place: Dict[str, int]) -> None:
        """Cut off what was written after a `place`; it comes again."""
        self._last_write = place["last_write"]
        with open(self._path, "rb") as file:
            size = sum(map(len, islice(file, place["lines"])))
        os.truncate(self._path, size)


class KeepMetrics(HookBase):
    """Keeps in a checkpoint what a resumed run needs to go on with metrics.json.

    That is the place in the file, and the scalars of the EventStorage: the latest ones, and as many
    before them as the writer takes the median of. TIMES are left out.
    """

    def __init__(self, writer: MetricsWriter):
        self._writer = writer
        self._state = None

    def before_train(self):
        # Without a checkpoint, only half a line of a run that was killed goes.
        state = self._state or {"place": self._writer.place(), "scalars": {}}
        storage = self.trainer.storage
        for name, (smooth, values) in state["scalars"].items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value, smoothing_hint=smooth)
        storage.iter = self.trainer.start_iter
        self._writer.go_back(state["place"])

    def start_anew(self) -> None:
        """Have the file begin with this run: one before it got to no checkpoint."""
        self._state = {"place": {"lines": 0, "last_write": -1}, "scalars": {}}

    def state_dict(self):
        if not hasattr(self.trainer, "storage"):
            return {}  # the training has not begun
        storage = self.trainer.storage
        scalars = {}
        for name, smooth in storage.smoothing_hints().items():
            if name not in TIMES:
                kept = WINDOW if smooth else 1
                values = storage.history(name).values()[-kept:]
                scalars[name] = [smooth, [list(pair) for pair in values]]
        return {"place": self._writer.place(), "scalars": scalars}

    def load_state_dict(self, state):
        self._state = state
