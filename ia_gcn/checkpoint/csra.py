"""The published checkpoints of CSRA on a ResNet, of its authors and of mmpretrain."""

from __future__ import annotations

import re
from typing import Any, Dict, Sequence

import torch

from ..errors import InputError
from .torchvision_resnet import convert_torchvision_resnet, torchvision_settings

# The classifier of a head: in mmpretrain, and in CSRA's own files.
CLASSIFIER = re.compile(r"(?:head\.csra_heads|classifier\.multi_head)\.(\d+)\.head\.weight$")

# The paper's temperatures by the number of heads; 99 stands for the maximum.
TEMPERATURES = {
    1: [1.0],
    2: [1.0, 99.0],
    4: [1.0, 2.0, 4.0, 99.0],
    6: [1.0, 2.0, 3.0, 4.0, 5.0, 99.0],
    8: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 99.0],
}


def convert_csra(
    state_dict: Dict[str, torch.Tensor], order: Sequence[int]
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    Args:
        state_dict: the ResNet with torchvision's names, after `backbone.` or nothing, and for each
            head a classifier (C, D, 1, 1).
        order: the places in the checkpoint of the labels of the model.
    """
    heads = classifiers(state_dict)
    backbone = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state_dict.items()
        if not CLASSIFIER.match(name)
    }
    return {
        **convert_torchvision_resnet(backbone),
        **{f"label_head.classifiers.{i}.weight": head[order] for i, head in heads.items()},
    }


def classifiers(state_dict: Dict[str, torch.Tensor]) -> Dict[int, torch.Tensor]:
    """The heads' classifiers (C, D, 1, 1) by number.

    Raises:
        InputError: there are not 1, 2, 4, 6 or 8, or they do not have one C.
    """
    found = {
        int(match[1]): state_dict[name]
        for name, match in ((name, CLASSIFIER.match(name)) for name in state_dict)
        if match
    }
    if len(found) not in TEMPERATURES:
        raise InputError(
            f"it has {len(found)} classifiers head.csra_heads or classifier.multi_head, and not "
            f"{', '.join(map(str, TEMPERATURES))}"
        )
    if len({tensor.shape[:1] for tensor in found.values()}) > 1:
        raise InputError("its heads have different numbers of labels")
    return found


def csra_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with, but for λ, which is not in it.

    Raises:
        InputError: see `classifiers` and `resnet_settings`.
    """
    heads = classifiers(state_dict)
    return {
        **torchvision_settings(convert_csra(state_dict, [0])),
        # Red, green and blue from 0 to 1, with both projects.
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
        "MODEL.LABEL_HEAD.NAME": "CSRAHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": len(next(iter(heads.values()))),
        "MODEL.CSRA.TEMPERATURES": TEMPERATURES[len(heads)],
    }
