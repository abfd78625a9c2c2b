"""The published SSGRL checkpoints under the names of a model with an SSGRLHead."""

from __future__ import annotations

from typing import Any, Dict, Sequence, Tuple

import torch

from ..errors import InputError
from .places import HEAD, Place, check_source, convert_head, layer
from .torchvision_resnet import convert_torchvision_resnet, torchvision_settings

BACKBONE = "resnet_101."

PLACES = {
    "word_semantic.fc_1.weight": Place("attention.of_cells.weight"),
    "word_semantic.fc_2.weight": Place("attention.of_labels.weight"),
    "word_semantic.fc_3.weight": Place("attention.hidden.weight"),
    "word_semantic.fc_a.weight": Place("attention.score.weight"),
    **layer("graph_net.fc_eq3_w", "graph.update_message"),
    **layer("graph_net.fc_eq3_u", "graph.update_state"),
    **layer("graph_net.fc_eq4_w", "graph.reset_message"),
    **layer("graph_net.fc_eq5_w", "graph.new_message"),
    **layer("graph_net.fc_eq5_u", "graph.new_state"),
    **layer("fc_output", "output"),
    **layer("classifiers", "readout", (0,), ndim=3),
}
# Biases that cancel in the softmax; and the layer U_r, in whose place the code takes U_z.
WITHOUT_EFFECT = (
    "word_semantic.fc_3.bias",
    "word_semantic.fc_a.bias",
    "graph_net.fc_eq4_u.weight",
    "graph_net.fc_eq4_u.bias",
)

# label_counts of `probability_counts`; pair_counts are below 2³¹.
COUNT = 2**30


def convert_ssgrl(
    state_dict: Dict[str, torch.Tensor],
    order: Sequence[int],
    embeddings: torch.Tensor,
    graph: torch.Tensor,
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    Args:
        state_dict: with resnet_101, word_semantic, graph_net, fc_output and classifiers.
        order: the places in the checkpoint of the C labels of the model.
        embeddings: (C, d), in the model's order.
        graph: A (C, C), in the model's order.
    Raises:
        InputError: see `probability_counts`.
    """
    label_counts, pair_counts = probability_counts(graph)
    others = {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in PLACES and name not in WITHOUT_EFFECT and not name.startswith(BACKBONE)
    }
    head = convert_head(state_dict, PLACES, order)
    for part in ("weight", "bias"):
        if f"{HEAD}graph.update_state.{part}" in head:
            head[f"{HEAD}graph.reset_state.{part}"] = head[f"{HEAD}graph.update_state.{part}"]
    return {
        **_backbone(state_dict),
        **head,
        **others,
        "label_graph.label_counts": label_counts,
        "label_graph.pair_counts": pair_counts,
        "label_graph.embeddings": embeddings,
    }


def ssgrl_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with.

    Raises:
        InputError: it lacks tensors of SSGRL, or see `resnet_settings`.
    """
    needed = [name for name in PLACES if name.endswith("weight")]
    num_labels = check_source(state_dict, needed, "SSGRL", labels="classifiers.weight")
    hidden_dim, embedding_dim = state_dict["word_semantic.fc_2.weight"].shape
    return {
        **torchvision_settings(_backbone(state_dict)),
        "MODEL.LABEL_HEAD.NAME": "SSGRLHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": num_labels,
        "MODEL.LABEL_EMBEDDINGS.DIM": embedding_dim,
        "MODEL.SSGRL.HIDDEN_DIM": hidden_dim,
        "MODEL.SSGRL.OUTPUT_DIM": len(state_dict["fc_output.weight"]),
        "MODEL.SSGRL.CLASSIFIER_GRAPH": False,
    }


def probability_counts(graph: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Counts whose quotients are a given A to within 10⁻⁹ of its largest element.

    They are not the statistics of the training set, which cannot be computed from A.

    Args:
        graph: A, (C, C).
    Returns:
        (C,) int64 and (C, C) int32.
    Raises:
        InputError: A has a negative element, or one on its diagonal.
    """
    if (graph < 0).any() or graph.diagonal().any():
        raise InputError(
            "the graph must have no negative element, and zeros on its diagonal, as conditional "
            "probabilities of one label given another"
        )
    # Published graphs count pairs of objects and not of images: an element may be above 1.
    count = int(COUNT / max(1.0, float(graph.max())))
    label_counts = torch.full((len(graph),), count, dtype=torch.int64)
    return label_counts, (graph.double() * count).round().to(torch.int32)


def _backbone(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    return convert_torchvision_resnet(
        {
            name.removeprefix(BACKBONE): tensor
            for name, tensor in state_dict.items()
            if name.startswith(BACKBONE)
        }
    )
