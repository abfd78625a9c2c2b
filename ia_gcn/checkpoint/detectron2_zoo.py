"""Faster R-CNNs of detectron2's model zoo as backbone and RPN of an instance-aware model."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List

import torch

from .torchvision_resnet import resnet_settings

# Of the backbones that the zoo has from Caffe2's ResNets, and of the ResNeXt.
RESNET_SETTINGS = {
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "INPUT.FORMAT": "BGR",
}
RESNEXT_SETTINGS = {
    **RESNET_SETTINGS,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
}

# Those of an FPN lie a level deeper.
BOTTOM_UP = "backbone.bottom_up."
REGION_RES5 = "roi_heads.res5."
RPN = "proposal_generator."
ANCHORS = f"{RPN}anchor_generator.cell_anchors."


def convert_detectron2(
    state_dict: Dict[str, torch.Tensor], model_names: Iterable[str]
) -> Dict[str, torch.Tensor]:
    """The tensors of a zoo model that are used: those of the ResNet, the FPN and the RPN.

    A C4 model has its res5 in the ROI heads. It becomes that of the backbone, and, where regions
    have a res5 of their own (MODEL.REGION_BRANCH.RES5), that too.

    Args:
        state_dict: of a Faster R-CNN.
        model_names: of the model's tensors. One whose backbone is an FPN gets all of it, any other
            the ResNet alone.
    """
    converted = {
        name: tensor
        for name, tensor in state_dict.items()
        if name.startswith(RPN) and not name.startswith(ANCHORS)
    }
    if has_fpn(model_names):
        named = {name: t for name, t in state_dict.items() if name.startswith("backbone.")}
        return {**named, **converted}
    backbone = resnet_tensors(state_dict)
    converted.update(backbone)
    if any(name.startswith(REGION_RES5) for name in model_names):
        for name, tensor in backbone.items():
            if name.startswith("backbone.res5."):
                converted[name.replace("backbone.res5.", REGION_RES5)] = tensor
    return converted


def resnet_tensors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The ResNet of a Faster R-CNN, C4, DC5 or FPN, as backbone.stem, backbone.res2 to res5."""
    prefixes = {BOTTOM_UP if has_fpn(state_dict) else "backbone.": "backbone."}
    prefixes[REGION_RES5] = "backbone.res5."
    return {
        name.replace(prefix, replacement, 1): tensor
        for name, tensor in state_dict.items()
        for prefix, replacement in prefixes.items()
        if name.startswith(prefix)
    }


def detectron2_settings(
    state_dict: Dict[str, torch.Tensor], model_names: Iterable[str]
) -> Dict[str, Any]:
    """The config keys that a zoo model's backbone and RPN go with in a model of these tensors.

    Raises:
        InputError: its backbone is no ResNet, see `resnet_settings`.
    """
    resnet = resnet_settings(resnet_tensors(state_dict))
    grouped = resnet.get("MODEL.RESNETS.NUM_GROUPS", 1) > 1
    settings = {**(RESNEXT_SETTINGS if grouped else RESNET_SETTINGS), **resnet}
    kernel = state_dict.get(f"{RPN}rpn_head.conv.weight")
    if kernel is not None and kernel.ndim == 4 and has_fpn(state_dict) == has_fpn(model_names):
        out_channels, in_channels = kernel.shape[:2]
        # In detectron2, -1 stands for the number of input channels.
        settings["MODEL.RPN.CONV_DIMS"] = [-1 if out_channels == in_channels else out_channels]
    return settings


def has_fpn(names: Iterable[str]) -> bool:
    """Whether tensors of these names have an FPN in their backbone."""
    return any(name.startswith(BOTTOM_UP) for name in names)


def anchors(state_dict: Dict[str, torch.Tensor]) -> List[torch.Tensor]:
    """Those that the RPN was trained with, (n, 4) for each feature map; none in newer files."""
    return [tensor for name, tensor in state_dict.items() if name.startswith(ANCHORS)]
