"""Running IA-GCN on an image to see its regions and label graph; and the same as JSON."""

from __future__ import annotations

from typing import Dict, List, Sequence

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..io.images import boxes_on_image
from .regions import Recognition, labels_to_show, thumbnail

# How many labels of each region are described.
TOP_LABELS = 3


@torch.no_grad()
def recognize(
    model: nn.Module,
    sample: Dict,
    pixels: np.ndarray,
    *,
    name: str = "",
    targets: torch.Tensor | None = None,
) -> Recognition:
    """Run a model with a region branch on an image.

    Args:
        model: in evaluation mode; its `has_regions` is true.
        sample: of the image, as `MultiLabelDatasetMapper` or a predictor's `view` makes it: the
            model's input `image`, the image's own `height` and `width`, and the `window` of it that
            the input shows.
        pixels: the image itself, (height, width, 3) uint8 RGB, or its `thumbnail`.
        name: what to call it.
        targets: (C,) in {1, 0, -1 = unknown}; None: nothing is known.
    Raises:
        InputError: the model's output is not finite.
    """
    result = model([sample])[0]
    regions = result["regions"].to("cpu")
    if targets is None:
        targets = torch.full_like(result["scores"], -1)
    logits = {"fused": "logits", "global": "logits_global", "region": "logits_region"}
    recognition = Recognition(
        name=name,
        image=thumbnail(pixels),
        width=sample["width"],
        height=sample["height"],
        targets=targets.cpu().numpy(),
        scores={
            branch: to_numpy(result[key].sigmoid())
            for branch, key in logits.items()
            if key in result
        },
        presence=to_numpy(result["presence"]),
        label_graph=image_label_graph(model, result["presence"]),
        boxes=boxes_on_image(to_numpy(regions.proposal_boxes.tensor), sample),
        objectness=to_numpy(regions.objectness_logits.sigmoid()),
        weights=to_numpy(regions.weights),
        region_scores=to_numpy(regions.scores),
    )
    said = (*recognition.scores.values(), recognition.weights, recognition.region_scores)
    if not all(np.isfinite(values).all() for values in said):
        raise InputError(f"MODEL.WEIGHTS: the model's output for {name} is not finite")
    return recognition


def image_label_graph(model: nn.Module, presence: torch.Tensor) -> Dict[str, np.ndarray]:
    """A_S and A_F, where the model works with them, and A_I, (C, C) each, of a (C,).

    With several draws of z, a is their mean.
    """
    individual = presence[:, None] * presence
    graph = {"individual": individual}
    if model.label_graph is not None and model.label_graph.has_statistics:
        graph["statistical"] = model.label_graph.lcm
        if model.has_image_dependent_graph:
            graph["fused"] = graph["statistical"] * individual
    return {name: to_numpy(lcm) for name, lcm in graph.items()}


def describe_recognition(
    recognition: Recognition, file_name: str, label_names: Sequence[str]
) -> Dict:
    """A recognition as JSON takes it, with numbers of 4 decimals; what there is not is None.

    Args:
        recognition: of the image.
        file_name: of the image.
        label_names: C names.
    """
    scores = {name: _rounded(values) for name, values in recognition.scores.items()}
    unknown = [None] * len(label_names)
    shown = labels_to_show(recognition)
    graph = {
        name: _rounded(lcm[np.ix_(shown, shown)]) for name, lcm in recognition.label_graph.items()
    }
    return {
        "file_name": file_name,
        "width": recognition.width,
        "height": recognition.height,
        "labels": [
            {
                "name": name,
                "score": score,
                "score_global": score_global,
                "score_region": score_region,
                "presence": presence,
                "present": {1: True, 0: False}.get(target),
            }
            for name, score, score_global, score_region, presence, target in zip(
                label_names,
                scores["fused"],
                scores.get("global", unknown),
                scores.get("region", unknown),
                _rounded(recognition.presence),
                recognition.targets.tolist(),
            )
        ],
        "regions": _describe_regions(recognition, label_names),
        "label_graph": {
            "labels": [label_names[i] for i in shown],
            "statistical": graph.get("statistical"),
            "individual": graph["individual"],
            "fused": graph.get("fused"),
        },
    }


def _describe_regions(recognition: Recognition, label_names: Sequence[str]) -> List[Dict]:
    """Each region's box, objectness and weight, and its TOP_LABELS."""
    return [
        {
            "box": box,
            "objectness": objectness,
            "weight": weight,
            "labels": [
                {"name": label_names[i], "score": _rounded(scores[i])}
                for i in np.argsort(-scores, kind="stable")[:TOP_LABELS]
            ],
        }
        for box, objectness, weight, scores in zip(
            recognition.boxes.round(2).tolist(),
            _rounded(recognition.objectness),
            _rounded(recognition.weights),
            recognition.region_scores,
        )
    ]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """float64."""
    return tensor.double().cpu().numpy()


def _rounded(values: np.ndarray):
    """As plain numbers, or lists of such, of 4 decimals."""
    return values.round(4).tolist()
