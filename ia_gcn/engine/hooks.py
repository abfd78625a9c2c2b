"""What ia_gcn adds to a training run beside detectron2's hooks."""

from __future__ import annotations

import logging
import math
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from numpy.lib.stride_tricks import sliding_window_view

from ..checkpoint import MultiLabelCheckpointer
from ..data.samplers import mix_seeds
from ..errors import TrainingDiverged

logger = logging.getLogger(__name__)

# A loss has grown if it is this many times its lowest median over so many values in a row. Single
# values vary a lot, most of all in the first iterations.
GROWTH, GROWTH_WINDOW = 10, 20


class SeedEveryStep(HookBase):
    """Seeds the random generators before each step by (seed, process, iteration).

    So a resumed run draws the same random numbers as an uninterrupted one, and no generator's state
    has to be saved.
    """

    def before_step(self):
        torch.manual_seed(mix_seeds(self.trainer.seed, comm.get_rank(), self.trainer.iter))


class UpdateEma(HookBase):
    """Updates the EMA of the weights after every step."""

    def after_step(self):
        self.trainer.ema.update(self.trainer.checkpointer.model)


class StopOnBadLoss(HookBase):
    """Stops a run whose loss is not finite, before the weights change.

    The TrainingDiverged says which losses are not finite, since when they have been growing, and
    what to try; where none has been growing, the image files of this process's batch.
    """

    def before_train(self):
        # (iteration, value), of every loss by name; a batch in parts has several in an iteration.
        self._history: Dict[str, List[Tuple[int, float]]] = {}
        self._handle = self.trainer.model.register_forward_hook(self._check)

    def after_train(self):
        self._handle.remove()

    def _check(self, model, args, losses):
        if not model.training:
            return
        bad = []
        for name, loss in losses.items():
            value = loss.item()
            if not math.isfinite(value):
                bad.append(f"{name} is {value}{self._growth(name)}")
            self._history.setdefault(name, []).append((self.trainer.iter, value))
        if bad:
            files = [x["file_name"] for x in args[0]]
            logger.debug(f"Images of the batch whose loss is not finite: {files}")
            text = ", ".join(bad)
            if "growing" not in text:
                text += f"; images of the batch: {', '.join(files)}"
            raise self._diverged(text)

    def explain(self, error: FloatingPointError) -> TrainingDiverged:
        """The error to raise for one of the model itself, such as detectron2's RPN."""
        growing = [f"{name}{growth}" for name in self._history if (growth := self._growth(name))]
        return self._diverged("; ".join([str(error).rstrip("."), *growing]))

    def _diverged(self, text: str) -> TrainingDiverged:
        tries = " or ".join(remedies(self.trainer.cfg))
        return TrainingDiverged(
            f"training diverged in iteration {self.trainer.iter + 1}: {text}. Try {tries}."
        )

    def _growth(self, name: str) -> str:
        """Since when a loss has been growing, in brackets; "" where it has not."""
        iterations, values = zip(*self._history.get(name, [(0, 0.0)]))
        start = growth_start(values)
        if start is None:
            return ""
        return (
            f" (growing since iteration {iterations[start] + 1}, from {values[start]:.3g} to "
            f"{values[-1]:.3g})"
        )


def growth_start(values: Sequence[float]) -> int | None:
    """Where a loss began to grow, as an index; None where it did not.

    It has grown if its last value is more than GROWTH times its lowest median over GROWTH_WINDOW
    values in a row; it began after the last value that was at most twice that.
    """
    if len(values) < 2:
        return None
    windows = sliding_window_view(values, min(GROWTH_WINDOW, len(values) // 2))
    lowest = np.median(windows, axis=1).min()
    if values[-1] <= GROWTH * lowest:
        return None
    return int(np.flatnonzero(np.asarray(values) <= 2 * lowest)[-1])


def remedies(cfg: CfgNode) -> List[str]:
    """Config keys to try against a loss that is not finite, for the message."""
    solver = cfg.SOLVER
    found = [f"a lower SOLVER.BASE_LR (it is {solver.BASE_LR:g})"]
    if not solver.CLIP_GRADIENTS.ENABLED:
        found.append("SOLVER.CLIP_GRADIENTS.ENABLED True")
    if solver.AMP.ENABLED:
        found.append("SOLVER.AMP.ENABLED False")
    return found


class BestModelCheckpointer(MultiLabelCheckpointer):
    """Writes a model without calling it the last checkpoint, from which a run is resumed."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class BestCheckpointer(hooks.BestCheckpointer):
    """detectron2's, which also remembers the best metric in a checkpoint, for a resumed run."""

    def state_dict(self):
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state):
        self.best_metric = state["best_metric"]
        self.best_iter = state["best_iter"]
