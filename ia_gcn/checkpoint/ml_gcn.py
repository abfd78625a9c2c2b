"""The published ML-GCN checkpoint under the names of a model with a GCNHead."""

from __future__ import annotations

from typing import Any, Dict, Sequence, Tuple

import torch

from ..errors import InputError
from ..modeling.label_graph import statistical_lcm
from .torchvision_resnet import (
    convert_sequential_resnet,
    sequential_name,
    torchvision_settings,
)

FEATURES = "features."

MATRICES = ("A", "gc1.weight", "gc2.weight")

# Relative tolerance for A, which is float32.
TOLERANCE = 1e-6


def convert_ml_gcn(
    state_dict: Dict[str, torch.Tensor],
    order: Sequence[int],
    embeddings: torch.Tensor,
    threshold: float,
    reweight: float,
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    The checkpoint has the graph itself, A, and no counts of the training set, from which our
    `LabelGraph` makes it: it gets `edge_counts`.

    Args:
        state_dict: with features.0 to features.7, gc1.weight (d, .), gc2.weight (., D), A (C, C).
        order: the places in the checkpoint of the C labels of the model.
        embeddings: H⁽⁰⁾ (C, d), in the model's order.
        threshold, reweight: τ and p of `statistical_lcm`, of the model.
    Raises:
        InputError: see `check_ml_gcn` and `edge_counts`.
    """
    check_ml_gcn(state_dict)
    lcm = state_dict["A"].float()[order][:, order]
    label_counts, pair_counts = edge_counts(lcm, threshold, reweight)
    others = {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in MATRICES and not sequential_name(name, FEATURES)
    }
    return {
        **convert_sequential_resnet(state_dict, FEATURES),
        **others,
        "label_graph.label_counts": label_counts,
        "label_graph.pair_counts": pair_counts,
        "label_graph.embeddings": embeddings,
        "label_head.layers.0.weight": state_dict["gc1.weight"],
        "label_head.layers.1.weight": state_dict["gc2.weight"],
    }


def ml_gcn_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with.

    Raises:
        InputError: see `check_ml_gcn` and `resnet_settings`.
    """
    check_ml_gcn(state_dict)
    embedding_dim, hidden_dim = state_dict["gc1.weight"].shape
    return {
        **torchvision_settings(convert_sequential_resnet(state_dict, FEATURES)),
        "MODEL.GLOBAL_POOLING.NAME": "max",
        "MODEL.LABEL_HEAD.NAME": "GCNHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": len(state_dict["A"]),
        "MODEL.LABEL_EMBEDDINGS.DIM": embedding_dim,
        "MODEL.LABEL_GCN.HIDDEN_DIMS": [hidden_dim],
        "MODEL.LABEL_GCN.NEGATIVE_SLOPE": 0.2,
        "MODEL.LABEL_GCN.BIAS": False,
    }


def check_ml_gcn(state_dict: Dict[str, torch.Tensor]) -> None:
    """Raise an error unless the names are those of ML-GCN's checkpoint.

    Raises:
        InputError: A, gc1.weight or gc2.weight is not there, or is no matrix; or A is not square.
    """
    for name in MATRICES:
        if name not in state_dict:
            raise InputError(f"it has no {name}, which ML-GCN's published checkpoint has")
        if state_dict[name].ndim != 2:
            raise InputError(f"{name} is no matrix, but {tuple(state_dict[name].shape)}")
    rows, columns = state_dict["A"].shape
    if rows != columns:
        raise InputError(f"A is {rows}×{columns}, and not a number for each pair of labels")


def edge_counts(
    lcm: torch.Tensor, threshold: float, reweight: float
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Counts of which `statistical_lcm` makes a given A: 1 for a label and an edge, 0 for no edge.

    They are not the statistics of the training set, which cannot be computed from A: they are those
    of one image per label, which also shows all labels that the label has an edge to.

    Args:
        lcm: A, (C, C).
        threshold, reweight: τ and p.
    Returns:
        (C,) int64 and (C, C) int32.
    Raises:
        InputError: no counts make A, with these τ and p.
    """
    pair_counts = (lcm != 0).to(torch.int32).fill_diagonal_(1)
    label_counts = torch.ones(len(lcm), dtype=torch.int64)
    made = statistical_lcm(pair_counts, label_counts, threshold, reweight)
    if not torch.allclose(made, lcm.double(), rtol=0, atol=TOLERANCE):
        raise InputError(
            "A is not p · P / (ΣP + 1e-6) + I of a P of zeros and ones, with p "
            f"MODEL.LABEL_GRAPH.REWEIGHT {reweight} and MODEL.LABEL_GRAPH.THRESHOLD {threshold}"
        )
    return label_counts, pair_counts
