"""A training step in parts, with or without mixed precision."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from ..errors import InputError
from ..inference.precision import has_fast_bf16

logger = logging.getLogger(__name__)


class AccumulatingTrainer(SimpleTrainer):
    """detectron2's SimpleTrainer and AMPTrainer in one, with gradient accumulation.

    The losses of a part are weighted by its share of the images. As each is a mean over images, the
    gradient is that of the whole batch, except for modules that use several images at once, such as
    batch norms.

    With float16 as its mixed precision, losses are scaled.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer,
        *,
        steps: int,
        amp_dtype: torch.dtype | None = None,
    ):
        """
        Args:
            model, data_loader, optimizer: as SimpleTrainer's.
            steps: parts of a batch.
            amp_dtype: of autocast; None: no mixed precision.
        """
        if steps < 1:
            raise InputError(f"SOLVER.ACCUMULATE_STEPS must be at least 1, not {steps}")
        super().__init__(model, data_loader, optimizer)
        self.steps = steps
        self.amp_dtype = amp_dtype
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(enabled=amp_dtype == torch.float16)

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
                with self._autocast():
                    losses = self.model(part)
                share = len(part) / len(batch)
                losses = {name: share * loss for name, loss in losses.items()}
                self.grad_scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        self._write_metrics(totals, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _autocast(self):
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.amp_dtype)

    def _synchronize(self, is_last: bool):
        """Processes exchange their gradients once, after the last part."""
        no_sync = getattr(self.model, "no_sync", None)
        return nullcontext() if is_last or no_sync is None else no_sync()

    def state_dict(self):
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict):
        # The implementation of a step depends on this machine, not on the one that wrote the state.
        here = {key: value for key, value in self.optimizer.defaults.items() if key == "fused"}
        optimizer = state_dict["optimizer"]
        groups = [{**group, **here} for group in optimizer["param_groups"]]
        super().load_state_dict({**state_dict, "optimizer": {**optimizer, "param_groups": groups}})
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    # A fused optimizer needs its state in the memory format of the weight.
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        # A disabled one has no state.
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def choose_amp_dtype(name: str, model: nn.Module) -> torch.dtype | None:
    """The dtype of SOLVER.AMP.DTYPE on the model's device.

    Args:
        name: auto, fp16 or bf16. auto is fp16 on a GPU, and bf16 on a CPU that multiplies matrices
            in it, unless the model has depthwise convolutions: their training is slower in bf16.
        model: a recogniser.
    Returns:
        float16, bfloat16, or None: no mixed precision.
    Raises:
        InputError: it is another name, or the device can't compute in it.
    """
    on_gpu = model.device.type == "cuda"
    if name == "auto":
        if on_gpu:
            return torch.float16
        if not has_fast_bf16(model.device):
            reason = "the processor has neither AMX nor AVX512-BF16"
        elif any(map(_is_depthwise, model.modules())):
            reason = "the network has depthwise convolutions, which bf16 makes slower"
        else:
            logger.info("Mixed precision: bf16")
            return torch.bfloat16
        logger.warning(f"SOLVER.AMP.ENABLED has no effect, as SOLVER.AMP.DTYPE is auto: {reason}")
        return None
    if name == "fp16":
        if not on_gpu:
            raise InputError("SOLVER.AMP.DTYPE fp16 needs a GPU; on a CPU, set bf16 or auto")
        return torch.float16
    if name == "bf16":
        if on_gpu and not has_fast_bf16(model.device):
            raise InputError("SOLVER.AMP.DTYPE: this GPU has no bf16; it can be fp16 or auto")
        return torch.bfloat16
    raise InputError(f"SOLVER.AMP.DTYPE must be auto, fp16 or bf16, not {name!r}")


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
