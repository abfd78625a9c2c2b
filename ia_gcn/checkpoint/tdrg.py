"""The published TDRG checkpoints under the names of a model with a TDRGHead."""

from __future__ import annotations

import re
from typing import Any, Dict, Sequence

import torch

from ..errors import InputError
from .places import Place, batch_norm, check_source, convert_head, layer
from .torchvision_resnet import (
    convert_sequential_resnet,
    convert_torchvision_resnet,
    sequential_name,
    torchvision_settings,
)

# The released weights have names of an earlier version of the code.
RENAMES = {
    "features.": "layer1.",
    "classifier.": "trans_classifier.",
    "conv_position.": "guidance_transform.",
    "fc.": "constraint_classifier.",
    "conv_transform.": "gcn_dim_transform.",
    "gcn.conv_global.": "guidance_conv.",
    "gcn.bn_global.": "guidance_bn.",
    "gcn.conv_create_co_mat.": "matrix_transform.",
    "gcn.dynamic_weight.": "forward_gcn.weight.",
    "last_linear.": "gcn_classifier.",
}
# The identity, with which the code picks each label's own score: an index here.
MASK = "mask_mat"
# What the code does not use: of a decoder and positions, and of the earlier version. backbone. is
# layer1. to layer4. once more.
UNUSED = (
    *(MASK, "backbone.", "query_embed.", "positional_embedding.", "transformer.decoder."),
    *("bottleneck.", "classifier_global.", "bn_position.", "gcn.static_"),
)
STEM, STAGES = "layer1.", ("layer2.", "layer3.", "layer4.")

PLACES = {
    **layer("transform_28", "fine"),
    **layer("transform_14", "coarse"),
    **layer("transform_7", "halved"),
    **layer("trans_classifier", "structure_classifier", (0,)),
    "constraint_classifier.weight": Place("activations.weight", (0,)),
    **layer("gcn_dim_transform", "node_transform"),
    **layer("guidance_transform", "guide_transform", ndim=2),
    **layer("guidance_conv", "graph.context", ndim=2),
    **batch_norm("guidance_bn", "graph.norm"),
    **layer("matrix_transform", "graph.edges", (0,), ndim=2),
    **layer("forward_gcn.weight", "graph.transform", ndim=2),
    **layer("gcn_classifier", "readout", (0,)),
}
ENCODER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")


def convert_tdrg(
    state_dict: Dict[str, torch.Tensor], order: Sequence[int]
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    Args:
        state_dict: with the names of the code or of the released weights.
        order: the places in the checkpoint of the C labels of the model.
    Raises:
        InputError: mask_mat is not the identity.
    """
    mask = state_dict.get(MASK)
    if mask is not None and not mask.equal(torch.eye(len(order), dtype=mask.dtype)):
        raise InputError(f"{MASK} is not the identity")
    state_dict = rename(state_dict)
    places = {**PLACES, **_encoder_places(state_dict)}
    others = {
        name: tensor
        for name, tensor in state_dict.items()
        if not (name in places or name.startswith(STAGES) or sequential_name(name, STEM))
    }
    return {**_backbone(state_dict), **convert_head(state_dict, places, order), **others}


def tdrg_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with.

    Raises:
        InputError: it lacks tensors of TDRG, or see `resnet_settings`.
    """
    state_dict = rename(state_dict)
    needed = [name for name in PLACES if name.endswith("weight")]
    needed.append("transformer.encoder.layers.0.linear1.weight")
    num_labels = check_source(state_dict, needed, "TDRG", labels="constraint_classifier.weight")
    layers = {match[1] for match in map(ENCODER.match, state_dict) if match}
    return {
        **torchvision_settings(_backbone(state_dict)),
        "MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"],
        "MODEL.LABEL_HEAD.NAME": "TDRGHead",
        "MODEL.LABEL_HEAD.IN_FEATURES": ["res4", "res5"],
        "MODEL.LABEL_HEAD.NUM_LABELS": num_labels,
        "MODEL.TDRG.DIM": len(state_dict["transform_14.weight"]),
        "MODEL.TDRG.LAYERS": len(layers),
        "MODEL.TDRG.FFN_DIM": len(state_dict[needed[-1]]),
        # How they were trained.
        "MODEL.TDRG.ATTENTION": "batch",
    }


def unused(name: str) -> bool:
    """Whether the published code does not use a tensor of the checkpoint."""
    return name.startswith(UNUSED)


def rename(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The tensors that are used, under the names of the code."""
    renamed = {}
    for name, tensor in state_dict.items():
        if unused(name):
            continue
        for old, new in RENAMES.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = tensor
    return renamed


def _encoder_places(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Place]:
    matches = filter(None, map(ENCODER.match, state_dict))
    return {match[0]: Place(f"encoder.{match[1]}.{match[2]}") for match in matches}


def _backbone(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    stages = {name: tensor for name, tensor in state_dict.items() if name.startswith(STAGES)}
    return {**convert_sequential_resnet(state_dict, STEM), **convert_torchvision_resnet(stages)}
