"""torchvision's ResNet weights under the names of detectron2's ResNet."""

from __future__ import annotations

import re
from typing import Dict

import torch

# The norm of a convolution is its child in detectron2 and its neighbour in torchvision.
RENAMES = [
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
]


def is_torchvision_resnet(state_dict: Dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has the names of torchvision's ResNet."""
    return "conv1.weight" in state_dict and "layer1.0.conv1.weight" in state_dict


def convert_torchvision_resnet(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Rename a torchvision ResNet's tensors (18 to 152 layers) to those of the backbone of a model.

    The classifier `fc` is left out. For the same features, MODEL.RESNETS.STRIDE_IN_1X1 must be
    False, INPUT.FORMAT RGB, and mean and deviation torchvision's, as configs/Base-MultiLabel.yaml
    has them.
    """
    converted = {}
    for name, tensor in state_dict.items():
        if name.startswith("fc."):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        converted[f"backbone.{name}"] = tensor
    return converted
