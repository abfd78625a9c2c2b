"""What ia_gcn adds to a training run beside detectron2's hooks."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from typing import Dict, Iterable, List, Mapping, Sequence, Set, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from ..checkpoint import MultiLabelCheckpointer, periodic_checkpoints
from ..data.samplers import mix_seeds
from ..errors import InputError, TrainingDiverged
from ..modeling import LabelCorrections

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


class FollowLoss(HookBase):
    """Tells the loss which epoch it is in, and keeps the labels that it corrects for good.

    After each iteration, all processes have the corrections of all of them; they are in
    checkpoints.
    """

    def __init__(self, loss: nn.Module, per_epoch: int, image_ids: Iterable = ()):
        """
        Args:
            loss: the model's, see `MultiLabelLoss`; filled.
            per_epoch: iterations of an epoch.
            image_ids: of the training set, in its order, for a training that can be resumed.
        """
        self._loss = loss
        self._per_epoch = per_epoch
        if self._corrections is not None:
            self._images = hashlib.sha256(repr(list(image_ids)).encode()).hexdigest()

    @property
    def _corrections(self) -> LabelCorrections | None:
        return getattr(self._loss, "corrections", None)

    def before_step(self):
        self._loss.epoch = self.trainer.iter // self._per_epoch

    def after_step(self):
        if self._corrections is not None:
            for pairs in comm.all_gather(self._corrections.take_new()):
                self._corrections.add(pairs)

    def state_dict(self):
        if self._corrections is None:
            return {}
        bits = torch.from_numpy(self._corrections.bits)
        return {"label_corrections": bits, "images": self._images}

    def load_state_dict(self, state):
        if self._corrections is None:
            return
        if state.get("images") != self._images:
            raise InputError(
                "--resume: the checkpoint has corrected labels of another training set (other "
                "images, or another order): start anew, without --resume"
            )
        self._corrections.bits[:] = state["label_corrections"].numpy()


class CountUnreadable(HookBase):
    """Puts into the metrics how many images and shards could not be read, and lists them in
    checkpoints.

    They are those of all processes; the metric is there from the first one on.
    """

    def __init__(self, unreadable: Mapping[str, str]):
        """
        Args:
            unreadable: of this process, by file name; grows in training.
        """
        self._unreadable = unreadable
        self._files: Set[str] = set()

    def after_step(self):
        new = sorted(set(self._unreadable) - self._files)
        for files in comm.all_gather(new):
            self._files.update(files)
        if self._files:
            number = len(self._files)
            self.trainer.storage.put_scalar("unreadable_files", number, smoothing_hint=False)

    def state_dict(self):
        return {"files": sorted(self._files)} if self._files else {}

    def load_state_dict(self, state):
        self._files.update(state["files"])


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


class EvalHook(hooks.EvalHook):
    """detectron2's, which knows of a resumed run whether the evaluation before it is missing."""

    def __init__(self, eval_period, eval_function):
        super().__init__(eval_period, eval_function)
        self._last_iter = -1

    def _do_eval(self):
        super()._do_eval()
        self._last_iter = self.trainer.iter

    def is_missing(self) -> bool:
        """Whether the last iteration before a resumed run should have been evaluated, and was not.

        All processes say the same.
        """
        done, end = self.trainer.start_iter, self.trainer.max_iter
        due = self._period > 0 and 0 < done < end and done % self._period == 0
        return comm.all_gather(due and self._last_iter < done - 1)[0]

    def after_train(self):
        # detectron2's evaluates as well if the last iteration failed.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()

    def state_dict(self):
        return {"last_iter": self._last_iter}

    def load_state_dict(self, state):
        self._last_iter = state["last_iter"]


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """detectron2's, for which a run and those that resumed it are one training.

    Of the periodic checkpoints of all of them `max_to_keep` stay. model_final.pth is written after
    the last iteration, so that the final evaluation can be repeated, and again after that.
    """

    def before_train(self):
        super().before_train()
        start = self.trainer.start_iter
        if not start:
            return
        found = periodic_checkpoints(self.checkpointer.save_dir)
        # Those of later iterations are the first to go: the run that wrote them is given up.
        later = [path for iteration, path in found.items() if iteration >= start]
        paths = later + [path for iteration, path in found.items() if iteration < start]
        for path in paths[: -self.max_to_keep]:
            self.path_manager.rm(path)
        self.recent_checkpoints = paths[-self.max_to_keep :]

    def step(self, iteration, **kwargs):
        path = os.path.join(self.checkpointer.save_dir, f"{self.file_prefix}_{iteration:07d}.pth")
        if path in self.recent_checkpoints:
            self.recent_checkpoints.remove(path)
        super().step(iteration, **kwargs)

    def after_train(self):
        if self.trainer.iter >= self.max_iter:
            self.checkpointer.save(f"{self.file_prefix}_final", iteration=self.max_iter - 1)


class BestModelCheckpointer(MultiLabelCheckpointer):
    """Writes a model without calling it the last checkpoint, from which a run is resumed."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class BestCheckpointer(hooks.BestCheckpointer):
    """detectron2's, which also remembers the best metric in a checkpoint, for a resumed run."""

    def after_train(self):
        # As EvalHook.
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()

    def state_dict(self):
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state):
        self.best_metric = state["best_metric"]
        self.best_iter = state["best_iter"]
