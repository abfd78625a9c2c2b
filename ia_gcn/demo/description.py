"""Texts and figures of the page: of a model and of an image."""

from __future__ import annotations

import io
import os
import re
from typing import List, NamedTuple, Tuple

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from ..data.dataset_mapper import read_image
from ..inference import MultiLabelPredictor, Prediction
from ..inference.known_labels import KnownLabels, check_known, hold_known, with_known
from ..io.images import turn_to_decode
from ..modeling import LabelGraph
from ..visualization import (
    attend,
    draw_attention_sheet,
    draw_recognition,
    plot_label_graph,
    recognize,
    thumbnail,
)
from ..visualization.regions import MAX_LABELS

# Drawn of an image, the best by objectness.
MAX_REGIONS = 10
# Of the labels, named on the page.
MAX_NAMED_LABELS = 10
# And of an image's.
MAX_SHOWN_LABELS = 100


class Description(NamedTuple):
    """What the page shows of an image."""

    labels: List[Tuple[str, float]]
    """Those from the threshold on with their probabilities, the highest first, MAX_SHOWN_LABELS at
    most; and those that are known, whatever their probability."""
    figure: Image.Image | None
    """RGB, of the regions and the label graph, of the attention, or of the label graph; None of a
    model that has none of them."""


def describe_image(
    predictor: MultiLabelPredictor, image: str, threshold: float, known: KnownLabels | None = None
) -> Description:
    """Run a model on an image.

    Args:
        predictor: of the model.
        image: a file.
        threshold: the least probability of a label.
        known: labels that are known of it, see `MultiLabelPredictor`.
    Raises:
        UnreadableImage: the file is no image.
        InputError: the model's output is not finite; the model makes no use of known labels, or has
            no label of a name.
    """
    check_known(predictor, known)
    names, figure = predictor.label_names, None
    with turn_to_decode(image):
        view = with_known(predictor.view(image), known, names)
        drawn = predictor.has_regions or predictor.model.has_attention
        pixels = thumbnail(read_image(image)) if drawn else None
    name = os.path.basename(image)
    if predictor.has_regions:
        recognition = recognize(predictor.model, view, pixels, name=name)
        scores = recognition.scores["fused"]
        content = io.BytesIO()
        draw_recognition(recognition, names, threshold, MAX_REGIONS, content)
        figure = read_png(content)
    elif predictor.model.has_attention:
        attended = attend(predictor.model, view, pixels, name=name)
        scores = attended.scores
        content = io.BytesIO()
        draw_attention_sheet([attended], names, threshold, content)
        figure = read_png(content)
    else:
        scores = predictor.predict_views([view])[0].scores
        graph = statistical_graph(predictor)
        if graph is not None:
            figure = draw_graph(graph, scores, names)
    prediction = Prediction(names, hold_known(view, scores), None)
    labels = dict(prediction.above(threshold, MAX_SHOWN_LABELS))
    # One that is known to be absent stays, so that it can be clicked again.
    labels.update((name, float(there)) for name, there in (known or {}).items())
    return Description(list(labels.items()), figure)


def figure_title(predictor: MultiLabelPredictor) -> str:
    """Of the figure in a `Description`; "" where there is none."""
    if predictor.model.has_regions:
        return "Regions, scores and label graph of this image"
    if predictor.model.has_attention:
        return "What was looked at for each label of this image"
    if statistical_graph(predictor) is not None:
        return "Label graph of the training set, of this image's likeliest labels"
    return ""


def statistical_graph(predictor: MultiLabelPredictor) -> LabelGraph | None:
    """The model's label graph, if it has one with statistics."""
    graph = predictor.model.label_graph
    return graph if graph is not None and graph.has_statistics else None


def draw_graph(graph: LabelGraph, scores: np.ndarray, label_names: List[str]) -> Image.Image:
    """P(j|i) and the statistical LCM of the labels with the highest of the scores (C,)."""
    shown = np.argsort(-scores, kind="stable")[:MAX_LABELS]
    part = np.ix_(shown, shown)
    pairs, lcm = (matrix.cpu().numpy()[part] for matrix in (graph.pair_counts, graph.lcm))
    conditional = pairs / np.maximum(graph.label_counts.cpu().numpy()[shown], 1)[:, None]
    content = io.BytesIO()
    plot_label_graph(conditional, lcm, [label_names[i] for i in shown], content)
    return read_png(content)


def read_png(content: io.BytesIO) -> Image.Image:
    with Image.open(content) as image:
        return image.convert("RGB")


def describe_model(predictor: MultiLabelPredictor) -> List[str]:
    """The model and the data that it was trained on, a line each."""
    cfg, names = predictor.cfg, predictor.label_names
    model = cfg.MODEL.META_ARCHITECTURE
    if predictor.model.label_head is not None:
        model += f" with {cfg.MODEL.LABEL_HEAD.NAME}"
    shown = ", ".join(names[:MAX_NAMED_LABELS]) + (", …" if len(names) > MAX_NAMED_LABELS else "")
    data = [*data_sets(cfg), f"{len(names)} labels ({shown})"]
    return [f"Model: {model} on {network_name(cfg)}", f"Data: {', '.join(data)}"]


def network_name(cfg: CfgNode) -> str:
    """What the backbone is called, for example tresnet_m or resnet101."""
    if cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        return cfg.MODEL.TIMM.NAME
    name = cfg.MODEL.BACKBONE.NAME.removeprefix("build_").removesuffix("_backbone")
    # detectron2's own, which may have an FPN.
    return re.sub(r"^resnet(?=_|$)", f"resnet{cfg.MODEL.RESNETS.DEPTH}", name)


def data_sets(cfg: CfgNode) -> List[str]:
    """Names of the training sets; of a user's own file, the file's, without its folder."""
    custom = os.path.basename(cfg.DATASETS.CUSTOM.TRAIN)
    return [custom if name == "custom_train" and custom else name for name in cfg.DATASETS.TRAIN]
