"""The published ADD-GCN checkpoint under the names of a model with an ADDGCNHead."""

from __future__ import annotations

from typing import Any, Dict, Sequence

import torch

from ..errors import InputError
from .places import Place, batch_norm, check_source, convert_head, layer
from .torchvision_resnet import (
    convert_sequential_resnet,
    sequential_name,
    torchvision_settings,
)

# The identity, with which the code picks each label's own score: an index here.
MASK = "mask_mat"

FEATURES = "features."

PLACES = {
    "fc.weight": Place("classifiers.weight", (0,)),
    **layer("conv_transform", "transform"),
    "gcn.static_adj.0.weight": Place("static_graph.adjacency.weight", (0, 1), ndim=2),
    **layer("gcn.static_weight.0", "static_graph.transform", ndim=2),
    **layer("gcn.conv_global", "dynamic_graph.context", ndim=2),
    **batch_norm("gcn.bn_global", "dynamic_graph.norm"),
    **layer("gcn.conv_create_co_mat", "dynamic_graph.edges", (0,), ndim=2),
    **layer("gcn.dynamic_weight", "dynamic_graph.transform", ndim=2),
    **layer("last_linear", "readout", (0,)),
}
NEEDED = ("fc.weight", "conv_transform.weight", "gcn.static_adj.0.weight", "last_linear.weight")


def convert_add_gcn(
    state_dict: Dict[str, torch.Tensor], order: Sequence[int]
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    Args:
        state_dict: with features.0 to features.7, fc, conv_transform, gcn, last_linear, mask_mat.
        order: the places in the checkpoint of the C labels of the model.
    Raises:
        InputError: mask_mat is not the identity.
    """
    mask = state_dict.get(MASK)
    if mask is not None and not mask.equal(torch.eye(len(order), dtype=mask.dtype)):
        raise InputError(f"{MASK} is not the identity")
    others = {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in PLACES and name != MASK and not sequential_name(name, FEATURES)
    }
    return {
        **convert_sequential_resnet(state_dict, FEATURES),
        **convert_head(state_dict, PLACES, order),
        **others,
    }


def add_gcn_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with.

    Raises:
        InputError: it lacks tensors of ADD-GCN, or see `resnet_settings`.
    """
    num_labels = check_source(state_dict, NEEDED, "ADD-GCN", labels="fc.weight")
    return {
        **torchvision_settings(convert_sequential_resnet(state_dict, FEATURES)),
        "MODEL.LABEL_HEAD.NAME": "ADDGCNHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": num_labels,
        "MODEL.ADD_GCN.NODE_DIM": len(state_dict["conv_transform.weight"]),
        "MODEL.ADD_GCN.STATIC_GRAPH": True,
        "MODEL.ADD_GCN.DYNAMIC_GRAPH": True,
    }
