"""What ia_gcn adds to a training run beside detectron2's hooks."""

from __future__ import annotations

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..checkpoint import MultiLabelCheckpointer
from ..data.samplers import mix_seeds


class SeedEveryStep(HookBase):
    """Makes what a step draws at random a function of (seed, process, iteration).

    A run that is resumed draws what an uncut one does, whatever was drawn in between, and no
    generator's state has to be saved.
    """

    def before_step(self):
        torch.manual_seed(mix_seeds(self.trainer.seed, comm.get_rank(), self.trainer.iter))


class UpdateEma(HookBase):
    """Takes the weights of every step into their running mean."""

    def after_step(self):
        self.trainer.ema.update(self.trainer.checkpointer.model)


class StopOnBadLoss(HookBase):
    """Stops a run whose loss is not finite, before the weights change.

    The message names the iteration, the loss terms and the image files of this process's batch.
    """

    def before_train(self):
        self._handle = self.trainer.model.register_forward_hook(self._check)

    def after_train(self):
        self._handle.remove()

    def _check(self, model, args, losses):
        if not model.training:
            return
        if torch.isfinite(sum(losses.values())):
            return
        terms = {name: loss.item() for name, loss in losses.items()}
        files = [x["file_name"] for x in args[0]]
        raise FloatingPointError(
            f"the loss is not finite in iteration {self.trainer.iter}: {terms}; images: {files}"
        )


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
