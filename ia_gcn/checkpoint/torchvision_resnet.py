"""torchvision's ResNet weights under the names of detectron2's ResNet."""

from __future__ import annotations

import re
from typing import Any, Dict

import torch

from ..errors import InputError

# The norm of a convolution is its child in detectron2 and its neighbour in torchvision.
RENAMES = [
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
]

# torchvision's modules by their number in a Sequential; 2 and 3 have no weights.
SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

# The depth of a ResNet by the blocks of its four stages, of two convolutions each or of three.
BASIC_DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
BOTTLENECK_DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}

# What torchvision's ResNets are trained with.
TORCHVISION_SETTINGS = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
}


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


def convert_sequential_resnet(
    state_dict: Dict[str, torch.Tensor], prefix: str
) -> Dict[str, torch.Tensor]:
    """`convert_torchvision_resnet` of a ResNet whose modules are numbered in an nn.Sequential.

    Args:
        state_dict: may have more tensors, which are left out.
        prefix: of the Sequential, such as features. for features.0.weight.
    """
    named = {sequential_name(name, prefix): tensor for name, tensor in state_dict.items()}
    named.pop("", None)
    return convert_torchvision_resnet(named)


def sequential_name(name: str, prefix: str) -> str:
    """torchvision's name of a tensor of a ResNet in an nn.Sequential; "" if it is none of it."""
    number, _, rest = name.removeprefix(prefix).partition(".")
    known = name.startswith(prefix) and number in SEQUENTIAL
    return f"{SEQUENTIAL[number]}.{rest}" if known else ""


def torchvision_settings(backbone: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that a converted ResNet goes with; raises as `resnet_settings`."""
    return {**TORCHVISION_SETTINGS, **resnet_settings(backbone)}


def resnet_settings(backbone: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The keys of MODEL.RESNETS that say how deep and wide a ResNet is.

    Args:
        backbone: its tensors under detectron2's names, backbone.stem.conv1.weight and so on.
    Raises:
        InputError: they are not those of a ResNet with 18, 34, 50, 101 or 152 layers.
    """
    pattern = re.compile(r"backbone\.res(\d)\.(\d+)\.")
    found = {match.groups() for match in map(pattern.match, backbone) if match}
    blocks = tuple(sum(stage == number for stage, _ in found) for number in "2345")
    bottleneck = "backbone.res2.0.conv3.weight" in backbone
    depth = (BOTTLENECK_DEPTHS if bottleneck else BASIC_DEPTHS).get(blocks)
    convolutions = ["stem.conv1", "res2.0.conv2", "res2.0.conv3"][: 3 if bottleneck else 2]
    kernels = [backbone.get(f"backbone.{name}.weight") for name in convolutions]
    if depth is None or any(kernel is None or kernel.ndim != 4 for kernel in kernels):
        raise InputError(
            "not a ResNet of 18, 34, 50, 101 or 152 layers: its stages have "
            f"{', '.join(map(str, blocks))} blocks"
        )
    settings = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": kernels[0].shape[0],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": kernels[-1].shape[0],
    }
    if bottleneck:
        channels, width = kernels[1].shape[:2]
        settings["MODEL.RESNETS.NUM_GROUPS"] = channels // max(width, 1)
        settings["MODEL.RESNETS.WIDTH_PER_GROUP"] = width
    return settings
