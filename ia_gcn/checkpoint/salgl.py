"""The published SALGL checkpoints under the names of a model with a SALGLHead."""

from __future__ import annotations

from typing import Any, Dict, Sequence

import torch

from .places import Place, check_source, convert_head, layer
from .torchvision_resnet import convert_torchvision_resnet, torchvision_settings

BACKBONE = "backbone."

GRAPH = {
    **layer("ggnn.fc1_w", "graph.update_message"),
    **layer("ggnn.fc1_u", "graph.update_state"),
    **layer("ggnn.fc2_w", "graph.reset_message"),
    **layer("ggnn.fc2_u", "graph.reset_state"),
    **layer("ggnn.fc3_w", "graph.new_message"),
    **layer("ggnn.fc3_u", "graph.new_state"),
}
ATTENTION = "tb.layers.0.self_attn"
PLACES = {
    f"{ATTENTION}.in_proj_weight": Place("encoder.self_attn.in_proj_weight"),
    f"{ATTENTION}.in_proj_bias": Place("encoder.self_attn.in_proj_bias"),
    **layer(f"{ATTENTION}.out_proj", "encoder.self_attn.out_proj"),
    **layer("tb.layers.0.linear1", "encoder.linear1"),
    **layer("tb.layers.0.linear2", "encoder.linear2"),
    **layer("tb.layers.0.norm1", "encoder.norm1"),
    **layer("tb.layers.0.norm2", "encoder.norm2"),
    "scene_linear.weight": Place("scene_classifier.weight"),
    "comatrix": Place("pair_counts", (1, 2)),
    "attention.linear1.weight": Place("attention.of_cells.weight"),
    "attention.linear2.weight": Place("attention.of_labels.weight"),
    "attention.hidden_linear.weight": Place("attention.hidden.weight"),
    "attention.target_linear.weight": Place("attention.score.weight"),
    **layer("fc.0", "output"),
    **layer("classifier", "readout", (0,), ndim=3),
}
EMBEDDINGS = "embeddings"
# It depends on the size of the map alone.
POSITIONS = "position_embedding.pe"
# Biases that cancel in the softmax.
CANCELLED = ("attention.hidden_linear.bias", "attention.target_linear.bias")


def convert_salgl(
    state_dict: Dict[str, torch.Tensor], order: Sequence[int]
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    Args:
        state_dict: with backbone, tb, scene_linear, comatrix, embeddings, attention, ggnn, fc and
            classifier.
        order: the places in the checkpoint of the C labels of the model.
    """
    places = {**PLACES, **(GRAPH if has_graph(state_dict) else {})}
    left = (EMBEDDINGS, *without_effect(state_dict))
    others = {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in places and name not in left and not name.startswith(BACKBONE)
    }
    return {
        **_backbone(state_dict),
        **convert_head(state_dict, places, order),
        **others,
        "label_graph.embeddings": state_dict[EMBEDDINGS].detach()[order],
    }


def salgl_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with.

    Raises:
        InputError: it lacks tensors of SALGL, or see `resnet_settings`.
    """
    needed = [EMBEDDINGS, *(name for name in PLACES if name.endswith("weight")), "comatrix"]
    needed += [name for name in GRAPH if name.endswith("weight")]
    num_labels = check_source(state_dict, needed, "SALGL", labels="classifier.weight")
    dim = state_dict["scene_linear.weight"].shape[1]
    return {
        **torchvision_settings(_backbone(state_dict)),
        "MODEL.LABEL_HEAD.NAME": "SALGLHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": num_labels,
        "MODEL.LABEL_EMBEDDINGS.DIM": state_dict[EMBEDDINGS].shape[1],
        "MODEL.SALGL.FFN_DIM": len(state_dict["tb.layers.0.linear1.weight"]),
        "MODEL.SALGL.HIDDEN_DIM": len(state_dict["attention.linear1.weight"]),
        "MODEL.SALGL.NUM_SCENES": len(state_dict["comatrix"]),
        "MODEL.SALGL.POSITIONS": POSITIONS in state_dict,
        "MODEL.SALGL.BOTH_DIRECTIONS": state_dict["ggnn.fc1_w.weight"].shape[1] == 2 * dim,
        **({} if has_graph(state_dict) else {"MODEL.SALGL.STEPS": 0}),
    }


def has_graph(state_dict: Dict[str, torch.Tensor]) -> bool:
    """Whether the gated graph has steps: what it makes stands beside the nodes then."""
    dim = state_dict["scene_linear.weight"].shape[1]
    return state_dict["fc.0.weight"].shape[1] == 2 * dim


def without_effect(state_dict: Dict[str, torch.Tensor]) -> Sequence[str]:
    """Names of the tensors that the model has no part for."""
    graph = () if has_graph(state_dict) else GRAPH
    return [name for name in (POSITIONS, *CANCELLED, *graph) if name in state_dict]


def _backbone(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    return convert_torchvision_resnet(
        {
            name.removeprefix(BACKBONE): tensor
            for name, tensor in state_dict.items()
            if name.startswith(BACKBONE)
        }
    )
