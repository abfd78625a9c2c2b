"""C-Tran's checkpoints under the names of a model with a CTranHead."""

from __future__ import annotations

import re
from typing import Any, Dict, Sequence

import torch

from ..errors import InputError
from .torchvision_resnet import convert_torchvision_resnet, torchvision_settings

BACKBONE = "backbone.base_network."
LABELS, STATES = "label_lt.weight", "known_label_lt.weight"
READOUT = ("output_linear.weight", "output_linear.bias")
# ImageNet's classifier, which is not used.
CLASSIFIER = f"{BACKBONE}fc."

RENAMES = [
    (r"^label_lt\.", "label_embeddings."),
    (r"^known_label_lt\.", "state_embeddings."),
    (r"^LayerNorm\.", "norm."),
    (r"^self_attn_layers\.(\d+)\.transformer_layer\.", r"layers.\1."),
    (r"^output_linear\.", "readout."),
]


def convert_c_tran(
    state_dict: Dict[str, torch.Tensor], order: Sequence[int]
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    Of a network that was trained without label masks (without --use_lmt), the embeddings of the
    states have no meaning: here that of an unknown label is added to every label.

    Args:
        state_dict: with backbone.base_network, label_lt, known_label_lt, LayerNorm,
            self_attn_layers, output_linear.
        order: the places in the checkpoint of the C labels of the model.
    """
    converted = _backbone(state_dict)
    for name, tensor in state_dict.items():
        if name.startswith(BACKBONE):
            continue
        if name in (LABELS, *READOUT):
            tensor = tensor[order]
        if name == READOUT[0]:
            tensor = tensor[..., None]
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, f"label_head.{replacement}", name)
        converted[name] = tensor
    return converted


def c_tran_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with, which does not say how many heads there are.

    Raises:
        InputError: it lacks tensors of C-Tran, or see `resnet_settings`.
    """
    for name in (LABELS, STATES, *READOUT):
        if name not in state_dict:
            raise InputError(f"it has no {name}, which C-Tran's checkpoints have")
    if not all(state_dict[name].ndim for name in (LABELS, *READOUT)):
        raise InputError(f"{LABELS} or output_linear is a number")
    pattern = re.compile(r"self_attn_layers\.(\d+)\.")
    layers = {match[1] for match in map(pattern.match, state_dict) if match}
    return {
        **torchvision_settings(_backbone(state_dict)),
        "MODEL.LABEL_HEAD.NAME": "CTranHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": len(state_dict[LABELS]),
        "MODEL.C_TRAN.NUM_LAYERS": len(layers),
        "MODEL.C_TRAN.POSITIONS": False,
    }


def _backbone(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    return convert_torchvision_resnet(
        {
            name.removeprefix(BACKBONE): tensor
            for name, tensor in state_dict.items()
            if name.startswith(BACKBONE)
        }
    )
