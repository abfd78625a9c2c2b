"""A training step in parts, with or without mixed precision."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from ..errors import InputError


class AccumulatingTrainer(SimpleTrainer):
    """detectron2's SimpleTrainer and AMPTrainer in one, whose batches may go through in parts.

    A part's losses count by its share of the images. As each is a mean over images, the gradient is
    that of the whole batch, but for what looks at several images at once, such as batch norm.

    Mixed precision is float16 with scaled losses on a GPU, and bfloat16 on a CPU.
    """

    def __init__(self, model: nn.Module, data_loader, optimizer, *, steps: int, mixed_precision):
        """
        Args:
            model, data_loader, optimizer: as SimpleTrainer's.
            steps: parts of a batch.
            mixed_precision: whether to run the model under autocast.
        """
        if steps < 1:
            raise InputError(f"SOLVER.ACCUMULATE_STEPS must be at least 1, not {steps}")
        super().__init__(model, data_loader, optimizer)
        self.steps = steps
        self.mixed_precision = mixed_precision
        self.device_type = next(model.parameters()).device.type
        scaled = mixed_precision and self.device_type == "cuda"
        # torch.amp has it from 2.3 on.
        scaler = getattr(torch.amp, "GradScaler", None) or torch.cuda.amp.GradScaler
        self.grad_scaler = scaler(enabled=scaled)

    def run_step(self):
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        part_size = math.ceil(len(batch) / self.steps)
        totals = {}
        for first in range(0, len(batch), part_size):
            part = batch[first : first + part_size]
            is_last = first + part_size >= len(batch)
            with self._synchronize(is_last):
                with torch.autocast(self.device_type, enabled=self.mixed_precision):
                    losses = self.model(part)
                share = len(part) / len(batch)
                losses = {name: share * loss for name, loss in losses.items()}
                self.grad_scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        self._write_metrics(totals, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _synchronize(self, is_last: bool):
        """Processes exchange their gradients once, after the last part."""
        no_sync = getattr(self.model, "no_sync", None)
        return nullcontext() if is_last or no_sync is None else no_sync()

    def state_dict(self):
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict):
        # How a step is computed is a matter of this machine, not of the one that wrote the state.
        here = {key: value for key, value in self.optimizer.defaults.items() if key == "fused"}
        optimizer = state_dict["optimizer"]
        groups = [{**group, **here} for group in optimizer["param_groups"]]
        super().load_state_dict({**state_dict, "optimizer": {**optimizer, "param_groups": groups}})
        # A disabled one has no state.
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
