"""Evaluation in bfloat16, where the machine is faster at it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Dict

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from ..errors import InputError

logger = logging.getLogger(__name__)

# Flags of /proc/cpuinfo.
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


def set_precision(model: nn.Module, precision: str, key: str = "TEST.PRECISION") -> nn.Module:
    """Let a recogniser's backbone compute in fp32, bf16, or auto: bf16 where that is fast.

    The weights and the heads stay float32, so that logits are not rounded to bfloat16's 8 bits.

    Args:
        model: in evaluation mode; changed in place.
        precision: fp32, bf16 or auto.
        key: its name in messages.
    Returns:
        the model.
    Raises:
        InputError: `precision` is none of the three.
    """
    if precision not in ("fp32", "bf16", "auto"):
        raise InputError(f"{key} must be fp32, bf16 or auto, not {precision!r}")
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(model.device) else "fp32"
        logger.info(f"{key} is auto: {precision} on this machine")
    if precision == "bf16":
        model.backbone = Bf16Backbone(model.backbone)
    return model


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a GPU (compute capability 8.0), or this CPU, multiplies matrices in bfloat16.

    A CPU does with AMX or AVX512-BF16; others convert, and take longer than for float32. The
    instruction sets are known on Linux only.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(BF16_FLAGS & cpu_flags())


def cpu_flags() -> set:
    """The instruction sets of this CPU, as Linux names them; empty on another system."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


class Bf16Backbone(Backbone):
    """A backbone under autocast to bfloat16, whose feature maps are float32."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16):
            maps = self.backbone(images)
        return {name: values.float() for name, values in maps.items()}

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return self.backbone.output_shape()

    @property
    def size_divisibility(self) -> int:
        return self.backbone.size_divisibility
