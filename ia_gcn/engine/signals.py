"""Stops a training by Ctrl-C or SIGTERM so that it can go on where it was."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import contextmanager
from typing import Iterator

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..errors import Stopped
from ..processes import on_stop_signals

logger = logging.getLogger(__name__)


class StopOnSignal(HookBase):
    """After Ctrl-C or SIGTERM, finishes the iteration, writes a checkpoint and raises Stopped.

    An evaluation ends at once: it can be made anew from the checkpoint. A second signal ends the
    process at once. Several processes agree after each iteration whether one of them got a signal.

    To be registered last: the iteration's other work is done when it raises.
    """

    def __init__(self, checkpointer: hooks.PeriodicCheckpointer | None = None):
        """
        Args:
            checkpointer: of the main process; None in the others.
        """
        self._checkpointer = checkpointer
        self._signum = 0
        self._in_evaluation = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals stop the training."""
        with on_stop_signals(self._receive):
            yield

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it, a signal stops the training at once.

        Raises:
            Stopped: also if there was a signal before.
        """
        try:
            self._in_evaluation = True
            if self._signum:
                raise Stopped(self._signum)
            yield
            # Where Python has left the exception out, for example in a destructor; after other
            # iterations than the last one, `after_step` stops.
            if self._signum and self.trainer.iter + 1 >= self.trainer.max_iter:
                raise Stopped(self._signum)
        except Stopped as stop:
            self._in_evaluation = False
            self._stop(stop.signum)
        finally:
            self._in_evaluation = False

    def after_step(self):
        # The last iteration is followed by an evaluation.
        if self.trainer.iter + 1 < self.trainer.max_iter:
            signum = self._signum_of_all()
            if signum:
                self._stop(signum)

    def _receive(self, signum: int) -> None:
        self._signum = signum
        if self._in_evaluation:
            raise Stopped(signum)
        if comm.is_main_process():
            # print and logging may be what the signal has interrupted.
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: finishing the iteration; a second one ends at once\n".encode())

    def _signum_of_all(self) -> int:
        """The signal that any of the processes got, the same number in all of them; or 0."""
        if comm.get_world_size() == 1:
            return self._signum
        signum = torch.tensor(self._signum)
        dist.all_reduce(signum, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        return int(signum)

    def _stop(self, signum: int) -> None:
        done, total = self.trainer.iter + 1, self.trainer.max_iter
        name = signal.Signals(signum).name
        if done < total:
            self._save()
            text = (
                f"stopped by {name} after iteration {done} of {total}, whose checkpoint is written"
            )
        else:
            text = f"stopped by {name} in the evaluation after the last iteration"
        logger.debug(text)
        raise Stopped(signum, text)

    def _save(self) -> None:
        """Write a periodic checkpoint of this iteration, if there is none yet."""
        if self._checkpointer is None:
            return
        name = f"{self._checkpointer.file_prefix}_{self.trainer.iter:07d}.pth"
        if name not in map(os.path.basename, self._checkpointer.recent_checkpoints):
            self._checkpointer.period = 1
            self._checkpointer.step(self.trainer.iter)
